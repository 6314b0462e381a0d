"""What Prometheus is told of projects: asked over HTTP, and pushed to a gateway."""

from __future__ import annotations

import base64
import http.server
import logging
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cv_factory_ops import audit, exporter, refusals, storage
from cv_factory_ops import trained as trainings
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.drift import DecisionConfig
from cv_factory_ops.config.notifications import PushgatewayConfig
from cv_factory_ops.exporter import FAMILIES
from cv_factory_ops.records import Performance, Quality
from cv_factory_ops.stage import Order, run_stage
from tests.bundles import free_port, start_cvf, wait_until
from tests.conftest import TINY
from tests.records import gated, put, trained
from tests.test_decide import Verdict, checked

MONITORING = Path(__file__).parents[1] / "docker" / "monitoring"
FOUND: dict[str, Any] = {
    "drifted": {"score": 1e-9},
    "p_values": {"score": 1e-9, "image_mean": 0.3},
    "performance": [
        Performance(
            metric="auc", value=0.81, low=0.74, high=0.88, labelled=120, estimated=False, reference=0.9, reference_low=0.89
        ),
        Performance(metric="accuracy", value=0.7, low=0.6, high=0.8, labelled=0, estimated=True),
    ],
    "quality": Quality(foreign=2, unreadable=1, refused={"too_large": 4, "unsupported": 1}),
}


@pytest.fixture
def config(home: Path) -> ProjectConfig:
    """A project that decides without waiting."""
    free = DecisionConfig(cooldown_hours=0, minimum_labels=0, repeat_labels=0)
    return ProjectConfig.model_validate(TINY | {"decision": free.model_dump()})


def decided(config: ProjectConfig, name: str, verdict: Verdict = "drift", order: Order | None = None, **found: Any) -> None:
    """A drift check and the decision after it."""
    run = f"{config.root}/runs/{name}"
    put(run, checked(verdict, **found))
    run_stage("decide", config, run, order=order)


def promoted(config: ProjectConfig, version: int, digest: str) -> None:
    def change(aliases: audit.Aliases) -> audit.Change:
        digests = {"bundle_digest": digest, "gate_digest": ""}
        return audit.Change(
            action="promotion", who="", why="", run="", version=version, aliases={"champion": version}, **digests
        )

    audit.append(config, {}, change)


def finished(config: ProjectConfig, name: str) -> str:
    """A training whose bundle is made; returns its run."""
    run = f"{config.root}/runs/{name}"
    put(run, trained(f"{run}/train/bundle", "d" * 64, ""))
    trainings.keep(config, run)
    return run


def asked(config: ProjectConfig, *others: ProjectConfig) -> dict[tuple[str, ...], float]:
    """Every sample by name and values of its labels, read by Prometheus' own parser."""
    from starlette.testclient import TestClient

    answer = TestClient(exporter.create_app([config, *others])).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


def labels_of(name: str) -> tuple[str, ...]:
    return ("project", *FAMILIES[name][1])


def samples(text: str) -> dict[tuple[str, ...], float]:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    found = [sample for family in families for sample in family.samples]
    by_labels = {(sample.name, *(sample.labels[name] for name in labels_of(sample.name))): sample.value for sample in found}
    assert all(set(sample.labels) == set(labels_of(sample.name)) for sample in found)
    assert len(by_labels) == len(found)
    return by_labels


def test_a_project_without_a_past_is_readable(config: ProjectConfig) -> None:
    assert asked(config) == {("cvf_project_readable", "tiny"): 1}


