"""The paths a GPU takes, walked without one: a clock made of numbers, FlashInfer's documented interface."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")

from servesim.errors import NotSupportedError  # noqa: E402
from servesim.profiler.meter import AttentionBatch  # noqa: E402
from servesim.profiler.torch_source.device import Calls, Device, open_device  # noqa: E402
from servesim.profiler.torch_source.flashinfer_attention import PAGE, FlashInferAttention  # noqa: E402
from servesim.specs.rank_shapes import rank_shapes  # noqa: E402
from tests.profiler.measure.fake_meter import job  # noqa: E402

MIB = 1 << 20


class Clock:
    """A GPU whose kernels take as long as they say; an event costs 2 µs."""

    def __init__(self, cache_bytes: int) -> None:
        self.now_us = 0.0
        self.log: list[str] = []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                clock.now_us += 2.0
                self.at_us = clock.now_us

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return float(end.at_us - self.at_us) / 1e3

        self.Event = Event
        self._cache_bytes = cache_bytes

    def kernel(self, name: str, us: float) -> Any:
        def launch() -> None:
            self.log.append(name)
            self.now_us += us

        return launch

    def get_device_properties(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=self._cache_bytes)

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        assert cycles > 0
        self.log.append("hold")

    def device(self) -> Device:
        flush = SimpleNamespace(zero_=self.kernel("flush", 50.0))
        fake = SimpleNamespace(cuda=self, empty=lambda *_, **__: flush, int8=None)
        return Device(torch=fake, name="cuda", iterations=3)


def test_a_round_of_buffers_is_held_until_it_is_queued() -> None:
    clock = Clock(cache_bytes=50 * MIB)
    functions = [clock.kernel(f"gemm{i}", 40.0) for i in range(3)]
    us = clock.device().time_us(Calls(functions, cold_bytes=40 * MIB))  # 120 MiB are more than 2 x 50
    rounds = " ".join(clock.log).split(" hold ")[1:]
    calls = len(rounds[0].split()) - 1  # the next round's first call stands before its hold
    assert us == pytest.approx(40.0 + 2.0 / calls)  # an event is spread over all calls of a round
    assert "flush" not in clock.log
    assert rounds[0].split()[:3] in (["gemm0", "gemm1", "gemm2"], ["gemm1", "gemm2", "gemm0"])


def test_small_buffers_are_flushed_out_of_the_cache() -> None:
    clock = Clock(cache_bytes=50 * MIB)
    us = clock.device().time_us(Calls([clock.kernel("decode", 7.0)], cold_bytes=30 * MIB))
    assert us == pytest.approx(7.0)
    assert clock.log[2:] == ["hold", "flush", "flush", "decode"] * 3


def test_what_reads_next_to_nothing_from_memory_is_not_flushed() -> None:
    clock = Clock(cache_bytes=50 * MIB)
    clock.device().time_us(Calls([clock.kernel("norm", 2.0)], cold_bytes=0))
    assert "flush" not in clock.log


class _Wrapper:
    """FlashInfer's wrapper as its documentation describes it, in plain tensor operations."""

    planned: list[_Wrapper] = []  # noqa: RUF012

    def __init__(self, workspace: Any, layout: str, use_tensor_cores: bool = False) -> None:
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")
        assert use_tensor_cores == isinstance(self, DecodeWrapper)
        self.planned.append(self)

    def _table(
        self, indptr: Any, indices: Any, last: Any, sizes: tuple[int, ...], types: dict[str, Any]
    ) -> None:
        self.indptr, self.indices, self.last = indptr.tolist(), indices.tolist(), last.tolist()
        self.sizes, self.types = sizes, types

    def keys_of(self, sequence: int, pool: Any) -> tuple[Any, Any]:
        pages = self.indices[self.indptr[sequence] : self.indptr[sequence + 1]]
        length = (len(pages) - 1) * PAGE + self.last[sequence]
        keys, values = (pool[pages, i].flatten(0, 1)[:length].float() for i in (0, 1))
        return keys, values


