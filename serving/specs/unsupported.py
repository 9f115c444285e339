"""Documented options whose machinery is not built yet: refused at start, one line each, never ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import NotSupportedError
from serving.specs.cluster_checks import located
from serving.specs.validation import joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.specs.cluster import ClusterSpec
    from serving.specs.options import RuntimeOptions


def refuse_unsupported(cluster: ClusterSpec, _options: RuntimeOptions) -> None:
    """Stop a run that asks for something not built yet.

    Raises:
        NotSupportedError: "... is not supported yet", everything asked for in one message.
    """
    found = [f"{cluster.source}: {problem}" for problem in _evictions(cluster)]
    if found:
        raise NotSupportedError(joined("", found))


def _evictions(cluster: ClusterSpec) -> Iterator[str]:
    for where, instance in located(cluster):
        for rule, places in instance.placement.rules if instance.placement else ():
            if places.kv_evict_loc not in (None, "npu"):
                yield (
                    f"{where}.placement.{rule}.kv_evict_loc: '{places.kv_evict_loc}' is not supported yet; "
                    "leave it out or npu: what the NPU evicts is computed again, or kept by --prefix-storage"
                )
