"""Searches: what is tried, what is given up, what is chosen, and what a crash leaves; launches, MLflow and Optuna are real."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from cv_factory_ops import registry, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.calibration import tempered
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.config.models import EnsembleModel, SmallCnn
from cv_factory_ops.config.search import SearchConfig
from cv_factory_ops.errors import ConfigError, DataError, GateRefused
from cv_factory_ops.metrics import auc
from cv_factory_ops.models import Classifier, build
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.preprocessing.pipeline import to_tensor
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.records import EvaluateRecord, TrainRecord
from cv_factory_ops.stage import Stage, run_stage
from cv_factory_ops.training import worker
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.release import write_bundle
from cv_factory_ops.training.selection import Candidate, Chosen, choose, fit_scaling, fit_weights
from cv_factory_ops.training.study import Prospects, Trial, Trying, draw, settings_of
from cv_factory_ops.training.train import Assignment, Outcome, assign
from cv_factory_ops.training.trials import Trials
from tests.conftest import TINY, copy_run

Project = Callable[..., Path]

LEARNING = {"kind": "choice", "values": [1e-9, 0.003]}
"""One with which nothing is learned, and one with which the phantoms are told apart within four epochs."""
SEARCH: dict[str, Any] = {
    "trials": 4,
    "seed": 11,  # tries the learning rates 0.003, 0.003, 1e-9, 0.003
    "space": {"training.learning_rate": LEARNING, "training.seed": {"kind": "integer", "low": 0, "high": 99}},
    "pruning": {"kind": "median", "startup_trials": 2, "warmup_epochs": 4},
    "select": {"kind": "ensemble", "size": 3},
}
TRAINING = {
    "epochs": 6,
    "batch_size": 4,
    "processes_per_node": 2,
    "schedule": "constant",
    "warmup": 0,
    "augment": {"shift": 0, "intensity": 0},
}


def search_config(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate(SEARCH | changes)


def trial(number: int, history: list[float], state: str = "complete", **found: Any) -> Trial:
    fields = {"params": {}, "seconds": 1.0, "mlflow_run_id": "", **found}
    return Trial.model_validate({"number": number, "history": history, "state": state, **fields})


def trials_of(config: ProjectConfig, run: str, home: Path) -> Trials:
    """Those of a search of a run, as a launcher or a rank that begins sees them."""
    assert config.search is not None
    return Trials(assignment_of(config, run, home), config.search)


def assignment_of(config: ProjectConfig, run: str, out: Path) -> Assignment:
    nothing = {"checkpoint": "", "inputs_digest": "", "data_digest": "", "test_digest": ""}
    return Assignment(config=config, run=run, shards=out, out=out, mean=0.5, std=0.25, **nothing)


def cvf_train(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cv_factory_ops.cli", "train", "--config", home / "project.yaml", "--run", home / "run"]
    given = os.environ | {"CVF_HOME": str(home)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)


@pytest.fixture(scope="module")
def searched(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a finished search; what was told of it lies in ``log``."""
    home = tmp_path_factory.mktemp("searched")
    copy_run(prepared, home)
    (home / "project.yaml").write_text(yaml.safe_dump(TINY | {"training": TRAINING, "search": SEARCH}))
    done = cvf_train(home)
    output, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    (home / "log").write_text(errors)
    (home / "record.json").write_text(json.dumps(json.loads(output)["record"]))
    return home


