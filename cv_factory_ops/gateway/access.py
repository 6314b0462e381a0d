"""Who may ask, and how often: API keys or JSON Web Tokens, and a moving window of requests for each caller."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from typing import Any, assert_never

import jwt
from fastapi import Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItem, parse
from limits.aio.storage import Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from cv_factory_ops.config.serving import Access, ApiKeys, GatewayConfig, JwtAccess, OpenAccess
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.gateway.keys import KeyRing
from cv_factory_ops.server import Refused


class Tokens:
    """JSON Web Tokens of an identity provider."""

    def __init__(self, access: JwtAccess) -> None:
        """
        Raises:
            ConfigError: the variable of the key is not set.
        """
        self._access = access
        self._key = os.environ.get(access.key_env, "") if access.key_env else ""
        if access.key_env and not self._key:
            raise ConfigError(f"gateway.access.key_env: {access.key_env} is not set")
        self._published = jwt.PyJWKClient(access.jwks_url, timeout=5) if access.jwks_url else None

    async def caller(self, token: str) -> str | None:
        """A pseudonym of the token's subject; None where it is not let in.

        Raises:
            Refused: ``identity_provider``: its keys cannot be fetched.
        """
        try:
            key = await asyncio.to_thread(self._published.get_signing_key_from_jwt, token) if self._published else self._key
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(self._access.algorithms),
                audience=self._access.audience,
                issuer=self._access.issuer,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWKClientConnectionError:
            raise Refused(503, "identity_provider", "the keys of the identity provider cannot be fetched") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            return None
        return f"jwt-{pseudonym(claims['sub'], 'caller')[:12]}"


class Gate:
    """Names the caller of a request, and counts what each has sent."""

    def __init__(self, config: GatewayConfig) -> None:
        """
        Raises:
            ConfigError: of the keys, or of the storage of the limits.
        """
        self._ring = _ring(config.access)
        self._rate: RateLimitItem = parse(config.rate)
        self._allowed = f"allowed are {self._rate.amount} studies per {self._rate.GRANULARITY.name}"
        self._limiter = MovingWindowRateLimiter(_storage(config))
        self._challenge = "Bearer" if isinstance(config.access, JwtAccess) else "ApiKey"

    async def admit(self, request: Request, shown: str | HTTPAuthorizationCredentials | None) -> str:
        """The caller, by the key or token that it has shown.

        Raises:
            Refused: ``unauthorised``, or as :meth:`count`.
        """
        if (caller := await self._caller(request, shown)) is None:
            needed = f"a valid {'token' if self._challenge == 'Bearer' else 'key'} is needed"
            raise Refused(401, "unauthorised", needed, headers={"WWW-Authenticate": self._challenge})
        request.scope["cvf.caller"] = caller
        await self.count(caller)
        return caller

    async def count_others(self, caller: str, studies: int) -> None:
        """Of a batch, all but the first, which :meth:`admit` has counted.

        Raises:
            Refused: ``too_many``: no time is long enough for so many; or as :meth:`count`.
        """
        if studies > self._rate.amount:
            raise Refused(413, "too_many", f"{studies} studies given; {self._allowed}")
        if studies > 1:
            await self.count(caller, studies - 1)

    async def count(self, caller: str, studies: int = 1) -> None:
        """
        Raises:
            Refused: ``rate``: the caller has sent too many; ``rate_storage``: nobody knows.
        """
        try:
            if await self._limiter.hit(self._rate, caller, cost=studies):
                return
            again = (await self._limiter.get_window_stats(self._rate, caller)).reset_time
        except StorageError:
            raise Refused(503, "rate_storage", "the storage of the rate limits does not answer") from None
        wait = {"Retry-After": str(max(1, math.ceil(again - time.time())))}
        raise Refused(429, "rate", self._allowed, headers=wait)

    async def _caller(self, request: Request, shown: str | HTTPAuthorizationCredentials | None) -> str | None:
        if self._ring is None:
            return f"open-{pseudonym(request.client.host if request.client else '', 'caller')[:12]}"
        given = shown.credentials if isinstance(shown, HTTPAuthorizationCredentials) else shown
        return await self._ring.caller(given) if given else None


def scheme(access: Access) -> Callable[..., Any]:
    """FastAPI's dependency that reads what a caller shows, and stands in the OpenAPI document."""
    match access:
        case ApiKeys():
            return APIKeyHeader(name="X-API-Key", scheme_name="key", auto_error=False)
        case JwtAccess():
            return HTTPBearer(bearerFormat="JWT", scheme_name="token", auto_error=False)
        case OpenAccess():
            return lambda: None
        case _:
            assert_never(access)


def _ring(access: Access) -> KeyRing | Tokens | None:
    match access:
        case ApiKeys():
            return KeyRing(access)
        case JwtAccess():
            return Tokens(access)
        case OpenAccess():
            return None
        case _:
            assert_never(access)


def _storage(config: GatewayConfig) -> Storage:
    address = os.environ.get("CVF_GATEWAY_RATE_STORAGE") or config.rate_storage
    kind = address.partition(":")[0]
    if kind not in {"memory", "redis", "rediss"}:
        raise ConfigError("gateway.rate_storage: another kind given; allowed: memory, redis, rediss")
    # limits takes coredis for event loops unless told otherwise; redis-py is the package that is well known
    options: dict[str, Any] = {} if kind == "memory" else {"implementation": "redispy", "wrap_exceptions": True}
    try:
        found = storage_from_string(f"async+{address}", **options)
    except ConfigurationError:
        raise ConfigError("gateway.rate_storage: needs redis: pip install redis") from None
    assert isinstance(found, Storage)  # noqa: S101 - by its prefix
    return found
