"""The project's deployment settings in the shapes of AWS's APIs.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/, https://docs.aws.amazon.com/autoscaling/application/APIReference/,
https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/
"""

from __future__ import annotations

import re
from typing import Any, assert_never

from cv_factory_ops import captures, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import (
    AllAtOnceRollout,
    AsynchronousInference,
    Autoscaling,
    CanaryRollout,
    Inference,
    LinearRollout,
    LocalDeploy,
    MetricAlarm,
    RealtimeInference,
    Rollout,
    SageMakerDeploy,
    ServerlessInference,
)
from cv_factory_ops.errors import ConfigError

Shape = dict[str, Any]
VARIANT = "AllTraffic"
LOCAL_STORAGE = re.compile(r"ml\.([cmr]\d\w*d\w*|g[4-9]\w*|p3dn|p[4-9]\w*|trn\d\w*)\.\w+")
"""Instances with disks of their own, which their hardware encrypts: CreateEndpointConfig refuses a key for them."""
LIMITS = 600, 28800
"""Least and most of ``MaximumExecutionTimeoutInSeconds``."""


def settings(config: ProjectConfig) -> LocalDeploy | SageMakerDeploy:
    """The project's deployment settings.

    Raises:
        ConfigError: they are of a service with another API.
    """
    if isinstance(config.deploy, LocalDeploy | SageMakerDeploy):
        return config.deploy
    raise ConfigError(f"deploy.kind: {config.deploy.kind} given; allowed where SageMaker's API is asked: local, sagemaker")


def inference(config: ProjectConfig) -> Inference:
    """How the endpoint answers; the local one at once."""
    deploy = settings(config)
    return RealtimeInference() if isinstance(deploy, LocalDeploy) else deploy.inference


def settings_digest(config: ProjectConfig) -> str:
    """What the model and the endpoint config hold besides the bundle: image, role, instances, network, keys, captures."""
    elsewhere = {"url", "timeout", "rollout", "golden", "tags"}
    held = config.deploy.model_dump(mode="json", exclude=elsewhere)
    held.get("inference", {}).pop("autoscaling", None)
    return storage.text_digest(f"{sorted(held.items())} {captures.folder(config)} {config.root}")[:8]


def model(config: ProjectConfig, name: str, model_data: str) -> Shape:
    """CreateModel."""
    deploy = settings(config)
    container: Shape = {"ModelDataUrl": model_data, "Environment": {"OMP_NUM_THREADS": "1"}}
    if isinstance(deploy, LocalDeploy):
        role = "arn:aws:iam::000000000000:role/local"
        return {"ModelName": name, "PrimaryContainer": container | {"Image": "cv-factory"}, "ExecutionRoleArn": role}
    container["Image"] = deploy.image
    shape: Shape = {"ModelName": name, "PrimaryContainer": container, "ExecutionRoleArn": deploy.role_arn}
    if deploy.vpc:
        shape["VpcConfig"] = {"Subnets": deploy.vpc.subnets, "SecurityGroupIds": deploy.vpc.security_groups}
    return shape | ({"EnableNetworkIsolation": True} if deploy.network_isolation else {})


def endpoint_config(config: ProjectConfig, name: str) -> Shape:
    """CreateEndpointConfig of the model of the same name."""
    shape: Shape = {"EndpointConfigName": name, "ProductionVariants": [_variant(inference(config), name)]}
    key = _key(config)
    volume_key = {} if LOCAL_STORAGE.fullmatch(getattr(inference(config), "instance_type", "")) else key
    if config.deploy.capture_percent:
        shape["DataCaptureConfig"] = {
            "EnableCapture": True,
            "InitialSamplingPercentage": config.deploy.capture_percent,
            "DestinationS3Uri": captures.folder(config),
            "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
            "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
            **key,
        }
    match inference(config):
        case AsynchronousInference(concurrent=concurrent):
            places = {"S3OutputPath": f"{config.root}/async/out", "S3FailurePath": f"{config.root}/async/failed"}
            client = {"MaxConcurrentInvocationsPerInstance": concurrent}
            return shape | volume_key | {"AsyncInferenceConfig": {"OutputConfig": {**places, **key}, "ClientConfig": client}}
        case RealtimeInference():
            return shape | volume_key
        case ServerlessInference():  # has no volume of its own to encrypt
            return shape
        case _ as unknown:
            assert_never(unknown)


