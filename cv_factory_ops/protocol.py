"""What a run was made with: settings, their schema and the software, kept in the run by the stages that train and that judge.

Evidence may be collected much later, by another command and on another machine, where all three are others.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig

FOLDER, SETTINGS, SCHEMA, SOFTWARE = "protocol", "config.yaml", "schema.json", "environment.txt"
JUDGED_BY = ("evaluation", "gate")
"""Sections that the gate decides with, which may be run again with others than the training was."""


def keep(config: ProjectConfig, folder: Path) -> None:
    """Write the three files: all settings with their defaults, the schema that they were checked against, what is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(without_logins(config.model_dump(mode="json")), folder)
    (folder / SCHEMA).write_text(json.dumps(ProjectConfig.model_json_schema(), indent=1, sort_keys=True) + "\n")
    installed = sorted({f"{item.name}=={item.version}" for item in distributions()}, key=str.lower)
    (folder / SOFTWARE).write_text("".join(f"{line}\n" for line in installed))


def fetch(run: str, config: ProjectConfig, folder: Path) -> dict[str, Any]:
    """Write the three files as a run has kept them, or, of a run older than that, as they are now; returns its settings."""
    keep(config, folder)
    kept = next((place for place in _places(run) if storage.exists(f"{place}/{SETTINGS}")), None)
    if kept is None:
        return without_logins(config.model_dump(mode="json"))
    for name in (SCHEMA, SOFTWARE):
        (folder / name).write_bytes(storage.read_bytes(f"{kept}/{name}"))
    found = settings_of(run)
    _write_settings(found, folder)
    return found


def settings_of(run: str) -> dict[str, Any]:
    """The settings that a run was trained with and judged by, as they were written; empty where they were not kept."""
    trained, judged = (_read(f"{place}/{SETTINGS}") for place in _places(run))
    return (trained or judged) | {name: judged[name] for name in JUDGED_BY if name in judged}


def without_logins(tree: dict[str, Any]) -> dict[str, Any]:
    """Without what stands before the host in addresses, which may be a password."""
    text = re.sub(r"://[^/@\s\"]+@", "://***@", json.dumps(tree))
    return dict(json.loads(text))


def _places(run: str) -> tuple[str, str]:
    return f"{run}/train/{FOLDER}", f"{run}/gate/{FOLDER}"


def _read(uri: str) -> dict[str, Any]:
    return dict(yaml.safe_load(storage.read_bytes(uri))) if storage.exists(uri) else {}


def _write_settings(settings: dict[str, Any], folder: Path) -> None:
    (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
