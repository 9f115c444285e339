"""What options need to act: a partner, or something that the cluster, the models or the workload have.

An option names its conditions beside its flag (:class:`servesim.specs.flags.Flag`):

- ``beside``: another option that it needs; looked at before anything is loaded.
- ``acts``: what the run must have.
- ``except_for``: a part of what its name promises that the simulation leaves out.

Each is a function that answers with the reason, in words that follow "has no effect here: ", or with an empty
text where all is well. :mod:`servesim.specs.acting` asks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.slotted import dataclass
from servesim.specs.hardware import load_hardware, resolve_engine
from servesim.specs.kv_skip import skipped_layers
from servesim.specs.memories import TIER_WORDS
from servesim.specs.validation import UNLIMITED
from servesim.specs.vllm_versions import QUEUE_LIMITS, runs_v2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import RuntimeOptions

EAGER = (
    "a step waits for the launch of every layer, 100 us of the host on a GPU with a hardware file "
    "(engine.eager_launch_us), as on one A100 server, whose eager decode steps of an 8B model with 8 "
    "sequences took 2.2 to 2.7 times as long"
)
"""What ``--enforce-eager`` goes by."""
FIRST_RUNNER = (
    "vLLM's first model runner puts every running request into every batch of a pipeline, which is not "
    "simulated; a batch is in flight for each stage, and a request is in one of them"
)
"""What is not simulated of that runner."""
_DRAWN_EXPERTS = ("BALANCED", "RR")
"""Expert policies without chance."""
_BLIND_ROUTES = ("RR", "RAND")
"""Routing policies that look at no load."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A run, as far as options ask what it has."""

    cluster: ClusterSpec
    models: Mapping[str, ModelSpec]
    """model_name -> its model."""
    resolved: tuple[InstanceOptions, ...]
    """Options of each instance."""
    options: RuntimeOptions
    num_requests: int
    has_sessions: bool
    priorities: int
    """Different priorities of the requests; none where requests are yet to come, as in a server."""
    has_ids: bool
    """Whether any prompt has token ids, which the prefix cache goes by."""
    adapters: int
    """Different LoRA adapters of the requests."""
    names_models: bool
    """Whether every request says which model it wants."""
    drawn_arrivals: bool
    """Whether the arrivals are random numbers of the seed."""
    equal_lengths: bool = False
    """Whether all prompts, and all answers, are of one length."""

    @property
    def instances(self) -> list[InstanceSpec]:
        return [instance for _, instance in self.cluster.instances]

    def most_rivals(self, *, decode: bool) -> int:
        """Most instances that one request has to choose from, on the decode side or the other."""
        side = [instance for instance in self.instances if (instance.pd_type == "decode") is decode]
        if not (self.names_models or decode):
            return len(side)
        names = [instance.model_name for instance in side]
        return max(map(names.count, names), default=0)

    def spreads_experts(self) -> bool:
        """Whether the experts of any instance lie on several ranks."""
        return any(
            instance.ep_size > 1 and self.models[instance.model_name].is_moe for instance in self.instances
        )


def with_ensemble(options: RuntimeOptions) -> str:
    """Noise is for the runs of an ensemble."""
    return "" if options.ensemble else "without --ensemble; add --ensemble 20, say"


def with_speculation(options: RuntimeOptions) -> str:
    """Drafts can only be accepted where there are any."""
    return "" if options.speculative_config else "without --speculative-config, whose drafts it is about"


def with_output(options: RuntimeOptions) -> str:
    """Inter-token latencies are a column of the per-request file."""
    return "" if options.output else "without --output, whose column it is about"


def with_tier(options: RuntimeOptions) -> str:
    """A shared lower tier has to be there."""
    return (
        ""
        if options.prefix_storage
        else f"without --prefix-storage {' or '.join(TIER_WORDS)}: there is no lower tier to share"
    )


def several_takers(scene: Scene) -> str:
    """A router has a choice only between instances."""
    rivals = max(scene.most_rivals(decode=side) for side in (False, True))
    return "" if rivals > 1 else "only one instance can take a request"


def looks_at_load(scene: Scene) -> str:
    """Counts that are refreshed now and then have to be asked for."""
    policy = scene.options.request_routing_policy
    blind = f"policy {policy} does not look at them" if policy in _BLIND_ROUTES else ""
    return several_takers(scene) or blind


def several_fronts(scene: Scene) -> str:
    """Sessions can only stay where requests might go elsewhere."""
    if scene.most_rivals(decode=False) < 2:
        return "only one instance takes new requests"
    return "" if scene.has_sessions else "the workload has no sessions"


def prefill_side_only(scene: Scene) -> str:
    """What sticky sessions leave out."""
    if scene.most_rivals(decode=True) < 2:
        return ""
    return "sessions stay with their prefill instance; every request's decode instance is chosen anew"


