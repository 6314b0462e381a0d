"""Kafka as a source and as a sink, against librdkafka's own mock cluster: what is stored, committed, buried, and delivered."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from cv_factory_ops.batch import publish
from cv_factory_ops.config.sources import KafkaSource, KafkaTopic
from cv_factory_ops.domain import DeidentificationConfig, pseudonym
from cv_factory_ops.errors import ConfigError, CvFactoryError, Unavailable
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.ingestion.sources.kafka import fetch_messages
from cv_factory_ops.kafka import Publisher
from cv_factory_ops.storage import read_bytes
from domain_medical import DOMAIN
from domain_medical.synthetic import studies
from tests.mock_kafka import MockCluster

SETTINGS = DeidentificationConfig()
Headers = dict[str, str | bytes | None]


@pytest.fixture
def send(brokers: str, topic: str) -> Callable[..., None]:
    """Send values to a partition of the topic."""

    def send(*values: bytes | None, partition: int = 0, headers: Headers | None = None, **where: str) -> None:
        producer = Producer(
            {"bootstrap.servers": where.get("brokers", brokers), "message.max.bytes": 10_000_000, "log_level": 0}
        )
        for value in values:
            producer.produce(where.get("topic", topic), value, partition=partition, headers=headers or {}, key=b"a key")
        assert producer.flush(10) == 0

    return send


@pytest.fixture
def source(brokers: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., KafkaSource]:
    """The topic as a source. The mock cluster makes who joins again wait for the session's time-out."""
    monkeypatch.setenv("QUICK", '{"session.timeout.ms": 4000, "heartbeat.interval.ms": 500}')

    def make(**options: Any) -> KafkaSource:
        given: dict[str, Any] = {
            "bootstrap_servers": brokers,
            "topic": topic,
            "group": topic,
            "timeout": 30,
            "settings_env": "QUICK",
        }
        return KafkaSource(**given | options)

    return make


@pytest.fixture
def inbox(home: Path) -> Inbox:
    return Inbox((home / "inbox").as_uri())


def fetch(source: KafkaSource, inbox: Inbox) -> None:
    fetch_messages(source, inbox, DOMAIN, SETTINGS)


def array(value: int) -> bytes:
    """A message that is accepted."""
    target = io.BytesIO()
    np.save(target, np.full((2, 2), value, np.uint8))
    return target.getvalue()


def place(name: str) -> str:
    """The name of a message without its time."""
    return name.rpartition("-")[0]


def stored(inbox: Inbox) -> dict[str, bytes]:
    return {place(item.id): read_bytes(f"{inbox.uri}/{item.id}") for item in inbox.items() if isinstance(item, Item)}


def committed(brokers: str, group: str, topic: str, partition: int = 0) -> int:
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": group, "log_level": 0})
    [place] = consumer.committed([TopicPartition(topic, partition)], timeout=10)
    consumer.close()
    return place.offset


