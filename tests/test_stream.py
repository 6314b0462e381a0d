"""Studies from one Kafka topic, answers in another, against librdkafka's mock cluster; and a batch that is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from cv_factory_ops import batch, registry, stream
from cv_factory_ops.batch import Journal, Outcome, Study, answered
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.domain import Decoded
from cv_factory_ops.errors import ConfigError, Unavailable
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.kafka import Member
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.registry import Champion
from cv_factory_ops.stage import run_stage
from cv_factory_ops.stream import run
from tests.bundles import npy, png, wait_until, write_bundle
from tests.conftest import TINY


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("stream") / "bundle", seed=1)


@pytest.fixture
def champion(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Champion:
    """The tiny bundle as champion of a project whose registry is not asked: that it is found is tested elsewhere."""
    found = Champion(version=1, bundle=bundle.path.as_uri(), bundle_digest=bundle.digest, test_digest="t", run_id="r")
    monkeypatch.setattr(registry, "champion", lambda _: found)
    return found


def config(brokers: str, topic: str, **source: Any) -> ProjectConfig:
    """The tiny project as a stream from a topic to ``<topic>-out``; the mock cluster makes who joins again wait for the
    session's time-out."""
    where = {"bootstrap_servers": brokers, "timeout": 20, "settings_env": "QUICK"}
    read = {**where, "topic": topic, "group": topic, "dead_letter_topic": f"{topic}-dead"} | source
    stream = {"source": read, "sink": {**where, "topic": f"{topic}-out"}, "wait": 0.1}
    return ProjectConfig.model_validate(TINY | {"stream": stream})


def with_stream(given: ProjectConfig, **changes: Any) -> ProjectConfig:
    """Settings of the stream that no project is allowed: tests cannot wait that long."""
    assert given.stream is not None
    return given.model_copy(update={"stream": given.stream.model_copy(update=changes)})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK", '{"session.timeout.ms": 4000, "heartbeat.interval.ms": 500}')


def send(brokers: str, topic: str, *values: bytes | None, key: bytes = b"a key", **headers: bytes) -> None:
    producer = Producer({"bootstrap.servers": brokers, "log_level": 0})
    for value in values:
        producer.produce(topic, value, partition=0, key=key, headers=dict(headers))
    assert producer.flush(10) == 0


def received(brokers: str, topic: str, count: int, seconds: float = 60) -> list[Message]:
    """The first messages of a topic, once there are so many, or the seconds are over."""
    settings = {"bootstrap.servers": brokers, "group.id": "reader", "log_level": 0, "allow.auto.create.topics": True}
    consumer = Consumer(settings)
    consumer.list_topics(topic, timeout=10)
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(4)])
    found: list[Message] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        message = consumer.poll(0.5)
        if message is not None and not message.error():
            found.append(message)
    consumer.close()
    return found


def committed(brokers: str, topic: str) -> int:
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": topic, "log_level": 0})
    [place] = consumer.committed([TopicPartition(topic, 0)], timeout=10)
    consumer.close()
    return place.offset


STREAM = """
import os, signal, sys
from cv_factory_ops import registry, stream
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.kafka import Publisher
from cv_factory_ops.registry import Champion

registry.champion = lambda _: Champion(version=1, bundle=sys.argv[2], bundle_digest="d", test_digest="t", run_id="r")

class Deadly(Publisher):
    def flush(self):
        super().flush()
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    stream.Publisher = Deadly
    stream.run(ProjectConfig.model_validate_json(sys.argv[1]))
"""


def run_until(done: Callable[[], object], given: ProjectConfig) -> None:
    """A stream in this process, which gets SIGTERM once something is done."""
    failures: list[AssertionError] = []

    def end() -> None:
        try:
            wait_until(done, 60)
        except AssertionError as error:
            failures.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=end)
    watcher.start()
    run(given)
    watcher.join()
    assert not failures


