"""Which of a search's networks become the bundle: the best, the best that keeps to rules, or several as one.

All of it is judged on validation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from cv_factory_ops.calibration import tempered
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.evaluation import CalibrationConfig
from cv_factory_ops.config.models import EnsembleModel, Member
from cv_factory_ops.config.search import (
    BestTrial,
    EnsembleOfTrials,
    LatencyRule,
    MetricRule,
    Rule,
    RuledTrial,
    Selection,
    SizeRule,
)
from cv_factory_ops.errors import GateRefused
from cv_factory_ops.metrics import Labels, Scores, classification
from cv_factory_ops.models import Classifier, join
from cv_factory_ops.predictor import in_batches, infer
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.release import calibrate
from cv_factory_ops.training.study import Trial

LEAST_WEIGHT = 0.01
"""Of a network in an ensemble; it costs as much time as any other."""
MOST_TEMPERATURE = 100.0
"""Of a network that tells nothing: its answers are then almost those of the bias alone."""
REPEATS = 20
"""Times that one image is answered, to measure how long it takes."""


@dataclass(frozen=True)
class Scaling:
    """Probabilities p become softmax(log p / temperature + bias)."""

    temperature: float
    bias: NDArray[np.float64]
    """(classes,), 0 for the first"""

    def of(self, probabilities: Scores) -> Scores:
        """(N, classes) -> (N, classes)"""
        scaled: Scores = np.exp(_log_shares(_logs(probabilities) / self.temperature + self.bias))
        return scaled


@dataclass(frozen=True)
class Candidate:
    """A complete trial, its network, and what that says of validation."""

    trial: Trial
    config: ProjectConfig
    """The trial's own."""
    load: Callable[[Trial], Classifier]
    val: Shard

    @property
    def network(self) -> Classifier:
        """On the CPU, in evaluation mode; read anew each time, so that none stays in memory that is not chosen."""
        return self.load(self.trial)

    @cached_property
    def probabilities(self) -> Scores:
        """(N, classes)"""
        return np.concatenate([probabilities for probabilities, _ in in_batches(self.network, self.val.images)])

    @cached_property
    def scaling(self) -> Scaling:
        """How it is calibrated before it is mixed with others: one that is too sure of itself, or leans to a label, would count
        for less than what it can tell."""
        return fit_scaling(self.val.labels, self.probabilities)

    @cached_property
    def calibrated(self) -> Scores:
        """(N, classes) probabilities with that scaling."""
        return self.scaling.of(self.probabilities)


@dataclass(frozen=True)
class Chosen:
    """What becomes the bundle: one candidate, or several with their weights, the weightiest first."""

    candidates: list[Candidate]
    weights: list[float]

    @property
    def network(self) -> Classifier:
        if len(self.candidates) == 1:
            return self.candidates[0].network
        networks, members = [candidate.network for candidate in self.candidates], []
        for candidate, weight in zip(self.candidates, self.weights, strict=True):
            scaling = candidate.scaling
            member = Member(
                model=candidate.config.model, temperature=scaling.temperature, bias=scaling.bias.tolist(), weight=weight
            )
            members.append(member)
        return join(EnsembleModel(members=members), networks).eval()

    @property
    def probabilities(self) -> Scores:
        """(N, classes)"""
        if len(self.candidates) == 1:
            return self.candidates[0].probabilities
        mean: Scores = np.tensordot(self.weights, np.stack([each.calibrated for each in self.candidates]), 1)
        return mean


def choose(candidates: Sequence[Candidate], config: Selection, calibration: CalibrationConfig) -> Chosen:
    """Choose from all complete trials, of which there is at least one.

    Raises:
        GateRefused: none keeps to the rules.
    """
    best_first = sorted(candidates, key=lambda each: (-each.trial.val_auc, each.trial.number))
    match config:
        case BestTrial():
            least = best_first[0].trial.val_auc - config.tolerance
            close = [each for each in best_first if each.trial.val_auc >= least]
            return Chosen([min(close, key=lambda each: each.trial.parameters)], [1.0])
        case RuledTrial():
            return Chosen([_first_by_rules(best_first, config.rules, calibration)], [1.0])
        case EnsembleOfTrials():
            return _ensemble(best_first[: config.size])
        case _:
            assert_never(config)


def _first_by_rules(best_first: Sequence[Candidate], rules: Sequence[Rule], calibration: CalibrationConfig) -> Candidate:
    reasons = []
    for candidate in best_first:
        broken = [told for rule in rules if (told := breach(candidate, rule, calibration))]
        if not broken:
            return candidate
        reasons.append(f"trial {candidate.trial.number}: {', '.join(broken)}")
    raise GateRefused(f"none of the {len(reasons)} complete trials keeps to search.select.rules; the best, {reasons[0]}")


