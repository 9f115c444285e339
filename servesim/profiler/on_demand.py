"""Bundles made while a run waits for them, kept in the user's data folder, and made again once they are old.

Every computing source counts its formulas' revisions where they stand, as ``DERIVATION`` of its package, and
writes the number into ``meta.yaml``. Measured bundles have none: what was measured does not grow old so.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from servesim.cost.finding import (
    MADE_LOG,
    READ_LOG,
    degrees_in,
    folder_root,
    makes_bundles,
    missing_bundles_from,
    profile_command,
    variant_dtypes,
    variant_path,
)
from servesim.cost.identity import ON_DEMAND, differences, is_computed
from servesim.errors import InputError, ServingError
from servesim.profiler import roofline, silicon
from servesim.specs import paths
from servesim.specs.block_layers import architecture_of
from servesim.specs.hardware import load_hardware
from servesim.specs.reading import read_yaml_object
from servesim.specs.shape import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from servesim.cost.finding import Maker, Refresher
    from servesim.cost.identity import Wanted

SWITCH = "SERVESIM_AUTO_PROFILE"
"""Environment variable; 0 turns making on demand off, as --no-auto-profile does."""
LIMITS: dict[str, Any] = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024, "max_kv": 131072}
"""What the shipped bundles cover too, so that a degree made on demand is the one that would have shipped."""
REFUSED = "silicon_refused"
"""Key of meta.yaml: the better source was tried, with which version of its data, and what it said."""
REVISIONS = {"silicon": silicon.DERIVATION, "roofline": roofline.DERIVATION}
"""Source -> current revision of its formulas."""
FIRST = 1
"""What a bundle without the key was made with: it was not written then."""
_METADATA = re.compile(r"aiconfigurator_core-(.+)\.dist-info")
MADE_FROM = {
    "silicon": "from public kernel measurements",
    "roofline": "from peak rates (roofline)",
}


def maker(tell: Callable[[str], None], *, wanted: bool = True) -> Callable[[Wanted, int], Path | None] | None:
    """What makes missing bundles, for :func:`servesim.cost.finding.missing_bundles_from`.

    ``tell`` gets one line per bundle made. None when it is switched off.
    """
    if not wanted or os.environ.get(SWITCH) == "0":
        return None
    return lambda asked, tp: _make(asked, tp, tell)


def _make(asked: Wanted, tp: int, tell: Callable[[str], None]) -> Path | None:
    """The folder of a bundle with this degree in the user's data folder; None: nothing to make it from.

    Raises:
        ServingError: the source does not cover it, or the folder cannot be written or holds a bundle that the
            user made for something else.
    """
    from servesim.profiler.sources import source_for

    chosen = source_for(asked.facts or load_hardware(asked.hardware), asked.variant)
    if chosen is None:
        return None
    source, why = chosen
    folder = paths.user_data_dir() / variant_path(asked.hardware, asked.model, asked.variant)
    meta = _meta(folder)
    differing = differences(meta, folder / "meta.yaml", asked)
    same = meta.get("source") == source or _silicon_refused(meta)
    kept = set(degrees_in(folder)) if same else set()
    if tp in kept and not differing and outdated(meta) is None:
        return folder
    if meta and not meta.get(ON_DEMAND) and (differing or not same):
        raise InputError(
            f"{folder} holds a bundle that was not made on demand; remove it, or give the model or the "
            "hardware another name"
        )
    _build(folder, asked, source, kept | {tp}, f"made the profile bundle {{}} tp{tp}", why, tell)
    return folder


def _build(
    folder: Path,
    asked: Wanted,
    source: str,
    degrees: set[int],
    what: str,
    why: str,
    tell: Callable[[str], None],
) -> None:
    """Put a bundle with ``degrees`` at ``folder`` and tell so; ``what`` has braces for its name.

    Raises:
        ServingError: the source does not cover it, or the folder cannot be written.
    """
    from servesim.profiler.bundle_writer import write_bundle
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.sources import compute
    from servesim.specs.model import load_model

    model = asked.shape or load_model(asked.model)
    hardware = asked.facts or load_hardware(asked.hardware)
    degrees = degrees | ({1} if model.is_moe else set())  # expert parallelism reads tp1
    started_s = time.perf_counter()
    job = ProfileJob(
        model,
        architecture_of(model),
        hardware,
        *variant_dtypes(asked.variant),
        tuple(sorted(degrees)),
        **LIMITS,
    )
    try:
        content = compute(source, job)
    except InputError as error:
        if source != "silicon":
            raise
        content = compute("roofline", job)
        why = f"public kernel measurements do not cover it: {str(error).splitlines()[0]}"
        content.meta[REFUSED] = {"data_version": installed_version(), "reason": why}
        source = "roofline"
    content.meta[ON_DEMAND] = True
    write_bundle(folder, content)
    name = what.format(f"{asked.hardware}/{asked.model}/{asked.variant}")
    reason = f"; {why}" if why else ""
    tell(
        f"{name} {MADE_FROM[source]} in {time.perf_counter() - started_s:.1f} s "
        f"({content.meta['confidence']}){reason}; kept in {folder}"
    )


def refresher(
    tell: Callable[[str], None], warn: Callable[[str], None], *, wanted: bool = True
) -> Callable[[Path, Wanted], None]:
    """What sees to it that computed bundles do not grow old unnoticed, for
    :func:`servesim.cost.finding.missing_bundles_from`.

    One that was made on demand is made again, with a line to ``tell``; where that cannot be, or where the
    user made it and may have chosen otherwise, ``warn`` gets a line. Each bundle is looked at once.
    """
    seen: set[Path] = set()
    can_make = maker(tell, wanted=wanted) is not None

    def look(folder: Path, asked: Wanted) -> None:
        where = folder.resolve()
        if where in seen:
            return
        seen.add(where)
        meta = _meta(folder)
        if not is_computed(meta):
            return
        source = str(meta["source"])
        reason = outdated(meta)
        ours = bool(meta.get(ON_DEMAND)) and can_make
        chosen = None
        if ours and (reason is not None or source == "roofline"):
            from servesim.profiler.sources import source_for

            chosen = source_for(asked.facts or load_hardware(asked.hardware), asked.variant)
        better = ours and source == "roofline" and chosen == ("silicon", "") and not _silicon_refused(meta)
        if better:
            reason = "measurements of this GPU's kernels are installed now"
        if reason is None:
            return
        degrees = degrees_in(folder)
        way_out = "it is made again where that is not switched off"
        if not meta.get(ON_DEMAND):
            command = profile_command(asked.hardware, asked.named, asked.variant, *degrees, source=source)
            way_out = f"make it again: {command} --output-root {folder_root(folder)}"
        elif can_make and chosen is not None and (chosen[0] == source or better):
            try:
                what = f"made the profile bundle {{}} again, for {reason},"
                _build(folder, asked, chosen[0], set(degrees), what, chosen[1], tell)
                return
            except ServingError as error:
                way_out = f"it was not made again: {str(error).splitlines()[0]}"
        elif source == "silicon":
            way_out = "servesim[silicon], installed and not switched off, makes it again"
        warn(f"{folder}: this bundle is old: {reason}; {way_out}")

    return look


def _silicon_refused(meta: dict[str, Any]) -> bool:
    """Whether the measurements that are installed were found not to cover a bundle's model."""
    refused = meta.get(REFUSED)
    if not isinstance(refused, dict):
        return False
    from servesim.profiler.sources import silicon_installed

    return silicon_installed() and refused.get("data_version") == installed_version()


