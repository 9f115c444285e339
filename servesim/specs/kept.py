"""What files of data amount to, kept between runs in a form that is read at once.

Parsing YAML and laying the measured points of a table out as a tensor takes longer than many a run. What
comes out is kept in the folder ``compiled`` of the user's data folder, named after a checksum of all that
went in: an edited file has another name there, so nothing kept can be out of date. Entries appear whole, by a
rename, and two processes that make one at a time write the same. Where the folder cannot be written, or holds
something else than it should, files are read as they are, without a word: nothing but time is lost.

``SERVESIM_CACHE`` names another folder; ``0`` keeps nothing.
"""

from __future__ import annotations

import marshal
import os
import sys
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.specs.paths import user_data_dir

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

VARIABLE = "SERVESIM_CACHE"
_MOST_ENTRIES = 512
_CHECKSUM = 16
"""Bytes at the end of an entry."""


def key_of(what: str, *parts: bytes | str, by: Sequence[str]) -> str:
    """The name of ``what`` the modules ``by`` make of ``parts``; an edited module makes something else."""
    digest = blake2b(f"{sys.hexversion} {what}".encode(), digest_size=16)
    for name in (__name__, *by):
        with suppress(OSError, TypeError):
            stat = Path(sys.modules[name].__file__ or "").stat()
            digest.update(b"%d %d:" % (stat.st_mtime_ns, stat.st_size))
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def kept_value(key: str) -> Any:
    """What :func:`keep_value` kept under ``key``; None: nothing."""
    with suppress(OSError, ValueError, EOFError, TypeError):
        return marshal.loads(_whole(f"{key}.value"))
    return None


def keep_value(key: str, value: object) -> None:
    """Keep lists and dicts of texts and numbers; anything else is not kept."""
    with suppress(ValueError):
        _keep(f"{key}.value", marshal.dumps(value))  # type: ignore[arg-type]


def kept_arrays(key: str) -> list[Array] | None:
    """The arrays that :func:`keep_arrays` kept under ``key``, not to be written to; None: nothing."""
    import numpy as np

    try:
        flat = np.frombuffer(_whole(f"{key}.floats"))
        arrays, at = [], 1
        for _ in range(int(flat[0])):
            shape = flat[at + 1 : at + 1 + int(flat[at])].astype(np.int64).tolist()
            at += 1 + len(shape)
            size = int(np.prod(shape))
            arrays.append(flat[at : at + size].reshape(shape))
            at += size
    except (OSError, ValueError, IndexError, EOFError):
        return None
    return arrays if at == len(flat) else None


def keep_arrays(key: str, arrays: Sequence[NDArray[Any]]) -> None:
    """Keep arrays of numbers that floats of 64 bits represent."""
    import numpy as np

    parts: list[NDArray[Any]] = [np.array([len(arrays)])]
    for array in arrays:
        parts += [np.array([array.ndim, *array.shape]), array.ravel()]
    _keep(f"{key}.floats", np.concatenate([part.astype(np.float64) for part in parts]).tobytes())


def _folder() -> Path:
    """Where entries are.

    Raises:
        OSError: nothing is to be kept.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "0":
        raise OSError
    return Path(chosen) if chosen else user_data_dir() / "compiled"


def _whole(name: str) -> bytes:
    """What an entry holds, if that is what was kept: disks and crashes leave files of the right size too.

    Raises:
        OSError: there is no such entry; ValueError: it is damaged.
    """
    entry = (_folder() / name).read_bytes()
    data = entry[:-_CHECKSUM]
    if blake2b(data, digest_size=_CHECKSUM).digest() != entry[-_CHECKSUM:]:
        raise ValueError(name)
    return data


def _keep(name: str, data: bytes) -> None:
    """Put an entry into the folder, if that is possible."""
    with suppress(OSError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime)
        for old in entries[: max(len(entries) - _MOST_ENTRIES + 1, 0)]:
            old.unlink()
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        temporary.write_bytes(data + blake2b(data, digest_size=_CHECKSUM).digest())
        temporary.replace(folder / name)
