"""What the host adds to a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cost.terms import LayerCost, Role

if TYPE_CHECKING:
    from servesim.cost.batch_shape import BatchShape
    from servesim.specs.hardware import EngineSpec


class HostTerm:
    """Host time of a step: constants of one machine.

    What never hides behind the accelerator is part of every step (:meth:`ns`). The rest, a time for the step
    and one for each sequence, is added to it with synchronous scheduling. With asynchronous scheduling it
    goes on beside the step before, and so is a floor of what the accelerator takes (:meth:`floor_ns`); so
    are the launches of layers that no CUDA graph replays, either way.
    """

    __slots__ = ("_decode_us", "_launch_ns", "_overlaps", "_prefill_us", "_sequence_us", "_step_us", "role")

    def __init__(self, engine: EngineSpec, launches: int = 0, *, overlaps: bool = True) -> None:
        """
        Args:
            engine: the constants.
            launches: layers that a step launches one by one; 0 with CUDA graphs.
            overlaps: whether the host prepares a step while the one before runs.
        """
        self.role = Role.HOST
        self._prefill_us, self._decode_us = engine.prefill_step_overhead_us, engine.decode_step_overhead_us
        self._step_us, self._sequence_us = engine.host_step_us, engine.host_sequence_us
        self._launch_ns = launches * (engine.eager_launch_us or 0.0) * 1000.0
        self._overlaps = overlaps

    @property
    def has_floor(self) -> bool:
        """Whether a step may wait for the host."""
        return bool(self._launch_ns or (self._overlaps and (self._step_us or self._sequence_us)))

    def ns(self, batch: BatchShape, tokens: int) -> float:  # noqa: ARG002 - see Term
        """See :class:`servesim.cost.terms.Term`."""
        sequences = batch.num_decodes + len(batch.chunks)
        if not sequences:
            return 0.0
        us = self._prefill_us if batch.chunks else self._decode_us
        if not self._overlaps:
            us += self._step_us + self._sequence_us * sequences
        return us * 1000.0

    def floor_ns(self, batch: BatchShape) -> float:
        """Least time of the accelerator's part of the step in ns, for it waits for the host."""
        sequences = batch.num_decodes + len(batch.chunks)
        if not sequences:
            return self._launch_ns
        if not self._overlaps:
            return self._launch_ns
        return (self._step_us + self._sequence_us * sequences) * 1000.0 + self._launch_ns

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        us = self.ns(batch, tokens) / 1000.0
        if not us:
            return []
        names = ["prefill_step_overhead_us" if batch.chunks else "decode_step_overhead_us"]
        if not self._overlaps and (self._step_us or self._sequence_us):
            names += ["host_step_us", "host_sequence_us"]
        return [LayerCost("host overhead", 1, us, ", ".join(f"engine.{name}" for name in names))]

    def explain_wait(self, batch: BatchShape, gpu_us: float) -> list[LayerCost]:
        """The wait for the host of a step whose accelerator part takes ``gpu_us``; no line where none."""
        wait_us = self.floor_ns(batch) / 1000.0 - gpu_us
        if wait_us <= 0.0:
            return []
        why = "engine.eager_launch_us" if self._launch_ns else "engine.host_step_us, engine.host_sequence_us"
        return [LayerCost("waiting for the host", 1, wait_us, why)]
