"""From stored pixels to what a viewer shows, in the standard's order.

Modality LUT or rescale (PS3.3 C.11.1), VOI LUT or window (C.11.2), inversion (C.7.6.3.1.2, C.11.6.1.2); padding is black.
Intensities are scaled by what the file declares (window, bits), not by its own extremes, so that images of one scanner
stay comparable.

Pixels of up to 16 bits have few possible values: those are transformed once, and looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut

from cv_factory_ops.domain import Decoding, FixedWindow, FullWindow, to_uint16
from cv_factory_ops.errors import Rejected
from domain_medical.dicom import number, numbers, text

Words = NDArray[Any]
Values = NDArray[np.float64]
Image = NDArray[np.uint16]
"""0 (black) .. 65535 (white)"""

_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luminance (ITU-R BT.601)."""
_BLOCK = 1 << 16
"""Pixels that are worked on at a time: temporary arrays stay small, whatever the size of the image."""


@dataclass(frozen=True)
class Stored:
    """Where the pixel's value lies in its word (PS3.5 8.1.1); other bits may hold overlays, and are not looked at."""

    bits: int
    shift: int
    signed: bool

    def values(self, words: Words) -> Values:
        if words.dtype.kind == "f":
            return np.asarray(words, np.float64)
        found: NDArray[np.int64] = (words.astype(np.int64) >> self.shift) & (2**self.bits - 1)
        if self.signed:
            found -= (found >> (self.bits - 1)) << self.bits
        return np.asarray(found, np.float64)

    @property
    def ends(self) -> tuple[float, float]:
        lowest = -(2.0 ** (self.bits - 1)) if self.signed else 0.0
        return lowest, lowest + 2.0**self.bits - 1


@dataclass(frozen=True)
class Table:
    """A LUT of the Modality, VOI or Palette Color modules (PS3.3 C.11.1.1.1, C.11.2.1.1, C.7.6.3.1.5), clamped at its ends."""

    first: int
    """The value that the first entry is for."""
    top: float
    """The largest output that the descriptor declares."""
    entries: bytes
    """Of two bytes each, in this machine's order."""

    def __call__(self, values: Values) -> Values:
        table = np.frombuffer(self.entries, np.uint16).astype(np.float64)
        found: Values = table[np.clip(np.rint(values) - self.first, 0, len(table) - 1).astype(np.int64)]
        return found


@dataclass(frozen=True)
class Rescale:
    slope: float
    intercept: float

    def __call__(self, values: Values) -> Values:
        return values * self.slope + self.intercept


