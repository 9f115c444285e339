"""Makes the costs of a cluster: equal stages share one object, and every bundle is read once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.cost.attention import decodes_under_load
from servesim.cost.bundle import find_bundle
from servesim.cost.cudagraph import capture_limit
from servesim.cost.identity import wanted_for
from servesim.cost.stage_cost import StageCost
from servesim.cost.step_cost import GroupStage, Member, StepCost
from servesim.cost.step_terms import Gemms, stage_terms
from servesim.cost.terms import Stage, pipeline_stages, whole_model
from servesim.errors import InputError
from servesim.memory.engine_memory import priced_hardware
from servesim.network.topology import RankGroup, Topology
from servesim.specs.block_layers import architecture_of, attention_groups
from servesim.specs.context_parallel import new_tokens_apart, shared_attention
from servesim.specs.dtypes import EIGHT_BIT
from servesim.specs.hardware import describe_host, load_hardware, resolve_engine
from servesim.specs.layers import LatentAttention
from servesim.specs.model import load_model
from servesim.specs.vllm_versions import experts_by_chunk, runs_v2

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from servesim.cost.bundle import Bundle, RankTables
    from servesim.cost.context_parallel import ContextExchange
    from servesim.cost.expert_stage import ExpertRouting, ExpertStage
    from servesim.cost.offload import Offload
    from servesim.cost.tables import Curve
    from servesim.cost.terms import Term
    from servesim.specs.architecture import Architecture
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.hardware import EngineSpec, HardwareSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec
    from servesim.specs.speculative import SpeculativeSpec


class Costs:
    """The costs of one cluster, made when asked for and shared by instances that cannot differ.

    A cost keeps nothing of a run but look-ups it has already done, so sharing changes no result.
    """

    def __init__(self, cluster: ClusterSpec, like: Costs | None = None) -> None:
        """
        Args:
            cluster: whose costs.
            like: costs of an earlier run, of any cluster: what it read and made is not read and made again.
        """
        self.topology = Topology.of(cluster)
        self._collectives = cluster.collectives
        self._stages: dict[Hashable, StageCost] = like._stages if like else {}
        self._bundles: dict[Hashable, Bundle] = like._bundles if like else {}
        self._architectures: dict[ModelSpec, Architecture] = like._architectures if like else {}
        self._engines: dict[Hashable, EngineSpec] = like._engines if like else {}
        self._hardware: dict[str, HardwareSpec] = like._hardware if like else {}

    def of(
        self,
        members: Sequence[tuple[int, InstanceSpec]],
        model: ModelSpec,
        options: Sequence[InstanceOptions],
        routing: ExpertRouting | None = None,
        offloads: Sequence[Offload | None] | None = None,
    ) -> StepCost:
        """What the steps of one instance cost, or of the members of a data-parallel group together.

        Args:
            members: (node, instance), as ``ClusterSpec.instances`` has them; they agree on the model and on
                all parallel degrees.
            model: what they run.
            options: of every member.
            routing: how tokens choose experts over ``ep_size`` ranks; needed if ``ep_size`` > 1.
            offloads: of every member what it keeps elsewhere, None if nothing; None: no member does.

        Raises:
            InputError: (MissingFileError among them) a bundle does not exist, is malformed, or lacks a layer.
        """
        leader, model = members[0][1], options[0].kept(model)
        shared = leader.ep_size > 1
        elsewhere = offloads or [None] * len(members)
        stages = []
        for index, stage in enumerate(pipeline_stages(model, leader.pp_size)):
            own = []
            for (_, spec), chosen, offload in zip(members, options, elsewhere, strict=True):
                cost = self.stage(spec, model, chosen, stage, experts=not shared)
                terms = cost.terms
                if offload is not None:
                    layers = self.stage(spec, model, chosen, stage).layers
                    terms = offload.terms(index, cost, layers, spec, model, chosen)
                own.append(Member(cost, terms))
            experts = None
            if shared:
                assert routing is not None
                experts = self._expert_stages(members, stage, options[0], own, routing)
            stages.append(GroupStage(stage, own, experts, self.topology.pp))
        return StepCost(stages)

    def stage(
        self,
        instance: InstanceSpec,
        model: ModelSpec,
        options: InstanceOptions,
        stage: Stage | None = None,
        *,
        experts: bool = True,
    ) -> StageCost:
        """One pipeline stage of an instance with everything on its NPUs.

        Args:
            instance: finds its bundle, hardware constants and tensor-parallel degree.
            model: what it runs.
            options: its dtypes choose the bundle's variant.
            stage: None: the whole model.
            experts: whether the time of expert layers is included.

        Raises:
            InputError: (MissingFileError among them) the bundle does not exist, is malformed, or lacks a
                layer.
        """
        engine, model = self._engine(instance, model, options), options.kept(model)
        stage = stage or whole_model(model)
        where = (stage.first_block, stage.num_blocks, experts)
        spec = options.speculative
        per_request = 1 + spec.num_tokens if spec else 1
        limit = capture_limit(options.max_num_seqs, options.max_num_batched_tokens, per_request)
        links = (self.topology.tp, self._collectives)
        hardware = priced_hardware(instance, self._facts(instance.hardware)).name
        overlaps = options.async_scheduling or instance.pp_size > 1
        by_chunk = experts_by_chunk(model.model_type, instance.tp_size, instance.ep_size)
        key = (
            *(hardware, model, options.variant, instance.tp_size, engine),
            *(where, limit, links, overlaps, spec, by_chunk),
            *(options.decode_context_parallel_size, options.dcp_comm_backend),
        )
        if key not in self._stages:
            tp = instance.tp_size
            bundle = self.bundle(instance, model, options)
            architecture = self._architecture(model)
            tables = self._tables(bundle, tp)
            loaded = options.kv_dtype in EIGHT_BIT and engine.decode_attention_8bit != 1.0
            if loaded and options.skipped:
                tables = _narrow_under_load(tables, model, engine.decode_attention_8bit)
            tables = tables.for_stage(stage)
            if loaded and not options.skipped:
                attention = decodes_under_load(tables.attention, engine.decode_attention_8bit)
                tables = replace(tables, attention=attention)
            exchange = None
            if options.decode_context_parallel_size > 1:
                tables, exchange = self._shared(bundle, tables, instance, model, options, stage.num_blocks)
            peak_tflops = self._facts(instance.hardware).peak_tflops.get("bfloat16")
            gemms = Gemms.of(engine, model, options.dtype, tp, peak_tflops)
            terms = stage_terms(
                *(architecture, stage, tables, tp, self.topology.tp),
                experts=experts,
                by_chunk=by_chunk,
                gemms=gemms,
            )
            self._stages[key] = StageCost(
                bundle,
                tables,
                stage.num_blocks,
                terms,
                engine,
                limit,
                architecture.attention_kind,
                overlaps=overlaps,
                drafting=self._drafting(instance, model, options, spec) if spec else None,
                per_request=per_request,
                exchange=exchange,
            )
        return self._stages[key]

    def _shared(
        self,
        bundle: Bundle,
        own: RankTables,
        instance: InstanceSpec,
        model: ModelSpec,
        options: InstanceOptions,
        blocks: int,
    ) -> tuple[RankTables, ContextExchange]:
        """The tables of ranks that share KV, and what they send each other."""
        from servesim.cost.context_parallel import (
            WORKSPACE_TOKENS,
            ContextExchange,
            Passes,
            shared_latent_tables,
            shared_tables,
        )

        tp, ranks = instance.tp_size, options.decode_context_parallel_size
        attention = shared_attention(model)
        gathered = self._tables(bundle.of_degree(tp // ranks), tp // ranks)
        if isinstance(attention, LatentAttention):
            tables = shared_latent_tables(own, gathered, ranks)
        else:
            apart = new_tokens_apart(self._facts(instance.hardware).compute_capability)
            tables = shared_tables(own, gathered, ranks, apart=apart)
        passes = Passes(
            ranks, self.topology.tp, own if ranks == tp else self._tables(bundle.of_degree(ranks), ranks)
        )
        # 8 contexts of full length, or 4 blocks for every sequence (see WORKSPACE_TOKENS)
        wanted = max(8 * options.max_model_len, 4 * options.max_num_seqs * options.block_size)
        workspace = min(wanted, WORKSPACE_TOKENS)
        backend = options.dcp_comm_backend
        return tables, ContextExchange(attention, tp, passes, blocks, backend, workspace)

    def _drafting(
        self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, spec: SpeculativeSpec
    ) -> Term:
        """What speculative decoding adds to a step of an instance."""
        from servesim.cost.drafting import DraftTerm, NgramTerm

        if not spec.has_layers:
            return NgramTerm()
        plain = replace(options, speculative=None)
        if spec.method == "draft_model":
            assert spec.model is not None
            return DraftTerm(self.stage(instance, load_model(spec.model), plain), spec)
        last = Stage(model, model.num_hidden_layers - 1, 1)
        return DraftTerm(self.stage(instance, model, plain, last), spec)

    def bundle(self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions) -> Bundle:
        """The profile bundle of an instance."""
        hardware, model = priced_hardware(instance, self._facts(instance.hardware)), options.kept(model)
        key = self._bundle_key(instance, model, options)
        if key not in self._bundles:
            wanted = wanted_for(model, hardware, options.variant)
            self._bundles[key] = find_bundle(wanted, instance.tp_size)
        return self._bundles[key]

    def use(self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, bundle: Bundle) -> None:
        """Price an instance with this bundle, whichever would be found."""
        self._bundles[self._bundle_key(instance, options.kept(model), options)] = bundle

    def _bundle_key(self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions) -> Hashable:
        hardware = priced_hardware(instance, self._facts(instance.hardware))
        return (hardware.name, model, options.variant, instance.tp_size)

    def host(self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions) -> str:
        """One line: the host time of an instance's steps, and whose it is."""
        engine = self._engine(instance, model, options)
        version = _second_runner(model, options)
        return describe_host(self._facts(instance.hardware), engine, version)

    def is_calibrated(self, instance: InstanceSpec) -> bool:
        """Whether the hardware file has constants of a recorded machine or of public rows."""
        facts = self._facts(instance.hardware)
        return facts.calibration is not None or facts.engine_rows is not None

    def front_end_us(
        self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions
    ) -> tuple[float, float]:
        """Between client and engine, each request: a constant, and the mean of what is drawn beside it."""
        engine = self._engine(instance, model, options)
        return engine.front_end_us, engine.front_end_jitter_us

    def _tables(self, bundle: Bundle, tp: int) -> RankTables:
        """The bundle's tables; without its measured collectives where the cluster's links decide."""
        tables, wanted = bundle.tables(tp), self._collectives
        if wanted == "links" or (wanted == "auto" and bundle.collectives_link == "pcie"):
            return replace(tables, collectives={})
        return tables

    def _architecture(self, model: ModelSpec) -> Architecture:
        if model not in self._architectures:
            self._architectures[model] = architecture_of(model)
        return self._architectures[model]

    def _engine(self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions) -> EngineSpec:
        stated = instance.engine and (instance.engine, frozenset(instance.engine.model_fields_set))
        second = _second_runner(model, options) is not None
        key = (instance.hardware, stated, options.cudagraph, second)
        if key not in self._engines:
            hardware = self._facts(instance.hardware)
            self._engines[key] = resolve_engine(
                hardware, instance.engine, cudagraph=options.cudagraph, second_runner=second
            )
        return self._engines[key]

    def _facts(self, hardware: str) -> HardwareSpec:
        if hardware not in self._hardware:
            self._hardware[hardware] = load_hardware(hardware)
        return self._hardware[hardware]

    def _expert_stages(
        self,
        members: Sequence[tuple[int, InstanceSpec]],
        stage: Stage,
        options: InstanceOptions,
        own: Sequence[Member],
        routing: ExpertRouting,
    ) -> list[ExpertStage]:
        """The expert layers of each group of members that hold all experts between them."""
        from servesim.cost.expert_stage import ExpertStage, TokenExchange

        leader = members[0][1]
        tp, ep = leader.tp_size, leader.ep_size
        width, replicas = max(ep // tp, 1), max(tp // ep, 1)
        stages = []
        for first in range(0, len(members), width):
            team = members[first : first + width]
            tables = [own[first + rank // tp].cost.bundle.whole_experts() for rank in range(ep)]
            exchange = None
            if width > 1:
                by_chunk = experts_by_chunk(stage.model.model_type, tp, ep)
                group = self.topology.data_parallel([node for node, _ in team], tp if by_chunk else 1)
                member = RankGroup(((self.topology.tp, tp),)) if by_chunk else None
                bundle, backend = own[first].cost.bundle, leader.moe_backend
                measured = _own_exchange(bundle, backend, ep) if backend in OWN_EXCHANGES else None
                exchange = TokenExchange(stage.model, ep, group, own[first].cost.tables, member, measured)
            stages.append(
                ExpertStage(
                    routing,
                    stage.expert_blocks,
                    tables,
                    replicas,
                    exchange,
                    leader.moe_backend,
                    options.enable_block_copy,
                )
            )
        return stages


OWN_EXCHANGES = ("deepep_high_throughput", "deepep_low_latency")
"""Backends whose kernels are not collectives, so that they have to be measured."""


def _own_exchange(bundle: Bundle, backend: str, ranks: int) -> dict[str, Curve]:
    """The measured exchange of a backend among so many ranks.

    Raises:
        InputError: the bundle has none.
    """
    found = bundle.exchanges()
    if (backend, ranks) in found:
        return {backend: found[backend, ranks]}
    there = sorted(count for name, count in found if name == backend)
    known = f"there are times for {', '.join(map(str, there))} ranks" if there else "it has no such times"
    raise InputError(
        f"{bundle.folder}: moe_backend {backend}: no exchange among {ranks} ranks; {known} (DeepEP was "
        "measured for block-scaled fp8 experts of some sizes, on H100, H200 and Blackwell; bundles made "
        "before have none: make it again with --force); use allgather_reducescatter or all_to_all"
    )


def _narrow_under_load(tables: RankTables, model: ModelSpec, factor: float) -> RankTables:
    """The factor of 8-bit decodes on the tables of the layers that have such a cache, not on the others'."""
    narrow = {
        group.label
        for group in attention_groups(model.layers)
        if getattr(group.attention, "kv_format", None) is None
    }
    return replace(
        tables,
        attentions={
            label: decodes_under_load(table, factor) if label in narrow else table
            for label, table in tables.attentions.items()
        },
    )


def _second_runner(model: ModelSpec, options: InstanceOptions) -> str | None:
    """The version that was asked for, if it runs the model with its second model runner."""
    version = options.plan_as_vllm
    return version if version and runs_v2(version, model.model_type, moe=model.is_moe) else None


def build_stage_cost(
    instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, cluster: ClusterSpec
) -> StageCost:
    """The cost of a single instance of one stage; see :meth:`Costs.stage`."""
    return Costs(cluster).stage(instance, model, options)
