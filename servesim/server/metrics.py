"""What the emulated engine counts, as Prometheus text under the names, labels and buckets of vLLM 0.33.

What has no meaning here (multi-modal caches, corrupted logits, remote stages of KV) is absent, not zero.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client import Metric

    from servesim.engine.instance import Instance
    from servesim.server.live import LiveEngine, Stream

_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ANSWERS = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_REASONS = ("stop", "length", "abort", "error", "repetition")
_NS = 1e-9

GAUGES = {
    "num_requests_running": "Requests that run.",
    "num_requests_waiting": "Requests that wait.",
    "kv_cache_usage_perc": "Share of the KV blocks in use; 1 is all of them.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "Preemptions.",
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "prompt_tokens_cached": "Prompt tokens that were cached.",
    "generation_tokens": "Tokens generated.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...] | None]] = {
    "request_prompt_tokens": ("Prompt tokens of a request.", None),
    "request_generation_tokens": ("Tokens generated for a request.", None),
    "request_max_num_generation_tokens": ("Most tokens that a request asked for.", None),
    "request_params_max_tokens": ("max_tokens of a request.", None),
    "request_prefill_kv_computed_tokens": ("Prompt tokens computed, without the cached ones.", None),
    "request_params_n": ("n of a request.", _ANSWERS),
    "request_num_preemptions": ("Preemptions of a request.", _PREEMPTIONS),
    "iteration_tokens_total": ("Tokens of an engine step.", _STEP_TOKENS),
    "time_to_first_token_seconds": ("Time to the first token.", _TTFT_S),
    "inter_token_latency_seconds": ("Time between two tokens.", _ITL_S),
    "request_time_per_output_token_seconds": ("Mean time per token after the first of a request.", _ITL_S),
    "e2e_request_latency_seconds": ("Time from arrival to the last token.", _LATENCY_S),
    "request_queue_time_seconds": ("Time spent waiting.", _LATENCY_S),
    "request_inference_time_seconds": ("Time from the first scheduling to the last token.", _LATENCY_S),
    "request_prefill_time_seconds": ("Time from the first scheduling to the first token.", _LATENCY_S),
    "request_decode_time_seconds": ("Time from the first token to the last.", _LATENCY_S),
}
"""Buckets None: 1, 2, 5, 10 … up to the longest context."""
_LABELS = ("model_name", "engine")
_GAPS = "inter_token_latency_seconds"


class Metrics:
    """Counts for a Prometheus registry."""

    def __init__(self, engine: LiveEngine, model_name: str) -> None:
        """
        Args:
            engine: whose steps and requests are counted.
            model_name: value of the label of that name.

        Raises:
            InputError: prometheus-client is not installed.
        """
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise InputError(
                "servesim serve: needs the extra server: pip install 'servesim[server]'"
            ) from error
        self._engine = engine
        self._registry = registry = CollectorRegistry()
        self._model = model_name
        steps_of_tokens = _one_two_five(engine.max_model_len)

        def name(short: str) -> str:
            return f"vllm:{short}"

        self._gauges = {
            key: Gauge(name(key), text, _LABELS, registry=registry) for key, text in GAUGES.items()
        }
        self._counters = {
            key: Counter(name(key), text, _LABELS, registry=registry) for key, text in COUNTERS.items()
        }
        self._histograms = {
            key: Histogram(name(key), text, _LABELS, buckets=buckets or steps_of_tokens, registry=registry)
            for key, (text, buckets) in HISTOGRAMS.items()
            if key != _GAPS
        }
        self._gaps = _TokenGaps(name(_GAPS), HISTOGRAMS[_GAPS][0], model_name, len(engine.instances))
        registry.register(self._gaps)
        self._new_tokens = [0] * len(engine.instances)
        """Tokens of each instance since the last look."""
        self._by_reason = Counter(
            name("request_success"), "Requests that ended.", (*_LABELS, "finished_reason"), registry=registry
        )
        self._waiting_by_reason = Gauge(
            name("num_requests_waiting_by_reason"),
            "Waiting requests, by what they wait for.",
            (*_LABELS, "reason"),
            registry=registry,
        )
        self._by_source = Counter(
            name("prompt_tokens_by_source"),
            "Prompt tokens by source.",
            (*_LABELS, "source"),
            registry=registry,
        )
        adapted = [instance.log.options for instance in engine.instances if instance.log.options.enable_lora]
        self._max_lora = str(adapted[0].max_loras) if adapted else ""
        self._adapters = Gauge(
            name("lora_requests_info"),
            "LoRA adapters that have requests; the value is the time.",
            ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
            registry=registry if adapted else None,
        )
        self._rows = [0] * len(engine.instances)
        """Steps of each instance that are counted."""
        info = Gauge(
            name("cache_config_info"),
            "The KV cache's configuration.",
            ("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype", "engine"),
            registry=registry,
        )
        for index, instance in enumerate(engine.instances):
            options, labels = instance.log.options, (model_name, str(index))
            info.labels(
                str(instance.log.capacity.block_size // options.decode_context_parallel_size),
                str(instance.log.capacity.num_blocks),
                str(options.enable_prefix_caching),
                options.kv_dtype,
                str(index),
            ).set(1)
            for each in (*self._gauges.values(), *self._counters.values(), *self._histograms.values()):
                each.labels(*labels)  # present from the start, as zeros
            for reason in _REASONS:
                self._by_reason.labels(*labels, reason)
            for source in ("local_compute", "local_cache_hit"):
                self._by_source.labels(*labels, source)
        engine.watch(self)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        from prometheus_client import generate_latest

        for index, instance in enumerate(self._engine.instances):
            self._look_at(index, instance)
        if self._max_lora:
            self._look_at_adapters()
        text: bytes = generate_latest(self._registry)
        return text

    def _look_at(self, index: int, instance: Instance) -> None:
        labels = (self._model, str(index))
        waiting, running = instance.counts()
        pool = instance.scheduler.kv.pool
        self._gauges["num_requests_running"].labels(*labels).set(running)
        self._gauges["num_requests_waiting"].labels(*labels).set(waiting)
        self._waiting_by_reason.labels(*labels, "capacity").set(waiting)
        self._waiting_by_reason.labels(*labels, "deferred").set(0)
        self._gauges["kv_cache_usage_perc"].labels(*labels).set(pool.num_used / pool.usable)
        self._counters["generation_tokens"].labels(*labels).inc(self._new_tokens[index])
        self._new_tokens[index] = 0
        self._count_steps(index, instance)

    def _look_at_adapters(self) -> None:
        """Both labels name all adapters that have requests, waiting or running, as vLLM's do."""
        schedulers = [instance.scheduler for instance in self._engine.instances]
        requests = [state.request for each in schedulers for state in (*each.waiting, *each.running)]
        requests.sort(key=lambda request: request.index)
        names = ",".join(dict.fromkeys(request.lora for request in requests if request.lora is not None))
        self._adapters.labels(self._max_lora, names, names).set(self._engine.pace.now_ns() * _NS)

    def _count_steps(self, index: int, instance: Instance) -> None:
        """Take in the steps since the last time, as far as the log still has them."""
        labels, steps = (self._model, str(index)), instance.log.steps
        counter, sizes = self._counters, self._histograms["iteration_tokens_total"].labels(*labels)
        for row in range(self._rows[index], len(steps)):
            counter["prefix_cache_queries"].labels(*labels).inc(steps.lookup_tokens[row])
            counter["prefix_cache_hits"].labels(*labels).inc(steps.hit_tokens[row])
            counter["num_preemptions"].labels(*labels).inc(steps.preempted[row])
            sizes.observe(steps.prefill_tokens[row] + steps.decode_tokens[row])
        self._rows[index] = len(steps)

    # ------------------------------------------------------------------ as the engine tells it

    def taken(self, stream: Stream) -> None:
        """A request was handed to an instance."""
        self._observe(stream, "request_max_num_generation_tokens", stream.request.output_tokens)
        if len(self._engine.instances[stream.instance].log.steps) - self._rows[stream.instance] > _OFTEN:
            self._count_steps(stream.instance, self._engine.instances[stream.instance])

    def asked(self, stream: Stream, answers: int, max_tokens: int | None) -> None:
        """A client asked for so many answers of at most so many tokens each."""
        self._observe(stream, "request_params_n", answers)
        if max_tokens is not None:
            self._observe(stream, "request_params_max_tokens", max_tokens)

    def tokens(self, stream: Stream, before_ns: int, times_ns: Sequence[int]) -> None:
        """Tokens went out, after one at ``before_ns``; 0: after none."""
        self._new_tokens[stream.instance] += len(times_ns)
        for time_ns in times_ns:
            if before_ns:
                self._gaps.observe(stream.instance, time_ns - before_ns)
            else:
                self._first(stream, time_ns)
            before_ns = time_ns

    def _first(self, stream: Stream, time_ns: int) -> None:
        labels = (self._model, str(stream.instance))
        prompt, cached = stream.request.input_tokens, stream.cached_tokens
        self._counters["prompt_tokens"].labels(*labels).inc(prompt)
        self._counters["prompt_tokens_cached"].labels(*labels).inc(cached)
        self._by_source.labels(*labels, "local_compute").inc(prompt - cached)
        self._by_source.labels(*labels, "local_cache_hit").inc(cached)
        self._observe(stream, "time_to_first_token_seconds", (time_ns - stream.arrival_ns) * _NS)
        self._observe(stream, "request_prefill_kv_computed_tokens", prompt - cached)

    def ended(self, stream: Stream, reason: str) -> None:
        """A request ended, by itself or not."""
        labels = (self._model, str(stream.instance))
        self._by_reason.labels(*labels, reason).inc()
        if stream.state is None or not stream.tokens or reason == "abort":
            return
        record = stream.state.record
        first_ns = stream.first_token_ns
        self._observe(stream, "request_prompt_tokens", stream.request.input_tokens)
        self._observe(stream, "request_generation_tokens", stream.tokens)
        self._observe(stream, "request_num_preemptions", record.preemptions)
        decode_ns = record.end_ns - first_ns
        for name, time_ns in (
            ("e2e_request_latency_seconds", record.end_ns - stream.arrival_ns),
            ("request_queue_time_seconds", record.scheduled_ns - record.queued_ns),
            ("request_inference_time_seconds", record.end_ns - record.scheduled_ns),
            ("request_prefill_time_seconds", first_ns - record.scheduled_ns),
            ("request_decode_time_seconds", decode_ns),
        ):
            self._observe(stream, name, time_ns * _NS)
        if stream.tokens > 1:
            self._observe(
                stream, "request_time_per_output_token_seconds", decode_ns / (stream.tokens - 1) * _NS
            )

    def refused(self, stream: Stream) -> None:
        """A request can never run."""
        self._by_reason.labels(self._model, str(stream.instance), "error").inc()

    def _observe(self, stream: Stream, name: str, value: float) -> None:
        self._histograms[name].labels(self._model, str(stream.instance)).observe(value)


