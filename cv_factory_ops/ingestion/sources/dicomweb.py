"""Studies of a PACS by DICOMweb (PS3.18): QIDO-RS lists, WADO-RS retrieves.

Not by the dicomweb-client package, because it parses objects while it retrieves them, so that one bad object ends the
retrieve of a study, knows no limit of size, and pages for ever where a server ignores ``offset``.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from typing import TYPE_CHECKING, Any

import httpx

from cv_factory_ops.config.sources import DicomWebSource
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.ingestion.sources import pacs
from cv_factory_ops.ingestion.sources.downloads import authorization
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.pacs import Instance, Intake

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain

PAGE = 500
"""Results that are asked for at a time; a server may give fewer."""
KEPT_SECONDS = 0.5
"""How long an idle connection is used again: servers close theirs after a second or more, maybe just as we ask."""
MAX_HEADER = 64 << 10
"""Bytes that the headers of a part may have."""
ABSENT = {404, 406, 410}
"""Statuses that say that something is not there, or not to be had in this form."""
STUDY, SERIES, INSTANCE, SOP_CLASS, MODALITY = "0020000D", "0020000E", "00080018", "00080016", "00080060"
LISTED = {"Accept": "application/dicom+json"}
RETRIEVED = {
    "Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*',  # as stored, not transcoded
    "Accept-Encoding": "identity",
}


def fetch_studies(source: DicomWebSource, inbox: Inbox, domain: Domain, settings: DeidentificationConfig) -> None:
    """Bring what matches, and the inbox lacks, into the inbox.

    Raises:
        ConfigError: the address, the query or the credentials are wrong.
        DataError: nothing matches, or the answers are no DICOMweb.
        Unavailable: the PACS is not there, breaks off, or does not give what it has listed.
    """
    pacs.check_query(source.query)
    idle = httpx.Limits(keepalive_expiry=KEPT_SECONDS)
    with httpx.Client(timeout=source.timeout, headers=authorization(source), limits=idle) as client:
        asked = [*source.query, *(["Modality"] if source.modalities else [])]
        pacs.fetch(DicomWeb(source, client), inbox, domain, settings, asked)


class DicomWeb:
    """A PACS that speaks DICOMweb."""

    def __init__(self, source: DicomWebSource, client: httpx.Client) -> None:
        if "@" in urllib.parse.urlsplit(source.url).netloc:
            raise ConfigError("data.source.url: holds a user or password; give them by data.source.authorization_env")
        self.place = source.url.rstrip("/")
        self._source, self._client = source, client

    def studies(self) -> Iterator[str]:
        for found in self._search("studies", STUDY, self._source.query):
            yield self._value(found, STUDY)

    def instances(self, study: str) -> Sequence[Instance]:
        listed: dict[str, Instance] = {}
        for modality in self._source.modalities or [""]:
            keys = {"Modality": modality} if modality else {}
            for found in self._search(f"studies/{study}/instances", INSTANCE, keys):
                if not modality or self._value(found, MODALITY) in {modality, ""}:
                    uid = self._value(found, INSTANCE)
                    listed[uid] = Instance(uid, self._value(found, SERIES), self._value(found, SOP_CLASS))
        return list(listed.values())

    def retrieve(self, intake: Intake, instances: Sequence[Instance]) -> None:
        """Whole series where nothing of them is here, which is faster; then, one by one, what is still lacking."""
        for series in dict.fromkeys(instance.series for instance in instances):
            of_series = [instance.uid for instance in instances if instance.series == series]
            if series and len(of_series) > 1 and not any(uid in intake for uid in of_series):
                self._retrieve_series(intake, series, set(of_series))
        for instance in instances:
            if instance.uid not in intake:
                self._retrieve_instance(intake, instance)

    def _retrieve_series(self, intake: Intake, series: str, wanted: set[str]) -> None:
        for content in self._objects(f"studies/{intake.study}/series/{series}"):
            if content and (uid := pacs.read_uid(content, "SOPInstanceUID")) in wanted and uid not in intake:
                intake.take(uid, content)

    def _retrieve_instance(self, intake: Intake, instance: Instance) -> None:
        for content in self._objects(f"studies/{intake.study}/series/{instance.series}/instances/{instance.uid}"):
            if content is None:
                intake.refuse(instance.uid, "too_large", f"has more than {self._source.max_bytes} bytes")
            else:
                intake.take(instance.uid, content)

    def _search(self, path: str, key: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        """All results with different values of ``key``, page by page, until a page brings nothing new."""
        seen: set[str] = set()
        while True:
            page = self._page(path, {**query, "limit": str(PAGE), "offset": str(len(seen))})
            new = {value: found for found in page if (value := self._value(found, key)) and value not in seen}
            if not new:
                return
            seen |= new.keys()
            yield from new.values()

    def _value(self, found: dict[str, Any], tag: str) -> str:
        """First value of an attribute of a DICOM JSON object (PS3.18 F.2); empty where there is none."""
        match found.get(tag, {}):
            case {"Value": [str(value), *_]}:
                return value
            case {"Value": [] | [None, *_] | None}:
                return ""
            case {**attribute} if "Value" not in attribute:
                return ""
        raise DataError(f"{self.place}: lists an attribute {tag} that is no DICOM JSON")

    def _page(self, path: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
        with self._answer(path, LISTED, parameters) as answer:
            if answer.status_code in ABSENT and path != "studies":  # what was there a moment ago has been deleted
                return []
            if answer.status_code in ABSENT:
                raise ConfigError(
                    f"{self.place}: has no /studies ({answer.status_code}); give the address of a DICOMweb service"
                )
            try:
                page = json.loads(answer.read() or b"[]")  # 204: no content
            except ValueError:
                page = None
        if not isinstance(page, list) or not all(isinstance(found, dict) for found in page):
            raise DataError(f"{self.place}: does not answer as a DICOMweb service does, with a list in JSON")
        return page

    def _objects(self, path: str) -> Iterator[bytes | None]:
        """The Part 10 files of an answer, one at a time; None for one that is too large, nothing where there is nothing."""
        with self._answer(path, RETRIEVED, {}) as answer:
            if answer.status_code in ABSENT:  # what is lacking is counted in the end
                return
            kind = Message()
            kind["Content-Type"] = answer.headers.get("Content-Type", "")
            boundary = str(kind.get_param("boundary") or "")
            if kind.get_content_maintype() == "multipart" and boundary:
                yield from parts(answer.iter_bytes(), boundary.encode(), self._source.max_bytes)
            elif kind.get_content_type() == "application/dicom":
                yield _limited(answer.iter_bytes(), self._source.max_bytes)
            else:
                raise DataError(f"{self.place}: does not answer as WADO-RS does, with multipart/related")

    @contextmanager
    def _answer(self, path: str, headers: dict[str, str], parameters: dict[str, str]) -> Iterator[httpx.Response]:
        """An answer whose body is still to be read; what goes wrong until it is read is explained."""
        try:
            with self._client.stream("GET", f"{self.place}/{path}", headers=headers, params=parameters) as answer:
                self._check(answer.status_code)
                yield answer
        except httpx.TimeoutException:
            raise Unavailable(f"{self.place}: did not answer within {self._source.timeout:g} s") from None
        except httpx.ConnectError as error:
            raise self._unreachable(error) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise ConfigError(f"data.source.url: {self.place!r} given; allowed: http:// or https:// and a host") from None
        except httpx.HTTPError as error:  # its words are not repeated: they may quote headers
            raise Unavailable(f"{self.place}: the connection broke ({type(error).__name__})") from None

    def _unreachable(self, error: httpx.ConnectError) -> ConfigError | Unavailable:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return ConfigError(f"{self.place}: its certificate is not trusted; SSL_CERT_FILE names a file with the authority's")
        return Unavailable(f"{self.place}: cannot be reached ({error})")

    def _check(self, status: int) -> None:
        name = self._source.authorization_env
        match status:
            case 401 | 403:
                given = f"what {name} holds" if name else "a request without data.source.authorization_env"
                raise ConfigError(f"{self.place}: does not accept {given} ({status})")
            case 408 | 429:
                raise Unavailable(f"{self.place}: is busy ({status})")
            case _ if status >= 500 and status != 501:
                raise Unavailable(f"{self.place}: failed ({status})")
            case _ if status >= 300 and status not in ABSENT:
                raise ConfigError(f"{self.place}: answered {status}; check data.source.url and data.source.query")


def parts(chunks: Iterable[bytes], boundary: bytes, limit: int) -> Iterator[bytes | None]:
    """The contents of a ``multipart/related`` body (RFC 2046 section 5.1), one in memory at a time.

    A part of more than ``limit`` bytes is None. What follows the last whole part, in a body that was cut, is dropped.
    """
    delimiter, buffer = b"\r\n--" + boundary, bytearray(b"\r\n")
    searched, is_preamble, is_too_large = 0, True, False
    for chunk in chunks:
        buffer += chunk
        while (end := buffer.find(delimiter, searched)) >= 0:
            if not is_preamble:
                start = buffer.find(b"\r\n\r\n", 0, end) + 4
                yield bytes(memoryview(buffer)[start:end]) if 4 <= start >= end - limit and not is_too_large else None
            del buffer[: end + len(delimiter)]
            searched, is_preamble, is_too_large = 0, False, False
        searched = max(0, len(buffer) - len(delimiter))
        if len(buffer) > limit + MAX_HEADER:  # keep no more than may be the start of a delimiter
            del buffer[:searched]
            searched, is_too_large = 0, True


def _limited(chunks: Iterable[bytes], limit: int) -> bytes | None:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > limit:
            return None
    return bytes(content)
