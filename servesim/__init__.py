"""servesim: a simulator of LLM serving.

``servesim.simulate(cluster, workload, kv_cache_dtype="fp8")`` runs a workload and returns a
:class:`~servesim.results.result.Result`. Everything here is imported on first use, so that
``import servesim`` costs nothing.
"""

from __future__ import annotations

import os

from servesim._version import __version__

TYPE_CHECKING = False  # typing's own takes longer to load than everything else here
if TYPE_CHECKING:
    from typing import Any

    from servesim.api import simulate
    from servesim.engine.simulation import Observer
    from servesim.errors import InputError, MissingFileError, RunError, ServingError
    from servesim.explore.compare import Comparison, compare
    from servesim.explore.ensemble import Ensemble, ensemble
    from servesim.explore.kv_dial import KvDial, kv_dial
    from servesim.explore.plan import plan
    from servesim.explore.plan_result import Plan
    from servesim.explore.rate_search import LoadLimit, slo
    from servesim.explore.slo import Slo
    from servesim.explore.sweep import sweep
    from servesim.explore.sweep_table import Sweep
    from servesim.results.result import Result
    from servesim.results.summary import Summary
    from servesim.specs.cluster import ClusterSpec, load_cluster
    from servesim.specs.model import ModelSpec, load_model
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.formats import load_workload
    from servesim.workload.request import Request, Workload

__all__ = [
    "ClusterSpec",
    "Comparison",
    "Ensemble",
    "InputError",
    "KvDial",
    "LoadLimit",
    "MissingFileError",
    "ModelSpec",
    "Observer",
    "Plan",
    "Request",
    "Result",
    "RunError",
    "RuntimeOptions",
    "ServingError",
    "Slo",
    "Summary",
    "Sweep",
    "Workload",
    "__version__",
    "compare",
    "ensemble",
    "kv_dial",
    "load_cluster",
    "load_model",
    "load_workload",
    "plan",
    "simulate",
    "slo",
    "sweep",
]

_HOMES = {
    "ClusterSpec": "servesim.specs.cluster",
    "Comparison": "servesim.explore.compare",
    "Ensemble": "servesim.explore.ensemble",
    "InputError": "servesim.errors",
    "LoadLimit": "servesim.explore.rate_search",
    "KvDial": "servesim.explore.kv_dial",
    "MissingFileError": "servesim.errors",
    "ModelSpec": "servesim.specs.model",
    "Observer": "servesim.engine.simulation",
    "Plan": "servesim.explore.plan_result",
    "Request": "servesim.workload.request",
    "Result": "servesim.results.result",
    "RunError": "servesim.errors",
    "RuntimeOptions": "servesim.specs.options",
    "ServingError": "servesim.errors",
    "Slo": "servesim.explore.slo",
    "Sweep": "servesim.explore.sweep_table",
    "Summary": "servesim.results.summary",
    "Workload": "servesim.workload.request",
    "compare": "servesim.explore.compare",
    "ensemble": "servesim.explore.ensemble",
    "kv_dial": "servesim.explore.kv_dial",
    "load_cluster": "servesim.specs.cluster",
    "load_model": "servesim.specs.model",
    "load_workload": "servesim.workload.formats",
    "plan": "servesim.explore.plan",
    "simulate": "servesim.api",
    "slo": "servesim.explore.rate_search",
    "sweep": "servesim.explore.sweep",
}


def _refuse_stale(mark: str) -> None:
    """Refuse compiled modules that are older than their sources beside them, which they would hide.

    Raises:
        ImportError: one is; ``mark`` says what the sources were when they were compiled.
    """
    import json
    from hashlib import blake2b
    from pathlib import Path

    root = Path(__file__).parent.parent
    for name, compiled in json.loads(Path(mark).read_bytes()).items():
        source = root / name
        if source.is_file() and blake2b(source.read_bytes(), digest_size=16).hexdigest() != compiled:
            raise ImportError(
                f"{source}: was changed after it was compiled, and the compiled module would hide that; "
                "compile again (python hatch_build.py), or remove the compiled files (make clean-compiled)"
            )


_MARK = __file__.removesuffix("__init__.py") + "_compiled.json"
if os.path.exists(_MARK):  # noqa: PTH110 - loading pathlib would take longer than all else here
    _refuse_stale(_MARK)


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