def spread_experts(scene: Scene) -> str:
    """Who takes which expert's tokens matters where experts lie on several ranks."""
    if not any(model.is_moe for model in scene.models.values()):
        return "no model has experts"
    return "" if scene.spreads_experts() else "no instance spreads its experts over ranks (ep_size is 1)"


def unequal_layers(scene: Scene) -> str:
    """One layer can stand for all, or not, where layers differ."""
    policy = scene.options.expert_routing_policy
    alike = f"expert policy {policy} loads all layers alike" if policy == "BALANCED" else ""
    return spread_experts(scene) or alike


def nodes_with_several(scene: Scene) -> str:
    """A pool is shared by the instances of a node."""
    most = max(len(node.instances) for node in scene.cluster.nodes)
    return "" if most > 1 else "no node has several instances"


def prompts_with_ids(scene: Scene) -> str:
    """Prefixes are found by token ids; a preempted request has its own blocks to find again."""
    if scene.has_ids:
        return ""
    return "no request has token ids, so none shares a prefix; it acts on what preempted requests find again"


def whole_prompts_at_once(scene: Scene) -> str:
    """Prompts are computed at all."""
    return "prompts are in the cache already (--skip-prefill)" if scene.options.skip_prefill else ""


def below_the_budget(scene: Scene) -> str:
    """A cap on one request's share of a step binds below the step's budget."""
    cap = scene.options.long_prefill_token_threshold
    if cap and all(cap >= options.max_num_batched_tokens for options in scene.resolved):
        return "it is not below --max-num-batched-tokens"
    return whole_prompts_at_once(scene)


def one_front_end(scene: Scene) -> str:
    """A server counts what it has let in."""
    if any(instance.pd_type for instance in scene.instances):
        return "prefill and decode instances have servers of their own, which count for themselves"
    version = scene.options.vllm_version
    return "" if QUEUE_LIMITS.holds(version) else f"vLLM {version} has no such limit"


def takes_kv_in(scene: Scene) -> str:
    """KV comes in where a connector brings it."""
    evicts = any(
        rule.kv_evict_loc not in (None, "npu")
        for instance in scene.instances
        if instance.placement is not None
        for _, rule in instance.placement.rules
    )
    if not (scene.options.prefix_storage or evicts or any(one.pd_type for one in scene.instances)):
        return "no KV comes in: there is no --prefix-storage and no decode instance (pd_type)"
    return whole_prompts_at_once(scene)


def fewer_running(scene: Scene) -> str:
    """A limit below another one binds where it is lower."""
    if all((options.max_num_active_seqs or UNLIMITED) >= options.max_num_seqs for options in scene.resolved):
        return "it is not below --max-num-seqs"
    return ""


def smaller_steps(scene: Scene) -> str:
    """A limit below another one binds where it is lower."""
    if all(
        (options.max_num_scheduled_tokens or UNLIMITED) >= options.max_num_batched_tokens
        for options in scene.resolved
    ):
        return "it is not below --max-num-batched-tokens"
    return ""


def has_threshold(scene: Scene) -> str:
    """What a threshold does needs one."""
    if all(options.long_prefill_token_threshold >= UNLIMITED for options in scene.resolved):
        return "there is no --long-prefill-token-threshold"
    return whole_prompts_at_once(scene)


def priorities_differ(scene: Scene) -> str:
    """Priorities order what differs in them."""
    if scene.priorities != 1 or not any(
        options.scheduling_policy == "priority" for options in scene.resolved
    ):
        return ""
    return "all requests have the same priority, so they are ordered by arrival"


def adapters_asked_for(scene: Scene) -> str:
    """Adapters are what requests name; those of a server are yet to come."""
    return "no request names an adapter (lora)" if scene.num_requests and not scene.adapters else ""


def more_adapters(scene: Scene) -> str:
    """Slots bind where there are more adapters."""
    if not any(options.enable_lora for options in scene.resolved):
        return "there is no --enable-lora"
    if not scene.adapters:
        return adapters_asked_for(scene)
    if all(scene.adapters <= options.max_loras for options in scene.resolved):
        return f"the requests name only {scene.adapters}"
    return ""


def adapter_kernels(scene: Scene) -> str:
    """What LoRA costs beside slots and prefixes."""
    if adapters_asked_for(scene) or not any(options.enable_lora for options in scene.resolved):
        return ""
    return (
        "slots and prefixes are simulated; there is no table of the adapters' kernels, so their time, which "
        "makes real steps slower, and the memory of their weights are not in the answer"
    )


