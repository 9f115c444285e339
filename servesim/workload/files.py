"""Workload files as numbered lines of bytes, unpacked on the way when they are compressed."""

from __future__ import annotations

import io
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from servesim.errors import InputError, MissingFileError
from servesim.specs.reading import input_limit_bytes, too_large

if TYPE_CHECKING:
    from collections.abc import Iterator

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
UTF8_BOM = b"\xef\xbb\xbf"
_ZSTD_PIECE = 1024  # bytes unpacked at once: at most 32 MiB come out of them
_LONG_LINE = 1 << 20  # a line that is still going on here is looked at before more of it is read


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


def numbered_lines(path: str | Path, source: str) -> Iterator[tuple[int, bytes]]:
    """Lines of a plain, gzip or zstd file, numbered from 1; blank lines are left out, a BOM is cut off.

    ``-`` is the standard input. `source` is the file's name in messages. Raises InputError when the file
    cannot be read or unpacked, and where more comes out of it than `input_limit_bytes`.
    """
    try:
        with _opened(path) as packed, _unpacked(packed, source) as handle:
            for number, line in enumerate(_bounded_lines(handle, source), 1):
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


def _bounded_lines(handle: BinaryIO, source: str) -> Iterator[bytes]:
    """The lines of a file that may be endless, or a small one that unpacks to terabytes.

    Raises:
        InputError: the file or one of its lines is too long, or a long line is no text.
    """
    limit = left = input_limit_bytes()
    while line := handle.readline(_LONG_LINE):
        if len(line) == _LONG_LINE and not line.endswith(b"\n"):
            if b"\0" in line:
                raise InputError(f"{source}: holds zero bytes; a text file in UTF-8 is expected")
            line += handle.readline(max(left - len(line), 0) + 1)
        left -= len(line)
        if left < 0:
            raise too_large(source, limit)
        yield line


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def _opened(path: str | Path) -> Iterator[io.BufferedReader]:
    if str(path) != "-":
        with Path(path).open("rb") as handle:
            yield handle
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "-: reads the workload from a pipe, and there is none; write `cat FILE | servesim ...`"
        )
    yield cast("io.BufferedReader", sys.stdin.buffer)


@contextmanager
def _unpacked(handle: io.BufferedReader, source: str) -> Iterator[BinaryIO]:
    """By content, not by suffix: the first bytes say how the file is packed. A pipe will do."""
    magic = handle.peek(4)
    if magic.startswith(GZIP_MAGIC):
        import gzip

        with gzip.GzipFile(fileobj=handle) as unpacked:
            yield cast("BinaryIO", unpacked)
    elif magic.startswith(ZSTD_MAGIC):
        yield io.BufferedReader(_ZstdFile(handle, source), _LONG_LINE)
    else:
        yield handle


class _ZstdFile(io.RawIOBase):
    """The content of a zstd file of any number of frames.

    zstandard's own streaming reader ends silently on a truncated file, and its one-shot function takes
    whatever memory the file asks for.
    """

    def __init__(self, packed: BinaryIO, source: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise InputError(
                f"{source}: is packed with zstd, which needs the package zstandard; run "
                f"`pip install 'servesim[zstd]'`, or unpack the file with `zstd -d`"
            ) from error
        self._zstandard, self._packed, self._source = zstandard, packed, source
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ahead = self._unpacked = b""
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._place == len(self._unpacked):
            if not self._unpack_more():
                return 0
        piece = self._unpacked[self._place : self._place + len(buffer)]
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def _unpack_more(self) -> bool:
        """Unpack the next piece of the file; False at its end."""
        piece = self._ahead or self._packed.read(_ZSTD_PIECE)
        self._ahead = b""
        if self._frame.eof and piece:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        elif not piece:
            if not self._frame.eof:
                raise InputError(f"{self._source}: the zstd file ends too early; get the file again")
            return False
        try:
            self._unpacked, self._place = self._frame.decompress(piece), 0
        except self._zstandard.ZstdError as error:
            raise InputError(
                f"{self._source}: is not a sound zstd file: {error}; get the file again"
            ) from error
        if self._frame.eof:
            self._ahead = self._frame.unused_data
        return True
