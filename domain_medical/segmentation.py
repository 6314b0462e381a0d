"""Masks as DICOM: Segmentation objects (PS3.3 A.51) that belong to the study of the image that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription, segread
from numpy.typing import NDArray
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage

from cv_factory_ops.errors import Rejected
from domain_medical.dicom import remapped_uid, silence_warnings, text
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

DESCRIPTION = "Segmentation by a model"
REQUIRED = (
    *("PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
    "ReferringPhysicianName",
)
"""Attributes of type 2 of the modules Patient and General Study (PS3.3 C.7.1.1, C.7.2.1): there, and maybe empty."""


def segmentation(data: bytes, mask: NDArray[np.uint8], labels: Sequence[str], software: Sequence[str]) -> bytes:
    """A DICOM Segmentation (binary, a frame for each class that the mask shows) of a study of one frame.

    ``mask``: (rows, columns) of the image, 0 or the number of a class; ``labels`` name the classes from 1 on, ASCII. Patient,
    study, dates and de-identification are the study's, as of :func:`domain_medical.secondary_capture.secondary_capture`. The
    same arguments give the same file.

    Raises:
        Rejected: ``identified``, ``no_uid``, ``frames`` (there are several), ``mask_shape``, or a code of
            :func:`domain_medical.dicom.read`.
    """
    study = referable(data, *REFERENCE)
    shape = (int(study.Rows), int(study.Columns))
    if int(study.get("NumberOfFrames") or 1) != 1:
        raise Rejected("frames", "has several frames; a segmentation can be of one")
    if mask.shape != shape:
        raise Rejected("mask_shape", f"the mask has {mask.shape} pixels, the image {shape}")
    digest = hashlib.sha256(np.ascontiguousarray(mask).data).hexdigest()
    name = "\n".join([text(study, "SOPInstanceUID") or "", *labels, *software, digest])
    found = Segmentation(
        source_images=[_source(study)],
        pixel_array=mask,
        segmentation_type="BINARY",
        segment_descriptions=[_described(number, label, software) for number, label in enumerate(labels, 1)],
        series_instance_uid=uid(f"series\n{name}"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid(f"instance\n{name}"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=tuple(version[:64] for version in software),
        device_serial_number=MANUFACTURER,
        content_description=DESCRIPTION,
        content_label="SEGMENTATION",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=bool(mask.any()),
    )
    belong(found, study)
    date_content(found, study)
    found.PatientOrientation = study.get("PatientOrientation")
    for item in (*found.DimensionOrganizationSequence, *found.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid(f"dimensions\n{name}")
    return written(found)


def _source(study: FileDataset) -> Dataset:
    """The study as highdicom wants it: with all that a study must tell, if only that it is unknown, and no name to warn of."""
    source = Dataset()
    source.file_meta = study.file_meta
    source.update(study)
    for keyword in REQUIRED:
        source[keyword] = study[keyword] if keyword in study else DataElement(keyword, dictionary_VR(keyword), None)
    source.PatientName = None
    return source


def _described(number: int, label: str, software: Sequence[str]) -> SegmentDescription:
    """What a class is, is the project's own word: its label, with the general code for a region (no standard one is known)."""
    return SegmentDescription(
        segment_number=number,
        segment_label=label[:64],
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=MANUFACTURER, family=codes.DCM.ArtificialIntelligence, version=software[0][:64]
        ),
    )


def read_mask(data: bytes, labels: Sequence[str], instance: str) -> NDArray[np.uint8]:
    """(rows, columns) each pixel's class as an index into ``labels``, 0 of none, of a DICOM Segmentation of one image.

    Segments are numbered as their maker liked: their labels say which class they are. The image is compared with ``instance``
    by its UID or by the pseudonym of that, as either may be de-identified; not at all where ``instance`` is empty.

    Raises:
        Rejected: ``undecodable``, ``frames``: it is of several images; ``mask_image``: of another; ``mask_class``: a segment's
            label is none of ``labels``; ``overlap``: segments share pixels.
    """
    silence_warnings()
    try:
        if dcmread(BytesIO(data), stop_before_pixels=True).SOPClassUID != SegmentationStorage:
            raise ValueError
        found = segread(BytesIO(data))
        sources = found.get_source_image_uids()
    except Exception:
        raise Rejected("undecodable", "is not a usable DICOM Segmentation") from None
    if len(sources) != 1:
        raise Rejected("frames", f"is a segmentation of {len(sources)} images; allowed is one")
    if instance and instance not in (sources[0][2], remapped_uid(sources[0][2])):
        raise Rejected("mask_image", "is a segmentation of another image")
    names = [label[:64] for label in labels]  # as many characters as a SegmentLabel holds
    segments = {number: found.get_segment_description(number).segment_label for number in found.segment_numbers}
    if not set(segments.values()) <= set(names):
        raise Rejected("mask_class", f"has a segment whose label is none of: {', '.join(labels)}")
    try:
        masks = found.get_pixels_by_source_instance(
            [sources[0][2]], combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
        )
    except (RuntimeError, ValueError):
        raise Rejected("overlap", "has segments that share pixels, or shares of them; a mask gives each one class") from None
    classes = np.zeros(max(segments) + 1, np.uint8)
    classes[list(segments)] = [names.index(label) for label in segments.values()]
    return np.asarray(classes[masks[0]], np.uint8)
