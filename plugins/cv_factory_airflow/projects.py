"""What the DAG files share: the projects they loop over, the trigger form, the chain of a training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, CronTriggerTimetable, Param, chain

from cv_factory_airflow.assets import champion
from cv_factory_airflow.operators import (
    APPROVE,
    REJECT,
    ApproveOperator,
    DeployOperator,
    EvaluateOperator,
    EvidenceOperator,
    GateOperator,
    IndexOperator,
    IngestOperator,
    PreprocessOperator,
    PromoteOperator,
    RegisterOperator,
    TrainOperator,
    VerifyOperator,
)
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.config.evaluation import ApprovalConfig
from cv_factory_ops.errors import ConfigError


def configs_folder() -> Path:
    """Folder of the projects' YAML files: ``CVF_CONFIGS``, or ``configs/`` beside Airflow's DAG folder."""
    from airflow.sdk import conf

    if given := os.environ.get("CVF_CONFIGS"):
        return Path(given).resolve()
    return Path(conf.get("core", "dags_folder")).resolve().parent / "configs"


def projects() -> list[tuple[Path, ProjectConfig]]:
    """Every project whose YAML is fine, in the order of the file names; of two with the same name, the first.

    A broken one must not take the others' DAGs with it; :func:`broken_projects` tells of it.
    """
    return [(path, loaded) for path, loaded in _load_all() if isinstance(loaded, ProjectConfig)]


def broken_projects() -> list[ConfigError]:
    """What is wrong with the other YAML files; each message names its file."""
    return [loaded for _, loaded in _load_all() if isinstance(loaded, ConfigError)]


def _load_all() -> list[tuple[Path, ProjectConfig | ConfigError]]:
    files = sorted(configs_folder().glob("*.yaml"))
    first: dict[str, Path] = {}
    return [(file, _once(first, file, _load(file, file.stat().st_mtime_ns))) for file in files]


def _once(first: dict[str, Path], file: Path, loaded: ProjectConfig | ConfigError) -> ProjectConfig | ConfigError:
    """An error in place of a project whose name an earlier file has; ``first`` is the file of each name so far."""
    if isinstance(loaded, ConfigError) or (other := first.setdefault(loaded.project, file)) == file:
        return loaded
    return ConfigError(f"{file}: project: {loaded.project!r} given, which {other} has; allowed is a name of its own")


@cache
def _load(file: Path, changed: int) -> ProjectConfig | ConfigError:
    """A file is read once a change, however many DAG files this process parses."""
    try:
        return load(file)
    except ConfigError as error:
        return error


def dag_settings(path: Path, config: ProjectConfig, schedule: str | None = None) -> dict[str, Any]:
    """The arguments that all DAGs of a project have in common.

    A schedule begins with its next date: a new project is not checked for drift the moment it appears. A DAG without one
    only ever runs on demand, so it starts unpaused: a triggered run must not wait unseen.
    """
    never_at_once = timedelta(0)
    return {
        "schedule": CronTriggerTimetable(schedule, timezone="UTC", run_immediately=never_at_once) if schedule else None,
        "catchup": False,
        "max_active_runs": 1,
        "is_paused_upon_creation": None if schedule else False,
        "tags": [config.project, "cv-factory", *config.tags],
        "params": _params(path, config),
        "default_args": {
            "retries": 2,
            "retry_delay": timedelta(seconds=5),
            "retry_exponential_backoff": 2.0,
            "max_retry_delay": timedelta(minutes=5),
            "execution_timeout": timedelta(hours=2),
            "aws_conn_id": os.environ.get("CVF_AWS_CONN_ID"),
            "mlflow_conn_id": os.environ.get("CVF_MLFLOW_CONN_ID"),
        },
    }


def training_stages(config: ProjectConfig, settings: Mapping[str, Any] | None = None) -> None:
    """The chain of a training, in the DAG that is being built; ``settings`` override the project's YAML."""
    chain(
        IngestOperator(task_id="ingest", settings=settings),
        PreprocessOperator(task_id="preprocess", settings=settings),
        TrainOperator(task_id="train", settings=settings, execution_timeout=timedelta(days=1)),
        EvaluateOperator(task_id="evaluate", settings=settings),
        GateOperator(task_id="gate", settings=settings),
        *((IndexOperator(task_id="index", settings=settings),) if config.retrieval else ()),
        RegisterOperator(task_id="register", settings=settings),
        *(approval(config.approval, settings) if config.approval.enabled else ()),
        DeployOperator(task_id="deploy", settings=settings),
        VerifyOperator(task_id="verify", settings=settings),
        EvidenceOperator(task_id="evidence", settings=settings),
        PromoteOperator(task_id="promote", settings=settings, outlets=[champion(config.project)]),
    )


def approval(config: ApprovalConfig, settings: Mapping[str, Any] | None) -> tuple[BaseOperator, BaseOperator]:
    """Ask a person and keep the answer. The question is not asked again when its time has passed: that is an answer too."""
    from airflow.providers.standard.operators.hitl import HITLOperator
    from airflow.sdk.execution_time.hitl import HITLUser

    ask = HITLOperator(
        task_id="ask_approval",
        subject="Roll out version {{ ti.xcom_pull(task_ids='register')['model_version'] }} of "
        "{{ ti.xcom_pull(task_ids='register')['model_name'] }}?",
        body=QUESTION,
        options=[APPROVE, REJECT],
        params={"note": Param("", type="string", title="Note", description="Kept in the history and in the evidence")},
        assigned_users=[HITLUser(id=user, name=user) for user in config.assignees],
        response_timeout=timedelta(hours=config.timeout_hours),
        execution_timeout=None,
        retries=0,
    )
    return ask, ApproveOperator(task_id="approve", asked=ask.task_id, assignees=config.assignees, settings=settings)


QUESTION = """{{ ti.xcom_pull(task_ids='gate')['summary'] }}.

| criterion | value | limit | |
| --- | --- | --- | --- |
{% for row in ti.xcom_pull(task_ids='gate')['criteria'] -%}
| {{ row.name }} | {{ row.value }} | {{ row.rule }} {{ row.limit }} | {{ "passed" if row.passed else row.reason }} |
{% endfor %}
[MLflow run]({{ ti.xcom_pull(task_ids='register')['links'].get('mlflow', '') }})
"""
"""What a person is shown: the verdict of the gate with its numbers."""


def _params(path: Path, config: ProjectConfig) -> dict[str, Param]:
    return {
        "config": Param(str(path), type="string", title="Project", description="The project's YAML file"),
        "data": Param(
            None,
            type=["null", "string"],
            title="Data",
            description="Other data than the project's own: a path or s3:// URI for data.source.path",
        ),
        "runtime": Param(
            config.runtime.kind,
            type="string",
            enum=list(dict.fromkeys(["process", config.runtime.kind])),
            title="Runtime",
            description="Where the stages run: process is the Airflow worker's machine, kubernetes the project's pods",
        ),
        "overrides": Param(
            {},
            type="object",
            title="Overrides",
            description='Other settings for this run, such as {"training.epochs": 3}',
        ),
    }
