"""``cvf``: what every container, operator, schedule and person runs.

A stage prints its result as one JSON document on standard output (a person at a terminal sees the summary instead) and
logs to standard error. Exit codes: 0 done, 2 the configuration is wrong, 3 the data is wrong, 4 a gate refused, 75 try again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import cv_factory_ops
from cv_factory_ops.errors import ConfigError, CvFactoryError, Interrupted, unexpected
from cv_factory_ops.processes import keep_memory

if TYPE_CHECKING:
    from cv_factory_ops.stage import Order

GRACE_SECONDS = 1.5
"""Time in which a stage that gets SIGTERM tidies up, unless it asks for more."""
INTERRUPTED = "interrupted; a retry goes on from what is stored"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    keep_memory()
    options = parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("alembic", "mlflow", "botocore", "httpx", "matplotlib", "sagemaker"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except CvFactoryError as error:
        print(f"cvf {options.name}: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        _end_interrupted(options.name, error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"cvf {options.name}: {unexpected(error)}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    from cv_factory_ops.config.explanations import EXPLANATIONS
    from cv_factory_ops.stage import STAGES

    root = argparse.ArgumentParser(prog="cvf", description="Train, deploy, watch and retrain computer-vision models.")
    root.add_argument("--version", action="version", version=f"cvf {cv_factory_ops.__version__}")
    commands = root.add_subparsers(dest="name", required=True, metavar="COMMAND", title="stages and commands")
    for name, spec in STAGES.items():
        stage = _add(commands, name, spec.help, BY_HAND.get(name, _stage))
        _stage_arguments(stage, run_required=name != "promote")
        _person_arguments(name, stage)
    rollback = _add(commands, "rollback", "move endpoint and alias champion back, by hand", _rollback)
    rollback.add_argument("--config", required=True, metavar="FILE", help="the project's YAML")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="a version that has been champion; by default `previous`")
    rollback.add_argument("--why", required=True, metavar="TEXT", help="the reason, for the history")
    rollback.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting; repeatable")
    _audit_arguments(commands)
    _stage_arguments(_add(commands, "run", "all stages of a training, one after the other", _run))
    _project_arguments(_add(commands, "retrain", "the retraining that was decided last, where it is not done yet", _retrain))
    _config_arguments(commands)
    doctor = _add(commands, "doctor", "check everything that a run will need, before anything is paid for", _doctor)
    _project_arguments(doctor)
    doctor.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    deidentify = _add(commands, "deidentify", "copy studies without identity, ready to be sent", _deidentify)
    deidentify.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a study, or a folder with studies")
    deidentify.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder for the copies and review.jsonl")
    deidentify.add_argument("--config", metavar="FILE", help="a project's YAML; without it the defaults of `deidentification`")
    deidentify.add_argument("--domain", default="medical", help="entry point of cv_factory_ops.domains, without --config")
    receive = _add(commands, "receive", "receive studies (DICOM C-STORE) into a project's source of kind received", _receive)
    receive.add_argument("--config", required=True, metavar="FILE", help="the project's YAML")
    receive.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting; repeatable")
    receive.add_argument("--host", default="0.0.0.0")  # noqa: S104 - it waits for senders of its network
    receive.add_argument("--port", type=int, default=11112)
    receive.add_argument("--ae-title", default="CV_FACTORY", metavar="TITLE", help="the AE title that senders must call")
    explain = _add(commands, "explain", "draw what a bundle's answer for an image rests on", _explain)
    explain.add_argument("image", type=Path, metavar="IMAGE", help="a de-identified study, a PNG, JPEG or TIFF, or .npy")
    explain.add_argument("--bundle", required=True, type=Path, metavar="DIR", help="bundle directory")
    explain.add_argument("--method", choices=EXPLANATIONS, default="grad_cam")
    explain.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help=".png; or .dcm, of a DICOM study: a secondary capture beside it"
    )
    similar = _add(commands, "similar", "find and draw the indexed studies that are most like an image", _similar)
    similar.add_argument("image", type=Path, metavar="IMAGE", help="a de-identified study, a PNG, JPEG or TIFF, or .npy")
    _project_arguments(similar)
    similar.add_argument("--run", metavar="URI", help="whose index; by default the champion's")
    similar.add_argument("--k", type=int, metavar="NUMBER", help="how many, one of each patient; by default retrieval.k")
    similar.add_argument(
        "--where", action="append", default=[], metavar="NAME:VALUE", help="narrow down, label:normal or age:40..65; repeatable"
    )
    similar.add_argument("--text", default="", metavar="WORDS", help="look for these as well, in metadata and reports")
    similar.add_argument("--out", type=Path, metavar="FILE.png", help="draw them beside the image")
    serve = _add(commands, "serve", "serve a bundle: /ping and /invocations (SageMaker's container contract)", _serve)
    serve.add_argument("--model", type=Path, help="bundle directory; by default where SageMaker, Vertex AI or Azure ML put it")
    serve.add_argument("--host", default="0.0.0.0")  # noqa: S104 - a container serves its network
    serve.add_argument("--port", type=int, default=8080)
    fetch = _add(commands, "fetch", "copy a bundle from the storage into a folder, for `cvf serve --model`", _fetch)
    fetch.add_argument("uri", metavar="URI", help="model.tar.gz, or a bundle directory: a path, file:// or s3://")
    fetch.add_argument("folder", type=Path, metavar="FOLDER", help="where its files shall lie")
    gateway = _add(commands, "gateway", "the project's HTTP interface in front of its endpoint: /predict and others", _gateway)
    _project_arguments(gateway)
    gateway.add_argument("--host", default="127.0.0.1")
    gateway.add_argument("--port", type=int, default=8000)
    key = _add(commands, "gateway-key", "make an API key for the gateway; it is printed once and kept nowhere", _gateway_key)
    _project_arguments(key)
    key.add_argument("caller", metavar="NAME", help="whose key it is: small letters, digits and hyphens")
    stream = _add(commands, "stream", "answer the messages of one Kafka topic in another, until SIGTERM", _stream)
    _project_arguments(stream)
    exporter = _add(commands, "exporter", "drift, decisions and champion of projects for Prometheus: /metrics", _exporter)
    exporter.add_argument("--config", required=True, action="append", metavar="FILE", help="a project's YAML; repeatable")
    exporter.add_argument("--host", default="127.0.0.1")
    exporter.add_argument("--port", type=int, default=9109)
    endpoint = _add(commands, "endpoint", "the SageMaker-compatible endpoint of this machine", _endpoint)
    endpoint.add_argument("--state", default="var/endpoint", help="directory of its state")
    endpoint.add_argument("--host", default="127.0.0.1")
    endpoint.add_argument("--port", type=int, default=8765)
    endpoint.add_argument(
        "--files", type=Path, action="append", default=[], metavar="DIR", help="below it, requests may name files; repeatable"
    )
    endpoint.add_argument("--stop", action="store_true", help="stop the one that works on this state directory")
    return root


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, command: Callable[..., int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _stage_arguments(parser: argparse.ArgumentParser, run_required: bool = True) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the project's YAML")
    parser.add_argument("--run", required=run_required, metavar="URI", help="run directory: a path, file:// or s3://")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting; repeatable")
    parser.add_argument("--force", action="store_true", help="work again even if nothing has changed")


def _project_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="the project's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting; repeatable")


def _person_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """What a person adds to the stages that may be told something by one."""
    if name == "approve":
        parser.add_argument("--by", required=True, metavar="NAME", help="who answers")
        parser.add_argument("--reject", action="store_true", help="the answer is no")
        parser.add_argument("--note", default="", metavar="TEXT", help="what that person says to it")
        parser.add_argument("--at", metavar="TIME", help="when it was answered, ISO 8601; by default now")
    if name == "decide":
        parser.add_argument("--why", metavar="TEXT", help="by hand: retrain for this reason, whatever the rules say")
        parser.add_argument("--by", metavar="NAME", help="by hand: who asks for it; by default the login and this machine")
    if name == "promote":
        parser.add_argument("--to", type=int, metavar="VERSION", help="by hand: roll this version out, verify and promote it")
        parser.add_argument("--why", metavar="TEXT", help="by hand: the reason, for the history")
        parser.add_argument("--override", default="", metavar="TEXT", help="by hand: why it may pass where the gate refused")


def _audit_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    audit = commands.add_parser("audit", help="check or print the history of a project's aliases; needs no MLflow")
    actions = audit.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="check that no entry was changed, taken out or put in")
    verify.add_argument("--holds", default="", metavar="DIGEST", help="of an entry that was noted elsewhere and must be there")
    verify.set_defaults(command=_audit_verify)
    table = actions.add_parser("log", help="print it as a table")
    table.set_defaults(command=_audit_log)
    for parser in (verify, table):
        parser.add_argument("--config", required=True, metavar="FILE", help="the project's YAML")


def _config_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = commands.add_parser("config", help="check a project's YAML, or print its schema")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="check a project's YAML")
    check.add_argument("file")
    check.set_defaults(command=_config_check)
    actions.add_parser("schema", help="print the JSON schema").set_defaults(command=_config_schema)


def _stage(options: argparse.Namespace) -> int:
    return _ordered(options, None)


def _ordered(options: argparse.Namespace, order: Order | None) -> int:
    from cv_factory_ops.config import as_uri, load
    from cv_factory_ops.stage import STAGES, assist_stage, node_rank, run_stage

    with _ended_by_sigterm(options.name, STAGES[options.name].grace_seconds or GRACE_SECONDS):
        config, run = load(options.config, options.set), as_uri(options.run)
        if STAGES[options.name].assist and node_rank() > 0:
            assist_stage(options.name, config, run, force=options.force)
            return 0
        result = run_stage(options.name, config, run, force=options.force, order=order)
    if not sys.stdout.isatty():
        print(result.model_dump_json())
    return 0


def _run(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import as_uri, load
    from cv_factory_ops.stage import STAGES, TRAINING, run_stage, training_of

    with _ended_by_sigterm(options.name, max(STAGES[name].grace_seconds for name in TRAINING)):
        config = load(options.config, options.set)
        for name in training_of(config):
            run_stage(name, config, as_uri(options.run), force=options.force)
    return 0


def _retrain(options: argparse.Namespace) -> int:
    """Nothing to do is fine, so that a schedule may ask at any time."""
    from cv_factory_ops.config import load
    from cv_factory_ops.drift.decisions import next_retraining
    from cv_factory_ops.stage import STAGES, TRAINING, run_stage, training_of

    with _ended_by_sigterm(options.name, max(STAGES[name].grace_seconds for name in TRAINING)):
        config = load(options.config, ["data.include_captures=true", *options.set])
        run, told = next_retraining(config, datetime.now(UTC))
        print(f"{told}: {run}" if run else f"nothing to do: {told}")
        for name in training_of(config) if run else ():
            run_stage(name, config, run)
    return 0


def _decide(options: argparse.Namespace) -> int:
    """The stage of a run; with a reason, a person's decision, which is made anew where the run has decided."""
    from cv_factory_ops.promotion import person
    from cv_factory_ops.stage import Order

    if not options.why:
        return _stage(options)
    options.force = True
    return _ordered(options, Order("retraining", options.by or person(), options.why))


