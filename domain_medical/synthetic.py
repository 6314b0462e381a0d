"""Phantom chest X-rays: valid DICOM (DX and CR image storage) of people who do not exist.

Dark lungs in bright tissue, with heart, spine, diaphragm, ribs and vessels; patients differ in anatomy, images in exposure
and position. Of the project's labels the first is the healthy one; each other adds an opacity of its own shape to a lung.
The same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Scanner:
    """How an X-ray system shows the same patient."""

    manufacturer: str
    model_name: str
    modality: Literal["DX", "CR"]
    photometric: Literal["MONOCHROME1", "MONOCHROME2"]
    bits_stored: tuple[int, ...]
    """Bits that its images may have; one is drawn an image. 8 are stored in one byte, more in two."""
    detector_mm: float
    """Side of the square field of view, in mm."""
    kvp: float
    noise: float
    """Standard deviation of the detector's noise, in intensities of 0..1."""
    blur: float = 0.0
    """Width of its point spread, as a share of the image's side."""
    gamma: float = 1.0
    contrast: float = 1.0
    rescale: tuple[float, float] | None = None
    """Slope and intercept from stored to modality values (CR only: DX fixes them to 1 and 0)."""
    window: tuple[float, float] | None = None
    """Lowest and highest intensity shown, as a share of the modality range; the image is stored within it."""


SCANNERS = (
    Scanner(
        manufacturer="Aurora Phantom Systems",
        model_name="DX-1200",
        modality="DX",
        photometric="MONOCHROME2",
        bits_stored=(12, 12, 12, 10),
        detector_mm=430.0,
        kvp=117.0,
        noise=0.02,
        window=(0.1, 0.9),
    ),
    Scanner(
        manufacturer="Borealis Imaging",
        model_name="CR-Classic",
        modality="CR",
        photometric="MONOCHROME1",
        bits_stored=(16, 16, 16, 8),
        detector_mm=354.0,
        kvp=102.0,
        noise=0.035,
        blur=0.004,
        gamma=1.1,
        rescale=(0.5, -100.0),
    ),
)
"""The two ordinary systems."""

SHIFTED_SCANNER = Scanner(
    manufacturer="Cinder Radiology",
    model_name="Mobile-3",
    modality="CR",
    photometric="MONOCHROME1",
    bits_stored=(10,),
    detector_mm=400.0,
    kvp=85.0,
    noise=0.09,
    blur=0.018,
    gamma=1.7,
    contrast=0.65,
)
"""A mobile system that the ordinary data has never seen: blurred, noisy, darker and flatter."""


