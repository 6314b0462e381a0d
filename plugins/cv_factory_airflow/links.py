"""Buttons on a task's page: the MLflow run, the drift report, the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin

from airflow.sdk import BaseOperatorLink, conf

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

PAGES = "/cv-factory"
"""Where the pages of this plugin are mounted in the API server."""


class MlflowRunLink(BaseOperatorLink):
    """The page of the MLflow run that the stage's record names."""

    name = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        url: str = _record(ti_key).get("links", {}).get("mlflow", "")
        return url


class DriftReportLink(BaseOperatorLink):
    """The page of the window, with Evidently's report behind it; none where the window was too small for one."""

    name = "Drift report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        report = _record(ti_key).get("report")
        return report_page(report) if report else ""


class EvidenceLink(BaseOperatorLink):
    """The first page of the evidence bundle."""

    name = "Evidence"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        index = _record(ti_key).get("links", {}).get("evidence")
        return report_page(index) if index else ""


def page(path: str) -> str:
    """Address of a page of this plugin, below the API server's own address."""
    return urljoin(conf.get("api", "base_url", fallback="/").rstrip("/") + "/", f"{PAGES.lstrip('/')}/{path}")


def report_page(uri: str) -> str:
    """Address of the page that shows a report of the storage."""
    return page(f"report?uri={quote(uri, safe='')}")


def _record(ti_key: TaskInstanceKey) -> dict[str, Any]:
    """The record that the task returned; empty where it has not succeeded."""
    from airflow.sdk.execution_time.xcom import XCom

    record: dict[str, Any] | None = XCom.get_value(ti_key=ti_key, key="return_value")
    return record or {}
