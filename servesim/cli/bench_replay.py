"""``servesim bench replay``: send a workload to a live server and record when its tokens come."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.bench.endpoint import EndpointSettings
    from servesim.bench.replay import ReplaySettings, Tally
    from servesim.bench.target import Target
    from servesim.workload.request import Workload

_KEY_VARIABLE = "OPENAI_API_KEY"
_NOT_IDENTITY = (
    "output",
    "api_key",
    "action",
    "module",
    "command",
    "run",
    "dataset",
    "timeout",
    "max_duration",
)
"""Arguments that do not decide what is recorded."""

_OF_A_SERVER: dict[str, Any] = {
    "url": "http://127.0.0.1:8000",
    "server": "vllm",
    "endpoint": "completions",
    "prompts": "auto",
    "api_key": None,
    "extra_body": None,
    "max_duration": 3600.0,
    "timeout": 600.0,
}
"""Arguments that only a server knows, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action's flags."""
    parser.description = (
        "Send a workload to an OpenAI-compatible server, each request at its time and with its exact output "
        "length where the server can be told (vLLM), and record when the tokens come back, in the form that "
        "bench validate reads. The same command again goes on where an interrupted one stopped."
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="FILE", help="workload, in any known format")
    add("--output", required=True, metavar="FOLDER", help="the recording; a rerun goes on with what is there")
    add("--num-reqs", type=int, default=0, metavar="N", help="entries to load, 0: all (default: 0)")
    add("--seed", type=int, default=42, metavar="N", help="of made-up prompts and arrivals (default: 42)")
    add(
        "--request-rate",
        type=float,
        metavar="REQ/S",
        help="rescale or replace the arrivals; inf: all at once (default: as in the workload)",
    )
    add(
        "--max-concurrency",
        type=int,
        default=0,
        metavar="N",
        help="closed loop: at most this many requests in the server (default: 0 = open loop)",
    )
    add(
        "--engine-args",
        metavar="JSON",
        help="engine arguments, as a JSON object or a file with one: what --engine vllm starts with, or what "
        "the server was started with, noted in meta.json (default: what the server tells)",
    )
    add(
        "--no-token-times",
        dest="token_times",
        action="store_false",
        help="leave the times of single tokens out",
    )
    add("--model", metavar="NAME", help="model to ask for (default: the first the server lists)")
    add(
        "--engine",
        choices=("http", "vllm"),
        default="http",
        help="http: a server; vllm: vLLM in this process, with its own stamps (default: http)",
    )
    server = parser.add_argument_group("server")
    add = server.add_argument
    add(
        "--url",
        default=_OF_A_SERVER["url"],
        metavar="URL",
        help="base address (default: http://127.0.0.1:8000)",
    )
    add(
        "--server",
        choices=("vllm", "openai"),
        default=_OF_A_SERVER["server"],
        help="vllm: exact output lengths and token counts per chunk; openai: only what every server knows "
        "(default: vllm)",
    )
    add(
        "--endpoint",
        choices=("completions", "chat"),
        default=_OF_A_SERVER["endpoint"],
        help="/v1/completions or /v1/chat/completions (default: completions)",
    )
    add(
        "--prompts",
        choices=("auto", "ids", "text"),
        default=_OF_A_SERVER["prompts"],
        help="token ids, or text of about the same length; auto: ids for completions of vLLM (default: auto)",
    )
    add("--api-key", metavar="KEY", help=f"sent, never written (default: ${_KEY_VARIABLE})")
    add(
        "--extra-body",
        metavar="JSON",
        help="more fields of every request, as a JSON object or a file with one",
    )
    add(
        "--max-duration",
        type=float,
        default=_OF_A_SERVER["max_duration"],
        metavar="SECONDS",
        help="longest time that one answer may take (default: 3600)",
    )
    add(
        "--timeout",
        type=float,
        default=_OF_A_SERVER["timeout"],
        metavar="SECONDS",
        help="longest silence of the server within a request (default: 600)",
    )


