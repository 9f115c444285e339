"""How far kernel times are off, as measured: the number behind every verdict and every word of trust.

All numbers are those of benchmarks/RESULTS.md (a test holds them together). No whole step was measured on
most GPUs: there, what was found where steps were measured and what prompts in chunks show on the GPU itself
are added up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from servesim.slotted import dataclass
from servesim.specs.block_layers import ATTENTION_KINDS
from servesim.specs.dtypes import KV_CACHE_SIZED

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS = "benchmarks/RESULTS.md"
WHOLE_STEPS = 5.2
"""%: P95 of single steps of silicon bundles against layerwise profiles, the worst model (RTX PRO 6000)."""
CHECKED_GPU = "RTXPRO6000"
CHUNKED_PROMPTS: dict[str, tuple[int, int | None]] = {
    "H100": (1, 6),
    "H200": (-2, 1),
    "B200": (7, 9),
    "B300": (7, 11),
    "GB200": (3, 7),
    "GB300": (5, 6),
    "L40S": (11, 12),
    "A100": (7, None),
    "B60": (4, 5),
    "RTXPRO6000": (14, 6),
}
"""%: a long prompt in chunks against the same in one piece, silicon; with 16-bit and with fp8 KV."""
PUBLIC_RUNS = {"B200": (8.0, 8.9), "H100": (5.1, 6.3), "H200": (4.5, 4.7)}
"""%: median absolute error of the mean TPOT and the mean TTFT of public serving runs of Llama-3.1-70B,
silicon with the constants of the hardware file, the worst degree."""
ROOFLINE_STEPS: dict[str, tuple[int, int]] = {
    "A100": (16, 63),
    "B200": (4, 36),
    "B300": (4, 40),
    "B60": (21, 69),
    "GB200": (5, 45),
    "GB300": (4, 44),
    "H100": (7, 20),
    "H200": (10, 36),
    "L40S": (4, 24),
    "RTXPRO6000": (6, 32),
}
"""%: median and P95 of whole steps, the worst kind of step, of GPUs that the roofline was fitted to."""
ROOFLINE_OTHERS = (21, 91)
"""%: the same of a GPU left out of the fit, the worst one."""
SILICON_PROMPT = 16384
"""Tokens of the longest prompt in the public tables; longer ones, and their history, are extrapolated."""
MEASURED = 3.8
"""%: error of the mean TPOT of recorded runs with measured bundles and no host time, the worst run."""
UNSTATED = 10.0
"""%: assumed of a bundle that says nothing about its origin."""
DERIVED = 30.0
"""%: assumed where kernels of a KV or weight format were derived from those of another: nobody published what
unpacking costs, and it may cost what the smaller bytes save. Also where ranks share KV by tokens: no table
has such a step."""
_SHARED = "decode context parallelism: derived from tables of other degrees and collectives, not measured"


@dataclass(slots=True, frozen=True)
class StatedError:
    """What is known about the error of an instance's kernel times."""

    percent: float
    """A difference between two runs that is smaller may be the tables', not the runs'."""
    reason: str
    """Where the number is from."""
    ttft: float | None = None
    """The same of TTFT, where it is known to be another, in percent."""

    def sharing_context(self) -> StatedError:
        """The same where ranks share KV by tokens."""
        return StatedError(
            max(self.percent, DERIVED), f"{_SHARED}; without it ±{self.percent:g} %", self.ttft
        )

    @property
    def ttft_percent(self) -> float:
        """What counts for TTFT."""
        return self.percent if self.ttft is None else max(self.ttft, self.percent)


@dataclass(slots=True, frozen=True)
class Uncertainty:
    """How far the step times of an instance may be off: half of an 80 % interval, as shares."""

    prefill: float
    """Of steps with a prefill chunk."""
    decode: float
    """Of steps that only decode."""
    front_end_ms: tuple[float, float]
    """What a client's TTFT may hold less, and more, than the modelled front end."""
    reason: str
    beyond: float = 0.12
    """Of decodes, on top, where contexts are longer than any that was measured."""

    def sharing_context(self) -> Uncertainty:
        """The same where ranks share KV by tokens."""
        return replace(
            self,
            prefill=math.hypot(self.prefill, DERIVED / 100),
            decode=math.hypot(self.decode, DERIVED / 100),
            reason=f"{self.reason}, {_SHARED}",
        )

    def beyond_range(self) -> Uncertainty:
        """The same where contexts are longer than any that was measured."""
        return Uncertainty(
            math.hypot(self.prefill, BEYOND_RANGE),
            math.hypot(self.decode, self.beyond),
            self.front_end_ms,
            f"{self.reason}, contexts beyond the measured ones",
            self.beyond,
        )


