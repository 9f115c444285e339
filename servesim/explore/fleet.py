"""A fleet of equal instances: what it costs, the cluster config that describes it, and how vLLM starts it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.annotated import Field
from servesim.specs.hardware import load_hardware
from servesim.specs.paths import find
from servesim.specs.reading import read_yaml_object
from servesim.specs.serve_line import write_serve_line
from servesim.specs.validation import BandwidthGbs, Count, PowerW, Spec, hint, validated

if TYPE_CHECKING:
    from os import PathLike

    from servesim.specs.options import RuntimeOptions

OBJECTIVES = ("cost", "min_gpus", "energy", "carbon", "throughput_per_gpu", "goodput_per_gpu")
NOT_HERE = (
    "cluster_config", "hardware", "model", "tp", "pp", "dp", "enable_expert_parallel", "dtype",
    "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "max_concurrency", "num_gpu_blocks",
)  # fmt: skip
"""Run options that a plan chooses, or that say something of one cluster."""
EXAMPLE_PRICES = "configs/prices/examples.yaml"
_PORT = 8000
_CPU_MEM = {"mem_size": 512, "mem_bw": 256, "mem_latency": 0}
"""Host memory of a node; nothing of a plan is kept there."""
_UNKNOWN_LINK = (32.0, 4000.0)
"""GB/s and ns of links that no hardware file states: PCIe 4.0 x16."""
_NODE_LATENCY_NS = 10_000.0
"""Of a message from one machine to another; RDMA takes some microseconds and its software as many."""
LIMITS = ("max_num_seqs", "max_num_batched_tokens")


class GpuPrice(Spec):
    """What one GPU costs and draws."""

    per_hour: Annotated[float, Field(ge=0, le=1e6)]
    watts: PowerW
    idle_watts: PowerW = 0.0
    host_watts: PowerW = 0.0
    node_gbs: BandwidthGbs = 25.0
    gpus_per_node: Count = 8
    source: str = ""


class Prices(Spec):
    """A price file."""

    as_of: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """Day on which the prices were listed."""
    currency: Annotated[str, Field(min_length=1, max_length=10)] = "USD"
    pue: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Power of the building for each watt of the machines."""
    grid_g_co2_per_kwh: Annotated[float, Field(ge=0, le=1e5)] = 400.0
    sources: dict[str, str] = Field(default_factory=dict)
    gpus: Annotated[dict[str, GpuPrice], Field(min_length=1)]

    def of(self, hardware: str) -> GpuPrice:
        """The price of one GPU.

        Raises:
            InputError: the file has none.
        """
        if hardware not in self.gpus:
            raise InputError(
                f"hardware: {hardware}: has no price; {hint(hardware, list(self.gpus))}; add it to the file "
                "of --prices"
            )
        return self.gpus[hardware]


def read_prices(path: str | PathLike[str] = EXAMPLE_PRICES) -> Prices:
    """The prices of a YAML file.

    Raises:
        InputError: the file is wrong.
    """
    found = find(str(path), "price file")
    return validated(Prices, read_yaml_object(found), str(found))


