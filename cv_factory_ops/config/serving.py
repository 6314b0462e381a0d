"""How answers are given: ``batch``, ``gateway``, ``stream``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cv_factory_ops.config.sources import KafkaSource, KafkaTopic
from cv_factory_ops.config.values import SECRET_VALUE, Share
from cv_factory_ops.records import Frozen


class BatchConfig(Frozen):
    """What the batch inference DAG reads."""

    path: str | None = None
    """Directory or ``s3://`` prefix of studies; null means the images of the project's own source."""
    publish: KafkaTopic | None = None
    """Topic that the answers are sent to once all are there: key is the study, value its line of ``predictions.jsonl``."""


class ApiKeys(Frozen):
    """Callers show a key in the header ``X-API-Key``; ``cvf gateway-key`` makes one."""

    kind: Literal["api_keys"] = "api_keys"
    file: str = "var/gateway-keys.jsonl"
    """Salted digests of the keys, one a line: who loses a line loses access at once."""
    env: str | None = None
    """Environment variable that holds such lines, instead of the file."""


class JwtAccess(Frozen):
    """Callers show a token of an identity provider, ``Authorization: Bearer ...`` (RFC 7519, RFC 6750); it must say ``exp``,
    ``iss``, ``aud`` and ``sub``."""

    kind: Literal["jwt"] = "jwt"
    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    jwks_url: str | None = None
    """Where the provider publishes its keys (RFC 7517)."""
    key_env: str | None = None
    """Instead: environment variable with the public key (PEM), or with the secret that is shared for ``HS256`` and its like."""
    algorithms: list[
        Literal[
            "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512"
        ]
    ] = Field(default=["RS256"], min_length=1)
    """Signatures that are accepted: of public keys, or of a shared secret, never of both."""

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> JwtAccess:
        if (self.jwks_url is None) == (self.key_env is None):
            raise ValueError("one of jwks_url and key_env")
        shared = {algorithm.startswith("HS") for algorithm in self.algorithms}
        if len(shared) > 1 or (self.jwks_url and True in shared):  # else a public key would pass for a shared secret
            raise ValueError("algorithms of one kind: HS... with a secret in key_env, all others with a public key")
        return self


class OpenAccess(Frozen):
    """Whoever reaches the gateway may ask: for one machine, or behind a proxy that knows its callers."""

    kind: Literal["open"] = "open"


Access = Annotated[ApiKeys | JwtAccess | OpenAccess, Field(discriminator="kind")]


class GatewayConfig(Frozen):
    """What ``cvf gateway`` lets through to the endpoint."""

    access: Access = ApiKeys()
    """One of ``api_keys``, ``jwt``, ``open``."""
    rate: str = Field(default="600/minute", pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$")
    """Studies that each caller may send in a time, in a moving window."""
    rate_storage: str = Field(default="memory://", pattern=r"^(memory|redis|rediss)://")
    """Where they are counted: in this process, or ``redis://host:port`` for several gateways. ``CVF_GATEWAY_RATE_STORAGE``
    overrides it, for an address with a password."""
    cors_origins: list[str] = []
    """Pages that a browser may call it from, ``https://viewer.example``; empty: none."""
    max_bytes: int = Field(default=6 << 20, ge=1, le=6 << 20)
    """Bytes of a study; SageMaker lets no more through."""
    max_batch_bytes: int = Field(default=64 << 20, ge=1)
    """Bytes of the body of a batch."""
    batches_bytes: int = Field(default=512 << 20, ge=1)
    """Bytes of all batches in hand together; more are told to come again (503)."""
    max_files: int = Field(default=32, ge=1, le=1000)
    """Studies of a batch."""
    max_pixels: int = Field(default=80_000_000, ge=1, le=80_000_000)
    """Rows times columns of a picture or array, of which the container takes no more either; of a study of the domain the
    container says how many."""
    deidentify: bool = False
    """De-identify studies that come with an identity, by ``deidentification``, and take the metadata off pictures, before they
    leave the gateway; otherwise such studies are refused."""
    in_flight: int = Field(default=64, ge=1, le=1000)
    """Requests in hand at a time; more are told to come again (503)."""
    timeout: float = Field(default=60, gt=0)
    """Seconds that one try of the endpoint may take."""
    attempts: int = Field(default=3, ge=1, le=10)
    """Tries of a request, where the endpoint is not reached, not ready, or throttles."""
    retry_share: Share = 0.2
    """Retries that all requests together may cause, as a share of them: an endpoint in trouble is not asked all the more."""
    failures: int = Field(default=5, ge=1)
    """Tries in a row without an answer after which the endpoint is left alone (the circuit opens)."""
    open_seconds: float = Field(default=10, gt=0)
    """How long, before one request tries again whether it answers."""

    @model_validator(mode="after")
    def _room_for_a_batch(self) -> GatewayConfig:
        if self.batches_bytes < self.max_batch_bytes:
            raise ValueError("batches_bytes of at least max_batch_bytes")
        return self

    @field_validator("rate_storage")
    @classmethod
    def _no_password(cls, address: str) -> str:
        if SECRET_VALUE.search(address):
            raise ValueError("an address without a password; give one with it by CVF_GATEWAY_RATE_STORAGE")
        return address


class StreamConfig(Frozen):
    """What ``cvf stream`` answers: messages of one Kafka topic, into another."""

    source: KafkaSource
    """Studies as messages; ``group`` is the stream's own, ``batch`` the most that is answered at a time, up to 32."""
    sink: KafkaTopic
    """Topic of the answers: key is that of the message, value a line as in ``predictions.jsonl``."""
    wait: float = Field(default=0.2, ge=0, le=60)
    """Seconds that a message waits for others to be answered with."""
    answer_minutes: float = Field(default=30, ge=1, le=1440)
    """How long answering what was gathered may take, before other members of the group get it (``max.poll.interval.ms``)."""
    champion_minutes: float = Field(default=5, gt=0)
    """How often the registry is asked for a new champion, which then answers."""
