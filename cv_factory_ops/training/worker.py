"""One rank of a training: what torchrun starts with the path of the assignment."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cv_factory_ops import registry, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.training import FixMatchConfig
from cv_factory_ops.errors import ConfigError, CvFactoryError, PeerLost, Unavailable, unexpected
from cv_factory_ops.preprocessing.shards import read_index
from cv_factory_ops.pretrained import load_weights
from cv_factory_ops.processes import keep_memory
from cv_factory_ops.training import checkpoint
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.distributed import Pauses, World, join, lost_peer, shared, sum_over_ranks
from cv_factory_ops.training.gang import Failure
from cv_factory_ops.training.loop import Trainer
from cv_factory_ops.training.study import Prospects, Trying
from cv_factory_ops.training.train import VALIDATION, Assignment, Outcome
from cv_factory_ops.training.trials import Trials
from cv_factory_ops.weights import write_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("cvf")


def main(path: str) -> int:
    """Train as this rank; returns the exit code."""
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the launcher ends its ranks
    layout = f"%(asctime)s [rank {os.environ['RANK']}] %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=layout, datefmt="%H:%M:%S")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    assignment = Assignment.model_validate_json(Path(path).read_bytes())
    if (decided := _decided(assignment)) is not None:
        return decided
    assignment.failure(int(os.environ["RANK"])).unlink(missing_ok=True)
    try:
        with join() as world:
            work(assignment, world)
    except OSError as error:
        return _report(assignment, storage.explained_os_error(error, str(error.filename or assignment.out)))
    except CvFactoryError as error:
        return _report(assignment, error)
    except Exception as error:
        lost = PeerLost(f"lost a peer: {str(error).splitlines()[0]}") if lost_peer(error) else None
        return _report(assignment, lost or CvFactoryError(unexpected(error)))
    return 0


def _decided(assignment: Assignment) -> int | None:
    """The exit code of ranks that torchrun has started again though no restart can help: told to stop, or failed by their
    settings or data."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        return None
    if assignment.stop.exists():
        return Unavailable.exit_code
    failures = [Failure.model_validate_json(path.read_bytes()).as_error() for path in assignment.out.glob("failure.*.json")]
    return next((error.exit_code for error in failures if error.exit_code != Unavailable.exit_code), None)


def _report(assignment: Assignment, error: CvFactoryError) -> int:
    """Leave the reason for the launcher, in a file of this rank; returns the exit code."""
    failure = Failure.of(error)
    with contextlib.suppress(OSError):  # the disk is full: the exit code has to do
        assignment.failure(int(os.environ["RANK"])).write_text(failure.model_dump_json(), encoding="utf-8")
    return error.exit_code


def work(assignment: Assignment, world: World) -> None:
    """One training; or those of a search, one after the other, until rank 0 has no more."""
    if not assignment.config.search:
        train(assignment, world)
        return
    trials = Trials(assignment, assignment.config.search) if world.first else None
    while trial := shared(trials.next() if trials else None, Assignment, world):
        train(trial, world)
        if trials:
            trials.keep()
        gc.collect()  # what DDP leaves behind refers to itself, and would hold the network's memory