def _meta(folder: Path) -> dict[str, Any]:
    """meta.yaml of a bundle; empty where there is no sound one."""
    try:
        return read_yaml_object(folder / "meta.yaml")
    except ServingError:
        return {}


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
    if source == "silicon" and (installed := installed_version()) not in (None, meta.get("data_version")):
        return f"it is made from measurements {meta.get('data_version')}, now {installed}"
    about = meta.get("made_for")
    derivation = about.get("derivation") if isinstance(about, dict) else None
    if not isinstance(derivation, dict):
        return "it does not state what it was made for"
    if source == "roofline":
        from servesim.profiler.roofline.efficiency import fits

        if derivation.get("constants") == digest(fits()):
            return None
        return "its constants were fitted anew"
    return None


def installed_version() -> str | None:
    """Version of the public kernel measurements that are installed, from the name of their folder.

    The standard library's way to ask loads its reader of e-mail, which takes a tenth of a short run.
    """
    for place in sys.path:
        with suppress(OSError):
            for name in os.listdir(place or "."):  # noqa: PTH208 - a thousand paths cost
                found = _METADATA.fullmatch(name)
                if found:
                    return found[1]
    return None


@contextmanager
def bundles_on_demand(wanted: bool, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside the block, bundles that are missing, outdated or made for something else are made where that is
    possible.

    Args:
        wanted: False: none are made, and old ones are only warned of.
        tell: gets a line per bundle made; None: :data:`MADE_LOG`. A block within another that makes bundles
            leaves this to the outer one.
    """
    if wanted and makes_bundles():
        yield
        return
    say, warn = tell or logging.getLogger(MADE_LOG).warning, logging.getLogger(READ_LOG).warning

    @cache
    def parts() -> tuple[Maker | None, Refresher]:
        return maker(say, wanted=wanted), refresher(say, warn, wanted=wanted)

    def make(asked: Wanted, tp: int) -> Path | None:
        maker, _ = parts()
        return maker(asked, tp) if maker else None

    def refresh(folder: Path, asked: Wanted) -> None:
        parts()[1](folder, asked)

    with missing_bundles_from(make if wanted else None, refresh):
        yield
