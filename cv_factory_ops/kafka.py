"""What every client of Kafka here shares: its settings, its errors in one line, messages that are surely delivered, and
offsets that are committed once their messages are dealt with."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from cv_factory_ops.config.sources import KafkaSource, KafkaTopic
from cv_factory_ops.errors import ConfigError, Rejected, Unavailable
from cv_factory_ops.processes import ends_within

log = logging.getLogger("cvf")

Client = TypeVar("Client")
Headers = Sequence[tuple[str, bytes | None]]

NO_TOPIC = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}
DENIED = {
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
NOT_OURS = {KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID}
"""What a commit says when the partitions go, or have gone, to another member."""
MAX_MESSAGE = 1_000_000_000
"""librdkafka's own limit of ``message.max.bytes``: how long a message may be is the topic's to say."""


def connect(factory: Callable[[dict[str, Any]], Client], topic: KafkaTopic, settings: Mapping[str, Any]) -> Client:
    """A client with ``settings`` and those of the environment; librdkafka's log is silent, its errors are ours to tell.

    Raises:
        ConfigError: librdkafka does not take the settings; it may quote values, so only the property is told.
    """
    given = _from_environment(topic)
    try:
        return factory({"bootstrap.servers": topic.bootstrap_servers, "log_level": 0, **given, **settings})
    except (KafkaException, TypeError, ValueError) as error:
        found = re.search(r'property:? "([\w.]+)"', str(error))
        named = found[1] if found else f"one of {', '.join(given) or 'them'}"
        raise ConfigError(f"{topic.settings_env or 'bootstrap_servers'}: librdkafka does not take {named}") from None


def explained(error: KafkaError, topic: KafkaTopic) -> ConfigError | Unavailable:
    """One line for an error of a client; librdkafka's own words stay out, as they may quote settings."""
    place = f"{topic.bootstrap_servers}: topic {topic.topic}"
    if error.code() in NO_TOPIC:
        return ConfigError(f"{place}: is not there")
    if error.code() in DENIED:
        return ConfigError(
            f"{place}: access is denied ({error.name()}); check the settings in {topic.settings_env or 'settings_env'}"
        )
    if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
        return ConfigError(f"{place}: does not take messages that large; raise its max.message.bytes")
    return Unavailable(f"{place}: Kafka does not answer ({error.name()})")


class Publisher:
    """Sends messages to a topic, in order and without doubles (idempotent producer), and knows that they have arrived.

    Leaving its ``with`` block waits for what is under way.
    """

    def __init__(self, topic: KafkaTopic) -> None:
        self._topic = topic
        self._failure: KafkaError | None = None
        settings = {
            "enable.idempotence": True,
            "message.max.bytes": MAX_MESSAGE,
            "message.timeout.ms": round(topic.timeout * 1000),
            "error_cb": self._on_error,
        }
        self._producer = connect(Producer, topic, settings)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """Drop what is not delivered; the client's threads end here, not wherever garbage is collected."""
        self._producer.purge()
        self._producer.close()

    def send(self, value: bytes | None, *, key: bytes | None = None, headers: Headers = ()) -> None:
        """Queue a message; waits while the queue is full.

        Raises:
            Unavailable, ConfigError: this message or one before it cannot be delivered.
        """
        end = time.monotonic() + self._topic.timeout
        while True:
            self._producer.poll(0)
            self._check()
            try:
                self._producer.produce(self._topic.topic, value, key=key, headers=list(headers), on_delivery=self._on_delivery)
                return
            except KafkaException as error:
                raise explained(error.args[0], self._topic) from None
            except BufferError:
                if time.monotonic() > end:
                    raise explained(KafkaError(KafkaError._MSG_TIMED_OUT), self._topic) from None
                self._producer.poll(1)

    def flush(self) -> None:
        """Wait until everything is delivered.

        Raises:
            Unavailable, ConfigError: something cannot be.
        """
        waiting = self._producer.flush(self._topic.timeout + 5)
        self._check()
        if waiting:
            raise explained(KafkaError(KafkaError._MSG_TIMED_OUT), self._topic)

    def _check(self) -> None:
        if self._failure:
            raise explained(self._failure, self._topic)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        self._failure = self._failure or error

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() in DENIED:
            self._failure = self._failure or error


