"""``servesim serve``: an emulated vLLM, for what talks to vLLM."""

from __future__ import annotations

import gc
import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from servesim.cli.parts import add_command
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import uvicorn
    from starlette.applications import Starlette

    from servesim.specs.options import RuntimeOptions

_HELP = "an emulated vLLM server: OpenAI's interface with simulated timing"
_EPILOG = """\
Answers are filler; their times are those of the simulated steps. --speed 10 lets time pass ten
times as fast; --virtual-time N lets it pass only while N calls wait.

  servesim serve --hardware H100 --model meta-llama/Llama-3.1-8B --port 8000
  servesim serve --cluster-config configs/cluster/single_node_multi_instance.json --speed 10
"""
_NOT_SERVED = ("max_concurrency", "skip_prefill", "stepped", "sticky_sessions", "router_refresh")
"""Run flags that a server has no use for, beside those of workloads, ensembles and files."""

_SPARE_CONNECTIONS = 1024
"""Connections beside those of open answers: for short questions, and clients that keep theirs."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.api import LOADING, NOISE
    from servesim.specs.options import add_arguments, output_fields

    parser = add_command(subparsers, "serve", _HELP, _EPILOG, "servesim serve [OPTIONS]")
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine alone)",
    )
    add("--port", type=int, default=8000, metavar="N", help="port, 0: any free one (default: 8000)")
    add(
        "--speed",
        type=float,
        metavar="N",
        help="simulated seconds that pass in a second (default: 1)",
    )
    add(
        "--virtual-time",
        type=int,
        metavar="N",
        help="time passes only while N calls wait, and takes none of the wall clock's",
    )
    add("--api-key", metavar="KEY", help="what clients have to send (default: nothing)")
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that clients ask for (default: the model's)",
    )
    add(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME",
        help="LoRA adapters that clients may ask for by these names (NAME=PATH too); needs --enable-lora",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, or a folder with one (default: an estimate, 1.3 tokens a word)",
    )
    add(
        "--output-tokens",
        default="request",
        metavar="RULE",
        help="length of answers: request (max_tokens), echo (as the prompt), or a distribution such as "
        "lognormal:200:150:1:2000, cut at max_tokens (default: request)",
    )
    add(
        "--max-body-mib",
        type=int,
        default=32,
        metavar="N",
        help="largest body of a request (default: 32)",
    )
    add(
        "--max-open",
        type=int,
        default=4096,
        metavar="N",
        help="answers in the making at once; more are refused with status 503 (default: 4096)",
    )
    add(
        "--kv-events",
        metavar="ADDRESS",
        help="publish over ZeroMQ what the prefix cache stores and removes, such as tcp://127.0.0.1:5557; "
        "instance i takes port + i (default: do not)",
    )
    add("--kv-events-replay", metavar="ADDRESS", help="where subscribers ask for what they have missed")
    excluded = (*LOADING, *NOISE, *_NOT_SERVED, *output_fields(), "itl", "log_interval", "run_id")
    add_arguments(parser, exclude=excluded)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; returns the exit status."""
    from servesim.cli.screen import say, set_up_messages, tell
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.specs.options import from_namespace

    options = from_namespace(args)
    set_up_messages(options.log_level)
    check(args)
    try:
        import uvicorn
    except ImportError as error:
        raise InputError("servesim serve: needs the extra server: pip install 'servesim[server]'") from error
    with bundles_on_demand(options.auto_profile, tell):
        app, about, notes = build_app(args, options)
    for note in notes:
        say(note)
    listening = listen(args.host, args.port)
    host, port = listening.getsockname()[:2]
    say(f"{about}: listening on http://{f'[{host}]' if ':' in host else host}:{port}")
    raise_file_limit()
    collect_garbage()
    uvicorn.Server(server_config(app, args.max_open)).run([listening])
    return 0


def server_config(app: Starlette, most_open: int) -> uvicorn.Config:
    """How HTTP is spoken, for so many open answers."""
    import uvicorn

    from servesim.server.answer import HttpProtocol

    return uvicorn.Config(
        app,
        http=HttpProtocol,  # h11 bounds the size of headers
        limit_concurrency=most_open + _SPARE_CONNECTIONS,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )


