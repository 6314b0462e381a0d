"""The operations of SageMaker's control plane that a deployment needs, over a state directory that survives kill -9.

Requests and answers have the shapes of https://docs.aws.amazon.com/sagemaker/latest/APIReference/. An endpoint keeps a
snapshot of what it serves, so that deleting a model or an endpoint configuration in use does not touch it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.deploy.variants import Fleet, NotHealthy

log = logging.getLogger("cvf")

REGION, ACCOUNT = "us-east-1", "000000000000"
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
IN_PROGRESS = frozenset({"Creating", "Updating", "RollingBack", "SystemUpdating", "Deleting"})
Item = dict[str, Any]


class ServiceError(Exception):
    """An error in the form that AWS clients parse."""

    def __init__(self, message: str, code: str = "ValidationException", status: int = 400, details: Item | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.details = code, status, details or {}


class Shelf:
    """The resources of one kind: a JSON file each, written atomically."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder / kind, kind
        self._items: dict[str, Item] = {path.stem: json.loads(path.read_bytes()) for path in self._folder.glob("*.json")}

    def __iter__(self) -> Iterator[Item]:
        return iter(list(self._items.values()))

    def arn(self, name: str) -> str:
        return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{self._kind}/{name}"

    def get(self, name: str) -> Item:
        if name not in self._items:
            raise ServiceError(f'Could not find {self._title} "{self.arn(name)}".')
        return self._items[name]

    def add(self, name: str, item: Item) -> str:
        """Store a new resource; returns its ARN."""
        if not NAME.fullmatch(name):
            raise ServiceError(f"Value {name[:80]!r} at '{self._kind}Name' must satisfy regular expression {NAME.pattern}")
        if name in self._items:
            raise ServiceError(f'Cannot create already existing {self._title} "{self.arn(name)}".')
        self.save(name, {**item, "CreationTime": time.time()})
        return self.arn(name)

    def save(self, name: str, item: Item) -> None:
        storage.write_bytes((self._folder / f"{name}.json").resolve().as_uri(), json.dumps(item, indent=2).encode())
        self._items[name] = item

    def remove(self, name: str) -> None:
        self.get(name)
        (self._folder / f"{name}.json").unlink(missing_ok=True)
        del self._items[name]

    @property
    def _title(self) -> str:
        return {"endpoint-config": "endpoint configuration"}.get(self._kind, self._kind)