def generate(
    directory: Path,
    *,
    patients: int,
    image_size: int,
    seed: int,
    labels: Sequence[str],
    scanners: Sequence[Scanner] = SCANNERS,
    masks: bool = False,
    boxes: bool = False,
) -> None:
    """Write one or two ``.dcm`` files a patient and ``labels.csv`` (columns ``file``, ``label``) into a directory; with
    ``masks`` also ``masks/<name>.png``, the class of each pixel: that of the opacity where it has half its greatest strength,
    else 0; with ``boxes`` also ``boxes.json``, in the format of COCO: the box around these pixels.

    Labels take turns, so each has its share of the patients.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if masks:
        (directory / "masks").mkdir(exist_ok=True)
    with (directory / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "label"])
        annotations = _Annotations(labels)
        for number in range(patients):
            patient = _Patient(seed, number, number % len(labels), image_size)
            for view in range(1 + int(patient.rng.random() < 0.4)):
                name = f"{number:05d}_{view}.dcm"
                study, mask = patient.image(view, scanners)
                (directory / name).write_bytes(study)
                if masks:
                    (directory / "masks" / f"{number:05d}_{view}.png").write_bytes(cv2.imencode(".png", mask)[1].tobytes())
                annotations.add(name, mask)
                table.writerow([name, labels[patient.kind]])
    if boxes:
        (directory / "boxes.json").write_text(json.dumps(annotations.content), encoding="utf-8")


class _Annotations:
    """In the format of COCO; the first label is none of its categories."""

    def __init__(self, labels: Sequence[str]) -> None:
        categories = [{"id": number, "name": label} for number, label in enumerate(labels) if number]
        self.content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def add(self, name: str, mask: NDArray[np.uint8]) -> None:
        """An image with the box of its finding, if it has one."""
        images, annotations = self.content["images"], self.content["annotations"]
        images.append({"id": len(images) + 1, "file_name": name, "width": mask.shape[1], "height": mask.shape[0]})
        if mask.any():
            left, top, width, height = cv2.boundingRect(mask)
            box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
            found = {"id": len(annotations) + 1, "image_id": len(images), "category_id": int(mask.max())}
            annotations.append(found | box)


def studies(
    count: int, *, image_size: int, seed: int, labels: Sequence[str], scanners: Sequence[Scanner] = SCANNERS
) -> Iterator[tuple[bytes, str]]:
    """Studies as a hospital would send them, one a patient, each with its true label."""
    for number in range(count):
        patient = _Patient(seed, number, number % len(labels), image_size)
        yield patient.study(0, scanners), labels[patient.kind]


class _Patient:
    """One patient: the anatomy and the finding stay, position and exposure differ from image to image."""

    def __init__(self, seed: int, number: int, kind: int, size: int) -> None:
        self.rng = np.random.default_rng([seed, number])
        self.seed, self.number, self.kind, self.size = seed, number, kind, size
        self.age = int(self.rng.integers(18, 90))
        self.sex = str(self.rng.choice(["F", "M"]))
        self.anatomy = self.rng.uniform(-1, 1, 8).tolist()
        self.finding = self.rng.uniform(0, 1, 6).tolist()

    def study(self, view: int, scanners: Sequence[Scanner]) -> bytes:
        """A DICOM Part 10 file."""
        return self.image(view, scanners)[0]

    def image(self, view: int, scanners: Sequence[Scanner]) -> tuple[bytes, NDArray[np.uint8]]:
        """A DICOM Part 10 file, and its mask (size, size): the number of the finding where it is, else 0."""
        rng = np.random.default_rng([self.seed, self.number, view])
        scanner = scanners[int(rng.integers(len(scanners)))]
        bits = int(rng.choice(scanner.bits_stored))
        chest, finding = _chest(self, rng)
        mask = self.kind * (finding > max(finding.max() / 2, 1e-6)).astype(np.uint8)
        return _file(self, view, scanner, bits, _acquire(chest, scanner, rng)), mask


def _chest(patient: _Patient, rng: Generator) -> tuple[Image, Image]:
    """(size, size) attenuation of a frontal chest, about 0 (air) .. 1 (dense), and what the finding adds to it."""
    y, x = _grid(patient.size, rng)
    wide, high, tilt, big, spine, fat, air, rib = patient.anatomy
    body = _edge(1.0 - (x / (0.93 + 0.05 * wide)) ** 4 - (y / 1.25) ** 6, 0.15)
    heart = _edge(1.0 - ((x - 0.14) / (0.33 + 0.05 * big)) ** 2 - ((y - 0.25) / (0.33 + 0.03 * big)) ** 2, 0.35)
    dome = 0.5 + 0.05 * tilt + 0.12 * x + 0.15 * (np.abs(x) - 0.42) ** 2
    radius_x, radius_y = 0.31 + 0.03 * wide, 0.58 + 0.06 * high
    lungs = sum(
        _edge(1.0 - ((x - side * 0.42 - 0.06 * side * y) / radius_x) ** 2 - ((y + 0.08) / radius_y) ** 2, 0.14)
        for side in (-1, 1)
    )
    lungs = lungs * _edge(dome - y, 0.05) * (1.0 - 0.9 * heart)
    image = 0.1 + (0.5 + 0.06 * fat) * body - (0.33 + 0.06 * air) * lungs
    image += 0.055 * np.clip(np.cos((y + 0.35 * x**2) * (19.0 + 2.0 * rib) + 3.0 * tilt), 0, 1) ** 2 * lungs
    image += 0.16 * np.exp(-((x / (0.13 + 0.02 * spine)) ** 2)) * body + 0.10 * heart
    image += _vessels(x, y, rng) * lungs
    finding: Image = np.zeros_like(x)
    if patient.kind:
        finding = _opacity(x, y, patient) * np.clip(lungs + 0.15, 0, 1)
        image += finding
    chest: Image = image
    return chest, finding


def _grid(size: int, rng: Generator) -> tuple[Image, Image]:
    """Coordinates y, x in about -1..1 (x to the viewer's right), moved, turned and scaled a little."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    scale, angle = 1 + 0.06 * rng.uniform(-1, 1), 0.05 * rng.uniform(-1, 1)
    y = axis[:, None] * scale + 0.06 * rng.uniform(-1, 1)
    x = axis[None, :] * scale + 0.06 * rng.uniform(-1, 1)
    return y + angle * x, x - angle * y


def _vessels(x: Image, y: Image, rng: Generator) -> Image:
    """Small bright spots near the hila, in the healthy too: nodules must not be told by any spot."""
    spots = np.zeros_like(x)
    for _ in range(6):
        side = 1 if rng.random() < 0.5 else -1
        center_x, center_y = side * rng.uniform(0.2, 0.55), rng.uniform(-0.45, 0.35)
        width, height = rng.uniform(0.02, 0.06), rng.uniform(0.02, 0.06)
        spots += rng.uniform(0.02, 0.08) * np.exp(-(((x - center_x) / width) ** 2) - ((y - center_y) / height) ** 2)
    return spots


def _opacity(x: Image, y: Image, patient: _Patient) -> Image:
    """The blurred blob of a class: each further class's is twice as long as the one before."""
    side, across, along, size, strength, turn = patient.finding
    center_x = (0.42 + 0.13 * (2 * across - 1)) * (1 if side < 0.5 else -1)
    center_y = -0.10 + 0.32 * (2 * along - 1)
    width, angle = 0.15 + 0.12 * size, math.pi * turn
    u = (x - center_x) * math.cos(angle) + (y - center_y) * math.sin(angle)
    v = (y - center_y) * math.cos(angle) - (x - center_x) * math.sin(angle)
    length = width * 2.0 ** (patient.kind - 1)
    blob: Image = (0.30 + 0.22 * strength) * np.exp(-((u / length) ** 2) - (v / width) ** 2)
    return blob


def _edge(signed: Image, softness: float) -> Image:
    """1 where ``signed`` is positive, 0 where negative, with a soft edge."""
    edge: Image = 1.0 / (1.0 + np.exp(np.clip(-signed / (softness / 2), -30, 30)))
    return edge


def _acquire(attenuation: Image, scanner: Scanner, rng: Generator) -> Image:
    """What the scanner shows of it: (size, size), 0 (black) .. 1 (white)."""
    exposure, gain = 0.06 * rng.uniform(-1, 1), 1 + 0.12 * rng.uniform(-1, 1)
    image = _blur(attenuation, scanner.blur * attenuation.shape[0])
    image = 0.5 + (image - 0.5) * gain * scanner.contrast + exposure
    image = np.clip(image, 0, 1) ** scanner.gamma
    image += scanner.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1)


