"""Stage ``train``: launch the ranks with torchrun, hand their outcome over."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cv_factory_ops import protocol, storage, trained
from cv_factory_ops.config import ProjectConfig, as_uri
from cv_factory_ops.config.embeddings import CnnEmbedding, VitEmbedding
from cv_factory_ops.config.training import PLACEMENT, TrainingConfig
from cv_factory_ops.errors import CvFactoryError, DataError, Interrupted, PeerLost, Unavailable
from cv_factory_ops.records import Frozen, IngestRecord, PreprocessRecord, TrainRecord, WarmStart
from cv_factory_ops.training import warm_start
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
from cv_factory_ops.training.study import Trying

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from cv_factory_ops.models import Classifier
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

SAVE_SECONDS = 18.0
"""Time for a last checkpoint after SIGTERM: less than the half minute that Kubernetes gives a pod."""


VALIDATION = {"auc": "AUC", "dice": "Dice", "map": "mAP"}
"""What an epoch may be judged by, in words."""


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
    warm_start: WarmStart | None = None
    trying: Trying | None = None
    """Of a trial: what its search tells it."""

    def failure(self, rank: int) -> Path:
        """Where a failing rank leaves its reason."""
        return self.out / f"failure.{rank}.json"

    @property
    def weights(self) -> Path:
        """Where rank 0 of a trial leaves its network, instead of a bundle."""
        return self.out / "weights.safetensors"

    @property
    def stop(self) -> Path:
        """The file that asks the ranks of this node to keep a checkpoint and end."""
        return self.out / "stop"

    @property
    def initial_weights(self) -> str | None:
        """Where the weights lie that training begins with; None where they are random."""
        if self.warm_start and not self.warm_start.misfit:
            return self.warm_start.weights
        return self.config.model.weights

    def new_network(self) -> Classifier:
        """With random weights."""
        from cv_factory_ops.models import build

        config = self.config
        size, channels = config.preprocessing.size, config.decoding.channels
        return build(config.model, len(config.labels), self.mean, self.std, channels, size)

    def take_outcome(self) -> Outcome:
        """What rank 0 has reported; its file is removed."""
        path = self.out / "outcome.json"
        outcome = Outcome.model_validate_json(path.read_bytes())
        path.unlink()
        return outcome


class Outcome(Frozen):
    """What rank 0 reports: ``outcome.json``."""

    mlflow_run_id: str
    mlflow_page: str
    epochs: int
    best_epoch: int
    val_auc: float | None = None
    val_dice: float | None = None
    val_map: float | None = None
    """Which of them there is, is the task's."""
    images_per_second: float
    world_size: int
    history: list[float]
    """Validation AUC, Dice or mAP, of each epoch."""
    parameters: int
    """Weights of the network."""
    earlier_seconds: float
    """That killed tries took, up to their last checkpoint."""
    given_up: str
    """Why, where this was a trial of a search that it does not complete; else empty."""

    @property
    def score(self) -> str:
        """The metric of validation and its value."""
        return ", ".join(
            f"{title} {value:.3f}" for name, title in VALIDATION.items() if (value := getattr(self, f"val_{name}")) is not None
        )


def run(stage: Stage) -> TrainRecord:
    """Train until done, as node 0 of all; a checkpoint that a killed try left behind is resumed."""
    training = stage.config.training
    if stage.config.search:
        from cv_factory_ops.training import search

        return search.run(stage, stage.config.search)
    if training.nodes == 1:
        assignment = assign(stage, stage.out)
        launch_alone(assignment)
    else:
        with leading(stage) as gang:
            assignment = assign(stage, stage.out)
            gang.wait_for_nodes()
            with gang.listening() as rendezvous:
                _launch_node(gang, assignment, rendezvous)
    outcome = assignment.take_outcome()
    return record(
        stage,
        outcome.mlflow_page,
        summary=f"validation {outcome.score} in epoch {outcome.best_epoch} of {outcome.epochs}, "
        f"{outcome.images_per_second:.0f} images/s in {outcome.world_size} processes{_begun_with(assignment.warm_start)}",
        warm_start=assignment.warm_start,
        **outcome.model_dump(include=set(TrainRecord.model_fields)),
    )


def _begun_with(found: WarmStart | None) -> str:
    if found is None:
        return ""
    return f", not from the champion's weights: {found.misfit}" if found.misfit else f", from champion version {found.version}"


def record(stage: Stage, mlflow_page: str, **found: Any) -> TrainRecord:
    """The record of the bundle that lies in the private folder; beside it is kept what it was made with.

    That a training has ended well is told before it is published: after a crash between both, the next try tells it again.
    """
    protocol.keep(stage.config, stage.out / protocol.FOLDER)
    trained.keep(stage.config, stage.run)
    return TrainRecord(
        links={"mlflow": mlflow_page} if mlflow_page else {},
        bundle=stage.uri("bundle"),
        bundle_digest=storage.tree_digest(stage.out / "bundle"),
        **found,
    )


def launch_alone(assignment: Assignment) -> None:
    """Run the ranks of this node, which has no others, to their end."""
    _launch(assignment, LOOPBACK, ["--standalone"])


def assist(stage: Stage, done: Callable[[], bool]) -> None:
    """Train as a further node: run its ranks to their end. Its files are its own, nodes may share the run's folder."""
    with following(stage) as gang, tempfile.TemporaryDirectory(prefix="cvf-node-") as folder:
        if not done():
            assignment = assign(stage, Path(folder))
            gang.arrive()
            if rendezvous := gang.wait_for_first(done):
                _launch_node(gang, assignment, rendezvous)
                return
        log.info("%s: nothing has changed: node %d is not needed", stage.name, gang.node)