def everything(brokers: str, topic: str, count: int) -> list[Message]:
    """That many messages of all partitions of a topic."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "reader", "log_level": 0, "auto.offset.reset": "earliest"})
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    found: list[Message] = []
    while len(found) < count and (message := consumer.poll(10)) is not None:
        assert message.error() is None
        found.append(message)
    consumer.close()
    return found


class TestMessages:
    def test_messages_of_all_partitions_arrive_with_what_is_said_of_them(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, brokers: str, topic: str
    ) -> None:
        said = {"label": b"normal", "patient": b"MRN4711", "content_type": b"image/png", "other": b"ignored"}
        send(array(1), array(2), headers=said)
        send(array(3), partition=3)
        fetch(source(), inbox)
        assert stored(inbox) == {f"{topic}/0-0": array(1), f"{topic}/0-1": array(2), f"{topic}/3-0": array(3)}
        items = {place(item.id): item for item in inbox.items() if isinstance(item, Item)}
        first, third = items[f"{topic}/0-0"], items[f"{topic}/3-0"]
        assert (first.label, first.patient, first.content_type) == (
            "normal",
            pseudonym("MRN4711", "patient"),
            "application/x-npy",
        )
        assert (third.label, third.patient) == ("", "")
        assert [committed(brokers, topic, topic, partition) for partition in (0, 3)] == [2, 1]

        send(array(4))
        again = Inbox(inbox.uri)
        fetch(source(), again)
        assert set(stored(again)) - set(stored(inbox)) == {f"{topic}/0-2"}

    def test_a_study_is_deidentified_before_it_is_stored(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, home: Path, topic: str
    ) -> None:
        [(study, _)] = list(studies(1, image_size=32, seed=1, labels=["normal", "opacity"]))[:1]
        told = pydicom.dcmread(io.BytesIO(study))
        told.PatientName, told.PatientID, told.PatientIdentityRemoved = "Doe^Jane", "MRN4711", "NO"
        data = io.BytesIO()
        told.save_as(data)
        send(data.getvalue(), headers={"patient": b"MRN4711"})
        fetch(source(), inbox)
        assert DOMAIN.recognises(stored(inbox)[f"{topic}/0-0"])
        kept = [path.read_bytes() for path in (home / "inbox").rglob("*") if path.is_file()]
        assert not any(secret in content for content in kept for secret in (b"Doe", b"MRN4711"))

    def test_bad_messages_are_refused_and_buried_with_the_reason(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, brokers: str, topic: str
    ) -> None:
        send(None, b"", b"x" * 2_000_000, array(0))
        send(b"value", headers={"label": b"\xff"})
        send(b"no study", headers={"content_type": b"application/dicom", "from": b"a scanner"})
        fetch(source(dead_letter_topic=f"{topic}-dead", max_bytes=1_000_000), inbox)
        codes = ["empty", "empty", "too_large", None, "undecodable", "not_dicom"]
        refused = {place(item.item): item.code for item in inbox.items() if isinstance(item, Refusal)}
        assert refused == {f"{topic}/0-{offset}": code for offset, code in enumerate(codes) if code}
        assert list(stored(inbox)) == [f"{topic}/0-3"]
        assert committed(brokers, topic, topic) == 6

        buried: dict[int, tuple[dict[str, bytes], Message]] = {}
        for message in everything(brokers, f"{topic}-dead", 5):
            said: dict[str, bytes] = dict(message.headers() or [])
            buried[int(said["offset"])] = (said, message)
        assert {offset: said["code"].decode() for offset, (said, _) in buried.items()} == {
            offset: code for offset, code in enumerate(codes) if code
        }
        said, message = buried[5]
        assert (said["topic"], said["partition"], said["from"]) == (topic.encode(), b"0", b"a scanner")
        assert said["reason"]
        assert (message.value(), message.key()) == (b"no study", b"a key")
        assert buried[2][1].value() is None

        send(array(1))
        fetch(source(dead_letter_topic=f"{topic}-dead", max_bytes=1_000_000), Inbox(inbox.uri))
        assert len(everything(brokers, f"{topic}-dead", 5)) == 5

    def test_a_topic_that_is_written_to_all_the_time_has_an_end(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, brokers: str, topic: str
    ) -> None:
        send(*[array(0)] * 20)
        ended = threading.Event()

        def write_on() -> None:
            producer = Producer({"bootstrap.servers": brokers, "linger.ms": 0, "log_level": 0})
            while not ended.wait(0.02):
                producer.produce(topic, array(1), partition=0)
                producer.poll(0)
            producer.purge()

        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            fetch(source(), inbox)
        finally:
            ended.set()
            writer.join()
        names = set(stored(inbox))
        assert names >= {f"{topic}/0-{offset}" for offset in range(20)}
        assert committed(brokers, topic, topic) == len(names)

    def test_two_members_share_the_partitions(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, topic: str
    ) -> None:
        for partition in range(4):
            send(*[array(0)] * 5, partition=partition)
        others = [Inbox(f"{inbox.uri}-{i}") for i in range(2)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda other: fetch(source(), other), others))
        names = {name for other in others for name in stored(other)}
        assert names == {f"{topic}/{partition}-{offset}" for partition in range(4) for offset in range(5)}

    def test_a_topic_that_was_made_anew_is_not_taken_for_the_old_one(
        self, source: Callable[..., KafkaSource], inbox: Inbox, topic: str
    ) -> None:
        for value in (1, 2):
            with MockCluster() as cluster:
                writer = Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
                writer.produce(topic, array(value), partition=0, timestamp=1_700_000_000_000 + value)
                assert writer.flush(10) == 0
                again = Inbox(inbox.uri)
                fetch(source(bootstrap_servers=cluster.bootstrap_servers), again)
        items = [item.id for item in again.items() if isinstance(item, Item)]
        assert sorted(read_bytes(f"{inbox.uri}/{name}") for name in items) == [array(1), array(2)]
        assert {place(name) for name in items} == {f"{topic}/0-0"}
        assert not any("1700000000" in name for name in items)

    def test_an_empty_inbox_begins_at_the_start(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, brokers: str, topic: str
    ) -> None:
        send(*map(array, range(4)))
        fetch(source(), inbox)
        other = f"{inbox.uri}-2"
        with pytest.raises(Full):
            fetch(source(batch=100), Filling(other))
        assert committed(brokers, topic, topic) == 3
        again = Inbox(other)
        fetch(source(), again)
        assert set(stored(again)) == {f"{topic}/0-{offset}" for offset in range(4)}
        assert committed(brokers, topic, topic) == 4


KILLED = """
import os, signal, sys
from cv_factory_ops.config.sources import KafkaSource
from cv_factory_ops.domain import DeidentificationConfig
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.kafka import fetch_messages
from domain_medical import DOMAIN

