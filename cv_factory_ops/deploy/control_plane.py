"""The operations of SageMaker's control plane that a deployment needs, over a state directory that survives kill -9.

Requests and answers have the shapes of https://docs.aws.amazon.com/sagemaker/latest/APIReference/. An endpoint keeps a
snapshot of what it serves, so that deleting a model or an endpoint configuration in use does not touch it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cv_factory_ops.deploy.alarms import CloudWatch
from cv_factory_ops.deploy.shelf import Item, Place, ServiceError, Shelf, require_name, required, without
from cv_factory_ops.deploy.traffic import Policy, Traffic
from cv_factory_ops.deploy.variants import Fleet, NotHealthy
from cv_factory_ops.errors import unexpected

log = logging.getLogger("cvf")

IN_PROGRESS = frozenset({"Creating", "Updating", "RollingBack", "SystemUpdating", "Deleting"})
SETTING = re.compile(r"(CVF|OMP|SAGEMAKER)_[A-Z0-9_]+")
"""What a model's environment may set: no variable by which an interpreter or a loader is told to run something else."""
WATCH_SECONDS = 0.1
"""How often alarms are looked at."""


class GoneWrong(Exception):
    """A rollout is to be taken back; the message is the FailureReason."""


class ControlPlane:
    """Models, endpoint configurations and endpoints, with the processes that serve them.

    Every change runs on the event loop without awaiting in between, so requests do not need locks.
    """

    def __init__(self, state: Path, cloudwatch: CloudWatch, require_place: Place) -> None:
        self._cloudwatch, self._require_place = cloudwatch, require_place
        self._processes = state / "processes"
        shutil.rmtree(self._processes, ignore_errors=True)
        self.models, self.configs, self.endpoints = (Shelf(state, kind) for kind in ("model", "endpoint-config", "endpoint"))
        self.traffic: dict[str, Traffic] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._drains: set[asyncio.Task[None]] = set()
        self.operations: dict[str, Callable[[Item], Awaitable[Item]]] = {
            "CreateModel": self._create_model,
            "DescribeModel": self._describe_model,
            "DeleteModel": self._delete_model,
            "CreateEndpointConfig": self._create_endpoint_config,
            "DescribeEndpointConfig": self._describe_endpoint_config,
            "DeleteEndpointConfig": self._delete_endpoint_config,
            "CreateEndpoint": self._create_endpoint,
            "UpdateEndpoint": self._update_endpoint,
            "UpdateEndpointWeightsAndCapacities": self._update_weights_and_capacities,
            "DescribeEndpoint": self._describe_endpoint,
            "DeleteEndpoint": self._delete_endpoint,
            "ListEndpoints": self._list_endpoints,
            "ListTags": self._list_tags,
            "AddTags": self._add_tags,
        }

    def restore(self) -> None:
        """Bring the endpoints back that served when the last server ended, and go on with rollouts that it left."""
        for item in self.endpoints:
            name = item["EndpointName"]
            if item["EndpointStatus"] == "Deleting":
                self.endpoints.remove(name)
            elif item["Current"] or item["Target"]:
                self._set(name, EndpointStatus="SystemUpdating" if item["Current"] else "Creating")
                self._start(name, self._restore(name))

    async def close(self) -> None:
        """Stop every process; the endpoints' state stays."""
        for task in (*self._tasks.values(), *self._drains):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._drains, return_exceptions=True)
        fleets = [fleet for traffic in self.traffic.values() for fleet in (traffic.blue, traffic.green) if fleet]
        await asyncio.gather(*(fleet.stop() for fleet in fleets))

    async def fleet(self, name: str) -> Fleet | None:
        """What serves one request, once the endpoint is back after a restart; None where nothing does."""
        while name in self._tasks and self.endpoints.get(name)["EndpointStatus"] == "SystemUpdating":
            await asyncio.sleep(0.05)
        traffic = self.traffic.get(name)
        return traffic.choose() if traffic else None

    # ---- models and endpoint configurations -----------------------------------------------------------------------------

    async def _create_model(self, given: Item) -> Item:
        name = required(given, "ModelName")
        container = given.get("PrimaryContainer") or {}
        self._require_place("ModelDataUrl", required(container, "ModelDataUrl"))
        if wrong := [setting for setting in container.get("Environment") or {} if not SETTING.fullmatch(setting)]:
            raise ServiceError(f"Environment: {wrong[0][:80]!r} given; the local endpoint takes {SETTING.pattern}")
        return {"ModelArn": self.models.add(name, given)}

    async def _describe_model(self, given: Item) -> Item:
        item = self.models.get(required(given, "ModelName"))
        return {**without(item, "Tags"), "ModelArn": self.models.arn(item["ModelName"])}

    async def _delete_model(self, given: Item) -> Item:
        self.models.remove(required(given, "ModelName"))
        return {}

    async def _create_endpoint_config(self, given: Item) -> Item:
        name = required(given, "EndpointConfigName")
        variants = [{"InitialVariantWeight": 1.0, **variant} for variant in required(given, "ProductionVariants")]
        for variant in variants:
            self.models.get(required(variant, "ModelName"))
            require_name("variantName", required(variant, "VariantName"))
        if len({variant["VariantName"] for variant in variants}) < len(variants):
            raise ServiceError("Production variant names must be unique within an endpoint configuration")
        if given.get("DataCaptureConfig") and any("ServerlessConfig" in variant for variant in variants):
            raise ServiceError("DataCaptureConfig is not supported for serverless endpoints")
        for field, place in _destinations(given).items():
            self._require_place(field, place)
        return {"EndpointConfigArn": self.configs.add(name, {**given, "ProductionVariants": variants})}

    async def _describe_endpoint_config(self, given: Item) -> Item:
        item = self.configs.get(required(given, "EndpointConfigName"))
        return {**without(item, "Tags"), "EndpointConfigArn": self.configs.arn(item["EndpointConfigName"])}

    async def _delete_endpoint_config(self, given: Item) -> Item:
        self.configs.remove(required(given, "EndpointConfigName"))
        return {}

    # ---- endpoints ------------------------------------------------------------------------------------------------------

    async def _create_endpoint(self, given: Item) -> Item:
        name, deployment = required(given, "EndpointName"), given.get("DeploymentConfig")
        target = self._snapshot(required(given, "EndpointConfigName"))
        self._cloudwatch.require(_policy(target, deployment).alarms)
        item = {"EndpointName": name, "EndpointStatus": "Creating", "FailureReason": None, "Current": None, "Target": target}
        item |= {"Tags": given.get("Tags", []), "LastModifiedTime": time.time(), "LastDeploymentConfig": deployment}
        item["Phase"] = _phase("Creating")
        arn = self.endpoints.add(name, item)
        self._start(name, self._roll_out(name))
        return {"EndpointArn": arn}

    async def _update_endpoint(self, given: Item) -> Item:
        name = required(given, "EndpointName")
        item = self._settled(name)
        target = self._snapshot(required(given, "EndpointConfigName"))
        if given.get("RetainAllVariantProperties"):
            excluded = {kept["VariantPropertyType"] for kept in given.get("ExcludeRetainedVariantProperties", [])}
            target = _retaining(target, item["Current"], excluded)
        deployment = given.get("DeploymentConfig") or (given.get("RetainDeploymentConfig") and item.get("LastDeploymentConfig"))
        self._cloudwatch.require(_policy(target, deployment).alarms)
        changes = {"Target": target, "FailureReason": None, "LastDeploymentConfig": deployment, "Phase": _phase("Creating")}
        self._set(name, EndpointStatus="Updating", **changes)
        self._start(name, self._roll_out(name))
        return {"EndpointArn": self.endpoints.arn(name)}

    async def _update_weights_and_capacities(self, given: Item) -> Item:
        name = required(given, "EndpointName")
        current = self._settled(name)["Current"]
        wanted = {required(each, "VariantName"): each for each in required(given, "DesiredWeightsAndCapacities")}
        if unknown := set(wanted) - {variant["VariantName"] for variant in current["Variants"]}:
            raise ServiceError(f"Variant {', '.join(sorted(unknown))} of endpoint {name} not found.")
        variants = [_reweighed(variant, wanted.get(variant["VariantName"], {})) for variant in current["Variants"]]
        self._set(name, EndpointStatus="Updating", Current={**current, "Variants": variants})
        self._start(name, self._reweigh(name))
        return {"EndpointArn": self.endpoints.arn(name)}

    async def _describe_endpoint(self, given: Item) -> Item:
        item = self.endpoints.get(required(given, "EndpointName"))
        shown = item["Current"] or item["Target"] or item["Failed"]
        optional = {name: item[name] for name in ("FailureReason", "LastDeploymentConfig") if item.get(name)}
        answer = {
            **without(item, "Tags", "Current", "Target", "Failed", "Phase", "FailureReason", "LastDeploymentConfig"),
            **optional,
            "EndpointArn": self.endpoints.arn(item["EndpointName"]),
            "EndpointConfigName": shown["EndpointConfigName"],
        }
        if item["Current"]:
            answer["ProductionVariants"] = [_variant_summary(variant) for variant in shown["Variants"]]
            answer |= _capture_summary(shown["DataCaptureConfig"])
            answer |= {"AsyncInferenceConfig": shown["AsyncInferenceConfig"]} if shown.get("AsyncInferenceConfig") else {}
        if target := item["Target"]:
            variants = [{**_variant_summary(variant), "VariantStatus": [item["Phase"]]} for variant in target["Variants"]]
            pending = {"EndpointConfigName": target["EndpointConfigName"], "ProductionVariants": variants}
            answer["PendingDeploymentSummary"] = {**pending, "StartTime": target["StartTime"]}
        return answer

    async def _delete_endpoint(self, given: Item) -> Item:
        name = required(given, "EndpointName")
        self._require_settled(name)
        self._set(name, EndpointStatus="Deleting")
        self._start(name, self._take_down(name))
        return {}

    async def _list_endpoints(self, given: Item) -> Item:
        items = [item for item in self.endpoints if _wanted(item, given)]
        key = {"Name": "EndpointName", "Status": "EndpointStatus"}.get(given.get("SortBy", ""), "CreationTime")
        items.sort(key=lambda item: item[key], reverse=given.get("SortOrder", "Descending") == "Descending")
        first = int(given.get("NextToken", 0))
        last = first + given.get("MaxResults", 10)
        fields = ("EndpointName", "EndpointStatus", "CreationTime", "LastModifiedTime")
        page = [
            {field: item[field] for field in fields} | {"EndpointArn": self.endpoints.arn(item["EndpointName"])}
            for item in items[first:last]
        ]
        return {"Endpoints": page} | ({"NextToken": str(last)} if last < len(items) else {})

    async def _list_tags(self, given: Item) -> Item:
        shelf, name = self._by_arn(required(given, "ResourceArn"))
        return {"Tags": shelf.get(name).get("Tags", [])}

    async def _add_tags(self, given: Item) -> Item:
        shelf, name = self._by_arn(required(given, "ResourceArn"))
        item = shelf.get(name)
        merged = {tag["Key"]: tag["Value"] for tag in (*item.get("Tags", []), *required(given, "Tags"))}
        tags = [{"Key": key, "Value": value} for key, value in merged.items()]
        shelf.save(name, {**item, "Tags": tags})
        return {"Tags": tags}

    # ---- rollouts -------------------------------------------------------------------------------------------------------

    async def _roll_out(self, name: str) -> None:
        """Start the target's processes and shift the traffic to them; go back where they or an alarm say so."""
        item = self.endpoints.get(name)
        target, policy = item["Target"], _policy(item["Target"], item.get("LastDeploymentConfig"))
        fleet = Fleet(target, self._processes)
        try:
            async with asyncio.timeout(policy.limit_seconds):
                await fleet.start()
                await self._shift(name, fleet, policy)
        except TimeoutError:
            limit = f"{policy.limit_seconds:g}"
            await self._go_back(name, fleet, f"the deployment took longer than MaximumExecutionTimeoutInSeconds ({limit})")
        except (NotHealthy, GoneWrong, OSError) as error:
            await self._go_back(name, fleet, str(error))
        except Exception as error:
            await self._go_back(name, fleet, unexpected(error))
        else:
            replaced = self.traffic.get(name)
            self._set(name, EndpointStatus="InService", Current=target, Target=None)
            self.traffic[name] = Traffic(fleet)
            log.info("endpoint %s: serves %s", name, target["EndpointConfigName"])
            if replaced:
                self._drain(replaced.blue)

    async def _shift(self, name: str, fleet: Fleet, policy: Policy) -> None:
        """Give the new fleet its growing share of the traffic, and watch the alarms."""
        traffic = self.traffic.get(name)
        if traffic is None:
            return
        traffic.green = fleet
        for share in policy.shares:
            traffic.share = share
            self._set(name, Phase=_phase("ActivatingTraffic", f"{100 * share:.0f} % of the traffic"))
            await self._watch(policy.wait_seconds if share < 1 else 0, policy)
        self._set(name, Phase=_phase("Baking", "all of the traffic"))
        await self._watch(policy.bake_seconds, policy)

    async def _watch(self, seconds: float, policy: Policy) -> None:
        end = time.monotonic() + seconds
        while True:
            if reasons := self._cloudwatch.raised(policy.alarms):
                raise GoneWrong(f"CloudWatch alarms of AutoRollbackConfiguration went into ALARM: {reasons}")
            if (left := end - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(left, WATCH_SECONDS))

    async def _go_back(self, name: str, fleet: Fleet, reason: str) -> None:
        log.warning("endpoint %s: %s", name, reason)
        item = self.endpoints.get(name)
        if traffic := self.traffic.get(name):
            traffic.green, traffic.share = None, 0.0
            self._set(name, EndpointStatus="RollingBack")
        await fleet.drain()
        status = "InService" if item["Current"] else "Failed"
        self._set(name, EndpointStatus=status, Target=None, Failed=item["Target"], FailureReason=reason[:1024])

    async def _reweigh(self, name: str) -> None:
        variants = self.endpoints.get(name)["Current"]["Variants"]
        self.traffic[name].blue.weigh({variant["VariantName"]: variant["InitialVariantWeight"] for variant in variants})
        self._set(name, EndpointStatus="InService")

    def _drain(self, fleet: Fleet) -> None:
        drain = asyncio.create_task(fleet.drain())
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _restore(self, name: str) -> None:
        item = self.endpoints.get(name)
        if item["Current"]:
            fleet = Fleet(item["Current"], self._processes)
            try:
                await fleet.start()
            except (NotHealthy, OSError) as error:
                await fleet.stop()
                self._set(name, EndpointStatus="Failed", FailureReason=str(error)[:1024])
                return
            self.traffic[name] = Traffic(fleet)
            self._set(name, EndpointStatus="Updating" if item["Target"] else "InService")
        if item["Target"]:
            await self._roll_out(name)

    async def _take_down(self, name: str) -> None:
        if traffic := self.traffic.pop(name, None):
            await traffic.blue.drain()
        self.endpoints.remove(name)

    def _start(self, name: str, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._tasks.pop(name) if self._tasks.get(name) is done else None)

    def _set(self, name: str, **changes: Any) -> None:
        self.endpoints.save(name, {**self.endpoints.get(name), **changes, "LastModifiedTime": time.time()})

    def _settled(self, name: str) -> Item:
        self._require_settled(name)
        item = self.endpoints.get(name)
        if item["EndpointStatus"] == "Failed":
            raise ServiceError(f'Cannot update failed endpoint "{self.endpoints.arn(name)}".')
        return item

    def _require_settled(self, name: str) -> None:
        if self.endpoints.get(name)["EndpointStatus"] in IN_PROGRESS:
            raise ServiceError(f'Cannot update in-progress endpoint "{self.endpoints.arn(name)}".')

    def _snapshot(self, config_name: str) -> Item:
        config = self.configs.get(config_name)
        variants = []
        for variant in config["ProductionVariants"]:
            container = self.models.get(variant["ModelName"])["PrimaryContainer"]
            served = {"ModelDataUrl": container["ModelDataUrl"], "Environment": container.get("Environment", {})}
            variants.append({**variant, **served, "Image": container.get("Image", "cv-factory")})
        kept = {field: config.get(field) for field in ("DataCaptureConfig", "AsyncInferenceConfig")}
        return {"EndpointConfigName": config_name, "Variants": variants, "StartTime": time.time(), **kept}

    def _by_arn(self, arn: str) -> tuple[Shelf, str]:
        kind, _, name = arn.rpartition(":")[2].partition("/")
        shelves = {"model": self.models, "endpoint-config": self.configs, "endpoint": self.endpoints}
        if kind not in shelves:
            raise ServiceError(f"Value {arn[:200]!r} at 'resourceArn' is not a model, endpoint-config or endpoint")
        return shelves[kind], name


