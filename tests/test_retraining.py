"""Retrainings from captured studies to their end, one refused, one promoted. Real stages, MLflow (SQLite), local endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cv_factory_ops import audit, captures, cli, refusals, registry, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.config.data import DeidentificationConfig
from cv_factory_ops.deploy.local import stop
from cv_factory_ops.deploy.rollout import open_deployer
from cv_factory_ops.deploy.verify import live
from cv_factory_ops.domain import open_domain
from cv_factory_ops.drift.decide import decide
from cv_factory_ops.drift.decisions import outcome, retrainings
from cv_factory_ops.errors import ConfigError, DataError, GateRefused
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.ingestion.manifest import read_manifest
from cv_factory_ops.ingestion.pixels import pixel_digest
from cv_factory_ops.ingestion.sources.captured import answered
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.records import DecideRecord, DeployRecord, DriftRecord, IngestRecord, TrainRecord
from cv_factory_ops.stage import TRAINING, Order, Stage, read_result, run_stage
from cv_factory_ops.training.train import assign
from cv_factory_ops.training.warm_start import misfit
from domain_medical.synthetic import SHIFTED_SCANNER, studies
from tests.bundles import free_port
from tests.capture_lines import capture_line
from tests.conftest import TINY
from tests.records import put

CONTAINER = Path(__file__).with_name("container")
RETRAINING = ["data.include_captures=true", "data.pseudo_labels=0.55", "training.warm_start=champion"]
SENT, LABELLED = 64, 40


class Shop:
    """A project with a champion and an endpoint, and studies of a new scanner that were sent there."""

    def __init__(self, home: Path, epochs: int) -> None:
        self.home, self.path = home, home / "project.yaml"
        deploy = {"kind": "local", "url": f"http://127.0.0.1:{free_port()}", "golden": {"studies": 0}, "timeout": 90}
        given = {"deploy": deploy, "drift": {"minimum": 20}, "decision": {"cooldown_hours": 24, "minimum_labels": 5}}
        training = TINY["training"] | {"epochs": epochs, "learning_rate": 0.01}
        self.path.write_text(yaml.safe_dump(TINY | given | {"training": training, "explanations": {"images": 2}}))
        self.first = (home / "runs" / "first").as_uri()

    def config(self, *overrides: str) -> ProjectConfig:
        return load(self.path, overrides)

    def run(self, name: str, *overrides: str, until: str = "promote") -> str:
        """A training of this name; returns its run."""
        run = (self.home / "runs" / name).as_uri()
        self.go_on(run, *overrides, until=until)
        return run

    def go_on(self, run: str, *overrides: str, until: str = "promote") -> None:
        """The stages of a training in their order."""
        config = self.config(*overrides)
        for stage in TRAINING[: TRAINING.index(until) + 1]:
            run_stage(stage, config, run)

    def retrain(self) -> int:
        """As a schedule does."""
        settings = [part for setting in RETRAINING for part in ("--set", setting)]
        return cli.main(["retrain", "--config", str(self.path), *settings])

    def decided(self) -> str:
        """The run of a retraining that a drift check of the champion has led to."""
        check = (self.home / "runs" / "check").as_uri()
        put(check, self.watched())
        assert DecideRecord.model_validate(run_stage("decide", self.config(), check).record).retrain
        return next(retrainings(self.config())).retraining

    def manifest(self, run: str) -> pd.DataFrame:
        return read_manifest(folder(run) / "ingest")

    def send(self, file: str, requests: dict[str, bytes], answers: dict[str, str]) -> Path:
        """Capture requests with their answers, as the endpoint does; returns the file."""
        lines = [capture_line(name, body, answers[name].encode(), time=datetime.now(UTC)) for name, body in requests.items()]
        path = storage.path_of(f"{captures.folder(self.config())}/tiny/AllTraffic/{datetime.now(UTC):%Y/%m/%d/%H}/{file}.jsonl")
        assert path is not None
        storage.write_bytes(path.as_uri(), ("\n".join(lines) + "\n").encode())
        return path

    def answer(self, bundle: str, requests: dict[str, bytes]) -> dict[str, str]:
        predictor, decoding = Predictor(Bundle.load(folder(bundle))), self.config().decoding
        domain = open_domain("medical")
        decoded = {name: decode_one(body, "application/dicom", domain, decoding) for name, body in requests.items()}
        return {name: predictor.answer([study]).model_dump_json() for name, study in decoded.items()}

    def champion(self) -> registry.Champion:
        found = registry.champion(self.config())
        assert found is not None
        return found

    def stage(self, name: str, run: str, *overrides: str) -> Stage:
        return Stage(name, self.config(*overrides), run, folder(run))

    def watched(self) -> DriftRecord:
        """What a check might have found of the champion."""
        return DriftRecord(
            summary="drift in 1 of 7 features (score p=1e-09) over 60 requests",
            verdict="drift",
            requests=60,
            window_start="",
            window_end="",
            drifted={"score": 1e-9},
            alpha=0.01,
            bundle_digest=self.champion().bundle_digest,
            report=None,
        )

    def drift(self, name: str) -> DriftRecord:
        return DriftRecord.model_validate(run_stage("drift", self.config(), (self.home / "runs" / name).as_uri()).record)


def folder(uri: str) -> Path:
    path = storage.path_of(uri)
    assert path is not None
    return path


def new_studies(prefix: str, count: int, seed: int) -> tuple[dict[str, bytes], dict[str, str]]:
    """Requests of a scanner that training has not seen, and what is true of them."""
    domain, settings = open_domain("medical"), DeidentificationConfig(pixels="trust")
    made = list(studies(count, image_size=48, seed=seed, labels=TINY["labels"], scanners=(SHIFTED_SCANNER,)))
    bodies = {f"{prefix}{i}": domain.deidentify(body, settings).content for i, (body, _) in enumerate(made)}
    return bodies, {f"{prefix}{i}": label for i, (_, label) in enumerate(made)}


@contextmanager
def opened(home: Path, epochs: int) -> Iterator[Shop]:
    """Its first champion serves; studies have been sent, and some of their labels have arrived."""
    shop = Shop(home, epochs)
    with pytest.MonkeyPatch.context() as patch:
        at_home_of(shop, patch)
        shop.run("first")
        requests, labels = new_studies("new", SENT, seed=77)
        answers = shop.answer(f"{shop.first}/train/bundle", requests)
        requests["broken"], answers["broken"] = b"DICM and no more", "{}"
        shop.send("1-first", requests, answers)
        captures.add_labels(shop.config(), dict(list(labels.items())[:LABELLED]) | {"broken": "normal"})
    try:
        yield shop
    finally:
        stop(home / "var" / "endpoint")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Its champion stays the first one."""
    with opened(tmp_path_factory.mktemp("shop"), epochs=12) as shop:
        yield shop


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """One whose champion may change."""
    with opened(tmp_path, epochs=2) as shop:
        at_home_of(shop, monkeypatch)
        yield shop


