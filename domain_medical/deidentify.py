"""Removal of identity from DICOM files: names, identifiers, dates, free text, private elements.

What it does, and what it does not do, stands in DeidentificationMethod of each file. It is stricter than PS3.15 Annex E in
places (every date and every text that is not known to be harmless goes) and weaker in others (pixels are not cleaned), so
it does not claim its profile.
"""

from __future__ import annotations

from io import BytesIO

from pydicom import DataElement, Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.multival import MultiValue

from cv_factory_ops.errors import Rejected
from domain_medical.dicom import identity, read, remapped_uid, text

METHOD = [
    "Identifiers, dates, times, text, private elements removed",
    "Patient ID and UIDs replaced by keyed pseudonyms",
    "Pixels not cleaned; not a profile of PS3.15 Annex E",
]
"""DeidentificationMethod (0012,0063), of VR LO: no value may be longer than 64 characters."""

_EMPTIED_VRS = {"AE", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT"}
"""Names, dates, times, network names and text."""

_KEPT_TEXTS = {
    "CodeMeaning",
    "CodeValue",
    "CodingSchemeDesignator",
    "CodingSchemeVersion",
    "ConvolutionKernel",
    "LUTExplanation",
    "Manufacturer",
    "ManufacturerModelName",
    "ModalityLUTType",
    "RescaleType",
    "SoftwareVersions",
    "WindowCenterWidthExplanation",
}
"""What is said in short texts about equipment, codes and intensities, and not about people."""

_REMOVED = {
    "EncapsulatedDocument",
    "IconImageSequence",
    "InstitutionCodeSequence",
    "OriginalAttributesSequence",
    "PatientInsurancePlanCodeSequence",
    "PersonIdentificationCodeSequence",
    "ReferencedPatientPhotoSequence",
}
"""Identity in codes, in pictures beside the image, and in the values before earlier changes."""


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


def deidentify(data: bytes) -> bytes:
    """The same study with pseudonyms in place of identity; age, sex, acquisition and pixels stay.

    A study that is marked as de-identified is cleaned as well, but keeps its pseudonyms.

    Raises:
        Rejected: ``not_dicom``, ``truncated``, ``undecodable``, or ``identified`` where the file says that identity is
            burned into its pixels, which this does not clean.
    """
    study = read(data)
    if text(study, "BurnedInAnnotation") == "YES":
        raise Rejected("identified", "identity may be burned into the pixels (BurnedInAnnotation is YES); clean them first")
    try:
        return _deidentified(study)
    except Exception as error:
        raise Rejected("undecodable", f"the data set cannot be de-identified ({type(error).__name__})") from None


def require_deidentified(data: bytes) -> None:
    """Accept only studies that are marked as de-identified and hold no direct identifier.

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


def _deidentified(study: Dataset) -> bytes:
    patient, _ = identity(study)
    _clean(study, keep_uids=text(study, "PatientIdentityRemoved") == "YES")
    study.PatientID = study.PatientName = patient
    study.PatientIdentityRemoved = "YES"
    study.DeidentificationMethod = METHOD
    meta = FileMetaDataset()  # the old one and the preamble may name the sender
    meta.TransferSyntaxUID = study.file_meta.TransferSyntaxUID
    study.file_meta, study.preamble = meta, None
    target = BytesIO()
    dcmwrite(target, study, enforce_file_format=True)
    return target.getvalue()


def _clean(study: Dataset, *, keep_uids: bool) -> None:
    """Clean a data set, and those nested in it, in place."""
    for element in list(study):
        if _is_removed(element):
            del study[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                _clean(item, keep_uids=keep_uids)
        elif element.VR in _EMPTIED_VRS and element.keyword not in _KEPT_TEXTS:
            element.value = None
        elif element.VR == "UI" and element.value and not keep_uids:
            uids = [element.value] if isinstance(element.value, str) else element.value
            element.value = [_remapped(uid) for uid in uids]


def _is_removed(element: DataElement) -> bool:
    """Private and unknown elements, curves (50xx) and overlays (60xx) that may be writing, and the list above."""
    tag = element.tag
    return tag.is_private or tag.group >> 8 in {0x50, 0x60} or element.VR == "UN" or element.keyword in _REMOVED


def _remapped(uid: str) -> str:
    """UIDs that the standard defines stay: they name classes and syntaxes, not instances."""
    return uid if uid.startswith("1.2.840.10008.") else remapped_uid(uid)
