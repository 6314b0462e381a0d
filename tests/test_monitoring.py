"""A real Prometheus and Alertmanager, with the project's own configuration, over real services: each panel and each
rule returns data, and an alert that fires reaches a webhook."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cv_factory_ops import trained
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.exporter import FAMILIES
from tests import records
from tests.bundles import free_port, npy, start_cvf, wait_until
from tests.served import Served, is_up
from tests.test_exporter import FOUND, decided, promoted

MONITORING = Path(__file__).parents[1] / "docker" / "monitoring"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((MONITORING / "grafana/dashboards").glob("*.json"))}
RULES = [
    rule
    for name in ("rules", "alerts")
    for group in yaml.safe_load((MONITORING / f"{name}.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = [
    pytest.param(target["expr"], id=f"{name}: {panel['title']} {target['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel["targets"]
]
needs_prometheus = pytest.mark.skipif(
    not all(map(shutil.which, ("prometheus", "promtool", "prometheus-alertmanager", "amtool"))),
    reason="needs Prometheus and Alertmanager: apt-get install prometheus prometheus-alertmanager",
)


@dataclass
class Webhook:
    """Takes what Slack takes: messages by the path that they were posted to."""

    url: str
    messages: dict[str, list[dict[str, Any]]]

    def told(self, path: str) -> list[str]:
        """Title and text of each message."""
        return [f"{note['title']}\n{note['text']}" for message in self.messages[path] for note in message["attachments"]]


@dataclass
class Watched:
    """The addresses of a Prometheus and of an Alertmanager, and the webhook behind it."""

    prometheus: str
    alertmanager: str
    webhook: Webhook

    def values(self, expression: str) -> list[float]:
        """Of an instant query, without those that are not a number."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}, trust_env=False).json()
        assert answer["status"] == "success", answer
        found = [float(sample["value"][1]) for sample in answer["data"]["result"]]
        return [value for value in found if value == value]

    def wait_for_scrapes(self) -> None:
        """Until each target was asked anew, and the rules after that."""
        for metric in ("up", "job:cvf_gateway_requests:rate5m"):
            sent = time.time()
            wait_until(lambda metric=metric, sent=sent: self.values(f"min(timestamp({metric})) > {sent}"), 30)


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(scope="module")
def webhook(stack: ExitStack) -> Webhook:
    messages: dict[str, list[dict[str, Any]]] = defaultdict(list)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages[self.path].append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *given: Any) -> None:
            pass

    server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return Webhook(f"http://127.0.0.1:{server.server_address[1]}", messages)