def test_answers_are_those_of_the_predictor_and_bad_messages_are_buried(
    brokers: str, topic: str, bundle: Bundle, champion: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, joined = list[list[str]](), dict[str, Any]()

    def watched(predictor: Predictor, studies: Sequence[Study | Refusal]) -> list[Outcome]:
        together.append([study.item for study in studies])
        return answered(predictor, studies)

    monkeypatch.setattr(stream, "answered", watched)
    monkeypatch.setattr(stream, "GATHERED_BYTES", 100_000)
    monkeypatch.setattr(stream, "BATCH", 4)
    monkeypatch.setattr(stream, "Member", lambda source, settings: joined.update(settings) or Member(source, settings))
    send(brokers, topic, npy(), key=b"first", content_type=b"application/x-npy")
    send(brokers, topic, b"no image", b"", None, b"x" * 100_001, content_type=b"image/png")
    send(brokers, topic, png(), key=b"last")
    run_until(lambda: committed(brokers, topic) == 6, config(brokers, topic, max_bytes=100_000))
    answers = sorted(received(brokers, f"{topic}-out", 2), key=lambda message: message.value() or b"")
    letters = received(brokers, f"{topic}-dead", 4)
    bodies = [json.loads(message.value() or b"") for message in answers]
    assert [message.key() for message in answers] == [b"first", b"last"]
    assert [body["study"] for body in bodies] == [f"{topic}/0-0", f"{topic}/0-5"]
    assert {body["bundle_digest"] for body in bodies} == {bundle.digest}
    (expected,) = Predictor(bundle).answer([Decoded(np.load(io.BytesIO(npy())))]).predictions
    assert bodies[0]["scores"] == pytest.approx(expected.scores, abs=1e-5)
    said: list[dict[str, bytes]] = [dict(message.headers() or []) for message in letters]
    assert {headers["offset"]: headers["code"] for headers in said} == {
        b"1": b"undecodable",
        b"2": b"empty",
        b"3": b"empty",
        b"4": b"too_large",
    }
    assert joined == {"max.poll.interval.ms": 30 * 60 * 1000}, "by answer_minutes"
    assert max(map(len, together)) <= 4
    assert f"{topic}/0-4" in {batch[-1] for batch in together}, "so many bytes fill a batch"


class Gone:
    """A consumer whose partitions have gone to other members: the mock cluster takes too long to take them away."""

    def commit(self, **_: Any) -> None:
        raise KafkaException(KafkaError(KafkaError.ILLEGAL_GENERATION))


def test_a_commit_of_what_has_gone_to_other_members_is_logged(
    brokers: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    send(brokers, topic, npy())
    given = config(brokers, topic).stream
    assert given is not None
    member = Member(given.source)
    monkeypatch.setattr(member, "_consumer", Gone())
    member.done(received(brokers, topic, 1)[0])
    member.commit()
    assert f"topic {topic}: partitions have gone to other members; messages come again" in caplog.text


def test_a_kill_between_delivery_and_commit_loses_nothing(
    brokers: str, topic: str, home: Path, bundle: Bundle, champion: Champion
) -> None:
    send(brokers, topic, npy(), npy(), npy())
    given = config(brokers, topic)
    (home / "stream_process.py").write_text(STREAM)
    command = [sys.executable, str(home / "stream_process.py"), given.model_dump_json(), bundle.path.as_uri()]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert committed(brokers, topic) < 0, "nothing is committed"
    run_until(lambda: committed(brokers, topic) == 3, given)
    studies = [json.loads(message.value() or b"")["study"] for message in received(brokers, f"{topic}-out", 6)]
    assert len(studies) == 6, "once more each"
    assert sorted(set(studies)) == [f"{topic}/0-{offset}" for offset in range(3)]


def test_a_new_champion_takes_over(
    brokers: str, topic: str, bundle: Bundle, champion: Champion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = write_bundle(tmp_path / "other", seed=2)
    found, digests = [champion], list[str]()
    monkeypatch.setattr(registry, "champion", lambda _: found[0])

    def taken_over() -> bool:
        """Sends on until the new champion has answered."""
        messages = received(brokers, f"{topic}-out", len(digests) + 1)
        digests[:] = [json.loads(message.value() or b"")["bundle_digest"] for message in messages]
        found[0] = replace(champion, version=2, bundle=other.path.as_uri(), bundle_digest=other.digest)
        if digests[-1] != other.digest:
            send(brokers, topic, npy())
        return digests[-1] == other.digest

    send(brokers, topic, npy())
    run_until(taken_over, with_stream(config(brokers, topic), champion_minutes=0.001))
    assert digests[0] == bundle.digest
    assert committed(brokers, topic) == len(digests), "the change costs no answer and no second one"


def test_what_is_not_delivered_is_not_committed(brokers: str, topic: str, champion: Champion) -> None:
    send(brokers, topic, npy())
    given = config(brokers, topic)
    assert given.stream is not None
    nowhere = given.stream.sink.model_copy(update={"bootstrap_servers": "127.0.0.1:1", "timeout": 1})
    with pytest.raises(Unavailable, match="Kafka does not answer"):
        run(with_stream(given, sink=nowhere))
    assert committed(brokers, topic) < 0


def test_a_project_without_a_stream_says_so() -> None:
    with pytest.raises(ConfigError, match="stream: is missing in the project"):
        run(ProjectConfig.model_validate(TINY))


def test_one_image_that_the_bundle_does_not_take_costs_no_other(bundle: Bundle) -> None:
    image = np.load(io.BytesIO(npy()))
    studies = [
        Study("a", [("a", Decoded(image))]),
        Refusal("b", "undecodable", "is no image"),
        Study("c", [("c#0000", Decoded(np.dstack([image] * 3))), ("c#0001", Decoded(image))]),
    ]
    first, second, third = answered(Predictor(bundle), studies)
    assert ([line["study"] for line in first.answers], first.refusals) == (["a"], [])
    assert (second.answers, second.refusals) == ([], [studies[1]])
    assert [line["study"] for line in third.answers] == ["c#0001"]
    assert [(refusal.item, refusal.code) for refusal in third.refusals] == [("c#0000", "channels")]


def test_a_journal_forgets_what_was_half_written(tmp_path: Path) -> None:
    outcomes = [Outcome(f"i{i}", [{"study": f"i{i}", "label": "\u00e9"}], [Refusal("r", "c", "why")]) for i in range(3)]
    with Journal(tmp_path / "journal") as journal:
        journal.add(outcomes)
    whole = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(whole[:-5])
    again = Journal(tmp_path / "journal")
    assert again.items == {"i0", "i1"}
    assert list(again.outcomes()) == outcomes[:2]


PREDICT = """
import os, signal, sys
from cv_factory_ops import batch, registry
from cv_factory_ops.config import load
from cv_factory_ops.registry import Champion
from cv_factory_ops.stage import run_stage

bundle, digest = sys.argv[3:]
registry.champion = lambda _: Champion(version=1, bundle=bundle, bundle_digest=digest, test_digest="t", run_id="r")

class Deadly(batch.Journal):
    def add(self, outcomes):
        super().add(outcomes)
        if len(list(self.outcomes())) >= 12:
            with self.path.open("a") as file:
                file.write('{"item": "half')
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    batch.BATCH, batch.Journal = 4, Deadly
    run_stage("predict", load(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_batch_goes_on_and_ends_as_one_that_was_not(
    home: Path, bundle: Bundle, champion: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    (home / "studies").mkdir()
    for i in range(20):
        (home / "studies" / f"{i:02}.npy").write_bytes(npy(rng.random((20, 24), dtype=np.float32)))
    (home / "studies" / "05.npy").write_bytes(b"broken")
    settings = TINY | {"batch": {"path": str(home / "studies")}}
    (home / "project.yaml").write_text(yaml.safe_dump(settings))
    (home / "predict_process.py").write_text(PREDICT)
    arguments = [home / "project.yaml", (home / "killed").as_uri(), bundle.path.as_uri(), bundle.digest]
    command = [sys.executable, home / "predict_process.py", *arguments]
    killed = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (home / "killed" / "predict").exists()

    asked: list[int] = []

    def counted(predictor: Predictor, studies: Sequence[Study | Refusal]) -> list[Outcome]:
        asked.append(len(studies))
        return answered(predictor, studies)

    monkeypatch.setattr(batch, "answered", counted)
    run_stage("predict", load(home / "project.yaml"), (home / "killed").as_uri())
    assert sum(asked) == 8, "the other twelve are not done again"
    run_stage("predict", load(home / "project.yaml"), (home / "whole").as_uri())
    continued, whole = home / "killed" / "predict", home / "whole" / "predict"
    assert (continued / "quarantine.jsonl").read_text() == (whole / "quarantine.jsonl").read_text()
    found, expected = ((folder / "predictions.jsonl").read_text().splitlines() for folder in (continued, whole))
    assert len(expected) == 19
    for one, other in zip(map(json.loads, found), map(json.loads, expected), strict=True):
        assert (one["study"], one["label"]) == (other["study"], other["label"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert not (whole / "journal.jsonl").exists()