@dataclass(frozen=True)
class Window:
    """Modality values -> 0..1; ``function`` is LINEAR, LINEAR_EXACT or SIGMOID (PS3.3 C.11.2.1.2, C.11.2.1.3)."""

    center: float
    width: float
    function: str

    def __call__(self, values: Values) -> Values:
        if self.function == "SIGMOID":
            return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - self.center) / self.width, -500, 500)))
        if self.function == "LINEAR_EXACT":
            return np.clip((values - self.center) / self.width + 0.5, 0.0, 1.0)
        if self.width <= 1:  # LINEAR is a threshold then
            return (values > self.center - 0.5).astype(np.float64)
        return np.clip((values - (self.center - 0.5)) / (self.width - 1.0) + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Greys:
    """All that makes a grey level of a word, so that equal ones share a table."""

    stored: Stored
    modality: Table | Rescale
    voi: Table | Window | None
    ends: tuple[float, float]
    """The lowest and highest modality value that is possible: black and white where there is no VOI transformation."""
    is_inverted: bool
    padding: tuple[float, float] | None
    """Lowest and highest value of pixels that are no part of the image."""

    def __call__(self, words: Words) -> Values:
        """0 (black) .. 1 (white)"""
        stored = self.stored.values(words)
        values = self.modality(stored)
        if isinstance(self.voi, Table):
            shown = np.clip(self.voi(values) / self.voi.top, 0.0, 1.0)
        elif self.voi:
            shown = self.voi(values)
        else:
            shown = np.clip((values - self.ends[0]) / max(self.ends[1] - self.ends[0], 1e-12), 0.0, 1.0)
        if self.is_inverted:
            shown = 1.0 - shown
        if self.padding:
            shown[self._is_padding(words, stored, *self.padding)] = 0.0
        return shown

    def _is_padding(self, words: Words, stored: Values, low: float, high: float) -> NDArray[np.bool_]:
        """By the value, and by the whole word: writers pad with -32768 beside values of 12 bits."""
        found: NDArray[np.bool_] = (stored >= low) & (stored <= high)
        if words.dtype.kind != "f" and self.stored.bits < 8 * words.itemsize:
            whole = Stored(8 * words.itemsize, 0, self.stored.signed).values(words)
            found |= (whole >= low) & (whole <= high)
        return found


def grey_image(words: Words, frame: Dataset, decoding: Decoding, stored: Stored) -> Image:
    """(rows, columns) of a monochrome frame; ``frame`` has the attributes that hold for it.

    Pixels of the padding value are black, also where MONOCHROME1 is inverted: they are not part of the image, and must not
    be the brightest of it (PS3.3 C.7.5.1.1.2 excludes them from the transformations).
    """
    modality = _modality(frame, stored)
    padding = _padding(frame, words.dtype)
    greys = Greys(
        stored=stored,
        modality=modality,
        voi=_voi(frame, decoding, modality, stored),
        ends=_float_ends(words, padding, modality) if words.dtype.kind == "f" else _ends(modality, stored),
        is_inverted=text(frame, "PhotometricInterpretation") == "MONOCHROME1"
        or text(frame, "PresentationLUTShape") == "INVERSE",
        padding=padding,
    )
    return _repeated(_mapped(words, greys), decoding)


def palette_image(words: Words, study: Dataset, decoding: Decoding, stored: Stored) -> Image:
    """(rows, columns) or (rows, columns, 3) of a frame of PALETTE COLOR (PS3.3 C.7.6.3.1.5, C.7.9.2)."""
    values = stored.values(_all_words(words.dtype))
    if "RedPaletteColorLookupTableData" in study:
        tables = [_table(study, f"{name}PaletteColorLookupTable", stored) for name in ("Red", "Green", "Blue")]
        colours = np.stack([table(values) / table.top for table in tables], axis=-1)
    else:  # segmented
        mapped = apply_color_lut(values.astype(np.int64), study)[..., :3]
        colours = mapped / np.iinfo(mapped.dtype).max
    shown = (colours if decoding.color == "rgb" else colours @ _LUMA).clip(0.0, 1.0)
    image: Image = np.take(_levels(shown), words, axis=0)
    return image


def colour_image(words: Words, decoding: Decoding, stored: Stored) -> Image:
    """(rows, columns) or (rows, columns, 3) of a frame of (rows, columns, 3) red, green, blue. No window is for colours."""
    exact = np.dtype(np.float32 if words.itemsize <= 2 else np.float64)
    luma = _LUMA.astype(exact)
    image = np.empty(words.shape if decoding.color == "rgb" else words.shape[:2], np.uint16)
    for rows in _blocks(words):
        block = words[rows].astype(exact)
        block /= 2.0**stored.bits - 1
        image[rows] = _levels((block if decoding.color == "rgb" else block @ luma).clip(0.0, 1.0))
    return image


def _mapped(words: Words, greys: Greys) -> Image:
    if words.dtype.kind != "f" and words.itemsize <= 2 and words.size >= 2 ** (8 * words.itemsize):
        native = np.ascontiguousarray(words, words.dtype.newbyteorder("="))
        shown: Image = cv2.LUT(native.view(f"u{words.itemsize}"), _grey_table(greys, native.dtype))
        return shown
    image = np.empty(words.shape, np.uint16)
    for rows in _blocks(words):
        image[rows] = _levels(greys(words[rows]))
    return image


def _levels(shown: NDArray[np.floating]) -> Image:
    if not np.isfinite(shown).all():
        raise Rejected("undecodable", "the pixel data holds values that are not finite")
    return to_uint16(shown)


@lru_cache(maxsize=16)
def _grey_table(greys: Greys, dtype: np.dtype[Any]) -> Image:
    """The grey level of each possible word; of a signed type, the negative ones come last, where negative indices lead."""
    return _levels(greys(_all_words(dtype)))


def _all_words(dtype: np.dtype[Any]) -> Words:
    if dtype.kind == "f" or dtype.itemsize > 2:
        raise ValueError("pixels of more than 16 bits have too many values for a table")
    words: Words = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(f"{dtype.kind}{dtype.itemsize}")
    return words


def _blocks(words: Words) -> list[slice]:
    step = max(1, _BLOCK // max(words.shape[1], 1))
    return [slice(start, start + step) for start in range(0, words.shape[0], step)]


def _repeated(image: Image, decoding: Decoding) -> Image:
    return np.repeat(image[..., None], 3, axis=2) if decoding.color == "rgb" else image


def _modality(frame: Dataset, stored: Stored) -> Table | Rescale:
    if luts := frame.get("ModalityLUTSequence"):
        return _table(luts[0], "LUT", stored)
    slope, intercept = number(frame, "RescaleSlope"), number(frame, "RescaleIntercept")
    return Rescale(1.0 if slope is None else slope, 0.0 if intercept is None else intercept)


def _ends(modality: Table | Rescale, stored: Stored) -> tuple[float, float]:
    if isinstance(modality, Table):
        return 0.0, modality.top
    low, high = sorted(float(value) for value in modality(np.array(stored.ends)))
    return low, high


def _float_ends(words: Words, padding: tuple[float, float] | None, modality: Table | Rescale) -> tuple[float, float]:
    """Floating point pixels declare no range (PS3.3 C.7.6.24): only here their own extremes stand in for it."""
    seen = words[(words < padding[0]) | (words > padding[1])] if padding else words
    low, high = sorted(float(end) for end in modality(np.array([seen.min(), seen.max()], np.float64))) if seen.size else (0, 0)
    return low, high


def _voi(frame: Dataset, decoding: Decoding, modality: Table | Rescale, stored: Stored) -> Table | Window | None:
    match decoding.window:
        case FullWindow():
            return None
        case FixedWindow(center=center, width=width, function=function):
            return Window(center, width, function)
    index = decoding.window.index
    if luts := frame.get("VOILUTSequence"):
        lowest = _ends(modality, stored)[0]
        return _table(luts[min(index, len(luts) - 1)], "LUT", stored, is_signed=lowest < 0)
    windows = list(zip(numbers(frame, "WindowCenter"), numbers(frame, "WindowWidth"), strict=False))
    if not windows:
        return None
    center, width = windows[min(index, len(windows) - 1)]
    if width <= 0:  # writers put 0 where they have no window
        return None
    return Window(center, width, text(frame, "VOILUTFunction") or "LINEAR")


def _padding(frame: Dataset, dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """PixelPaddingValue, to PixelPaddingRangeLimit where there is one, as values of the word."""
    prefix = {"f4": "Float", "f8": "DoubleFloat"}.get(dtype.str[1:], "")
    first = number(frame, f"{prefix}PixelPaddingValue")
    if first is None:
        return None
    limit = number(frame, f"{prefix}PixelPaddingRangeLimit")
    ends = [first, first if limit is None else limit]
    if dtype.kind != "f":  # the value's VR may say another sign than the pixels have
        ends = [float(np.array(int(end) % 2 ** (8 * dtype.itemsize)).astype(dtype)) for end in ends]
    return min(ends), max(ends)


def _table(owner: Dataset, prefix: str, stored: Stored, *, is_signed: bool | None = None) -> Table:
    """A LUT from its descriptor (number of entries, first value, bits) and its data.

    pydicom's functions index in the type of the output, so that a table of 4096 entries of 8 bits wraps around.
    """
    count, first, bits = (int(value) for value in owner[f"{prefix}Descriptor"].value)
    count = count or 65536
    if first > 32767 and (stored.signed if is_signed is None else is_signed):  # read as unsigned
        first -= 65536
    data = owner[f"{prefix}Data"].value
    if isinstance(data, bytes):
        is_packed = bits <= 8 and len(data) < 2 * count
        byte_order = "<" if owner.original_encoding[1] is not False else ">"
        data = np.frombuffer(data, np.uint8 if is_packed else f"{byte_order}u2")
    entries = np.atleast_1d(np.asarray(data)).astype(np.uint16)[:count]
    if not len(entries):
        raise ValueError("a LUT without entries")
    top = 2.0**bits - 1 if 1 <= bits <= 16 else float(max(entries.max(), 1))
    return Table(first, top, entries.tobytes())
