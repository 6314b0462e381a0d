"""All checks of a project, in the order in which a run needs them."""

from __future__ import annotations

from collections.abc import Iterator

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.doctor import cluster, data, endpoint, machine, services, stores
from cv_factory_ops.doctor.findings import Check, Finding, carried_out


def checks(config: ProjectConfig) -> list[Check]:
    """What a run of this project needs, derived from its settings."""
    return [
        Check("domain", machine.domain, "pip install the package of that domain"),
        Check("software", machine.software),
        Check("processors", machine.processors),
        Check("memory", machine.memory),
        Check("disk", machine.disk),
        Check("environment", machine.environment),
        Check("storage", stores.storage, "check storage, CVF_STORAGE and the credentials"),
        Check("mlflow", stores.mlflow, "check mlflow.tracking_uri, MLFLOW_TRACKING_URI and the login"),
        Check("source", data.source, "check data.source"),
        Check("labels", data.labels, "check data.source.labels"),
        Check("weights", data.weights, "check the weights' path"),
        *cluster.checks(config),
        *endpoint.checks(config),
        Check("topics", services.topics, "check the topics of batch and stream"),
        Check("notifications", services.notifications),
        Check("pushgateway", services.pushgateway),
        Check("gateway", services.gateway),
    ]


def examine(config: ProjectConfig) -> Iterator[Finding]:
    """The findings of all checks, one after the other, as they are made."""
    for check in checks(config):
        yield from carried_out(check, config)