def train(assignment: Assignment, world: World) -> None:
    """Resume or start, train, and as rank 0 leave the bundle, or of a trial the weights, and the outcome."""
    config = assignment.config
    torch.manual_seed(config.training.seed)
    torch.use_deterministic_algorithms(config.training.deterministic)
    torch.backends.cudnn.benchmark = not config.training.deterministic
    network = assignment.new_network()
    state = checkpoint.load(assignment.checkpoint, assignment.inputs_digest)
    begun_with = assignment.initial_weights
    loaded = load_weights(network, begun_with) if begun_with and not state else None
    train, val = (Shard.open(assignment.shards, split) for split in ("train", "val"))
    trainer = Trainer(network, train, val, config.training, world, _unlabelled(assignment))
    if state:
        trainer.load_state(state)
        progress = trainer.progress
        log.info("goes on after epoch %d, image %d of %d", progress.epoch, progress.position, len(train))
    _agree_on_place(trainer, world)
    pauses = Pauses(world, assignment.stop, 60 * config.training.checkpoint_minutes)
    verdict = Verdict(assignment.trying, trainer)
    if not world.first:
        with _memory_explained(config):
            trainer.fit(lambda metrics: None, lambda: None, pauses, verdict.agreed)
        return
    journal = Journal(assignment)
    if loaded:
        journal.tag("cvf.weights_sha256", loaded.sha256)
    if assignment.warm_start:
        journal.tag("cvf.warm_start", assignment.warm_start.told)
    steps = -(-len(train) // trainer.step_images)
    log.info("%d images, %d steps an epoch, %d ranks on %s", len(train), steps, world.size, world.device.type)
    with _memory_explained(config):
        trainer.fit(lambda metrics: journal.epoch(trainer, metrics), lambda: journal.keep(trainer), pauses, verdict.agreed)
    journal.finish(trainer, verdict.reason)


@contextlib.contextmanager
def _memory_explained(config: ProjectConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        given = f"training.batch_size: {config.training.batch_size} given"
        raise ConfigError(f"{given}; allowed: what the GPU's memory suffices for") from None


def _unlabelled(assignment: Assignment) -> Shard | None:
    if not isinstance(assignment.config.training.objective, FixMatchConfig):
        return None
    return Shard.open(assignment.shards, "unlabelled") if "unlabelled" in read_index(assignment.shards).splits else None


def _agree_on_place(trainer: Trainer, world: World) -> None:
    """Nodes that share a volume may see an older checkpoint for a while: training on from it would mix two states."""
    place = trainer.progress.epoch * len(trainer.train) + trainer.progress.position
    if sum_over_ranks([place, place**2], world) != [world.size * place, world.size * place**2]:
        raise Unavailable("the ranks have read different checkpoints; a retry reads them again")


class Verdict:
    """Whether a trial of a search is given up. Rank 0 alone decides; all ranks ask, and go on or stop together."""

    def __init__(self, trying: Trying | None, trainer: Trainer) -> None:
        self.trainer = trainer
        self.prospects = Prospects(trying) if trying and trainer.world.first else None
        self.asks = trying is not None
        self.reason = ""

    def agreed(self) -> bool:
        """To be called by all ranks, between two epochs."""
        if self.prospects:
            self.reason = self.prospects.verdict(self.trainer.progress.history, self.trainer.seconds)
        return self.asks and sum_over_ranks([bool(self.reason)], self.trainer.world) != [0]


class Journal:
    """Rank 0's account of the training: MLflow, the task log, checkpoints, and at the end the bundle."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.client: MlflowClient = registry.connect(assignment.config)
        with registry.explained("training"):
            trying = assignment.trying
            self.run_id = trying.mlflow_run_id if trying else registry.open_run(self.client, assignment.config, assignment.run)
            self.page = registry.run_page(self.client, self.run_id)
            params = registry.settings(assignment.config) | {"data_digest": assignment.data_digest}
            registry.log_params(self.client, self.run_id, params)
        self.started = time.monotonic()
        self.epochs_logged = 0

    def tag(self, name: str, value: str) -> None:
        """Note something of the run."""
        with registry.explained("training"):
            self.client.set_tag(self.run_id, name, value)

    def epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log an epoch's metrics and keep its checkpoint."""
        from mlflow.entities import Metric

        done, total, metric = trainer.progress.epoch, trainer.config.epochs, trainer.validation.metric
        self.epochs_logged += 1
        left = (time.monotonic() - self.started) / self.epochs_logged * (total - done)
        log.info(
            f"epoch %d/%d: loss %.4f, validation {VALIDATION[metric]} %.4f, %.0f images/s, %.0f s left",
            *(done, total, metrics["train_loss"], metrics[f"val_{metric}"], metrics["images_per_second"], left),
        )
        now = int(time.time() * 1000)
        with registry.explained("training"):
            self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, done) for name, value in metrics.items()])
        self.keep(trainer)

    def keep(self, trainer: Trainer) -> None:
        """Keep a checkpoint."""
        checkpoint.save(self.assignment.checkpoint, trainer.state(), self.assignment.inputs_digest)

    def finish(self, trainer: Trainer, given_up: str) -> None:
        """Write the bundle of the best epoch, or of a trial its weights alone, and the outcome."""
        from cv_factory_ops.training.release import write_bundle

        network = trainer.best_network()
        if self.assignment.trying:
            write_weights(self.assignment.weights, network.state_dict())
        else:
            write_bundle(self.assignment, network, trainer.world.device)
        outcome = Outcome(
            mlflow_run_id=self.run_id,
            mlflow_page=self.page,
            epochs=trainer.progress.epoch,
            best_epoch=trainer.progress.best_epoch,
            **{f"val_{trainer.validation.metric}": round(trainer.progress.best_score, 6)},
            images_per_second=round(trainer.progress.images_per_second, 1),
            world_size=trainer.world.size,
            history=trainer.progress.history,
            parameters=sum(weight.numel() for weight in network.parameters()),
            earlier_seconds=trainer.progress.seconds,
            given_up=given_up,
        )
        (self.assignment.out / "outcome.json").write_text(outcome.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
