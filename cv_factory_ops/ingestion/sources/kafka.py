"""A Kafka topic as a source: each message is an image or a study.

A message is named by its place in the topic, and by its time, since a topic that is made anew counts from 0 again. So one that
comes again, after a crash between storing it and committing its offset, is found in the inbox: nothing is lost and nothing is
there twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from cv_factory_ops.config import KafkaSource
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import ConfigError, Rejected, Unavailable
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.kafka import DENIED, MAX_MESSAGE, NO_TOPIC, Publisher, connect, explained

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain

NOT_OURS = {KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID}
"""What a commit says when the partitions go, or have gone, to another member."""


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
            reading.stored(message)


def _name(message: Message, topic: str) -> str:
    """Its time as a pseudonym: it may be that of an examination."""
    partition, offset = _place(message)
    return f"{topic}/{partition}-{offset}-{pseudonym(str(message.timestamp()[1]), 'message')[:8]}"


def _store(message: Message, name: str, inbox: Inbox, domain: Domain, settings: DeidentificationConfig, max_bytes: int) -> None:
    content = _raw(message.value()) or b""
    if len(content) > max_bytes:
        raise Rejected("too_large", f"has {len(content)} bytes; allowed are {max_bytes}")
    said = _headers(message)
    patient = pseudonym(said["patient"], "patient") if said.get("patient") else ""
    label, content_type = said.get("label", ""), said.get("content_type")
    inbox.receive(name, content, domain, settings, label=label, patient=patient, content_type=content_type)


def _headers(message: Message) -> dict[str, str]:
    """What the headers say; the last of several of a name.

    Raises:
        Rejected: ``undecodable``: they are not in UTF-8.
    """
    try:
        return {key: (value or b"").decode() for key, value in _raw_headers(message)}
    except UnicodeDecodeError:
        raise Rejected("undecodable", "has headers that are not in UTF-8") from None


def _raw_headers(message: Message) -> list[tuple[str, bytes | None]]:
    headers: Any = message.headers()  # typed for producers too, who may give text or a mapping
    return list(headers or [])


def _raw(part: str | bytes | None) -> bytes | None:
    """Value or key of a message that was received: bytes, though typed for producers too."""
    return part.encode() if isinstance(part, str) else part


def _place(message: Message) -> tuple[int, int]:
    """Partition and offset."""
    return message.partition() or 0, message.offset() or 0


class _Reading:
    """A member of the consumer group: what of its partitions is left to read, and what is stored but not yet committed."""

    def __init__(self, source: KafkaSource, *, from_start: bool) -> None:
        self._source = source
        self._from_start = from_start
        self._ends: dict[int, int] | None = None
        """Partitions that are not read to the end, and the offset behind the last message they had; None before we have any."""
        self._stored: dict[int, int] = {}
        """Offsets to commit: behind the last stored message of a partition."""
        self._since_commit = 0
        self._last_error: KafkaError | None = None
        settings = {
            "group.id": source.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "partition.assignment.strategy": "range,roundrobin",
            "receive.message.max.bytes": MAX_MESSAGE,
            "error_cb": self._on_error,
        }
        self._consumer = connect(Consumer, source, settings)
        letters = source.dead_letter_topic
        self._dead_letters = Publisher(source.model_copy(update={"topic": letters})) if letters else None

    def __enter__(self) -> _Reading:
        with self._errors_explained():
            topic = self._consumer.list_topics(self._source.topic, timeout=self._source.timeout).topics[self._source.topic]
            if topic.error:
                raise KafkaException(topic.error)
            self._consumer.subscribe([self._source.topic], on_assign=self._on_assign, on_revoke=self._on_revoke)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._consumer.close()

    def messages(self) -> Iterator[Message]:
        """What is between the committed offsets of our partitions and the ends that they had when they were assigned to us."""
        heard = time.monotonic()
        while self._ends is None or self._ends:
            with self._errors_explained():
                message = self._consumer.poll(1)
                error = message.error() if message is not None else None
                if error and (error.fatal() or error.code() in NO_TOPIC | DENIED):
                    raise KafkaException(error)
                if time.monotonic() - heard > self._source.timeout:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
            if message is None or (error and error.code() != KafkaError._PARTITION_EOF):
                continue
            if not error:
                yield message
            partition, offset = _place(message)
            if self._ends and (error or offset + 1 >= self._ends.get(partition, 0)):
                self._ends.pop(partition, None)
            heard = time.monotonic()

    def stored(self, message: Message) -> None:
        """The message is in the inbox; each ``batch`` of them is committed."""
        partition, offset = _place(message)
        self._stored[partition] = offset + 1
        self._since_commit += 1
        if self._since_commit >= self._source.batch:
            self._commit()

    def bury(self, message: Message, error: Rejected) -> None:
        """Send a bad message to the dead-letter topic, as it came but for ``too_large`` (then without its value), surely."""
        if not self._dead_letters:
            return
        partition, offset = _place(message)
        said = {"code": error.code, "reason": error, "topic": self._source.topic, "partition": partition, "offset": offset}
        headers = [*_raw_headers(message), *((name, str(value).encode()) for name, value in said.items())]
        value = None if error.code == "too_large" else _raw(message.value())
        self._dead_letters.send(value, key=_raw(message.key()), headers=headers)
        self._dead_letters.flush()

    def _commit(self) -> None:
        offsets = [TopicPartition(self._source.topic, partition, offset) for partition, offset in self._stored.items()]
        self._stored.clear()
        self._since_commit = 0
        try:
            if offsets:
                self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() not in NOT_OURS:  # then it comes again, to whom they are now, and is found in the inbox
                raise explained(error.args[0], self._source) from None

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        marks = {place.partition: consumer.get_watermark_offsets(place, timeout=self._source.timeout) for place in partitions}
        self._ends = {partition: end for partition, (_, end) in marks.items()}
        if self._from_start:  # committed before anything is stored: after a crash the inbox is not empty any more
            self._stored = {partition: start for partition, (start, _) in marks.items()}
            consumer.assign([TopicPartition(self._source.topic, *place) for place in self._stored.items()])
            self._commit()

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Another member joins or leaves, or this one closes."""
        with contextlib.suppress(ConfigError, Unavailable):  # as above
            self._commit()
        self._ends = None

    def _on_error(self, error: KafkaError) -> None:
        if self._last_error is None or error.code() in DENIED:
            self._last_error = error

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except KafkaException as error:
            told: KafkaError = error.args[0]
            if told.code() in {KafkaError._TRANSPORT, KafkaError._TIMED_OUT}:  # the reason came by the callback
                told = self._last_error or told
            raise explained(told, self._source) from None