def deployment(config: ProjectConfig) -> Shape:
    """The DeploymentConfig of an UpdateEndpoint."""
    rollout = config.deploy.rollout
    least, most = LIMITS
    shape: Shape = {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": _routing(rollout),
            "TerminationWaitInSeconds": rollout.bake_seconds,
            "MaximumExecutionTimeoutInSeconds": min(max(config.deploy.timeout, least, rollout.waits + 1), most),
        }
    }
    if rollout.alarms:
        alarms = [{"AlarmName": alarm_name(config, alarm)} for alarm in rollout.alarms]
        shape["AutoRollbackConfiguration"] = {"Alarms": alarms}
    return shape


def alarm_name(config: ProjectConfig, alarm: MetricAlarm) -> str:
    """``cvf/<endpoint>/<metric>/<digest of the settings>``: other settings are another alarm."""
    return f"{alarm_prefix(config)}{alarm.metric}/{storage.text_digest(alarm.model_dump_json())[:8]}"


def alarm_prefix(config: ProjectConfig) -> str:
    """What the names of the endpoint's alarms, and of no other's, begin with."""
    return f"cvf/{config.endpoint_name}/"


def metric_alarm(config: ProjectConfig, alarm: MetricAlarm) -> Shape:
    """PutMetricAlarm."""
    statistic = "ExtendedStatistic" if alarm.statistic.startswith("p") else "Statistic"
    return {
        "AlarmName": alarm_name(config, alarm),
        "AlarmDescription": f"Takes a rollout to the endpoint {config.endpoint_name} back",
        "Namespace": "AWS/SageMaker",
        "MetricName": alarm.metric,
        "Dimensions": [
            {"Name": "EndpointName", "Value": config.endpoint_name},
            {"Name": "VariantName", "Value": VARIANT},
        ],
        statistic: alarm.statistic,
        "Period": alarm.period_seconds,
        "EvaluationPeriods": alarm.periods,
        "Threshold": alarm.threshold,
        "ComparisonOperator": "GreaterThanThreshold",
        "TreatMissingData": "notBreaching",
    }


def scalable_target(config: ProjectConfig) -> Shape:
    """What names the endpoint's instances to Application Auto Scaling."""
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{config.endpoint_name}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }


def scaling_policy(config: ProjectConfig, scaling: Autoscaling) -> Shape:
    """PutScalingPolicy."""
    tracked: Shape = {
        "TargetValue": scaling.target,
        "ScaleInCooldown": scaling.in_seconds,
        "ScaleOutCooldown": scaling.out_seconds,
    }
    if isinstance(inference(config), AsynchronousInference):
        dimensions = [{"Name": "EndpointName", "Value": config.endpoint_name}]
        metric = {"MetricName": "ApproximateBacklogSizePerInstance", "Namespace": "AWS/SageMaker", "Statistic": "Average"}
        tracked["CustomizedMetricSpecification"] = {**metric, "Dimensions": dimensions}
    else:
        tracked["PredefinedMetricSpecification"] = {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"}
    return {
        **scalable_target(config),
        "PolicyName": f"cvf-{config.endpoint_name}",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": tracked,
    }


def _variant(chosen: Inference, name: str) -> Shape:
    shape: Shape = {"VariantName": VARIANT, "ModelName": name}
    match chosen:
        case RealtimeInference() | AsynchronousInference():
            instances = {"InstanceType": chosen.instance_type, "InitialInstanceCount": chosen.instance_count}
            return {**shape, **instances, "InitialVariantWeight": 1.0}
        case ServerlessInference(memory_mb=memory, concurrent=concurrent):
            return {**shape, "ServerlessConfig": {"MemorySizeInMB": memory, "MaxConcurrency": concurrent}}
        case _ as unknown:
            assert_never(unknown)


def _routing(rollout: Rollout) -> Shape:
    match rollout:
        case AllAtOnceRollout():
            return {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}
        case CanaryRollout(percent=percent, wait_seconds=wait):
            return {"Type": "CANARY", "WaitIntervalInSeconds": wait, "CanarySize": _percent(percent)}
        case LinearRollout(percent=percent, wait_seconds=wait):
            return {"Type": "LINEAR", "WaitIntervalInSeconds": wait, "LinearStepSize": _percent(percent)}
        case _ as unknown:
            assert_never(unknown)


def _percent(value: int) -> Shape:
    return {"Type": "CAPACITY_PERCENT", "Value": value}


def _key(config: ProjectConfig) -> Shape:
    key = config.deploy.kms_key if isinstance(config.deploy, SageMakerDeploy) else ""
    return {"KmsKeyId": key} if key else {}
