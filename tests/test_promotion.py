"""Releases, rollbacks, refusals and approvals: real MLflow (SQLite), a real local endpoint, the real history on files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cv_factory_ops import audit, registry, storage
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy import golden
from cv_factory_ops.deploy.local import stop
from cv_factory_ops.deploy.verify import live
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, GateRefused, Unavailable
from cv_factory_ops.promotion import ROLLOUT, locked_test, person, promote_by_hand, rollback
from cv_factory_ops.records import EvidenceRecord, RegisterRecord, VerifyRecord
from cv_factory_ops.stage import Order, read_result, run_stage
from tests.bundles import SIZE, free_port, npy, write_bundle
from tests.conftest import TINY, copy_run
from tests.records import evaluated, gated, put, trained

CONTAINER = Path(__file__).with_name("container")
RELEASE = ("register", *ROLLOUT)


class World:
    """A project with an endpoint of its own. Its runs are trained, judged and refused at will; all else is real."""

    def __init__(self, home: Path) -> None:
        self.home, self.numbers = home, itertools.count(1)
        self.path = home / "project.yaml"
        deploy = {"kind": "local", "url": f"http://127.0.0.1:{free_port()}", "timeout": 90}
        self.path.write_text(yaml.safe_dump(TINY | {"deploy": deploy, "preprocessing": {"size": SIZE}}))

    @property
    def config(self) -> ProjectConfig:
        return load(self.path)

    @property
    def client(self) -> MlflowClient:
        return registry.connect(self.config)

    @property
    def aliases(self) -> dict[str, int]:
        """As MLflow itself has them."""
        found = self.client.get_registered_model("tiny").aliases
        return {alias: int(version) for alias, version in found.items()}

    @property
    def history(self) -> list[audit.Entry]:
        return audit.verify(self.config)

    def run(self, reasons: tuple[str, ...] = (), judged: int | None = None) -> str:
        """A run up to its gate, compared with the present champion or with another version; returns its URI."""
        number = next(self.numbers)
        folder = self.home / "runs" / f"run{number}"
        shutil.copytree(self.home / "run", folder)
        run, bundle = folder.as_uri(), write_bundle(folder / "bundle", number)
        mlflow_run = registry.open_run(self.client, self.config, run)
        champion = registry.champion(self.config)
        put(run, trained(bundle.path.as_uri(), bundle.digest, mlflow_run))
        put(run, evaluated(run, judged or (champion.version if champion else None)))
        put(run, gated(reasons))
        for name in ("model_card", "data_card"):
            (folder / "evaluate" / f"{name}.html").write_text(f"<h1>{name} {number}</h1>")
        for name in ("roc", "errors"):
            (folder / "evaluate" / f"{name}.png").write_bytes(name.encode())
        pd.DataFrame({"id": [], "split": []}).to_parquet(folder / "evaluate" / "predictions.parquet")  # no golden studies
        (folder / "gate" / "criteria.json").write_text("[]")
        (folder / "gate" / "criteria.png").write_bytes(b"criteria")
        return run

    def release(self, run: str | None = None) -> int:
        """Register and roll out; returns the version."""
        run = run or self.run()
        for name in RELEASE:
            run_stage(name, self.config, run)
        return self.version(run)

    def version(self, run: str) -> int:
        return int(read_result(run, "register").record["model_version"])

    def run_of(self, version: int) -> str:
        return next(entry.change.run for entry in self.history if entry.change.version == version)

    def digest(self, run: str) -> str:
        return str(read_result(run, "train").record["bundle_digest"])

    def cvf(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cv_factory_ops.cli", *arguments, "--config", str(self.path)]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def world(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("world")
    copy_run(prepared, home)
    yield World(home)
    stop(home / "var" / "endpoint")


@pytest.fixture(autouse=True)
def at_home(world: World, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVF_HOME", str(world.home))
    monkeypatch.setenv("PYTHONPATH", str(CONTAINER))  # its models serve at once
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def champion(world: World) -> int:
    """A champion that has one before it."""
    while "previous" not in (world.aliases if world.history else {}):
        world.release()
    return world.aliases["champion"]


def test_every_move_is_written_down_with_its_evidence(world: World, champion: int) -> None:
    run, before = world.run(), len(world.history)
    version = world.release(run)
    registration, promotion = world.history[before:]
    assert registration.change.aliases == registration.before | {"challenger": version}
    assert promotion.before == registration.change.aliases
    assert world.aliases == promotion.change.aliases == {"champion": version, "previous": champion}
    change = promotion.change
    assert (change.action, change.who, change.run) == ("promotion", f"run {run.rsplit('/', 1)[1]}", run)
    assert change.bundle_digest == world.digest(run) == live(world.config).bundle_digest
    archive = storage.path_of(change.evidence)
    assert archive is not None
    assert storage.sha256(archive) == change.evidence_digest
    tags = world.client.get_model_version("tiny", str(version)).tags
    assert (tags["evidence"], tags["audit"]) == (change.evidence, promotion.digest)


def test_a_repeated_promotion_adds_nothing(world: World, champion: int) -> None:
    run, before = world.history[-1].change.run, world.history
    for name in ROLLOUT:
        run_stage(name, world.config, run)
    assert world.history == before


def test_a_rollback_moves_endpoint_and_alias_together_and_back_again(world: World, champion: int) -> None:
    runs = {entry.change.version: entry.change.run for entry in world.history}
    previous = world.aliases["previous"]
    done = world.cvf("rollback", "--why", "too many false alarms")
    assert (done.returncode, done.stdout) == (0, f"champion is version {previous} (was {champion})\n"), done.stderr
    assert world.aliases == {"champion": previous, "previous": champion}
    assert live(world.config).bundle_digest == world.digest(runs[previous])
    change = world.history[-1].change
    assert (change.action, change.why) == ("rollback", "too many false alarms")
    assert "@" in change.who
    rollback(world.config, champion, "it was the scanner")
    assert world.aliases == {"champion": champion, "previous": previous}
    assert live(world.config).bundle_digest == world.digest(runs[champion])


def test_only_a_version_that_was_champion_can_be_rolled_back_to(world: World, champion: int) -> None:
    run = world.run()
    run_stage("register", world.config, run)
    with pytest.raises(
        DataError, match=rf"--to: {world.version(run)} given; allowed is a version that has been champion: 1, 2"
    ):
        rollback(world.config, world.version(run), "a try")


def test_an_old_run_cannot_be_deployed_past_the_alias(world: World, champion: int) -> None:
    old = next(entry.change.run for entry in world.history if entry.change.version == world.aliases["previous"])
    serves = live(world.config)
    refused = world.cvf("deploy", "--run", old)
    assert refused.returncode == 4
    assert "is neither challenger nor champion" in refused.stderr
    assert "endpoint and alias would part" in refused.stderr
    assert live(world.config) == serves


def test_an_old_version_is_promoted_by_hand_with_a_reason(world: World, champion: int) -> None:
    previous = world.aliases["previous"]
    silent = world.cvf("promote", "--to", str(previous))
    assert (silent.returncode, silent.stderr) == (2, "cvf promote: --why: not given; allowed: the reason, for the history\n")
    done = world.cvf("promote", "--to", str(previous), "--why", "the better one after all")
    assert done.returncode == 0, done.stderr
    assert (world.aliases["champion"], world.aliases["previous"]) == (previous, champion)
    assert world.history[-1].change.action == "promotion"
    assert world.cvf("promote", "--why", "x").returncode == 2


def test_a_refused_run_needs_an_override_and_the_history_keeps_it(world: World, champion: int) -> None:
    run, before = world.run(reasons=("auc 0.100 is below gate.minimum 0.8",)), world.history
    with pytest.raises(GateRefused, match=r"the gate has refused it: auc 0\.100"):
        run_stage("register", world.config, run)
    refused = world.cvf("promote", "--run", run, "--why", "we want it")
    assert refused.returncode == 4
    assert "a person may decide otherwise by --override" in refused.stderr
    assert world.history == before
    done = world.cvf("promote", "--run", run, "--why", "we want it", "--override", "rare disease, 12 cases")
    assert done.returncode == 0, done.stderr
    registration, promotion = (entry.change for entry in world.history[len(before) :])
    assert (registration.override, promotion.override) == ("rare disease, 12 cases", "rare disease, 12 cases")
    assert live(world.config).bundle_digest == world.digest(run)
    assert "OVERRIDE: rare disease, 12 cases" in world.cvf("audit", "log").stdout


def test_a_crash_between_history_and_alias_is_healed(world: World, champion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    for name in RELEASE[:-1]:
        run_stage(name, world.config, run)
    version = world.version(run)

    def die(*arguments: str) -> None:
        raise MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", die)
        with pytest.raises(Unavailable):
            run_stage("promote", world.config, run)
    assert world.aliases["champion"] == champion, "the alias has not moved"
    assert world.history[-1].change.aliases["champion"] == version, "the history has"
    written = world.history
    found = registry.champion(world.config)
    assert found is not None
    assert found.version == world.aliases["champion"] == version, "whoever reads it next finishes the move"
    run_stage("promote", world.config, run)
    assert world.history == written


def test_a_rollback_that_was_killed_goes_on_to_the_same_version(
    world: World, champion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = world.release()

    def die(*arguments: str) -> None:
        raise MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", die)
        with pytest.raises(Unavailable):
            rollback(world.config, None, "false alarms")
    written = world.history
    rollback(world.config, None, "false alarms")
    assert world.history == written
    assert world.aliases == {"champion": champion, "previous": bad}
    run = next(entry.change.run for entry in written if entry.change.version == champion)
    assert live(world.config).bundle_digest == world.digest(run)


def test_an_alias_that_was_moved_past_the_history_is_put_right(world: World, champion: int) -> None:
    world.client.set_registered_model_alias("tiny", "champion", str(world.aliases["previous"]))
    found = registry.champion(world.config)
    assert found is not None
    assert found.version == world.aliases["champion"] == champion


def test_of_two_promotions_at_once_one_is_told_of_the_other(world: World, champion: int) -> None:
    runs, before = [world.run(judged=champion), world.run(judged=champion)], world.history
    for run in runs:
        run_stage("register", world.config, run)
        run_stage("deploy", world.config, run)
        run_stage("verify", world.config, run)
        run_stage("evidence", world.config, run)

    def promote(run: str) -> str:
        try:
            run_stage("promote", world.config, run)
        except CvFactoryError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(promote, runs))
    assert sorted(map(bool, told)) == [False, True], told
    moves = [entry for entry in world.history[len(before) :] if entry.change.action == "promotion"]
    assert len(moves) == 1
    assert world.aliases["champion"] == moves[0].change.version == world.version(runs[1]), "the one that the endpoint serves"
    assert live(world.config).bundle_digest == world.digest(runs[1])


def test_a_registered_run_that_was_trained_anew_is_another_version(world: World, champion: int) -> None:
    run, number = world.run(), next(world.numbers)
    run_stage("register", world.config, run)
    registered, folder = RegisterRecord.model_validate(read_result(run, "register").record), storage.path_of(run)
    assert folder is not None
    serves, written = live(world.config), world.history
    bundle = write_bundle(folder / "again", number)
    put(run, trained(bundle.path.as_uri(), bundle.digest, registered.mlflow_run_id))
    with pytest.raises(DataError, match=rf"version {registered.model_version} was registered with .*; train in a new run"):
        run_stage("register", world.config, run)
    put(run, registered.model_copy(update={"bundle": bundle.path.as_uri(), "bundle_digest": bundle.digest}))
    for order in (None, Order("promotion", "somebody", "forced")):
        with pytest.raises(
            DataError, match=rf"version {registered.model_version}: its run now has bundle {bundle.digest[:12]}"
        ):
            run_stage("deploy", world.config, run, order=order)
    assert (live(world.config), world.history) == (serves, written)


def test_a_broken_history_stops_a_rollout_before_the_endpoint_moves(world: World, champion: int) -> None:
    run, serves = world.run(), live(world.config)
    run_stage("register", world.config, run)
    entry = storage.path_of(f"{world.config.root}/audit/00000002.json")
    assert entry is not None
    content = entry.read_bytes()
    entry.write_bytes(content.replace(b"promotion", b"rollback!"))
    try:
        for order in (None, Order("promotion", "somebody", "forced")):
            with pytest.raises(DataError, match="entry 2 is broken: it was changed"):
                run_stage("deploy", world.config, run, order=order)
    finally:
        entry.write_bytes(content)
    assert live(world.config) == serves


def test_only_a_champion_locks_the_test_set_and_others_must_have_it(world: World, champion: int) -> None:
    run, order = world.run(judged=world.aliases["previous"]), Order("promotion", "somebody", "forced")
    run_stage("register", world.config, run, order=order)
    bundle = world.digest(run)
    asked = {"endpoint_name": "tiny", "endpoint_config_name": "c", "bundle_digest": bundle}
    put(run, VerifyRecord(summary="", status="InService", **asked))
    put(run, EvidenceRecord(summary="", archive="", archive_digest="", files=0))
    lock = storage.path_of(locked_test(world.config))
    assert lock is not None
    content = lock.read_bytes()
    try:
        lock.unlink()
        with pytest.raises(GateRefused, match="the gate compared with"):
            run_stage("promote", world.config, run)
        assert not lock.exists(), "its test set would be everybody's"
        lock.write_text(json.dumps({"run": "another", "digests": ["0"]}))
        for name in ("deploy", "promote"):
            with pytest.raises(DataError, match=r"the test set of this run .* is not the locked one"):
                run_stage(name, world.config, run, order=order)
    finally:
        lock.write_bytes(content)


def test_an_overtaken_challenger_does_not_reach_the_endpoint(world: World, champion: int) -> None:
    slow = world.run()
    world.release()
    run_stage("register", world.config, slow, order=Order("promotion", "somebody", "forced"))
    serves = live(world.config)
    with pytest.raises(GateRefused, match="champion is now version"):
        run_stage("deploy", world.config, slow)
    assert live(world.config) == serves


def test_without_an_approval_nothing_is_rolled_out(world: World, champion: int) -> None:
    run, setting = world.run(), ("--set", "approval.enabled=true")
    run_stage("register", world.config, run)
    serves, written = live(world.config), world.history
    silent = world.cvf("deploy", "--run", run, *setting)
    assert silent.returncode == 4
    assert "has not been approved, and approval.enabled asks for it" in silent.stderr
    rejected = world.cvf("approve", "--run", run, "--by", "mara", "--reject", "--note", "men are too few")
    assert rejected.returncode == 4
    assert "the rollout was rejected by mara: men are too few" in rejected.stderr
    assert world.cvf("deploy", "--run", run, *setting).returncode == 4
    assert (live(world.config), world.history) == (serves, written)

    at = "2026-02-03T04:05:06+00:00"
    assert world.cvf("approve", "--run", run, "--by", "mara", "--note", "now there are more", "--at", at).returncode == 0
    for name in ROLLOUT:
        run_stage(name, load(world.path, ["approval.enabled=true"]), run)
    approval = world.history[-1].change.approval
    assert approval is not None
    assert world.history[-1].change.approval_required
    assert (approval.who, approval.note, approval.time.isoformat()) == ("mara", "now there are more", at)
    kept = json.loads(storage.read_bytes(f"{run}/evidence/bundle/3-impact-assessment/approval.json"))
    assert (kept["who"], kept["gate_digest"]) == ("mara", world.history[-1].change.gate_digest)


def test_an_approval_is_of_one_verdict(world: World, champion: int) -> None:
    """The gate is run again after the approval, with another result: the person has not seen that one."""
    run, config = world.run(), load(world.path, ["approval.enabled=true"])
    run_stage("register", config, run)
    assert world.history[-1].change.approval_required
    with pytest.raises(GateRefused, match="has not been approved"):
        run_stage("deploy", world.config, run)  # whoever runs it has switched the approval off
    named = load(world.path, ["approval.enabled=true", "approval.assignees=[mara, otto]"])
    with pytest.raises(ConfigError, match=r"--by: anna given; allowed by approval\.assignees: mara, otto"):
        run_stage("approve", named, run, order=Order("approval", "anna", ""))
    answer = run_stage("approve", named, run, order=Order("approval", "mara", "")).record
    assert (answer["who"], answer["login"]) == ("mara", person())
    put(run, gated(()).model_copy(update={"summary": "auc 0.850", "challenger": 0.85}))
    with pytest.raises(GateRefused, match="has not been approved"):
        run_stage("deploy", config, run)


def test_an_endpoint_that_serves_something_else_meanwhile_keeps_the_alias(world: World, champion: int) -> None:
    """Verified, then put back by hand to the champion, which the history has no word of: the alias has not moved."""
    run, own = world.run(), world.run_of(champion)
    for name in RELEASE[:-1]:
        run_stage(name, world.config, run)
    promote_by_hand(world.config, own, "not this one")
    before = world.history
    for order in (None, Order("promotion", "somebody", "forced")):
        with pytest.raises(DataError, match=r"serves .* now, not .* as verified; the alias stays where it is$"):
            run_stage("promote", world.config, run, order=order)
    assert world.aliases["champion"] == champion
    assert world.history == before
    assert live(world.config).bundle_digest == world.digest(own)


def spoil(world: World, run: str) -> None:
    """A golden study of the run's bundle that no model answers as it says."""
    study = golden.Study(npy(), "application/x-npy", [2.0, -1.0])
    storage.write_bytes(f"{world.config.root}/models/{world.digest(run)}/golden.npz", golden._packed([study]))


