"""DICOM files as data sets: reading, what may be known of them, and the pseudonyms of whom they are about.

Files are read as they are found: with or without the preamble of PS3.10, deflated, in either byte order. Every message is
made of names and numbers, never of values. Part and section numbers are those of DICOM 2024b.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from pydicom import Dataset, config, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from cv_factory_ops.domain import Metadata, pseudonym
from cv_factory_ops.errors import Rejected
from domain_medical import START_OF_FILE

MAX_INFLATED = 512 << 20
"""Bytes above which a deflated data set is refused: a thousandth of it in the file would do."""

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

_DEFERRED = 1 << 18
"""Bytes above which a value stays where it is until it is asked for: pixels are not copied."""
_START = 1 << 16
"""Bytes that the file meta information, which says whether the rest is deflated, is looked for in."""
_IS_PLAIN = {"AE", "AS", "CS", "DS", "IS", "LO", "SH", "UI"}
_NUMBERS = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FL": "f", "FD": "d"}

# Validation happens here, by what is needed; pydicom's own warnings quote values, which may be a patient's.
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
_QUIET = re.compile(r"pydicom\b|domain_medical\b")


def read(data: bytes) -> FileDataset:
    """The data set of a DICOM file. Its file meta information always names a transfer syntax.

    Raises:
        Rejected: ``not_dicom``, ``truncated``, ``too_large`` or ``undecodable``.
    """
    silence_warnings()
    if not START_OF_FILE.match(data):
        raise Rejected("not_dicom", "is not a DICOM file")
    try:
        study = _parsed(data)
    except Rejected:
        raise
    except EOFError:
        raise Rejected("truncated", "the file ends within an element") from None
    except Exception as error:
        raise Rejected("undecodable", f"the data set cannot be read ({type(error).__name__})") from None
    is_plausible = UID(text(study, "SOPClassUID") or "-").is_valid or ("Rows" in study and "PixelData" in study)
    if data[128:132] != b"DICM" and not is_plausible:
        raise Rejected("not_dicom", "is not a DICOM file")
    return study


def _parsed(data: bytes) -> FileDataset:
    if DeflatedExplicitVRLittleEndian.encode() in data[:_START]:
        return _with_syntax(_read_deflated(data))
    return _with_syntax(dcmread(BytesIO(data), defer_size=_DEFERRED, force=True))


def _read_deflated(data: bytes) -> FileDataset:
    """A file that may be deflated: pydicom would inflate it without a limit."""
    source = BytesIO(data)
    preamble = read_preamble(source, True)
    meta = FileMetaDataset(read_dataset(source, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2))
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return dcmread(BytesIO(data), defer_size=_DEFERRED, force=True)
    study = dcmread(BytesIO(_inflated(data, source.tell())), defer_size=_DEFERRED, force=True)
    study.file_meta, study.preamble = meta, preamble
    return study


def _with_syntax(study: FileDataset) -> FileDataset:
    if not study.file_meta.get("TransferSyntaxUID"):
        study.file_meta.TransferSyntaxUID = _guessed_syntax(study)
    return study


def _inflated(data: bytes, start: int) -> bytes:
    """The data set that follows the file meta information in a deflated file (PS3.5 A.5), in bounded memory."""
    stream, inflated = zlib.decompressobj(-zlib.MAX_WBITS), BytesIO()
    packed = data[start:]
    while packed and not stream.eof:
        inflated.write(stream.decompress(packed, 1 << 20))
        packed = stream.unconsumed_tail
        if inflated.tell() > MAX_INFLATED:
            raise Rejected("too_large", f"inflates to more than the {MAX_INFLATED} bytes that are allowed")
    if not stream.eof:
        raise Rejected("truncated", "the deflated data set is cut")
    return inflated.getvalue()


def _guessed_syntax(study: FileDataset) -> UID:
    is_implicit, is_little = study.original_encoding
    return ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian


def silence_warnings() -> None:
    """Keep pydicom's warnings off the standard error; done anew because tests and servers reset the filters."""
    if ("ignore", None, Warning, _QUIET, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_QUIET.pattern)


