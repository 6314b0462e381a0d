"""TLS of DICOM connections, as PS3.15 annex B has it: TLS 1.2 or newer, where both sides may show a certificate."""

from __future__ import annotations

import ssl
from typing import Any

from cv_factory_ops.config import home
from cv_factory_ops.config.sources import Tls
from cv_factory_ops.errors import ConfigError


class _Listening(ssl.SSLContext):
    """Leaves the handshake to the first read, which the thread of the association does: a peer that connects and says nothing
    would otherwise keep all others waiting."""

    def wrap_socket(self, *given: Any, **named: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*given, **(named | {"do_handshake_on_connect": False}))


def to_call(tls: Tls) -> ssl.SSLContext:
    """For connections that we open: the other side's certificate and its name are checked.

    Raises:
        ConfigError: a file is not there, or holds something else.
    """
    context = ssl.create_default_context()
    if tls.authorities:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _trust(context, tls.authorities)
    _show(context, tls)
    return context


def to_listen(tls: Tls) -> ssl.SSLContext:
    """For connections that we take: where authorities are given, the other side must show a certificate of theirs.

    Raises:
        ConfigError: a file is not there, or holds something else.
    """
    context = _Listening(ssl.PROTOCOL_TLS_SERVER)
    if tls.authorities:
        _trust(context, tls.authorities)
        context.verify_mode = ssl.CERT_REQUIRED
    _show(context, tls)
    return context


def _trust(context: ssl.SSLContext, authorities: str) -> None:
    try:
        context.load_verify_locations(home() / authorities)
    except OSError as error:
        raise ConfigError(f"tls.authorities: {authorities}: {_reason(error)}; allowed: certificates as PEM") from None


def _show(context: ssl.SSLContext, tls: Tls) -> None:
    if not (tls.certificate and tls.key):
        return
    try:
        # Without a password to give, OpenSSL would ask the terminal for it.
        context.load_cert_chain(home() / tls.certificate, home() / tls.key, password="")
    except OSError as error:
        places = f"tls.certificate, tls.key: {tls.certificate}, {tls.key}"
        raise ConfigError(
            f"{places}: {_reason(error)}; allowed: a certificate and its key as PEM, without a passphrase"
        ) from None


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not understood").lower().replace("_", " ")
    return (error.strerror or "cannot be read").lower()
