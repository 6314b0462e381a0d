"""DICOM Part 10 files to images as a viewer shows them, with metadata that identifies nobody.

The order is the standard's: Modality LUT or rescale (PS3.3 C.11.1), VOI LUT or window (C.11.2), then the inversion of
MONOCHROME1 (C.7.6.3.1.2). Intensities are scaled by what the file declares (window, bits), not by its own extremes, so
that images of one scanner stay comparable. Part and section numbers are those of DICOM 2024b.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, config, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import UID, RLELossless

from cv_factory_ops.domain import Decoded, Metadata, pseudonym
from cv_factory_ops.errors import Rejected

MAX_PIXELS = 100_000_000
"""Rows times columns above which an image is refused: the largest mammograms have a quarter of it."""

_FRAME_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")
_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luminance (ITU-R BT.601)."""

# Validation happens here, by what is needed; pydicom's own warnings quote values, which may be a patient's.
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
_QUIET = re.compile(r"pydicom\b|domain_medical\b")


def decode(data: bytes) -> Decoded:
    """Image, pseudonyms and metadata of a study. Of several frames, the middle one.

    Raises:
        Rejected: ``not_dicom``, ``truncated``, ``no_pixels``, ``too_large`` or ``undecodable``.
    """
    study = read(data)
    index = _check_pixels(study)
    try:
        _adopt_frame_attributes(study, index)
        image = _shown(study, index)
    except Exception as error:
        raise Rejected("undecodable", f"the pixel data cannot be decoded ({type(error).__name__})") from None
    if not np.isfinite(image).all():
        raise Rejected("undecodable", "the pixel data holds values that are not finite")
    return Decoded(image, *identity(study), metadata(study))


def read(data: bytes) -> Dataset:
    """The data set of a DICOM Part 10 file.

    Raises:
        Rejected: ``not_dicom``, ``truncated`` or ``undecodable``.
    """
    silence_warnings()
    try:
        return dcmread(BytesIO(data))
    except InvalidDicomError:
        raise Rejected("not_dicom", "is not a DICOM Part 10 file") from None
    except EOFError:
        raise Rejected("truncated", "the file ends within an element") from None
    except Exception as error:
        raise Rejected("undecodable", f"the data set cannot be read ({type(error).__name__})") from None


def silence_warnings() -> None:
    """Keep pydicom's warnings off the standard error; done anew because tests and servers reset the filters."""
    if ("ignore", None, Warning, _QUIET, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET.pattern)


def identity(study: Dataset) -> tuple[str, str]:
    """Pseudonyms of patient and study; those of a de-identified file are taken as they are."""
    patient, uid = text(study, "PatientID"), text(study, "StudyInstanceUID")
    if text(study, "PatientIdentityRemoved") == "YES":
        return patient or "", uid or ""
    return (pseudonym(patient, "patient") if patient else ""), (remapped_uid(uid) if uid else "")


def remapped_uid(uid: str) -> str:
    """A keyed replacement of a UID, below the root 2.25 for UIDs made of an integer (PS3.5 B.2)."""
    return f"2.25.{int(pseudonym(uid, 'uid'), 16)}"


def metadata(study: Dataset) -> Metadata:
    """The fields of ``Medical.metadata``; None where missing or unreadable."""
    sex = text(study, "PatientSex")
    return {
        "modality": text(study, "Modality"),
        "manufacturer": text(study, "Manufacturer"),
        "model_name": text(study, "ManufacturerModelName"),
        "body_part": text(study, "BodyPartExamined"),
        "view_position": text(study, "ViewPosition"),
        "photometric": text(study, "PhotometricInterpretation"),
        "sex": sex if sex in {"F", "M", "O"} else None,
        "age_years": _age_years(text(study, "PatientAge")),
        "kvp": number(study, "KVP"),
        "bits_stored": number(study, "BitsStored"),
        "pixel_spacing_mm": number(study, "PixelSpacing") or number(study, "ImagerPixelSpacing"),
        "rows": number(study, "Rows"),
        "columns": number(study, "Columns"),
    }


def text(study: Dataset, keyword: str) -> str | None:
    """The first value of an element, stripped; None where it is missing, empty or of an impossible VR."""
    try:
        value = study.get(keyword)
        first = value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value
        return (str(first).strip()[:64] or None) if first is not None else None
    except Exception:
        return None