def listed(index: bytes) -> list[str] | None:
    """The files that a DICOMDIR (PS3.3 annex F) names and has in use, as POSIX paths relative to it; None of other bytes.

    Raises:
        Rejected: ``truncated`` or ``undecodable``: a broken DICOMDIR, or one that names files outside of its directory.
    """
    if index[128:132] != b"DICM" or MediaStorageDirectoryStorage.encode() not in index[:4096]:
        return None
    study = read(index)
    if text(study.file_meta, "MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
        return None
    records = study.get_item(0x00041220, keep_deferred=True)
    if isinstance(records, RawDataElement) and records.value_tell + records.length > len(index):
        raise Rejected("truncated", "the DICOMDIR ends within its records: the file is cut")
    try:
        paths = [path for record in study.get("DirectoryRecordSequence") or [] if (path := _referenced(record))]
    except Rejected:
        raise
    except Exception as error:
        raise Rejected("undecodable", f"the records of the DICOMDIR cannot be read ({type(error).__name__})") from None
    if "DirectoryRecordSequence" not in study:
        raise Rejected("truncated", "is a DICOMDIR without records: the file is cut")
    return list(dict.fromkeys(paths))


def _referenced(record: Dataset) -> str | None:
    """ReferencedFileID of a directory record that is in use (PS3.3 F.3.2.2)."""
    value = record.get("ReferencedFileID")
    if not value or record.get("RecordInUseFlag") == 0:
        return None
    parts = [value] if isinstance(value, str) else list(value)
    if any(part in {"", ".", ".."} or not part.isprintable() or set(part) & set("/\\:") for part in parts):
        raise Rejected("undecodable", "the DICOMDIR names a file outside of its directory")
    return "/".join(parts)


def identity(study: Dataset) -> tuple[str, str]:
    """Pseudonyms of patient and study; those of a de-identified file are taken as they are."""
    patient = text(study, "PatientID") or ""
    if patient and not _is_deidentified(study):
        patient = pseudonym(patient, "patient")
    return patient, uid(study, "StudyInstanceUID")


def uid(study: Dataset, keyword: str) -> str:
    """The pseudonym of a UID of the data set, taken as it is from a de-identified file; empty where there is none."""
    value = text(study, keyword) or ""
    return remapped_uid(value) if value and not _is_deidentified(study) else value


def _is_deidentified(study: Dataset) -> bool:
    return text(study, "PatientIdentityRemoved") == "YES"


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


def spacing(study: Dataset) -> tuple[float, float] | None:
    """Distance of neighbouring rows and of neighbouring columns in mm (PS3.3 10.7.1.3); None where the file does not say.

    In this order: PixelSpacing; ImagerPixelSpacing, which is that of the detector, divided by the estimated magnification
    (C.8.7.2); NominalScannedPixelSpacing of scanned film; the regions of ultrasound (C.8.5.5).
    """
    if found := _plausible(numbers(study, "PixelSpacing")):
        return found
    if found := _plausible(numbers(study, "ImagerPixelSpacing")):
        factor = number(study, "EstimatedRadiographicMagnificationFactor") or 1.0
        return _plausible([side / factor for side in found]) or found
    return _plausible(numbers(study, "NominalScannedPixelSpacing")) or _ultrasound_spacing(study)


def _ultrasound_spacing(study: Dataset) -> tuple[float, float] | None:
    """Of the regions that show space (two-dimensional, in cm), if they agree."""
    found = set()
    for region in _items(study, "SequenceOfUltrasoundRegions"):
        units = number(region, "PhysicalUnitsXDirection"), number(region, "PhysicalUnitsYDirection")
        deltas = [number(region, keyword) for keyword in ("PhysicalDeltaY", "PhysicalDeltaX")]
        if units == (3, 3) and number(region, "RegionSpatialFormat") == 1:
            found.add(_plausible([10 * abs(delta) for delta in deltas if delta is not None]))
    return found.pop() if len(found) == 1 else None


def _items(study: Dataset, keyword: str) -> list[Dataset]:
    try:
        return list(study.get(keyword) or [])
    except Exception:
        return []


def _plausible(sides: list[float]) -> tuple[float, float] | None:
    row, column = sides if len(sides) == 2 else (0.0, 0.0)
    return (row, column) if row > 0 and column > 0 and math.isfinite(row + column) else None


def text(study: Dataset, keyword: str) -> str | None:
    """The first value of an element, stripped; None where it is missing, empty or of an impossible VR."""
    try:
        value = _value(study, keyword)
        first = value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value
        return (str(first).strip(" \0\t\r\n")[:64] or None) if first is not None else None
    except Exception:
        return None


def number(study: Dataset, keyword: str) -> float | None:
    """The first value of an element as a finite number, or None."""
    try:
        value = float(text(study, keyword) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def numbers(study: Dataset, keyword: str) -> list[float]:
    """All values of an element as finite numbers; empty where one is not."""
    try:
        value = _value(study, keyword)
        several = [value] if isinstance(value, str | float | int) else list(value)
        found = [float(item) for item in several]
    except Exception:
        return []
    return found if all(map(math.isfinite, found)) else []


def _value(study: Dataset, keyword: str) -> Any:
    """The value of an element, or None. Plain ones are taken from their bytes, as conversion takes most of the time."""
    tag = tag_for_keyword(keyword)
    if tag is None or tag not in study:
        return None
    raw = study.get_item(tag, keep_deferred=True)
    if isinstance(raw, RawDataElement) and raw.value and raw.VR is not None:
        if raw.VR in _IS_PLAIN and raw.value.isascii() and b"\x1b" not in raw.value:  # no other character set
            found = raw.value.decode("ascii").rstrip(" \0").split("\\")
            return found if len(found) > 1 else found[0]
        if (code := _NUMBERS.get(raw.VR)) and len(raw.value) == struct.calcsize(code):
            return struct.unpack(("<" if raw.is_little_endian else ">") + code, raw.value)[0]
    return study.get(tag).value


def _age_years(age: str | None) -> float | None:
    """``045Y``, ``018M``, ``003W``, ``010D`` (VR AS, PS3.5 6.2) in years."""
    found = re.fullmatch(r"(\d{3})([YMWD])", age or "")
    return round(int(found[1]) / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[found[2]], 2) if found else None