def table(home: Path) -> list[dict[str, str]]:
    with (home / "run" / "train" / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def runs(config: ProjectConfig, parent: str) -> list[Any]:
    """The MLflow runs below another, in their order."""
    client = registry.connect(config)
    experiment = client.get_experiment_by_name(config.project).experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(found, key=lambda run: run.info.run_name)


def test_a_trial_without_promise_is_given_up_and_says_so(searched: Path) -> None:
    rows = table(searched)
    assert [float(row["training.learning_rate"]) for row in rows] == [0.003, 0.003, 1e-9, 0.003]
    assert [row["state"] for row in rows[:3]] == ["complete", "complete", "pruned"]
    assert rows[2]["reason"].startswith("median: too little promise in epoch ")
    assert 4 <= int(rows[2]["epochs"]) < 6
    log = (searched / "log").read_text()
    assert "trial 2: pruned: median: too little promise" in log
    assert log.count("4 of 4 trials, 0 s left") == 1


def test_the_runs_of_trials_lie_below_that_of_the_search(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVF_HOME", str(searched))
    record = TrainRecord.model_validate_json((searched / "record.json").read_text())
    config, rows = load(searched / "project.yaml"), table(searched)
    client = registry.connect(config)
    children = runs(config, record.mlflow_run_id)
    assert [child.info.run_name for child in children] == [f"trial-{number:03}" for number in range(4)]
    status = {"complete": "FINISHED", "pruned": "KILLED"}
    assert [child.info.status for child in children] == [status[row["state"]] for row in rows]
    for child, row in zip(children, rows, strict=True):
        assert child.data.params["training.learning_rate"] == str(float(row["training.learning_rate"]))
        history = client.get_metric_history(child.info.run_id, "val_auc")
        assert [point.step for point in history] == list(range(1, int(row["epochs"]) + 1))
        assert max(point.value for point in history) == float(row["val_auc"])
    parent = client.get_run(record.mlflow_run_id)
    assert {item.path for item in client.list_artifacts(parent.info.run_id, "search")} == {
        "search/search.png",
        "search/trials.csv",
    }
    assert parent.data.params["search.trials"] == "4"
    assert parent.data.params["training.epochs"] == "6"
    weightiest = max(rows, key=lambda row: float(row["weight"]))
    points = client.get_metric_history(parent.info.run_id, "val_auc")
    assert max(point.value for point in points) == float(weightiest["val_auc"])
    assert (searched / "run" / "train" / "search.png").read_bytes()[:4] == b"\x89PNG"
    assert not (searched / "run" / "checkpoints").exists()


@pytest.mark.proof
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(
    searched: Path, prepared: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copy_run(prepared, home)
    (home / "project.yaml").write_text((searched / "project.yaml").read_text())
    killed = cvf_train(home)
    _wait_for(lambda: list((home / "run" / "checkpoints").glob("trials/*/0001.pt")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = run_stage("train", load(home / "project.yaml"), (home / "run").as_uri())
    errors = capfd.readouterr().err
    assert "trial 1:" in errors
    assert "trial 0:" not in errors  # it was finished
    assert "goes on after epoch" in errors
    assert _weights(home) == _weights(searched)
    assert [_without_time(row) for row in table(home)] == [_without_time(row) for row in table(searched)]
    assert len(runs(load(home / "project.yaml"), result.record["mlflow_run_id"])) == 4


def test_what_a_search_has_chosen_is_a_bundle_like_any_other(
    searched: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(searched, home)
    record = TrainRecord.model_validate_json((searched / "record.json").read_text())
    bundle = Bundle.load(home / "run" / "train" / "bundle")
    assert bundle.digest == record.bundle_digest
    val = Shard.open(home / "run" / "preprocess", "val")
    probabilities, _ = Predictor(bundle).forward(val.images.every(1))
    assert auc(val.labels, probabilities) == pytest.approx(record.val_auc, abs=1e-6)
    members = [row for row in table(home) if float(row["weight"])]
    config = bundle.manifest.model
    assert len(config.members if isinstance(config, EnsembleModel) else [config]) == len(members)
    run_stage("evaluate", load(searched / "project.yaml"), (home / "run").as_uri())
    evaluated = Stage("gate", load(searched / "project.yaml"), (home / "run").as_uri(), home).read(EvaluateRecord)
    assert "learning_curves.png" in {name.rsplit("/", 1)[1] for name in evaluated.pictures}
    assert f"| Architecture | `{config.kind}` (" in (home / "run" / "evaluate" / "model_card.md").read_text()


@pytest.mark.proof
def test_a_trial_that_fails_by_its_settings_ends_neither_the_search_nor_counts_as_nothing(
    project: Project, home: Path, run: str
) -> None:
    space = {"training.learning_rate": {"kind": "choice", "values": [1e30, 0.003]}}
    search = {"trials": 4, "space": space, "seed": _seed_that_begins_with(0, space)}
    path = project(search=search, training=TRAINING | {"epochs": 1, "processes_per_node": 1})
    record = TrainRecord.model_validate(run_stage("train", load(path), run).record)
    first, second = table(home)  # no third: there is nothing else to try
    assert (first["state"], second["state"]) == ("failed", "complete")
    assert first["reason"].startswith("training: the gradient became non-finite in epoch 1")
    assert record.summary.startswith("2 trials (1 failed): trial 1 with training.learning_rate 0.003")
    assert [child.info.status for child in runs(load(path), record.mlflow_run_id)] == ["FAILED", "FINISHED"]


def test_settings_that_all_fail_end_the_search_with_the_last_reason(project: Project, home: Path, run: str) -> None:
    trials = trials_of(load(project(search=SEARCH)), run, home)
    for number in range(3):
        assert not trials.are_enough()
        assert trials.next()
        trials.fail(ConfigError(f"reason {number}"), 2.0)
    assert [each.state for each in trials.finished] == ["failed"] * 3
    with pytest.raises(ConfigError, match="search: all 3 trials have failed; the last: reason 2"):
        trials.are_enough()
    assert trials_of(load(project(search=SEARCH)), run, home).finished == []  # what was wrong may be no setting of the search


def test_an_error_that_no_trial_has_made_ends_the_search_at_once(project: Project, home: Path, run: str) -> None:
    trials = trials_of(load(project(search=SEARCH)), run, home)
    with pytest.raises(ConfigError, match="too many processes"):
        trials.fail(ConfigError("too many processes"), 2.0)
    assert trials.finished == []


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"training.learning_rat": LEARNING}, r"training.learning_rat: unknown field \(did you mean learning_rate\?\)"),
        (
            {"training.learning_rate": {"kind": "uniform", "low": -1, "high": 1}},
            "training.learning_rate: -1.0 given; allowed: gr",
        ),
        ({"preprocessing.size": {"kind": "integer", "low": 8, "high": 9}}, "not preprocessing.size"),
        ({"training.nodes": {"kind": "integer", "low": 1, "high": 2}}, "not training.nodes"),
        ({"training.epochs.more": LEARNING}, "epochs is a value, not a section"),
        (
            {"model": {"kind": "choice", "values": [{"kind": "vit", "patch": 5}, {"kind": "resnet"}]}},
            "a multiple of model.patch 5",
        ),
        (
            {"model": {"kind": "choice", "values": [{"kind": "ensemble"}, {"kind": "resnet"}]}},
            "'ensemble' given; allowed: 'small",
        ),
        (
            {
                "model": {"kind": "choice", "values": [{"kind": "small_cnn"}, {"kind": "resnet"}]},
                "model.width": {"kind": "integer", "low": 4, "high": 8},
            },
            "model.resnet.width: unknown field",
        ),
    ],
)
def test_a_space_with_values_that_are_not_allowed_is_refused(project: Project, space: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"project.yaml: search.space.*{said}"):
        load(project(search=SEARCH | {"space": space}))


def test_the_search_of_the_documentation_is_a_valid_one(project: Project) -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text().partition("\n## Search\n")[2]
    shown = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    config = load(project(**shown))
    assert config.search is not None
    assert len(config.search.space) == 4


def test_a_search_needs_a_budget_and_one_node(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"search: .*allowed: trials, minutes, or both"):
        load(project(search=SEARCH | {"trials": None}))
    with pytest.raises(ConfigError, match=r"allowed: training.nodes: 1 where there is a search"):
        load(project(search=SEARCH, training={"nodes": 2}))


def test_a_trial_has_its_settings_and_the_space_keeps_its_own(project: Project) -> None:
    choice = {"kind": "choice", "values": [{"kind": "small_cnn"}, {"kind": "small_cnn", "dropout": 0.5}]}
    space = {"model.width": {"kind": "integer", "low": 4, "high": 8}, "model": choice}
    config = load(project(search=SEARCH | {"space": space}))
    assert config.search is not None
    changed = config.with_settings(settings_of(config.search, {"model.width": 6, "model": 1}))
    assert changed.model == SmallCnn(width=6, dropout=0.5)
    assert changed.search is None
    assert config.search.space["model"].ends == choice["values"]


def test_what_is_tried_depends_on_the_finished_trials_alone() -> None:
    config, trials = search_config(random_trials=3), list[Trial]()
    for number in range(8):
        params = draw(config, trials)
        assert params is not None
        assert draw(config, trials) == params
        assert draw(config, [Trial.model_validate_json(each.model_dump_json()) for each in trials]) == params
        trials.append(trial(number, [0.5 + 0.005 * params["training.seed"]], params=params))
    others = [each.model_copy(update={"history": [1 - each.val_auc]}) for each in trials]
    assert draw(config, others) != draw(config, trials)  # it learns from them
    assert draw(search_config(seed=1), []) != draw(search_config(seed=2), [])


def test_no_settings_are_tried_twice_and_a_small_space_ends() -> None:
    space = {"training.ema": {"kind": "choice", "values": [0, 0.9]}, "training.seed": {"kind": "integer", "low": 1, "high": 2}}
    small = search_config(space=space)
    trials: list[Trial] = []
    while (params := draw(small, trials)) is not None:
        trials.append(trial(len(trials), [0.5], params=params))
    assert len({json.dumps(each.params) for each in trials}) == len(trials) == 4


@pytest.mark.parametrize(
    ("pruning", "pruner"),
    [
        ({"kind": "median", "startup_trials": 2, "warmup_epochs": 2}, optuna.pruners.MedianPruner(2, 2)),
        ({"kind": "successive_halving", "min_epochs": 1, "factor": 2}, optuna.pruners.SuccessiveHalvingPruner(1, 2)),
        ({"kind": "none"}, optuna.pruners.NopPruner()),
    ],
)
def test_trials_are_given_up_where_an_undisturbed_optuna_would(
    pruning: dict[str, Any], pruner: optuna.pruners.BasePruner
) -> None:
    config, generator = search_config(pruning=pruning, random_trials=50), np.random.default_rng(0)
    study, trials, given_up = optuna.create_study(direction="maximize", pruner=pruner), list[Trial](), 0
    for number in range(16):
        params = draw(config, trials)
        assert params is not None
        curve = np.sort(generator.uniform(0.5, 0.6 + 0.4 * generator.random(), 8)).tolist()
        theirs, ours, stop = study.ask(), list[float](), False
        while len(ours) < 8 and not stop:
            ours.append(curve[len(ours)])
            theirs.report(ours[-1], len(ours))
            stop = theirs.should_prune() and number > 0
            again = Prospects(Trying(mlflow_run_id="", search=config, params=params, earlier=trials, seconds_left=None))
            assert bool(again.verdict(ours, 0)) == stop
        study.tell(theirs, None if stop else max(ours), state=optuna.trial.TrialState.PRUNED if stop else None)
        trials.append(trial(number, ours, "pruned" if stop else "complete", params=params))
        given_up += stop
    assert (given_up > 2) == (pruning["kind"] != "none")


def test_when_the_time_is_over_a_trial_ends_after_its_epoch_unless_it_is_the_first() -> None:
    config, params = search_config(), {"training.learning_rate": 0, "training.seed": 1}
    first = Trying(mlflow_run_id="", search=config, params=params, earlier=[], seconds_left=5)
    later = first.model_copy(update={"earlier": [trial(0, [0.9], params=params)]})
    assert Prospects(later).verdict([0.9], 4.9) == ""
    assert Prospects(later).verdict([0.9], 5.0) == "the search's time was over in epoch 1"
    assert Prospects(later).verdict([], 5.0) == ""  # it has nothing yet
    assert Prospects(first).verdict([0.9], 5.0) == ""


def test_a_budget_is_spent_by_trials_or_by_time(project: Project, run: str, home: Path) -> None:
    def are_enough(states: str, **budget: float | None) -> bool:
        trials = trials_of(load(project(search=SEARCH | {"trials": None} | budget)), run, home)
        trials.finished = [trial(i, [0.5], {"c": "complete", "f": "failed"}[s], seconds=30) for i, s in enumerate(states)]
        return trials.are_enough()

    assert not are_enough("cf", trials=3)
    assert are_enough("cff", trials=3)
    assert are_enough("cccc", trials=3)  # it was made smaller meanwhile
    assert not are_enough("c", minutes=0.6)
    assert are_enough("cc", minutes=0.6)
    assert are_enough("cc", minutes=0.6, trials=9)
    assert not are_enough("ff", trials=1)


def test_finished_trials_lie_on_s3_too(project: Project, bucket: str, home: Path) -> None:
    config, run = load(project(search=SEARCH)), f"s3://{bucket}/run"
    trials = trials_of(config, run, home)
    given = trials.next()
    assert given is not None
    storage.write_bytes(given.checkpoint, b"a checkpoint")
    _finish(given, [0.5, 0.75])
    trials.keep()
    again = trials_of(config, run, home)
    assert again.finished == trials.finished
    assert again.finished[0].best_epoch == 2
    assert not storage.exists(given.checkpoint)
    assert storage.read_bytes(again.uri(0, "safetensors")) == b"weights"
    other = again.next()
    assert other is not None
    assert other.inputs_digest != given.inputs_digest


def _finish(assignment: Assignment, history: list[float]) -> None:
    """What rank 0 leaves of a trial."""
    outcome = Outcome(
        mlflow_run_id="",
        mlflow_page="",
        epochs=len(history),
        best_epoch=1,
        val_auc=max(history),
        images_per_second=1,
        world_size=1,
        history=history,
        parameters=7,
        earlier_seconds=0,
        given_up="",
    )
    (assignment.out / "outcome.json").write_text(outcome.model_dump_json())
    assignment.weights.write_bytes(b"weights")


def network(width: int, seed: int, scale: float = 1) -> Classifier:
    torch.manual_seed(seed)
    found = build(SmallCnn(width=width), 2, 0.5, 0.25).eval()
    with torch.no_grad():
        found.get_parameter("head.1.weight").mul_(scale)
    return found


def val() -> Shard:
    generator = np.random.default_rng(5)
    return Shard(Images([generator.integers(0, 65536, (60, 16, 16)).astype(np.uint16)]), generator.integers(0, 2, 60))


def candidate(config: ProjectConfig, number: int, val_auc: float, width: int = 4, scale: float = 1) -> Candidate:
    found = network(width, number, scale)
    size = sum(weight.numel() for weight in found.parameters())
    own = config.model_copy(update={"model": found.config})
    return Candidate(trial(number, [val_auc], parameters=size), own, lambda _: found, val())


def chosen(config: ProjectConfig, candidates: list[Candidate], **select: Any) -> list[int]:
    selection = search_config(select=select).select
    return [each.trial.number for each in choose(candidates, selection, config.calibration).candidates]


def test_the_best_trial_is_chosen_or_a_smaller_one_that_is_almost_as_good(project: Project) -> None:
    config = load(project())
    candidates = [candidate(config, 0, 0.90), candidate(config, 1, 0.94, 8), candidate(config, 2, 0.93, 4)]
    assert chosen(config, candidates, kind="best") == [1]
    assert chosen(config, candidates, kind="best", tolerance=0.02) == [2]
    assert chosen(config, candidates, kind="best", tolerance=0.05) == [2]  # of two of that size the better one


def test_the_best_trial_that_keeps_to_the_rules_is_chosen(project: Project) -> None:
    config = load(project())
    candidates = [candidate(config, 0, 0.90), candidate(config, 1, 0.94, 8), candidate(config, 2, 0.93, 4)]
    small = candidates[2].trial.parameters

    def by_rules(*rules: dict[str, Any]) -> list[int]:
        return chosen(config, candidates, kind="rules", rules=list(rules))

    assert by_rules({"kind": "size", "parameters": 10**9}) == [1]
    assert by_rules({"kind": "size", "parameters": small}) == [2]
    assert by_rules({"kind": "latency", "milliseconds": 1e6}) == [1]
    values = {each.trial.number: auc(each.val.labels, each.probabilities) for each in candidates}
    best = max(values, key=lambda number: values[number])
    assert by_rules({"kind": "metric", "metric": "auc", "at_least": round(values[best], 6)}) == [best]
    least = min(values, key=lambda number: values[number])
    assert by_rules({"kind": "metric", "metric": "auc", "at_most": round(values[least], 6)}) == [least]
    with pytest.raises(
        GateRefused, match=rf"none of the 3 complete trials .*the best, trial 1: .* weights, at most {small - 1}, .* ms"
    ):
        by_rules({"kind": "size", "parameters": small - 1}, {"kind": "latency", "milliseconds": 1e-6})


@pytest.mark.parametrize(("members", "count", "classes"), [(2, 40, 2), (4, 200, 2), (6, 150, 4)])
def test_the_weights_of_an_ensemble_make_the_labels_most_likely(members: int, count: int, classes: int) -> None:
    generator = np.random.default_rng(members)
    labels = generator.integers(0, classes, count)
    logits = generator.normal(size=(members, count, classes))
    logits[:, np.arange(count), labels] += generator.uniform(-0.5, 2, (members, 1))
    probabilities = softmax(logits, axis=2)
    of_label = probabilities[:, np.arange(count), labels]
    shares = np.full(members, 1 / members)  # of a mixture, by expectation-maximisation (Dempster et al. 1977)
    for _ in range(20_000):
        shares = (shares[:, None] * of_label / (shares @ of_label)).mean(1)
    weights = fit_weights(labels, probabilities)
    assert weights == pytest.approx(shares, abs=1e-4)
    assert weights.sum() == pytest.approx(1)
    assert np.log(weights @ of_label).mean() >= np.log(shares @ of_label).mean() - 1e-12


def test_members_of_an_ensemble_are_calibrated_as_logistic_regression_does() -> None:
    generator = np.random.default_rng(3)
    labels = (generator.random(300) < 0.3).astype(np.int64)
    margin = 4 * (labels + generator.normal(size=300)) + 3  # too sure of itself, and leaning to the second label
    scaling = fit_scaling(labels, softmax(np.c_[np.zeros(300), margin], axis=1))
    often = np.bincount(labels)
    targets = np.where(labels == 1, (often[1] + 1) / (often[1] + 2), 1 / (often[0] + 2))  # Platt 1999, section 2.2
    both, weights = np.r_[margin, margin][:, None], np.r_[targets, 1 - targets]
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(both, np.repeat([1, 0], 300), weights)
    assert 1 / scaling.temperature == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert scaling.bias == pytest.approx([0, theirs.intercept_[0]], rel=1e-4)


def test_calibration_of_members_finds_the_scaling_that_spoilt_them_and_an_end_where_all_is_right() -> None:
    generator = np.random.default_rng(4)
    logits = 1.5 * generator.normal(size=(20_000, 3))
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(1)  # each label with the probability of its softmax
    spoilt = softmax(3 * logits + [0, 2, -1], axis=1)
    scaling = fit_scaling(labels, spoilt)
    assert scaling.temperature == pytest.approx(3, rel=0.05)
    assert scaling.bias == pytest.approx([0, -2 / 3, 1 / 3], abs=0.1)
    assert scaling.of(spoilt) == pytest.approx(softmax(logits, axis=1), abs=0.05)
    right = fit_scaling(np.array([0, 1] * 20), np.array([[0.6, 0.4], [0.4, 0.6]] * 20))
    assert right.of(np.array([[0.6, 0.4]])) == pytest.approx(np.array([[21 / 22, 1 / 22]]), abs=1e-3)


def test_networks_without_weight_are_left_out_of_an_ensemble(project: Project) -> None:
    config, shard = load(project()), val()
    candidates = [candidate(config, number, 0.9 - 0.01 * number) for number in range(3)]
    right = np.eye(2)[shard.labels]
    alike = np.clip(0.5 + 0.1 * (right - 0.5) + 0.05 * np.random.default_rng(0).normal(size=(60, 1)) * [1, -1], 0.01, 0.99)
    wrong = np.clip(1 - 0.9 * right, 0.05, 0.95)
    planted = [0.8 * right + 0.1, alike, wrong]
    for each, probabilities in zip(candidates, planted, strict=True):
        each.__dict__["probabilities"] = probabilities.astype(np.float32)
    assert 2 not in chosen(config, candidates, kind="ensemble")


def test_a_bundle_of_several_networks_answers_with_the_weighted_mean(project: Project, home: Path, run: str) -> None:
    config = load(project())
    path = home / "run" / "preprocess"
    val, out = Shard.open(path, "val"), home / "out"
    members = [candidate(config, 0, 0.9, 4, 8), candidate(config, 1, 0.8, 6, 3)]
    members = [Candidate(each.trial, each.config, each.load, val) for each in members]
    out.mkdir()
    network = Chosen(members, [0.7, 0.3]).network
    bundle = write_bundle(assign(Stage("train", config, run, home), out), network, torch.device("cpu"))
    predictor, images = Predictor(Bundle.load(bundle.path)), val.images.every(1)
    expected = np.zeros((len(val), 2))
    embeddings = []
    for member, weight in zip(members, (0.7, 0.3), strict=True):
        with torch.no_grad():
            logits, embedding = member.network(to_tensor(images[np.arange(len(val))]))
        scaled = logits.double().numpy() / member.scaling.temperature + member.scaling.bias
        expected += weight * softmax(scaled, axis=1)
        embeddings.append(embedding.numpy())
    found, embedding = predictor.forward(images[np.arange(len(val))])
    # Probabilities are kept in float32, and a temperature below 1 magnifies their rounding.
    temperature = bundle.manifest.temperature
    assert found == pytest.approx(tempered(expected, temperature), abs=1e-6 / min(temperature, 1))
    assert embedding == pytest.approx(np.concatenate(embeddings, axis=1), abs=1e-6)
    with pytest.raises(ConfigError, match=r"model.kind: 'ensemble' given"):
        load(project(model=bundle.manifest.model.model_dump(mode="json")))


def test_a_gpu_without_enough_memory_is_a_matter_of_the_settings(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size: 8 given; allowed: what the GPU's memory suffices for"):
        with worker._memory_explained(load(project())):
            raise torch.OutOfMemoryError  # what a GPU does that is not there


def test_weights_that_a_trial_would_begin_with_are_looked_for_before_any(project: Project, home: Path, run: str) -> None:
    choice = {"kind": "choice", "values": [{"kind": "small_cnn"}, {"kind": "small_cnn", "weights": "elsewhere.safetensors"}]}
    path = project(search=SEARCH | {"space": {"model": choice}})
    with pytest.raises(DataError, match=r"search.space: elsewhere.safetensors: file:///.* is not there"):
        assign(Stage("train", load(path), run, home), home)
    (home / "elsewhere.safetensors").write_bytes(b"one")
    one = assign(Stage("train", load(path), run, home), home).inputs_digest
    (home / "elsewhere.safetensors").write_bytes(b"another")
    assert assign(Stage("train", load(path), run, home), home).inputs_digest != one


def _seed_that_begins_with(place: int, space: dict[str, Any]) -> int:
    """A seed whose first trial takes that value of the only choice."""
    for seed in range(100):
        first = draw(search_config(space=space, seed=seed), [])
        if first and list(first.values()) == [place]:
            return seed
    raise AssertionError("no seed does")


def _weights(home: Path) -> str:
    return storage.sha256(home / "run" / "train" / "bundle" / "model.safetensors")


def _without_time(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if name != "seconds"}


def _wait_for(done: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