def _wanted(item: Item, given: Item) -> bool:
    return (
        given.get("NameContains", "") in item["EndpointName"]
        and given.get("StatusEquals", item["EndpointStatus"]) == item["EndpointStatus"]
        and all(item[field] >= given.get(f"{field}After", 0) for field in ("CreationTime", "LastModifiedTime"))
        and all(item[field] <= given.get(f"{field}Before", 1e11) for field in ("CreationTime", "LastModifiedTime"))
    )


def _destinations(config: Item) -> Item:
    """Where an endpoint of this configuration writes, by field."""
    output = (config.get("AsyncInferenceConfig") or {}).get("OutputConfig") or {}
    given = {**output, **(config.get("DataCaptureConfig") or {})}
    return {field: given[field] for field in ("S3OutputPath", "S3FailurePath", "DestinationS3Uri") if given.get(field)}


def _policy(target: Item, deployment: Item | None) -> Policy:
    return Policy.of(deployment, min(variant.get("InitialInstanceCount", 1) for variant in target["Variants"]))


def _phase(status: str, message: str = "") -> Item:
    return {"Status": status, "StatusMessage": message, "StartTime": time.time()}


def _retaining(target: Item, current: Item, excluded: set[str]) -> Item:
    """The target with the weights, instance counts and captures that are in force."""
    fields = {"DesiredWeight": "InitialVariantWeight", "DesiredInstanceCount": "InitialInstanceCount"}
    kept = [field for kind, field in fields.items() if kind not in excluded]
    before = {variant["VariantName"]: variant for variant in current["Variants"]}
    variants = [
        variant | {field: old[field] for field in kept if field in (old := before.get(variant["VariantName"], {}))}
        for variant in target["Variants"]
    ]
    capture = (target if "DataCaptureConfig" in excluded else current)["DataCaptureConfig"]
    return {**target, "Variants": variants, "DataCaptureConfig": capture}


