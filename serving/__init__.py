"""servesim: a simulator of LLM serving.

``serving.simulate(cluster, workload, kv_cache_dtype="fp8")`` runs a workload and returns a
:class:`~serving.results.result.Result`. Everything here is imported on first use, so that ``import serving``
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from serving._version import __version__

if TYPE_CHECKING:
    from serving.api import simulate
    from serving.errors import InputError, RunError, ServingError
    from serving.explore.compare import Comparison, compare
    from serving.explore.ensemble import Ensemble, ensemble
    from serving.results.result import Result
    from serving.specs.cluster import load_cluster
    from serving.specs.options import RuntimeOptions
    from serving.workload.formats import load_workload

__all__ = [
    "Comparison",
    "Ensemble",
    "InputError",
    "Result",
    "RunError",
    "RuntimeOptions",
    "ServingError",
    "__version__",
    "compare",
    "ensemble",
    "load_cluster",
    "load_workload",
    "simulate",
]

_HOMES = {
    "Comparison": "serving.explore.compare",
    "Ensemble": "serving.explore.ensemble",
    "InputError": "serving.errors",
    "Result": "serving.results.result",
    "RunError": "serving.errors",
    "RuntimeOptions": "serving.specs.options",
    "ServingError": "serving.errors",
    "compare": "serving.explore.compare",
    "ensemble": "serving.explore.ensemble",
    "load_cluster": "serving.specs.cluster",
    "load_workload": "serving.workload.formats",
    "simulate": "serving.api",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
