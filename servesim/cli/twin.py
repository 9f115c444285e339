"""``servesim twin``: a simulation that follows a running vLLM, and what would change its figures."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from servesim.cli.parts import PRINTED, add_command, add_json, check_apart, check_file, give_json
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.bench.twin import Fit, Scrape, Traffic
    from servesim.explore.compare import Comparison
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.hardware import EngineSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload

_HELP = "follow a running vLLM by its metrics, and try changes on the traffic it sees"
_EPILOG = """\
SOURCE is the address of a server, or a file that --save wrote. Say with --hardware, --model and the
flags of run, or with --vllm-serve, what the server runs on and how it was started.

  servesim twin http://127.0.0.1:8000 --for 300 --hardware H100 --model meta-llama/Llama-3.1-8B --tp 1 \\
      --what-if "fp8 KV: --kv-cache-dtype fp8" --what-if "two replicas: --dp 2"
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.api import LOADING, NOISE
    from servesim.specs.options import add_arguments, output_fields

    parser = add_command(subparsers, "twin", _HELP, _EPILOG, "servesim twin SOURCE [OPTIONS]")
    add = parser.add_argument
    add("source", metavar="SOURCE", help="address of a server, or a file of scrapes")
    add("--for", dest="for_s", type=float, metavar="SECONDS", help="how long to watch (default: 60)")
    add(
        "--every", dest="every_s", type=float, metavar="SECONDS", help="time between two scrapes (default: 1)"
    )
    add("--save", metavar="FILE", help="keep the scrapes, JSON lines")
    add("--api-key", metavar="KEY", help="sent with every scrape")
    add(
        "--requests",
        metavar="FILE",
        help="the requests themselves, a workload (default: made from the counters)",
    )
    add(
        "--what-if",
        action="append",
        default=[],
        metavar='"LABEL: FLAGS"',
        help='a change to try on the traffic, such as "fp8 KV: --kv-cache-dtype fp8"; several are allowed',
    )
    add_json(parser)
    excluded = (
        *LOADING,
        *NOISE,
        *output_fields(),
        "itl",
        "log_interval",
        "run_id",
        "max_concurrency",
        "skip_prefill",
    )
    add_arguments(parser, exclude=excluded)


def run(args: argparse.Namespace) -> int:
    """Watch, fit, compare, and print; returns the exit status."""
    from servesim.api import read_cluster, simulate_loaded
    from servesim.bench import twin
    from servesim.bench.validate import with_engine
    from servesim.cli.compare import parse_set
    from servesim.cli.screen import say, set_up_messages, tell
    from servesim.explore.compare import compare
    from servesim.explore.show import comparison_text
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.results.atomic import check_writable
    from servesim.specs.options import from_namespace

    options = from_namespace(args)
    set_up_messages(options.log_level)
    sets = dict(parse_set(text) for text in args.what_if)
    check_file(args.json, (".json",), "--json")
    if args.save:
        check_writable(args.save, "--save")
    check_apart(
        {"--cluster-config": options.cluster_config, "--requests": args.requests, "SOURCE": args.source},
        {"--json": args.json, "--save": args.save},
    )
    scrapes = scrapes_of(args)
    seen = twin.traffic(scrapes, args.source)
    options = with_blocks(options, seen)
    with bundles_on_demand(options.auto_profile, tell):
        cluster = read_cluster(options)
        workload = workload_of(args, seen, options, cluster)

        def simulated(engine: EngineSpec) -> Any:
            return simulate_loaded(with_engine(cluster, engine), workload, options)

        fitted = twin.fit(seen, simulated)
        comparison = None
        if sets:
            own = with_engine(cluster, fitted.engine)
            comparison = compare(own, workload, {"as it is": {}, **sets}, without_cluster(options))
    if args.json is not None:
        give_json(args.json, json_text(seen, fitted, comparison))
    if args.json != PRINTED:
        say(twin_text(args.source, seen, fitted))
        if comparison is not None:
            say(f"\n{comparison_text(comparison)}")
    return 1 if comparison is not None and comparison.failures else 0


def scrapes_of(args: argparse.Namespace) -> list[Scrape]:
    """The counters over time, from a server or a file.

    Raises:
        InputError: a flag has no effect or makes no sense, or there is no such source.
    """
    from servesim.bench import twin

    watching = "://" in args.source
    for flag, value in (
        ("--for", args.for_s),
        ("--every", args.every_s),
        ("--save", args.save),
        ("--api-key", args.api_key),
    ):
        if value is not None and not watching:
            raise InputError(
                f"{flag}: has no effect on a file of scrapes; leave it out, or give an address http://…"
            )
    if not watching:
        return twin.load_scrapes(args.source)
    for_s, every_s = args.for_s or 60.0, args.every_s or 1.0
    if not 0.05 <= every_s <= 3600 or not 2 * every_s <= for_s <= 1e7:
        raise InputError(
            f"--for {for_s:g} --every {every_s:g}: is not allowed; watch two "
            "intervals or more, each of 0.05 to 3600 s"
        )
    shown = _count if sys.stderr.isatty() else None
    scrapes = twin.watch(args.source, for_s, every_s, args.api_key, shown)
    if args.save:
        twin.save_scrapes(args.save, scrapes)
    return scrapes