def _blur(image: Image, sigma: float) -> Image:
    """Gaussian blur by two one-dimensional convolutions; ``sigma`` in pixels."""
    if sigma < 0.2:
        return image
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if axis == a else (0, 0) for a in (0, 1)], mode="edge")
        shifted = (np.take(padded, np.arange(i, i + image.shape[axis]), axis) for i in range(len(kernel)))
        image = sum((weight * part for weight, part in zip(kernel, shifted, strict=True)), np.zeros_like(image))
    return image


def _file(patient: _Patient, view: int, scanner: Scanner, bits: int, shown: Image) -> bytes:
    study = Dataset()
    _describe_patient(study, patient, view)
    _describe_acquisition(study, scanner, patient.size)
    _store_pixels(study, scanner, bits, shown)
    study.file_meta = FileMetaDataset()
    study.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    target = BytesIO()
    dcmwrite(target, study, enforce_file_format=True)
    return target.getvalue()


def _describe_patient(study: Dataset, patient: _Patient, view: int) -> None:
    """Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1), filled so that de-identification has work to do."""
    name = f"{patient.seed}-{patient.number:05d}"
    study.PatientName = f"PHANTOM^{patient.number:04d}"
    study.PatientID = f"PHANTOM-{name}"
    study.PatientBirthDate = f"{2024 - patient.age}0101"
    study.PatientSex = patient.sex
    study.PatientAge = f"{patient.age:03d}Y"
    study.PatientAddress = f"{patient.number} Phantom Street"
    study.StudyInstanceUID = _uid(name, "study")
    study.SeriesInstanceUID = _uid(name, "series", view)
    study.SOPInstanceUID = _uid(name, "image", view)
    study.StudyDate = study.SeriesDate = study.ContentDate = f"2024{1 + patient.number % 12:02d}15"
    study.StudyTime = study.ContentTime = "120000"
    study.AccessionNumber = f"PH{patient.number:06d}"
    study.StudyID = str(patient.number)
    study.ReferringPhysicianName = "PHANTOM^PHYSICIAN"
    study.InstitutionName = "Phantom Hospital"
    study.StudyDescription = "Phantom chest"
    study.SeriesNumber, study.InstanceNumber = view + 1, 1


