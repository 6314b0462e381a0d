"""Studies of a PACS by DIMSE (PS3.7): C-FIND lists, C-GET or C-MOVE retrieves, in the Study Root model (PS3.4 annex C)."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydicom import Dataset, uid
from pynetdicom import (
    AE,
    ALL_TRANSFER_SYNTAXES,
    AllStoragePresentationContexts,
    StoragePresentationContexts,
    build_context,
    build_role,
    evt,
)
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_FIND_RSP
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from cv_factory_ops.config.sources import DimseSource, Tls
from cv_factory_ops.errors import ConfigError, CvFactoryError, Unavailable
from cv_factory_ops.ingestion.sources import pacs, tls
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.pacs import Instance, Intake

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain

log = logging.getLogger("cvf")

SUCCESS, OUT_OF_RESOURCES, NOT_AUTHORIZED = 0x0000, 0xA700, 0x0124
"""Statuses (PS3.7 annex C); the second and third answer a C-STORE (PS3.4 B.2.3)."""
UIDS = 100
"""SOP Instance UIDs of one retrieve: a value of explicit VR holds 64 KiB."""
PENDING = {0xFF00, 0xFF01}
"""Statuses of an answer after which more come; of C-FIND it holds a match (PS3.4 C.4.1.1.4)."""
FIND_TRIES = 5
"""How often a query is asked whose answers are not all handed over."""
MAX_CONTEXTS = 128
"""Presentation contexts of an association (PS3.8 section 9.3.2.2)."""
SYNTAXES = (
    (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian),
    (uid.DeflatedExplicitVRLittleEndian,),
    (uid.ExplicitVRBigEndian,),
    (uid.JPEGBaseline8Bit,),
    (uid.JPEGExtended12Bit,),
    (uid.JPEGLossless,),
    (uid.JPEGLosslessSV1,),
    (uid.JPEGLSLossless,),
    (uid.JPEGLSNearLossless,),
    (uid.JPEG2000Lossless,),
    (uid.JPEG2000,),
    (uid.HTJ2KLossless,),
    (uid.HTJ2K,),
    (uid.RLELossless,),
)
"""Each group is offered in a presentation context of its own, so that the PACS need not transcode what it has compressed."""


def fetch_studies(source: DimseSource, inbox: Inbox, domain: Domain, settings: DeidentificationConfig) -> None:
    """Bring what matches, and the inbox lacks, into the inbox.

    Raises:
        ConfigError: the query or an AE title is wrong.
        DataError: nothing matches.
        Unavailable: the PACS is not there, breaks off, or does not give what it has listed.
    """
    pacs.check_query(source.query)
    with Dimse(source) as peer:
        pacs.fetch(peer, inbox, domain, settings, [*source.query, *(["Modality"] if source.modalities else [])])


class Dimse:
    """A PACS that speaks DIMSE; as a context, with a receiver of its own where C-MOVE needs one."""

    def __init__(self, source: DimseSource) -> None:
        self.place = f"{source.host}:{source.port} ({source.called_ae_title})"
        self._source = source
        self._ae = application_entity(source.calling_ae_title, source.timeout)
        self._intake: Intake | None = None
        self._listed: set[str] = set()
        self._failure: Exception | None = None
        self._matches = 0
        self._tls = (tls.to_call(source.tls), source.host) if source.tls else None

    def __enter__(self) -> Dimse:
        if self._source.retrieve == "c_move":
            anywhere = "0.0.0.0"  # noqa: S104 - for a PACS
            listen(self._ae, anywhere, self._source.receive_port, [(evt.EVT_C_STORE, self._store)], self._source.tls)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ae.shutdown()

    def echo(self) -> None:
        """Whether the PACS lets us in, answers C-ECHO, and offers the queries and retrieves that a fetch will ask for.

        Raises:
            ConfigError, Unavailable: it does not.
        """
        find, move = StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelMove
        get: Any = StudyRootQueryRetrieveInformationModelGet
        for model in (find, move if self._source.retrieve == "c_move" else get):
            with self._associated([build_context(model)]):  # each by itself: of several contexts one would do
                pass
        with self._associated([build_context(Verification)]) as association:
            self._check(association.send_c_echo(), "C-ECHO")

    def studies(self) -> Iterator[str]:
        with self._associated([build_context(StudyRootQueryRetrieveInformationModelFind)]) as association:
            found = self._find(association, "STUDY", {"StudyInstanceUID": "", **self._source.query})
            uids = dict.fromkeys(_text(study, "StudyInstanceUID") for study in found)
        yield from uids

    def instances(self, study: str) -> Sequence[Instance]:
        listed = []
        with self._associated([build_context(StudyRootQueryRetrieveInformationModelFind)]) as association:
            keys = {"StudyInstanceUID": study, "SeriesInstanceUID": "", "Modality": ""}
            for found in self._find(association, "SERIES", keys):
                series = _text(found, "SeriesInstanceUID")
                if not self._source.modalities or _text(found, "Modality") in self._source.modalities:
                    keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": "", "SOPClassUID": ""}
                    listed += [
                        Instance(_text(image, "SOPInstanceUID"), series, _text(image, "SOPClassUID"))
                        for image in self._find(association, "IMAGE", keys)
                    ]
        return listed

    def retrieve(self, intake: Intake, instances: Sequence[Instance]) -> None:
        """Whole series where nothing of them is here, else what is lacking of them."""
        self._intake, self._listed = intake, {instance.uid for instance in instances}
        for series in dict.fromkeys(instance.series for instance in instances):
            of_series = [instance for instance in instances if instance.series == series]
            lacking = [instance.uid for instance in of_series if instance.uid not in intake]
            keys = {"StudyInstanceUID": intake.study, "SeriesInstanceUID": series}
            classes = {instance.sop_class for instance in of_series}
            if len(lacking) == len(of_series):
                self._retrieve("SERIES", keys, classes)
                continue
            for start in range(0, len(lacking), UIDS):
                self._retrieve("IMAGE", {**keys, "SOPInstanceUID": "\\".join(lacking[start : start + UIDS])}, classes)

    def _retrieve(self, level: str, keys: Mapping[str, str], classes: set[str]) -> None:
        identifier = _identifier(level, keys)
        if self._source.retrieve == "c_move":
            model: Any = StudyRootQueryRetrieveInformationModelMove
            with self._associated([build_context(model)]) as association:
                self._follow(association.send_c_move(identifier, self._source.calling_ae_title, model), "C-MOVE")
        else:
            model = StudyRootQueryRetrieveInformationModelGet
            with self._associated([build_context(model), *storage_contexts(classes)]) as association:
                self._follow(association.send_c_get(identifier, model), "C-GET")
        if self._failure:
            raise self._failure

    def _follow(self, answers: Iterator[tuple[Dataset, Dataset | None]], request: str) -> None:
        """Wait for the end of a retrieve; objects that the PACS fails to send are counted in the end."""
        for status, _ in answers:
            self._check(status, request)

    def _find(self, association: Association, level: str, keys: Mapping[str, str]) -> list[Dataset]:
        """All that matches. Pynetdicom's own thread may take an answer from the queue just before it pauses for the one that
        waits (3.0.4, ``Association._run_reactor``; its issue 875), so what is handed over is counted against what has come."""
        identifier = _identifier(level, keys)
        for _ in range(FIND_TRIES):
            self._matches, found = 0, []
            for status, match in association.send_c_find(identifier, StudyRootQueryRetrieveInformationModelFind):
                self._check(status, "C-FIND")
                found += [match] if match is not None else []
            if len(found) == self._matches:
                return found
        raise Unavailable(f"{self.place}: {self._matches} answers to C-FIND have come, {len(found)} can be read")

    def _count(self, event: evt.Event) -> None:
        message: Any = event.message
        self._matches += isinstance(message, C_FIND_RSP) and message.command_set.Status in PENDING

    def _store(self, event: evt.Event) -> int:
        """Take an object that was asked for; what it fails by is raised once the PACS has been answered."""
        instance = instance_uid(event)
        if self._intake is None or instance not in self._listed:
            return NOT_AUTHORIZED
        try:
            if not self._failure and instance not in self._intake:
                self._intake.take(instance, event.encoded_dataset())
        except Exception as error:
            self._failure = error
        return OUT_OF_RESOURCES if self._failure else SUCCESS

    @contextmanager
    def _associated(self, contexts: list[PresentationContext]) -> Iterator[Association]:
        source = self._source
        association = self._ae.associate(
            source.host,
            source.port,
            contexts,
            ae_title=source.called_ae_title,
            ext_neg=[build_role(str(name), scp_role=True) for name in {context.abstract_syntax for context in contexts[1:]}],
            evt_handlers=[*PROMPTLY, (evt.EVT_C_STORE, self._store), (evt.EVT_DIMSE_RECV, self._count)],
            tls_args=self._tls,
        )
        if not association.is_established:
            raise self._not_associated(association)
        try:
            yield association
        except BaseException:
            association.abort()
            raise
        association.release()

    def _not_associated(self, association: Association) -> CvFactoryError:
        titles = f"called AE title {self._source.called_ae_title!r}, calling {self._source.calling_ae_title!r}"
        if association.is_rejected:
            answer: Any = association.acceptor.primitive
            kind = ConfigError if answer.result == 1 else Unavailable
            return kind(f"{self.place}: rejects the association: {answer.reason_str.lower()} ({titles})")
        if association.rejected_contexts:
            return ConfigError(f"{self.place}: does not offer what is asked of it (C-FIND, C-GET, C-MOVE) to us ({titles})")
        return Unavailable(f"{self.place}: cannot be reached, or breaks the connection off")

    def _check(self, status: Dataset, request: str) -> None:
        code = status.get("Status")
        if code is None:
            known = f"check that it lists our AE title {self._source.calling_ae_title!r}"
            raise Unavailable(f"{self.place}: broke {request} off, or said nothing for {self._source.timeout:g} s; {known}")
        if code == 0xA801:
            raise ConfigError(f"{self.place}: does not know the address of {self._source.calling_ae_title!r}; list it there")
        if code in {0x0122, 0x0124, 0xA900}:
            raise ConfigError(f"{self.place}: refuses {request} (status {code:04X})")
        if code not in {SUCCESS, 0xB000, *PENDING}:
            if request == "C-FIND":
                raise Unavailable(f"{self.place}: failed at {request} (status {code:04X})")
            log.warning("%s: %s ended with status %04X", self.place, request, code)


def application_entity(title: str, timeout: float) -> AE:
    """Our side of associations, with one limit of time for all waiting, in seconds."""
    pacs.silence()
    try:
        ae = AE(title)
    except ValueError:
        raise ConfigError(f"{title!r} given; allowed is an AE title: 1 to 16 characters, no backslash") from None
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = timeout
    ae.maximum_pdu_size = 128 << 10  # the default of 16 KiB is slow
    return ae


def _promptly(event: evt.Event) -> None:
    """Neither hold back small packets nor acknowledgements: a message is several of both, and each would cost 40 ms."""
    connection: Any = event.assoc.dul.socket
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


PROMPTLY: list[evt.EventHandlerType] = [(evt.EVT_CONN_OPEN, _promptly), (evt.EVT_DATA_SENT, _promptly)]


def instance_uid(event: evt.Event) -> str:
    """SOP Instance UID that a C-STORE request names."""
    request: Any = event.request
    return str(request.AffectedSOPInstanceUID)


def listen(ae: AE, host: str, port: int, handlers: list[evt.EventHandlerType], encryption: Tls | None) -> Any:
    """Start to receive objects of all storage SOP classes as they are compressed; returns the server.

    Raises:
        ConfigError: a file of ``encryption`` is not there, or holds something else.
        Unavailable: the port is taken.
    """
    context = tls.to_listen(encryption) if encryption else None
    contexts = [
        build_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES) for context in AllStoragePresentationContexts
    ]
    try:
        return ae.start_server(
            (host, port),
            block=False,
            evt_handlers=[*PROMPTLY, *handlers],
            contexts=[*contexts, build_context("1.2.840.10008.1.1")],
            ssl_context=context,
        )
    except OSError as error:
        raise Unavailable(f"{host}:{port}: cannot listen here ({error.strerror})") from None


def storage_contexts(classes: set[str]) -> list[PresentationContext]:
    """Presentation contexts for these SOP classes, a group of syntaxes each; the common ones where they are not known."""
    if "" not in classes and len(classes) * len(SYNTAXES) < MAX_CONTEXTS:
        return [build_context(name, list(group)) for name in sorted(classes) for group in SYNTAXES]
    known = sorted(classes - {""}) or [str(context.abstract_syntax) for context in StoragePresentationContexts]
    return [build_context(name, [syntax for group in SYNTAXES for syntax in group]) for name in known[: MAX_CONTEXTS - 1]]


def _identifier(level: str, keys: Mapping[str, str]) -> Dataset:
    identifier = Dataset()
    if not all(value.isascii() for value in keys.values()):
        identifier.SpecificCharacterSet = "ISO_IR 192"
    identifier.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        try:
            setattr(identifier, keyword, value)
        except (ValueError, TypeError):
            raise ConfigError(f"data.source.query.{keyword}: cannot be a value of that element") from None
    return identifier


def _text(found: Dataset, keyword: str) -> str:
    return str(found.get(keyword) or "")
