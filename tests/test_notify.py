"""Notifications, delivered to real HTTP and SMTP servers of this machine."""

from __future__ import annotations

import base64
import email
import hashlib
import hmac
import http.server
import json
import logging
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import policy
from pathlib import Path
from typing import Any

import pytest

from cv_factory_ops import notify
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.notifications import Notification
from cv_factory_ops.drift import report
from cv_factory_ops.records import ApproveRecord, DecideRecord, PromoteRecord, Record, VerifyRecord
from cv_factory_ops.stage import run_stage
from tests.certificates import Certificate
from tests.conftest import TINY
from tests.records import gated, put
from tests.test_decide import checked

SECRET = "T0PSECRET"  # noqa: S105
KEY = b"a key that only both sides know"


@dataclass
class Web:
    """An HTTP server that keeps what it is sent; ``answers`` are its statuses, the last one for ever."""

    answers: list[int] = field(default_factory=lambda: [200])
    hangs: float = 0
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append(({name.lower(): value for name, value in handler.headers.items()}, body))
        time.sleep(self.hangs)
        handler.send_response(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            web.handle(self)

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        web.url = f"http://127.0.0.1:{server.server_address[1]}/services/{SECRET}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield web
        server.shutdown()


@dataclass
class Mail:
    """An SMTP server with STARTTLS (RFC 5321, RFC 3207, RFC 4954) that takes one login; ``busy`` counts refusals to come."""

    context: ssl.SSLContext
    busy: int = 0
    port: int = 0
    messages: list[email.message.EmailMessage] = field(default_factory=list)
    logins: list[tuple[bool, bytes]] = field(default_factory=list)
    """Whether the connection was encrypted, and what was said."""

    def handle(self, handler: socketserver.StreamRequestHandler) -> None:
        reader, writer, encrypted = handler.rfile, handler.wfile, False
        writer.write(b"220 here\r\n")
        while line := reader.readline():
            match line.split()[0].upper():
                case b"EHLO":
                    writer.write(b"250-here\r\n250-AUTH PLAIN\r\n250 STARTTLS\r\n")
                case b"STARTTLS":
                    writer.write(b"220 go ahead\r\n")
                    try:
                        connection = self.context.wrap_socket(handler.request, server_side=True)
                    except (ssl.SSLError, OSError):
                        return
                    reader, writer, encrypted = connection.makefile("rb"), connection.makefile("wb", buffering=0), True
                case b"AUTH":
                    said = base64.b64decode(line.split()[2])
                    self.logins.append((encrypted, said))
                    writer.write(b"235 welcome\r\n" if said == f"\0bot\0{SECRET}".encode() else b"535 who are you\r\n")
                case b"MAIL" if self.busy:
                    self.busy -= 1
                    writer.write(b"451 try again later\r\n")
                case b"DATA":
                    writer.write(b"354 go on\r\n")
                    lines = []
                    while (part := reader.readline()) != b".\r\n":
                        lines.append(part)
                    self.messages.append(email.message_from_bytes(b"".join(lines), policy=policy.default))
                    writer.write(b"250 kept\r\n")
                case b"QUIT":
                    writer.write(b"221 bye\r\n")
                    return
                case _:
                    writer.write(b"250 fine\r\n")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("tls"), "localhost")