def _describe_acquisition(study: Dataset, scanner: Scanner, size: int) -> None:
    """Equipment, acquisition and position modules of the CR and DX IODs (PS3.3 A.2, A.26)."""
    is_dx = scanner.modality == "DX"
    study.SOPClassUID = DigitalXRayImageStorageForPresentation if is_dx else ComputedRadiographyImageStorage
    study.Modality = scanner.modality
    study.Manufacturer, study.ManufacturerModelName = scanner.manufacturer, scanner.model_name
    study.ImageType = ["ORIGINAL", "PRIMARY", ""]
    study.BodyPartExamined, study.ViewPosition = "CHEST", "PA"
    study.PatientOrientation = ["L", "F"]
    study.KVP = scanner.kvp
    study.ImagerPixelSpacing = [round(scanner.detector_mm / size, 4)] * 2
    study.BurnedInAnnotation, study.LossyImageCompression = "NO", "00"
    if is_dx:
        study.PresentationIntentType = "FOR PRESENTATION"
        study.ImageLaterality, study.DetectorType = "U", "DIRECT"
        study.PixelIntensityRelationship, study.PixelIntensityRelationshipSign = "LOG", -1
        study.PresentationLUTShape = "INVERSE" if scanner.photometric == "MONOCHROME1" else "IDENTITY"
        study.AnatomicRegionSequence, study.AcquisitionContextSequence = [_chest_code()], []


def _chest_code() -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "51185008", "SCT", "Chest"
    return code


def _store_pixels(study: Dataset, scanner: Scanner, bits: int, shown: Image) -> None:
    """Image Pixel, Modality LUT and VOI LUT modules (PS3.3 C.7.6.3, C.11.1, C.11.2)."""
    study.Rows, study.Columns = shown.shape
    study.SamplesPerPixel, study.PixelRepresentation = 1, 0
    study.PhotometricInterpretation = scanner.photometric
    study.BitsAllocated, study.BitsStored, study.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    slope, intercept = scanner.rescale or (1.0, 0.0)
    if scanner.rescale or scanner.modality == "DX":
        study.RescaleSlope, study.RescaleIntercept, study.RescaleType = slope, intercept, "US"
    top = 2**bits - 1
    low, high = (top * share for share in scanner.window or (0.0, 1.0))
    if scanner.window:
        study.WindowCenter = round((low + high) / 2 * slope + intercept, 3)
        study.WindowWidth = round((high - low) * slope, 3)
    light = 1 - shown if scanner.photometric == "MONOCHROME1" else shown
    stored = np.clip(np.rint(low + light * (high - low)), 0, top).astype("<u1" if bits == 8 else "<u2")
    study.PixelData = stored.tobytes()
    study["PixelData"].VR = "OB" if bits == 8 else "OW"


def _uid(*parts: object) -> str:
    """A fixed UID below the root 2.25 (PS3.5 B.2)."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
    return f"2.25.{int(digest[:30], 16)}"
