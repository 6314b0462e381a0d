"""De-identification as DICOM PS3.15 Annex E says: the Basic Application Level Confidentiality Profile, with options.

What happens to an attribute stands in ``ps3_15.csv``: Table E.1-1 of PS3.15 2024b, its column of the profile and those of the
options that can be chosen; its rows of private attributes, curves and overlays are rules here. Attributes that the table
does not list are judged by their VR, stricter than the profile asks for: text, names and network names go, unless they are
known to be harmless. ``docs/deidentification.md`` tells which of several actions of the table is taken, and why.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Literal

from pydicom import DataElement, Dataset, dcmwrite
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.uid import MediaStorageDirectoryStorage

from cv_factory_ops.domain import Box, DeidentificationConfig, Deidentified, pseudonym
from cv_factory_ops.errors import Rejected
from domain_medical import burned_in
from domain_medical.dicom import identity, read, remapped_uid, text

EDITION = "2024b"
"""The edition of PS3.15 that the table is from."""

CODES = {
    "113100": "Basic Application Confidentiality Profile",
    "113101": "Clean Pixel Data Option",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
    "113109": "Retain Device Identity Option",
}
"""De-identification methods of CID 7050 (PS3.16), in the coding scheme DCM."""

DUMMY = "DEIDENTIFIED"
"""The dummy value of texts: fits every VR of text."""

_DUMMIES: dict[str, object] = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"), DUMMY),
    **dict.fromkeys(("DS", "IS"), "0"),
    **dict.fromkeys(("FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"), 0),
    **{"AS": "000Y", "DA": "19000101", "DT": "19000101000000", "TM": "000000", "OB": b"\0\0", "OW": b"\0\0"},
}

Action = Literal["keep", "remove", "empty", "dummy", "remap", "shift", "clean"]

_ACTIONS: dict[str, Action] = {
    **{"K": "keep", "X": "remove", "Z": "empty", "D": "dummy", "U": "remap"},
    **{"X/Z": "empty", "X/D": "dummy", "Z/D": "dummy", "X/Z/D": "dummy", "X/Z/U*": "clean"},
}
"""The right action of several depends on the attribute's Type in the IOD: this one is right for every Type it may have."""

