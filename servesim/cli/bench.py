"""``servesim bench``: compare the simulator with the real thing. Each action is a module of its own, imported
when asked for.

An action's module has ``add_arguments(parser)`` and ``run(args) -> exit status``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

ACTIONS = {
    "record-scheduler": (
        "servesim.cli.bench_record_scheduler",
        "log every decision of vLLM's own scheduler over a workload (needs vLLM, no GPU)",
    ),
    "replay": (
        "servesim.cli.bench_replay",
        "send a workload to a live server and record when its tokens come back",
    ),
    "validate": (
        "servesim.cli.bench_validate",
        "simulate a recorded run and say how far off the simulation is",
    ),
    "calibrate": (
        "servesim.cli.bench_calibrate",
        "fit the host constants of a machine on a recorded run",
    ),
}
"""Action -> (module, one line of help)."""

_HELP = "compare the simulator with vLLM: its scheduler, recordings, live servers"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the group; an action's flags are added when it turns out to be the one asked for."""
    parser = subparsers.add_parser("bench", help=_HELP, description=_HELP, allow_abbrev=False)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=_deferred(type(parser))
    )
    for name, (module, text) in ACTIONS.items():
        actions.add_parser(name, help=text, description=text, allow_abbrev=False).set_defaults(module=module)


def run(args: argparse.Namespace) -> int:
    """Run the action; returns its exit status."""
    status: int = import_module(args.module).run(args)
    return status


def _deferred(base: type[Any]) -> type[Any]:
    """A parser class that imports its action's module, and takes its flags from there, when it first
    parses."""

    class ActionParser(base):  # type: ignore[misc]
        flags_added = False

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            if not self.flags_added:
                self.flags_added = True
                import_module(self.get_default("module")).add_arguments(self)
            return super().parse_known_args(args, namespace)

    return ActionParser
