"""Documented options whose machinery is not built yet: refused at start, one line each, never ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import NotSupportedError
from serving.specs.cluster_checks import located
from serving.specs.flags import flag_name
from serving.specs.validation import joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serving.specs.cluster import ClusterSpec, InstanceSpec
    from serving.specs.options import RuntimeOptions

# Option -> the one value that works.
_FIXED: dict[str, object] = {}
_FIXED_PER_INSTANCE = {
    "enable_local_offloading": False,
    "enable_attn_offloading": False,
    "enable_sub_batch_interleaving": False,
}
# Field of an instance -> the one value that works.
_FIXED_INSTANCE_FIELDS = {"placement": None}


def refuse_unsupported(cluster: ClusterSpec, options: RuntimeOptions) -> None:
    """Stop a run that asks for something not built yet.

    Raises:
        NotSupportedError: "... is not supported yet", everything asked for in one message.
    """
    found = [*_options(options), *(f"{cluster.source}: {problem}" for problem in _cluster(cluster))]
    if found:
        raise NotSupportedError(joined("", found))


def _options(options: RuntimeOptions) -> Iterator[str]:
    for name, works in {**_FIXED, **_FIXED_PER_INSTANCE}.items():
        value = getattr(options, name)
        if value != works:
            yield f"{_as_given(name, value)} is not supported yet; leave it out"


def _as_given(name: str, value: object) -> str:
    if isinstance(value, bool):
        return flag_name(name) if value else "--no-" + flag_name(name).removeprefix("--")
    return f"{flag_name(name)} {value}"


def _cluster(cluster: ClusterSpec) -> Iterator[str]:
    for index, node in enumerate(cluster.nodes):
        if node.cpu_mem.pim_config is not None:
            yield f"nodes[{index}].cpu_mem.pim_config: PIM is not supported yet; leave it out or null"
    for where, instance in located(cluster):
        yield from _instance(where, instance)


def _instance(where: str, instance: InstanceSpec) -> Iterator[str]:
    for name, works in _FIXED_INSTANCE_FIELDS.items():
        value = getattr(instance, name)
        if value != works:
            text = "this section" if name == "placement" else repr(value)
            plain = "null" if works is None else works
            yield f"{where}.{name}: {text} is not supported yet; leave it out or {plain}"
    for name, fixed in _FIXED_PER_INSTANCE.items():
        value = getattr(instance, name)
        if value is not None and value != fixed:
            said, only = str(value).lower(), str(fixed).lower()
            yield f"{where}.{name}: {said} is not supported yet; leave it out or {only}"
