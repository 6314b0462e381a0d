"""What Airflow loads by the entry point group ``airflow.plugins``: links, pages and the entry in the navigation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from cv_factory_airflow import projects  # noqa: F401 - the DAG processor loads plugins once, then forks for each DAG file
from cv_factory_airflow.links import PAGES, DriftReportLink, EvidenceLink, MlflowRunLink, page


class Pages:
    """The ASGI application of :mod:`cv_factory_airflow.pages`, imported at its first request.

    Every scheduler, worker and task process loads this plugin; only the API server needs a web framework.
    """

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        from cv_factory_airflow.pages import app

        await app(scope, receive, send)


class CvFactoryPlugin(AirflowPlugin):
    name = "cv_factory"
    operator_extra_links = [MlflowRunLink(), DriftReportLink(), EvidenceLink()]
    fastapi_apps = [{"app": Pages(), "url_prefix": PAGES, "name": "CV Factory"}]
    external_views = [
        {
            "name": "CV Factory decisions",
            "href": page("decisions"),
            "url_route": "cv-factory-decisions",
            "destination": "nav",
            "category": "browse",
        }
    ]
