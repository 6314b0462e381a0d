"""The whole of a project's settings."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, assert_never

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cv_factory_ops.config.data import DataConfig, Decoding, DeidentificationConfig, SplitConfig
from cv_factory_ops.config.deploy import AzureDeploy, Deploy, LocalDeploy
from cv_factory_ops.config.drift import DecisionConfig, DriftConfig
from cv_factory_ops.config.embeddings import Embedding, HogEmbedding, ModelEmbedding
from cv_factory_ops.config.evaluation import ApprovalConfig, CalibrationConfig, EvaluationConfig, GateConfig
from cv_factory_ops.config.explanations import ExplanationsConfig
from cv_factory_ops.config.models import Model, RetinaNet, SmallCnn, Unet, VitSize
from cv_factory_ops.config.notifications import Notification, PushgatewayConfig
from cv_factory_ops.config.preprocessing import ColorStep, PreprocessingConfig
from cv_factory_ops.config.retrieval import RetrievalConfig
from cv_factory_ops.config.runtime import ProcessRuntime, Runtime
from cv_factory_ops.config.search import SearchConfig
from cv_factory_ops.config.serving import BatchConfig, GatewayConfig, StreamConfig
from cv_factory_ops.config.sources import FileSource, PhantomSource, TaskName
from cv_factory_ops.config.training import ContrastiveConfig, FineTuning, FixMatchConfig, SupervisedConfig, TrainingConfig
from cv_factory_ops.config.tree import explain, put
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.records import Frozen


class MlflowConfig(Frozen):
    """Where runs and model versions are kept. ``MLFLOW_TRACKING_URI`` overrides it."""

    tracking_uri: str = "sqlite:///var/mlflow/mlflow.db"


class ScheduleConfig(Frozen):
    """Airflow schedules: a preset such as ``@daily``, a cron expression, or null for manual only."""

    training: str | None = None
    drift_monitor: str | None = "@daily"
    batch_inference: str | None = None


class ProjectConfig(Frozen):
    """One project: a model with its data, endpoint, aliases, decisions and DAGs."""

    project: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}[a-z0-9]$")
    """Name of the project; its DAGs are ``<project>_training`` and so on, its endpoint ``<project>`` with hyphens."""
    domain: str = "medical"
    """Entry point of the group ``cv_factory_ops.domains``."""
    task: TaskName = "classification"
    """One label for an image, or one for each of its pixels, learned from masks (``segmentation``), or one for each box in it
    (``detection``); see docs/training.md."""
    labels: list[str] = Field(min_length=2)
    """Class names in the order of the model's outputs; with two, the second is the positive one. Of a segmentation the first is
    the background, and the number of a class, from 0, is its value in masks. Of a detection the first is that nothing is there;
    the others are the categories of boxes."""
    storage: str = "var/storage"
    """Root of everything the project keeps: a directory, ``file://`` or ``s3://bucket/prefix``. ``CVF_STORAGE``
    overrides it."""
    tags: list[str] = []
    """Further tags of the project's DAGs."""
    data: DataConfig
    decoding: Decoding = Decoding()
    deidentification: DeidentificationConfig = DeidentificationConfig()
    splits: SplitConfig = SplitConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    model: Model = SmallCnn()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig | None = None
    """Try various settings instead of training once; null trains once."""
    embedding: Embedding = ModelEmbedding()
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    approval: ApprovalConfig = ApprovalConfig()
    explanations: ExplanationsConfig = ExplanationsConfig()
    retrieval: RetrievalConfig | None = None
    """Index the images, so that answers may come with similar studies; null: there is no index."""
    mlflow: MlflowConfig = MlflowConfig()
    deploy: Deploy = LocalDeploy()
    drift: DriftConfig = DriftConfig()
    decision: DecisionConfig = DecisionConfig()
    notifications: list[Notification] = []
    """Who is told what: any number of ``slack``, ``email``, ``webhook``."""
    pushgateway: PushgatewayConfig | None = None
    """Null: metrics are not pushed; ``cvf exporter`` can be asked for them."""
    batch: BatchConfig = BatchConfig()
    gateway: GatewayConfig = GatewayConfig()
    stream: StreamConfig | None = None
    """What ``cvf stream`` reads and writes; null where nothing is streamed."""
    runtime: Runtime = ProcessRuntime()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _labels_differ(self) -> ProjectConfig:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")
        return self

    @model_validator(mode="after")
    def _preprocessing_fits(self) -> ProjectConfig:
        size = self.preprocessing.size
        if self.decoding.color == "grey" and any(isinstance(step, ColorStep) for step in self.preprocessing.steps):
            raise ValueError("preprocessing.steps: the step color needs decoding.color: rgb")
        for name, transformer in (("model", self.model), ("embedding", self.embedding)):
            if isinstance(transformer, VitSize) and size % transformer.patch:
                raise ValueError(f"preprocessing.size {size}: a multiple of {name}.patch {transformer.patch}")
        if isinstance(self.model, Unet) and size % self.model.factor:
            levels = f"model.levels {self.model.levels}"
            raise ValueError(f"preprocessing.size {size}: a multiple of {self.model.factor} for {levels}")
        if isinstance(self.model, RetinaNet) and size % self.model.strides[-1]:
            raise ValueError(f"preprocessing.size {size}: a multiple of {self.model.strides[-1]} for model.kind retinanet")
        if size < self.model.least_size:
            raise ValueError(f"preprocessing.size {size}: at least {self.model.least_size} for model.kind {self.model.kind}")
        if isinstance(self.embedding, HogEmbedding) and size < self.embedding.least_size:
            raise ValueError(f"preprocessing.size {size}: at least {self.embedding.least_size} for embedding.cells")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> ProjectConfig:
        objective, augment = self.training.objective, self.training.augment
        if isinstance(objective, FineTuning) and (objective.frozen or objective.probe) and not self.model.weights:
            raise ValueError("model.weights where training.objective freezes stages: they would stay random")
        if isinstance(objective, ContrastiveConfig | FixMatchConfig) and (augment.mixup or augment.cutmix):
            raise ValueError(f"training.augment without mixup and cutmix where training.objective is {objective.kind}")
        if isinstance(objective, FixMatchConfig) and self.data.unlabelled == "refuse":
            raise ValueError("data.unlabelled: keep where training.objective is fixmatch, which learns from such images")
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> ProjectConfig:
        source, metric = self.data.source, self.gate.metric
        match self.task:
            case "classification":
                needs = {
                    "model.kind: another than unet": not isinstance(self.model, Unet),
                    "model.kind: another than retinanet": not isinstance(self.model, RetinaNet),
                    "gate.metric: auc or accuracy": metric in {"auc", "accuracy"},
                    "data.source.labels: a table": not isinstance(source, FileSource) or bool(source.labels),
                }
            case "segmentation":
                needs = {
                    "model.kind: unet": isinstance(self.model, Unet),
                    "gate.metric: dice": metric == "dice",
                    "data.source.kind: files or phantoms": isinstance(source, FileSource | PhantomSource),
                    "data.source.masks, or a table with a column mask": not isinstance(source, FileSource)
                    or bool(source.masks or source.labels),
                    **self._needs_of_places(),
                    "at most 256 labels": len(self.labels) <= 256,
                }
            case "detection":
                needs = {
                    "model.kind: retinanet": isinstance(self.model, RetinaNet),
                    "gate.metric: map": metric == "map",
                    "data.source.kind: files or phantoms": isinstance(source, FileSource | PhantomSource),
                    "data.source.boxes: annotations": not isinstance(source, FileSource) or bool(source.boxes),
                    **self._needs_of_places(),
                    "gate.sensitivity and gate.specificity: 0": not (self.gate.sensitivity or self.gate.specificity),
                    "gate.calibration_error: 1": self.gate.calibration_error == 1,
                    "training.class_weights: false": not self.training.class_weights,
                    "training.label_smoothing: 0": not self.training.label_smoothing,
                }
            case _:
                assert_never(self.task)
        if lacking := next((need for need, is_met in needs.items() if not is_met), None):
            raise ValueError(f"{lacking} where task is {self.task}")
        return self

    def _needs_of_places(self) -> dict[str, bool]:
        """What a task needs that answers where something is in an image."""
        training = self.training
        return {
            "data.include_captures: false": not self.data.include_captures,
            "data.unlabelled: refuse": self.data.unlabelled == "refuse",
            "data.pseudo_labels: null": self.data.pseudo_labels is None,
            "decoding.frames: middle": self.decoding.frames == "middle",
            "training.objective: supervised or fine_tuning": isinstance(training.objective, SupervisedConfig | FineTuning),
            "training.augment without mixup and cutmix": not (training.augment.mixup or training.augment.cutmix),
            "calibration.abstain: 0": not self.calibration.abstain,
            "no search": self.search is None,
        }

    @model_validator(mode="after")
    def _reports_fit(self) -> ProjectConfig:
        if self.data.report_column and (self.task == "segmentation" or not getattr(self.data.source, "labels", None)):
            raise ValueError("data.report_column: null where there is no table of labels to have a column")
        if self.data.report_column in {"label", "file", "study", "instance", "patient"}:
            raise ValueError(f"data.report_column: {self.data.report_column} given; allowed: a column that is of no other use")
        return self

    @model_validator(mode="after")
    def _endpoint_fits(self) -> ProjectConfig:
        if isinstance(self.deploy, AzureDeploy) and not 3 <= len(self.project) <= 32:
            raise ValueError(f"project: {self.project}: 3 to 32 characters, as Azure has names of endpoints")
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> ProjectConfig:
        if self.search and self.training.nodes > 1:
            raise ValueError("training.nodes: 1 where there is a search")
        if self.search and self.training.warm_start == "champion":
            raise ValueError("training.warm_start: none where there is a search, whose networks are others than the champion's")
        for settings in self.search.probes() if self.search else ():
            try:
                self.with_settings(settings)
            except ConfigError as error:
                raise PydanticCustomError("search", "{reason}", {"reason": str(error)}) from None
        return self

    def with_settings(self, settings: Mapping[str, Any]) -> ProjectConfig:
        """The project of one trial: with these settings, by dotted name, and without the search.

        Raises:
            ConfigError: they are not allowed.
        """
        tree = self.model_dump(mode="json", exclude={"search"})
        try:
            for key in sorted(settings):  # a section comes before what is below it
                put(tree, key, copy.deepcopy(settings[key]))
            return ProjectConfig.model_validate(tree)
        except ValidationError as error:
            told = ", ".join(f"{key} {value}" for key, value in settings.items())
            reason = explain(error, ProjectConfig)[0].removeprefix("project: a mapping given; allowed: ")
            raise ConfigError(f"search.space: with {told}: {reason}") from None
        except ValueError as error:
            raise ConfigError(f"search.space: {error}") from None

    @property
    def storage_uri(self) -> str:
        """URI of the storage root."""
        return as_uri(os.environ.get("CVF_STORAGE") or self.storage)

    @property
    def root(self) -> str:
        """URI of the project's directory under the storage root."""
        return f"{self.storage_uri}/{self.project}"

    @property
    def endpoint_name(self) -> str:
        """Name of the endpoint: SageMaker allows hyphens, not underscores."""
        return self.project.replace("_", "-")


def home() -> Path:
    """Directory that relative paths are relative to."""
    return Path(os.environ.get("CVF_HOME") or ".").resolve()


def as_uri(path: str) -> str:
    """``file://`` or ``s3://`` URI without a trailing slash, of a URI or of a path relative to :func:`home`."""
    if "://" in path:
        return path.rstrip("/")
    return (home() / path).resolve().as_uri()


def load(path: str | Path, overrides: Iterable[str] = ()) -> ProjectConfig:
    """Read a project's YAML, apply ``section.field=value`` overrides, validate.

    Raises:
        ConfigError: one line for each wrong field, naming its path, what was given and what is allowed.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # PyYAML lets errors of its constructors through: an impossible date, nesting without end
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}; allowed is a mapping of settings")
    for override in overrides:
        _override(tree, override)
    try:
        return ProjectConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, ProjectConfig))) from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"--set {text}: allowed is section.field=value")
    try:
        given = yaml.safe_load(value)
    except Exception:
        raise ConfigError(f"--set {text}: {value!r} is not a YAML value") from None
    try:
        put(tree, key, given)
    except ValueError as error:
        raise ConfigError(f"--set {text}: {error}") from None
