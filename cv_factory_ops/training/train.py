"""Stage ``train``: launch the ranks with torchrun, hand their outcome over."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from cv_factory_ops import errors, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import CvFactoryError, Unavailable
from cv_factory_ops.records import Frozen, IngestRecord, PreprocessRecord, TrainRecord

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from cv_factory_ops.stage import Stage


class Assignment(Frozen):
    """What every rank is told: ``assignment.json`` in the stage's private folder."""

    config: ProjectConfig
    run: str
    shards: Path
    """Local folder of the preprocessed shards."""
    out: Path
    """Where rank 0 writes ``bundle/`` and ``outcome.json``."""
    checkpoint: str
    inputs_digest: str
    """Digest of what the weights depend on: a checkpoint of other inputs is not resumed."""
    mean: float
    std: float
    data_digest: str
    test_digest: str

    def failure(self, rank: int) -> Path:
        """Where a failing rank leaves its reason."""
        return self.out / f"failure.{rank}.json"


class Outcome(Frozen):
    """What rank 0 reports: ``outcome.json``."""

    mlflow_run_id: str
    mlflow_page: str
    epochs: int
    best_epoch: int
    val_auc: float
    images_per_second: float
    world_size: int


class Failure(Frozen):
    """How a rank explains why it gave up: ``failure.<rank>.json``."""

    error: str
    """Name of the error's class in :mod:`cv_factory_ops.errors`."""
    message: str


def run(stage: Stage) -> TrainRecord:
    """Train until done; a checkpoint that a killed try left behind is resumed."""
    assignment = _assignment(stage)
    (stage.out / "assignment.json").write_text(assignment.model_dump_json(), encoding="utf-8")
    _launch(stage.out / "assignment.json", stage.config.training.processes, stage.config.training.threads)
    outcome = Outcome.model_validate_json((stage.out / "outcome.json").read_bytes())
    for name in ("assignment.json", "outcome.json"):
        (stage.out / name).unlink()
    return TrainRecord(
        summary=f"validation AUC {outcome.val_auc:.3f} in epoch {outcome.best_epoch} of {outcome.epochs}, "
        f"{outcome.images_per_second:.0f} images/s in {outcome.world_size} processes",
        links={"mlflow": outcome.mlflow_page} if outcome.mlflow_page else {},
        bundle=stage.uri("bundle"),
        bundle_digest=storage.tree_digest(stage.out / "bundle"),
        **outcome.model_dump(exclude={"mlflow_page"}),
    )


def forget_checkpoint(stage: Stage) -> None:
    """Remove the checkpoint of a training whose bundle is published."""
    storage.delete_tree(checkpoint_uri(stage.run))


def checkpoint_uri(run: str) -> str:
    """Where a training's checkpoint lies."""
    return f"{run}/checkpoints/last.pt"


def _assignment(stage: Stage) -> Assignment:
    ingest, preprocess = stage.read(IngestRecord), stage.read(PreprocessRecord)
    config = stage.config
    settings = config.model_dump_json(include={"labels", "preprocessing", "model", "training"})
    return Assignment(
        config=config,
        run=stage.run,
        shards=stage.local(f"{stage.run}/preprocess"),
        out=stage.out,
        checkpoint=checkpoint_uri(stage.run),
        inputs_digest=storage.text_digest(settings + preprocess.shards_digest),
        mean=preprocess.mean,
        std=preprocess.std,
        data_digest=ingest.data_digest,
        test_digest=ingest.test_digest,
    )


def _launch(assignment: Path, processes: int, threads: int) -> None:
    """Run the ranks to their end, as ``torchrun --standalone`` does; this process is the launcher."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the reason is told once, by us
    os.environ |= {"OMP_NUM_THREADS": str(threads), "CVF_LAUNCHER_PID": str(os.getpid()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    arguments = ["--standalone", f"--nproc-per-node={processes}", "-m", "cv_factory_ops.training.worker", str(assignment)]
    try:
        torchrun(get_args_parser().parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        raise _failure(assignment.parent, error) from None
    except SignalException:
        raise Unavailable("interrupted; a retry goes on from the last finished epoch") from None


def _failure(folder: Path, error: ChildFailedError) -> CvFactoryError:
    """Why the ranks failed. One that was killed outweighs what the others said of their lost peer, and a reason that a rank
    knew outweighs what surprised another."""
    for rank, process in sorted(error.failures.items()):
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            return Unavailable(f"rank {rank} was ended by {name}; a retry goes on from the last finished epoch")
    failures = [
        Failure.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("failure.*.json")) if path.stat().st_size
    ]
    known = [failure for failure in failures if failure.error != "CvFactoryError"]
    for failure in known + failures:
        kind: type[CvFactoryError] = getattr(errors, failure.error)
        return kind(failure.message)
    rank, process = error.get_first_failure()
    return Unavailable(f"rank {rank} ended with exit code {process.exitcode} and left no word; a retry goes on")
