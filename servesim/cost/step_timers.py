"""Makes the step timers of a cluster: equal instances share one, and every bundle is read once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.cost.bundle import find_bundle
from servesim.cost.cudagraph import capture_limit
from servesim.cost.identity import wanted_for
from servesim.cost.stage import whole_model
from servesim.cost.step_terms import stage_terms
from servesim.cost.step_timer import StepTimer
from servesim.network.topology import Topology
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import describe_host, load_hardware, resolve_engine

if TYPE_CHECKING:
    from collections.abc import Hashable

    from servesim.cost.bundle import Bundle, RankTables
    from servesim.cost.stage import Stage
    from servesim.specs.architecture import Architecture
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.hardware import EngineSpec, HardwareSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions


class StepTimers:
    """The step timers of one cluster, made when asked for and shared by instances that cannot differ.

    A timer keeps nothing of a run but look-ups it has already done, so sharing changes no result.
    """

    def __init__(self, cluster: ClusterSpec) -> None:
        self.topology = Topology.of(cluster)
        self._collectives = cluster.collectives
        self._timers: dict[Hashable, StepTimer] = {}
        self._bundles: dict[Hashable, Bundle] = {}
        self._architectures: dict[str, Architecture] = {}
        self._engines: dict[Hashable, EngineSpec] = {}
        self._hardware: dict[str, HardwareSpec] = {}

    def of(
        self,
        instance: InstanceSpec,
        model: ModelSpec,
        options: InstanceOptions,
        stage: Stage | None = None,
        *,
        experts: bool = True,
    ) -> StepTimer:
        """The timer of an instance, or of one of its pipeline stages.

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
        engine = self._engine(instance, options)
        stage = stage or whole_model(model)
        where = (stage.first_block, stage.num_blocks, experts)
        limit = capture_limit(options.max_num_seqs, options.max_num_batched_tokens)
        key = (instance.hardware, model, options.variant, instance.tp_size, engine, where, limit)
        if key not in self._timers:
            tp = instance.tp_size
            bundle = self.bundle(instance, model, options)
            architecture = self._architecture(model.model_type)
            tables = self._tables(bundle, tp)
            terms = stage_terms(architecture, stage, tables, tp, self.topology.tp, experts=experts)
            self._timers[key] = StepTimer(bundle, tables, stage.num_blocks, terms, engine, limit)
        return self._timers[key]

    def bundle(self, instance: InstanceSpec, model: ModelSpec, options: InstanceOptions) -> Bundle:
        """The profile bundle of an instance."""
        key = (instance.hardware, model, options.variant, instance.tp_size)
        if key not in self._bundles:
            wanted = wanted_for(model, self._facts(instance.hardware), options.variant)
            self._bundles[key] = find_bundle(wanted, instance.tp_size)
        return self._bundles[key]

    def host(self, instance: InstanceSpec, options: InstanceOptions) -> str:
        """One line: the host time of an instance's steps, and whose it is."""
        return describe_host(self._facts(instance.hardware), self._engine(instance, options))

    def _tables(self, bundle: Bundle, tp: int) -> RankTables:
        """The bundle's tables; without its measured collectives where the cluster's links decide."""
        tables, wanted = bundle.tables(tp), self._collectives
        if wanted == "links" or (wanted == "auto" and bundle.collectives_link == "pcie"):
            return replace(tables, collectives={})
        return tables

    def _architecture(self, model_type: str) -> Architecture:
        if model_type not in self._architectures:
            self._architectures[model_type] = load_architecture(model_type)
        return self._architectures[model_type]

    def _engine(self, instance: InstanceSpec, options: InstanceOptions) -> EngineSpec:
        stated = instance.engine and (instance.engine, frozenset(instance.engine.model_fields_set))
        key = (instance.hardware, stated, options.cudagraph)
        if key not in self._engines:
            hardware = self._facts(instance.hardware)
            self._engines[key] = resolve_engine(hardware, instance.engine, cudagraph=options.cudagraph)
        return self._engines[key]

    def _facts(self, hardware: str) -> HardwareSpec:
        if hardware not in self._hardware:
            self._hardware[hardware] = load_hardware(hardware)
        return self._hardware[hardware]
