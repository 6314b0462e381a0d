"""Downloads by HTTP that do not give up at once, do not grow without limit, and do not tell others the authorization."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import tenacity

from cv_factory_ops.config.sources import DicomWebSource, HttpSource
from cv_factory_ops.errors import ConfigError, Rejected, Unavailable

MAX_WAIT = 300.0
"""Seconds that a ``Retry-After`` is waited for; a server that wants more is left to a later try of the stage."""
TRY_AGAIN = {408, 425, 429}
"""Statuses below 500 that another try may change (RFC 9110 section 15.5.9, RFC 8470, RFC 6585)."""


class Status(Exception):
    """An answer that another try would not change."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status = status


class _Again(Exception):
    """A request that may succeed when it is tried again, after ``wait`` seconds at the earliest."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Downloads:
    """Requests to an API, and to wherever its links lead."""

    def __init__(self, client: httpx.Client, source: HttpSource) -> None:
        start = address(source.url)
        if start is None:
            raise ConfigError("data.source.url: is no http:// or https:// address")
        for logger in ("httpx", "httpcore"):  # they quote links, which may identify people
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
        self.start = start
        self._client = client
        self._retries = source.retries
        self._authorization = authorization(source)

    def is_api(self, url: httpx.URL) -> bool:
        """Whether this is the server of the first page: same scheme, host and port."""
        return (url.scheme, url.host, url.port) == (self.start.scheme, self.start.host, self.start.port)

    def get(self, url: httpx.URL, limit: int) -> tuple[bytes, str | None]:
        """Body and content type, after as many tries as the settings allow.

        Raises:
            Rejected: ``too_large``: more than ``limit`` bytes; ``unsupported``: what HTTP would not do.
            Status: neither 200 nor worth another try.
            Unavailable: no try was answered.
        """
        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._retries + 1),
            wait=_wait,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _Again) and error.wait <= MAX_WAIT),
            reraise=True,
        )
        try:
            return tries(self._get_once, url, limit)
        except _Again as error:
            later = f", asks to come back in {error.wait:.0f} s" if error.wait > MAX_WAIT else ""
            raise Unavailable(f"{url.scheme}://{url.netloc.decode()}: {error}{later}; what was fetched is kept") from None

    def _get_once(self, url: httpx.URL, limit: int) -> tuple[bytes, str | None]:
        """httpx itself drops the authorization where a redirect leads to another server."""
        headers = self._authorization if self.is_api(url) else {}
        try:
            with self._client.stream("GET", url, headers=headers) as answer:
                if answer.status_code in TRY_AGAIN or answer.status_code >= 500:
                    raise _Again(f"answered {answer.status_code}", _retry_after(answer.headers.get("Retry-After", "")))
                if answer.status_code != 200:
                    raise Status(answer.status_code)
                return _body(answer, limit), answer.headers.get("Content-Type", "").partition(";")[0].strip() or None
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.DecodingError) as error:
            raise Rejected("unsupported", f"cannot be retrieved ({type(error).__name__})") from None
        except httpx.TransportError as error:
            raise _Again(f"no whole answer ({type(error).__name__})") from None


def address(text: str) -> httpx.URL | None:
    """An address that can be asked, else None."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return None
    return url if url.scheme in {"http", "https"} and url.host else None


def _body(answer: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    for part in answer.iter_bytes():
        body += part
        if len(body) > limit:
            raise Rejected("too_large", f"has more than {limit} bytes")
    return bytes(body)


def authorization(source: DicomWebSource | HttpSource) -> dict[str, str]:
    """The Authorization header, where one is asked for.

    Raises:
        ConfigError: its variable is not set, or holds what is no header.
    """
    if not (name := source.authorization_env):
        return {}
    value = os.environ.get(name, "").strip()
    if not value or not value.isascii() or not value.isprintable():
        said = f"{name} is not {'a header' if value else 'set'}"
        raise ConfigError(f"data.source.authorization_env: {said}; it holds the value of the Authorization header, in ASCII")
    return {"Authorization": value}


def _retry_after(value: str) -> float:
    """Seconds from now (RFC 9110 section 10.2.3: a number of seconds or a date); 0 where nothing is asked."""
    try:
        return max(float(value) if value.isdigit() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0)
    except (ValueError, TypeError):
        return 0


def _wait(state: tenacity.RetryCallState) -> float:
    """Half a second, doubled with each try up to 30 s, with jitter; more where the server asks for it."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, _Again) else 0.0
    return max(asked, tenacity.wait_exponential_jitter(initial=0.5, max=30, jitter=0.5)(state))