def test_check_decision_performance_training_and_champion_are_told(config: ProjectConfig) -> None:
    promoted(config, 3, "c" * 64)
    put(finished(config, "r0"), gated(()).model_copy(update={"challenger": 0.91, "champion": 0.9}))
    ended = trainings.last(config)
    assert ended
    decided(config, "r1", "no drift")
    decided(config, "r2", **FOUND)
    told = asked(config)
    (champion,) = audit.entries(config)
    last = exporter.read(exporter.stored_uris(config)[-1])
    assert told == {
        ("cvf_project_readable", "tiny"): 1,
        ("cvf_drift_last_check_timestamp_seconds", "tiny"): last.time.timestamp(),
        ("cvf_drift_verdict", "tiny", "drift"): 1,
        ("cvf_drift_verdict", "tiny", "no drift"): 0,
        ("cvf_drift_verdict", "tiny", "not enough data"): 0,
        ("cvf_drift_requests", "tiny"): 60,
        ("cvf_drift_alpha", "tiny"): 0.01,
        ("cvf_drift_features_drifted", "tiny"): 1,
        ("cvf_drift_feature_p_value", "tiny", "score"): 1e-9,
        ("cvf_drift_feature_p_value", "tiny", "image_mean"): 0.3,
        ("cvf_drift_captures_left_out", "tiny", "foreign"): 2,
        ("cvf_drift_captures_left_out", "tiny", "unreadable"): 1,
        ("cvf_drift_captures_left_out", "tiny", "quarantined"): 0,
        ("cvf_drift_captures_left_out", "tiny", "refused"): 5,
        ("cvf_model_performance", "tiny", "auc", "measured"): 0.81,
        ("cvf_model_performance_low", "tiny", "auc", "measured"): 0.74,
        ("cvf_model_performance_high", "tiny", "auc", "measured"): 0.88,
        ("cvf_model_performance_reference", "tiny", "auc", "measured"): 0.9,
        ("cvf_model_performance_reference_low", "tiny", "auc", "measured"): 0.89,
        ("cvf_model_performance", "tiny", "accuracy", "estimated"): 0.7,
        ("cvf_model_performance_low", "tiny", "accuracy", "estimated"): 0.6,
        ("cvf_model_performance_high", "tiny", "accuracy", "estimated"): 0.8,
        ("cvf_model_champion_info", "tiny", "3", "c" * 64): 1,
        ("cvf_model_champion_since_timestamp_seconds", "tiny"): champion.time.timestamp(),
        ("cvf_decisions_total", "tiny", "keep", "", ""): 1,
        ("cvf_decisions_total", "tiny", "retrain", "drift", ""): 1,
        ("cvf_decision_new_labels", "tiny"): 0,
        ("cvf_decision_cooldown_until_timestamp_seconds", "tiny"): last.time.timestamp(),
        ("cvf_retraining_decided_timestamp_seconds", "tiny"): last.time.timestamp(),
        ("cvf_retraining_outcome", "tiny", "open"): 1,
        ("cvf_retraining_outcome", "tiny", "done"): 0,
        ("cvf_retraining_outcome", "tiny", "refused"): 0,
        ("cvf_training_last_success_timestamp_seconds", "tiny"): ended.time.timestamp(),
        ("cvf_training_seconds", "tiny"): 0,
        ("cvf_training_epochs", "tiny"): 2,
        ("cvf_training_images_per_second", "tiny"): 1,
        ("cvf_training_processes", "tiny"): 1,
        ("cvf_training_validation", "tiny", "auc"): 0.9,
        ("cvf_training_gate", "tiny", "passed"): 1,
        ("cvf_training_gate", "tiny", "refused"): 0,
        ("cvf_training_test", "tiny", "auc", "challenger"): 0.91,
        ("cvf_training_test", "tiny", "auc", "champion"): 0.9,
    }
    assert {sample[0] for sample in told} == set(FAMILIES), "every metric that is described is told"


def test_what_comes_later_is_told_at_the_next_question(config: ProjectConfig) -> None:
    from starlette.testclient import TestClient

    client = TestClient(exporter.create_app([config]))
    decided(config, "r1", **FOUND)
    assert samples(client.get("/metrics").text)["cvf_retraining_outcome", "tiny", "open"] == 1
    refusals.keep(exporter.read(exporter.stored_uris(config)[-1]).retraining, "gate", "auc is low")
    decided(config, "r2", "not enough data", requests=7)
    told = samples(client.get("/metrics").text)
    assert told["cvf_retraining_outcome", "tiny", "refused"] == 1
    assert (told["cvf_drift_requests", "tiny"], told["cvf_drift_verdict", "tiny", "not enough data"]) == (7, 1)
    assert ("cvf_drift_feature_p_value", "tiny", "score") not in told
    assert told["cvf_decisions_total", "tiny", "retrain", "drift", ""] == 1
    assert told["cvf_model_performance", "tiny", "auc", "measured"] == 0.81, "too few requests make no model better"
    decided(config, "r2", **FOUND | {"performance": []})
    told = samples(client.get("/metrics").text)
    assert told["cvf_drift_feature_p_value", "tiny", "score"] == 1e-9, "the same run, tried again"
    assert ("cvf_model_performance", "tiny", "auc", "measured") not in told


def test_the_last_training_that_ended_well_is_told_once_its_record_lies_there(config: ProjectConfig) -> None:
    finished(config, "r1")
    first = asked(config)["cvf_training_last_success_timestamp_seconds", "tiny"]
    trainings.keep(config, f"{config.root}/runs/r2")
    assert asked(config) == {("cvf_project_readable", "tiny"): 1}, "it is about to be published"
    refused = finished(config, "r2")
    put(refused, gated(("auc is low",)))
    told = asked(config)
    assert told["cvf_training_last_success_timestamp_seconds", "tiny"] > first
    assert told["cvf_training_gate", "tiny", "refused"] == 1
    assert [sample[2:] for sample in told if sample[0] == "cvf_training_test"] == [("auc", "challenger")], (
        "there is no champion"
    )
    storage.write_bytes(f"{config.root}/trained.json", b"{}")
    assert asked(config) == {("cvf_project_readable", "tiny"): 0}


