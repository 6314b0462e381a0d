"""What DICOMweb, DIMSE and the C-STORE receiver share: list first, retrieve what the inbox lacks, store it de-identified."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Protocol

from cv_factory_ops import storage
from cv_factory_ops.errors import ConfigError, DataError, Rejected, Unavailable
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.sources.inbox import PASSING, Inbox

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain

log = logging.getLogger("cvf")


@dataclass(frozen=True, slots=True)
class Instance:
    """A SOP instance as a PACS lists it."""

    uid: str
    series: str
    sop_class: str = ""
    """Empty where the PACS does not say."""


@dataclass(frozen=True, slots=True)
class Intake:
    """The way of one study's objects into the inbox; ``uid in intake`` says that an object, or its refusal, is there."""

    inbox: Inbox
    domain: Domain
    settings: DeidentificationConfig
    study: str
    """Study Instance UID as the PACS has it; the inbox only sees its pseudonym."""
    is_asked_for: bool = True
    """Whether another fetch can ask for a refused object again; what was sent unasked stays on the list of refusals."""

    def __contains__(self, uid: str) -> bool:
        return self._name(uid) in self.inbox

    def take(self, uid: str, data: bytes) -> bool:
        """De-identify and store a DICOM Part 10 file; False where it had to be refused."""
        try:
            self.inbox.receive(self._name(uid), data, self.domain, self.settings, content_type=self.domain.content_type)
        except Rejected as error:
            self.refuse(uid, error.code, str(error))
            return False
        return True

    def is_stored(self, uid: str) -> bool:
        """Whether the object itself is there."""
        return uid in self and storage.exists(storage.join(self.inbox.uri, self._name(uid)))

    def refuse(self, uid: str, code: str, reason: str) -> None:
        """Remember that the object cannot be used; what may pass another time, for now only."""
        self.inbox.refuse(self._name(uid), code, reason, for_now=self.is_asked_for and code in PASSING)

    def _name(self, uid: str) -> str:
        return f"{self.domain.remapped(self.study)}/{self.domain.remapped(uid)}.dcm"


class Pacs(Protocol):
    """A PACS that is asked and gives, by whichever protocol."""

    place: str
    """Its address, for messages."""

    def studies(self) -> Iterator[str]:
        """Study Instance UIDs of what matches the query."""

    def instances(self, study: str) -> Sequence[Instance]:
        """What a study holds of the wanted modalities."""

    def retrieve(self, intake: Intake, instances: Sequence[Instance]) -> None:
        """Bring those of a study's instances into the inbox that it lacks."""


def fetch(pacs: Pacs, inbox: Inbox, domain: Domain, settings: DeidentificationConfig, asked: Sequence[str]) -> None:
    """Bring what matches, and the inbox lacks, into the inbox, study by study.

    Raises:
        DataError: nothing matches; ``asked`` are the keys that were asked by, whose values may identify.
        Unavailable: the PACS is not there, breaks off, or does not give what it has listed.
    """
    found = Counter(with_progress(_outcomes(pacs, inbox, domain, settings), None, pacs.place, "object"))
    if not found:
        raise DataError(f"{pacs.place}: holds nothing that matches {', '.join(asked) or 'an empty query'}")
    if lost := found["lost"]:
        raise Unavailable(f"{pacs.place}: {lost} of {found.total()} listed objects were not given; a retry asks for them again")
    log.info("%s: %d objects, %d of them new", pacs.place, found.total(), found["new"])


def _outcomes(pacs: Pacs, inbox: Inbox, domain: Domain, settings: DeidentificationConfig) -> Iterator[str]:
    """What became of each object: ``known``, ``new`` or ``lost``."""
    for study in pacs.studies():
        intake, instances = Intake(inbox, domain, settings, study), pacs.instances(study)
        known = {instance.uid for instance in instances if instance.uid in intake}
        if len(known) < len(instances):
            pacs.retrieve(intake, instances)
        for instance in instances:
            yield "known" if instance.uid in known else "new" if instance.uid in intake else "lost"


def check_query(query: Mapping[str, str]) -> None:
    """Accept DICOM keywords that a study can be asked by.

    Raises:
        ConfigError: one is none.
    """
    from pydicom.datadict import dictionary_VR, keyword_dict

    silence()
    for keyword in query:
        if keyword not in keyword_dict:
            close = difflib.get_close_matches(keyword, keyword_dict, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"data.source.query.{keyword}: is no DICOM keyword{hint}")
        if keyword in {"Modality", "SeriesInstanceUID", "SOPInstanceUID"} or dictionary_VR(keyword) == "SQ":
            raise ConfigError(f"data.source.query.{keyword}: is no key of studies; data.source.modalities chooses series")


def read_uid(data: bytes, keyword: str) -> str:
    """A UID of a Part 10 file; empty where it cannot be read: what is wrong with the file is told by de-identification."""
    from pydicom import dcmread

    try:
        return str(dcmread(BytesIO(data), stop_before_pixels=True, specific_tags=[keyword])[keyword].value)
    except Exception:
        return ""


def silence() -> None:
    """Keep libraries from logging: their messages quote values and addresses, and those may identify."""
    for name in ("pydicom", "pynetdicom", "httpx"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom|pynetdicom")