def collect_garbage() -> None:
    """Look for cycles of objects often, and only among those that come from now on.

    A connection of asyncio is such a cycle. The command line lets garbage lie for the sake of runs that end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 5, 5)


def raise_file_limit() -> None:
    """Let the process have as many connections as the system lets it have."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is wrong or taken.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # else the system keeps megabytes for every client that reads slowly
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 << 10)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on: {error.strerror or error}"
        ) from error
    return listening


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that make no sense.

    Raises:
        InputError: one of them.
    """
    if args.speed is not None and args.virtual_time is not None:
        raise InputError(
            "--speed: has no effect with --virtual-time, where time waits for the clients; leave one out"
        )
    if args.speed is not None and not 0.001 <= args.speed <= 100_000:
        raise InputError(f"--speed: {args.speed:g} is not allowed; must be 0.001 to 100000")
    for flag, value, least, most in (
        ("--port", args.port, 0, 65_535),
        ("--virtual-time", 1 if args.virtual_time is None else args.virtual_time, 1, 1_000_000),
        ("--max-body-mib", args.max_body_mib, 1, 1024),
        ("--max-open", args.max_open, 1, 1_000_000),
    ):
        if not least <= value <= most:
            raise InputError(f"{flag}: {value} is not allowed; must be {least} to {most}")
    if args.kv_events_replay and not args.kv_events:
        raise InputError("--kv-events-replay: has no effect without --kv-events")
    if args.api_key is not None and not args.api_key:
        raise InputError("--api-key: is empty; leave it out for a server that asks for none")


def adapter_names(words: Sequence[str]) -> tuple[str, ...]:
    """Names of adapters given as vLLM takes them: ``NAME``, ``NAME=PATH`` or ``{"name": "NAME", ...}``.

    Raises:
        InputError: a word has no name.
    """
    names = []
    for word in words:
        name: object = word.partition("=")[0]
        if word.startswith("{"):
            try:
                name = json.loads(word).get("name")
            except ValueError:
                name = None
        if not isinstance(name, str) or not name:
            raise InputError(
                f"--lora-modules: {word!r} is not allowed; must be NAME, NAME=PATH or JSON with a name"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def build_app(args: argparse.Namespace, options: RuntimeOptions) -> tuple[Starlette, str, list[str]]:
    """The application, a line about it, and what its user should know."""
    from servesim.api import read_cluster
    from servesim.server.app import Server, Settings
    from servesim.server.live import LiveEngine
    from servesim.server.metrics import Metrics
    from servesim.server.pace import VirtualPace, WallPace
    from servesim.server.prompts import Estimate, Filler, LocalTokenizer, OutputLength
    from servesim.specs.model import load_model

    cluster = read_cluster(options)
    pace = VirtualPace(args.virtual_time) if args.virtual_time else WallPace(args.speed or 1.0)
    adapters = adapter_names(args.lora_modules)
    engine = LiveEngine(cluster, options, pace)
    if adapters and not all(i.log.options.enable_lora for i in engine.instances):
        raise InputError(
            "--lora-modules: needs --enable-lora, as vLLM does; --max-loras says how many a step"
        )
    if args.kv_events:
        from servesim.server.kv_events import KvEvents

        engine.publish(KvEvents(engine, args.kv_events, args.kv_events_replay, adapters=adapters))
    names = {spec.model_name for _, spec in cluster.instances}
    if len(names) > 1:
        raise InputError(
            f"--cluster-config: has several models ({', '.join(sorted(names))}); a server has one"
        )
    model = load_model(names.pop())
    tokenizer = (
        LocalTokenizer(args.tokenizer) if args.tokenizer else Estimate(model.vocab_size, engine.max_model_len)
    )
    served = tuple(args.served_model_name or [model.name])
    settings = Settings(
        models=(*served, *adapters),
        adapters=frozenset(adapters),
        vllm_version=options.vllm_version,
        vocab_size=model.vocab_size,
        api_key=args.api_key,
        most_body_bytes=args.max_body_mib << 20,
        most_open=args.max_open,
    )
    server = Server(
        engine,
        Metrics(engine, served[0]),
        tokenizer,
        Filler(tokenizer, options.seed),
        OutputLength(args.output_tokens, options.seed),
        settings,
    )
    time = f"virtual time, {args.virtual_time} calls" if args.virtual_time else f"speed {args.speed or 1:g}"
    gpus = ", ".join(sorted({f"{spec.num_npus} x {spec.hardware}" for _, spec in cluster.instances}))
    about = f"{served[0]} on {len(engine.instances)} x ({gpus}), {time}"
    return server.app(), about, [*(f"warning: {told}" for told in engine.warnings), *engine.notes]
