"""A kind of memory that computes attention where the KV cache lies: ``configs/pim/<name>.ini``.

A file has the sections ``[dram]`` and ``[attention]`` of :class:`PimSpec`. Or it describes its channel as
DRAMsim3 does, in ``[dram_structure]``, ``[timing]`` and ``[system]``: files of LLMServingSim are like that.
"""

from __future__ import annotations

import configparser
from glob import escape
from typing import TYPE_CHECKING, Annotated, Any

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.annotated import Field
from servesim.specs.reading import read_text
from servesim.specs.validation import Count, LatencyNs, SizeGb, Spec, Unit, validated

if TYPE_CHECKING:
    from pathlib import Path

_COUNTS = ("bus_width_bits", "burst_length")
_SUFFIX = "_pim"
"""Ends the names of LLMServingSim's devices."""


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
    """The device of ``configs/pim/<name>.ini``; ``<device>_pim`` is ``<device>`` where it has no file itself.

    Raises:
        MissingFileError: there is no such file; InputError: it is wrong.
    """
    way_out = "A new device needs such a file, with the timings of one channel (docs/pim.md)"
    plain = name.removesuffix(_SUFFIX)
    if plain != name and not paths.find_all(f"configs/pim/{escape(name)}.ini"):
        name = plain
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
    if "dram_structure" in data:
        data = _from_dramsim(path, data)
    return validated(PimSpec, data, str(path))


def _from_dramsim(path: Path, data: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of ours that a file in DRAMsim3's form amounts to.

    Times there are counts of clocks of ``tCK`` ns, with two transfers a clock. Nothing is said about
    attention: without a section ``[attention]`` the shipped device of its name does.

    Raises:
        InputError: a value is missing or no number, or nobody says how long attention takes.
    """

    def number(section: str, key: str) -> float:
        value = data.get(section, {}).get(key.lower())
        if not isinstance(value, int | float) or not value > 0:
            found = "is missing" if value is None else f"{value!r} is not allowed"
            raise InputError(f"{path}: {section}.{key}: {found}; must be a number above 0")
        return float(value)

    clock_ns = number("timing", "tCK")
    dram = {
        "capacity_gb": number("system", "channel_size") / 1024,  # of MB
        "data_rate_mts": 2000 / clock_ns,
        "bus_width_bits": int(number("system", "bus_width")),
        "burst_length": int(number("dram_structure", "BL")),
        "row_to_column_ns": clock_ns * number("timing", "tRCD"),
        "cas_latency_ns": clock_ns * number("timing", "CL"),
    }
    if "attention" in data:
        return {"dram": dram, "attention": data["attention"]}
    shipped = paths.packaged_data_dir() / "configs" / "pim" / f"{path.stem.removesuffix(_SUFFIX)}.ini"
    if not shipped.is_file() or shipped.resolve() == path.resolve():
        raise InputError(
            f"{path}: attention: is missing, and no device of that name is shipped; add a section "
            "[attention] with slope (ns per token) and intercept (ns), see docs/pim.md"
        )
    return {"dram": dram, "attention": read_pim(shipped).attention.model_dump()}


def _number(key: str, text: str) -> object:
    """INI knows text only; what is no number is left for the field's check to refuse."""
    try:
        return int(text) if key in _COUNTS else float(text)
    except ValueError:
        return text