def test_a_broken_project_leaves_the_others_alone(config: ProjectConfig, caplog: pytest.LogCaptureFixture) -> None:
    other = config.model_copy(update={"project": "other"})
    storage.write_bytes(f"{config.root}/decisions/1.json", b"{}")
    decided(other, "r1", **FOUND)
    told = asked(config, other)
    assert (told["cvf_project_readable", "tiny"], told["cvf_project_readable", "other"]) == (0, 1)
    assert told["cvf_drift_requests", "other"] == 60
    assert "decisions/1.json: is not a decision" in caplog.text


def test_the_number_of_features_is_bounded(config: ProjectConfig) -> None:
    values = {f"feature_{i:04d}": i / 10_000 for i in range(2 * exporter.MOST_FEATURES)}
    decided(config, "r1", p_values=values, drifted={})
    features = [sample[2] for sample in asked(config) if sample[0] == "cvf_drift_feature_p_value"]
    assert sorted(features) == sorted(values)[: exporter.MOST_FEATURES]


def test_words_from_headers_are_in_no_label(config: ProjectConfig) -> None:
    found = {"score": 0.2, "score @ model_name=Mrs Smith": 1e-6, "metadata_model_name=Mrs Smith (slowly)": 1e-7}
    decided(config, "r1", p_values=found, drifted={**found, "score (slowly)": 1e-8})
    told = asked(config)
    assert {sample[2] for sample in told if sample[0] == "cvf_drift_feature_p_value"} == {"score", "score (slowly)"}
    assert "Smith" not in str(told)


def test_a_person_s_words_are_in_no_label(config: ProjectConfig) -> None:
    decided(config, "r1", order=Order("retraining", "mara", "Mrs Smith was missed"))
    told = asked(config)
    assert told["cvf_decisions_total", "tiny", "retrain", "manual", ""] == 1
    assert not re.search("mara|Smith", str(told))


def test_the_command_serves_until_sigterm(home: Path, config: ProjectConfig) -> None:
    (home / "project.yaml").write_text(yaml.safe_dump(TINY))
    decided(config, "r1", **FOUND)
    port = free_port()
    process = start_cvf("exporter", "--config", str(home / "project.yaml"), "--port", str(port), folder=home)
    try:

        def answers() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/ping").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers)
        told = samples(httpx.get(f"http://127.0.0.1:{port}/metrics").text)
    finally:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(30)
    assert told["cvf_drift_requests", "tiny"] == 60
    assert ended in {0, -signal.SIGTERM}


@dataclass
class Pushgateway:
    """Takes what a Pushgateway takes: ``PUT /metrics/job/<job>{/<label>/<value>}`` replaces a group."""

    url: str = ""
    status: int = 200
    groups: dict[str, str] = field(default_factory=dict)
    logins: list[str | None] = field(default_factory=list)


@pytest.fixture
def pushgateway() -> Iterator[Pushgateway]:
    gateway = Pushgateway()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            gateway.logins.append(self.headers["Authorization"])
            gateway.groups[self.path] = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.send_response(gateway.status)
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        gateway.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield gateway
        server.shutdown()


def pushed(config: ProjectConfig, url: str, **login: Any) -> ProjectConfig:
    return config.model_copy(update={"pushgateway": PushgatewayConfig(url=url, **login)})


def test_a_decision_pushes_what_the_exporter_would_tell(
    config: ProjectConfig, pushgateway: Pushgateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSH_PASSWORD", "word")
    decided(pushed(config, pushgateway.url, user="cvf", password_env="PUSH_PASSWORD"), "r1", **FOUND)  # noqa: S106
    assert list(pushgateway.groups) == ["/metrics/job/cvf/project/tiny"]
    assert samples(pushgateway.groups["/metrics/job/cvf/project/tiny"]) == asked(config)
    assert pushgateway.logins == [f"Basic {base64.b64encode(b'cvf:word').decode()}"]


@pytest.mark.parametrize(("status", "why"), [(500, "HTTPError"), (None, "URLError")])
def test_a_gateway_that_fails_is_one_warning(
    config: ProjectConfig, pushgateway: Pushgateway, caplog: pytest.LogCaptureFixture, status: int | None, why: str
) -> None:
    pushgateway.status = status or 200
    decided(pushed(config, pushgateway.url if status else "http://127.0.0.1:9"), "r1", **FOUND)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [f"pushgateway: metrics were not pushed: {why}"]
    assert len(exporter.stored_uris(config)) == 1


def test_the_alert_for_performance_asks_what_the_page_calls_worse(config: ProjectConfig) -> None:
    """One series below another of the same labels."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    (rule,) = [rule for group in groups for rule in group["rules"] if rule["alert"] == "CvfPerformanceBelowReference"]
    left, right = re.findall(r"cvf_model_\w+", rule["expr"])
    for number, high in enumerate((0.895, 0.88)):
        performance = FOUND["performance"][0].model_copy(update={"high": high})
        decided(config, f"r{number}", performance=[performance])
        told = asked(config)
        fires = told[left, "tiny", "auc", "measured"] < told[right, "tiny", "auc", "measured"]
        assert fires == performance.is_worse == (high == 0.88)