SERVED: dict[str, tuple[float, float]] = {
    "H100": (0.10, 0.07),
    "H200": (0.09, 0.07),
    "B200": (0.16, 0.10),
    "A100": (0.10, 0.10),
}
"""GPU -> (prefill, decode) of silicon bundles with the constants of its hardware file: P80 of the absolute
errors of mean TTFT and mean TPOT over its public rows, from H100 for A100, which has two rows."""
NOT_SERVED = (0.27, 0.15)
"""The same without such constants: P80 of the errors of H100, H200 and B200 before they had any."""
RECORDED_HOST = {"silicon": (0.03, 0.02), "measured": (0.02, 0.01)}
"""The same on the recorded machine with its host constants: the worst recording that was not fitted."""
NO_RECORDED_HOST = (0.20, 0.04)
"""Measured bundles without host constants: the worst recording."""
PER_VERSION = 0.003
"""For every minor version of vLLM between the tables and the one asked for: 0.19 to 0.28 moved the mean TPOT
of one model by 3 %."""
BEYOND_RANGE = 0.12
"""Contexts beyond the measured ones: 9 to 14 % off where longer ones are known."""
BEYOND_MEASURED = 0.09
"""The same of decodes in bundles measured on a GPU, which go on with the rate that all their points tell: P80
of the errors of the longest rows of the public tables, predicted from those up to an eighth as long; 8 % of
all GPUs, 9 % of H100."""
BEYOND_TABLES = 0.05
"""The same of decodes in silicon bundles, which go on by bytes and rate: P80 of the errors of the longest
rows of all tables, predicted from those up to a half, a quarter and an eighth as long."""
FRONT_END_KNOWN, FRONT_END_UNKNOWN = (3.0, 3.0), (0.0, 12.0)
"""ms: the spread over H100 servers; what public servers show on top of kernel times."""


@dataclass(slots=True, frozen=True)
class Reach:
    """Where the measurements under an instance's kernel times end; None: not stated."""

    prompt_tokens: int | None
    """Longest prompt that was measured."""
    context_tokens: int | None
    """Longest KV of a decode that was measured, or of the tables."""
    sequences: int | None
    """Most sequences of a step in the tables."""


def reach_of(meta: Mapping[str, Any], measured: tuple[int, int] | None = None) -> Reach:
    """What a bundle's ``meta.yaml`` says about the range of its tables.

    ``measured``: tokens of the longest prompt and of the longest context that attention was measured with;
    None: the bundle does not say, and the ends of its tables stand in.
    """
    grid = meta.get("attention_grid")
    grid = grid if isinstance(grid, dict) else {}
    decodes = grid.get("n_decode")
    tables = meta.get("tables")
    derived = isinstance(tables, dict) and "beyond the measurements" in tables
    prompt = SILICON_PROMPT if derived else None
    context = grid["max_kv"] if isinstance(grid.get("max_kv"), int) else None
    if measured is not None:
        prompt, context = measured
    return Reach(
        prompt_tokens=prompt,
        context_tokens=context,
        sequences=decodes[-1]
        if isinstance(decodes, list) and decodes and isinstance(decodes[-1], int)
        else None,
    )


def stated_error(meta: Mapping[str, Any], hardware: str, kv_dtype: str) -> StatedError:
    """The error of a bundle with this ``meta.yaml``, for KV of ``kv_dtype``."""
    if meta.get("source") == "forward":
        known = stated_error({**meta, "source": meta.get("corrects")}, hardware, kv_dtype)
        return replace(known, reason=f"before whole steps corrected it; {known.reason}")
    source = str(meta.get("source") or ("vllm" if meta.get("vllm_version") else ""))
    derived = derived_formats(meta, kv_dtype) if source in ("silicon", "roofline") else ""
    if derived:
        return StatedError(DERIVED, f"{source}: {derived} derived from other formats, not measured")
    kinds = meta.get(ATTENTION_KINDS)
    if isinstance(kinds, dict) and any(about.get("kind") == "compressed" for about in kinds.values()):
        return StatedError(
            DERIVED, f"{source}: attention over compressed tokens, of which no whole step or run is known"
        )
    if source == "silicon":
        return _of_silicon(hardware, 1 if "fp8" in kv_dtype else 0)
    if source == "roofline":
        if hardware in ROOFLINE_STEPS:
            median, p95 = ROOFLINE_STEPS[hardware]
            return StatedError(median, f"roofline fitted to this GPU: median of whole steps, P95 {p95} %")
        median, p95 = ROOFLINE_OTHERS
        return StatedError(median, f"roofline of a GPU it was not fitted to: median of steps, P95 {p95} %")
    if source in ("vllm", "torch"):
        return StatedError(MEASURED, "measured kernels: mean TPOT of recorded runs without host time")
    return StatedError(UNSTATED, "assumed: the bundle does not say where it is from")


