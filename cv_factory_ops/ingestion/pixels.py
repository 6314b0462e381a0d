"""Pixels on their way from decoding to preprocessing: ``pixels-*.bin``, one a process that decodes, read once and in order.

They are written and read around the page cache where the file system can (``O_DIRECT``): at the rate of decoding, filling the
cache with pages that are used once costs as much of the processor as decoding does.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage

ALIGNED = 4096
"""Bytes that addresses, offsets and lengths must be multiples of, around the cache."""
BLOCK = 4 << 20
"""Bytes that are written at a time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image's pixels lie."""

    file: str
    offset: int
    bytes: int
    """One or two for each value."""


def pixel_digest(pixels: NDArray[np.uint16]) -> str:
    """SHA-256 of the shape and the little-endian pixels."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels, "<u2").data)
    return digest.hexdigest()


class PixelWriter:
    """Appends images to one file, while another thread writes what came before them.

    What :meth:`flush` has returned from is in the file; what a killed process leaves behind that is never read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._block, self._other = (memoryview(mmap.mmap(-1, BLOCK)) for _ in range(2))
        self._start = self._filled = 0
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pixels")

    def __enter__(self) -> PixelWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()
        self._thread.shutdown()
        os.close(self._file)

    def append(self, pixels: NDArray[np.uint16]) -> Place:
        """Take one image of shape (rows, columns) or (rows, columns, 3).

        Raises:
            Unavailable, DataError: what came before could not be written.
        """
        content = _smallest(np.ascontiguousarray(pixels, "<u2")).data.cast("B")
        place = Place(self._path.name, self._start + self._filled, len(content))
        taken = 0
        while taken < len(content):
            piece = content[taken : taken + BLOCK - self._filled]
            self._block[self._filled : self._filled + len(piece)] = piece
            taken, self._filled = taken + len(piece), self._filled + len(piece)
            if self._filled == BLOCK:
                self._write()
        return place

    def flush(self) -> None:
        """Wait until the file has all images.

        Raises:
            Unavailable, DataError: they could not be written.
        """
        if self._filled:
            self._write()
        self._wait()

    def _write(self) -> None:
        self._wait()
        length = -(-self._filled // ALIGNED) * ALIGNED
        self._writing = self._thread.submit(_write_at, self._file, self._block[:length], self._start)
        self._block, self._other = self._other, self._block
        self._start, self._filled = self._start + length, 0

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except OSError as error:
            raise storage.explained_os_error(error, str(self._path)) from None


def read_pixels(path: Path, places: Sequence[tuple[int, int, tuple[int, ...]]]) -> Iterator[NDArray[np.uint16]]:
    """The images at (offset, bytes, shape) of a file."""
    with _opened(path) as file:
        space = memoryview(mmap.mmap(-1, max(length for _, length, _ in places) + 2 * ALIGNED))
        for offset, length, shape in places:
            before = offset % ALIGNED
            _read_at(file, space[: -(-(before + length) // ALIGNED) * ALIGNED], offset - before, before + length)
            yield _unpacked(bytes(space[before : before + length]), shape)


def _open(path: Path, flags: int) -> int:
    """Around the page cache; through it where the file system has no other way."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = _open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _read_at(file: int, space: memoryview, offset: int, wanted: int) -> None:
    """Fill ``space`` with the file from ``offset``, at least with ``wanted`` bytes: the file may end within its last page."""
    filled = 0
    while filled < wanted:
        if not (found := os.preadv(file, [space[filled:]], offset + filled)):
            raise EOFError("the file of pixels is shorter than its manifest says")
        filled += found


def _smallest(pixels: NDArray[np.uint16]) -> NDArray[np.unsignedinteger]:
    """Images of 8 bits, scaled to 16, as 8 bits again; nothing else is packed: that would cost more time than decoding."""
    if _has_8_bits(pixels[len(pixels) // 2]) and _has_8_bits(pixels):
        return (pixels & 255).astype(np.uint8)
    return pixels


def _has_8_bits(pixels: NDArray[np.uint16]) -> bool:
    return bool(np.array_equal((pixels & 255) * np.uint16(257), pixels))


def _unpacked(content: bytes, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    if len(content) == np.prod(shape):
        return np.frombuffer(content, np.uint8).reshape(shape) * np.uint16(257)
    return np.frombuffer(content, "<u2").reshape(shape)
