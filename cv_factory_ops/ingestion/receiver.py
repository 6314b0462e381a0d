"""``cvf receive``: a C-STORE receiver (storage SCP, PS3.4 annex B) that fills the inbox of a source of kind ``received``.

An object is answered with success once it is stored, de-identified; with a failure where it is refused or could not be stored.
"""

from __future__ import annotations

import logging
import signal
import threading
import time

from pynetdicom import evt

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.sources import ReceivedSource
from cv_factory_ops.domain import open_domain
from cv_factory_ops.errors import ConfigError, CvFactoryError, unexpected
from cv_factory_ops.ingestion.sources import inbox_uri, pacs
from cv_factory_ops.ingestion.sources.dimse import OUT_OF_RESOURCES, SUCCESS, application_entity, instance_uid, listen
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.pacs import Intake

log = logging.getLogger("cvf")

CANNOT_UNDERSTAND = 0xC000
"""Status of a refused object (PS3.4 B.2.3)."""
IDLE_SECONDS = 60
"""Silence after which an association is ended."""
GRACE_SECONDS = 10
"""Time that senders have, once we stop, to end their associations."""


def receive(config: ProjectConfig, host: str, port: int, ae_title: str) -> None:
    """Receive until SIGTERM or SIGINT; objects in hand are stored and answered first.

    Raises:
        ConfigError: the project's source is of another kind, the AE title is none, or a file of its ``tls`` is wrong.
        Unavailable: the port is taken.
    """
    source = config.data.source
    if not isinstance(source, ReceivedSource):
        raise ConfigError(f"data.source.kind: {source.kind!r} given; cvf receive fills a source of kind 'received'")
    uri = inbox_uri(config, source)
    receiver = Receiver(config, Inbox(uri))
    ae = application_entity(ae_title, IDLE_SECONDS)
    ae.require_calling_aet, ae.require_called_aet = source.calling_ae_titles, True
    server = listen(ae, host, port, [(evt.EVT_C_STORE, receiver.store)], source.tls)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: receiver.stopping.set())
    print(f"cvf receive: {ae_title} listens on {host}:{server.socket.getsockname()[1]}, and fills {uri}", flush=True)
    receiver.stopping.wait()
    server.shutdown()
    end = time.monotonic() + GRACE_SECONDS
    while server.active_associations and time.monotonic() < end:
        time.sleep(0.05)
    ae.shutdown()
    log.info("receive: %d objects stored, %d refused", receiver.stored, receiver.refused)


class Receiver:
    """Takes each object that is sent into the inbox; associations are served by a thread each."""

    def __init__(self, config: ProjectConfig, inbox: Inbox) -> None:
        self._inbox, self._domain, self._settings = inbox, open_domain(config.domain), config.deidentification
        self._counting = threading.Lock()
        self.stored = self.refused = 0
        self.stopping = threading.Event()
        """Once it is set, further objects are turned away, for the sender to try again."""

    def store(self, event: evt.Event) -> int:
        """Status of a C-STORE request. What is there is confirmed at once: a sender whose patience has ended during
        de-identification sends it again."""
        if self.stopping.is_set():
            return OUT_OF_RESOURCES
        try:
            data = event.encoded_dataset()
            study = pacs.read_uid(data, "StudyInstanceUID")
            intake = Intake(self._inbox, self._domain, self._settings, study, is_asked_for=False)
            uid = instance_uid(event)
            if intake.is_stored(uid):
                return SUCCESS
            is_stored = intake.take(uid, data)
        except Exception as error:
            log.error("receive: %s", error if isinstance(error, CvFactoryError) else unexpected(error))
            return OUT_OF_RESOURCES
        with self._counting:
            self.stored, self.refused = self.stored + is_stored, self.refused + (not is_stored)
        return SUCCESS if is_stored else CANNOT_UNDERSTAND