def breach(candidate: Candidate, rule: Rule, calibration: CalibrationConfig) -> str:
    """How a trial breaks a rule; empty where it keeps to it. A metric that is undefined does not."""
    match rule:
        case SizeRule():
            size = candidate.trial.parameters
            return "" if size <= rule.parameters else f"{size} weights, at most {rule.parameters}"
        case LatencyRule():
            took = milliseconds(candidate.network, candidate.val)
            return "" if took <= rule.milliseconds else f"{took:.3g} ms an image, at most {rule.milliseconds:g}"
        case MetricRule():
            return _metric_breach(candidate, rule, calibration)
        case _:
            assert_never(rule)


def _metric_breach(candidate: Candidate, rule: MetricRule, calibration: CalibrationConfig) -> str:
    labels, probabilities = candidate.val.labels, candidate.probabilities
    temperature, threshold, _ = calibrate(labels, probabilities, calibration)
    value = classification(labels, tempered(probabilities, temperature), threshold).get(rule.metric, np.nan)
    if rule.at_least is not None and not value >= rule.at_least:
        return f"{rule.metric} {value:.3f}, at least {rule.at_least:g}"
    if rule.at_most is not None and not value <= rule.at_most:
        return f"{rule.metric} {value:.3f}, at most {rule.at_most:g}"
    return ""


def milliseconds(network: Classifier, shard: Shard) -> float:
    """Median time for an image, on one thread of this machine."""
    threads, image, times = torch.get_num_threads(), shard.images[np.array([0])], []
    torch.set_num_threads(1)
    try:
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            infer(network, image)
            times.append(1000 * (time.perf_counter() - started))
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:])  # the first one warms up


def _ensemble(candidates: Sequence[Candidate]) -> Chosen:
    labels = candidates[0].val.labels
    weights = fit_weights(labels, np.stack([each.calibrated for each in candidates]))
    kept = [i for i in np.argsort(-weights, kind="stable") if weights[i] >= LEAST_WEIGHT]
    if len(kept) < len(candidates):
        weights[kept] = fit_weights(labels, np.stack([candidates[i].calibrated for i in kept]))
        kept.sort(key=lambda i: -weights[i])
    return Chosen([candidates[i] for i in kept], [float(weights[i]) for i in kept])


def fit_scaling(labels: Labels, probabilities: Scores) -> Scaling:
    """The scaling with which (N, classes) probabilities are most likely right.

    It is that of Platt (1999) with his targets, short of 1 by as much as the number of labels leaves open: without them a
    network that is always right would get no finite temperature. More than two classes share it (Alexandari et al. 2020).
    """
    from scipy.optimize import minimize

    count, classes = probabilities.shape
    logs, often = _logs(probabilities), np.bincount(labels, minlength=classes)[labels, None]
    targets = (1 + often * (labels[:, None] == np.arange(classes))) / (often + classes)

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = _log_shares(logs * values[0] + np.r_[0, values[1:]])
        residual = (np.exp(scaled) - targets) / count
        return -float((targets * scaled).sum() / count), np.r_[(residual * logs).sum(), residual.sum(0)[1:]]

    start, limits = np.r_[1.0, np.zeros(classes - 1)], [(1 / MOST_TEMPERATURE, None)] + [(None, None)] * (classes - 1)
    found = minimize(loss, start, jac=True, bounds=limits, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9})
    return Scaling(float(1 / found.x[0]), np.r_[0, found.x[1:]])


def _logs(probabilities: Scores) -> NDArray[np.float64]:
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny).astype(np.float64))


def _log_shares(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.special import log_softmax

    shares: NDArray[np.float64] = log_softmax(logits, axis=1)
    return shares


def fit_weights(labels: Labels, probabilities: Scores) -> NDArray[np.float64]:
    """(K,) weights, not negative and of sum 1, of the mean of (K, N, classes) probabilities that makes the labels most likely.

    The logarithm of that likelihood is concave in the weights: there is one maximum, whatever the search for it begins with.
    """
    from scipy.optimize import minimize

    of_label = np.maximum(probabilities[:, np.arange(len(labels)), labels].astype(np.float64), np.finfo(np.float64).tiny)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        mean = np.maximum(weights @ of_label, np.finfo(np.float64).tiny)
        return -float(np.log(mean).mean()), -(of_label / mean).mean(1)

    count = len(probabilities)
    sum_is_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like}
    limits, settings = [(0, 1)] * count, {"ftol": 1e-12, "maxiter": 1000}
    found = minimize(loss, np.full(count, 1 / count), jac=True, bounds=limits, constraints=sum_is_one, options=settings)
    weights: NDArray[np.float64] = found.x / found.x.sum()
    return weights
