"""Workload files as numbered lines of bytes, unpacked on the way when they are compressed."""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, cast

from servesim.errors import InputError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
UTF8_BOM = b"\xef\xbb\xbf"


def resolve(path: str | Path) -> Path:
    """The file that `path` names: as it stands, else in the user's data folder, else among the packaged ones.

    Raises InputError for a folder and MissingFileError when there is nothing of that name.
    """
    from servesim.specs import paths

    try:
        found = paths.find(path, "workload file")
    except MissingFileError as error:
        raise MissingFileError(
            f"{error}; correct the path, or make a workload with `servesim workload synth --output FILE`"
        ) from None
    if found.is_dir():
        raise InputError(f"{path}: is a folder; a workload is a file: give the path of one in that folder")
    return found


def numbered_lines(path: Path, source: str) -> Iterator[tuple[int, bytes]]:
    """Lines of a plain, gzip or zstd file, numbered from 1; blank lines are left out, a BOM is cut off.

    `source` is the file's name in messages. Raises InputError when the file cannot be read or unpacked.
    """
    try:
        with _open_unpacked(path, source) as handle:
            for number, line in enumerate(handle, 1):
                if number == 1 and line.startswith(UTF8_BOM):
                    line = line[len(UTF8_BOM) :]
                if line and not line.isspace():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source}: cannot be read to its end: {_reason(error)}; "
            "get the file again or mend its permissions"
        ) from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def _open_unpacked(path: Path, source: str) -> Iterator[BinaryIO]:
    """Open by content, not by suffix: the first bytes say how the file is packed. A pipe will do."""
    with path.open("rb") as handle:
        magic = handle.peek(4)
        if magic.startswith(GZIP_MAGIC):
            import gzip

            with gzip.GzipFile(fileobj=handle) as unpacked:
                yield cast("BinaryIO", unpacked)
        elif magic.startswith(ZSTD_MAGIC):
            yield _unpack_zstd(handle.read(), source)
        else:
            yield handle


def _unpack_zstd(packed: bytes, source: str) -> BinaryIO:
    """Unpack the whole file in memory: zstandard's streaming reader ends silently on a truncated file."""
    import io

    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{source}: is packed with zstd, which needs the package zstandard; run "
            f"`pip install 'servesim[zstd]'`, or unpack the file with `zstd -d`"
        ) from error
    unpacked = []
    while packed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            unpacked.append(frame.decompress(packed))
        except zstandard.ZstdError as error:
            raise InputError(f"{source}: is not a sound zstd file: {error}; get the file again") from error
        if not frame.eof:
            raise InputError(f"{source}: the zstd file ends too early; get the file again")
        packed = frame.unused_data
    return io.BytesIO(b"".join(unpacked))