_TEXTS = {"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
_TIMES = {"DA", "DT", "TM"}

_PUBLIC_DATES = {"ContextGroupLocalVersion", "ContextGroupVersion", "TemplateLocalVersion", "TemplateVersion"}
"""Versions of tables that everybody can look up: shifted, they would give away by how much."""

_EQUIPMENT = {"Manufacturer", "ManufacturerModelName", "SoftwareVersions"}
_KEPT_TEXTS = _EQUIPMENT | {
    *("CodeMeaning", "CodeValue", "LongCodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "URNCodeValue"),
    *("ConvolutionKernel", "FilterType", "ImagedNucleus", "ReceiveCoilName", "SequenceName", "TransmitCoilName"),
    *("LUTExplanation", "ModalityLUTType", "RescaleType", "WindowCenterWidthExplanation"),
}
"""What is said in short texts about equipment, acquisition, codes and intensities, and not about people."""

_KEPT_BINARY = {"ICCProfile", "PixelData", "WaveformData", "WaveformPaddingValue", "ChannelMinimumValue", "ChannelMaximumValue"}
"""Bytes (VR OB) without a table: these are samples of a signal, or how to show them."""

_NAMES_A_CLASS = re.compile(r"(Class|Classes|CodingScheme|Context|Mapping|MappingResource|TransferSyntax)UID$")
"""UIDs that name a kind of thing, and not a thing."""

_IDENTIFIERS = (
    "PatientBirthDate",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "AccessionNumber",
    "ReferringPhysicianName",
)
"""Direct identifiers: a study that says one is not de-identified, whatever it is marked as."""

_NUMBERS = ("PatientID", "OtherPatientIDs", "AccessionNumber")
_NAMES = (
    *("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord"),
    *("OperatorsName", "RequestingPhysician", "InstitutionName"),
)


@dataclass(frozen=True)
class _Row:
    """Of Table E.1-1: the action codes of the profile and of the options."""

    basic: str
    patient: str
    device: str
    dates: str


@dataclass(frozen=True)
class _Study:
    """What cleaning a study's data sets depends on."""

    settings: DeidentificationConfig
    days: int | None
    """By how much its dates move back; None: nothing to shift by."""
    keeps_uids: bool
    keeps_dates: bool
    words: frozenset[str]
    """Names that the study itself says, lower case."""
    numbers: frozenset[str]
    """Identifiers that the study itself says, lower case."""


def deidentify(data: bytes, settings: DeidentificationConfig) -> Deidentified:
    """The same study with pseudonyms in place of identity; what the settings retain, and the image, stay.

    A study that is marked as de-identified is cleaned as well, but keeps its pseudonyms, and dates that it says are modified.
    ``review`` may hold ``text_blanked``, ``not_screened`` (looked at by nobody) and ``recognizable_visual_features``.

    Raises:
        Rejected: a code of :func:`domain_medical.dicom.read` or of the pixels; ``identified`` where the file says that
            identity is burned into its pixels, and no text is found or looked for; ``no_pixels`` for a DICOMDIR.
    """
    study = read(data)
    if text(study.file_meta, "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise Rejected("no_pixels", "is an index of files (DICOMDIR), which names them: de-identify the files")
    try:
        boxes, is_screened, review = _clean_pixels(study, settings)
        return Deidentified(_deidentified(study, settings, is_screened=is_screened), boxes, review)
    except Rejected:
        raise
    except Exception as error:
        raise Rejected("undecodable", f"the data set cannot be de-identified ({type(error).__name__})") from None


def require_deidentified(data: bytes) -> None:
    """Accept only studies that are marked as de-identified and hold no direct identifier. Pixels are not looked at.

    PatientName may repeat PatientID, which is a pseudonym then. Messages name elements, never their values.

    Raises:
        Rejected: ``identified``, or a code of :func:`domain_medical.dicom.read`.
    """
    study = read(data)
    if text(study, "PatientIdentityRemoved") != "YES":
        raise Rejected("identified", "de-identify the study before sending it (PatientIdentityRemoved is not YES)")
    for keyword in _IDENTIFIERS:
        if _values(study, keyword):
            raise Rejected("identified", f"de-identify the study before sending it ({keyword} is not empty)")
    if (name := _values(study, "PatientName")) and name != _values(study, "PatientID"):
        raise Rejected("identified", "de-identify the study before sending it (PatientName is neither empty nor PatientID)")
    if text(study, "BurnedInAnnotation") == "YES":
        raise Rejected("identified", "de-identify the study before sending it (BurnedInAnnotation is YES)")


def _values(study: Dataset, keyword: str) -> list[str]:
    """All values of an element that say something; an element that cannot be read is not taken for an empty one."""
    try:
        value = study.get(keyword)
        values = value if isinstance(value, MultiValue) else [value]
        return [said for item in values if item is not None and (said := str(item).strip())]
    except Exception as error:
        raise Rejected("undecodable", f"{keyword} cannot be read ({type(error).__name__})") from None


def _clean_pixels(study: FileDataset, settings: DeidentificationConfig) -> tuple[tuple[Box, ...], bool, tuple[str, ...]]:
    """What was blanked, whether the pixels count as clean, and what to review."""
    review = ("recognizable_visual_features",) if text(study, "RecognizableVisualFeatures") == "YES" else ()
    declared = text(study, "BurnedInAnnotation")
    if not any(keyword in study for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        return (), False, review
    if _is_screened_here(study):
        return (), True, review
    is_wanted = settings.pixels == "screen" or (settings.pixels == "declared" and declared != "NO")
    screen = is_wanted and burned_in.can_screen()
    if declared == "YES" and not screen:
        cure = burned_in.CURE if is_wanted else "deidentification.pixels: screen looks for it"
        raise Rejected("identified", f"identity may be burned into the pixels (BurnedInAnnotation is YES); {cure}")
    boxes = burned_in.clean(study, screen=screen)
    if declared == "YES" and not boxes:
        raise Rejected("identified", "BurnedInAnnotation is YES, but no text is found in the pixels: look at them")
    notes = ("text_blanked",) if boxes else ("not_screened",) if is_wanted and not screen else ()
    return boxes, screen, notes + review


def _is_marked(study: Dataset) -> bool:
    return text(study, "PatientIdentityRemoved") == "YES"


def _is_screened_here(study: Dataset) -> bool:
    """Whether the file has every mark that :func:`_mark` leaves on searched pixels; what others did to theirs is not known."""
    codes = {text(item, "CodeValue") for item in study.get("DeidentificationMethodCodeSequence") or []}
    is_cleaned = _is_marked(study) and "113101" in codes and text(study, "BurnedInAnnotation") == "NO"
    return is_cleaned and _values(study, "DeidentificationMethod") == _methods(is_screened=True)


def _methods(*, is_screened: bool) -> list[str]:
    return [
        f"PS3.15 {EDITION} Annex E, options in the code sequence",
        "Keyed pseudonyms for patient and UIDs",
        "Pixels screened for text" if is_screened else "Pixels not screened for text",
    ]


def _deidentified(study: FileDataset, settings: DeidentificationConfig, *, is_screened: bool) -> bytes:
    patient, _ = identity(study)
    _clean(study, _about(study, settings))
    study.PatientID = study.PatientName = patient
    _mark(study, settings, is_screened=is_screened)
    meta = FileMetaDataset()  # the old one and the preamble may name the sender
    meta.TransferSyntaxUID = study.file_meta.TransferSyntaxUID
    study.file_meta, study.preamble = meta, None
    target = BytesIO()
    dcmwrite(target, study, enforce_file_format=True)
    return target.getvalue()


def _about(study: Dataset, settings: DeidentificationConfig) -> _Study:
    is_marked = _is_marked(study)
    whose = text(study, "PatientID") or text(study, "StudyInstanceUID")
    names, numbers = (() if is_marked else _NAMES), (() if is_marked else _NUMBERS)  # of pseudonyms nothing is to be feared
    return _Study(
        settings=settings,
        days=1 + int(pseudonym(whose, "dates"), 16) % 3650 if whose else None,
        keeps_uids=is_marked,
        keeps_dates=is_marked and text(study, "LongitudinalTemporalInformationModified") in {"MODIFIED", "REMOVED"},
        words=frozenset(word for name in names for value in _values(study, name) for word in _words(value) if len(word) > 2),
        numbers=frozenset(value.casefold() for name in numbers for value in _values(study, name) if len(value) > 3),
    )


def _words(value: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", value.casefold())


def _mark(study: Dataset, settings: DeidentificationConfig, *, is_screened: bool) -> None:
    """PS3.15 E.2 and E.3: the file says what was done to it."""
    done = {
        "113100": True,
        "113101": is_screened,
        "113107": settings.dates == "shift",
        "113108": settings.patient_characteristics,
        "113109": settings.device,
    }
    study.PatientIdentityRemoved = "YES"
    study.DeidentificationMethod = _methods(is_screened=is_screened)
    study.DeidentificationMethodCodeSequence = [_code(code) for code, is_done in done.items() if is_done]
    study.LongitudinalTemporalInformationModified = "MODIFIED" if settings.dates == "shift" else "REMOVED"
    if is_screened:
        study.BurnedInAnnotation = "NO"


def _code(value: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", CODES[value]
    return code


@cache
def _table() -> dict[int, _Row]:
    """Table E.1-1 by tag."""
    with (files("domain_medical") / "ps3_15.csv").open(encoding="ascii") as file:
        return {
            int(row["tag"], 16): _Row(row["basic"], row["patient"], row["device"], row["dates"]) for row in csv.DictReader(file)
        }


def _clean(items: Dataset, about: _Study, *, dummies: bool = False) -> None:
    """Clean a data set, and those nested in it, in place. ``dummies``: whatever would stay becomes a dummy."""
    for element in list(items):
        action = _action(element, about)
        if dummies and action != "remove" and element.VR not in {"SQ", "UI"}:
            action = "dummy"
        _apply(action, items, element, about, dummies=dummies)


def _action(element: DataElement, about: _Study) -> Action:
    tag, settings = element.tag, about.settings
    if tag.is_private or tag.group >> 8 in {0x50, 0x60} or tag.element == 0 or element.VR == "UN" or not element.keyword:
        return "remove"
    row = _table().get(tag)
    if element.VR in _TIMES and (row is None or row.dates):
        return _action_on_times(element, row, about)
    if row is None:
        return _unlisted(element)
    is_kept = (settings.device and row.device == "K") or (settings.patient_characteristics and row.patient == "K")
    return "keep" if is_kept else _ACTIONS[row.basic]


def _action_on_times(element: DataElement, row: _Row | None, about: _Study) -> Action:
    """The shift wins over Retain Device Identity, which would leave dates of calibration as they are."""
    if about.settings.dates == "shift" and element.keyword not in _PUBLIC_DATES:
        return "keep" if about.keeps_dates else "shift"
    return _ACTIONS[row.basic] if row else "empty"


def _unlisted(element: DataElement) -> Action:
    """What becomes of an attribute that Table E.1-1 does not list."""
    match element.VR:
        case "UI":
            return "keep" if _NAMES_A_CLASS.search(element.keyword) else "remap"
        case "OB":
            return "keep" if element.keyword in _KEPT_BINARY else "remove"
        case vr if vr in _TEXTS:
            return "keep" if element.keyword in _KEPT_TEXTS else "empty"
        case _:
            return "keep"


def _apply(action: Action, items: Dataset, element: DataElement, about: _Study, *, dummies: bool) -> None:
    match action:
        case "remove":
            del items[element.tag]
        case "empty":
            element.value = [] if element.VR == "SQ" else None
        case _ if element.VR == "SQ":
            for item in element.value:
                _clean(item, about, dummies=dummies or action == "dummy")
        case "dummy":
            if not element.is_empty:
                element.value = _DUMMIES.get(element.VR)
        case "remap":
            if not about.keeps_uids:
                element.value = [_remapped(uid) for uid in _several(element)]
        case "shift":
            element.value = [moved for value in _several(element) if (moved := _shifted(value, element.VR, about.days))]
        case "keep" | "clean":
            _keep(element, about)


def _several(element: DataElement) -> list[str]:
    value = element.value
    return [] if not value else [str(item) for item in value] if isinstance(value, MultiValue) else [str(value)]


def _keep(element: DataElement, about: _Study) -> None:
    """Leave an element as it is, but for ages above 89, and for texts that say what the study says of its people."""
    if element.VR == "AS":
        element.value = [_capped(age) for age in _several(element) if re.fullmatch(r"\d{3}[DWMY]", age)]
    elif (element.VR in _TEXTS or element.VR == "CS") and any(_tells(value, element, about) for value in _several(element)):
        element.value = DUMMY


def _tells(value: str, element: DataElement, about: _Study) -> bool:
    """Names are looked for in free text alone: there are people called Hand and Philips."""
    if any(number in value.casefold() for number in about.numbers):
        return True
    return element.VR != "CS" and element.keyword not in _EQUIPMENT and not about.words.isdisjoint(_words(value))


def _capped(age: str) -> str:
    """Ages above 89 years are one group (45 CFR 164.514(b)(2)(i)(C))."""
    return "090Y" if age[3] == "Y" and int(age[:3]) > 89 else age


def _remapped(uid: str) -> str:
    """UIDs that the standard defines stay: they name classes and syntaxes, not instances."""
    return uid if uid.startswith("1.2.840.10008.") else remapped_uid(uid)


def _shifted(value: str, vr: str, days: int | None) -> str:
    """A date or date-time moved back by whole days; a time of day stays. Empty where it is none, or cannot be moved."""
    if vr == "TM":
        return value if re.fullmatch(r"\d\d(:?\d\d){0,2}(\.\d{1,6})?", value) else ""
    rest = r"(\d{0,6}(?:\.\d{1,6})?(?:[+-]\d{4})?)" if vr == "DT" else "()"
    found = re.fullmatch(rf"(\d{{4}})\.?(\d\d)\.?(\d\d){rest}", value)
    if not found or days is None:
        return ""
    try:
        moved = date(int(found[1]), int(found[2]), int(found[3])) - timedelta(days)
    except (ValueError, OverflowError):
        return ""
    return moved.isoformat().replace("-", "") + found[4]
