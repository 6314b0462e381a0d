"""Text that is burned into pixels: found by a text detector, blanked in every frame.

The detector and the reader are PP-OCR's (Liao et al. 2020, Real-time Scene Text Detection with Differentiable Binarization,
doi 10.1609/aaai.v34i07.6812), run by rapidocr on this machine; their weights are part of its package. What is read decides
whether it is a side marker, and is kept nowhere.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from cv_factory_ops.domain import Box, Decoding
from cv_factory_ops.errors import Rejected
from domain_medical.intensities import Stored, _padding, colour_image, palette_image
from domain_medical.pixels import Pixels

CURE = "needs rapidocr: pip install 'cv-factory[deidentify]'"
MARKERS = {
    *("DECUB", "LAT", "LEFT", "MOBILE", "PRONE", "RIGHT", "SITTING", "STANDING"),
    *("LCC", "LLAT", "LMLO", "MLO", "RCC", "RLAT", "RMLO"),
}
"""Side, position and view, as radiographers mark them. They identify nobody, and a model may need them."""
MISREAD_MARKERS = {"DECUBITUS", "ERECT", "LATERAL", "PORTABLE", "SEMIERECT", "SUPINE", "UPRIGHT"}
"""The same, where one letter may have been misread: no name is as near to them as some are to RIGHT or PRONE."""

_ROUNDS = 3
"""How often a frame is looked at again after blanking: what is left of a line that was found in part is found then."""
_LARGEST = 1 / 6
"""Share of the image's shorter side; letters above it count only where the reading is certain: spines and ribs are large, and
at times are read as numbers."""
_MAX_SIDE = 1600
"""Pixels of the longer side that the detector works on; larger images are made smaller."""


def can_screen() -> bool:
    """Whether the library that finds text is installed."""
    return find_spec("rapidocr") is not None and find_spec("onnxruntime") is not None


def find(image: NDArray[Any]) -> list[Box]:
    """Where (rows, columns) of any range show text that is no side marker, each with a margin of its height.

    Two looks: equalised, for writing on a ground of nearly its own brightness; and enlarged, for small letters in noise.
    """
    from cv2 import COLOR_GRAY2BGR, createCLAHE, cvtColor

    shown = _compressed(image)
    equalised = createCLAHE(clipLimit=3, tileGridSize=(8, 8)).apply(shown)
    boxes = list[Box]()
    for look, scale in ((equalised, min(1.0, _MAX_SIDE / max(shown.shape))), (shown, _enlargement(shown.shape))):
        result = _reader()(cvtColor(_resized(look, scale), COLOR_GRAY2BGR), use_cls=False, text_score=0.0)
        if result.boxes is None or result.txts is None:
            continue
        for quad, said, certainty in zip(np.asarray(result.boxes) / scale, result.txts, result.scores, strict=True):
            low, high = quad.min(axis=0), quad.max(axis=0)
            is_plausible = min(high - low) < _LARGEST * min(image.shape) or certainty > 0.8
            if is_plausible and _is_text(said, high - low):
                boxes.append(_with_margin(low, high, image.shape))
    return boxes


def _enlargement(shape: tuple[int, ...]) -> float:
    """The scale of the second look: up to twice, up to ``_MAX_SIDE``."""
    return min(2.0, max(1.0, 1024 / min(shape)), _MAX_SIDE / max(shape))


def _resized(look: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    from cv2 import INTER_AREA, INTER_CUBIC, resize

    if scale == 1:
        return look
    resized: NDArray[np.uint8] = resize(look, None, fx=scale, fy=scale, interpolation=INTER_CUBIC if scale > 1 else INTER_AREA)
    return resized


@lru_cache(maxsize=1)
def _reader() -> Any:
    """One a process: it takes a second to load."""
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical", "Global.max_side_len": _MAX_SIDE})


def _compressed(image: NDArray[Any]) -> NDArray[np.uint8]:
    """0..255: half of it for the ordinary intensities, half for the extremes that overlays are drawn in."""
    values = np.asarray(image, np.float32)
    low, high = np.quantile(values[:: max(values.shape[0] // 512, 1), :: max(values.shape[1] // 512, 1)], [0.005, 0.995])
    least, most = values.min(), values.max()
    shown = np.clip((values - low) / max(high - low, 1e-9), 0, 1) + (values - least) / max(most - least, 1e-9)
    return np.asarray(127.5 * shown, np.uint8)


def _is_text(said: str, size: NDArray[Any]) -> bool:
    """Whether a reading may say whose image it is. One or two letters in a long box are a line that could not be read."""
    letters = re.findall(r"[^\W_]", said)
    word = "".join(letters).upper()
    is_short = len(letters) < (3 if word.isascii() else 2) and max(size) <= 4 * max(min(size), 1)
    return bool(letters) and not is_short and not _is_marker(word)


def _is_marker(word: str) -> bool:
    return word in MARKERS or any(
        len(word) == len(marker) and sum(a != b for a, b in zip(word, marker, strict=True)) < 2 for marker in MISREAD_MARKERS
    )


def _with_margin(low: NDArray[Any], high: NDArray[Any], shape: tuple[int, ...]) -> Box:
    """Detectors cut first and last letters: a height more along the line, a quarter of it across."""
    width, height = high - low
    letter = min(width, height)
    margin = np.array([letter, letter / 4] if width >= height else [letter / 4, letter])
    left, top = np.maximum(np.floor(low - margin), 0).astype(int)
    right, bottom = np.minimum(np.ceil(high + margin) + 1, (shape[1], shape[0])).astype(int)
    return Box(int(left), int(top), int(right - left), int(bottom - top))


def clean(study: FileDataset, *, screen: bool) -> tuple[Box, ...]:
    """Blank the text in the pixel data of a study, in place, and take old overlays (PS3.5 8.1.2) out of its unused bits.

    What is found in one frame is blanked in all. Compressed pixels that have to change are stored as explicit little endian.

    Raises:
        Rejected: ``no_pixels``, ``truncated``, ``too_large`` or ``undecodable``.
    """
    has_overlay = _has_overlay_bits(study)
    if not (screen or has_overlay):
        return ()
    pixels = Pixels(study)
    boxes: dict[Box, None] = {}
    if screen:
        for words in pixels.words(range(pixels.frames)):
            boxes |= dict.fromkeys(_boxes(_grey(words, study, pixels)))
    if boxes or (has_overlay and pixels.is_native):
        if pixels.keyword != "PixelData" or pixels.allocated not in {8, 16, 32}:
            raise Rejected("undecodable", f"text in pixels of {pixels.allocated} bits cannot be blanked")
        frames = [_blanked(words, study, pixels, list(boxes)) for words in pixels.words(range(pixels.frames))]
        _store(study, pixels, b"".join(frames))
    return tuple(boxes)


def _has_overlay_bits(study: FileDataset) -> bool:
    tags = [tag for tag in study.keys() if tag.group >> 8 == 0x60 and tag.element == 0x0102]  # noqa: SIM118 - the tags
    return any(study[tag].value for tag in tags)


def _boxes(image: NDArray[Any]) -> list[Box]:
    image, boxes = image.copy(), list[Box]()
    for _ in range(_ROUNDS):
        if not (found := find(image)):
            break
        boxes += found
        for box in found:
            image[_area(box)] = image.min()
    return boxes


def _area(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)


def _grey(words: NDArray[Any], study: FileDataset, pixels: Pixels) -> NDArray[Any]:
    """(rows, columns) of any range, brighter where a viewer would show it brighter; no window hides anything."""
    if words.ndim == 3:
        return colour_image(words, Decoding(), pixels.stored)
    if pixels.photometric == "PALETTE COLOR":
        return palette_image(words, study, Decoding(), pixels.stored)
    values = pixels.stored.values(words)
    return -values if pixels.photometric == "MONOCHROME1" else values


def _blanked(words: NDArray[Any], study: FileDataset, pixels: Pixels, boxes: list[Box]) -> bytes:
    """A frame with its own darkest colour in the boxes, and nothing in its unused bits but padding."""
    order = ">" if pixels.syntax == ExplicitVRBigEndian else "<"
    kept = words if words.ndim == 3 else _values_and_padding(words, study, pixels)
    sign = "i" if pixels.stored.signed and words.ndim == 2 else "u"
    frame = kept.astype(f"{order}{sign}{pixels.allocated // 8}")
    darkest = frame[np.unravel_index(_grey(words, study, pixels).argmin(), words.shape[:2])].copy()
    for box in boxes:
        frame[_area(box)] = darkest
    return frame.tobytes()


def _values_and_padding(words: NDArray[Any], study: FileDataset, pixels: Pixels) -> NDArray[np.int64]:
    """Values in the lowest bits of their words; words that are padding as a whole (-32768 beside 12 bits) as they are.

    Where overlays lie in the unused bits, none is kept: 0 with an overlay's bit may be the very word that stands for padding.
    """
    values = pixels.stored.values(words).astype(np.int64)
    padding = _padding(study, words.dtype)
    if padding is None or pixels.photometric == "PALETTE COLOR" or _has_overlay_bits(study):
        return values
    whole = Stored(8 * words.itemsize, 0, pixels.stored.signed).values(words).astype(np.int64)
    return np.where((whole >= padding[0]) & (whole <= padding[1]), whole, values)


def _store(study: FileDataset, pixels: Pixels, data: bytes) -> None:
    study.PixelData = data + b"\0" * (len(data) % 2)
    study["PixelData"].VR = "OB" if pixels.allocated == 8 else "OW"
    if pixels.samples > 1:
        study.PhotometricInterpretation, study.PlanarConfiguration = "RGB", 0
    if not pixels.is_native:
        study.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    study.HighBit = pixels.stored.bits - 1 + (pixels.stored.shift if pixels.samples > 1 else 0)  # colours are not moved
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in study:
            del study[keyword]