@pytest.fixture(autouse=True)
def at_home(shop: Shop, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home_of(shop, monkeypatch)


def at_home_of(shop: Shop, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CVF_HOME", str(shop.home))
    patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
    patch.setenv("PYTHONPATH", str(CONTAINER))  # the endpoint's models serve at once
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def refused(shop: Shop) -> str:
    """A retraining that was decided, and that the gate has refused."""
    with pytest.MonkeyPatch.context() as patch:
        at_home_of(shop, patch)
        run = shop.decided()
        with pytest.raises(GateRefused, match=r"below gate\.minimum 1"):
            shop.go_on(run, *RETRAINING, "gate.minimum=1.0", until="gate")
    return run


def test_new_studies_join_with_late_labels_or_the_champions_answers(shop: Shop, refused: str) -> None:
    record, manifest = IngestRecord.model_validate(read_result(refused, "ingest").record), shop.manifest(refused)
    captured = manifest[manifest["source"] == "capture"].set_index("id")
    pseudo = captured[captured["pseudo"] >= 0]
    labelled = captured[captured["pseudo"] < 0]
    assert (manifest.loc[manifest["source"] == "base", "pseudo"] == -1).all()
    assert len(labelled) == record.late_labels == LABELLED
    assert set(labelled["split"]) == {"train", "val", "recent"}
    assert len(pseudo) == record.pseudo_labels > 0
    assert set(pseudo["split"]) == {"train"}
    assert (pseudo["label"] == pseudo["pseudo"]).all()
    answers = {f"capture-{c.inference_id}": json.loads(c.answer) for c in captures.read(shop.config())}
    for name, label in pseudo["label"].items():
        scores = answers[str(name)]["predictions"][0]["scores"]
        assert max(scores, key=scores.get) == TINY["labels"][label]
        assert scores[TINY["labels"][label]] >= 0.55
    assert record.captured == len(captured)
    assert f"captured ({LABELLED} with late labels, {len(pseudo)} with the champion's answers)" in record.summary
    lines = (folder(refused) / "ingest" / "quarantine.jsonl").read_text().splitlines()
    codes = {item["item"]: item["code"] for item in map(json.loads, lines)}
    assert codes.pop("capture-broken") == "not_dicom"
    assert set(codes.values()) <= {"held_out"}, "only patients of other splits are left out"
    card = (folder(refused) / "evaluate" / "data_card.md").read_text()
    assert f"{len(captured)} images are captured requests ({LABELLED} have late labels, {len(pseudo)} train with" in card


def test_the_locked_test_set_is_the_same_images_in_every_retraining(shop: Shop, refused: str) -> None:
    first, again = (IngestRecord.model_validate(read_result(run, "ingest").record) for run in (shop.first, refused))
    assert first.test_digest == again.test_digest
    before, after = (shop.manifest(run).query("split == 'test'").set_index("id") for run in (shop.first, refused))
    assert dict(before["digest"]) == dict(after["digest"])
    assert dict(before["label"]) == dict(after["label"])
    assert set(after["source"]) == {"base"}


def test_a_refused_challenger_leaves_all_as_it_was_and_its_cause(shop: Shop, refused: str) -> None:
    assert shop.champion().version == 1
    assert live(shop.config()).bundle_digest == shop.champion().bundle_digest
    assert not storage.exists(f"{refused}/register/result.json")
    found = refusals.refusal_of(refused)
    assert found is not None
    assert found.stage == "gate"
    assert "is below gate.minimum 1" in found.reason
    assert refusals.refusal_of(shop.first) is None
    assert outcome(next(retrainings(shop.config()))) == "refused"


def test_the_retraining_began_with_the_champion(shop: Shop, refused: str) -> None:
    record = TrainRecord.model_validate(read_result(refused, "train").record)
    champion = shop.champion()
    assert record.warm_start is not None
    assert (record.warm_start.version, record.warm_start.bundle_digest) == (1, champion.bundle_digest)
    assert record.summary.endswith("from champion version 1")
    tags = registry.connect(shop.config()).get_run(record.mlflow_run_id).data.tags
    assert tags["cvf.weights_sha256"] == storage.sha256(shop.home / "runs" / "first" / "train" / "bundle" / "model.safetensors")
    assert tags["cvf.warm_start"] == record.warm_start.told
    card = (folder(refused) / "evaluate" / "model_card.md").read_text()
    assert "weights of champion version 1" in card
    assert TrainRecord.model_validate(read_result(shop.first, "train").record).warm_start is None


def test_a_captured_copy_takes_no_locked_images_place(shop: Shop) -> None:
    """Not even where the image itself is gone from the data, or has lost its label."""
    known = shop.manifest(shop.first).query("split == 'test'")
    source = Path(shop.config().root.removeprefix("file://")) / "phantoms"
    wanted, files = set(known["digest"]), sorted(source.rglob("*.dcm"))
    domain, decoding = open_domain("medical"), shop.config().decoding
    twin = next(f for f in files if pixel_digest(decode_one(f.read_bytes(), None, domain, decoding).image) in wanted)
    body = domain.deidentify(twin.read_bytes(), DeidentificationConfig(pixels="trust")).content
    file = shop.send("twin", {"twin": body}, {"twin": "{}"})
    captures.add_labels(shop.config(), {"twin": "normal"})
    try:
        run = shop.run("twin", *RETRAINING, until="ingest")
        lines = (shop.home / "runs" / "twin" / "ingest" / "quarantine.jsonl").read_text().splitlines()
        codes = {item["item"]: item["code"] for item in map(json.loads, lines)}
        assert codes["capture-twin"] in {"duplicate", "conflicting_label"}
        assert set(shop.manifest(run).query("split == 'test'")["source"]) == {"base"}
        content = twin.read_bytes()
        twin.write_bytes(b"not a study any more")
        with pytest.raises(DataError, match=r"1 of the \d+ images of the locked test set are missing"):
            shop.run("twin_alone", *RETRAINING, until="ingest")
        twin.write_bytes(content)
    finally:
        file.unlink()


def test_a_network_that_does_not_fit_begins_anew(shop: Shop, refused: str) -> None:
    assignment = assign(shop.stage("train", refused, *RETRAINING, "model.width=8"), shop.home)
    assert assignment.initial_weights is None
    assert assignment.warm_start is not None
    assert assignment.warm_start.misfit == "its model.width is 4, the project's 8"
    assert assignment.warm_start.told.endswith(f"champion's weights: {assignment.warm_start.misfit}")
    champion = Bundle.load(shop.home / "runs" / "first" / "train" / "bundle").manifest
    assert misfit(shop.config(), champion) == ""
    assert misfit(shop.config("model.weights=x.safetensors"), champion) == "", "whence its weights came is no difference"
    assert misfit(shop.config('model={"kind": "resnet"}'), champion) == "its network is small_cnn, the project's resnet"
    assert misfit(shop.config('labels=["a", "b"]'), champion) == "its labels are normal, opacity, the project's a, b"
    assert "takes images of 1 channels" in misfit(shop.config("decoding.color=rgb"), champion)


def test_a_champion_that_is_not_what_was_registered_is_not_begun_with(shop: Shop, refused: str) -> None:
    weights = shop.home / "runs" / "first" / "train" / "bundle" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    try:
        with pytest.raises(DataError, match=r"version 1 was registered with [0-9a-f]{12}; training\.warm_start: none"):
            assign(shop.stage("train", refused, *RETRAINING, "training.seed=1"), shop.home)
    finally:
        weights.write_bytes(content)


def test_a_search_says_what_it_does_not_do(shop: Shop) -> None:
    def search(setting: str, values: list[object]) -> str:
        return json.dumps({"trials": 1, "space": {setting: {"kind": "choice", "values": values}}})

    with pytest.raises(ConfigError, match=r"training\.warm_start: none where there is a search"):
        shop.config("training.warm_start=champion", f"search={search('training.epochs', [1, 2])}")
    with pytest.raises(ConfigError, match="one below training that changes the network"):
        shop.config(f"search={search('training.warm_start', ['none', 'champion'])}")
    with pytest.raises(ConfigError, match=r"data\.pseudo_labels: 0\.4 given"):
        shop.config("data.pseudo_labels=0.4")


def test_an_answer_stands_in_for_a_label_only_where_the_champion_is_sure(shop: Shop) -> None:
    config = shop.config("data.pseudo_labels=0.9")

    def told(digest: str = "champion", count: int = 1, **changes: object) -> str:
        prediction = {"label": "opacity", "scores": {"normal": 0.05, "opacity": 0.95}, "abstained": False} | changes
        answer = json.dumps({"predictions": [prediction] * count, "bundle_digest": digest}).encode()
        return answered(captures.Capture("", "x", "", "", b"", answer), config, "champion")

    assert told() == "opacity"
    assert told(scores={"normal": 0.1, "opacity": 0.9}) == "opacity"
    assert told(scores={"normal": 0.11, "opacity": 0.89}) == ""
    assert told(scores={"normal": 0.95, "opacity": 0.05}) == "", "its operating point leans to an improbable label"
    assert told(abstained=True) == ""
    assert told("former champion") == ""
    assert told(count=2) == ""
    assert told(label="tumour", scores={"tumour": 0.99}) == ""
    assert told(label=["opacity"]) == told(scores=None) == ""
    assert answered(captures.Capture("", "x", "", "", b"", b"not JSON"), config, "champion") == ""


def test_the_same_cause_is_not_retrained_for_tomorrow_and_a_refusal_says_why(shop: Shop, refused: str) -> None:
    captures.add_labels(shop.config(), {f"new{i}": "normal" for i in range(LABELLED, LABELLED + 6)})
    later, file = datetime.now(UTC) + timedelta(days=2), folder(refused) / "refused.json"
    told = decide(shop.config(), "file:///tomorrow", shop.watched(), later)
    assert (told.retrain, told.stopped_by) == (False, "duplicate")
    assert "was refused (auc" in told.reason
    content = file.read_bytes()
    file.write_bytes(b"{")
    try:
        untold = decide(shop.config(), "file:///tomorrow", shop.watched(), later)
    finally:
        file.write_bytes(content)
    assert (untold.retrain, untold.stopped_by) == (False, "duplicate"), "the refusal only explains"
    assert "whose champion has not changed since" in untold.reason


@pytest.mark.proof
def test_a_retraining_goes_on_until_it_is_promoted_or_refused_for_good(
    another: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing approval waits; a rejection, or a rollout that was taken back, ends it until a person sees to it."""
    run, before = another.decided(), another.champion()
    another.go_on(run, *RETRAINING, until="register")
    config, decision = another.config(*RETRAINING), next(retrainings(another.config()))
    with pytest.raises(GateRefused, match="has not been approved"):
        run_stage("deploy", another.config(*RETRAINING, "approval.enabled=true"), run)
    assert outcome(decision) == "open"
    with pytest.raises(GateRefused, match="rejected by mara"):
        run_stage("approve", another.config(), run, order=Order("rejection", "mara", "not today"))
    assert another.retrain() == 0
    assert "was refused by stage approve: the rollout was rejected by mara: not today" in capsys.readouterr().out
    run_stage("approve", another.config(), run, order=Order("approval", "mara", "today"))
    assert outcome(decision) == "open"

    run_stage("deploy", config, run)
    first = DeployRecord.model_validate(read_result(another.first, "deploy").record)
    open_deployer(config).put_back(first.endpoint_config_name)  # as an alarm does
    with pytest.raises(DataError, match="silent rollback"):
        run_stage("verify", config, run)
    capsys.readouterr()
    assert another.retrain() == 0
    assert "was refused by stage verify: silent rollback" in capsys.readouterr().out
    assert live(config).bundle_digest == before.bundle_digest, "nothing was rolled out again"

    run_stage("deploy", config, run)
    run_stage("verify", config, run)  # by hand, and the schedule goes on
    _promoted_once(another, run, before)
    _drift_is_measured_against_the_new_champion(another)


def _promoted_once(shop: Shop, run: str, before: registry.Champion) -> None:
    """Also where the process is killed right after the alias has moved."""
    pinned = assign(shop.stage("train", run, *RETRAINING, "training.seed=2"), shop.home).warm_start
    ingested = read_result(run, "ingest")
    assert shop.retrain() == 0
    champion, history = shop.champion(), audit.verify(shop.config())
    assert (before.version, champion.version) == (1, 2)
    assert live(shop.config()).bundle_digest == champion.bundle_digest
    assert champion.test_digest == before.test_digest
    (folder(run) / "promote" / "result.json").unlink()
    captures.add_labels(shop.config(), {f"new{LABELLED}": "normal"})
    assert shop.retrain() == 0
    assert read_result(run, "ingest") == ingested, "neither a new champion nor a late label begins it anew"
    assert audit.verify(shop.config()) == history

    resumed = assign(shop.stage("train", run, *RETRAINING, "training.seed=2"), shop.home).warm_start
    assert resumed == pinned, "a training goes on with the champion that it began with"
    fresh = assign(shop.stage("train", run, *RETRAINING, "training.seed=3"), shop.home).warm_start
    assert (pinned and pinned.version, fresh and fresh.version) == (1, 2)


def _drift_is_measured_against_the_new_champion(shop: Shop) -> None:
    champion = shop.champion()
    requests, _ = new_studies("later", 30, seed=78)
    shop.send("2-later", requests, shop.answer(champion.bundle, requests))
    record = shop.drift("after")
    assert record.bundle_digest == champion.bundle_digest
    assert (record.requests, record.quality.foreign) == (30, SENT)
    requests, _ = new_studies("latest", 5, seed=79)
    shop.send("3-latest", requests, shop.answer(champion.bundle, requests))
    following = shop.drift("following")
    assert following.window_start == record.window_end
    assert (following.verdict, following.requests) == ("not enough data", 5)
    assert following.quality.foreign == 0, "each capture belongs to one check"
