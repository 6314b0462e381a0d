"""The medical domain: DICOM studies, their identities and their phantoms.

Importing it is light: pydicom is imported by the first study. Registered as the entry point ``medical``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cv_factory_ops.domain import Decoded, Decoding, DeidentificationConfig, Deidentified, Domain, Kind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

START_OF_FILE = re.compile(
    rb"(?s:.{128}DICM"  # PS3.10 section 7.1
    rb"|[\x02\x08]\0[\0-\x20]\0(?:UL|OB|UI|CS|SH|LO|DA)"  # without its preamble: explicit VR, little endian
    rb"|\0[\x02\x08]\0[\0-\x20](?:UL|OB|UI|CS|SH|LO|DA)"  # explicit VR, big endian
    rb"|\x08\0[\0-\x20]\0.[\0\x01]\0\0)"  # implicit VR, little endian: a value below 512 bytes
)
"""How DICOM files start; those from before the preamble (ACR-NEMA, and data sets stored bare) with group 0002 or 0008."""


class Medical:
    """DICOM Part 10 files, as :class:`cv_factory_ops.domain.Domain` asks for them."""

    name: str = "medical"
    content_type: str = "application/dicom"
    metadata: Mapping[str, Kind] = {
        "modality": "category",
        "manufacturer": "category",
        "model_name": "category",
        "body_part": "category",
        "view_position": "category",
        "photometric": "category",
        "sex": "category",
        "age_years": "number",
        "kvp": "number",
        "bits_stored": "number",
        "pixel_spacing_mm": "number",
        "rows": "number",
        "columns": "number",
    }
    subgroups: Mapping[str, Mapping[str, float]] = {
        "sex": {},
        "age_years": {"0-17": 0, "18-39": 18, "40-64": 40, "65+": 65},
        "manufacturer": {},
        "model_name": {},
        "view_position": {},
    }

    def recognises(self, data: bytes) -> bool:
        """Whether it starts like a file of PS3.10, with or without its preamble."""
        return START_OF_FILE.match(data) is not None

    def decode(self, data: bytes, decoding: Decoding) -> Iterator[Decoded]:
        from domain_medical.pixels import decode

        return decode(data, decoding)

    def listed(self, index: bytes) -> list[str] | None:
        from domain_medical.dicom import listed

        return listed(index)

    def remapped(self, identifier: str) -> str:
        """The pseudonym of a UID. Who matches a table compares the UID itself too: a de-identified file's are pseudonyms."""
        from domain_medical.dicom import remapped_uid

        return remapped_uid(identifier)

    def require_deidentified(self, data: bytes) -> None:
        from domain_medical.deidentify import require_deidentified

        require_deidentified(data)

    def deidentify(self, data: bytes, settings: DeidentificationConfig) -> Deidentified:
        from domain_medical.deidentify import deidentify

        return deidentify(data, settings)

    def secondary_capture(self, study: bytes, overlay: NDArray[np.uint8], description: str, software: Sequence[str]) -> bytes:
        from domain_medical.secondary_capture import secondary_capture

        return secondary_capture(study, overlay, description, software)

    def finding(self, label: str, probability: float, abstained: bool, similar: Sequence[str]) -> str:
        from domain_medical.finding import finding

        return finding(label, probability, abstained, similar)

    def report(
        self,
        study: bytes,
        label: str,
        scores: Mapping[str, float],
        abstained: bool,
        model: str,
        software: Sequence[str],
        comment: str = "",
    ) -> bytes:
        from domain_medical.structured_report import structured_report

        return structured_report(study, label, scores, abstained, model, software, comment)

    def segmentation(self, study: bytes, mask: NDArray[np.uint8], labels: Sequence[str], software: Sequence[str]) -> bytes:
        from domain_medical.segmentation import segmentation

        return segmentation(study, mask, labels, software)

    def read_mask(self, data: bytes, labels: Sequence[str], instance: str) -> NDArray[np.uint8]:
        from domain_medical.segmentation import read_mask

        return read_mask(data, labels, instance)

    def generate(
        self,
        directory: Path,
        *,
        patients: int,
        image_size: int,
        seed: int,
        labels: list[str],
        masks: bool = False,
        boxes: bool = False,
    ) -> None:
        from domain_medical.synthetic import generate

        generate(directory, patients=patients, image_size=image_size, seed=seed, labels=labels, masks=masks, boxes=boxes)


DOMAIN: Domain = Medical()
