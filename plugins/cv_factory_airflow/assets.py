"""Airflow's assets of a project, for DAGs of others to be scheduled on: ``schedule=champion("demo")``.

Each event says in ``extra`` what it is about; the task's XCom and the storage hold the rest.
"""

from __future__ import annotations

from airflow.sdk import Asset

GROUP = "cv-factory"


def drift_check(project: str) -> Asset:
    """A drift check has ended; ``extra``: ``verdict``, ``requests``, ``bundle_digest``, ``summary``."""
    return Asset(name=f"{project}_drift_check", group=GROUP)


def champion(project: str) -> Asset:
    """The alias ``champion`` has moved; ``extra``: ``model_name``, ``model_version``, ``bundle_digest``, ``summary``."""
    return Asset(name=f"{project}_champion", group=GROUP)