def narrow_caches(scene: Scene) -> str:
    """A layer can be left in 16 bit where its cache would be narrower."""
    own = [
        (scene.models[instance.model_name].layers, options)
        for instance, options in zip(scene.instances, scene.resolved, strict=True)
        if options.kv_cache_dtype_skip_layers
    ]
    if any(options.skipped != skipped_layers(model, None, options.kv_cache_dtype) for model, options in own):
        return ""
    if all(options.kv_dtype == options.wide_dtype for _, options in own):
        return "the KV cache is in 16 bit anyway; give --kv-cache-dtype fp8, say"
    return "no layer's cache would be narrower that is not left out anyway"


def second_runners(scene: Scene) -> str:
    """Pipelines of vLLM's first model runner are simulated with synchronous scheduling, whatever the flag
    says."""
    if len(first_runners(scene)) == len(scene.instances):
        return FIRST_RUNNER
    return ""


def first_runners(scene: Scene) -> list[int]:
    """Indices of the pipelines that this version of vLLM runs with its first model runner."""
    version = scene.options.vllm_version
    return [
        index
        for index, instance in enumerate(scene.instances)
        if instance.pp_size > 1
        and not runs_v2(
            version,
            scene.models[instance.model_name].model_type,
            moe=scene.models[instance.model_name].is_moe,
        )
    ]


def windows_or_chunks(scene: Scene) -> str:
    """One manager for all layers makes a difference where some do not keep every token."""
    kinds = {
        getattr(layer.attention, "kind", None)
        for instance in scene.instances
        for layer in scene.models[instance.model_name].layers.layers
    }
    if kinds.isdisjoint({"sliding", "chunked"}):
        return "no layer of the model attends to a window or a chunk"
    if kinds.isdisjoint({"full", "mla", "sparse_mla"}):
        return "no layer keeps every token, beside which vLLM would keep the others whole"
    return ""


def shares_context(scene: Scene) -> str:
    """Only ranks that share KV by tokens have outputs to bring together."""
    if any(options.decode_context_parallel_size > 1 for options in scene.resolved):
        return ""
    return "no instance has a --decode-context-parallel-size above 1"


def derived_exchange(scene: Scene) -> str:
    """What the times of shared KV are made of."""
    if not any(options.decode_context_parallel_size > 1 for options in scene.resolved):
        return ""
    return (
        "its times are derived, not measured: attention from the tables of fewer ranks with as much less KV, "
        "exchanges from collectives or links; the kernels that correct and merge outputs are left out "
        "(docs/clusters.md, decode context parallelism)"
    )


def only_slow_memory(scene: Scene) -> str:
    """Reading weights beside the kernels shows where it takes longer than they do."""
    if not any(options.enable_local_offloading for options in scene.resolved):
        return ""
    return (
        "changes steps only where npu_mem.mem_bw is lower than what the kernels reached, or latency is high"
    )


def more_than_the_cap(scene: Scene) -> str:
    """A cap binds where there are more."""
    cap, there = scene.options.max_concurrency, scene.num_requests
    return f"the workload has only {there} requests" if cap >= there else ""


def blocks_not_given(scene: Scene) -> str:
    """Memory shares size the KV cache, unless its blocks are counted for us."""
    if all(instance.npu_mem.mem_util is not None for instance in scene.instances):
        return f"every instance of {scene.cluster.source} sets npu_mem.mem_util"
    if all(instance.num_gpu_blocks is not None for instance in scene.instances):
        return "num_gpu_blocks sets the KV cache"
    return ""


def something_random(scene: Scene) -> str:
    """A seed needs a draw."""
    options = scene.options
    routes = options.request_routing_policy == "RAND" and not several_takers(scene)
    experts = options.expert_routing_policy not in _DRAWN_EXPERTS and not spread_experts(scene)
    drafts = options.speculative_config is not None
    if routes or experts or drafts or scene.drawn_arrivals or options.ensemble:
        return ""
    if any(
        resolve_engine(load_hardware(instance.hardware), instance.engine).front_end_jitter_us
        for instance in scene.instances
    ):
        return ""
    return "nothing in this run is random"


def with_named_file(options: RuntimeOptions) -> str:
    """The name of a run shows in its files, and in paths with {run_id}."""
    if options.summary or options.steps or options.timeline or "{run_id}" in (options.output or ""):
        return ""
    return "without a file that names the run: --summary, --steps, --timeline, or {run_id} in --output"


def analytical_links(_scene: Scene) -> str:
    """An option of another simulator that says what holds anyway."""
    return "links are always computed by formulas"


def no_intermediate_files(_scene: Scene) -> str:
    """Options of another simulator about files that this one does not write."""
    return "no intermediate files are written"


def eager_launches(scene: Scene) -> str:
    """What running without CUDA graphs leaves out."""
    if all(options.cudagraph for options in scene.resolved):
        return ""
    return EAGER
