"""One operator a stage: each runs ``cvf <stage> --config FILE --run URI`` and returns the stage's record.

Nothing heavy is imported here: the work happens in the stage's own process. That process outlives a killed worker; the
next try of the task starts a second one, which waits for the first and returns the same result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from cv_factory_airflow import run_uri, stored
from cv_factory_airflow.links import DriftReportLink, EvidenceLink, MlflowRunLink
from cv_factory_ops.config import ProjectConfig, as_uri, home, load
from cv_factory_ops.errors import ConfigError, DataError, GateRefused
from cv_factory_ops.records import Result

if TYPE_CHECKING:
    from airflow.sdk import Context

    from cv_factory_airflow.pods import StagePods

NO_RETRY = {error.exit_code for error in (ConfigError, DataError, GateRefused)}
GRACE_SECONDS = 10
APPROVE, REJECT = "Approve", "Reject"


class StageOperator(BaseOperator):
    """Run one stage as a process of this machine; its log lines appear live, its record is the XCom.

    :param config: the project's YAML; a relative path is relative to ``CVF_HOME``
    :param run: directory of the run; by default it follows from the project's root and the DAG run's id
    :param data: replaces ``data.source.path``; empty keeps the project's own
    :param overrides: further settings as a JSON object, ``{"training.epochs": 3}``
    :param settings: settings that the DAG itself fixes; ``overrides`` win over them
    :param runtime: where the stage runs: ``process`` is this machine, ``kubernetes`` the pods of the project's ``runtime``
    :param aws_conn_id: Airflow connection whose AWS credentials the stage's process is given
    :param mlflow_conn_id: Airflow connection, of type ``http``, whose address and login of MLflow the stage's process is given
    """

    stage: ClassVar[str]
    announced: ClassVar[tuple[str, ...]] = ()
    """Fields of the record that the events of the task's assets tell."""
    template_fields: Sequence[str] = ("config", "run", "data", "overrides", "runtime")
    ui_color = "#e3eefa"
    _process: subprocess.Popen[bytes] | None = None
    _pods: StagePods | None = None

    def __init__(
        self,
        *,
        config: str = "{{ params.config }}",
        run: str = "",
        data: str = "{{ params.data or '' }}",
        overrides: str = "{{ params.overrides | tojson }}",
        settings: Mapping[str, Any] | None = None,
        runtime: str = "{{ params.runtime }}",
        aws_conn_id: str | None = None,
        mlflow_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.run = run
        self.data = data
        self.overrides = overrides
        self.settings = settings
        self.runtime = runtime
        self.aws_conn_id = aws_conn_id
        self.mlflow_conn_id = mlflow_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        match self.runtime:
            case "process":
                return self._announce(context, self._run_process(self._arguments(context)).record)
            case "kubernetes":
                return self._announce(context, self._run_pods(context))
            case other:
                raise AirflowFailException(f"runtime: {other!r} given; allowed: process, kubernetes")

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Go on when the triggerer has seen the pods end."""
        return self._announce(context, self._run_pods(context, event))

    def on_kill(self) -> None:
        """Stop the stage and everything that it started: politely first, then for certain."""
        if self._pods is not None:
            return self._pods.on_kill()
        if (process := self._process) is None:
            return
        _signal_group(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        _signal_group(process, signal.SIGKILL)

    def _announce(self, context: Context, record: dict[str, Any]) -> dict[str, Any]:
        for asset in self.outlets:
            context["outlet_events"][asset].extra = {name: record[name] for name in self.announced}
        return record

    def _arguments(self, context: Context) -> list[str]:
        file, project, settings = self._project()
        return self._command_line(file, self._run_of(project, context), settings)

    def _project(self) -> tuple[str, ProjectConfig, list[str]]:
        """The project's file, the project with the settings of this run, and these."""
        settings = form_settings(self.data, self.overrides, self.settings)
        return *load_project(self.config, settings), settings

    def _run_of(self, project: ProjectConfig, context: Context) -> str:
        dag_run = context["dag_run"]
        return as_uri(self.run) if self.run else run_uri(project.root, dag_run.dag_id, dag_run.run_id)

    def _command_line(self, file: str, run: str, settings: Sequence[str]) -> list[str]:
        return [self.stage, "--config", file, "--run", run, *(part for setting in settings for part in ("--set", setting))]

    def _run_pods(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """The same command in pods; the record is read from the storage, where the stage has published it."""
        from cv_factory_airflow.pods import StageEnded

        try:
            self._pods = self._stage_pods(context)
            self._pods.run(context, event)
        except ConfigError as error:
            raise AirflowFailException(str(error)) from None
        except StageEnded as ended:
            raise self._failure(ended.code, ended.lines) from None
        return _read_record(f"{self._pods.run_uri}/{self.stage}/result.json")

    def _stage_pods(self, context: Context) -> StagePods:
        from cv_factory_airflow.manifest import PROJECT_FILE
        from cv_factory_airflow.pods import StagePods

        file, project, settings = self._project()
        if project.runtime.kind != "kubernetes":
            raise AirflowFailException("runtime: 'kubernetes' given; runtime.pod of the project must say what pods look like")
        run = self._run_of(project, context)
        return StagePods(
            stage=self.stage,
            project=project,
            yaml=Path(file).read_text(encoding="utf-8"),
            run=run,
            command=["cvf", *self._command_line(PROJECT_FILE, run, settings)],
            context=context,
            task_id=self.task_id,
            execution_timeout=self.execution_timeout,
        )

    def _run_process(self, arguments: list[str]) -> Result:
        """The stage writes to files, not pipes: a dead worker must not break the pipe of a living stage."""
        command = [sys.executable, "-m", "cv_factory_ops.cli", *arguments]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=os.environ | self._aws_environment() | self._mlflow_environment(),
                start_new_session=True,
            )
            try:
                last_lines = self._follow(self._process, errors)
            except BaseException:
                self.on_kill()
                raise
            code = self._process.wait()
            if code:
                raise self._failure(code, last_lines)
            output.seek(0)
            return Result.model_validate_json(output.read().splitlines()[-1])

    def _follow(self, process: subprocess.Popen[bytes], errors: BinaryIO) -> list[str]:
        """Repeat the stage's log lines in the task's log until it ends; returns the last ones."""
        last_lines: deque[str] = deque(maxlen=30)
        position, begun = 0, b""
        while True:
            ended = process.poll() is not None
            content = os.pread(errors.fileno(), 1 << 20, position)
            position += len(content)
            *lines, begun = (begun + content).split(b"\n")
            if ended and not content and begun:
                lines, begun = [begun], b""
            for line in lines:
                last_lines.append(text := line.decode(errors="replace").rstrip())
                self.log.info("%s", text)
            if ended and not content:
                return list(last_lines)
            if not content:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)

    def _failure(self, code: int, last_lines: list[str]) -> AirflowException:
        """The stage's own reason; exit codes 2, 3 and 4 say that a retry would change nothing."""
        if code < 0:
            return AirflowException(f"cvf {self.stage}: was ended by {signal.Signals(-code).name}")
        starts = [number for number, line in enumerate(last_lines) if line.startswith(f"cvf {self.stage}: ")]
        reason = "\n".join(last_lines[starts[-1] :] if starts else last_lines[-1:]) or f"cvf {self.stage}: exit code {code}"
        return AirflowFailException(reason) if code in NO_RETRY else AirflowException(reason)

    def _aws_environment(self) -> dict[str, str]:
        if self.aws_conn_id is None:
            return {}
        from airflow.providers.amazon.aws.hooks.base_aws import AwsGenericHook

        hook: Any = AwsGenericHook(aws_conn_id=self.aws_conn_id)
        credentials = hook.get_credentials()
        given = {
            "AWS_ACCESS_KEY_ID": credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
            "AWS_SESSION_TOKEN": credentials.token or "",  # empty hides a token of the worker's own environment
            "AWS_DEFAULT_REGION": hook.region_name,
            "AWS_ENDPOINT_URL": hook.conn_config.endpoint_url,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _mlflow_environment(self) -> dict[str, str]:
        """Pods take theirs from Secrets (``runtime.pod.secret_env``): what is in their manifest, many may read."""
        if self.mlflow_conn_id is None:
            return {}
        from airflow.sdk import Connection

        found = Connection.get(self.mlflow_conn_id)
        host, port = found.host or "", f":{found.port}" if found.port else ""
        address = host if "://" in host else f"{found.schema or 'http'}://{host}"
        return {
            "MLFLOW_TRACKING_URI": f"{address}{port}",
            "MLFLOW_TRACKING_USERNAME": found.login or "",  # empty hides the worker's own login, which is another server's
            "MLFLOW_TRACKING_PASSWORD": found.password or "",
            "MLFLOW_TRACKING_TOKEN": "",
        }


def form_settings(data: str, overrides: str, fixed: Mapping[str, Any] | None = None) -> list[str]:
    """``section.field=value`` of everything that a DAG (``fixed``) and its trigger form set anew, the strongest last.

    Raises:
        AirflowFailException: ``overrides`` is not a JSON object.
    """
    try:
        given = json.loads(overrides or "{}") or {}
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise AirflowFailException(f"overrides: {overrides!r} given; allowed is a JSON object")
    source = {"data.source.path": data} if data else {}
    return [f"{key}={json.dumps(value)}" for key, value in {**(fixed or {}), **source, **given}.items()]


def load_project(config: str, settings: Sequence[str]) -> tuple[str, ProjectConfig]:
    """Path of a project's YAML, relative ones below ``CVF_HOME``, and the project with these settings.

    Raises:
        AirflowFailException: the file or a setting is wrong; a retry would change nothing.
    """
    file = str(home() / config)
    try:
        return file, load(file, settings)
    except ConfigError as error:
        raise AirflowFailException(str(error)) from None


def _read_record(uri: str) -> dict[str, Any]:
    """The record that a pod has published, read by this worker's own way to the storage."""
    try:
        return Result.model_validate_json(stored(uri).read_text()).record
    except Exception as error:  # whatever the storage's client raises
        reason = f"{uri}: the stage is done, but this Airflow worker cannot read its record ({type(error).__name__})"
        raise AirflowException(f"{reason}; it needs the storage's credentials, or the pods' volume") from None


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class IngestOperator(StageOperator):
    """Read, check and split the images."""

    stage = "ingest"


class PreprocessOperator(StageOperator):
    """Write the training shards."""

    stage = "preprocess"


class TrainOperator(StageOperator):
    """Train with PyTorch DDP (``torchrun``) and write the model bundle."""

    stage = "train"
    ui_color = "#d5f0dd"
    operator_extra_links = (MlflowRunLink(),)


class EvaluateOperator(StageOperator):
    """Measure challenger and champion on the locked test set."""

    stage = "evaluate"
    ui_color = "#d5f0dd"
    operator_extra_links = (MlflowRunLink(),)


class GateOperator(StageOperator):
    """Decide whether the challenger may be registered."""

    stage = "gate"
    ui_color = "#fdeecb"


class IndexOperator(StageOperator):
    """Index the images, so that answers may come with similar studies."""

    stage = "index"
    ui_color = "#d5f0dd"


class RegisterOperator(StageOperator):
    """Register the model version in MLflow."""

    stage = "register"
    ui_color = "#e6e0f5"
    operator_extra_links = (MlflowRunLink(),)


class ApproveOperator(StageOperator):
    """Keep what a person has answered to the task ``ask_approval``; a rejection ends the run with that person's reason."""

    stage = "approve"
    ui_color = "#fdeecb"
    template_fields = (*StageOperator.template_fields, "answer")

    def __init__(self, *, asked: str, assignees: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        answer = f"ti.xcom_pull(task_ids='{asked}')"
        user = f"{answer}['responded_by_user']"  # assignees are ids, which an auth manager may give other names
        self.answer = {
            "choice": f"{{{{ {answer}['chosen_options'][0] }}}}",
            "--by": f"{{{{ {user}['id'] if {user}['id'] in {list(assignees)} else {user}['name'] }}}}",
            "--at": f"{{{{ {answer}['responded_at'] }}}}",
            "--note": f"{{{{ {answer}['params_input'].get('note') or '' }}}}",
        }

    def _command_line(self, file: str, run: str, settings: Sequence[str]) -> list[str]:
        given = [f"{option}={value}" for option, value in self.answer.items() if option != "choice"]
        rejected = [] if self.answer["choice"] == APPROVE else ["--reject"]
        return [*super()._command_line(file, run, settings), *given, *rejected]


class DeployOperator(StageOperator):
    """Roll the model version out to the SageMaker endpoint."""

    stage = "deploy"
    ui_color = "#fbdfcf"


class VerifyOperator(StageOperator):
    """Compare the live endpoint with what was asked for."""

    stage = "verify"
    ui_color = "#fbdfcf"


class EvidenceOperator(StageOperator):
    """Collect what the version rests on, as a folder and an archive."""

    stage = "evidence"
    ui_color = "#e6e0f5"
    operator_extra_links = (EvidenceLink(),)


class PromoteOperator(StageOperator):
    """Move the alias ``champion`` to the verified version."""

    stage = "promote"
    announced = ("model_name", "model_version", "bundle_digest", "summary")
    ui_color = "#e6e0f5"
    operator_extra_links = (MlflowRunLink(),)


class DriftOperator(StageOperator):
    """Compare the captured requests with the bundle's reference and write Evidently's report."""

    stage = "drift"
    announced = ("verdict", "requests", "bundle_digest", "summary")
    ui_color = "#fdeecb"
    operator_extra_links = (DriftReportLink(),)


class DecideOperator(StageOperator):
    """Decide whether to retrain, and store why.

    :param why: a person's reason to retrain, whatever the rules say; empty where nobody gives one
    :param by: who that is
    """

    stage = "decide"
    ui_color = "#fdeecb"
    template_fields = (*StageOperator.template_fields, "why", "by")

    def __init__(self, *, why: str = "", by: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.why = why
        self.by = by

    def _command_line(self, file: str, run: str, settings: Sequence[str]) -> list[str]:
        given = [f"--why={self.why}", f"--by={self.by}"] if self.why else []
        return [*super()._command_line(file, run, settings), *given]


class PredictOperator(StageOperator):
    """Run the champion over a batch of studies."""

    stage = "predict"
    ui_color = "#d5f0dd"
