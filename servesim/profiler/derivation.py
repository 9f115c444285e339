"""Whether a computed bundle is what this servesim would compute: the revision of its formulas, its data.

Every computing source counts its formulas' revisions where they stand, as ``DERIVATION`` of its package, and
writes the number into ``meta.yaml``. Measured bundles have none: what was measured does not grow old so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.profiler import roofline, silicon
from servesim.profiler.roofline.efficiency import fits
from servesim.specs.shape import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

REVISIONS = {"silicon": silicon.DERIVATION, "roofline": roofline.DERIVATION}
"""Source -> current revision of its formulas."""
FIRST = 1
"""What a bundle without the key was made with: it was not written then."""


def outdated(meta: Mapping[str, Any]) -> str | None:
    """Why a bundle with this ``meta.yaml`` is old, in a few words; None: it is not, or was measured.

    A bundle of a later revision, which a newer servesim made, is as good as one of this revision. Another
    version of the measurements shows only where the package is installed.
    """
    source = meta.get("source")
    current = REVISIONS.get(str(source))
    if current is None:
        return None
    made_with = meta.get("derivation", FIRST)
    if not isinstance(made_with, int) or made_with < current:
        return f"its formulas are of revision {made_with}, now {current}"
    if source == "silicon" and (installed := _installed_version()) not in (None, meta.get("data_version")):
        return f"it is made from measurements {meta.get('data_version')}, now {installed}"
    about = meta.get("made_for")
    derivation = about.get("derivation") if isinstance(about, dict) else None
    if not isinstance(derivation, dict):
        return "it does not state what it was made for"
    if source == "roofline" and derivation.get("constants") != digest(fits()):
        return "its constants were fitted anew"
    return None


def _installed_version() -> str | None:
    from servesim.errors import InputError
    from servesim.profiler.silicon.tables import package_version

    try:
        return package_version()
    except InputError:
        return None