def _reweighed(variant: Item, wanted: Item) -> Item:
    fields = {"DesiredWeight": "InitialVariantWeight", "DesiredInstanceCount": "InitialInstanceCount"}
    return {**variant, **{field: wanted[name] for name, field in fields.items() if name in wanted}}


def _variant_summary(variant: Item) -> Item:
    weight, count = variant["InitialVariantWeight"], variant.get("InitialInstanceCount", 1)
    summary = {
        "VariantName": variant["VariantName"],
        "DeployedImages": [{"SpecifiedImage": variant["Image"], "ResolvedImage": variant["Image"]}],
        "CurrentWeight": weight,
        "DesiredWeight": weight,
    }
    if serverless := variant.get("ServerlessConfig"):
        return summary | {"CurrentServerlessConfig": serverless, "DesiredServerlessConfig": serverless}
    return summary | {"CurrentInstanceCount": count, "DesiredInstanceCount": count}


def _capture_summary(capture: Item | None) -> Item:
    if not capture:
        return {}
    enabled = capture.get("EnableCapture", True)
    return {
        "DataCaptureConfig": {
            "EnableCapture": enabled,
            "CaptureStatus": "Started" if enabled else "Stopped",
            "CurrentSamplingPercentage": capture["InitialSamplingPercentage"],
            "DestinationS3Uri": capture["DestinationS3Uri"],
            "KmsKeyId": capture.get("KmsKeyId", ""),
        }
    }