class _TokenGaps:
    """The histogram of the times between two tokens. It counts each token, so it does without locks."""

    def __init__(self, name: str, text: str, model: str, instances: int) -> None:
        self._name, self._text, self._model = name, text, model
        self._bounds_ns = [round(bound / _NS) for bound in _ITL_S]
        self._counts = [[0] * (len(_ITL_S) + 1) for _ in range(instances)]
        self._sums_ns = [0] * instances
        self._created_s = time.time()

    def observe(self, instance: int, gap_ns: int) -> None:
        self._counts[instance][bisect_left(self._bounds_ns, gap_ns)] += 1
        self._sums_ns[instance] += gap_ns

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self._name, self._text, labels=_LABELS)
        for index, counts in enumerate(self._counts):
            ends = [*(str(bound) for bound in _ITL_S), "+Inf"]
            buckets = list(zip(ends, accumulate(counts), strict=True))
            family.add_metric((self._model, str(index)), buckets, self._sums_ns[index] * _NS)
            labels = dict(zip(_LABELS, (self._model, str(index)), strict=True))
            family.add_sample(f"{self._name}_created", labels, self._created_s)
        yield family


_OFTEN = 10_000
"""Steps after which they are counted though nobody looks."""


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … up to ``most``."""
    return tuple(
        float(value)
        for value in (mantissa * 10**power for power in range(10) for mantissa in (1, 2, 5))
        if value <= most
    )