class Member:
    """A member of a consumer group, in a ``with`` block. Only what it calls :meth:`done` is committed."""

    def __init__(self, source: KafkaSource, settings: Mapping[str, Any] | None = None) -> None:
        self._source = source
        self._done: dict[int, int] = {}
        """Offsets to commit: behind the last message of a partition that is dealt with."""
        self._since_commit = 0
        self._last_error: KafkaError | None = None
        basic = {
            "group.id": source.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "partition.assignment.strategy": "range,roundrobin",
            "receive.message.max.bytes": MAX_MESSAGE,
            "error_cb": self._on_error,
        }
        self._consumer = connect(Consumer, source, {**basic, **(settings or {})})
        letters = source.dead_letter_topic
        self._dead_letters = Publisher(source.model_copy(update={"topic": letters})) if letters else None

    def __enter__(self) -> Self:
        with self.errors_explained():
            topic = self._consumer.list_topics(self._source.topic, timeout=self._source.timeout).topics[self._source.topic]
            if topic.error:
                raise KafkaException(topic.error)
            self._consumer.subscribe([self._source.topic], on_assign=self.on_assign, on_revoke=self.on_revoke)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.commit()
        finally:
            if not ends_within(self._source.timeout, self._consumer.close):
                log.warning("kafka: topic %s: left without a word to the group, which did not answer", self._source.topic)
            if self._dead_letters:
                self._dead_letters.close()

    def poll(self, seconds: float) -> Message | None:
        """The next message, or an event (its ``error()``) that does not end the reading; None where nothing comes in time.

        Raises:
            ConfigError, Unavailable: the topic is gone, or access to it.
        """
        with self.errors_explained():
            message = self._consumer.poll(seconds)
            error = message.error() if message is not None else None
            if error and (error.fatal() or error.code() in NO_TOPIC | DENIED):
                raise KafkaException(error)
        return message

    def done(self, message: Message) -> None:
        """The message is dealt with; each ``batch`` of them is committed."""
        partition, offset = place(message)
        self._done[partition] = offset + 1
        self._since_commit += 1
        if self._since_commit >= self._source.batch:
            self.commit()

    def bury(self, message: Message, error: Rejected) -> None:
        """Send a bad message to the dead-letter topic, as it came but for ``too_large`` (then without its value), surely."""
        if not self._dead_letters:
            return
        partition, offset = place(message)
        said = {"code": error.code, "reason": error, "topic": self._source.topic, "partition": partition, "offset": offset}
        added = [(name, str(value).encode()) for name, value in said.items()]
        value = None if error.code == "too_large" else raw(message.value())
        self._dead_letters.send(value, key=raw(message.key()), headers=[*raw_headers(message), *added])
        self._dead_letters.flush()

    def commit(self) -> None:
        """Commit what is dealt with.

        Raises:
            ConfigError, Unavailable: it cannot be committed.
        """
        if not (offsets := self._taken()):
            return
        committing = partial(self._consumer.commit, offsets=offsets, asynchronous=False)
        try:
            # Without an answer librdkafka asks for ever: https://github.com/confluentinc/librdkafka/issues/3740
            if not ends_within(self._source.timeout, committing):
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        except KafkaException as error:
            if error.args[0].code() not in NOT_OURS:
                raise explained(error.args[0], self._source) from None
            place, reason = f"topic {self._source.topic}", error.args[0].name()
            log.warning("kafka: %s: partitions have gone to other members; messages come again (%s)", place, reason)

    def on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Partitions are ours from now on."""

    def on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Another member joins or leaves, or this one closes."""
        if offsets := self._taken():
            with contextlib.suppress(KafkaException):  # as where a commit is not ours any more
                consumer.commit(offsets=offsets, asynchronous=True)  # goes out before the partitions do; a wait here has no end

    def _taken(self) -> list[TopicPartition]:
        """Offsets to commit, which are the caller's from now on."""
        offsets = [TopicPartition(self._source.topic, partition, offset) for partition, offset in self._done.items()]
        self._done.clear()
        self._since_commit = 0
        return offsets

    def _on_error(self, error: KafkaError) -> None:
        if self._last_error is None or error.code() in DENIED:
            self._last_error = error

    @contextlib.contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Turn what the consumer raises into one line of ours."""
        try:
            yield
        except KafkaException as error:
            told: KafkaError = error.args[0]
            if told.code() in {KafkaError._TRANSPORT, KafkaError._TIMED_OUT}:  # the reason came by the callback
                told = self._last_error or told
            raise explained(told, self._source) from None


def said_in(message: Message) -> dict[str, str]:
    """What the headers say; the last of several of a name.

    Raises:
        Rejected: ``undecodable``: they are not in UTF-8.
    """
    try:
        return {key: (value or b"").decode() for key, value in raw_headers(message)}
    except UnicodeDecodeError:
        raise Rejected("undecodable", "has headers that are not in UTF-8") from None


def content_of(message: Message, max_bytes: int) -> bytes:
    """The value of a message.

    Raises:
        Rejected: ``too_large``, or ``empty``.
    """
    content = raw(message.value()) or b""
    if len(content) > max_bytes:
        raise Rejected("too_large", f"has {len(content)} bytes; allowed are {max_bytes}")
    if not content:
        raise Rejected("empty", "has no bytes")
    return content


def raw_headers(message: Message) -> list[tuple[str, bytes | None]]:
    """Headers of a message that was received."""
    headers: Any = message.headers()  # typed for producers too, who may give text or a mapping
    return list(headers or [])


def raw(part: str | bytes | None) -> bytes | None:
    """Value or key of a message that was received: bytes, though typed for producers too."""
    return part.encode() if isinstance(part, str) else part


def place(message: Message) -> tuple[int, int]:
    """Partition and offset."""
    return message.partition() or 0, message.offset() or 0


def _from_environment(topic: KafkaTopic) -> dict[str, Any]:
    if not topic.settings_env:
        return {}
    try:
        given = json.loads(os.environ[topic.settings_env])
    except KeyError:
        raise ConfigError(f"settings_env: {topic.settings_env} is not set; it holds librdkafka's settings as JSON") from None
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ConfigError(f"{topic.settings_env}: is no JSON object of librdkafka's settings")
    return given
