"""The files a run can write: which option names one, and what writes it.

An output is an option with ``writes=`` in :class:`servesim.specs.options.RuntimeOptions` and a line in
:data:`WRITERS`; everything else (checks of the path, all files or none, the flag and its help) follows.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from servesim.results.atomic import all_or_none

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions


class Writer(Protocol):
    """Writes one output of a run."""

    def __call__(
        self, result: Result, path: str, options: RuntimeOptions, extra: Mapping[str, Any]
    ) -> list[str]:
        """Write ``path`` and return the paths of all files written.

        ``extra``: figures beside the run's own, by key of the summary.
        """


WRITERS = {
    "output": "servesim.results.csv:write_requests",
    "steps": "servesim.results.steps:write_steps",
    "timeline": "servesim.results.timeline:write_timeline",
    "summary": "servesim.results.summary:write_summary",
    "save_result": "servesim.results.client_files:write_vllm_result",
    "aiperf": "servesim.results.client_files:write_aiperf_table",
    "report": "servesim.report.run:write_report",
    "plots": "servesim.report.run:write_plots",
}
"""Option -> module:function of its :class:`Writer`, in the order files are written and told in."""


def save_outputs(result: Result, options: RuntimeOptions, extra: Mapping[str, Any]) -> list[str]:
    """Write the files the options ask for, all of them or none; returns their paths."""
    saved = []
    with all_or_none():
        for option, home in WRITERS.items():
            if path := getattr(options, option):
                module, _, name = home.partition(":")
                write: Writer = getattr(import_module(module), name)
                saved += write(result, path, options, extra)
    return saved
