"""Steps of one model with its KV cache in each format: from the tables of two bundles, or derived from them.

Kernel times exist for 16-bit and fp8 caches. A smaller format reads fewer bytes: what its decode attention
takes is derived from the fp8 kernel's time, whose part that grows with the context is taken in proportion to
the bytes (:meth:`KvSteps.step_ms`). Unpacking may cost more than the bytes save, so that the band reaches up
to the 16-bit kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cost.batch_shape import Shape
from servesim.cost.build import Costs
from servesim.errors import MissingFileError
from servesim.explore.kv_dial import Figure
from servesim.specs.block_layers import attentions_of
from servesim.specs.cluster_changes import cluster_of
from servesim.specs.instance_options import resolve
from servesim.specs.kv_formats import format_bytes
from servesim.specs.kv_skip import skipped_layers

if TYPE_CHECKING:
    from servesim.cost.stage_cost import StageCost
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import RuntimeOptions

_SHORTEST = 16
"""Least context of the search for a break-even."""
_TIMED = ("fp8", "fp8_ds_mla")
"""Formats that the fp8 kernels' times are of; those of sparse latent attention read DeepSeek's own slots."""
_NEVER = "at no context that the model has"


class KvSteps:
    """Decodes ``batch`` x ``context`` tokens, and one prompt of ``context`` tokens, in every format."""

    def __init__(
        self, options: RuntimeOptions, model: ModelSpec, base: str, context: int, batch: int
    ) -> None:
        self._options, self._model, self._base = options, model, base
        self._context, self._batch = context, batch
        self._cluster = cluster_of(options)
        self._costs = Costs(self._cluster)
        self._instance = next(spec for _, spec in self._cluster.instances)
        self._missing: dict[str, str] = {}
        self._stages: dict[str, StageCost | None] = {}

    # ------------------------------------------------------------------ figures

    def step_ms(self, kv_format: str) -> Figure:
        """The decode step in ms.

        Derived: ``rest + A0 + (A8 - A0) x bytes / bytes of fp8``, A8 the fp8 kernel at this context, A0 at
        none, both of all layers; at most the step with a 16-bit cache, which is the band's other end. Layers
        left in 16 bit count as in the fp8 step; those that the format leaves out beside these, as so many
        average ones with the 16-bit kernel's time.
        """
        if kv_format in (self._base, *_TIMED):
            own = kv_format if kv_format == self._base else "fp8"
            stage = self._stage(own)
            if stage is None:
                return Figure("unknown", reason=self._missing[own])
            return Figure("tables", self._decode_ns(stage, self._context) / 1e6)
        wide, narrow = self._stage(self._base), self._stage("fp8")
        if wide is None or narrow is None:
            return Figure("unknown", reason=next(iter(self._missing.values())))
        at, start = (self._attention_ns(narrow, kv) for kv in (self._context, _SHORTEST))
        saved = max(at - start, 0.0) * self._narrow_share() * (1 - self._ratio(kv_format))
        more = self._left_out_beside(kv_format)
        widened = self._attention_ns(wide, self._context) - at
        ns = self._decode_ns(narrow, self._context) - (1 - more) * saved + more * widened
        most = self._decode_ns(wide, self._context)
        likely, low, high = ns / 1e6, min(ns, most) / 1e6, max(ns, most) / 1e6
        return Figure("derived", likely, low, high, "the fp8 kernel's time in proportion to the bytes")

    def break_even(self, kv_format: str) -> Figure:
        """Least context from which on the decode step of the batch is no longer than with 16 bit."""
        if kv_format == self._base:
            return Figure("unknown", reason="it is what the others are compared with")
        if kv_format not in _TIMED:
            return Figure("unknown", reason="what unpacking costs is measured nowhere")
        wide, narrow = self._stage(self._base), self._stage("fp8")
        if wide is None or narrow is None:
            return Figure("unknown", reason=next(iter(self._missing.values())))
        contexts = self._contexts()
        worse = [kv for kv in contexts if self._decode_ns(narrow, kv) > self._decode_ns(wide, kv)]
        if not worse:
            return Figure("tables", contexts[0])
        if worse[-1] == contexts[-1]:
            return Figure("tables", None, reason=_NEVER)
        low, high = worse[-1], contexts[contexts.index(worse[-1]) + 1]
        while high - low > 1:
            middle = (low + high) // 2
            if self._decode_ns(narrow, middle) > self._decode_ns(wide, middle):
                low = middle
            else:
                high = middle
        return Figure("tables", high)

    def prefill_percent(self, kv_format: str) -> Figure:
        """Change of the time of one prompt against 16 bit, computed alone and chunk by chunk."""
        if kv_format == self._base:
            return Figure("tables", 0.0)
        if kv_format not in _TIMED:
            return Figure("unknown", reason="no prefill with such a cache is measured")
        wide, narrow = self._stage(self._base), self._stage("fp8")
        if wide is None or narrow is None:
            return Figure("unknown", reason=next(iter(self._missing.values())))
        return Figure("tables", 100 * (self._prompt_ns(narrow) / self._prompt_ns(wide) - 1))

    def notes(self) -> list[str]:
        """Where the times are from, and what they leave out."""
        notes = [
            f"step: {self._batch} decodes with {self._context:,} tokens each; prefill: one prompt of "
            f"{self._context:,} tokens, alone"
        ]
        for kv_format in (self._base,) if self._base in _TIMED else (self._base, "fp8"):
            if (stage := self._stage(kv_format)) is not None:
                notes.append(f"times with {kv_format}: {stage.bundle.describe()}")
            else:
                notes.append(f"times with {kv_format}: none: {self._missing[kv_format]}")
        notes.append(
            "derived (~): what the fp8 kernel takes more with the context, in proportion to the "
            "bytes; the band reaches to the 16-bit step, for unpacking may cost what the bytes save, and "
            "nobody measured that a kernel is not slower still"
        )
        return notes

    # ------------------------------------------------------------------ times

    def _decode_ns(self, stage: StageCost, kv: int) -> int:
        return stage.decode_ns(self._batch, self._batch * kv, kv, kv)

    def _attention_ns(self, stage: StageCost, kv: int) -> float:
        batch = Shape((), self._batch, self._batch * kv, kv, kv)
        return stage.attention.ns(batch, self._batch)

    def _prompt_ns(self, stage: StageCost) -> int:
        budget = resolve(self._options, self._instance, self._model).max_num_batched_tokens
        total = done = 0
        while done < self._context:
            chunk = min(budget, self._context - done)
            total += stage.step_ns(Shape(((chunk, done),), 0, 0, 0, 0))
            done += chunk
        return total

    def _contexts(self) -> list[int]:
        longest, found = self._model.max_position_embeddings, [_SHORTEST]
        while found[-1] * 2 <= longest:
            found.append(found[-1] * 2)
        return found

    def _skipped(self, kv_format: str) -> tuple[int, ...]:
        words = self._options.kv_cache_dtype_skip_layers
        return skipped_layers(self._model.layers, words, kv_format)

    def _left_out_beside(self, kv_format: str) -> float:
        """Share of the layers that the format leaves in 16 bit and fp8 does not."""
        return (len(self._skipped(kv_format)) - len(self._skipped("fp8"))) / len(self._model.layers.layers)

    def _narrow_share(self) -> float:
        """Of the bytes that a decode of this context reads of an fp8 cache, those that are fp8."""
        wide = set(self._skipped("fp8"))
        if not wide:
            return 1.0
        read = [0.0, 0.0]
        for index, layer in enumerate(self._model.layers.layers):
            for a in attentions_of(layer):
                reach = getattr(a, "reach", None) or self._context
                name = self._base if index in wide else "fp8"
                read[index in wide] += format_bytes(name, a) * min(reach, self._context)
        return read[0] / sum(read)

    def _ratio(self, kv_format: str) -> float:
        """Bytes of the format to those of fp8, over all layers that keep keys and values in it."""
        sizes = [0.0, 0.0]
        wide = set(self._skipped(kv_format))
        for index, layer in enumerate(self._model.layers.layers):
            if index in wide:
                continue
            for i, name in enumerate((kv_format, "fp8")):
                sizes[i] += sum(format_bytes(name, a) for a in attentions_of(layer))
        return sizes[0] / sizes[1] if sizes[1] else 1.0

    def _stage(self, kv_format: str) -> StageCost | None:
        """The cost of the whole model with its cache in 16 bit or fp8; None: there are no kernel times."""
        if kv_format not in self._stages:
            options = self._options.model_copy(update={"kv_cache_dtype": kv_format})
            resolved = resolve(options, self._instance, self._model)
            try:
                self._stages[kv_format] = self._costs.stage(self._instance, self._model, resolved)
            except MissingFileError as error:
                self._stages[kv_format] = None
                self._missing[kv_format] = str(error).splitlines()[0]
        return self._stages[kv_format]
