"""Services beside a run: who is told, where metrics and answers go, and what lets callers into the gateway."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from typing import assert_never

from cv_factory_ops.config import ProjectConfig, home
from cv_factory_ops.config.notifications import EmailNotification, Notification, SlackNotification, WebhookNotification
from cv_factory_ops.config.serving import ApiKeys, JwtAccess, OpenAccess
from cv_factory_ops.doctor.data import reaches, topic
from cv_factory_ops.doctor.findings import Finding, fail, ok, warn


def notifications(config: ProjectConfig) -> Iterator[Finding]:
    """Whether somebody listens where messages go; none is sent."""
    for number, item in enumerate(config.notifications):
        name = f"notifications.{number}"
        place = _place(item)
        if place is None:
            yield fail(name, f"{item.kind}: its address is not set, or is none", "set the variable that url_env names")
        elif reason := reaches(*place):
            yield warn(
                name, f"{item.kind}: {_shown(item)} does not answer ({reason}); nobody would be told", "check the network"
            )
        else:
            yield ok(name, f"{item.kind}: {_shown(item)} answers")


def _place(item: Notification) -> tuple[str, int] | None:
    match item:
        case EmailNotification():
            return item.host, item.port
        case SlackNotification():
            url = os.environ.get(item.url_env, "")
        case WebhookNotification():
            url = item.url or os.environ.get(item.url_env or "", "")
        case _:
            assert_never(item)
    return address(url)


def _shown(item: Notification) -> str:
    """An address from the environment is a secret."""
    match item:
        case EmailNotification():
            return f"{item.host}:{item.port}"
        case WebhookNotification() if item.url:
            return urllib.parse.urlsplit(item.url).hostname or ""
        case SlackNotification() | WebhookNotification():
            return f"the server of {item.url_env}"
        case _:
            assert_never(item)


def address(url: str) -> tuple[str, int] | None:
    """Host and port of an HTTP address; None of anything else."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port and parts.scheme in {"http", "https"} else None


def pushgateway(config: ProjectConfig) -> Iterator[Finding]:
    """Whether the Pushgateway is there; a run goes on without it."""
    if config.pushgateway and (place := address(config.pushgateway.url)):
        shown, reason = f"{place[0]}:{place[1]}", reaches(*place)
        yield warn("pushgateway", f"{shown} does not answer ({reason})", "start it") if reason else ok("pushgateway", shown)


def topics(config: ProjectConfig) -> Iterator[Finding]:
    """Topics that batches and the stream write to and read from."""
    if config.batch.publish:
        yield topic("batch.publish", config.batch.publish)
    if config.stream:
        yield topic("stream.source", config.stream.source)
        yield topic("stream.sink", config.stream.sink)


def gateway(config: ProjectConfig) -> Iterator[Finding]:
    """What lets callers into ``cvf gateway``; no run needs it."""
    match config.gateway.access:
        case ApiKeys(env=str(variable)):
            yield _keys(bool(os.environ.get(variable)), variable)
        case ApiKeys(file=file):
            path = home() / file
            yield _keys(path.is_file() and path.stat().st_size > 0, str(path))
        case JwtAccess(jwks_url=str(url)):
            place = address(url)
            reason = reaches(*place) if place else "it is no address"
            told = f"gateway.access.jwks_url: {place[0] if place else url}"
            yield (
                warn("gateway", f"{told} does not answer ({reason})", "check it")
                if reason
                else ok("gateway", f"{told} answers")
            )
        case JwtAccess():
            return  # its variable is looked at with the others
        case OpenAccess():
            yield warn(
                "gateway", "whoever reaches it may ask", "gateway.access: api_keys or jwt, unless a proxy knows its callers"
            )
        case other:
            assert_never(other)


def _keys(are_there: bool, place: str) -> Finding:
    if are_there:
        return ok("gateway", f"keys are in {place}")
    return warn("gateway", f"{place}: holds no keys; `cvf gateway` does not start", "`cvf gateway-key` makes one")