def _approve(options: argparse.Namespace) -> int:
    from cv_factory_ops.errors import ConfigError
    from cv_factory_ops.stage import Order

    try:
        time = datetime.fromisoformat(options.at).astimezone(UTC) if options.at else None
    except ValueError:
        raise ConfigError(f"--at: {options.at!r} given; allowed: a time by ISO 8601, 2026-01-31T12:00:00+00:00") from None
    return _ordered(options, Order("rejection" if options.reject else "approval", options.by, options.note, time=time))


def _promote(options: argparse.Namespace) -> int:
    """The stage of a run; with a reason, what a person does by hand."""
    from cv_factory_ops import promotion
    from cv_factory_ops.config import as_uri, load
    from cv_factory_ops.errors import ConfigError
    from cv_factory_ops.registry import run_of

    if (options.run is None) == (options.to is None):
        raise ConfigError("--run and --to: give one of them")
    by_hand = options.to is not None or options.why is not None or options.override
    if not by_hand:
        return _stage(options)
    if not options.why:
        raise ConfigError("--why: not given; allowed: the reason, for the history")
    with _ended_by_sigterm(options.name):
        config = load(options.config, options.set)
        run = as_uri(options.run) if options.run else run_of(config, options.to)
        print(promotion.promote_by_hand(config, run, options.why, options.override).summary)
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load
    from cv_factory_ops.promotion import rollback

    with _ended_by_sigterm(options.name):
        print(rollback(load(options.config, options.set), options.to, options.why).summary)
    return 0


