"""What a row of a sweep is known by: everything that its figures depend on.

A row in the journal stands for a run that need not be made again. So its key covers the options and the
content of all that the run reads: cluster config, workload, models, hardware files, PIM devices, bundles,
modules of custom policies. A bundle that is made on demand is not there yet when its first row is looked for.
It follows from the others and from the public measurements that are installed, whose version counts for it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim._version import __version__
from servesim.api import measurements_version
from servesim.cost.identity import ON_DEMAND
from servesim.errors import ServingError
from servesim.explore.space import cluster_with, file_digest, split
from servesim.specs.block_layers import architecture_of
from servesim.specs.cluster_changes import with_options
from servesim.specs.hardware import load_hardware
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.paths import find, find_all
from servesim.specs.pim import load_pim
from servesim.specs.reading import read_yaml_object
from servesim.specs.shape import bundle_label
from servesim.specs.speculative import speculative_spec
from servesim.specs.validation import validated
from servesim.workload.files import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from servesim.specs.cluster import ClusterSpec

_FILES = ("speculative_acceptance", "vllm_serve", "tokenizer")
"""Options that may name a file or a folder."""
_POLICIES = ("request_routing_policy", "expert_routing_policy")


def row_key(
    options: Mapping[str, Any],
    cluster: str | dict[str, Any] | None,
    slo: str | None,
    configuration: Mapping[str, Any],
    known: dict[str, Any],
) -> str:
    """A digest of all that the row of ``configuration`` depends on.

    Args:
        options: of all rows.
        cluster: path or content of a cluster config; None: the options name it.
        slo: bounds that rows are held against.
        configuration: what this row sets.
        known: digests of what was read for other rows.
    """
    changes, keys = split(configuration)
    chosen = {**options, **changes}
    defaults = RuntimeOptions.model_fields
    workload = str(chosen.get("dataset", defaults["dataset"].default))
    source = cluster or str(chosen.get("cluster_config", defaults["cluster_config"].default))
    content: Any = source
    if isinstance(source, str):
        content = _known(known, f"cluster {source}", lambda: file_digest(str(find(source, "cluster config"))))
    parts = [
        *(__version__, chosen, keys, content, slo),
        _known(known, f"workload {workload}", lambda: file_digest(str(resolve(workload)))),
        *(_named(known, str(chosen[name])) for name in _FILES if chosen.get(name)),
        *(_module(known, str(chosen[name])) for name in _POLICIES if chosen.get(name)),
        _read_by(chosen, source, keys, known),
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known(known: dict[str, Any], name: str, find_out: Callable[[], Any]) -> Any:
    """What is found out once; what cannot be read is told by the run."""
    if name not in known:
        try:
            known[name] = find_out()
        except (OSError, ServingError):
            known[name] = "missing"
    return known[name]


def _named(known: dict[str, Any], text: str) -> Any:
    """Content of the files that an option names; nothing where it is a word."""

    def files() -> list[str]:
        path = Path(text).expanduser()
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
        return [file_digest(str(each)) for each in inside]

    return _known(known, f"file {text}", files)


def _module(known: dict[str, Any], policy: str) -> Any:
    """Content of the module of a custom policy."""

    def module() -> str:
        name = policy.removeprefix("CUSTOM:").partition(":")[0]
        beside = Path(*name.split(".")).with_suffix(".py")
        if beside.is_file():
            return file_digest(str(beside))
        with suppress(ImportError, ValueError):
            spec = find_spec(name)
            if spec is not None and spec.origin is not None:
                return file_digest(spec.origin)
        return "missing"

    return _known(known, f"module {policy}", module) if ":" in policy else ""


def _read_by(
    options: Mapping[str, Any],
    source: str | dict[str, Any],
    keys: Mapping[str, Any],
    known: dict[str, Any],
) -> list[Any]:
    """Content of what the instances of a cluster are described by."""
    try:
        cluster: ClusterSpec = cluster_with(source, keys)
        chosen = validated(RuntimeOptions, dict(options), "options")
        cluster = with_options(cluster, chosen)
        speculative = speculative_spec(chosen.speculative_config, chosen.speculative_acceptance)
    except ServingError:
        return []  # so does the run, and failed rows are tried again
    pairs = sorted({(spec.hardware, spec.model_name) for _, spec in cluster.instances})
    devices = sorted({node.cpu_mem.pim_config for node in cluster.nodes if node.cpu_mem.pim_config})
    hardware = sorted({name for name, _ in pairs})
    if speculative is not None and speculative.method == "draft_model" and speculative.model is not None:
        pairs = sorted({*pairs, *((name, speculative.model) for name in hardware)})
    models = sorted({name for _, name in pairs})
    return [
        _known(known, "measurements", measurements_version),
        *(_known(known, f"hardware {name}", partial(_described, load_hardware, name)) for name in hardware),
        *(_known(known, f"pim {name}", partial(_described, load_pim, name)) for name in devices),
        *(_known(known, f"model {name}", partial(_model, name)) for name in models),
        *(_known(known, f"bundles {pair}", partial(_bundles, *pair)) for pair in pairs),
    ]


def _described(load: Callable[[str], Any], name: str) -> str:
    return repr(load(name))


def _model(name: str) -> list[str]:
    model = load_model(name)
    return [repr(model), _flat(model.layers), _flat(architecture_of(model))]


def _flat(value: Any) -> str:
    """Every field of nested descriptions; their own ``repr`` may leave some out."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{each.name}={_flat(getattr(value, each.name))}" for each in fields(value))
        return f"{type(value).__name__}({inner})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flat, value))}]"
    return repr(value)


def _bundles(hardware: str, model: str) -> list[str]:
    """Content of the bundles there are, of any format, but for those made on demand."""
    found = []
    label = escape(bundle_label(load_model(model)))
    for meta in find_all(f"profiler/perf/{escape(hardware)}/{label}/*/meta.yaml"):
        if not read_yaml_object(meta).get(ON_DEMAND):
            found += [file_digest(str(each)) for each in sorted(meta.parent.rglob("*.*"))]
    return found
