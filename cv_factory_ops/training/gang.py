"""Several nodes as one training: which one this is, how they find each other, and why they end.

All that the nodes share is the storage. Below ``<run>/rendezvous/`` lie, each beginning with the gang's id, ``<id>.node.<n>``
(a further node is there), ``<id>.json`` (node 0 listens: :class:`Rendezvous`) and ``<id>.failure.<n>.json`` (a node has given
up: :class:`Failure`). A node that is not needed because nothing has changed is not told by a file: it finds the stored result
itself, which cannot be removed too early.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

from cv_factory_ops import errors, storage
from cv_factory_ops.config.training import TrainingConfig
from cv_factory_ops.errors import ConfigError, CvFactoryError, Interrupted, PeerLost, Unavailable
from cv_factory_ops.processes import die_with
from cv_factory_ops.records import Frozen
from cv_factory_ops.stage import Stage, node_rank

PATIENCE_SECONDS = 600.0
"""How long nodes wait for one another, where ``CVF_GANG_PATIENCE`` does not say: images are pulled at different speeds."""
POLL_SECONDS = 0.5
WATCH_SECONDS = 2.0
"""Time between two looks, during the training, whether another node has given up."""
WORD_SECONDS = 5.0
"""How long node 0, having lost a peer, waits for the reason."""
CHILD_SECONDS = 10.0
"""How long the nodes of a rehearsal may take to end."""
LOOPBACK = "127.0.0.1"

GOES_ON = "a retry goes on from the last checkpoint"


class Rendezvous(Frozen):
    """Where node 0 listens: ``<run>/rendezvous/<id>.json``."""

    address: str
    port: int


class Failure(Frozen):
    """How a rank or a node explains why it gave up."""

    error: str
    """Name of the error's class in :mod:`cv_factory_ops.errors`."""
    message: str

    @classmethod
    def of(cls, error: CvFactoryError) -> Failure:
        return cls(error=type(error).__name__, message=str(error))

    @property
    def known(self) -> bool:
        """Whether it explains itself: a lost peer is a consequence, a surprise may be one."""
        return self.error not in {"CvFactoryError", "PeerLost"}

    def as_error(self) -> CvFactoryError:
        kind: type[CvFactoryError] = getattr(errors, self.error)
        return kind(self.message)


