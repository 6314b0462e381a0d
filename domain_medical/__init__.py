"""The medical domain: DICOM studies, their identities and their phantoms.

Importing it is light: pydicom is imported by the first study. Registered as the entry point ``medical``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cv_factory_ops.domain import Decoded, Domain, Kind


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

    def recognises(self, data: bytes) -> bool:
        """Whether the File Meta Information's prefix is there (PS3.10 section 7.1)."""
        return data[128:132] == b"DICM"

    def decode(self, data: bytes) -> Decoded:
        from domain_medical.dicom import decode

        return decode(data)

    def require_deidentified(self, data: bytes) -> None:
        from domain_medical.deidentify import require_deidentified

        require_deidentified(data)

    def deidentify(self, data: bytes) -> bytes:
        from domain_medical.deidentify import deidentify

        return deidentify(data)

    def generate(self, directory: Path, *, patients: int, image_size: int, seed: int, labels: list[str]) -> None:
        from domain_medical.synthetic import generate

        generate(directory, patients=patients, image_size=image_size, seed=seed, labels=labels)


DOMAIN: Domain = Medical()
