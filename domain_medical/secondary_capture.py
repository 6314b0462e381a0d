"""Pictures about a study as DICOM: Secondary Capture images (PS3.3 A.8) that belong to the same patient and study."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from cv_factory_ops.errors import Rejected
from domain_medical.deidentify import require_deidentified
from domain_medical.dicom import number, read, silence_warnings, text

MANUFACTURER = "CV Factory"
SERIES_NUMBER = 9000
"""Far above those that modalities give."""
_TEXT, _LONG_TEXT = 64, 1024
"""Characters of the VRs LO and ST (PS3.5 section 6.2)."""

_STUDY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge"),
    *("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"),
    "LongitudinalTemporalInformationModified",
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
"""What the modules Patient and General Study say: the same in all images of a study."""

_IMAGE = (
    *("BodyPartExamined", "Laterality", "PatientOrientation", "BurnedInAnnotation", "RecognizableVisualFeatures"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
"""What holds for a picture of an image as for the image."""

_OF_TODAY = (
    *("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime"),
    *("DateOfSecondaryCapture", "TimeOfSecondaryCapture"),
)


REFERENCE = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
"""What a reference to an image names."""


def referable(data: bytes, *needed: str) -> FileDataset:
    """A de-identified study that others can refer to by these UIDs.

    Raises:
        Rejected: ``identified``, ``no_uid``, or a code of :func:`domain_medical.dicom.read`.
    """
    require_deidentified(data)
    study = read(data)
    for keyword in needed:
        if not text(study, keyword):
            raise Rejected("no_uid", f"{keyword} is missing: nothing can refer to the study")
    return study


def date_content(document: Dataset, study: Dataset) -> None:
    """ContentDate and ContentTime, where they must not be empty (type 1), as the study has them."""
    document.ContentDate = text(study, "ContentDate") or text(study, "StudyDate") or "19000101"
    document.ContentTime = text(study, "ContentTime") or text(study, "StudyTime") or "000000"


def secondary_capture(data: bytes, overlay: NDArray[np.uint8], description: str, software: Sequence[str]) -> bytes:
    """A DICOM file with a picture (rows, columns, 3), in a series of its own of the study that it was made from.

    Patient, study and de-identification are the study's; it refers to the study's image as its source. Its dates are those of
    the study: today's would tell by how much the study's were moved. The same arguments give the same file. ``description``
    goes into DerivationDescription, ``software`` (versions, digests) into SoftwareVersions; ASCII.

    Raises:
        Rejected: ``identified``, ``no_uid``, or a code of :func:`domain_medical.dicom.read`.
    """
    study = referable(data, "StudyInstanceUID", "SOPClassUID", "SOPInstanceUID")
    name = "\n".join([text(study, "SOPInstanceUID") or "", description, *software])
    capture = SCImage(
        overlay,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=text(study, "StudyInstanceUID") or "",
        series_instance_uid=uid(f"series\n{name}"),
        series_number=SERIES_NUMBER,
        series_description="Explanation of a model's answer",
        sop_instance_uid=uid(f"instance\n{name}"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=tuple(version[:_TEXT] for version in software),
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    belong(capture, study)
    capture.PatientOrientation = capture.Laterality = None
    for keyword in _IMAGE:
        if keyword in study:
            capture[keyword] = study[keyword]
    capture.DerivationDescription = description[:_LONG_TEXT]
    capture.SourceImageSequence = [_source(study)]
    return written(capture)


def belong(made: Dataset, study: FileDataset) -> None:
    """What was made of a study is of its patient and of its day: today's would tell by how much its dates were moved."""
    for keyword in _OF_TODAY:
        if keyword in made:
            del made[keyword]
    for equipment in made.ContributingEquipmentSequence:
        equipment.pop("ContributionDateTime", None)
    for keyword in _STUDY:
        if keyword in study:
            made[keyword] = study[keyword]


def _source(study: FileDataset) -> Dataset:
    """PS3.3 C.7.6.1.1.4; of several frames it is the middle one that is answered."""
    source, purpose = Dataset(), Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = study.SOPClassUID, study.SOPInstanceUID
    if (frames := number(study, "NumberOfFrames") or 1) > 1:
        source.ReferencedFrameNumber = int(frames) // 2 + 1
    code = codes.DCM.SourceImageForImageProcessingOperation
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = code.value, code.scheme_designator, code.meaning
    source.PurposeOfReferenceCodeSequence = [purpose]
    return source


def uid(name: str) -> str:
    """Below the root 2.25, for UIDs made of a UUID (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def written(made: Dataset) -> bytes:
    """As a file of PS3.10."""
    silence_warnings()
    target = BytesIO()
    dcmwrite(target, made, enforce_file_format=True)
    return target.getvalue()