def test_a_champion_that_fails_a_later_check_keeps_the_endpoint(world: World, champion: int) -> None:
    own, serves = world.run_of(champion), live(world.config)
    spoil(world, own)
    with pytest.raises(DataError, match=r"golden study 1: .*; allowed is a difference of [0-9.e-]+$"):
        run_stage("verify", world.config, own)
    assert live(world.config) == serves


def test_a_failed_rollout_goes_back_to_the_champion_and_not_to_what_was_never_promoted(world: World, champion: int) -> None:
    serves, tried, run = live(world.config), world.run(), world.run()
    for name in ("register", "deploy"):
        run_stage(name, world.config, tried)
    for name in ("register", "deploy"):
        run_stage(name, world.config, run)
    spoil(world, run)
    with pytest.raises(DataError, match=rf"golden study 1: .*; the endpoint was put back to {serves.endpoint_config_name}"):
        run_stage("verify", world.config, run)
    assert live(world.config)[:4] == serves[:4]


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_rollout_whose_evidence_cannot_be_made_is_taken_back(world: World, champion: int, by_hand: bool) -> None:
    serves, run = live(world.config), world.run()
    order = Order("promotion", "a person", "we want it") if by_hand else None
    for name in ("register", "deploy", "verify"):
        run_stage(name, world.config, run, order=order)
    storage.delete_tree(f"{run}/gate/criteria.png")  # it was there when `deploy` asked
    with pytest.raises(DataError, match=rf"criteria\.png: .*; the endpoint was put back to {serves.endpoint_config_name}"):
        run_stage("evidence", world.config, run, order=order)
    assert live(world.config)[:4] == serves[:4]
    assert world.aliases["champion"] == champion


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_version_whose_evidence_cannot_be_made_is_not_rolled_out(world: World, champion: int, by_hand: bool) -> None:
    serves, run = live(world.config), world.run()
    storage.delete_tree(f"{run}/gate/criteria.png")
    roll_out = (lambda: promote_by_hand(world.config, run, "we want it")) if by_hand else (lambda: world.release(run))
    with pytest.raises(DataError, match=r"criteria\.png: is not there, and belongs to the evidence of this version"):
        roll_out()
    assert not storage.exists(f"{run}/deploy/result.json")
    assert live(world.config) == serves
    assert world.aliases["champion"] == champion


def test_by_hand_the_endpoint_is_verified_again(world: World, champion: int) -> None:
    run = world.run()
    run_stage("register", world.config, run)
    promoted = promote_by_hand(world.config, run, "by hand")
    assert promoted.model_version == world.version(run) == world.aliases["champion"]
    assert live(world.config).bundle_digest == world.digest(run)
