"""Endpoints, and how a release reaches them: ``deploy``."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cv_factory_ops.config.values import Text
from cv_factory_ops.records import Frozen


class MetricAlarm(Frozen):
    """A CloudWatch alarm on the endpoint, made by the rollout: in ALARM before the rollout is done, it brings the old model
    back."""

    metric: Literal["Invocation5XXErrors", "Invocation4XXErrors", "InvocationModelErrors", "ModelLatency"] = (
        "Invocation5XXErrors"
    )
    statistic: Literal["Sum", "Average", "Maximum", "p50", "p90", "p99"] = "Sum"
    """Of the metric's values in a period."""
    threshold: float = Field(default=0, ge=0)
    """A greater value is one too many: a number of requests or, of ``ModelLatency``, microseconds."""
    period_seconds: int = Field(default=60, ge=1)
    """Length of a period; AWS has the metrics of an endpoint by the minute."""
    periods: int = Field(default=1, ge=1)
    """Periods in a row that must be too high; one without requests is not."""


class _Rollout(Frozen):
    bake_seconds: int = Field(default=0, ge=0, le=3600)
    """For which the old instances are kept, and alarms are watched, once the new ones have all of the traffic."""
    alarms: list[MetricAlarm] = Field(default=[], max_length=10)
    """What takes the rollout back."""

    @property
    def waits(self) -> int:
        """Seconds that the rollout takes at least."""
        return self.bake_seconds


class AllAtOnceRollout(_Rollout):
    """The new model gets all of the traffic as soon as it is healthy."""

    kind: Literal["all_at_once"] = "all_at_once"


class CanaryRollout(_Rollout):
    """The new model gets a part of the traffic, after a while all of it."""

    kind: Literal["canary"] = "canary"
    percent: int = Field(default=10, ge=1, le=50)
    """Part of the traffic, and of the instances, that tries the new model."""
    wait_seconds: int = Field(default=300, ge=0, le=3600)
    """How long it tries."""

    @property
    def waits(self) -> int:
        return self.bake_seconds + self.wait_seconds


class LinearRollout(_Rollout):
    """The new model gets the traffic in equal steps."""

    kind: Literal["linear"] = "linear"
    percent: int = Field(default=20, ge=10, le=50)
    """Part of the traffic, and of the instances, that each step adds."""
    wait_seconds: int = Field(default=300, ge=0, le=3600)
    """Between two steps."""

    @property
    def waits(self) -> int:
        return self.bake_seconds + self.wait_seconds * (math.ceil(100 / self.percent) - 1)


Rollout = Annotated[AllAtOnceRollout | CanaryRollout | LinearRollout, Field(discriminator="kind")]


class GoldenConfig(Frozen):
    """Studies of the locked test set that the endpoint must answer, after a rollout, as the evaluation did."""

    studies: int = Field(default=8, ge=0, le=100)
    """How many, drawn once for each bundle; 0 asks for the bundle's digest only."""
    tolerance: float = Field(default=0.001, gt=0, lt=1)
    """Largest difference of a probability, of a detection of a label's greatest score; of a segmentation, largest share of an
    image's pixels that are of another class."""


class _Deploy(Frozen):
    rollout: Rollout = AllAtOnceRollout()
    """One of ``all_at_once``, ``canary``, ``linear``: how an endpoint that serves is given the new model."""
    capture_percent: int = Field(default=100, ge=0, le=100)
    """Share of the requests and answers that is captured; 0 captures none, and nothing can be said about drift."""
    golden: GoldenConfig = GoldenConfig()
    timeout: int = Field(default=1800, ge=1)
    """Seconds that a rollout may take, its waits included."""

    @model_validator(mode="after")
    def _waits_fit(self) -> Self:
        if self.timeout <= self.rollout.waits:
            raise ValueError(f"timeout {self.timeout}: more than the {self.rollout.waits} seconds that the rollout waits")
        return self


class LocalDeploy(_Deploy):
    """The SageMaker-compatible endpoint of this project on this machine; started when it does not run yet."""

    kind: Literal["local"] = "local"
    url: str = "http://127.0.0.1:8765"
    """Address of its control plane and runtime. ``AWS_ENDPOINT_URL_SAGEMAKER`` overrides it."""
    timeout: int = Field(default=180, ge=1)
    """Seconds that a rollout may take, its waits included."""


class Autoscaling(Frozen):
    """Application Auto Scaling of the endpoint's instances, by target tracking."""

    least: int = Field(default=1, ge=0)
    """Instances at any time; 0 only of asynchronous inference."""
    most: int = Field(default=4, ge=1)
    target: float = Field(gt=0)
    """Invocations a minute and instance; of asynchronous inference, requests that wait, by instance."""
    in_seconds: int = Field(default=300, ge=0)
    """Pause after instances were taken away."""
    out_seconds: int = Field(default=60, ge=0)
    """Pause after instances were added."""

    @model_validator(mode="after")
    def _least_is_least(self) -> Autoscaling:
        if self.least > self.most:
            raise ValueError(f"least {self.least}: at most {self.most}, as most says")
        return self


class _Instances(Frozen):
    instance_type: str = "ml.m5.large"
    instance_count: int = Field(default=1, ge=1)
    """Instances to start with."""
    autoscaling: Autoscaling | None = None
    """Null keeps the number of instances."""


class RealtimeInference(_Instances):
    """Instances that answer at once."""

    kind: Literal["realtime"] = "realtime"

    @model_validator(mode="after")
    def _one_serves(self) -> RealtimeInference:
        if self.autoscaling and self.autoscaling.least == 0:
            raise ValueError("autoscaling.least: at least 1 where answers are given at once")
        return self


