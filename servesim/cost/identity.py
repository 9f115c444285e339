"""Whose kernel times a bundle holds, and whether they are those that a run asks for.

A bundle is found by names, but names are labels: ``made_for`` of its ``meta.yaml`` states the model's shape
and the figures of the hardware file that its tables depend on, and a run compares them field by field.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.shape import bundle_label, digest, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.model import ModelSpec

COMPUTED = ("silicon", "roofline")
"""Sources that make a bundle anew on any machine; the others measured it."""
ON_DEMAND = "made_on_demand"
"""Key of meta.yaml: nobody chose anything about this bundle, so that it may be replaced."""
FORWARD = "forward"
"""Source of bundles that measured whole steps have corrected; ``corrects`` names what they were before."""
_PARTS = ("model", "hardware", "derivation")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The bundle that a run asks for: the names it is filed under, and what it has to have been made for."""

    hardware: str
    model: str
    """The label of its folder."""
    variant: str
    shape: ModelSpec | None = None
    """None: only the name is known, so that nothing is compared."""
    facts: HardwareSpec | None = None
    """None: likewise."""

    @property
    def named(self) -> str:
        """The model as a command line names it: by the path that the user gave, else by its name."""
        if self.shape is None:
            return self.model
        return shlex.quote(self.shape.path) if self.shape.path else self.shape.name

    @property
    def labels(self) -> list[str]:
        """Folders to look in: the model's own, then the bare name, as earlier versions filed a path."""
        bare = self.shape.name if self.shape is not None else self.model
        return list(dict.fromkeys((self.model, bare)))


def wanted_for(model: ModelSpec, hardware: HardwareSpec, variant: str) -> Wanted:
    """The bundle of a model's kernel times on a hardware."""
    return Wanted(hardware.name, bundle_label(model), variant, model, hardware)


def source_of(meta: Mapping[str, Any]) -> str:
    """Where a bundle's times come from; ``vllm`` where meta.yaml names none, as early bundles do."""
    return str(meta.get("source") or "vllm")


def is_computed(meta: Mapping[str, Any]) -> bool:
    """Whether the bundle's source makes it anew on any machine."""
    return source_of(meta) in COMPUTED


def made_for(meta: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]] | None:
    """``made_for`` of the ``meta.yaml`` at ``path``; None: it does not say.

    Raises:
        InputError: it is malformed, or was changed without its fingerprint.
    """
    stated = meta.get("made_for")
    if stated is None:
        return None
    if not isinstance(stated, dict) or not all(isinstance(stated.get(part), dict) for part in _PARTS):
        raise InputError(f"{path}: made_for: must be a mapping with {', '.join(_PARTS)} and a fingerprint")
    about = {part: stated[part] for part in _PARTS}
    if stated.get("fingerprint") != digest(about):
        raise InputError(
            f"{path}: made_for: the fingerprint {stated.get('fingerprint')} belongs to other values than the "
            "ones beside it; restore the file, or make the bundle again"
        )
    return about


def differences(meta: Mapping[str, Any], path: Path, wanted: Wanted) -> list[str]:
    """What the bundle was made for and the run has otherwise, one field each; empty: nothing.

    Raises:
        InputError: ``made_for`` is malformed.
    """
    about = made_for(meta, path)
    if about is None:
        return []
    found: list[str] = []
    if wanted.shape is not None:
        now = shape_of(wanted.shape)
        found += _differing(about["model"], now, {*about["model"], *now})
    if wanted.facts is not None and wanted.facts.model_fields_set != {"name"}:  # else nobody states any
        now = wanted.facts.model_dump(mode="json")
        now["roofline"] = {name: value for name, value in now["roofline"].items() if value is not None}
        found += _differing(about["hardware"], now, set(about["hardware"]))
    return found


def _differing(then: dict[str, Any], now: dict[str, Any], names: set[str], prefix: str = "") -> Iterator[str]:
    for name in sorted(names):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            # `link` lists what counts of it; what a file states of its rates counts altogether
            inner = set(before) if name == "link" else {*before, *after}
            yield from _differing(before, after, inner, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} {_shown(before)}, here {_shown(after)}"


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)