def run(args: argparse.Namespace) -> int:
    """Replay, record, and say what was recorded."""
    from servesim.bench.replay import replay
    from servesim.workload.formats import load_workload

    check(args)
    target = target_of(args)
    workload = load_workload(
        args.dataset, num_reqs=args.num_reqs, request_rate=args.request_rate, seed=args.seed
    )
    settings = settings_of(args)
    screen = _Screen(len(workload)) if sys.stdout.isatty() else None
    try:
        tally = replay(workload, target, Path(args.output), settings, screen.show if screen else None)
    except KeyboardInterrupt:
        print(f"{args.output}: incomplete; the same command goes on with it", file=sys.stderr)
        raise
    finally:
        if screen:
            screen.close()
    print(report(tally, args.output, workload))
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse numbers and combinations that make no sense.

    Raises:
        InputError: one of them.
    """
    for flag, value, least in (
        ("--num-reqs", args.num_reqs, 0),
        ("--seed", args.seed, 0),
        ("--max-concurrency", args.max_concurrency, 0),
    ):
        if value < least:
            raise InputError(f"{flag}: {value} is not allowed; must be >= {least}")
    for flag, seconds in (("--timeout", args.timeout), ("--max-duration", args.max_duration)):
        if not 0 < seconds <= 1e9:
            raise InputError(f"{flag}: {seconds:g} is not allowed; must be seconds > 0")
    if args.engine == "vllm":
        if not args.model:
            raise InputError("--engine vllm: needs --model, the name or folder of the model to load")
        changed = [name for name, usual in _OF_A_SERVER.items() if getattr(args, name) != usual]
        if changed:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise InputError(
                f"{flags}: has no effect with --engine vllm, which runs in this process; leave it "
                "out, or record a server with --engine http"
            )
        return
    if args.prompts == "ids" and args.endpoint == "chat":
        raise InputError("--prompts ids: the chat endpoint takes only text; use --endpoint completions")


def target_of(args: argparse.Namespace) -> Target:
    """What the arguments say to record."""
    engine_kwargs = json_object("--engine-args", args.engine_args)
    if args.engine == "vllm":
        from servesim.bench.in_process import InProcessVllm

        return InProcessVllm(args.model, engine_kwargs, args.seed)
    from servesim.bench.endpoint import Endpoint

    return Endpoint(endpoint_settings(args), args.api_key or os.environ.get(_KEY_VARIABLE) or None)


def endpoint_settings(args: argparse.Namespace) -> EndpointSettings:
    """The arguments that say which server, and how to talk to it."""
    from servesim.bench.endpoint import EndpointSettings

    vllm, chat = args.server == "vllm", args.endpoint == "chat"
    return EndpointSettings(
        url=args.url,
        chat=chat,
        vllm=vllm,
        as_ids=args.prompts == "ids" or (args.prompts == "auto" and vllm and not chat),
        model=args.model,
        seed=args.seed,
        timeout_s=args.timeout,
        most_s=args.max_duration,
        extra_body=json_object("--extra-body", args.extra_body),
    )


def settings_of(args: argparse.Namespace) -> ReplaySettings:
    """How to replay, and what a rerun has to have in common with this run."""
    from servesim.bench.replay import ReplaySettings

    hashed = file_hash(args.dataset)
    identity = {
        name: str(value) if value == float("inf") else value
        for name, value in vars(args).items()
        if name not in _NOT_IDENTITY
    }
    return ReplaySettings(
        max_concurrency=args.max_concurrency,
        token_times=args.token_times,
        arguments={**identity, "dataset_hash": hashed},
        dataset={"dataset_path": args.dataset, "dataset_hash": hashed},
        engine_kwargs={} if args.engine == "vllm" else json_object("--engine-args", args.engine_args),
    )


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """The object in ``text``, which is JSON or the path of a file with JSON; empty for None.

    Raises:
        InputError: it is neither.
    """
    from servesim.specs.reading import parse_json_object, read_json_object

    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        return parse_json_object(text, flag)
    return read_json_object(Path(text))


def file_hash(path: str) -> str:
    """SHA-256 of a workload file."""
    from hashlib import file_digest

    from servesim.workload.files import resolve

    with resolve(path).open("rb") as handle:
        return file_digest(handle, "sha256").hexdigest()


def report(tally: Tally, output: str, workload: Workload) -> str:
    """What was recorded, in a few lines."""
    if tally.skipped == tally.total:
        return f"{output}: all {tally.total} requests of {workload.source} are recorded already"
    from servesim.bench.replay import delay_figures

    before = f", {tally.skipped} recorded earlier" if tally.skipped else ""
    lines = [
        f"{output}: {tally.completed} requests recorded{before}, {tally.failed} failed, "
        f"{tally.output_tokens} tokens, at most {tally.most_in_flight} at once"
    ]
    delays = delay_figures(tally.delays_s)
    if delays:
        lines.append(
            f"requests were sent {delays['median']:.2f} ms (median), {delays['p99']:.2f} ms (P99) after they "
            "were due"
        )
    if tally.failed:
        lines.append(f"first failure: {tally.first_error}; all are in errors.jsonl, a rerun tries them again")
    if tally.other_length:
        lines.append(
            f"{tally.other_length} outputs are not as long as the workload says: the server does not honour "
            "min_tokens and ignore_eos (--server vllm asks for them)"
        )
    if tally.merged:
        lines.append(f"{tally.merged} answers came in chunks of several tokens: their times are per chunk")
    return "\n".join(lines)


class _Screen:
    """A progress bar on the terminal."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("recording"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests  {task.fields[state]}"),
            TimeElapsedColumn(),
            auto_refresh=False,  # no thread beside the stamps
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, state="")
        self._bar.start()

    def show(self, tally: Tally) -> None:
        """Redraw."""
        failed = f", {tally.failed} failed" if tally.failed else ""
        self._bar.update(
            self._task,
            completed=tally.skipped + tally.completed + tally.failed,
            state=f"{tally.in_flight} in flight, {tally.output_tokens} tokens{failed}",
        )
        self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()
