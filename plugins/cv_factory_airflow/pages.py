"""Pages in Airflow's web UI: the decisions of each project, and the drift reports in the storage.

Both need a logged-in user, who sees the projects whose drift DAG that user may read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse

from cv_factory_airflow import stored
from cv_factory_airflow.links import report_page
from cv_factory_airflow.projects import projects
from cv_factory_ops.config import ProjectConfig

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath

DECISIONS_SHOWN = 20
OWN_ORIGIN = {"Content-Security-Policy": "sandbox allow-scripts allow-popups"}
"""A report brings its own scripts; sandboxed, they reach neither the session nor the API of the person who looks at it."""

app = FastAPI(title="CV Factory", docs_url=None, redoc_url=None, openapi_url=None)


@app.get("/report", response_class=HTMLResponse)
def report(uri: str, user: GetUserDep) -> HTMLResponse:
    """An HTML page that a stage wrote below a project's root."""
    if not any(_is_below(uri, project.root) for project in _readable_projects(user)):
        raise HTTPException(403, "This report belongs to no project that you may read.")
    found = stored(uri)
    if not uri.endswith(".html") or not found.exists():
        raise HTTPException(404, "There is no such report.")
    return HTMLResponse(found.read_bytes(), headers=OWN_ORIGIN)


@app.get("/decisions", response_class=HTMLResponse)
def decisions(user: GetUserDep) -> str:
    """The last decisions of each project, and why they were made."""
    return PAGE.format(body="".join(_section(project) for project in _readable_projects(user)) or "<p>No project yet.</p>")


def _readable_projects(user: BaseUser) -> Iterator[ProjectConfig]:
    for _, project in projects():
        dag = DagDetails(id=f"{project.project}_drift_monitor")
        if get_auth_manager().is_authorized_dag(method="GET", details=dag, user=user):
            yield project


def _is_below(uri: str, root: str) -> bool:
    """Whether a URI names something inside a root, whatever dots, escapes and symbolic links say."""
    parts = unquote(uri).split("/")
    if not uri.startswith(f"{root}/") or ".." in parts or "." in parts:
        return False
    if urlsplit(uri).scheme != "file":
        return True
    path, folder = (Path(unquote(urlsplit(place).path)).resolve() for place in (uri, root))
    return path.is_relative_to(folder)


def _section(project: ProjectConfig) -> str:
    rows = "".join(map(_shown, _last_decisions(project.root)))
    head = "<tr><th>Time (UTC)<th>Drift<th>Asked for by<th>Decision<th>Reason<th>Report</tr>"
    return f"<h2>{escape(project.project)}</h2>" + (f"<table>{head}{rows}</table>" if rows else "<p>None yet.</p>")


def _last_decisions(root: str) -> list[ObjectStoragePath]:
    """Their names begin with the time."""
    folder = stored(f"{root}/decisions")
    return sorted(folder.glob("*.json"), key=lambda file: file.name, reverse=True)[:DECISIONS_SHOWN] if folder.exists() else []


def _shown(file: ObjectStoragePath) -> str:
    try:
        return _row(json.loads(file.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f'<tr><td colspan="6">{escape(file.name)} is not a decision'


def _row(decision: dict[str, Any]) -> str:
    verdict = str(decision.get("verdict", ""))
    report = f"{decision.get('run')}/drift/index.html"
    link = f'<a target="_blank" href="{escape(report_page(report))}">report</a>' if verdict in {"drift", "no drift"} else ""
    asked = decision.get("who") or decision.get("trigger") or ""
    cells = [_minute(decision.get("time")), verdict, asked, _answer(decision)]
    reason = f"<td>{escape(str(decision.get('reason', '')))}{_details(decision)}"
    return "<tr>" + "".join(f"<td>{escape(str(cell))}" for cell in cells) + f"{reason}<td>{link}</tr>"


def _answer(decision: dict[str, Any]) -> str:
    if decision.get("retrain"):
        begin, made = _minute(decision.get("not_before")), _minute(decision.get("time"))
        return f"retrain, not before {begin}" if begin > made else "retrain"
    stopped = decision.get("stopped_by")
    return f"keep the model: {stopped}" if stopped else "keep the model"


def _details(decision: dict[str, Any]) -> str:
    """All triggers and rules with their numbers."""
    triggers = [
        (item["trigger"], "asks" if item["asks"] else "does not ask", item["told"]) for item in decision.get("considered", [])
    ]
    rules = [
        (item["rule"], "allows" if item["allows"] else "does not allow", item["told"]) for item in decision.get("rules", [])
    ]
    lines = "".join(f"<li><b>{escape(name)}</b> {answer}: {escape(told)}" for name, answer, told in triggers + rules)
    run = str(decision.get("retraining") or "").rsplit("/", 1)[-1]
    lines += f"<li>run <code>{escape(run)}</code>" if run else ""
    return f"<details><summary>triggers and rules</summary><ul>{lines}</ul></details>" if lines else ""


def _minute(time: object) -> str:
    return str(time or "")[:16].replace("T", " ")


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>CV Factory decisions</title>
<style>
  :root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }}
  body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
  table {{ border-collapse: collapse; width: 100%; }}
  th, td {{ text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884; }}
  details {{ opacity: .8; }}
  ul {{ margin: .2rem 0; padding-left: 1.2rem; }}
  td:first-child {{ white-space: nowrap; font-variant-numeric: tabular-nums; }}
</style>
<h1>Decisions</h1>
{body}
</html>
"""
