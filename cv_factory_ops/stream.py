"""``cvf stream``: the champion's answers to the messages of a Kafka topic, in another one, until SIGTERM.

At least once: offsets are committed after the answers and the dead letters of their messages have surely been delivered. A
stream that is killed before answers some messages again, under the same ``study``: ``<topic>/<partition>-<offset>``.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Message

from cv_factory_ops import storage
from cv_factory_ops.batch import BATCH, Outcome, Studies, Study, answered, champion_of
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, home
from cv_factory_ops.config.serving import StreamConfig
from cv_factory_ops.errors import ConfigError, Rejected, Unavailable
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.readers import reading
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.kafka import Member, Publisher, content_of, place, raw, said_in
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.registry import Champion

log = logging.getLogger("cvf")

SAID_SECONDS = 60
"""Time between two lines of the log that say how many were answered."""
GATHERED_BYTES = 64 << 20
"""Bytes of messages with which a batch is full: with ``BATCH``, bounds memory."""
IDLE_SECONDS = 0.5
"""How long it may take, while nothing comes, to notice that it is to stop."""
Read = Callable[[Iterable[Item | Refusal]], Iterator[Study | Refusal]]


def run(config: ProjectConfig) -> None:
    """Answer until SIGTERM or SIGINT; messages in hand are answered, delivered and committed first.

    Raises:
        ConfigError: there is no ``stream`` in the project, or no such topic.
        DataError: there is no champion.
        Unavailable: answers cannot be delivered; what is not committed comes again.
    """
    if (settings := config.stream) is None:
        raise ConfigError("stream: is missing in the project; it names the topics that are read and written")
    interval = {"max.poll.interval.ms": round(60_000 * settings.answer_minutes)}
    with _stopping() as stop:
        turn = _Turn(config, settings, champion_of(config), stop)  # before it joins: partitions wait for nothing
        with Publisher(settings.sink) as publisher, Member(settings.source, interval) as member:
            turn.run(member, publisher)
            while not stop.is_set():
                _Turn(config, settings, champion_of(config), stop).run(member, publisher)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()

    def on_signal(*_: Any) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Turn:
    """One champion's turn."""

    def __init__(self, config: ProjectConfig, settings: StreamConfig, champion: Champion, stop: threading.Event) -> None:
        self._config, self._settings, self._champion, self._stop = config, settings, champion, stop
        below = home() / "var" / "work" / "stream"
        self._predictor = Predictor(Bundle.load(storage.local(champion.bundle, below)))
        self._asked = self._said = time.monotonic()
        self._answered = self._refused = 0

    def run(self, member: Member, publisher: Publisher) -> None:
        """Until it is to stop, or there is another champion."""
        settings = (self._config.domain, self._predictor.manifest.decoding)
        with reading(Studies, settings, self._config.data.validation, self._config.data.workers) as read:
            log.info("stream: version %d answers topic %s", self._champion.version, self._settings.source.topic)
            while not self._stop.is_set() and not self._is_outdated():
                if messages := self._gathered(member):
                    self._answer(messages, read, member, publisher)
                self._say()
        self._say(at_once=True)

    def _gathered(self, member: Member) -> list[Message]:
        """Up to a batch of messages, the first of which waits no longer than it may; none where nothing comes."""
        messages, size = list[Message](), 0
        most = min(self._settings.source.batch, BATCH)
        end = time.monotonic() + IDLE_SECONDS
        while len(messages) < most and size < GATHERED_BYTES and not self._stop.is_set():
            message = member.poll(max(0.0, end - time.monotonic()))
            if message is not None and not message.error():
                if not messages:
                    end = time.monotonic() + self._settings.wait
                messages.append(message)
                size += len(message)
            elif time.monotonic() >= end:
                break
        return messages

    def _answer(self, messages: Sequence[Message], read: Read, member: Member, publisher: Publisher) -> None:
        """Decode, predict, deliver, and only then commit."""
        items = [_item(message, self._settings.source.max_bytes) for message in messages]
        outcomes = answered(self._predictor, list(read(items)))
        for message, outcome in zip(messages, outcomes, strict=True):
            for line in _lines(outcome, self._champion.bundle_digest):
                publisher.send(line, key=raw(message.key()))
            for refusal in outcome.refusals:
                member.bury(message, Rejected(refusal.code, refusal.reason))
            self._answered += len(outcome.answers)
            self._refused += len(outcome.refusals)
        publisher.flush()
        for message in messages:
            member.done(message)
        member.commit()

    def _is_outdated(self) -> bool:
        """Whether there is a new champion; a registry that does not answer is asked again later."""
        if time.monotonic() - self._asked < 60 * self._settings.champion_minutes:
            return False
        self._asked = time.monotonic()
        try:
            return champion_of(self._config).version != self._champion.version
        except Unavailable as error:
            log.warning("stream: %s", error)
            return False

    def _say(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._said > SAID_SECONDS:
            self._said = time.monotonic()
            log.info("stream: %d answered, %d refused", self._answered, self._refused)


def _item(message: Message, max_bytes: int) -> Item | Refusal:
    partition, offset = place(message)
    name = f"{message.topic()}/{partition}-{offset}"
    try:
        content, content_type = content_of(message, max_bytes), said_in(message).get("content_type")
    except Rejected as error:
        return Refusal(name, error.code, str(error))
    return Item(name, content, content_type=content_type)


def _lines(outcome: Outcome, bundle_digest: str) -> Iterator[bytes]:
    for answer in outcome.answers:
        yield json.dumps({**answer, "bundle_digest": bundle_digest}).encode()