def _attend(query: Any, keys: Any, values: Any) -> Any:
    """query (tokens, heads, d): the last tokens of the sequence, each sees itself and what is before it."""
    tokens, heads, size = query.shape
    group = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("thd,khd->htk", query.float(), keys) / size**0.5
    hidden = torch.ones(tokens, len(keys), dtype=torch.bool).tril(len(keys) - tokens).logical_not()
    return torch.einsum("htk,khd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


class PrefillWrapper(_Wrapper):
    def plan(
        self, qo: Any, indptr: Any, indices: Any, last: Any, *sizes: int, causal: bool = False, **types: Any
    ) -> None:
        assert causal
        self.qo = qo.tolist()
        self._table(indptr, indices, last, sizes, types)

    def run(self, query: Any, pool: Any) -> Any:
        assert self.qo == [0, len(query)]
        return _attend(query, *self.keys_of(0, pool))


class DecodeWrapper(_Wrapper):
    def plan(self, indptr: Any, indices: Any, last: Any, *sizes: int, **types: Any) -> None:
        self._table(indptr, indices, last, sizes, types)

    def run(self, query: Any, pool: Any) -> Any:
        return torch.cat([_attend(query[i : i + 1], *self.keys_of(i, pool)) for i in range(len(query))])


def _append(
    keys: Any,
    values: Any,
    batch: Any,
    positions: Any,
    pool: Any,
    indices: Any,
    indptr: Any,
    last: Any,
    kv_layout: str,
) -> None:
    assert kv_layout == "NHD"
    assert len(last) == len(indptr) - 1
    for row, (sequence, position) in enumerate(zip(batch.tolist(), positions.tolist(), strict=True)):
        page = int(indices[int(indptr[sequence]) + position // PAGE])
        pool[page, 0, position % PAGE], pool[page, 1, position % PAGE] = keys[row], values[row]


@pytest.fixture
def _flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper,
        BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper,
        append_paged_kv_cache=_append,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(_Wrapper, "planned", [])
    monkeypatch.setattr("servesim.profiler.torch_source.flashinfer_attention._WORKSPACE_BYTES", 16)


@pytest.mark.usefixtures("_flashinfer")
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_flashinfer_gets_one_prefill_and_one_decode_launch(kv: str) -> None:
    what = job(kv=kv)
    shapes = rank_shapes(what.model, 2)
    attention = FlashInferAttention(open_device("cpu"), what, shapes, 1000)
    calls = attention.calls(AttentionBatch(20, 40, ((2, 16), (1, 5))))
    assert len(calls.functions) > 1  # several places of the pool
    (_, prefilled), (_, decoded) = calls.functions[0]()
    assert prefilled.shape == (20, shapes.heads, shapes.head_dim)
    assert decoded.shape == (3, shapes.heads, shapes.head_dim)
    prefill, decode = _Wrapper.planned[:2]
    assert prefill.sizes == decode.sizes == (4, 1, 32, PAGE)
    assert prefill.types["kv_data_type"] == (torch.float8_e4m3fn if kv == "fp8" else torch.bfloat16)
    assert [len(decode.keys_of(i, attention._pool)[0]) for i in range(3)] == [17, 17, 6]
    assert len(prefill.keys_of(0, attention._pool)[0]) == 60
    assert not set(prefill.indices) & set(decode.indices)


@pytest.mark.usefixtures("_flashinfer")
def test_own_keys_are_written_to_the_end_of_a_sequence() -> None:
    what = job(dtype="float16")
    attention = FlashInferAttention(open_device("cpu"), what, rank_shapes(what.model, 1), 400)
    function = attention.calls(AttentionBatch(3, 15, ((2, 16),))).functions[0]
    before = [[wrapper.keys_of(i, attention._pool)[0] for i in range(n)] for wrapper, n in _pairs()]
    function()
    after = [[wrapper.keys_of(i, attention._pool)[0] for i in range(n)] for wrapper, n in _pairs()]
    changed = [
        (a != b).any(-1).any(-1).nonzero().flatten().tolist()
        for old, new in zip(before, after, strict=True)
        for a, b in zip(old, new, strict=True)
    ]
    assert changed == [[15, 16, 17], [16], [16]]


def _pairs() -> list[tuple[_Wrapper, int]]:
    prefill, decode = _Wrapper.planned[:2]
    return [(prefill, 1), (decode, 2)]


@pytest.mark.usefixtures("_flashinfer")
def test_flashinfer_refuses_a_cache_it_cannot_read() -> None:
    what = job(kv="int8")
    with pytest.raises(NotSupportedError, match="FlashInfer reads 16-bit and fp8 caches"):
        FlashInferAttention(open_device("cpu"), what, rank_shapes(what.model, 1), 400)


def test_without_flashinfer_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(NotSupportedError, match=r"install flashinfer-python, or .* --attention sdpa"):
        FlashInferAttention(open_device("cpu"), job(), rank_shapes(job().model, 1), 400)
