"""Answers as DICOM: Comprehensive SR documents (PS3.3 A.35.3), by template TID 1500 (PS3.16), of the study they are about."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.dataset import FileDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from cv_factory_ops.errors import Rejected
from domain_medical.dicom import number, text
from domain_medical.secondary_capture import (
    MANUFACTURER,
    REFERENCE,
    SERIES_NUMBER,
    belong,
    date_content,
    referable,
    uid,
    written,
)
from domain_medical.segmentation import REQUIRED

SCHEME = "99CVF"
"""Of codes for what has none in the standard: a project's labels (PS3.16 section 8.2: private designators begin with 99)."""
PROBABILITY = codes.DCM.Probability
ABSTAINED = CodedConcept("uncertain", SCHEME, "Less certain than the model may be: a person should decide")
_TEXT, _CODE = 64, 16
"""Characters of the VRs LO and SH (PS3.5 section 6.2)."""


def structured_report(
    data: bytes,
    label: str,
    scores: Mapping[str, float],
    abstained: bool,
    model: str,
    software: Sequence[str],
    comment: str = "",
) -> bytes:
    """A DICOM SR document that says what a model found in an image and how probable each of its labels is.

    The finding is ``label``; ``scores``, 0..1, are of all labels, ``abstained`` says that a person should decide, and
    ``comment`` is a text item (121106, DCM, "Comment") of the finding. The model is named as observer (a device) and as
    algorithm: by its name, and by ``software``, versions and digests. The document is unverified and preliminary. Patient,
    study, dates and de-identification are the study's, as of
    :func:`domain_medical.secondary_capture.secondary_capture`; the same arguments give the same file.

    Raises:
        Rejected: ``identified``, ``no_uid``, ``sop_class`` (one that highdicom does not know), or a code of
            :func:`domain_medical.dicom.read`.
    """
    study = referable(data, *REFERENCE)
    answers = [f"{name}={score}" for name, score in scores.items()]
    said = [label, *answers, str(abstained), model, *software, *([comment] if comment else [])]
    name = "\n".join(["report", text(study, "SOPInstanceUID") or "", *said])
    try:
        report = ComprehensiveSR(
            evidence=[_evidence(study)],
            content=_content(study, label, scores, abstained, model, software, comment, name)[0],
            series_instance_uid=uid(f"series\n{name}"),
            series_number=SERIES_NUMBER,
            sop_instance_uid=uid(f"instance\n{name}"),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=tuple(version[:_TEXT] for version in software),
            device_serial_number=MANUFACTURER,
            series_description="Answer of a model",
            is_complete=True,
            coding_schemes=[
                CodingSchemeIdentificationItem(SCHEME, "Labels of a project", responsible_organization=MANUFACTURER)
            ],
            specific_character_set="ISO_IR 192",
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
    except KeyError:
        raise Rejected("sop_class", "is of a SOP class that no report can be made for") from None
    belong(report, study)
    date_content(report, study)
    return written(report)


def _evidence(study: FileDataset) -> Dataset:
    """What highdicom refers to; the rest it would copy, whatever it is, so patient and study come from :func:`belong`."""
    evidence = Dataset()
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID"):
        setattr(evidence, keyword, text(study, keyword))
    for keyword in ("PatientName", *REQUIRED):
        setattr(evidence, keyword, None)
    return evidence


def _content(
    study: FileDataset,
    label: str,
    scores: Mapping[str, float],
    abstained: bool,
    model: str,
    software: Sequence[str],
    comment: str,
    name: str,
) -> MeasurementReport:
    device = DeviceObserverIdentifyingAttributes(
        uid=uid("\n".join([model, *software])), name=model, manufacturer_name=MANUFACTURER, model_name=model
    )
    finding = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=uid(f"finding\n{name}"), identifier=label),
        finding_type=_coded(label),
        algorithm_id=AlgorithmIdentification(
            name=model, version=" ".join(software), family=codes.DCM.ArtificialIntelligence, manufacturer=MANUFACTURER
        ),
        source_images=[_source(study)],
        measurements=[
            Measurement(PROBABILITY if given == label else _coded(f"Probability of {given}"), score, codes.UCUM.NoUnits)
            for given, score in sorted(scores.items(), key=lambda item: item[0] != label)
        ],
        qualitative_evaluations=[QualitativeEvaluation(codes.DCM.CertaintyOfFinding, ABSTAINED)] if abstained else [],
    )
    if comment:
        said = TextContentItem(codes.DCM.Comment, comment, RelationshipTypeValues.CONTAINS)
        finding[0].ContentSequence.append(said)
    return MeasurementReport(
        observation_context=ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device)),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[finding],
    )


def _coded(meaning: str) -> CodedConcept:
    """A project's own word; its code is the word itself where that is short and ASCII."""
    is_plain = len(meaning) <= _CODE and meaning.isascii() and "\\" not in meaning
    value = meaning if is_plain else hashlib.sha256(meaning.encode()).hexdigest()[:_CODE]
    return CodedConcept(value, SCHEME, meaning.replace("\\", "/")[:_TEXT])


def _source(study: FileDataset) -> SourceImageForMeasurementGroup:
    """Of several frames it is the middle one that is answered."""
    frames = int(number(study, "NumberOfFrames") or 1)
    middle = [frames // 2 + 1] if frames > 1 else None
    return SourceImageForMeasurementGroup(text(study, "SOPClassUID") or "", text(study, "SOPInstanceUID") or "", middle)
