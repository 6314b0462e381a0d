"""Stage ``train``: launch the ranks with torchrun, hand their outcome over."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cv_factory_ops import storage
from cv_factory_ops.config import CnnEmbedding, ProjectConfig, TrainingConfig, VitEmbedding, as_uri
from cv_factory_ops.errors import CvFactoryError, DataError, Interrupted, PeerLost, Unavailable
from cv_factory_ops.records import Frozen, IngestRecord, PreprocessRecord, TrainRecord
from cv_factory_ops.training.gang import (
    GOES_ON,
    LOOPBACK,
    Failure,
    Gang,
    Rendezvous,
    first_cause,
    following,
    interface_of,
    leading,
    own_address,
)

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")


class Assignment(Frozen):
    """What every rank of a node is told: ``assignment.json`` in the node's private folder."""

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


def run(stage: Stage) -> TrainRecord:
    """Train until done, as node 0 of all; a checkpoint that a killed try left behind is resumed."""
    training = stage.config.training
    if training.nodes == 1:
        _launch(_assign(stage, stage.out), training, LOOPBACK, ["--standalone"])
    else:
        with leading(stage) as gang:
            assignment = _assign(stage, stage.out)
            gang.wait_for_nodes()
            with gang.listening() as rendezvous:
                _launch_node(gang, assignment, training, rendezvous)
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


def assist(stage: Stage, done: Callable[[], bool]) -> None:
    """Train as a further node: run its ranks to their end. Its files are its own, nodes may share the run's folder."""
    with following(stage) as gang, tempfile.TemporaryDirectory(prefix="cvf-node-") as folder:
        if not done():
            assignment = _assign(stage, Path(folder))
            gang.arrive()
            if rendezvous := gang.wait_for_first(done):
                _launch_node(gang, assignment, stage.config.training, rendezvous)
                return
        log.info("%s: nothing has changed: node %d is not needed", stage.name, gang.node)


def forget_checkpoint(stage: Stage) -> None:
    """Remove the checkpoint of a training whose bundle is published."""
    storage.delete_tree(checkpoint_uri(stage.run))


def checkpoint_uri(run: str) -> str:
    """Where a training's checkpoint lies."""
    return f"{run}/checkpoints/last.pt"


def _assign(stage: Stage, out: Path) -> Path:
    """Write what the ranks of this node are told; returns where."""
    path = out / "assignment.json"
    path.write_text(_assignment(stage, out).model_dump_json(), encoding="utf-8")
    return path


def _assignment(stage: Stage, out: Path) -> Assignment:
    ingest, preprocess = stage.read(IngestRecord), stage.read(PreprocessRecord)
    config = stage.config
    settings = config.model_dump_json(include={"labels", "decoding", "preprocessing", "model", "training"})
    shards = _sound_shards(stage)
    return Assignment(
        config=config,
        run=stage.run,
        shards=shards,
        out=out,
        checkpoint=checkpoint_uri(stage.run),
        inputs_digest=storage.text_digest(settings + preprocess.shards_digest),
        mean=preprocess.mean,
        std=preprocess.std,
        data_digest=ingest.data_digest,
        test_digest=ingest.test_digest,
    )


def _sound_shards(stage: Stage) -> Path:
    """The local folder of the shards, checked once before any rank opens them.

    Raises:
        DataError: a patient or an image stands in two splits, a file is not what was written, or weights are missing.
    """
    from cv_factory_ops.preprocessing.shards import require_no_leakage, verify

    embedding = stage.config.embedding
    if isinstance(embedding, CnnEmbedding | VitEmbedding) and not storage.exists(as_uri(embedding.weights)):
        raise DataError(f"embedding.weights: {as_uri(embedding.weights)}: is not there")
    folder = stage.local(f"{stage.run}/preprocess")
    require_no_leakage(folder)
    verify(folder)
    return folder


def _launch_node(gang: Gang, assignment: Path, training: TrainingConfig, rendezvous: Rendezvous) -> None:
    where = [f"--nnodes={gang.nodes}", f"--node-rank={gang.node}", f"--rdzv-id={gang.id}", "--rdzv-conf=timeout=120"]
    with gang.watched():
        first = [f"--master-addr={rendezvous.address}", f"--master-port={rendezvous.port}"]
        _launch(assignment, training, own_address(), where + first)


def _launch(assignment: Path, training: TrainingConfig, address: str, where: list[str]) -> None:
    """Run the ranks of this node to their end, as ``torchrun`` does; this process is the launcher.

    The address is given and gloo's interface named, since a host's name need not resolve; NCCL finds a pod's interface itself.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    before = os.environ.copy()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the reason is told once, by us
    os.environ |= {
        "OMP_NUM_THREADS": str(training.threads),
        "CVF_LAUNCHER_PID": str(os.getpid()),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address))
    ranks = [f"--nproc-per-node={training.processes_per_node}", "--signals-to-handle=SIGHUP,SIGQUIT", f"--local-addr={address}"]
    arguments = [*where, *ranks, "-m", "cv_factory_ops.training.worker", str(assignment)]
    try:
        torchrun(get_args_parser().parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        raise _failure(assignment.parent, error) from None
    except DistError as error:
        raise PeerLost(f"lost a peer: {str(error).splitlines()[0]}") from None
    except SignalException:
        raise Unavailable(f"interrupted; {GOES_ON}") from None
    except Interrupted:
        raise Interrupted(f"interrupted; {GOES_ON}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def _failure(folder: Path, error: ChildFailedError) -> CvFactoryError:
    """Why the ranks of this node failed: one that was killed outweighs what the others said."""
    for rank, process in sorted(error.failures.items()):
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            return Unavailable(f"rank {rank} was ended by {name}; {GOES_ON}")
    failures = [
        Failure.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("failure.*.json")) if path.stat().st_size
    ]
    if cause := first_cause(failures):
        return cause.as_error()
    rank, process = error.get_first_failure()
    return Unavailable(f"rank {rank} ended with exit code {process.exitcode} and left no word; a retry goes on")