class ControlPlane:
    """Models, endpoint configurations and endpoints, with the processes that serve them.

    Every change runs on the event loop without awaiting in between, so requests do not need locks.
    """

    def __init__(self, state: Path) -> None:
        self._processes = state / "processes"
        shutil.rmtree(self._processes, ignore_errors=True)
        self.models, self.configs, self.endpoints = (Shelf(state, kind) for kind in ("model", "endpoint-config", "endpoint"))
        self.fleets: dict[str, Fleet] = {}
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
        await asyncio.gather(*(fleet.stop() for fleet in self.fleets.values()))

    async def fleet(self, name: str) -> Fleet | None:
        """What serves an endpoint, once it is back after a restart; None where nothing does."""
        while name in self._tasks and self.endpoints.get(name)["EndpointStatus"] == "SystemUpdating":
            await asyncio.sleep(0.05)
        return self.fleets.get(name)

    # ---- models and endpoint configurations -----------------------------------------------------------------------------

    async def _create_model(self, given: Item) -> Item:
        name = _required(given, "ModelName")
        _required(given.get("PrimaryContainer") or {}, "ModelDataUrl")
        return {"ModelArn": self.models.add(name, given)}

    async def _describe_model(self, given: Item) -> Item:
        item = self.models.get(_required(given, "ModelName"))
        return {**_without(item, "Tags"), "ModelArn": self.models.arn(item["ModelName"])}

    async def _delete_model(self, given: Item) -> Item:
        self.models.remove(_required(given, "ModelName"))
        return {}

    async def _create_endpoint_config(self, given: Item) -> Item:
        name = _required(given, "EndpointConfigName")
        variants = [{"InitialVariantWeight": 1.0, **variant} for variant in _required(given, "ProductionVariants")]
        for variant in variants:
            self.models.get(_required(variant, "ModelName"))
        return {"EndpointConfigArn": self.configs.add(name, {**given, "ProductionVariants": variants})}

    async def _describe_endpoint_config(self, given: Item) -> Item:
        item = self.configs.get(_required(given, "EndpointConfigName"))
        return {**_without(item, "Tags"), "EndpointConfigArn": self.configs.arn(item["EndpointConfigName"])}

    async def _delete_endpoint_config(self, given: Item) -> Item:
        self.configs.remove(_required(given, "EndpointConfigName"))
        return {}

    # ---- endpoints ------------------------------------------------------------------------------------------------------

    async def _create_endpoint(self, given: Item) -> Item:
        name = _required(given, "EndpointName")
        target = self._snapshot(_required(given, "EndpointConfigName"))
        item = {"EndpointName": name, "EndpointStatus": "Creating", "FailureReason": None, "Current": None, "Target": target}
        arn = self.endpoints.add(name, {**item, "Tags": given.get("Tags", []), "LastModifiedTime": time.time()})
        self._start(name, self._roll_out(name))
        return {"EndpointArn": arn}

    async def _update_endpoint(self, given: Item) -> Item:
        name = _required(given, "EndpointName")
        self._require_settled(name)
        if self.endpoints.get(name)["EndpointStatus"] == "Failed":
            raise ServiceError(f'Cannot update failed endpoint "{self.endpoints.arn(name)}".')
        target = self._snapshot(_required(given, "EndpointConfigName"))
        self._set(name, EndpointStatus="Updating", Target=target, FailureReason=None)
        self._start(name, self._roll_out(name))
        return {"EndpointArn": self.endpoints.arn(name)}

    async def _describe_endpoint(self, given: Item) -> Item:
        item = self.endpoints.get(_required(given, "EndpointName"))
        shown = item["Current"] or item["Target"] or item["Failed"]
        answer = {
            **_without(item, "Tags", "Current", "Target", "Failed", "FailureReason"),
            "EndpointArn": self.endpoints.arn(item["EndpointName"]),
            "EndpointConfigName": shown["EndpointConfigName"],
        }
        if item["FailureReason"]:
            answer["FailureReason"] = item["FailureReason"]
        if item["Current"]:
            answer["ProductionVariants"] = [_variant_summary(variant) for variant in shown["Variants"]]
            answer |= _capture_summary(shown["DataCaptureConfig"])
        if target := item["Target"]:
            variants = [{"VariantName": variant["VariantName"]} for variant in target["Variants"]]
            pending = {"EndpointConfigName": target["EndpointConfigName"], "ProductionVariants": variants}
            answer["PendingDeploymentSummary"] = {**pending, "StartTime": item["LastModifiedTime"]}
        return answer

    async def _delete_endpoint(self, given: Item) -> Item:
        name = _required(given, "EndpointName")
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
        shelf, name = self._by_arn(_required(given, "ResourceArn"))
        return {"Tags": shelf.get(name).get("Tags", [])}

    async def _add_tags(self, given: Item) -> Item:
        shelf, name = self._by_arn(_required(given, "ResourceArn"))
        item = shelf.get(name)
        merged = {tag["Key"]: tag["Value"] for tag in (*item.get("Tags", []), *_required(given, "Tags"))}
        tags = [{"Key": key, "Value": value} for key, value in merged.items()]
        shelf.save(name, {**item, "Tags": tags})
        return {"Tags": tags}

    # ---- rollouts -------------------------------------------------------------------------------------------------------

    async def _roll_out(self, name: str) -> None:
        """Start the target's processes; shift the traffic when they are healthy, or go back when they are not."""
        target = self.endpoints.get(name)["Target"]
        fleet = Fleet(target, self._processes)
        try:
            await fleet.start()
        except (NotHealthy, OSError) as error:
            await self._go_back(name, fleet, str(error))
            return
        self._set(name, EndpointStatus="InService", Current=target, Target=None)
        replaced, self.fleets[name] = self.fleets.get(name), fleet
        log.info("endpoint %s: serves %s", name, target["EndpointConfigName"])
        if replaced:
            drain = asyncio.create_task(replaced.drain())
            self._drains.add(drain)
            drain.add_done_callback(self._drains.discard)

    async def _go_back(self, name: str, fleet: Fleet, reason: str) -> None:
        log.warning("endpoint %s: %s", name, reason)
        item = self.endpoints.get(name)
        if item["Current"]:
            self._set(name, EndpointStatus="RollingBack")
        await fleet.stop()
        status = "InService" if item["Current"] else "Failed"
        self._set(name, EndpointStatus=status, Target=None, Failed=item["Target"], FailureReason=reason[:1024])

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
            self.fleets[name] = fleet
            self._set(name, EndpointStatus="Updating" if item["Target"] else "InService")
        if item["Target"]:
            await self._roll_out(name)

    async def _take_down(self, name: str) -> None:
        if fleet := self.fleets.pop(name, None):
            await fleet.drain()
        self.endpoints.remove(name)

    def _start(self, name: str, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._tasks.pop(name) if self._tasks.get(name) is done else None)

    def _set(self, name: str, **changes: Any) -> None:
        self.endpoints.save(name, {**self.endpoints.get(name), **changes, "LastModifiedTime": time.time()})

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
        return {"EndpointConfigName": config_name, "Variants": variants, "DataCaptureConfig": config.get("DataCaptureConfig")}

    def _by_arn(self, arn: str) -> tuple[Shelf, str]:
        kind, _, name = arn.rpartition(":")[2].partition("/")
        shelves = {"model": self.models, "endpoint-config": self.configs, "endpoint": self.endpoints}
        if kind not in shelves:
            raise ServiceError(f"Value {arn[:200]!r} at 'resourceArn' is not a model, endpoint-config or endpoint")
        return shelves[kind], name


def _required(given: Item, field: str) -> Any:
    if not given.get(field):
        raise ServiceError(f"1 validation error detected: Value null at '{field}' failed: Member must not be null")
    return given[field]


def _without(item: Item, *fields: str) -> Item:
    return {name: value for name, value in item.items() if name not in fields}


def _wanted(item: Item, given: Item) -> bool:
    return (
        given.get("NameContains", "") in item["EndpointName"]
        and given.get("StatusEquals", item["EndpointStatus"]) == item["EndpointStatus"]
        and all(item[field] >= given.get(f"{field}After", 0) for field in ("CreationTime", "LastModifiedTime"))
        and all(item[field] <= given.get(f"{field}Before", 1e11) for field in ("CreationTime", "LastModifiedTime"))
    )


def _variant_summary(variant: Item) -> Item:
    weight, count = variant["InitialVariantWeight"], variant.get("InitialInstanceCount", 1)
    return {
        "VariantName": variant["VariantName"],
        "DeployedImages": [{"SpecifiedImage": variant["Image"], "ResolvedImage": variant["Image"]}],
        "CurrentWeight": weight,
        "DesiredWeight": weight,
        "CurrentInstanceCount": count,
        "DesiredInstanceCount": count,
    }


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