def first_cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure that explains the others: a known reason, else a surprise, else the first lost peer; None of none."""
    return min(failures, key=lambda failure: (not failure.known, failure.error == "PeerLost"), default=None)


@dataclass(frozen=True)
class Gang:
    """One launch of all nodes of a training."""

    run: str
    id: str
    """Unique to this launch: what an earlier one has left behind is not taken for its own."""
    node: int
    nodes: int
    children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The further nodes of a rehearsal, by node."""

    def uri(self, name: str) -> str:
        return f"{self.run}/rendezvous/{self.id}.{name}"

    def arrive(self) -> None:
        """Tell node 0 that this further node is ready.

        Raises:
            ConfigError: the others would not reach it.
        """
        interface_of(own_address())
        storage.write_bytes(self.uri(f"node.{self.node}"), b"")

    def wait_for_nodes(self) -> None:
        """Node 0: until all further nodes are ready. Torch would wait for them as well, but deaf to signals.

        Raises:
            PeerLost: one has given up.
            Unavailable: one has not come in time.
        """
        missing = set(range(1, self.nodes))

        def complete() -> bool:
            missing.difference_update(self._found("node"))
            return not missing

        self._wait(complete, lambda: f"node {min(missing)} of {self.nodes} has not come")

    def wait_for_first(self, done: Callable[[], bool]) -> Rendezvous | None:
        """A further node: where node 0 listens, None as soon as the result is there without this node's help.

        Raises:
            PeerLost: another node has given up.
            Unavailable: node 0 does not listen in time.
        """
        uri = self.uri("json")
        self._wait(lambda: storage.exists(uri) or done(), lambda: f"node 0 of {self.nodes} has not come")
        return Rendezvous.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None

    @contextmanager
    def listening(self) -> Iterator[Rendezvous]:
        """Node 0: open a port for the others, and write where it is.

        Raises:
            ConfigError: the others would not reach it.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        interface_of(own_address())
        # Torchrun's own store in this process will share this one's server, so nobody else can take the port in between.
        store = TCPStore(own_address(), 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        rendezvous = Rendezvous(address=own_address(), port=store.port)
        storage.write_bytes(self.uri("json"), rendezvous.model_dump_json().encode())
        yield rendezvous

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise PeerLost in the main thread once another node has given up: ranks that wait for its ranks to begin with would
        not notice."""
        over, main = threading.Event(), threading.get_ident()

        def watch() -> None:
            while not over.wait(WATCH_SECONDS):
                with suppress(CvFactoryError):  # a storage that does not answer now may do so at the next look
                    if self.failures():
                        signal.pthread_kill(main, signal.SIGUSR1)
                        return

        def lost(number: int, frame: FrameType | None) -> None:
            if not over.is_set():
                raise PeerLost("lost a peer: another node has given up")

        before = signal.signal(signal.SIGUSR1, lost)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            signal.signal(signal.SIGUSR1, before)

    def tell(self, failure: Failure) -> None:
        """Leave the reason of this node for the others."""
        self._tell(self.node, failure)

    def failures(self) -> dict[int, Failure]:
        """Why other nodes have given up, by node; the reason of a child that was killed is told on its behalf."""
        for node, child in self.children.items():
            if child.poll() and not storage.exists(self.uri(f"failure.{node}.json")):
                self._tell(node, Failure(error="Unavailable", message=f"{_end_of(child)}; {GOES_ON}"))
        others = sorted(node for node in self._found("failure") if node != self.node)
        return {n: Failure.model_validate_json(storage.read_bytes(self.uri(f"failure.{n}.json"))) for n in others}

    def cause(self, own: CvFactoryError) -> CvFactoryError:
        """What this node's failure comes from: where it has only lost its peers, the word of one of them that knows more."""
        mine, deadline = Failure.of(own), time.monotonic() + WORD_SECONDS
        while not mine.known:
            words = {node: f.model_copy(update={"message": f"node {node}: {f.message}"}) for node, f in self.failures().items()}
            cause = first_cause([*words.values(), mine]) or mine
            if cause.known or len(words) == self.nodes - 1 or time.monotonic() > deadline:
                return cause.as_error()
            time.sleep(POLL_SECONDS)
        return own

    def forget_earlier(self) -> None:
        """Node 0: remove what earlier launches have left."""
        self._remove(lambda name: not name.startswith(f"{self.id}."))

    def close(self) -> None:
        """Node 0: remove the rendezvous. Reasons stay until the next launch, for nodes that have not read them yet."""
        self._remove(lambda name: name.startswith((f"{self.id}.json", f"{self.id}.node.")))

    def _remove(self, is_old: Callable[[str], bool]) -> None:
        for name in filter(is_old, list(storage.listing(f"{self.run}/rendezvous"))):
            storage.delete_tree(f"{self.run}/rendezvous/{name}")

    def _found(self, kind: str) -> list[int]:
        pattern = re.compile(rf"{re.escape(self.id)}\.{kind}\.(\d+)(\.json)?")
        names = storage.listing(f"{self.run}/rendezvous")
        return [int(match[1]) for name in names if (match := pattern.fullmatch(name))]

    def _tell(self, node: int, failure: Failure) -> None:
        with suppress(CvFactoryError):  # the storage is full or gone: the exit code has to do
            storage.write_bytes(self.uri(f"failure.{node}.json"), failure.model_dump_json().encode())

    def _check(self) -> None:
        for node in self.failures():
            raise PeerLost(f"lost a peer: node {node} has given up")

    def _wait(self, ready: Callable[[], bool], late: Callable[[], str]) -> None:
        patience = float(os.environ.get("CVF_GANG_PATIENCE", PATIENCE_SECONDS))
        deadline = time.monotonic() + patience
        while not ready():
            self._check()
            if time.monotonic() > deadline:
                raise Unavailable(f"{late()} within {patience:g} s; a retry may find it")
            time.sleep(POLL_SECONDS)


@contextmanager
def leading(stage: Stage) -> Iterator[Gang]:
    """This process as node 0; a laptop's rehearsal has no pods, so that its further nodes are children of this process.

    Raises:
        CvFactoryError: why the training has failed; where this node has only lost a peer, that one's reason.
    """
    rehearsal = "PET_NODE_RANK" not in os.environ
    gang = Gang(stage.run, uuid.uuid4().hex, 0, stage.config.training.nodes) if rehearsal else _this_gang(stage)
    gang.forget_earlier()
    try:
        with _children(stage, gang) if rehearsal else nullcontext():
            try:
                with _telling(gang):
                    yield gang
            except CvFactoryError as error:
                raise gang.cause(error) from None
    finally:
        gang.close()