def derived_formats(meta: Mapping[str, Any], kv_dtype: str) -> str:
    """What of a computed bundle comes from kernels of another format, in a few words; empty: nothing."""
    tables = meta.get("tables")
    told = tables if isinstance(tables, dict) else {}
    # DeepSeek's own slots are what the fp8 kernels of sparse latent attention were measured with
    found = [f"{kv_dtype} KV"] if kv_dtype in KV_CACHE_SIZED and kv_dtype != "fp8_ds_mla" else []
    for name, claim in (("products", "products"), ("experts", "moe")):
        if "derived from 16-bit" in str(told.get(claim, "")):
            found.append(name)
    return " and ".join(found)


def _of_silicon(hardware: str, column: int) -> StatedError:
    if hardware == CHECKED_GPU:
        return StatedError(WHOLE_STEPS, "silicon: P95 of single steps measured on this GPU")
    known = CHUNKED_PROMPTS.get(hardware, (None, None))[column]
    why = "what prompts in chunks show on this GPU"
    if known is None:
        known = max(abs(value) for pair in CHUNKED_PROMPTS.values() for value in pair if value is not None)
        why = "what prompts in chunks show at worst on another one: not checked here"
    percent = round(WHOLE_STEPS + abs(known), 1)
    reason = f"silicon: P95 of steps on {CHECKED_GPU}, {WHOLE_STEPS} %, plus {why}"
    if hardware not in PUBLIC_RUNS:
        return StatedError(percent, reason)
    tpot, ttft = PUBLIC_RUNS[hardware]
    if tpot > percent:
        return StatedError(tpot, "silicon: mean TPOT of public serving runs on this GPU", ttft)
    return StatedError(percent, reason, ttft)


def uncertainty(
    meta: Mapping[str, Any], hardware: str, *, calibrated: bool, version: str | None = None
) -> Uncertainty:
    """How far step times may be off with this bundle, by kind of table, GPU and distance of versions.

    Args:
        meta: the bundle's.
        hardware: of the instance.
        calibrated: whether its hardware file has constants of a server.
        version: of vLLM as asked for; None: not said.
    """
    if meta.get("source") == "forward":
        before = {**meta, "source": meta.get("corrects")}
        known = uncertainty(before, hardware, calibrated=calibrated, version=version)
        return replace(known, reason=f"before whole steps corrected it: {known.reason}")
    source = str(meta.get("source") or ("vllm" if meta.get("vllm_version") else ""))
    front_end = FRONT_END_KNOWN if calibrated and hardware in SERVED else FRONT_END_UNKNOWN
    if source == "silicon":
        prefill, decode = NOT_SERVED
        reason = "public tables, no server of this GPU is known"
        if hardware == CHECKED_GPU and calibrated:
            (prefill, decode), reason = RECORDED_HOST["silicon"], "public tables, recorded runs on this GPU"
            front_end = (0.0, 0.0)
        elif hardware in SERVED and calibrated:
            (prefill, decode), reason = SERVED[hardware], "public tables, public serving runs on this GPU"
    elif source in ("vllm", "torch"):
        (prefill, decode), reason = NO_RECORDED_HOST, "measured kernels, no host constants"
        if calibrated:
            (prefill, decode), reason = RECORDED_HOST["measured"], "measured kernels, recorded runs"
            front_end = (0.0, 0.0)
    elif source == "roofline":
        median, p95 = ROOFLINE_STEPS.get(hardware, ROOFLINE_OTHERS)
        prefill = decode = (median + 0.6 * (p95 - median)) / 100  # P80 of a bell through median and P95
        reason = "roofline"
    else:
        (prefill, decode), reason = NOT_SERVED, "a bundle that does not say where it is from"
    apart = minor_versions_apart(meta, version)
    if apart:
        drift = apart * PER_VERSION
        prefill, decode = math.hypot(prefill, drift), math.hypot(decode, drift)
        reason += f", {apart} minor versions of vLLM apart"
    beyond = {"silicon": BEYOND_TABLES, "vllm": BEYOND_MEASURED, "torch": BEYOND_MEASURED}.get(
        source, BEYOND_RANGE
    )
    return Uncertainty(prefill, decode, front_end, reason, beyond)


def minor_versions_apart(meta: Mapping[str, Any], version: str | None) -> int:
    """Between the vLLM that a bundle's tables are from and ``version``; 0 where one of them is not known."""
    own = meta.get("vllm_version")
    return abs(_minor(version) - _minor(own)) if version and own else 0


def _minor(version: object) -> int:
    """The second number of a version, 0 where there is none."""
    parts = str(version).split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
