"""What every client of Kafka here shares: its settings, its errors in one line, and messages that are surely delivered."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from cv_factory_ops.config import KafkaTopic
from cv_factory_ops.errors import ConfigError, Unavailable

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
        if error is None:
            self.flush()

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