@pytest.fixture
def mail(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mail]:
    """It is trusted, as by an administrator who set ``SSL_CERT_FILE``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path, certificate.key)
    mail = Mail(context)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            mail.handle(self)

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
    monkeypatch.setenv("MAIL_PASSWORD", SECRET)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        mail.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield mail
        server.shutdown()


@pytest.fixture(autouse=True)
def environment(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", web.url)
    monkeypatch.setenv("HOOK_KEY", f"whsec_{base64.b64encode(KEY).decode()}")


def project(*notifications: dict[str, Any]) -> ProjectConfig:
    return ProjectConfig.model_validate(TINY | {"notifications": list(notifications)})


def mailed(mail: Mail, **given: Any) -> ProjectConfig:
    usual = {
        "kind": "email",
        "host": "localhost",
        "port": mail.port,
        "sender": "cvf@example.org",
        "recipients": ["a@example.org"],
    }
    return project(usual | {"user": "bot", "password_env": "MAIL_PASSWORD"} | given)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_slack_gets_one_text_with_its_three_escapes(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    record = checked().model_copy(update={"summary": "drift in <score> & more"})
    notify.tell(project({"kind": "slack", "url_env": "HOOK"}), "file:///runs/1", record)
    ((headers, body),) = web.requests
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"text": "*tiny: drift*\ndrift in &lt;score&gt; &amp; more\nfile:///runs/1"}
    assert warnings_of(caplog) == []
    assert SECRET not in caplog.text, "an address that is a secret is in no log"


def test_words_from_headers_are_in_no_message() -> None:
    drifted = {"score @ model_name=Mrs Smith": 1e-9, "score @ sex=F": 1e-8, "metadata_view=Smith": 1e-7, "kvp_missing": 1e-6}
    assert report._first(drifted) == "score p=1e-09, metadata_view p=1e-07, kvp_missing p=1e-06"
    assert report._first(dict.fromkeys("abcd", 0.001)).endswith("c p=0.001, ...")


def test_a_webhook_is_signed_and_names_each_message(web: Web) -> None:
    notify.tell(project({"kind": "webhook", "url_env": "HOOK", "secret_env": "HOOK_KEY"}), "file:///runs/1", checked())
    ((headers, body),) = web.requests
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body.decode()}".encode()
    expected = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    told = json.loads(body)
    assert (told["type"], told["data"]) == (
        "drift",
        {"project": "tiny", "summary": checked().summary, "run": "file:///runs/1"},
    )


def test_a_mail_is_encrypted_before_the_password_is_said(mail: Mail) -> None:
    notify.tell(mailed(mail), "file:///runs/1", checked())
    assert mail.logins == [(True, f"\0bot\0{SECRET}".encode())]
    (message,) = mail.messages
    assert (message["Subject"], message["To"], message["From"]) == ("tiny: drift", "a@example.org", "cvf@example.org")
    assert checked().summary in message.get_content()
    assert "Message-ID" in message


def test_a_busy_server_is_asked_again_with_the_same_message(web: Web, mail: Mail, caplog: pytest.LogCaptureFixture) -> None:
    web.answers, mail.busy = [503, 429, 200], 1
    notify.tell(project({"kind": "webhook", "url_env": "HOOK"}), "file:///runs/1", checked())
    notify.tell(mailed(mail), "file:///runs/1", checked())
    assert len({headers["webhook-id"] for headers, _ in web.requests}) == 1
    assert (len(web.requests), len(mail.messages)) == (3, 1)
    assert warnings_of(caplog) == []


def test_what_cannot_be_delivered_is_one_warning_without_a_secret(
    web: Web, mail: Mail, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    web.answers = [404]
    monkeypatch.setenv("MAIL_PASSWORD", "wrong")
    monkeypatch.setenv("BAD_KEY", "a key")
    (wrong_login,) = mailed(mail).notifications
    config = project(
        {"kind": "slack", "url_env": "HOOK"},
        {"kind": "slack", "url_env": "NOT_SET"},
        {"kind": "webhook", "url": "http://127.0.0.1:9/none"},
        {"kind": "webhook", "url_env": "HOOK", "secret_env": "BAD_KEY"},
        wrong_login.model_dump(),
    )
    notify.tell(config, "file:///runs/1", checked())
    assert len(web.requests) == 1, "404 is not asked again"
    assert warnings_of(caplog) == [
        "drift: not everybody was told: notifications.0 (slack): answered 404; "
        "notifications.1 (slack): NOT_SET: this environment variable is not set; "
        "notifications.2 (webhook): ConnectError; "
        "notifications.3 (webhook): BAD_KEY: is not whsec_ and a key in Base64; "
        "notifications.4 (email): answered 535"
    ]
    assert SECRET not in caplog.text


def test_a_server_that_is_not_trusted_gets_no_password(
    mail: Mail, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    notify.tell(mailed(mail), "file:///runs/1", checked())
    assert mail.logins == []
    assert warnings_of(caplog) == ["drift: not everybody was told: notifications.0 (email): SSLCertVerificationError"]


def test_a_server_that_hangs_is_left_behind(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    web.hangs = 2
    monkeypatch.setattr(notify, "PATIENCE", 0.2)
    notify.tell(project({"kind": "slack", "url_env": "HOOK"}), "file:///runs/1", checked())
    assert warnings_of(caplog) == ["drift: not everybody was told: notifications.0 (slack): not done within 0.2 s"]


def approval(approved: bool) -> Record:
    given = {"who": "mara", "time": datetime.now(UTC), "note": "", "bundle_digest": "", "gate_digest": ""}
    return ApproveRecord(summary="", approved=approved, **given)


DECIDED = DecideRecord(summary="", retrain=False, reason="", decision="", trigger="drift")
PROMOTED = PromoteRecord(summary="", model_name="", model_version=2, previous_version=1, bundle_digest="")


@pytest.mark.parametrize(
    ("record", "rolled_back", "event"),
    [
        (checked(), False, "drift"),
        (checked("no drift"), False, None),
        (DECIDED, False, "decision"),
        (DECIDED.model_copy(update={"trigger": ""}), False, None),
        (gated(("auc is low",)), False, "refusal"),
        (gated(()), False, None),
        (approval(False), False, "refusal"),
        (approval(True), False, None),
        (PROMOTED, False, "promotion"),
        (PROMOTED, True, "rollback"),
        (VerifyRecord(summary="", endpoint_name="", endpoint_config_name="", status="", bundle_digest=""), False, None),
    ],
)
def test_what_is_news(record: Record, rolled_back: bool, event: str | None) -> None:
    assert notify.event_of(record, rolled_back=rolled_back) == event


def test_only_the_chosen_events_are_told(web: Web) -> None:
    config = project({"kind": "slack", "url_env": "HOOK", "events": ["promotion"]})
    notify.tell(config, "file:///runs/1", checked())
    assert web.requests == []
    notify.tell(config, "file:///runs/1", PROMOTED)
    assert len(web.requests) == 1


def test_a_stage_tells_once_what_it_has_found_and_ends_as_before(web: Web, home: Path) -> None:
    web.answers = [400]
    config, run = project({"kind": "webhook", "url_env": "HOOK"}), (home / "run").as_uri()
    put(run, checked())
    first, second = (run_stage("decide", config, run) for _ in range(2))
    assert first == second
    ((_, body),) = web.requests
    assert json.loads(body)["data"]["summary"] == first.record["summary"]


def test_wrong_settings_are_named() -> None:
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[Notification] = TypeAdapter(Notification)
    mail = {"kind": "email", "host": "h", "sender": "a", "recipients": ["b"]}
    for wrong, why in (
        ({"kind": "webhook"}, "one of url and url_env"),
        ({"kind": "webhook", "url": "https://me:word@example.org"}, "a url without a password"),
        (mail | {"user": "me"}, "both user and password_env"),
        (mail | {"user": "me", "password_env": "P", "starttls": False}, "starttls: true where there is a password"),
    ):
        with pytest.raises(ValidationError, match=why):
            adapter.validate_python(wrong)
