"""The base of every description a user writes: frozen, strict about types, closed to unknown keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """Frozen pydantic model: ``"8"`` is no integer, ``true`` no number, NaN and inf no measurements."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # `model_name` and `model_type` are field names of ours
        defer_build=True,  # validators are built on first use: --help never needs them
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a number, for error messages and the JSON Schema."""

    name: str


def list_as_tuple(value: object) -> object:
    """JSON's and YAML's lists, for fields that are tuples."""
    return tuple(value) if isinstance(value, list) else value


# Every number has bounds that no real thing reaches, and within which no time or size that is worked out
# from it leaves the 64 bits it is kept in.
SizeGb = Annotated[float, Field(ge=1e-6, le=1e6), Unit("GB")]
"""Memory size; 1 GB here is 2**30 bytes."""
BandwidthGbs = Annotated[float, Field(ge=1e-6, le=1e6), Unit("GB/s")]
"""Bandwidth; 1 GB/s is 1e9 bytes per second."""
LatencyNs = Annotated[float, Field(ge=0, le=1e12), Unit("ns")]
PowerW = Annotated[float, Field(ge=0, le=1e6), Unit("W")]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
"""How many of something there are."""
