"""Decodes longer than any that were measured: the longest rows of the public tables left out and predicted.

    python benchmarks/long_contexts.py            all GPUs, and the section of benchmarks/RESULTS.md
    python benchmarks/long_contexts.py --print    the section on the screen only

For every GPU, KV format, head shape (4, 5 and 8 query heads a KV head) and number of decodes, tables are cut
at a half, a quarter and an eighth of the longest context, and the longest is predicted from the rest: by the
derivation as it is, and in proportion to the length. Needs ``pip install 'servesim[silicon]'``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results_page import command  # noqa: E402

from servesim.errors import InputError  # noqa: E402
from servesim.profiler.silicon.attention import WARM_BYTES, AttentionShape, AttentionTimes  # noqa: E402
from servesim.profiler.silicon.head_shapes import measured_heads  # noqa: E402
from servesim.profiler.silicon.tables import installed, read_table, silicon_gpu  # noqa: E402
from servesim.results.stated_errors import CHUNKED_PROMPTS  # noqa: E402
from servesim.specs.hardware import load_hardware  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.profiler.silicon.tables import Gpu, KernelTable

HEAD_DIM = 128
GROUPS = (4, 5, 8)
CUTS = (2, 4, 8)
"""The longest context over the longest that is kept."""


def errors(hardware: str, cut: int) -> Iterator[tuple[float, float]]:
    """% by which the derivation, and a time in proportion to the length, miss the longest row of each batch.

    Rows count whose KV comes from DRAM where the table is cut already; the others say nothing of a rate.
    """
    gpu = silicon_gpu(load_hardware(hardware))
    for kv in ("bfloat16", "fp8"):
        like = {"head_dim": HEAD_DIM, "kv_cache_dtype": kv}
        try:
            decodes = read_table(gpu.folder, "attention", "generation_attention_perf", like=like)
            prompts = read_table(gpu.folder, "attention", "context_attention_perf", like=like)
        except InputError:
            continue
        if kv not in decodes.values("kv_cache_dtype"):
            continue
        for heads, kv_heads in measured_heads(AttentionShape(1, 1, HEAD_DIM, kv).select_any_heads(decodes)):
            if heads % kv_heads or heads // kv_heads not in GROUPS:
                continue
            shape = AttentionShape(heads, kv_heads, HEAD_DIM, kv)
            yield from _of_shape(gpu, shape, shape.select(decodes), shape.select(prompts), cut)


def _of_shape(
    gpu: Gpu, shape: AttentionShape, rows: KernelTable, prompts: KernelTable, cut: int
) -> Iterator[tuple[float, float]]:
    if not len(rows) or not len(prompts):
        return
    sizes, lengths = rows.integers("batch_size"), rows.integers("step") + 1
    for size in np.unique(sizes).tolist():
        own = np.sort(lengths[sizes == size])
        longest = int(own[-1])
        kept = own[own <= longest // cut]
        if len(kept) < 3 or shape.kv_bytes(size, int(kept[-1])) < WARM_BYTES * gpu.l2_bytes:
            continue
        times = AttentionTimes(gpu, shape, rows.those(lengths <= kept[-1]), prompts)
        truth = float(rows.latency_us[(sizes == size) & (lengths == longest)][0])
        last = float(rows.latency_us[(sizes == size) & (lengths == kept[-1])][0])
        yield (
            100 * (times.measured_us(size, longest) / truth - 1),
            100 * (last * longest / int(kept[-1]) / truth - 1),
        )


def section() -> str:
    """The section as Markdown."""
    lines = [
        (__doc__ or "").split("\n\n")[2].replace("\n", " ").split(" Needs")[0]
        + " Errors in percent: signed median / P80 of the absolute ones. Made by "
        "`python benchmarks/long_contexts.py`.",
        "",
        f"| GPU | rows | {' | '.join(f'{cut} × as long | in proportion' for cut in CUTS)} |",
        f"| --- | ---: | {' | '.join('---: | ---:' for _ in CUTS)} |",
    ]
    everything: dict[int, list[tuple[float, float]]] = {cut: [] for cut in CUTS}
    for hardware in CHUNKED_PROMPTS:
        found = {cut: list(errors(hardware, cut)) for cut in CUTS}
        lines.append(_line(hardware, found))
        for cut in CUTS:
            everything[cut] += found[cut]
    return "\n".join([*lines, _line("all", everything)])


def _line(name: str, found: dict[int, list[tuple[float, float]]]) -> str:
    cells = []
    for cut in CUTS:
        for column in (0, 1):
            values = np.array([pair[column] for pair in found[cut]])
            told = f"{np.median(values):+.1f} / {np.percentile(abs(values), 80):.1f}" if len(values) else ""
            cells.append(told)
    return f"| {name} | {len(found[CUTS[0]])} | {' | '.join(cells)} |"


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    lacking = "" if installed() else "needs pip install 'servesim[silicon]'"
    return command("long-contexts", (__doc__ or "").splitlines()[0], section, lacking)


if __name__ == "__main__":
    sys.exit(main())