@dataclass(slots=True, frozen=True)
class Fleet:
    """Equal instances of one model behind one router."""

    model: str
    hardware: str
    replicas: int
    """Instances, those that only prefill included."""
    prefill: int = 0
    """Instances that only prefill, the others only decode; 0: every instance does both."""
    tp: int = 1
    pp: int = 1
    experts: bool = False
    """Whether an instance spreads experts over its GPUs in place of splitting them."""
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048

    @property
    def gpus_each(self) -> int:
        """GPUs of an instance."""
        return self.tp * self.pp

    @property
    def gpus(self) -> int:
        """GPUs of all instances."""
        return self.replicas * self.gpus_each

    @property
    def shape(self) -> Fleet:
        """One instance of it: what memory and single steps depend on."""
        return replace(self, replicas=1, prefill=0)

    def cost_per_hour(self, prices: Prices) -> float:
        """Of all GPUs, in the currency of the price file."""
        return round(self.gpus * prices.of(self.hardware).per_hour, 9)

    def words(self) -> str:
        """``2 x H100 tp 1, kv fp8, 128 seqs, 2048 tokens``."""
        split = f" ({self.prefill} prefill, {self.replicas - self.prefill} decode)" if self.prefill else ""
        degrees = f"tp {self.tp}" + (f" pp {self.pp}" if self.pp > 1 else "") + " ep" * self.experts
        formats = (f", {self.dtype}" if self.dtype else "") + f", kv {self.kv_cache_dtype}"
        return (
            f"{self.replicas} x {self.hardware} {degrees}{split}{formats}, {self.max_num_seqs} seqs, "
            f"{self.max_num_batched_tokens} tokens"
        )

    def row(self) -> dict[str, Any]:
        """Its fields, and the GPUs."""
        return {**asdict(self), "gpus": self.gpus}

    def options(self) -> dict[str, Any]:
        """What ``vllm serve`` is told of an instance, under the names of run options."""
        told: dict[str, Any] = {"model": self.model, "tp": self.tp}
        if self.pp > 1:
            told["pp"] = self.pp
        if self.experts:
            told["enable_expert_parallel"] = True
        if self.dtype:
            told["dtype"] = self.dtype
        if self.kv_cache_dtype != "auto":
            told["kv_cache_dtype"] = self.kv_cache_dtype
        return {**told, **{name: getattr(self, name) for name in LIMITS}}

    def idle_options(self) -> set[str]:
        """Run options that have nothing to choose in this fleet, though they have in a larger one."""
        idle = set()
        taking = self.prefill or self.replicas
        if max(taking, self.replicas - self.prefill) < 2:
            idle |= {"request_routing_policy", "router_refresh"}
        if taking < 2:
            idle.add("sticky_sessions")
        if not self.experts or self.tp < 2:
            idle |= {"expert_routing_policy", "enable_block_copy"}
        return idle

    def cluster(self, prices: Prices) -> dict[str, Any]:
        """The cluster config: nodes filled one after the other, links of the hardware file, power of the
        price file."""
        price, link = prices.of(self.hardware), load_hardware(self.hardware).link
        near = _UNKNOWN_LINK if link is None else (link.bandwidth_gbs, link.latency_us * 1e3 / 2)
        each_node = max(price.gpus_per_node // self.gpus_each, 1)
        instances = [self._instance(index) for index in range(self.replicas)]
        nodes = [instances[at : at + each_node] for at in range(0, len(instances), each_node)]
        return {
            "num_nodes": len(nodes),
            "link_bw": [near[0]] * 3 + [price.node_gbs],
            "link_latency": [near[1]] * 3 + [_NODE_LATENCY_NS],
            "nodes": [
                {
                    "num_instances": len(node),
                    "cpu_mem": dict(_CPU_MEM),
                    "instances": node,
                    "power": self._power(price, len(node) * self.gpus_each),
                }
                for node in nodes
            ],
        }

    def _instance(self, index: int) -> dict[str, Any]:
        role = None if not self.prefill else "prefill" if index < self.prefill else "decode"
        told = {
            "model_name": self.model,
            "hardware": self.hardware,
            "num_npus": self.gpus_each,
            "tp_size": self.tp,
            "pp_size": self.pp,
            "ep_size": self.tp if self.experts else 1,
            "pd_type": role,
            "kv_cache_dtype": self.kv_cache_dtype,
            **{name: getattr(self, name) for name in LIMITS},
        }
        return {**told, "dtype": self.dtype} if self.dtype else told

    def _power(self, price: GpuPrice, gpus: int) -> dict[str, Any]:
        npu = {
            "idle_power": price.idle_watts,
            "standby_power": price.idle_watts,
            "active_power": max(price.watts, price.idle_watts),
            "standby_duration": 0,
        }
        return {"base_node_power": price.host_watts * gpus, "npu": {self.hardware: npu}}

    def serve_lines(self, options: RuntimeOptions) -> list[str]:
        """A ``vllm serve`` line for every instance, each on a port of its own.

        Args:
            options: of the run; those that the user set and vLLM knows are written too.
        """
        given = options.model_dump(exclude_unset=True)
        line = write_serve_line({**given, **self.options()})
        lines = []
        for index in range(self.replicas):
            role = ""
            if self.prefill:
                side = "kv_producer" if index < self.prefill else "kv_consumer"
                role = f" --kv-transfer-config.kv_connector NixlConnector --kv-transfer-config.kv_role {side}"
            lines.append(f"{line}{role} --port {_PORT + index}")
        return lines
