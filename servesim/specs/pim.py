"""A kind of memory that computes attention where the KV cache lies: ``configs/pim/<name>.ini``."""

from __future__ import annotations

import configparser
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.base import Count, LatencyNs, SizeGb, Spec, Unit
from servesim.specs.reading import read_text
from servesim.specs.validation import validated

if TYPE_CHECKING:
    from pathlib import Path

_COUNTS = ("bus_width_bits", "burst_length")


class DramChannel(Spec):
    """One channel of the memory."""

    capacity_gb: SizeGb
    """In units of 2**30 bytes."""
    data_rate_mts: Annotated[float, Field(ge=1e-3, le=1e6), Unit("MT/s")]
    bus_width_bits: Count
    burst_length: Count
    row_to_column_ns: LatencyNs
    cas_latency_ns: LatencyNs

    @property
    def bandwidth_gbs(self) -> float:
        """GB/s (1e9 bytes per second) at which the channel is read from outside."""
        return self.data_rate_mts * self.bus_width_bits / 8000.0

    @property
    def read_latency_ns(self) -> float:
        """Until the first burst of a closed row has arrived: activate, read, burst."""
        return self.row_to_column_ns + self.cas_latency_ns + 1000.0 * self.burst_length / self.data_rate_mts


class AttentionCost(Spec):
    """ns of one decode's attention in one block on one channel, a line over its KV length.

    Of the reference shape, Llama-3.1-8B's: 32 query and 8 KV heads of 128, KV in 16 bit.
    """

    slope: Annotated[float, Field(ge=1e-6, le=1e9), Unit("ns/token")]
    intercept: Annotated[float, Field(ge=0, le=1e12), Unit("ns")]


class PimSpec(Spec):
    """One channel of memory and its attention units."""

    dram: DramChannel
    attention: AttentionCost


def load_pim(name: str) -> PimSpec:
    """The device of ``configs/pim/<name>.ini``.

    Raises:
        MissingFileError: there is no such file; InputError: it is wrong.
    """
    way_out = "A new device needs such a file, with the timings of one channel (docs/pim.md)"
    return read_pim(paths.find_named("configs/pim/*.ini", name, "device", way_out))


def read_pim(path: Path) -> PimSpec:
    """The device described in one file."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(read_text(path))
    except configparser.Error as error:
        message = " ".join(str(error).replace("'<string>'", "the file").split())
        raise InputError(f"{path}: not an INI file: {message}") from None
    data = {
        section: {key: _number(key, text) for key, text in parser[section].items()}
        for section in parser.sections()
    }
    return validated(PimSpec, data, str(path))


def _number(key: str, text: str) -> object:
    """INI knows text only; what is no number is left for the field's check to refuse."""
    try:
        return int(text) if key in _COUNTS else float(text)
    except ValueError:
        return text