class Deadly(Inbox):
    def put(self, *given, **more):
        super().put(*given, **more)
        if len(self) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

fetch_messages(KafkaSource.model_validate_json(sys.argv[1]), Deadly(sys.argv[2]), DOMAIN, DeidentificationConfig())
"""


class TestCrashes:
    def test_a_kill_between_storing_and_committing_loses_and_repeats_nothing(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, brokers: str, topic: str
    ) -> None:
        send(*map(array, range(10)))
        given = source(batch=3)
        killed = subprocess.run([sys.executable, "-c", KILLED, given.model_dump_json(), inbox.uri], capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert committed(brokers, topic, topic) == 3
        again = Counting(inbox.uri)
        assert len(again) == 5
        fetch(given, again)
        assert again.put_names == [f"{topic}/0-{offset}" for offset in range(5, 10)]
        assert stored(Inbox(inbox.uri)) == {f"{topic}/0-{offset}": array(offset) for offset in range(10)}
        assert committed(brokers, topic, topic) == 10

    def test_a_message_that_was_half_stored_overwrites_itself(
        self, send: Callable[..., None], source: Callable[..., KafkaSource], inbox: Inbox, brokers: str, topic: str
    ) -> None:
        send(*map(array, range(6)))
        with pytest.raises(Full):
            fetch(source(batch=100), Filling(inbox.uri))
        assert committed(brokers, topic, topic) == 3, "what is stored is committed, also on the way out"
        again = Counting(inbox.uri)
        fetch(source(), again)
        assert again.put_names == [f"{topic}/0-{offset}" for offset in range(3, 6)]
        assert stored(again) == {f"{topic}/0-{offset}": array(offset) for offset in range(6)}


class Counting(Inbox):
    """Remembers what was put."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.put_names: list[str] = []

    def put(self, name: str, *given: Any, **more: Any) -> None:
        super().put(name, *given, **more)
        self.put_names.append(place(name))


class Full(CvFactoryError):
    """The disk of a test is full."""


class Filling(Inbox):
    """Has room for three objects, and for half of the fourth."""

    def _describe(self, name: str, said: dict[str, object]) -> None:
        if len(self) == 3:
            raise Full
        super()._describe(name, said)


