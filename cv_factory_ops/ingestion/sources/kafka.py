"""A Kafka topic as a source: each message is an image or a study.

A message is named by its place in the topic, and by its time, since a topic that is made anew counts from 0 again. So one that
comes again, after a crash between storing it and committing its offset, is found in the inbox: nothing is lost and nothing is
there twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from cv_factory_ops.config.sources import KafkaSource
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import Rejected
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.kafka import Member, content_of, place, said_in

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain


def fetch_messages(source: KafkaSource, inbox: Inbox, domain: Domain, settings: DeidentificationConfig) -> None:
    """Store what the topic holds for the consumer group, up to where it ends now; studies are de-identified.

    An empty inbox begins at the start of the topic, whatever the group has committed for another one. What is refused stays
    so: it has been committed and does not come again but from the dead-letter topic.

    Raises:
        ConfigError: there is no such topic, or no access to it.
        Unavailable: the brokers do not answer; what they have given is kept.
    """
    with _Reading(source, from_start=not len(inbox)) as reading:
        for message in with_progress(reading.messages(), None, "kafka", "message"):
            name = _name(message, source.topic)
            if name not in inbox:
                try:
                    _store(message, name, inbox, domain, settings, source.max_bytes)
                except Rejected as error:
                    reading.bury(message, error)  # first: what the inbox has is not looked at again
                    inbox.refuse(name, error.code, str(error))
            reading.done(message)


def _name(message: Message, topic: str) -> str:
    """Its time as a pseudonym: it may be that of an examination."""
    partition, offset = place(message)
    return f"{topic}/{partition}-{offset}-{pseudonym(str(message.timestamp()[1]), 'message')[:8]}"


def _store(message: Message, name: str, inbox: Inbox, domain: Domain, settings: DeidentificationConfig, max_bytes: int) -> None:
    content = content_of(message, max_bytes)
    said = said_in(message)
    patient = pseudonym(said["patient"], "patient") if said.get("patient") else ""
    label, content_type = said.get("label", ""), said.get("content_type")
    inbox.receive(name, content, domain, settings, label=label, patient=patient, content_type=content_type)


class _Reading(Member):
    """What of its partitions is left to read, up to where they end now."""

    def __init__(self, source: KafkaSource, *, from_start: bool) -> None:
        super().__init__(source, {"enable.partition.eof": True})
        self._from_start = from_start
        self._ends: dict[int, int] | None = None
        """Partitions that are not read to the end, and the offset behind the last message they had; None before we have any."""

    def messages(self) -> Iterator[Message]:
        """What is between the committed offsets of our partitions and the ends that they had when they were assigned to us."""
        heard = time.monotonic()
        while self._ends is None or self._ends:
            message = self.poll(1)
            if time.monotonic() - heard > self._source.timeout:
                with self.errors_explained():
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
            error = message.error() if message is not None else None
            if message is None or (error and error.code() != KafkaError._PARTITION_EOF):
                continue
            if not error:
                if not self._since_commit:
                    self.commit()  # where we begin, before anything is stored: after a crash the inbox is not empty any more
                yield message
            partition, offset = place(message)
            if self._ends and (error or offset + 1 >= self._ends.get(partition, 0)):
                self._ends.pop(partition, None)
            heard = time.monotonic()

    def on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Ends that are read up to; from the start of an empty inbox."""
        marks = {place.partition: consumer.get_watermark_offsets(place, timeout=self._source.timeout) for place in partitions}
        self._ends = {partition: end for partition, (_, end) in marks.items()}
        if self._from_start:
            self._done = {partition: start for partition, (start, _) in marks.items()}
            consumer.assign([TopicPartition(self._source.topic, *place) for place in self._done.items()])

    def on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Commit what is stored; the new assignment says what is left."""
        super().on_revoke(consumer, partitions)
        self._ends = None
