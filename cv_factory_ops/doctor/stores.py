"""Where a run keeps its files and its model versions: the storage root and MLflow, tried as a run will use them."""

from __future__ import annotations

import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

from cv_factory_ops import registry
from cv_factory_ops import storage as files
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.doctor.findings import QUESTION_SECONDS, Finding, fail, ok, warn
from cv_factory_ops.errors import CvFactoryError

TAG = "cvf.doctor"
"""Tag that is set to find out whether this account may write."""


def storage(config: ProjectConfig) -> Iterator[Finding]:
    """Write, read, create once, replace and delete an object below the project's root."""
    folder = f"{config.root}/doctor-{uuid.uuid4().hex}"
    probe = f"{folder}/probe"
    try:
        files.write_bytes(probe, b"one")
        if files.read_bytes(probe) != b"one":
            yield fail("storage.write", f"{config.storage_uri}: what is read is not what was written", "use another store")
            return
        yield ok("storage.write", f"{config.storage_uri}: an object was written and read back")
        yield _created_once(probe)
        yield _replaced_as_expected(probe)
        files.delete_tree(folder)
        yield _deleted(probe)
    finally:
        with suppress(CvFactoryError):
            files.delete_tree(folder)


def _created_once(probe: str) -> Finding:
    if files.create_bytes(probe, b"two") or files.read_bytes(probe) != b"one":
        found = "an object that was there was written over: If-None-Match is not heeded, two runs could lose each other's work"
        return fail("storage.create", found, "use a store with conditional writes, see docs/compose.md")
    return ok("storage.create", "of two writers only the first one creates an object")


def _replaced_as_expected(probe: str) -> Finding:
    if files.path_of(probe) is None and (code := _answer_to_stale_etag(probe)) not in {"PreconditionFailed", "412"}:
        found = "an object was replaced by one who had not seen its last change: If-Match is not heeded"
        found = f"a conditional write (If-Match) was answered with {code}" if code else found
        return fail("storage.replace", found, "use a store with conditional writes, see docs/compose.md")
    if files.replace_bytes(probe, b"other", b"three") or not files.replace_bytes(probe, b"one", b"three"):
        return fail("storage.replace", "an object is not replaced as it should be", "use another store")
    return ok("storage.replace", "an object is only replaced by who has seen its last change")


def _answer_to_stale_etag(probe: str) -> str:
    """The store's error code, empty where it writes: ours, asked politely, compares itself first."""
    import boto3
    from botocore.exceptions import ClientError

    bucket, _, key = probe.removeprefix("s3://").partition("/")
    try:
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"one", IfMatch=f'"{"0" * 32}"')
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def _deleted(probe: str) -> Finding:
    if files.exists(probe):
        return fail("storage.delete", "an object is still there after it was deleted", "allow s3:DeleteObject")
    return ok("storage.delete", "the object is gone again")


def mlflow(config: ProjectConfig) -> Iterator[Finding]:
    """The tracking server, its version, and whether this account may write where a run will."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(QUESTION_SECONDS)))
    client = registry.connect(config)
    shown = re.sub("://[^/]*@", "://", client.tracking_uri)
    yield ok("mlflow.reach", f"{shown} answers")
    if client.tracking_uri.startswith("http"):
        yield _version(client.tracking_uri)
    with registry.explained(f"experiment {config.project}"):
        experiment = client.get_experiment(registry.experiment(client, config))
        client.set_experiment_tag(experiment.experiment_id, TAG, datetime.now(UTC).isoformat())
    yield ok("mlflow.write", f"experiment {config.project} takes what is written")
    yield _artifacts(client.tracking_uri, experiment.artifact_location)
    with registry.explained(f"model {config.project}"):
        known = client.search_registered_models(f"name = '{config.project}'")
        if known:
            client.set_registered_model_tag(config.project, TAG, datetime.now(UTC).isoformat())
    yield ok("mlflow.model", f"model {config.project} {'takes what is written' if known else 'is not there yet'}")


def _version(uri: str) -> Finding:
    """Server and client of one major version understand each other; MLflow promises no more."""
    import httpx
    from mlflow import __version__ as ours

    login = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/version", auth=login if login[0] else None, timeout=QUESTION_SECONDS)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return warn("mlflow.version", f"cannot be told: {type(error).__name__}")
    theirs = answer.text.strip()
    told = f"server {theirs[:20]}, client {ours}"
    if theirs.split(".")[0] != ours.split(".")[0]:
        return fail("mlflow.version", told, f"a server of MLflow {ours.split('.')[0]}")
    return (
        ok("mlflow.version", told)
        if theirs.split(".")[:2] == ours.split(".")[:2]
        else warn("mlflow.version", told, "the same minor version")
    )


def _artifacts(tracking_uri: str, location: str) -> Finding:
    """A server that hands out a path of its own disk has each client write to the path of that name on the client's disk."""
    server, place = urllib.parse.urlsplit(tracking_uri), urllib.parse.urlsplit(location)
    if not server.scheme.startswith("http") or place.scheme not in {"", "file"}:
        return ok("mlflow.artifacts", f"files go to {location}")
    told = f"the experiment keeps its files at {location}, a path that only the server has"
    kind = warn if server.hostname in {"127.0.0.1", "localhost", "::1"} else fail
    return kind("mlflow.artifacts", told, "start the server with --artifacts-destination, and take a new experiment")
