"""Golden logs: a small workload together with what vLLM's own scheduler did with it, in one compressed file.

Line 1 names the golden and holds its workload; the rest is the log (see ``servesim.bench.scheduler_log``).
Token ids are not stored but numbered: a prompt is a list of pieces ``[stream, first, count]``, and token
``i`` of stream ``s`` has the id ``s * 2**20 + i``, so that equal pieces are equal text and different streams
share nothing.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from servesim.bench.scheduler_log import SchedulerLog, log_from_lines, read_json_lines, write_json_lines
from servesim.specs.vllm_versions import VERSIONS, VllmVersion, minor_version
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = Path(__file__).parent
STREAM = 1 << 20
OUTPUT_STREAM = 1_000_000
"""Request i generates the tokens of stream OUTPUT_STREAM + i unless its entry names another stream."""


@dataclass(slots=True)
class Golden:
    """One golden file."""

    name: str
    about: str
    entries: list[dict[str, Any]]
    """The workload as stored: arrival | after + tool, prompt (pieces, or a length: no ids), output, text?,
    priority?, limit (of the answer, above its length: it ends by a stop token)?, salt?, lora?"""
    log: SchedulerLog

    def workload(self) -> Workload:
        """The workload with its token ids."""
        return build_workload(self.entries, self.name)


def build_workload(entries: list[dict[str, Any]], source: str) -> Workload:
    """Expand stored entries into requests."""
    requests = []
    for index, entry in enumerate(entries):
        prompt, output = entry["prompt"], entry["output"]
        ids = None if isinstance(prompt, int) else np.concatenate([tokens(*piece) for piece in prompt])
        stream = entry.get("text", OUTPUT_STREAM + index)
        requests.append(
            Request(
                index=index,
                input_tokens=prompt if ids is None else len(ids),
                output_tokens=output,
                arrival_ns=entry.get("arrival", 0),
                input_ids=ids,
                output_ids=None if ids is None else tokens(stream, 0, output),
                predecessor=entry.get("after", -1),
                tool_ns=entry.get("tool", 0),
                priority=entry.get("priority", 0),
                max_tokens=entry.get("limit", 0),
                cache_salt=entry.get("salt"),
                lora=entry.get("lora"),
            )
        )
    return Workload(requests, source)


def tokens(stream: int, first: int, count: int) -> NDArray[np.int64]:
    """Ids of ``count`` consecutive tokens of a stream, shape (count,)."""
    return stream * STREAM + np.arange(first, first + count, dtype=np.int64)


def is_drained(name: str) -> bool:
    """Whether a golden is of a pipeline that now and then runs dry; see :func:`drains`."""
    return "pipeline_drained" in name


def drains(step: int) -> bool:
    """Whether nothing is scheduled behind step ``step`` while it is in flight, in such a golden."""
    return step % 7 in (2, 3)


def golden_path(name: str) -> Path:
    """``name``: a recipe's, behind the folder of a version: ``vllm-0.33/async_tight``. New ones are packed
    more tightly than the first."""
    path = FOLDER / f"{name}.jsonl.gz"
    return path if path.exists() else path.with_suffix(".xz")


def golden_names() -> list[str]:
    """Names of all goldens, sorted."""
    paths = (path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.jsonl.?z"))
    return sorted(path[: -len(".jsonl.gz")] for path in paths)


def golden_name(recipe: str, version: str) -> str:
    """A recipe's golden of a version of vLLM: those of the first one have no folder of their own."""
    return recipe if version == VERSIONS[0] else f"vllm-{version}/{recipe}"


def version_of(golden: Golden) -> VllmVersion:
    """The version of vLLM that a golden is a recording of, such as ``0.24``."""
    version: Any = minor_version(golden.log.header["vllm"])
    assert version in VERSIONS, version
    return cast("VllmVersion", version)


def read_golden(name: str) -> Golden:
    path = golden_path(name)
    if path.suffix == ".xz":
        text = lzma.decompress(path.read_bytes()).decode()
        head, *lines = [json.loads(line) for line in text.splitlines()]
    else:
        head, *lines = read_json_lines(path)
    return Golden(head["golden"], head["about"], head["requests"], log_from_lines(lines, name))


def write_golden(golden: Golden) -> None:
    head = {"golden": golden.name, "about": golden.about, "requests": golden.entries}
    path, lines = golden_path(golden.name), [head, *golden.log.lines()]
    if path.suffix == ".xz":
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    else:
        write_json_lines(path, lines)