def fingerprint(stage: Stage) -> str:
    """What weights from elsewhere are: another file at the same place is another training. ``hf://`` is taken by its name."""
    places = [place for place in _weights(stage.config).values() if not place.startswith("hf://")]
    return storage.text_digest(json.dumps([list(storage.versions(as_uri(place))) for place in places]))


def _weights(config: ProjectConfig) -> dict[str, str]:
    """Where weights from elsewhere lie, by the name of the setting."""
    places = {"model.weights": config.model.weights}
    if isinstance(config.embedding, CnnEmbedding | VitEmbedding):
        places["embedding.weights"] = config.embedding.weights
    if config.search:
        tried = {config.with_settings(settings).model.weights for settings in config.search.probes()}
        places |= {f"search.space: {place}": place for place in sorted(filter(None, tried))}
    return {name: place for name, place in places.items() if place}


def forget_checkpoint(stage: Stage) -> None:
    """Remove the checkpoints of a training whose bundle is published, and with them the trials of a search."""
    storage.delete_tree(checkpoints(stage.run))


def checkpoints(run: str) -> str:
    """Where the checkpoints of a training lie."""
    return f"{run}/checkpoints"


def assign(stage: Stage, out: Path) -> Assignment:
    """What the ranks of this node are told."""
    ingest, preprocess = stage.read(IngestRecord), stage.read(PreprocessRecord)
    config = stage.config
    settings = config.model_dump(mode="json", include={"labels", "decoding", "preprocessing", "model", "training"})
    for name in PLACEMENT:
        del settings["training"][name]
    shards = _sound_shards(stage)
    inputs_digest = storage.text_digest(json.dumps(settings) + preprocess.shards_digest + fingerprint(stage))
    return Assignment(
        config=config,
        run=stage.run,
        shards=shards,
        out=out,
        checkpoint=f"{checkpoints(stage.run)}/last.pt",
        inputs_digest=inputs_digest,
        mean=preprocess.mean,
        std=preprocess.std,
        data_digest=ingest.data_digest,
        test_digest=ingest.test_digest,
        warm_start=warm_start.pinned(stage, f"{checkpoints(stage.run)}/warm-start-{inputs_digest[:12]}.json"),
    )


def _sound_shards(stage: Stage) -> Path:
    """The local folder of the shards, checked once before any rank opens them.

    Raises:
        DataError: a patient or an image stands in two splits, a file is not what was written, or weights are missing.
    """
    from cv_factory_ops.preprocessing.shards import require_no_leakage, verify

    for name, place in _weights(stage.config).items():
        if not place.startswith("hf://") and not storage.exists(as_uri(place)):
            raise DataError(f"{name}: {as_uri(place)}: is not there")
    folder = stage.local(f"{stage.run}/preprocess")
    require_no_leakage(folder)
    verify(folder)
    return folder


def _launch_node(gang: Gang, assignment: Assignment, rendezvous: Rendezvous) -> None:
    where = [f"--nnodes={gang.nodes}", f"--node-rank={gang.node}", f"--rdzv-id={gang.id}", "--rdzv-conf=timeout=120"]
    with gang.watched():
        first = [f"--master-addr={rendezvous.address}", f"--master-port={rendezvous.port}"]
        _launch(assignment, own_address(), where + first)


def _launch(assignment: Assignment, address: str, where: list[str]) -> None:
    """Run the ranks of this node to their end, as ``torchrun`` does; this process is the launcher.

    The address is given and gloo's interface named, since a host's name need not resolve; NCCL finds a pod's interface itself.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the reason is told once, by us
    training, path = assignment.config.training, assignment.out / "assignment.json"
    ranks = [f"--nproc-per-node={training.processes_per_node}", f"--max-restarts={training.restarts}"]
    ranks += ["--signals-to-handle=SIGHUP,SIGQUIT", f"--local-addr={address}"]
    arguments = get_args_parser().parse_args([*where, *ranks, "-m", "cv_factory_ops.training.worker", str(path)])
    path.write_text(assignment.model_dump_json(), encoding="utf-8")
    try:
        with _environment_of_ranks(training, address), _stopping_by_file(assignment.stop):
            torchrun(arguments)  # type: ignore[no-untyped-call]
    except (ChildFailedError, PeerLost) as error:
        if assignment.stop.exists():
            raise Interrupted(f"interrupted; {GOES_ON}") from None
        raise (error if isinstance(error, PeerLost) else _failure(assignment.out, error)) from None
    except DistError as error:
        raise PeerLost(f"lost a peer: {str(error).splitlines()[0]}") from None
    except SignalException:
        raise Unavailable(f"interrupted; {GOES_ON}") from None
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _environment_of_ranks(training: TrainingConfig, address: str) -> Iterator[None]:
    before = os.environ.copy()
    os.environ |= {
        "OMP_NUM_THREADS": str(training.threads),
        "CVF_LAUNCHER_PID": str(os.getpid()),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address))
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first GPU is used
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _stopping_by_file(stop: Path) -> Iterator[None]:
    """On SIGTERM ask the ranks to stop, which keeps a checkpoint; raise Interrupted where that takes too long."""

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        stop.touch()
        signal.setitimer(signal.ITIMER_REAL, SAVE_SECONDS)

    def give_up(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"interrupted; {GOES_ON}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, give_up)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])


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
