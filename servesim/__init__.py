"""servesim: a simulator of LLM serving.

``servesim.simulate(cluster, workload, kv_cache_dtype="fp8")`` runs a workload and returns a
:class:`~servesim.results.result.Result`. Everything here is imported on first use, so that
``import servesim`` costs nothing.
"""

from __future__ import annotations

from servesim._version import __version__

TYPE_CHECKING = False  # typing's own takes longer to load than everything else here
if TYPE_CHECKING:
    from typing import Any

    from servesim.api import simulate
    from servesim.errors import InputError, RunError, ServingError
    from servesim.explore.compare import Comparison, compare
    from servesim.explore.ensemble import Ensemble, ensemble
    from servesim.results.result import Result
    from servesim.specs.cluster import load_cluster
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.formats import load_workload

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
    "Comparison": "servesim.explore.compare",
    "Ensemble": "servesim.explore.ensemble",
    "InputError": "servesim.errors",
    "Result": "servesim.results.result",
    "RunError": "servesim.errors",
    "RuntimeOptions": "servesim.specs.options",
    "ServingError": "servesim.errors",
    "compare": "servesim.explore.compare",
    "ensemble": "servesim.explore.ensemble",
    "load_cluster": "servesim.specs.cluster",
    "load_workload": "servesim.workload.formats",
    "simulate": "servesim.api",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'servesim' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