def with_blocks(options: RuntimeOptions, seen: Traffic) -> RuntimeOptions:
    """The options with the server's own block size and count, where nobody says others."""
    told = {
        name: seen.facts[name]
        for name in ("block_size", "num_gpu_blocks")
        if name not in options.model_fields_set and seen.facts.get(name, 0) > 0
    }
    return options.replace(**told) if told else options


def workload_of(
    args: argparse.Namespace, seen: Traffic, options: RuntimeOptions, cluster: ClusterSpec
) -> Workload:
    """The requests of a file, or some that are alike."""
    from servesim.bench.twin import workload_like
    from servesim.specs.model import load_model
    from servesim.workload.formats import load_workload

    if args.requests:
        return load_workload(args.requests)
    longest = options.max_model_len
    if not isinstance(longest, int):
        models = {spec.model_name for _, spec in cluster.instances}
        longest = min(load_model(name).max_position_embeddings for name in models)
    return workload_like(seen, options.seed, longest)


def without_cluster(options: RuntimeOptions) -> RuntimeOptions:
    """The options without those that the cluster holds already."""
    from servesim.api import without

    return without(
        options,
        "cluster_config",
        "hardware",
        "model",
        "tp",
        "pp",
        "dp",
        "enable_expert_parallel",
        "log_level",
    )


def twin_text(source: str, seen: Traffic, fitted: Fit) -> str:
    """What the server does, how the twin follows it, and what was fitted."""
    from servesim.bench.twin import followed
    from servesim.results.table import Table
    from servesim.terminal import screen_width

    summary, engine = fitted.result.summary, fitted.engine
    table = Table(["", "server", "twin", "mean distance"])
    for name, live, ours, distance in followed(seen, fitted.result):
        table.rows.append([name, f"{live:.4g}", f"{ours:.4g}", f"{distance:.3g}"])
    for name, live, key in (
        ("mean TTFT ms", seen.mean_ttft_ms, "mean_ttft_ms"),
        ("mean ITL ms", seen.mean_itl_ms, "mean_itl_ms"),
    ):
        table.rows.append([name, f"{live:.4g}", f"{summary[key]:.4g}", ""])  # type: ignore[literal-required]
    count = int(seen.arrivals.sum())
    return "\n".join(
        [
            f"{source}: {count} requests in {seen.duration_s:.0f} s, {seen.mean_prompt:.0f} prompt and "
            f"{seen.mean_output:.0f} output tokens each, {seen.hit_share:.1%} of the prompt tokens cached",
            f"fitted on its means: {engine.decode_step_overhead_us:.0f} us of host time a step, "
            f"{engine.front_end_us / 1000:.1f} ms from client to engine and back "
            f"({fitted.simulations} simulations)",
            "",
            table.plain(width=screen_width()),
            *(f"note: {note}" for note in fitted.result.log.notes),
            "",
            "TTFT and ITL were fitted, the other rows were not. Lengths and arrivals are drawn to be like",
            "those counted; give --requests FILE for the requests themselves.",
        ]
    )


def json_text(seen: Traffic, fitted: Fit, comparison: Comparison | None) -> str:
    """The same as JSON."""
    import json

    from servesim.bench.twin import followed

    rows = [
        {"what": name, "server": live, "twin": ours, "mean_distance": distance}
        for name, live, ours, distance in followed(seen, fitted.result)
    ]
    told = {
        "requests": int(seen.arrivals.sum()),
        "duration_s": seen.duration_s,
        "mean_prompt_tokens": seen.mean_prompt,
        "mean_output_tokens": seen.mean_output,
        "prefix_hit_share": seen.hit_share,
        "server": {"mean_ttft_ms": seen.mean_ttft_ms, "mean_itl_ms": seen.mean_itl_ms},
        "twin": dict(fitted.result.summary),
        "fitted": {
            "host_step_us": fitted.engine.decode_step_overhead_us,
            "front_end_us": fitted.engine.front_end_us,
            "simulations": fitted.simulations,
        },
        "followed": rows,
        "what_if": None if comparison is None else comparison.to_dict(),
    }
    return json.dumps(told, indent=1, default=str)


def _count(done: int, of: int) -> None:
    print(f"\rscrape {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)
