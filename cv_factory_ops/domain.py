"""The one outer seam: a domain teaches the platform to read its studies, and ships as a package of its own.

A domain registers itself under the entry point group ``cv_factory_ops.domains``
(``medical = "domain_medical:DOMAIN"``). Also here: the keyed pseudonyms that every domain uses instead of identities.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from cv_factory_ops.config import home
from cv_factory_ops.config.data import Decoding as Decoding
from cv_factory_ops.config.data import DeidentificationConfig as DeidentificationConfig
from cv_factory_ops.config.data import FixedWindow as FixedWindow
from cv_factory_ops.config.data import FullWindow as FullWindow
from cv_factory_ops.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Metadata = Mapping[str, str | float | None]
Kind = Literal["number", "category"]


@dataclass(frozen=True)
class Decoded:
    """One image with what may be known of it; nothing in it identifies a person."""

    image: NDArray[np.uint16]
    """(rows, columns), or (rows, columns, 3) red, green, blue; 0 (black) .. 65535 (white) as a viewer would show it."""
    patient: str = ""
    """Pseudonym of the patient; empty where the format has none."""
    study: str = ""
    """Pseudonym of the study; empty where the format has none."""
    instance: str = ""
    """Pseudonym of the file's own identifier (DICOM's SOP Instance UID); empty where the format has none."""
    frame: int | None = None
    """Index from 0 of the frame, where the file has several."""
    spacing: tuple[float, float] | None = None
    """Distance of neighbouring rows and of neighbouring columns in mm, where it is known."""
    metadata: Metadata = field(default_factory=dict)
    """Values of the domain's ``metadata`` names; None where missing."""


@dataclass(frozen=True)
class Box:
    """A rectangle of an image that was blanked, in pixels from the upper left corner of the image."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Deidentified:
    """A study without identity, and what a person should look at."""

    content: bytes
    """The file to keep."""
    boxes: tuple[Box, ...] = ()
    """Where text was blanked, in every frame; never what it said."""
    review: tuple[str, ...] = ()
    """Why a person should look at it, as codes of the domain; empty: nothing was noticed."""


class Domain(Protocol):
    """What a domain package provides."""

    name: str
    content_type: str
    """MIME type of its studies in requests."""
    metadata: Mapping[str, Kind]
    """Non-identifying fields that drift is watched on."""
    subgroups: Mapping[str, Mapping[str, float]]
    """Those of them whose groups a model is measured on each by itself; of a number, lower bounds of its bands by name."""

    def recognises(self, data: bytes) -> bool:
        """Whether these bytes look like a study of this domain (by signature, without decoding)."""

    def decode(self, data: bytes, decoding: Decoding) -> Iterator[Decoded]:
        """Frames as shown, with non-identifying metadata: one, or all where ``decoding.frames`` says so.

        Raises:
            Rejected: the study cannot be used; the message quotes nothing that could identify a person.
        """

    def listed(self, index: bytes) -> list[str] | None:
        """The files that an index of studies (a DICOMDIR) names, relative to it; None where these bytes are no such index."""

    def remapped(self, identifier: str) -> str:
        """The pseudonym of an identifier of a study or of a file, as :class:`Decoded` has it."""

    def require_deidentified(self, data: bytes) -> None:
        """Accept only studies that say they are de-identified.

        Raises:
            Rejected: code ``identified``; the sender must de-identify first.
        """

    def deidentify(self, data: bytes, settings: DeidentificationConfig) -> Deidentified:
        """The same study without identity: pseudonyms in place of identifiers, marked as de-identified.

        Raises:
            Rejected: the study cannot be de-identified, or still shows whose it is (code ``identified``).
        """

    def secondary_capture(self, study: bytes, overlay: NDArray[np.uint8], description: str, software: Sequence[str]) -> bytes:
        """A study with a picture (rows, columns, 3) about this one in it, as pictures are kept beside studies: of the same
        patient and study, saying in words what it shows, and which versions of what have drawn it.

        Raises:
            Rejected: code ``identified``, or the study cannot be referred to.
        """

    def finding(self, label: str, probability: float, abstained: bool, similar: Sequence[str]) -> str:
        """What a model found, in one line for people: its label, how probable that is, whether a person should decide, and what
        the labels are of the studies, each of another patient, that are most like it, most similar first."""

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
        """What a model answered for this study, as reports are kept beside studies: its label, the probability of each label,
        and whether a person should decide; ``model`` and ``software`` are its name, and versions and digests, ``comment`` what
        else is to be said of the finding, as of :meth:`finding`.

        Raises:
            Rejected: code ``identified``, or the study cannot be referred to.
        """

    def segmentation(self, study: bytes, mask: NDArray[np.uint8], labels: Sequence[str], software: Sequence[str]) -> bytes:
        """A mask (rows, columns) of this study in the domain's own format, as masks are kept beside studies: 0, or the number,
        from 1, of one of ``labels``.

        Raises:
            Rejected: code ``identified``, the study cannot be referred to, or has another shape.
        """

    def read_mask(self, data: bytes, labels: Sequence[str], instance: str) -> NDArray[np.uint8]:
        """(rows, columns) each pixel's class as an index into ``labels``, 0 of none, of a mask in the domain's own format, that
        names its classes and its image. ``instance`` is the image's, as of :class:`Decoded`; empty where it has none.

        Raises:
            Rejected: ``mask_class``: it names a class that is none of the labels; ``mask_image``: it is of another image; with
                another code, it is no mask of one image.
        """

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
        """Write synthetic studies and ``labels.csv`` (columns ``file``, ``label``) below a directory; with ``masks`` also
        ``masks/``, a PNG of each study with the numbers of its pixels' labels, the first one's being 0; with ``boxes`` also
        ``boxes.json``, annotations in the format of COCO, whose categories are the labels but the first."""


def open_domain(name: str) -> Domain:
    """The installed domain of that name.

    Raises:
        ConfigError: no installed package provides it.
    """
    found = {point.name: point for point in entry_points(group="cv_factory_ops.domains")}
    if name not in found:
        raise ConfigError(f"domain: {name!r} given; installed: {', '.join(sorted(found)) or 'none'}")
    domain: Domain = found[name].load()
    return domain


def to_uint16(image: NDArray[np.floating]) -> NDArray[np.uint16]:
    """0..1 -> 0..65535: every level of 8-bit and 16-bit images, in half the bytes of floating point."""
    import numpy as np

    levels: NDArray[np.uint16] = np.rint(image * np.float32(65535.0)).astype("<u2")
    return levels


def pseudonym(value: str, purpose: str) -> str:
    """Keyed, one-way replacement of an identifier: the same value and purpose give the same 24 hexadecimal digits.

    HMAC-SHA256 (RFC 2104) under the key in ``CVF_PSEUDONYM_KEY``, or in ``var/pseudonym.key``, which is created when
    missing. Without the key the identifier cannot be found by trying all of them.
    """
    return hmac.new(_key(), f"{purpose}\0{value}".encode(), hashlib.sha256).hexdigest()[:24]


def _key() -> bytes:
    if given := os.environ.get("CVF_PSEUDONYM_KEY"):
        return given.encode()
    path = home() / "var" / "pseudonym.key"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    if not path.exists():
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was first: then its key is the key
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()