class AsynchronousInference(_Instances):
    """Instances that take requests from a queue: input and answer lie on S3, below ``<project>/async/``."""

    kind: Literal["asynchronous"] = "asynchronous"
    concurrent: int = Field(default=4, ge=1, le=1000)
    """Requests in hand of an instance."""


class ServerlessInference(Frozen):
    """No instances: capacity comes with the requests. AWS captures no data of such endpoints, and shifts no traffic."""

    kind: Literal["serverless"] = "serverless"
    memory_mb: Literal[1024, 2048, 3072, 4096, 5120, 6144] = 4096
    concurrent: int = Field(default=5, ge=1, le=200)
    """Requests in hand."""


Inference = Annotated[RealtimeInference | AsynchronousInference | ServerlessInference, Field(discriminator="kind")]


class VpcConfig(Frozen):
    """Where the containers' network interfaces are."""

    subnets: list[str] = Field(min_length=1, max_length=16)
    """Ids."""
    security_groups: list[str] = Field(min_length=1, max_length=5)
    """Ids."""


class SageMakerDeploy(_Deploy):
    """Amazon SageMaker: credentials and region come from the environment, as for every AWS client."""

    kind: Literal["sagemaker"] = "sagemaker"
    image: str
    """Inference image in ECR."""
    role_arn: str
    """Execution role that SageMaker assumes."""
    inference: Inference = RealtimeInference()
    """One of ``realtime``, ``asynchronous``, ``serverless``."""
    kms_key: str = ""
    """Key that encrypts the instances' volumes, captures and asynchronous answers; empty takes AWS's own. Disks that an
    instance type has of its own are encrypted by their hardware."""
    vpc: VpcConfig | None = None
    """Null runs the containers in SageMaker's own network."""
    network_isolation: bool = False
    """Whether the containers can make no call to the network."""
    tags: dict[str, Text] = {}
    """Further tags of everything that is made."""

    @model_validator(mode="after")
    def _inference_fits(self) -> SageMakerDeploy:
        match self.inference:
            case ServerlessInference():
                if self.capture_percent or self.vpc or self.network_isolation or self.rollout.kind != "all_at_once":
                    allowed = "capture_percent: 0, no vpc, no network_isolation, rollout.kind: all_at_once"
                    raise ValueError(f"inference.kind: serverless goes only with {allowed}")
            case RealtimeInference() | AsynchronousInference():
                least = self.inference.autoscaling.least if self.inference.autoscaling else self.inference.instance_count
                if self.rollout.kind != "all_at_once" and min(least, self.inference.instance_count) < 2:
                    raise ValueError(f"rollout.kind: {self.rollout.kind} needs two instances: its first step is at most half")
        return self


class _Splitting(_Deploy):
    """A service that splits traffic between deployments and does no more: the stage itself shifts it, step by step."""

    image: str
    """Inference image, in a registry that the service may read; it must start ``cvf serve``."""

    @model_validator(mode="after")
    def _rollout_fits(self) -> Self:
        if self.rollout.alarms:
            raise ValueError("rollout.alarms: none, CloudWatch's alarms are of sagemaker and local only")
        return self


class VertexDeploy(_Splitting):
    """Vertex AI of Google Cloud: credentials are Application Default Credentials. Needs the extra ``vertex``."""

    kind: Literal["vertex"] = "vertex"
    google_project: str
    """Id of the Google Cloud project."""
    location: str = Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")
    """Region of endpoint and models, such as ``europe-west4``."""
    staging: str = Field(pattern=r"^gs://[^/]+(/[^/]+)*$")
    """Folder in Cloud Storage that bundles are copied to, ``gs://bucket/prefix``; the containers read them there."""
    machine_type: str = "n1-standard-4"
    least: int = Field(default=1, ge=1)
    """Machines at any time."""
    most: int = Field(default=1, ge=1)
    """Machines at most; above ``least``, Vertex AI scales by their load."""
    service_account: str = ""
    """That the containers run as; empty takes Vertex AI's own."""
    log_table: str = Field(default="", pattern=r"^(bq://[^.]+\.[^.]+\.[^.]+)?$")
    """BigQuery table for ``capture_percent`` of requests and answers, ``bq://project.dataset.table``; empty logs none. Drift
    checks do not read it."""
    labels: dict[str, Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]] = {}
    """Further labels of everything that is made."""
    api: str = Field(default="", pattern=r"^(https://[^/]+)?$")
    """Address of the API where it is not the region's own, as with Private Service Connect."""

    @model_validator(mode="after")
    def _least_is_least(self) -> VertexDeploy:
        if self.least > self.most:
            raise ValueError(f"least {self.least}: at most {self.most}, as most says")
        return self


class AzureDeploy(_Splitting):
    """A managed online endpoint of Azure Machine Learning: credentials are those that azure-identity finds. Needs the extra
    ``azure``."""

    kind: Literal["azure"] = "azure"
    subscription: str
    """Id."""
    resource_group: str
    workspace: str
    location: str
    """Region of the endpoint, such as ``westeurope``."""
    instance_type: str = "Standard_DS3_v2"
    instance_count: int = Field(default=1, ge=1)
    concurrent: int = Field(default=8, ge=1)
    """Requests in hand of an instance."""
    datastore: str = "workspaceblobstore"
    """Blob datastore of the workspace that bundles are copied to."""
    public_access: bool = True
    """Whether the endpoint answers outside of the workspace's private network."""
    tags: dict[str, Text] = {}
    """Further tags of everything that is made."""
    api: str = Field(default="https://management.azure.com", pattern=r"^https://[^/]+$")
    """Address of Azure Resource Manager: sovereign clouds have others."""


Deploy = Annotated[LocalDeploy | SageMakerDeploy | VertexDeploy | AzureDeploy, Field(discriminator="kind")]