class TestFailures:
    def test_nobody_there_is_told_in_one_line(self, source: Callable[..., KafkaSource], inbox: Inbox) -> None:
        with pytest.raises(Unavailable, match=r"^127\.0\.0\.1:1: topic \S+: Kafka does not answer \(\w+\)$"):
            fetch(source(bootstrap_servers="127.0.0.1:1", timeout=1), inbox)

    def test_a_topic_that_is_not_there_is_told(self, source: Callable[..., KafkaSource], inbox: Inbox) -> None:
        with pytest.raises(ConfigError, match="topic nowhere: is not there"):
            fetch(source(topic="nowhere"), inbox)

    @pytest.mark.parametrize("lost", [MockCluster.kill, MockCluster.freeze])
    def test_brokers_that_go_away_or_fall_silent_are_told(
        self, source: Callable[..., KafkaSource], inbox: Inbox, send: Callable[..., None], lost: Callable[[MockCluster], None]
    ) -> None:
        class Last(Inbox):
            def put(self, *given: Any, **more: Any) -> None:
                super().put(*given, **more)
                lost(cluster)

        with MockCluster() as cluster:
            send(array(0), brokers=cluster.bootstrap_servers)
            with pytest.raises(Unavailable, match="Kafka does not answer"):
                fetch(source(bootstrap_servers=cluster.bootstrap_servers, timeout=5), Last(inbox.uri))
        assert len(Inbox(inbox.uri)) == 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (None, "KAFKA_SETTINGS is not set"),
            ("s3cret", "KAFKA_SETTINGS: is no JSON object"),
            ('["s3cret"]', "KAFKA_SETTINGS: is no JSON object"),
            ('{"sasl.pasword": "s3cret"}', r"KAFKA_SETTINGS: librdkafka does not take sasl\.pasword"),
            ('{"security.protocol": "s3cret"}', r"does not take security\.protocol"),
            ('{"security.protocol": "SASL_SSL", "sasl.mechanism": "s3cret"}', r"one of security\.protocol, sasl\.mechanism"),
        ],
    )
    def test_wrong_settings_are_told_without_their_values(
        self,
        source: Callable[..., KafkaSource],
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
        settings: str | None,
        message: str,
    ) -> None:
        if settings is not None:
            monkeypatch.setenv("KAFKA_SETTINGS", settings)
        with pytest.raises(ConfigError, match=message) as failure:
            fetch(source(settings_env="KAFKA_SETTINGS"), inbox)
        assert "s3cret" not in str(failure.value)

    def test_librdkafka_says_nothing_by_itself(
        self,
        source: Callable[..., KafkaSource],
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
        brokers: str,
    ) -> None:
        secret = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "u"}
        monkeypatch.setenv("KAFKA_SETTINGS", json.dumps(secret | {"sasl.password": "s3cret"}))
        with pytest.raises((Unavailable, ConfigError)) as failure:  # the mock cluster knows no SASL
            fetch(source(settings_env="KAFKA_SETTINGS", timeout=2), inbox)
        assert capfd.readouterr() == ("", "")
        assert "s3cret" not in str(failure.value) + caplog.text


class TestPublisher:
    def test_each_prediction_is_delivered_under_its_study(self, brokers: str, topic: str, home: Path) -> None:
        lines = [{"study": f"study-{i}", "label": "normal", "probabilities": [0.5, 0.5]} for i in range(500)]
        path = home / "predictions.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        publish(KafkaTopic(bootstrap_servers=brokers, topic=topic), path)
        found = everything(brokers, topic, 500)
        assert {message.key(): json.loads(message.value() or b"") for message in found} == {
            str(line["study"]).encode(): line for line in lines
        }
        assert len(found) == 500

    def test_it_waits_while_the_queue_is_full(self, brokers: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_SETTINGS", '{"queue.buffering.max.messages": 10}')
        with Publisher(KafkaTopic(bootstrap_servers=brokers, topic=topic, settings_env="KAFKA_SETTINGS")) as publisher:
            for i in range(100):
                publisher.send(str(i).encode())
        assert len(everything(brokers, topic, 100)) == 100

    def test_what_is_not_delivered_is_told(self, topic: str) -> None:
        nowhere = KafkaTopic(bootstrap_servers="127.0.0.1:1", topic=topic, timeout=1)
        publisher = Publisher(nowhere)
        publisher.send(b"x")
        with pytest.raises(Unavailable, match="Kafka does not answer"):
            publisher.flush()
        with pytest.raises(Unavailable):
            publisher.send(b"y")
