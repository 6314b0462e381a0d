"""One rank of a training: what torchrun starts with the path of the assignment."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cv_factory_ops import registry, storage
from cv_factory_ops.errors import CvFactoryError, PeerLost, Unavailable, unexpected
from cv_factory_ops.models import build
from cv_factory_ops.training import checkpoint
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.distributed import World, join, lost_peer, sum_over_ranks
from cv_factory_ops.training.gang import Failure
from cv_factory_ops.training.loop import Trainer
from cv_factory_ops.training.train import Assignment, Outcome

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("cvf")


def main(path: str) -> int:
    """Train as this rank; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the launcher ends its ranks
    layout = f"%(asctime)s [rank {os.environ['RANK']}] %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=layout, datefmt="%H:%M:%S")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    assignment = Assignment.model_validate_json(Path(path).read_bytes())
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


def _report(assignment: Assignment, error: CvFactoryError) -> int:
    """Leave the reason for the launcher, in a file of this rank; returns the exit code."""
    failure = Failure.of(error)
    with contextlib.suppress(OSError):  # the disk is full: the exit code has to do
        assignment.failure(int(os.environ["RANK"])).write_text(failure.model_dump_json(), encoding="utf-8")
    return error.exit_code


def work(assignment: Assignment, world: World) -> None:
    """Resume or start, train, and as rank 0 leave the bundle and the outcome."""
    config = assignment.config
    torch.manual_seed(config.training.seed)
    network = build(config.model, len(config.labels), assignment.mean, assignment.std, config.decoding.channels)
    train, val = (Shard.open(assignment.shards, split) for split in ("train", "val"))
    trainer = Trainer(network, train, val, config.training, world)
    if state := checkpoint.load(assignment.checkpoint, assignment.inputs_digest):
        trainer.load_state(state)
        log.info("goes on after epoch %d", trainer.progress.epoch)
    _agree_on_epoch(trainer, world)
    if not world.first:
        trainer.fit(lambda metrics: None)
        return
    journal = Journal(assignment)
    log.info("%d images, %d steps an epoch, %d ranks on %s", len(train), trainer.steps, world.size, world.device.type)
    trainer.fit(lambda metrics: journal.epoch(trainer, metrics))
    journal.finish(trainer)


def _agree_on_epoch(trainer: Trainer, world: World) -> None:
    """Nodes that share a volume may see an older checkpoint for a while: training on from it would mix two epochs."""
    epoch = trainer.progress.epoch
    if sum_over_ranks([epoch, epoch**2], world) != [world.size * epoch, world.size * epoch**2]:
        raise Unavailable("the ranks have read checkpoints of different epochs; a retry reads them again")


class Journal:
    """Rank 0's account of the training: MLflow, the task log, checkpoints, and at the end the bundle."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.client: MlflowClient = registry.connect(assignment.config)
        with registry.explained("training"):
            self.run_id = registry.open_run(self.client, assignment.config, assignment.run)
            self.page = registry.run_page(self.client, self.run_id)
            self._log_params()
        self.started = time.monotonic()
        self.epochs_logged = 0

    def epoch(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log an epoch's metrics and keep its checkpoint."""
        from mlflow.entities import Metric

        done, total = trainer.progress.epoch, trainer.config.epochs
        self.epochs_logged += 1
        left = (time.monotonic() - self.started) / self.epochs_logged * (total - done)
        log.info(
            "epoch %d/%d: loss %.4f, validation AUC %.4f, %.0f images/s, %.0f s left",
            *(done, total, metrics["train_loss"], metrics["val_auc"], metrics["images_per_second"], left),
        )
        now = int(time.time() * 1000)
        with registry.explained("training"):
            self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, done) for name, value in metrics.items()])
        checkpoint.save(self.assignment.checkpoint, trainer.state(), self.assignment.inputs_digest)

    def finish(self, trainer: Trainer) -> None:
        """Write the bundle of the best epoch, and the outcome."""
        from cv_factory_ops.training.release import write_bundle

        write_bundle(self.assignment, trainer)
        outcome = Outcome(
            mlflow_run_id=self.run_id,
            mlflow_page=self.page,
            epochs=trainer.progress.epoch,
            best_epoch=trainer.progress.best_epoch,
            val_auc=round(trainer.progress.best_auc, 6),
            images_per_second=round(trainer.progress.images_per_second, 1),
            world_size=trainer.world.size,
        )
        (self.assignment.out / "outcome.json").write_text(outcome.model_dump_json(), encoding="utf-8")

    def _log_params(self) -> None:
        """A retry keeps the params that an earlier try has logged: MLflow's are written once."""
        from mlflow.entities import Param

        sections = {"data", "decoding", "splits", "preprocessing", "model", "training", "embedding"}
        params = _flat(self.assignment.config.model_dump(mode="json", include=sections))
        params["data_digest"] = self.assignment.data_digest
        known = self.client.get_run(self.run_id).data.params
        new = [Param(name, str(value)) for name, value in params.items() if name not in known]
        self.client.log_batch(self.run_id, params=new)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.field``."""
    items: dict[str, Any] = {}
    for name, value in tree.items():
        items |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return items


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