def _audit_verify(options: argparse.Namespace) -> int:
    from cv_factory_ops.audit import verify
    from cv_factory_ops.config import load

    config = load(options.config)
    entries = verify(config, options.holds)
    newest = f"the newest is {entries[-1].digest}" if entries else f"nothing lies in {config.root}/audit"
    print(f"{len(entries)} entries, unbroken, {newest}")
    return 0


def _audit_log(options: argparse.Namespace) -> int:
    from cv_factory_ops.audit import entries, table
    from cv_factory_ops.config import load

    print(table(list(entries(load(options.config)))))
    return 0


BY_HAND = {"approve": _approve, "promote": _promote, "decide": _decide}
"""Stages that do more when a person runs them."""


@contextmanager
def _ended_by_sigterm(name: str, grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Make SIGTERM end a stage within seconds: as process 1 of a container it would not even notice it.

    The handler raises in the main thread, which tidies up on its way out. Where a call into C keeps it from running, a thread
    ends the process all the same: what it has started dies with it, the kernel frees the lock, the next try starts clean.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watched = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_for_certain, args=(name, grace, reader), daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(watched)
        os.close(writer)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the tidying up
    raise Interrupted(INTERRUPTED)


def _end_for_certain(name: str, grace: float, signals: int) -> None:
    """Wait for SIGTERM, or for the end of the stage, which closes the other side of the pipe."""
    with open(signals, "rb", buffering=0) as received:
        while number := received.read(1):
            if number == bytes([signal.SIGTERM]):
                time.sleep(grace)
                _end_interrupted(name, Interrupted(INTERRUPTED))


def _end_interrupted(name: str, error: Interrupted) -> NoReturn:
    """Leave at once: threads that the stage's libraries have started are not waited for."""
    print(f"cvf {name}: {error}", file=sys.stderr, flush=True)
    os._exit(Interrupted.exit_code)


def _config_check(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load

    print(f"{options.file}: fine, project {load(options.file).project}")
    return 0


def _config_schema(options: argparse.Namespace) -> int:
    import json

    from cv_factory_ops.config import ProjectConfig

    print(json.dumps(ProjectConfig.model_json_schema(), indent=2))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """A line a finding, as it is made; what is missing is a matter of configuration (2)."""
    import json
    from collections import Counter

    from cv_factory_ops.config import load
    from cv_factory_ops.doctor.checkup import examine

    findings = []
    for finding in examine(load(options.config, options.set)):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    counts = Counter(finding.status for finding in findings)
    if options.json:
        print(json.dumps([finding.model_dump() for finding in findings], indent=1))
    else:
        print(f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail")
    return ConfigError.exit_code if counts["fail"] else 0


def _receive(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load
    from cv_factory_ops.ingestion.receiver import receive

    receive(load(options.config, options.set), options.host, options.port, options.ae_title)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from cv_factory_ops.config.explanations import EXPLANATIONS
    from cv_factory_ops.explainer import explain_file

    print(explain_file(options.bundle, options.image, EXPLANATIONS[options.method], options.out))
    return 0


def _similar(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import as_uri, load
    from cv_factory_ops.similar import find

    run = as_uri(options.run) if options.run else ""
    config = load(options.config, options.set)
    print(find(config, run, options.image, options.k, options.where, options.text, options.out))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from cv_factory_ops.serving.app import serve
    from cv_factory_ops.serving.mounted import bundle_folder

    serve(options.model or bundle_folder(), options.host, options.port)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import as_uri
    from cv_factory_ops.serving.mounted import fetch

    print(fetch(as_uri(options.uri), options.folder).digest)
    return 0


def _gateway(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load

    config = load(options.config, options.set)
    try:
        from cv_factory_ops.gateway.app import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"needs {error.name}: pip install 'cv-factory[gateway]'") from None
    serve(config, options.host, options.port)
    return 0


def _gateway_key(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load
    from cv_factory_ops.gateway.keys import make_key

    print(make_key(load(options.config, options.set).gateway.access, options.caller))
    return 0


def _stream(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load
    from cv_factory_ops.stream import run

    run(load(options.config, options.set))
    return 0


def _exporter(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load
    from cv_factory_ops.exporter import serve

    serve([load(file) for file in options.config], options.host, options.port)
    return 0


def _endpoint(options: argparse.Namespace) -> int:
    from cv_factory_ops.deploy.local import serve, stop

    if options.stop:
        stop(Path(options.state))
    else:
        serve(Path(options.state), options.host, options.port, options.files)
    return 0


def _deidentify(options: argparse.Namespace) -> int:
    from cv_factory_ops.config import load
    from cv_factory_ops.config.data import DeidentificationConfig
    from cv_factory_ops.deidentify import REVIEW, deidentify_files
    from cv_factory_ops.domain import open_domain
    from cv_factory_ops.errors import Rejected

    config = load(options.config) if options.config else None
    domain = open_domain(config.domain if config else options.domain)
    settings = config.deidentification if config else DeidentificationConfig()
    counts = deidentify_files(options.files, options.out, domain, settings)
    print(f"{counts.done} of {counts.done + counts.refused} studies de-identified into {options.out}")
    if counts.skipped:
        print(f"{counts.skipped} other files left alone")
    if counts.review:
        print(f"{counts.review} to look at: {options.out / REVIEW}")
    return Rejected.exit_code if counts.refused else 0


if __name__ == "__main__":
    sys.exit(main())
