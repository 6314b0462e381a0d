"""Who is told of what: ``notifications``, ``pushgateway``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cv_factory_ops.config.values import SECRET_VALUE
from cv_factory_ops.records import Frozen

NotificationEvent = Literal["drift", "decision", "promotion", "refusal", "rollback"]
EVENTS: list[NotificationEvent] = ["drift", "decision", "promotion", "refusal", "rollback"]


class _Notification(Frozen):
    """What all have in common."""

    events: list[NotificationEvent] = EVENTS
    """What is told: a check found ``drift``; a ``decision`` that something asked for, also a no; a ``promotion``; the
    ``refusal`` of a challenger; a ``rollback``."""


class SlackNotification(_Notification):
    """A message to an incoming webhook of Slack, or of what takes the same (Mattermost, Rocket.Chat)."""

    kind: Literal["slack"] = "slack"
    url_env: str
    """Environment variable with the webhook's address, which is its secret."""


class EmailNotification(_Notification):
    """A message by SMTP, encrypted by STARTTLS (RFC 3207)."""

    kind: Literal["email"] = "email"
    host: str
    """Mail server that takes messages for others."""
    port: int = Field(default=587, ge=1, le=65535)
    """By default that of message submission (RFC 6409)."""
    sender: str
    """Address that it is sent from."""
    recipients: list[str] = Field(min_length=1)
    """Addresses that it is sent to."""
    user: str | None = None
    """Login; null: none is asked for."""
    password_env: str | None = None
    """Environment variable with the password of ``user``."""
    starttls: bool = True
    """False for a relay on this machine alone: nothing is encrypted then."""

    @model_validator(mode="after")
    def _login_complete_and_encrypted(self) -> EmailNotification:
        if (self.user is None) != (self.password_env is None):
            raise ValueError("both user and password_env, or none")
        if self.user and not self.starttls:
            raise ValueError("starttls: true where there is a password")
        return self


class WebhookNotification(_Notification):
    """A POST of JSON, signed as Standard Webhooks 1.0 has it (https://www.standardwebhooks.com)."""

    kind: Literal["webhook"] = "webhook"
    url: str | None = Field(default=None, pattern="^https?://")
    """Where to; or ``url_env``."""
    url_env: str | None = None
    """Environment variable with the address, where it holds a secret."""
    secret_env: str | None = None
    """Environment variable with the key, ``whsec_`` and its bytes in Base64; null: unsigned."""

    @model_validator(mode="after")
    def _one_address(self) -> WebhookNotification:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("one of url and url_env")
        if self.url and SECRET_VALUE.search(self.url):
            raise ValueError("a url without a password; give one with it by url_env")
        return self


Notification = Annotated[SlackNotification | EmailNotification | WebhookNotification, Field(discriminator="kind")]


class PushgatewayConfig(Frozen):
    """Where the stage ``decide`` leaves the metrics for Prometheus, where nothing runs that could be asked for them."""

    url: str = Field(pattern="^https?://")
    """Address of the Pushgateway, without ``/metrics``."""
    user: str | None = None
    """Login by basic authentication; null: none."""
    password_env: str | None = None
    """Environment variable with the password of ``user``."""

    @model_validator(mode="after")
    def _no_password_in_sight(self) -> PushgatewayConfig:
        if SECRET_VALUE.search(self.url):
            raise ValueError("a url without a password; give user and password_env")
        if (self.user is None) != (self.password_env is None):
            raise ValueError("both user and password_env, or none")
        return self