@contextmanager
def following(stage: Stage) -> Iterator[Gang]:
    """This process as a further node, which ends with its launcher where it is a child of a rehearsal."""
    if "CVF_LAUNCHER_PID" in os.environ:
        die_with(int(os.environ["CVF_LAUNCHER_PID"]))
    gang = _this_gang(stage)
    with _telling(gang):
        yield gang


def _this_gang(stage: Stage) -> Gang:
    node, nodes, name = node_rank(), stage.config.training.nodes, os.environ.get("CVF_GANG", "")
    if node >= nodes:
        raise ConfigError(f"PET_NODE_RANK: {node} given; allowed: below training.nodes, which is {nodes}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"CVF_GANG: {name!r} given; allowed: an id of this launch of all nodes, of letters, digits, - and _")
    return Gang(stage.run, name, node, nodes)


@contextmanager
def _telling(gang: Gang) -> Iterator[None]:
    """Leave the reason of a failure for the other nodes."""
    try:
        yield
    except Interrupted as error:
        gang.tell(Failure(error="Unavailable", message=str(error)))
        raise
    except CvFactoryError as error:
        gang.tell(Failure.of(error))
        raise
    except Exception as error:
        gang.tell(Failure(error="CvFactoryError", message=f"unexpected {type(error).__name__}"))
        raise


@contextmanager
def _children(stage: Stage, gang: Gang) -> Iterator[None]:
    """The further nodes of a rehearsal: the same command line for each, its log lines among this process's own."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(stage.config.model_dump_json())  # with the settings that were overridden; JSON is YAML
        file.flush()
        command = [sys.executable, "-m", "cv_factory_ops.cli", stage.name, "--config", file.name, "--run", stage.run, "--force"]
        given = os.environ | {"CVF_GANG": gang.id, "CVF_LAUNCHER_PID": str(os.getpid())}
        try:
            for node in range(1, gang.nodes):
                environment = given | {"PET_NODE_RANK": str(node)} | _gpus_of(node, stage.config.training)
                gang.children[node] = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
            yield
        except BaseException:
            for child in gang.children.values():
                child.terminate()
            raise
        finally:
            for child in gang.children.values():
                _wait_or_kill(child)


def _gpus_of(node: int, training: TrainingConfig) -> dict[str, str]:
    """The part of this machine's GPUs that a node of a rehearsal sees; node 0 sees all and uses the first.

    Raises:
        ConfigError: there are GPUs, but not one for each process.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    each, count = training.processes_per_node, torch.cuda.device_count()
    if count < training.nodes * each:
        raise ConfigError(
            f"training.nodes: {training.nodes} given, with {each} processes on each, this machine has {count} "
            f"GPU{'s' if count > 1 else ''}; allowed: at most one process a GPU"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[node * each : (node + 1) * each])}


def _wait_or_kill(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _end_of(child: subprocess.Popen[bytes]) -> str:
    if child.returncode < 0:
        return f"was ended by {signal.Signals(-child.returncode).name}"
    return f"ended with exit code {child.returncode} and left no word"


def own_address() -> str:
    """Where the other nodes reach this one: ``POD_IP``, which a pod knows without DNS; this machine alone without it."""
    return os.environ.get("POD_IP") or LOOPBACK


def interface_of(address: str) -> str:
    """Name of the network interface that holds an IPv4 or IPv6 address; nothing is resolved.

    Raises:
        ConfigError: no interface of this machine holds it.
    """
    names = [name for _, name in socket.if_nameindex()]
    held = _ipv6_addresses() if ":" in address else {_ipv4_address(name): name for name in names}
    if address not in held:
        raise ConfigError(f"POD_IP: {address!r} given; allowed: an address of this machine: {', '.join(filter(None, held))}")
    return held[address]


def _ipv4_address(interface: str) -> str:
    """The address of an interface, empty where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        try:
            answer = fcntl.ioctl(unused, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _ipv6_addresses() -> dict[str, str]:
    """The name of the interface, by address."""
    lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    return {str(ip_address(bytes.fromhex(line.split()[0]))): line.split()[-1] for line in lines}
