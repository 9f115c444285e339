"""The runtime options: the one source of flags, their help and their checks."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from servesim.errors import InputError
from servesim.specs import conditions
from servesim.specs.annotated import BeforeValidator, Field
from servesim.specs.checked import model_validator
from servesim.specs.engine_options import EngineOptions
from servesim.specs.flags import Flag, add_flags, flag_of, from_flags, renamed
from servesim.specs.memories import TIER_WORDS
from servesim.specs.presets import Preset
from servesim.specs.validation import Degree, Limit, Spec, Unit
from servesim.specs.vllm_versions import NEWEST, VllmVersion, minor_version

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection

_INPUT = "what to simulate"
_ENGINE_OF_ALL = "engine of every instance"
_CLUSTER = "cluster"
_RUN = "how requests arrive and run"
_UNCERTAINTY = "uncertainty"
_OUTPUT = "output"
_TABLE = (".csv", ".parquet")
_JSON = (".json",)
_HTML = (".html",)
FOLDER = ("/",)
"""In the place of endings: the option names a folder."""
_OTHER_TOOLS = "accepted from scripts of other simulators"

ROUTING_POLICIES = ("LOAD", "RR", "RAND", "PREFIX")
"""Names in :data:`servesim.engine.router.ROUTING_POLICIES`."""
EXPERT_POLICIES = ("BALANCED", "RR", "RAND", "ZIPF")
"""Names in :data:`servesim.engine.experts.EXPERT_POLICIES`."""


def _text_path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _none_word(value: object) -> object:
    return None if value == "None" else value


def _policy(known: tuple[str, ...], variable: str) -> BeforeValidator:
    """One of ``known`` or ``module:callable``; the environment variable says which callable CUSTOM is."""

    def check(value: object) -> object:
        if value == "CUSTOM":
            value = os.environ.get(variable, "")
            if not value:
                raise ValueError(
                    "CUSTOM is not allowed without a callable; give module:callable itself, or set "
                    f"{variable}=module:callable in the environment"
                )
        if not isinstance(value, str):
            raise ValueError(
                f"{value!r} is not allowed; must be one of {', '.join(known)}, or module:callable"
            )
        module, colon, name = value.removeprefix("CUSTOM:").partition(":")
        if value in known or (
            colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))
        ):
            return value
        raise ValueError(
            f"'{value}' is not allowed; must be one of {', '.join(known)}, or module:callable for a "
            "custom policy"
        )

    return BeforeValidator(check)


def _json_text(value: object) -> object:
    """A mapping as the JSON text that it stands for."""
    return json.dumps(value) if isinstance(value, dict) else value


FilePath = Annotated[str, BeforeValidator(_text_path), Field(min_length=1)]


def _no_single_run(value: object) -> object:
    if value == 1 and type(value) is int:
        raise ValueError("1 is not allowed; must be 0 (off) or at least 2 runs")
    return value


class InputOptions(Spec):
    """What is simulated."""

    cluster_config: Annotated[FilePath, Flag("cluster description (JSON)", _INPUT, "PATH")] = (
        "configs/cluster/single_node_single_instance.json"
    )
    dataset: Annotated[FilePath, Flag("workload; its format is found by content", _INPUT, "PATH")] = (
        "workloads/example_trace.jsonl"
    )
    hardware: Annotated[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)] | None,
        Flag(
            "run every instance on this accelerator, with the bundles, memory and links of configs/hardware",
            _INPUT,
            "NAME",
            default_text="as in the cluster config",
        ),
    ] = None
    model: Annotated[
        Annotated[str, Field(min_length=1, max_length=1000)] | None,
        Flag("every instance serves this model", _INPUT, "NAME", default_text="as in the cluster config"),
    ] = None
    tp: Annotated[
        Degree | None,
        Flag(
            "tensor-parallel degree of every instance",
            _INPUT,
            "N",
            aliases=("--tensor-parallel-size", "-tp"),
            default_text="as in the cluster config",
        ),
    ] = None
    pp: Annotated[
        Degree | None,
        Flag(
            "pipeline stages of every instance",
            _INPUT,
            "N",
            aliases=("--pipeline-parallel-size", "-pp"),
            default_text="as in the cluster config",
        ),
    ] = None
    dp: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None,
        Flag(
            "put N copies of every instance side by side (models without experts)",
            _INPUT,
            "N",
            aliases=("--data-parallel-size", "-dp"),
            default_text="as in the cluster config",
        ),
    ] = None
    enable_expert_parallel: Annotated[
        bool,
        Flag(
            "spread the experts of every instance over all its NPUs, and those of its --dp copies",
            _INPUT,
            aliases=("-ep",),
            acts=conditions.spread_experts,
            noted=True,
        ),
    ] = False
    num_reqs: Annotated[
        Limit,
        Flag("entries of the workload to load; a session counts as one", _INPUT, default_text="0 = all"),
    ] = 0
    lenient: Annotated[bool, Flag("skip and count bad lines of the workload instead of stopping", _INPUT)] = (
        False
    )

    tokenizer: Annotated[
        FilePath | None,
        Flag(
            "for a workload of texts: a tokenizer.json, or a folder with one (needs 'servesim[tokenizer]')",
            _INPUT,
            "PATH",
            default_text="none",
        ),
    ] = None
    estimate_tokens: Annotated[
        Annotated[float, Field(ge=0.1, le=100)] | None,
        Flag(
            "for a workload of texts, without a tokenizer: count so many characters as a token, 4 where no "
            "number is given",
            _INPUT,
            "CHARS",
            default_text="none",
            bare=4.0,
        ),
    ] = None
    columns: Annotated[
        Annotated[str, Field(min_length=1, max_length=2000)] | None,
        Flag(
            "any CSV or JSON lines file: which columns are input, output, arrival (:s, :ms, :us, :ns or "
            ":date), session, delay, model, hashes (:TOKENS), such as input=isl,output=osl,arrival=ts:ms",
            _INPUT,
            "NAME=COLUMN,...",
            default_text="none: the format is found by content",
        ),
    ] = None


class RuntimeOptions(EngineOptions, InputOptions):
    """Everything a run can be told. Field ``x_y`` is flag ``--x-y``.

    The last base comes first, in the help and in files: what is simulated, the engines, then these.
    """

    vllm_version: Annotated[
        VllmVersion,
        BeforeValidator(minor_version),
        Flag(
            "decide as this version of vLLM does, and plan memory as it does; not given: memory as the "
            "hardware file says",
            _ENGINE_OF_ALL,
            "VERSION",
            text=True,
        ),
    ] = NEWEST
    speculative_config: Annotated[
        Annotated[str, Field(min_length=2, max_length=20_000)] | None,
        BeforeValidator(_json_text),
        Flag(
            'speculative decoding, vLLM\'s JSON: \'{"method": "ngram", "num_speculative_tokens": 3}\', say; '
            "methods ngram, eagle, eagle3, mtp, draft_model",
            _ENGINE_OF_ALL,
            "JSON",
            aliases=("-sc",),
            default_text="none",
        ),
    ] = None
    speculative_acceptance: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)] | None,
        Flag(
            "shares of verifications that accept at least 1, 2, ... drafts: 0.7,0.5,0.3; or decay=0.7; or a "
            "JSON file with rates, decay, source",
            _ENGINE_OF_ALL,
            "RATES|PATH",
            default_text="a published measurement for the method, named in the banner",
            beside=conditions.with_speculation,
        ),
    ] = None
    preset: Annotated[
        Preset | None,
        Flag(
            "vllm-serve: the limits that `vllm serve` of this version takes on this hardware, where none are "
            "given: 0.92 of the memory, 256 to 1024 requests and 2048 to 16384 tokens a step",
            _ENGINE_OF_ALL,
            default_text="none: the defaults shown above",
        ),
    ] = None
    vllm_serve: Annotated[
        Annotated[str, Field(min_length=1, max_length=20_000)] | None,
        Flag(
            "a deployment's own command line, 'vllm serve MODEL --tensor-parallel-size 4 ...', or the YAML "
            "file of its arguments; brings --preset vllm-serve along; flags given beside it win",
            _ENGINE_OF_ALL,
            "LINE|PATH",
            default_text="none",
        ),
    ] = None
    enable_prefix_sharing: Annotated[
        bool,
        Flag(
            "share the lower tier of the prefix cache among a node's instances",
            _CLUSTER,
            beside=conditions.with_tier,
            acts=conditions.nodes_with_several,
            noted=True,
        ),
    ] = False
    prefix_storage: Annotated[
        Literal[*TIER_WORDS] | None,  # type: ignore[valid-type]
        BeforeValidator(_none_word),
        Flag(
            "lower tier of the prefix cache",
            _CLUSTER,
            choices=("None", *TIER_WORDS),
            default_text="None",
            except_for=conditions.prompts_with_ids,
        ),
    ] = None
    request_routing_policy: Annotated[
        str,
        _policy(ROUTING_POLICIES, "SERVESIM_ROUTING_POLICY"),
        Flag(
            "which instance takes a request: LOAD (least loaded), RR (in turn), RAND (at random), PREFIX "
            "(longest cached prefix), or module:callable for a custom policy; CUSTOM: the one in "
            "$SERVESIM_ROUTING_POLICY",
            _CLUSTER,
            "POLICY",
            acts=conditions.several_takers,
        ),
    ] = "LOAD"
    router_refresh: Annotated[
        Annotated[float, Field(ge=0, le=1e6)],
        Unit("s"),
        Flag(
            "time between refreshes of the load figures the router goes by; vLLM's data-parallel front end "
            "refreshes every 0.1 s",
            _CLUSTER,
            "SECONDS",
            default_text="0 = always up to date",
            acts=conditions.looks_at_load,
        ),
    ] = 0.0
    sticky_sessions: Annotated[
        bool,
        Flag(
            "all requests of a session go to the instance that took the first one",
            _CLUSTER,
            acts=conditions.several_fronts,
            except_for=conditions.prefill_side_only,
        ),
    ] = False
    expert_routing_policy: Annotated[
        str,
        _policy(EXPERT_POLICIES, "SERVESIM_EXPERT_POLICY"),
        Flag(
            "how tokens choose experts that are spread over ranks: BALANCED (all ranks alike), RR (in turn), "
            "RAND (at random), ZIPF (few are popular), or module:callable; CUSTOM: the one in "
            "$SERVESIM_EXPERT_POLICY",
            _CLUSTER,
            "POLICY",
            acts=conditions.spread_experts,
        ),
    ] = "BALANCED"

    skip_prefill: Annotated[bool, Flag("decode only: prompts are already in the cache", _RUN)] = False
    max_concurrency: Annotated[
        Limit,
        Flag(
            "closed loop: at most this many requests in the system",
            _RUN,
            default_text="0 = open loop",
            acts=conditions.more_than_the_cap,
            noted=True,
        ),
    ] = 0
    max_num_queued_reqs: Annotated[
        Limit | None,
        Flag(
            "turn a request away, as a server does with status 503, while so many are unfinished on all "
            "instances",
            _RUN,
            "N",
            default_text="no limit",
            acts=conditions.one_front_end,
        ),
    ] = None
    max_num_queued_tokens: Annotated[
        Limit | None,
        Unit("tokens"),
        Flag(
            "turn a request away while the prompts of requests without a first token have so many tokens",
            _RUN,
            "N",
            default_text="no limit",
            acts=conditions.one_front_end,
        ),
    ] = None
    request_rate: Annotated[
        Annotated[float, Field(ge=1e-9, allow_inf_nan=True)] | None,
        Unit("req/s"),
        Flag(
            "rescale or replace the arrivals; inf = all at once",
            _RUN,
            "REQ/S",
            default_text="as in the workload",
        ),
    ] = None
    seed: Annotated[
        int,
        Field(ge=0, le=2**63 - 1),
        Flag("seed of every random choice", _RUN, acts=conditions.something_random, noted=True),
    ] = 42
    auto_profile: Annotated[
        bool,
        Flag(
            "make a missing profile bundle, from public kernel measurements (silicon extra) or peak rates, "
            "and keep it in the user's data folder",
            _RUN,
        ),
    ] = True
    stepped: Annotated[bool, Flag("debugging: simulate every step on its own", _RUN)] = False

    ensemble: Annotated[
        Annotated[int, Field(ge=0, le=100_000)],
        BeforeValidator(_no_single_run),
        Flag(
            "repeat the run this often with seeded noise and report every figure's spread",
            _UNCERTAINTY,
            default_text="0 = off",
        ),
    ] = 0
    step_noise: Annotated[
        Annotated[float, Field(ge=0, le=0.5)],
        Flag(
            "relative noise of every step's time in an ensemble, each step on its own",
            _UNCERTAINTY,
            beside=conditions.with_ensemble,
        ),
    ] = 0.01
    run_noise: Annotated[
        Annotated[float, Field(ge=0, le=0.5)],
        Flag(
            "relative noise that all steps of a run of an ensemble share",
            _UNCERTAINTY,
            beside=conditions.with_ensemble,
        ),
    ] = 0.01
    arrival_jitter: Annotated[
        Annotated[float, Field(ge=0, le=1e6)],
        Unit("s"),
        Flag(
            "every arrival moves by up to this much, either way, in the runs of an ensemble",
            _UNCERTAINTY,
            "SECONDS",
            default_text="0 = the workload's arrivals as they are",
            beside=conditions.with_ensemble,
        ),
    ] = 0.0

    output: Annotated[
        FilePath | None,
        Flag("per-request results, .csv or .parquet; {run_id} is replaced", _OUTPUT, "PATH", writes=_TABLE),
    ] = None
    summary: Annotated[FilePath | None, Flag("run summary as JSON", _OUTPUT, "PATH", writes=_JSON)] = None
    steps: Annotated[FilePath | None, Flag("step log, .csv or .parquet", _OUTPUT, "PATH", writes=_TABLE)] = (
        None
    )
    timeline: Annotated[
        FilePath | None, Flag("Chrome trace, opens in ui.perfetto.dev", _OUTPUT, "PATH", writes=_JSON)
    ] = None
    save_result: Annotated[
        FilePath | None,
        Flag("the result that `vllm bench serve --save-result` writes", _OUTPUT, "PATH", writes=_JSON),
    ] = None
    aiperf: Annotated[
        FilePath | None, Flag("the table that AIPerf writes", _OUTPUT, "PATH", writes=(".csv",))
    ] = None
    report: Annotated[
        FilePath | None,
        Flag("figures and charts as one HTML page that needs no network", _OUTPUT, "PATH", writes=_HTML),
    ] = None
    plots: Annotated[
        FilePath | None,
        Flag(
            "the charts of --report as PNG and SVG (needs 'servesim[report]')", _OUTPUT, "DIR", writes=FOLDER
        ),
    ] = None
    itl: Annotated[
        bool, Flag("write every request's inter-token latencies", _OUTPUT, beside=conditions.with_output)
    ] = True
    log_interval: Annotated[
        float,
        Field(ge=1e-6, le=1e9),
        Unit("s"),
        Flag("simulated seconds between heartbeats", _OUTPUT, "SECONDS"),
    ] = 1.0
    log_level: Annotated[
        Literal["WARNING", "INFO", "DEBUG"], Flag("the heartbeat prints at every level", _OUTPUT)
    ] = "WARNING"
    run_id: Annotated[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)] | None,
        Flag("name of the run", _OUTPUT, default_text="generated", beside=conditions.with_named_file),
    ] = None

    network_backend: Annotated[
        Literal["analytical"] | None,
        Flag("links", _OTHER_TOOLS, acts=conditions.analytical_links, noted=True, hidden=True),
    ] = None
    inputs_root: Annotated[
        FilePath | None,
        Flag("inputs", _OTHER_TOOLS, "PATH", acts=conditions.no_intermediate_files, noted=True, hidden=True),
    ] = None
    cleanup_inputs: Annotated[
        bool | None,
        Flag(
            "inputs",
            _OTHER_TOOLS,
            acts=conditions.no_intermediate_files,
            noted=True,
            hidden=True,
            negative=True,
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = renamed(cls.model_fields, data)
        if isinstance(data.get("vllm_serve"), str):
            from servesim.specs.serve_line import read_serve_line

            data = {"preset": "vllm-serve", **read_serve_line(data["vllm_serve"]).options, **data}
        return data

    if not TYPE_CHECKING:  # type checkers know the fields as keywords

        def __init__(self, **values: Any) -> None:
            """Raises InputError, as everything else does, when a value is not allowed."""
            from servesim.specs.annotated import ValidationError
            from servesim.specs.validation import field_path, joined, problems

            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InputError(joined("options", problems(error, type(self), field_path))) from None

    def replace(self, **changes: Any) -> Self:
        """These options with some changed, checked again. What the user set stays in ``model_fields_set``."""
        from servesim.specs.validation import validated

        return validated(type(self), {**self.model_dump(exclude_unset=True), **changes}, "")


def add_arguments(
    parser: argparse.ArgumentParser, *, only: Collection[str] | None = None, exclude: Collection[str] = ()
) -> None:
    """Add the flags of :class:`RuntimeOptions` (fields named in ``only``, without ``exclude``) to ``parser``.

    A flag not given is absent from the parsed namespace; :func:`from_namespace` fills in the defaults.
    """
    add_flags(parser, RuntimeOptions, only=only, exclude=exclude)


def from_namespace(namespace: argparse.Namespace, **overrides: Any) -> RuntimeOptions:
    """The options of a parsed command line, ``overrides`` winning.

    Raises:
        InputError: a value is not allowed; the message names its flag.
    """
    return from_flags(RuntimeOptions, namespace, **overrides)


def output_fields() -> dict[str, tuple[str, ...]]:
    """Option -> endings of the file that it names for a run to write."""
    flags = ((name, flag_of(field)) for name, field in RuntimeOptions.model_fields.items())
    return {name: flag.writes for name, flag in flags if flag is not None and flag.writes}
