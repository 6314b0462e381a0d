"""CV Factory in Airflow: operators that run ``cvf <stage>``, the drift sensor, links and pages."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath


def run_uri(root: str, dag_id: str, run_id: str) -> str:
    """URI of a DAG run's directory below a project's root: the same for every try of every task of the run.

    Characters that do not belong into a path become ``-``; a short digest then keeps the names apart.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", run_id).lstrip(".")
    if safe != run_id:
        safe = f"{safe[:150]}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"
    return f"{root}/runs/{dag_id}.{safe}"


def stored(uri: str) -> ObjectStoragePath:
    """An object of the storage, ``file://`` or ``s3://``; S3 uses the connection that ``CVF_AWS_CONN_ID`` names."""
    from airflow.sdk import ObjectStoragePath

    path = unquote(uri) if uri.startswith("file://") else uri
    return ObjectStoragePath(path, conn_id=os.environ.get("CVF_AWS_CONN_ID"))