def number(study: Dataset, keyword: str) -> float | None:
    """The first value of an element as a finite number, or None."""
    try:
        value = float(text(study, keyword) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _age_years(age: str | None) -> float | None:
    """``045Y``, ``018M``, ``003W``, ``010D`` (VR AS, PS3.5 6.2) in years."""
    found = re.fullmatch(r"(\d{3})([YMWD])", age or "")
    return round(int(found[1]) / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[found[2]], 2) if found else None


def _check_pixels(study: Dataset) -> int:
    """The index of the frame to decode, after the checks that need no decoding."""
    if not any(keyword in study for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = text(study, "SOPClassUID") or text(study.file_meta, "MediaStorageSOPClassUID")
        if "Rows" in study or kind is None or "Image" in UID(kind).name:
            raise Rejected("truncated", "is an image without pixel data: the file is cut")
        raise Rejected("no_pixels", "has no pixel data: it is not an image")
    rows, columns, frames = (number(study, keyword) for keyword in ("Rows", "Columns", "NumberOfFrames"))
    if not rows or not columns:
        raise Rejected("undecodable", "Rows or Columns is missing or not a number")
    if rows * columns > MAX_PIXELS:
        raise Rejected("too_large", f"has {rows:.0f} x {columns:.0f} pixels; allowed are {MAX_PIXELS}")
    if _is_cut(study):
        raise Rejected("truncated", "the pixel data is shorter than the image")
    return max(int(frames or 1), 1) // 2


def _is_cut(study: Dataset) -> bool:
    try:
        is_native = not study.file_meta.TransferSyntaxUID.is_compressed
        return is_native and "PixelData" in study and len(study.PixelData) < get_expected_length(study)
    except Exception:
        return False  # whatever is wrong here is reported by decoding


def _adopt_frame_attributes(study: Dataset, index: int) -> None:
    """Bring the functional groups of enhanced multi-frame images (PS3.3 C.7.6.16) to the top, where others have them."""
    shared, frames = study.get("SharedFunctionalGroupsSequence"), study.get("PerFrameFunctionalGroupsSequence")
    for group in [*(shared or [])[:1], *(frames or [])[index : index + 1]]:
        for macro in _FRAME_MACROS:
            if group.get(macro):
                study.update(group[macro].value[0])


def _shown(study: Dataset, index: int) -> NDArray[np.float32]:
    """(rows, columns), 0 (black) .. 1 (white)"""
    frames = int(number(study, "NumberOfFrames") or 1)
    # On broken RLE the faster plugin panics, with an exception that is no Exception; pydicom's own decoder raises.
    plugin = "pydicom" if study.file_meta.TransferSyntaxUID == RLELossless else ""
    stored = pixel_array(study, index=index if frames > 1 else 0, decoding_plugin=plugin)
    photometric = study.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(stored, study)
        shown = colours[..., :3] @ _LUMA / np.iinfo(colours.dtype).max
    elif stored.ndim == 3:
        shown = stored @ _LUMA / (2.0**study.BitsStored - 1)
    else:
        shown = _grey(stored, study)
        if photometric == "MONOCHROME1":
            shown = 1.0 - shown
    image: NDArray[np.float32] = np.clip(shown, 0.0, 1.0).astype(np.float32)
    return image


def _grey(stored: NDArray[np.generic], study: Dataset) -> NDArray[np.float64]:
    """Modality LUT, then VOI LUT, in the declared range of 0..1."""
    values, low, high = _modality(stored.astype(np.float64), study)
    if luts := study.get("VOILUTSequence"):
        shown, top = _look_up(values, luts[0], study)
        return shown / top
    center, width = number(study, "WindowCenter"), number(study, "WindowWidth")
    if center is not None and width is not None and width > 0:  # writers put 0 where they have no window
        return window(values, center, width, text(study, "VOILUTFunction") or "LINEAR")
    return (values - low) / max(high - low, 1e-12)


def _modality(stored: NDArray[np.float64], study: Dataset) -> tuple[NDArray[np.float64], float, float]:
    """Modality values with the lowest and highest value that the file declares possible."""
    if luts := study.get("ModalityLUTSequence"):
        values, top = _look_up(stored, luts[0], study)
        return values, 0.0, top
    slope, intercept = number(study, "RescaleSlope"), number(study, "RescaleIntercept")
    slope, intercept = (1.0 if slope is None else slope), (0.0 if intercept is None else intercept)
    values = stored * slope + intercept
    if "PixelData" not in study:  # floating point pixels declare no range (PS3.3 C.7.6.24): only here their own extremes
        return values, float(values.min()), float(values.max())
    lowest = -(2.0 ** (study.BitsStored - 1)) if study.PixelRepresentation else 0.0
    ends = sorted((lowest * slope + intercept, (lowest + 2.0**study.BitsStored - 1) * slope + intercept))
    return values, ends[0], ends[1]


def _look_up(values: NDArray[np.float64], lut: Dataset, study: Dataset) -> tuple[NDArray[np.float64], float]:
    """A LUT of the Modality or VOI module (PS3.3 C.11.1.1.1) and the largest output that its descriptor declares.

    pydicom's functions index in the type of the output, so that a table of 4096 entries of 8 bits wraps around.
    """
    entries, first, bits = (int(value) for value in lut.LUTDescriptor)
    data = lut.LUTData
    if isinstance(data, bytes):
        words = "<u2" if study.original_encoding[1] is not False else ">u2"
        is_packed = bits == 8 and len(data) < 2 * (entries or 65536)
        data = np.frombuffer(data, np.uint8 if is_packed else words)
    table = np.asarray(data, dtype=np.float64)[: entries or 65536]
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[index], 2.0**bits - 1


def window(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """Modality values -> 0..1 by a window; ``function`` is LINEAR, LINEAR_EXACT or SIGMOID (PS3.3 C.11.2.1.2, C.11.2.1.3)."""
    match function:
        case "SIGMOID":
            return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -500, 500)))
        case "LINEAR_EXACT":
            return np.clip((values - center) / width + 0.5, 0.0, 1.0)
        case _:
            return np.clip((values - (center - 0.5)) / max(width - 1.0, 1e-6) + 0.5, 0.0, 1.0)
