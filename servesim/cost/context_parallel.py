"""What decode context parallelism makes of attention: N ranks keep every N-th token of the same KV each.

No table holds such a step. It is made of tables that there are (vLLM 0.33: ``_forward_with_dcp`` of
``flash_attn.py``, ``forward_impl`` of ``mla_attention.py``):

- **The kernel over the shared KV.** A rank gathers the queries of all N and reads its N-th of the KV with N
  times its heads. That is the shape of a rank at tp / N with KV an N-th as long: its table is read there.
- **What every rank does for its own heads**: the table of its own degree. With KV heads, attention of new
  tokens among themselves, in a kernel of its own; latent attention has its matrix products in the table.
- **Exchanges** (:class:`ContextExchange`): queries, log-sum-exps and outputs.

What corrects and merges the partial outputs takes no time here: no table has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from servesim.cost.batch_shape import scheduled_tokens
from servesim.cost.expert_stage import ONE_WAY
from servesim.cost.skew import SkewTable
from servesim.cost.step_terms import ACTIVATION_BYTES
from servesim.cost.tables import Surface, distinct
from servesim.cost.terms import LayerCost, Role
from servesim.slotted import dataclass
from servesim.specs.layers import LatentAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.bundle import RankTables
    from servesim.cost.tables import Curve
    from servesim.network.topology import Dimension
    from servesim.specs.layers import Attention

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

LSE_BYTES = 4
"""Of the log-sum-exp of one token and head, in 32 bit."""
LSE_ELEMENTS = LSE_BYTES // ACTIVATION_BYTES
"""As many elements of the outputs it takes to send it among them (``_dcp_a2a_lse_pack_dim``)."""
WORKSPACE_TOKENS = 64 * 1024
"""Most tokens of history whose latent vectors are gathered at once
(``determine_chunked_prefill_workspace_size``)."""


def shared_tables(own: RankTables, gathered: RankTables, ranks: int, *, apart: bool) -> RankTables:
    """The tables of a rank whose attention over heads shares its KV among ``ranks`` ranks.

    With A the table of its own degree, G that of ``gathered`` (tp / ranks), N ranks, n decodes of KV k,
    chunks of c tokens with history h:

        G(0, n, k / N) + [G(c, n, h / N, k / N) - G(c, n, 0, k / N)] + A(c, n, 0, 1)

    the shared KV of decodes; what a chunk's history adds to it; new tokens among themselves, for which each
    rank has its own heads. ``apart``: whether decodes have a kernel for their new token beside the one over
    the cache, as in FlashAttention; else they are left out of the last term.
    """
    chunks, ns = _union(own, gathered, 0), _union(own, gathered, 1)
    _, _, histories, lengths = gathered.attention.axes
    shared = gathered.attention.on((chunks, ns, histories, lengths))
    new = own.attention.on((chunks, ns, [0], own.attention.axes[3][:1]))
    decodes = np.where(_some(ns), shared[:1, :, :1], 0.0)
    with_history = np.maximum(shared - shared[:, :, :1], 0.0)
    alone = own.attention.on((chunks, [0], [0], [0]))
    of_chunks = np.where((chunks > 0)[:, None, None, None], new if apart else alone, 0.0)
    of_decodes = np.where((chunks == 0)[:, None, None, None] & _some(ns), new if apart else 0.0, 0.0)
    tensor = decodes + with_history + of_chunks + of_decodes
    axes = (chunks, ns, histories * ranks, lengths * ranks)
    return _made(own, gathered, Surface(axes, tensor), _stretched(gathered.skew, ranks, ranks))


def shared_latent_tables(own: RankTables, gathered: RankTables, ranks: int) -> RankTables:
    """The same of latent attention, whose prompts gather the latent vectors of their history and attend to
    them with the rank's own heads, as without sharing:

        A(0, n, 0) + [G(0, n, k / N) - G(0, n, 0)] + [A(c, n, h, k) - A(0, n, k)]

    the products of decodes with the rank's own heads, and attention over the shortest KV; what more shared KV
    adds with the heads of all; chunks as they are.
    """
    chunks, ns = _union(own, gathered, 0), _union(own, gathered, 1)
    histories, lengths = own.attention.axes[2], gathered.attention.axes[3] * ranks
    lengths = distinct(np.concatenate([own.attention.axes[3], lengths]))
    of_own = own.attention.on((chunks, ns, histories, lengths))
    of_all = gathered.attention.on(([0], ns, [0], lengths / ranks))
    some = _some(ns)
    decodes = np.where(some, of_own[:1, :, :1], 0.0)
    beside = np.where((chunks > 0)[:, None, None, None], of_own - decodes, 0.0)
    more = np.maximum(of_all - of_all[..., :1], 0.0)
    shared = np.where(some, decodes[..., :1] + more, 0.0)
    surface = Surface((chunks, ns, histories, lengths), shared + beside)
    return _made(own, gathered, surface, _stretched(gathered.skew, ranks, 1))


def _union(own: RankTables, gathered: RankTables, axis: int) -> Ints:
    return distinct(np.concatenate([own.attention.axes[axis], gathered.attention.axes[axis]]))


def _some(ns: Ints) -> NDArray[np.bool_]:
    """Whether there are decodes, on the axes of a table."""
    there: NDArray[np.bool_] = (ns > 0)[None, :, None, None]
    return there


def _made(own: RankTables, gathered: RankTables, surface: Surface, skew: SkewTable | None) -> RankTables:
    source = f"{gathered.folder.name} and {own.folder.name} (attention.csv), derived"
    return replace(own, attention=surface, skew=skew, attentions={}, attention_source=source)


def _stretched(skew: SkewTable | None, lengths: int, histories: int) -> SkewTable | None:
    """The fit of unequal lengths where lengths and histories are so many times as long."""
    if skew is None:
        return None
    chunks, ns, rates, old_lengths, old_histories = skew.bounds
    return SkewTable(
        (chunks, ns, rates, [each * lengths for each in old_lengths], [h * histories for h in old_histories]),
        skew.alpha,
    )


class Payload(NamedTuple):
    """What one collective of a step moves."""

    name: str
    collective: str
    payload_bytes: float
    """The full buffer, as in :mod:`servesim.network.topology`."""
    times: int = 1
    """So many of them, alike."""


@dataclass(slots=True, frozen=True)
class Passes:
    """What collectives take that move their payload once: all-gather, reduce-scatter and all-to-all.

    Measured, where the bundle has that collective among so many ranks. Else from its all-reduce among them,
    which is two passes: as long as its shortest, and half of what a larger payload adds to that. Else over
    the links, as the exchange of experts (:data:`servesim.cost.expert_stage.ONE_WAY`).
    """

    ranks: int
    link: Dimension
    tables: RankTables
    """Of the degree that has the ranks."""

    def us(self, payload: Payload) -> float:
        """µs of one of them."""
        curve, of_all_reduce = self._measured(payload)
        if curve is None:
            return self.link.pass_ns(self.ranks, payload.payload_bytes / ONE_WAY) / 1000.0
        us = float(curve.at(payload.payload_bytes)[0])
        if not of_all_reduce:
            return us
        shortest = float(curve.values[0])
        return shortest + max(us - shortest, 0.0) / 2

    def origin(self, payload: Payload) -> str:
        """Where the number comes from, for people."""
        name = payload.collective.replace("_", "-")
        what = f"{name} of {payload.payload_bytes:.0f} bytes over {self.ranks} ranks"
        curve, of_all_reduce = self._measured(payload)
        if curve is None:
            return f"formula: {self.link.wiring.replace('_', ' ')} {what} ({self.link.describe()})"
        place = f"{self.tables.folder.name}/comm.csv"
        return f"derived: {what}, from all_reduce in {place}" if of_all_reduce else f"{what} in {place}"

    def _measured(self, payload: Payload) -> tuple[Curve | None, bool]:
        """The curve, and whether it is that of the all-reduce."""
        curve = self.tables.collective(payload.collective, self.ranks)
        if curve is not None:
            return curve, False
        return self.tables.collective("all_reduce", self.ranks), True


class ContextExchange:
    """What ranks that share KV send each other in ``blocks`` transformer blocks.

    With H heads of a group of N ranks (H / N each), for T tokens (vLLM's ``cp_lse_ag_out_rs`` and
    ``dcp_a2a_lse_reduce``):

    - an all-gather of queries, ``T H D`` elements;
    - ``ag_rs``: an all-gather of log-sum-exps, ``N T H`` in 32 bit, and a reduce-scatter of outputs,
      ``T H V``; ``a2a``: one all-to-all of both, ``T H (V + 2)``.

    Over heads, D and V are their width, and T all tokens of a step in which any request has KV. Latent
    attention exchanges for decodes alone, with D the width of a vector and V that of its latent part; prompts
    gather the vectors of their history, in parts of at most ``workspace`` tokens.
    """

    def __init__(
        self,
        attention: Attention | LatentAttention,
        tp: int,
        passes: Passes,
        blocks: int,
        backend: str,
        workspace: int = WORKSPACE_TOKENS,
    ) -> None:
        """
        Args:
            attention: of every block.
            tp: ranks that share its heads.
            passes: among the ranks that share its KV.
            blocks: of the stage.
            backend: ``ag_rs`` or ``a2a``.
            workspace: tokens of history that are gathered at once.
        """
        self.role = Role.BLOCKS
        self._heads = attention.heads // tp * passes.ranks
        self._latent = isinstance(attention, LatentAttention)
        if isinstance(attention, LatentAttention):
            self._query, self._value = attention.kv_rank + attention.rope_dim, attention.kv_rank
        else:
            self._query, self._value = attention.head_dim, attention.value_dim
        self._passes = passes
        self._blocks = blocks
        self._backend = backend
        self._workspace = workspace
        self._ns: dict[int, float] = {}

    @property
    def launches(self) -> int:
        """Collectives of a step of decodes."""
        return self._blocks * len(self._of_tokens(1))

    def ns(self, batch: BatchShape, tokens: int) -> float:
        """See :class:`servesim.cost.terms.Term`."""
        rows = self._rows(batch, tokens)
        ns = 0.0
        if rows:
            known = self._ns.get(rows)
            if known is None:
                known = self._ns[rows] = self._total_ns(self._of_tokens(rows))
            ns = known
        return ns + self._total_ns(self._of_histories(batch))

    def explain(self, batch: BatchShape, tokens: int) -> list[LayerCost]:
        """See :class:`servesim.cost.terms.Term`."""
        rows = self._rows(batch, tokens)
        payloads = [*(self._of_tokens(rows) if rows else ()), *self._of_histories(batch)]
        return [
            LayerCost(
                f"shared KV: {each.name}",
                self._blocks * each.times,
                self._passes.us(each),
                self._passes.origin(each),
            )
            for each in payloads
        ]

    def _rows(self, batch: BatchShape, tokens: int) -> int:
        """Tokens whose queries are gathered; steps of decodes alone are padded to a CUDA graph."""
        if not batch.chunks:
            return tokens if batch.num_decodes else 0
        if self._latent:
            return batch.num_decodes
        if batch.num_decodes or any(history for _, history in batch.chunks):
            return scheduled_tokens(batch)
        return 0

    def _of_tokens(self, rows: int) -> list[Payload]:
        cells = rows * self._heads
        queries = Payload("queries", "all_gather", cells * self._query * ACTIVATION_BYTES)
        if self._backend == "a2a":
            sent = cells * (self._value + LSE_ELEMENTS) * ACTIVATION_BYTES
            return [queries, Payload("outputs and log-sum-exps", "all_to_all", sent)]
        return [
            queries,
            Payload("log-sum-exps", "all_gather", self._passes.ranks * cells * LSE_BYTES),
            Payload("outputs", "reduce_scatter", cells * self._value * ACTIVATION_BYTES),
        ]

    def _of_histories(self, batch: BatchShape) -> list[Payload]:
        """Latent vectors of the histories of a step's chunks."""
        if not self._latent:
            return []
        history = sum(history for _, history in batch.chunks)
        if not history:
            return []
        parts = -(-history // self._workspace)
        return [Payload("histories", "all_gather", history / parts * self._query * ACTIVATION_BYTES, parts)]

    def _total_ns(self, payloads: Sequence[Payload]) -> float:
        return 1000.0 * self._blocks * sum(self._passes.us(each) * each.times for each in payloads)