@pytest.fixture(scope="module")
def services(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Running services by the names of their jobs: an endpoint, the exporter, and two gateways, one with nothing behind it."""
    served = Served(tmp_path_factory.mktemp("served"))
    stack.callback(end, served.process)
    config = loop(stack, served)
    lost = served.tree() | {"deploy": {"kind": "local", "url": f"http://127.0.0.1:{free_port()}"}}
    addresses = {
        "gateway": start(stack, served.folder, "gateway", served.tree(), "healthz"),
        "lost": start(stack, served.folder, "gateway", lost, "healthz"),
        "exporter": start(stack, served.folder, "exporter", config.model_dump(mode="json"), "ping"),
    }
    return {
        "gateway": [addresses["gateway"], addresses["lost"]],
        "inference": [served.url.removeprefix("http://")],
        "exporter": [addresses["exporter"]],
    }


def start(stack: ExitStack, folder: Path, command: str, tree: dict[str, Any], ready: str) -> str:
    """A ``cvf`` server of a project; returns its address."""
    address = f"127.0.0.1:{free_port()}"
    file = folder / f"{address}.yaml"
    file.write_text(yaml.safe_dump(tree))
    stack.callback(end, start_cvf(command, "--config", str(file), "--port", address.partition(":")[2], folder=folder))
    wait_until(lambda: is_up(f"http://{address}/{ready}"))
    return address


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)


def loop(stack: ExitStack, served: Served) -> ProjectConfig:
    """What a training, its gate, a champion and three decisions leave: a quiet one, one to retrain, one that a rule stopped."""
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("CVF_HOME", str(served.folder))
    patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
    tree = served.tree() | {"decision": {"cooldown_hours": 24, "minimum_labels": 0, "repeat_labels": 0}}
    config = ProjectConfig.model_validate(tree)
    run = f"{config.root}/runs/training"
    records.put(run, records.trained(f"{run}/train/bundle", served.bundle.digest, ""))
    records.put(run, records.gated(()).model_copy(update={"challenger": 0.91, "champion": 0.9}))
    trained.keep(config, run)
    promoted(config, 3, served.bundle.digest)
    decided(config, "quiet", "no drift")
    decided(config, "shifted", **FOUND)
    decided(config, "again", **FOUND)
    return config


@pytest.fixture(scope="module")
def watched(
    stack: ExitStack, services: dict[str, list[str]], webhook: Webhook, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    """Both servers, once they have seen requests that went well, were refused and failed."""
    folder = tmp_path_factory.mktemp("monitoring")
    alertmanager = start_alertmanager(stack, folder, webhook)
    found = Watched(start_prometheus(stack, folder, services, alertmanager), f"http://{alertmanager}", webhook)
    for _ in range(2):  # the second ones are those that a rate tells of: a series begins with its first value
        send_requests(services)
        found.wait_for_scrapes()
    return found


def start_alertmanager(stack: ExitStack, folder: Path, webhook: Webhook) -> str:
    """With the project's configuration, its secrets below the folder, its first wait short."""
    text = (MONITORING / "alertmanager.yaml").read_text().replace("/run/secrets", str(folder)).replace("30s", "1s")
    for name in ("team", "on_call"):
        (folder / f"slack_{name}").write_text(f"{webhook.url}/{name}")
    (folder / "alertmanager.yaml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    options = (f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address={address}", "--cluster.listen-address=")
    run_server(stack, folder, "prometheus-alertmanager", f"--config.file={folder / 'alertmanager.yaml'}", *options)
    wait_until(lambda: is_up(f"http://{address}/-/ready"))
    return address


def start_prometheus(stack: ExitStack, folder: Path, services: dict[str, list[str]], alertmanager: str) -> str:
    """With the project's configuration and rules, over these services, every second."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs.keys() == services.keys()
    for name, targets in services.items():
        jobs[name] = {"job_name": name, "static_configs": [{"targets": targets}]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config | {"scrape_configs": list(jobs.values())}))
    address = f"127.0.0.1:{free_port()}"
    options = (f"--storage.tsdb.path={folder / 'prometheus'}", f"--web.listen-address={address}")
    run_server(stack, folder, "prometheus", f"--config.file={folder / 'prometheus.yaml'}", *options)
    wait_until(lambda: is_up(f"http://{address}/-/ready"))
    return f"http://{address}"


def run_server(stack: ExitStack, folder: Path, *command: str) -> None:
    with (folder / f"{command[0]}.log").open("wb") as log:
        stack.callback(end, subprocess.Popen(command, stdout=log, stderr=log))


def send_requests(services: dict[str, list[str]]) -> None:
    """One that is answered, one that the gateway refuses, one that the container refuses, and one that finds no endpoint."""
    gateway, lost = (f"http://{address}/predict" for address in services["gateway"])
    container = f"http://{services['inference'][0]}/endpoints/tiny/invocations"
    array = {"content-type": "application/x-npy"}
    sent = [(gateway, npy(), 200), (gateway, b"broken", 400), (container, b"broken", 424), (lost, npy(), 503)]
    for url, content, status in sent:
        answer = httpx.post(url, content=content, headers=array, timeout=60, trust_env=False)
        assert answer.status_code == status, answer.text


@needs_prometheus
@pytest.mark.parametrize("expression", PANELS)
def test_each_panel_has_data(watched: Watched, expression: str) -> None:
    wait_until(lambda: watched.values(expression.replace("$project", "tiny|other")), 30)


@needs_prometheus
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_each_rule_is_evaluated_on_series_that_exist(watched: Watched, rule: dict[str, Any]) -> None:
    watched.values(rule["expr"])
    selectors = re.findall(r"(?:[a-z_]+:)?\bcvf_[\w:]+(?:\{[^}]*\})?|\bup\{[^}]*\}", rule["expr"])
    assert selectors
    for selector in [*selectors, *filter(None, [rule.get("record")])]:
        wait_until(lambda selector=selector: watched.values(selector), 30)


@needs_prometheus
def test_an_alert_that_fires_reaches_the_team(watched: Watched) -> None:
    told: Callable[[], list[str]] = lambda: [text for text in watched.webhook.told("/team") if "CvfDrift\n" in text]  # noqa: E731
    wait_until(told, 60)
    assert told()[0].startswith("FIRING warning: CvfDrift\ntiny: the last check found drift The page ")
    assert not any("CvfDrift" in text for text in watched.webhook.told("/on_call"))


@needs_prometheus
def test_what_is_critical_reaches_who_is_on_call_without_what_follows_from_it(watched: Watched) -> None:
    alerts = [
        {"labels": {"alertname": name, "severity": "critical"}, "annotations": {"summary": f"about {name}"}}
        for name in ("CvfGatewayCircuitOpen", "CvfGatewayErrors")
    ]
    alerts.append({"labels": alerts[1]["labels"] | {"release": "another"}, "annotations": {"summary": "about another release"}})
    posted = httpx.post(f"{watched.alertmanager}/api/v2/alerts", json=alerts, trust_env=False)
    assert posted.status_code == 200, posted.text
    wait_until(lambda: any("about CvfGatewayCircuitOpen" in text for text in watched.webhook.told("/on_call")), 60)
    wait_until(lambda: any("about another release" in text for text in watched.webhook.told("/on_call")), 60)
    found = httpx.get(
        f"{watched.alertmanager}/api/v2/alerts", params={"filter": 'alertname="CvfGatewayErrors"'}, trust_env=False
    ).json()
    states = {item["labels"].get("release", ""): item["status"]["state"] for item in found}
    assert states == {"": "suppressed", "another": "active"}
    assert not any("about CvfGatewayErrors" in text for text in watched.webhook.told("/on_call"))


@needs_prometheus
def test_a_canary_is_told_apart(watched: Watched) -> None:
    samples = httpx.get(f"{watched.prometheus}/api/v1/series", params={"match[]": "cvf_serving_model_info"}, trust_env=False)
    (labels,) = samples.json()["data"]
    assert (labels["endpoint"], labels["fleet"], labels["variant"]) == ("tiny", "blue", "AllTraffic")
    assert (labels["job"], labels["project"]) == ("inference", "tiny")


def accepted(*command: str) -> None:
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_configurations_are_accepted() -> None:
    accepted("promtool", "check", "config", "--lint=all", "--lint-fatal", "prometheus.yaml")
    accepted("promtool", "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml", "alerts.yaml")
    accepted("amtool", "check-config", "alertmanager.yaml")


@needs_prometheus
def test_rules_and_alerts_do_what_their_tests_say() -> None:
    accepted("promtool", "test", "rules", *(str(path) for path in sorted((MONITORING / "tests").glob("*.yaml"))))


def test_each_rule_has_a_test() -> None:
    tests = "".join(path.read_text() for path in (MONITORING / "tests").glob("*.yaml"))
    assert [rule for rule in RULES if not re.search(rf"\b{rule.get('record') or rule['alert']}\b", tests)] == []


def test_each_alert_has_a_severity_that_is_routed() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    assert {rule["labels"]["severity"] for rule in alerts} == {"info", "warning", "critical"}


def test_dashboards_can_be_imported_anywhere_and_show_all_that_is_exported() -> None:
    assert DASHBOARDS.keys() == {"service", "drift", "training", "loop"}
    shown = ""
    for dashboard in DASHBOARDS.values():
        panels = dashboard["panels"]
        assert {panel["datasource"]["uid"] for panel in panels} == {"${source}"}
        assert len({panel["id"] for panel in panels}) == len(panels)
        require_disjoint([panel["gridPos"] for panel in panels])
        shown += " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert {name for name in FAMILIES if not re.search(rf"\b{name}\b", shown)} == set()


def require_disjoint(places: list[dict[str, int]]) -> None:
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
