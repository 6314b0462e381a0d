"""Telling people and programs what stages found: a message to Slack, an e-mail, a signed webhook.

A stage is done before anybody is told, and is never failed or held up by it: what is not delivered within :data:`PATIENCE`
seconds is given up with one warning. Messages hold a record's summary: no word from the header of an image, and of people only
who asked for a retraining or answered an approval, not what they wrote. Addresses and keys that are secret come from the
environment and appear in no message and no log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from functools import partial
from typing import assert_never

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.notifications import (
    EmailNotification,
    Notification,
    NotificationEvent,
    SlackNotification,
    WebhookNotification,
)
from cv_factory_ops.records import ApproveRecord, DecideRecord, DriftRecord, Frozen, GateRecord, PromoteRecord, Record

log = logging.getLogger("cvf")

PATIENCE = 20.0
"""Seconds in which all messages of a record are delivered, or given up."""
TRY_SECONDS = 5.0
"""Time of one try without a word from the other side."""
ATTEMPTS = 4


class Message(Frozen):
    """What is told."""

    id: str
    """The same for the same news of a run, so that a receiver can tell a repetition."""
    time: datetime
    """UTC."""
    event: NotificationEvent
    project: str
    summary: str
    """The record's one line."""
    run: str
    """URI of the run."""

    @property
    def title(self) -> str:
        return f"{self.project}: {self.event}"


class NotDelivered(Exception):
    """Why; without a word of the other side's, and without its address."""


class _TryAgain(NotDelivered):
    """Another try may succeed."""


def tell(config: ProjectConfig, run: str, record: Record, *, rolled_back: bool = False) -> None:
    """Tell everybody who is configured for what a stage has found."""
    event = event_of(record, rolled_back=rolled_back)
    wanted = [(number, item) for number, item in enumerate(config.notifications) if event in item.events]
    if event is None or not wanted:
        return
    message = Message(
        id=f"msg_{hashlib.sha256(f'{run} {event} {record.summary}'.encode()).hexdigest()[:32]}",
        time=datetime.now(UTC),
        event=event,
        project=config.project,
        summary=record.summary,
        run=run,
    )
    jobs = {f"notifications.{number} ({item.kind})": partial(deliver, item, message) for number, item in wanted}
    if failed := failures(jobs, PATIENCE):
        log.warning("%s: not everybody was told: %s", event, "; ".join(f"{name}: {why}" for name, why in failed.items()))


def event_of(record: Record, *, rolled_back: bool = False) -> NotificationEvent | None:
    """What a record is news of; None where it is none."""
    match record:
        case DriftRecord(verdict="drift"):
            return "drift"
        case DecideRecord() if record.trigger:
            return "decision"
        case GateRecord() | ApproveRecord() if record.refusal:
            return "refusal"
        case PromoteRecord():
            return "rollback" if rolled_back else "promotion"
        case _:
            return None


def failures(jobs: Mapping[str, Callable[[], None]], seconds: float) -> dict[str, str]:
    """Do jobs side by side for so long at most; returns why which of them failed. One that hangs is left behind."""
    outcome = dict.fromkeys(jobs, f"not done within {seconds:g} s")
    threads = [threading.Thread(target=_noted, args=(outcome, name, job), name=name, daemon=True) for name, job in jobs.items()]
    ends = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    return {name: why for name, why in dict(outcome).items() if why}


def _noted(outcome: dict[str, str], name: str, job: Callable[[], None]) -> None:
    try:
        job()
        outcome[name] = ""
    except NotDelivered as error:
        outcome[name] = str(error)
    except Exception as error:  # whatever a client raises: its words may quote an address
        outcome[name] = type(error).__name__


def deliver(config: Notification, message: Message) -> None:
    """Deliver a message, by several tries with growing pauses.

    Raises:
        NotDelivered: it was not.
    """
    match config:
        case SlackNotification():
            send = partial(_post, environment(config.url_env), json.dumps({"text": _slack_text(message)}).encode(), {})
        case WebhookNotification():
            url = config.url or environment(config.url_env or "")
            send = partial(_post, url, *_signed(message, config.secret_env))
        case EmailNotification():
            send = partial(_mail, config, message)
        case _:
            assert_never(config)
    tries = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, min=0.2, max=5),
        retry=retry_if_exception_type(_TryAgain),
        reraise=True,
    )
    tries(send)


def _post(url: str, body: bytes, headers: Mapping[str, str]) -> None:
    import httpx

    for logger in ("httpx", "httpcore"):  # they quote addresses, which may be secrets
        logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
    try:
        answer = httpx.post(url, content=body, headers={"Content-Type": "application/json", **headers}, timeout=TRY_SECONDS)
    except httpx.TransportError as error:
        raise _TryAgain(type(error).__name__) from None
    if answer.status_code >= 500 or answer.status_code in {408, 425, 429}:
        raise _TryAgain(f"answered {answer.status_code}")
    if not answer.is_success:
        raise NotDelivered(f"answered {answer.status_code}")


def _slack_text(message: Message) -> str:
    """Slack's own three escapes (https://docs.slack.dev/messaging/formatting-message-text)."""
    told = f"*{message.title}*\n{message.summary}\n{message.run}"
    return told.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _signed(message: Message, secret_env: str | None) -> tuple[bytes, dict[str, str]]:
    """Body and headers: HMAC-SHA256 over ``id.timestamp.body`` (Standard Webhooks 1.0)."""
    data = message.model_dump(mode="json", include={"project", "summary", "run"})
    body = json.dumps({"type": message.event, "timestamp": message.time.isoformat(), "data": data}).encode()
    seconds = str(int(message.time.timestamp()))
    headers = {"webhook-id": message.id, "webhook-timestamp": seconds}
    if secret_env:
        try:
            key = base64.b64decode(environment(secret_env).removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise NotDelivered(f"{secret_env}: is not whsec_ and a key in Base64") from None
        signature = hmac.new(key, f"{message.id}.{seconds}.".encode() + body, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(signature).decode()}"
    return body, headers


def _mail(config: EmailNotification, message: Message) -> None:
    mail = EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = message.title, config.sender, ", ".join(config.recipients)
    mail["Date"], mail["Message-ID"] = format_datetime(message.time), f"<{message.id}@{socket.gethostname()}>"
    mail.set_content(f"{message.summary}\n\n{message.run}\n")
    try:
        with smtplib.SMTP(config.host, config.port, local_hostname=socket.gethostname(), timeout=TRY_SECONDS) as server:
            if config.starttls:
                server.starttls(context=ssl.create_default_context())
            if config.user and config.password_env:
                server.login(config.user, environment(config.password_env))
            server.send_message(mail)
    except smtplib.SMTPResponseException as error:
        kind = _TryAgain if 400 <= error.smtp_code < 500 else NotDelivered  # RFC 5321 section 4.2.1
        raise kind(f"answered {error.smtp_code}") from None
    except (smtplib.SMTPNotSupportedError, smtplib.SMTPRecipientsRefused, ssl.SSLCertVerificationError) as error:
        raise NotDelivered(type(error).__name__) from None
    except (smtplib.SMTPException, OSError) as error:
        raise _TryAgain(type(error).__name__) from None


def environment(name: str) -> str:
    if value := os.environ.get(name):
        return value
    raise NotDelivered(f"{name}: this environment variable is not set")
