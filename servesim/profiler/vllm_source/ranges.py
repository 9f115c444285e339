"""Marks every layer's calls for PyTorch's profiler, and adds up the GPU kernels under the marks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PREFIX = "servesim:"


class LayerRanges:
    """Forward hooks that open and close a profiler range around every call of a layer's modules."""

    def __init__(self, open_range: Callable[[str], Any]) -> None:
        """``open_range``: makes a context manager of a name (``torch.profiler.record_function``)."""
        self._open_range = open_range
        self._handles: list[Any] = []
        self._open: list[tuple[Any, Any]] = []

    def attach(self, layers: dict[str, list[tuple[str, Any]]]) -> None:
        """Hook every module of every layer; a module may serve one layer only."""
        for layer, modules in layers.items():
            for _, module in modules:
                self._handles += [
                    module.register_forward_pre_hook(self._opener(layer), with_kwargs=True),
                    module.register_forward_hook(self._close, with_kwargs=True, always_call=True),
                ]

    def detach(self) -> None:
        """Take all hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _opener(self, layer: str) -> Callable[..., None]:
        def opened(module: Any, *_: Any) -> None:
            mark = self._open_range(PREFIX + layer)
            mark.__enter__()
            self._open.append((module, mark))

        return opened

    def _close(self, module: Any, *_: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


def kernel_us(events: Iterable[Any]) -> dict[str, float]:
    """Layer -> µs of all kernels launched under its ranges, from the profiler's events.

    A range inside another layer's range counts for the outer one alone.
    """
    total: dict[str, float] = {}
    for event in events:
        if event.name.startswith(PREFIX) and not _inside_another(event) and _is_host(event):
            layer = event.name.removeprefix(PREFIX)
            total[layer] = total.get(layer, 0.0) + _under(event)
    return total


def _is_host(event: Any) -> bool:
    """The profiler repeats a range on the device's timeline; that copy launches nothing."""
    return getattr(getattr(event, "device_type", None), "name", "CPU") == "CPU"


def _inside_another(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(PREFIX):
            return True
        parent = parent.cpu_parent
    return False


def _under(event: Any) -> float:
    own = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX))
    return float(own + sum(_under(child) for child in event.cpu_children))
