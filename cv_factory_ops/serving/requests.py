"""What a request of ``/invocations`` asks for: its studies, an explanation or none, JSON or a study as the answer."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from cv_factory_ops.config.data import Decoding
from cv_factory_ops.config.explanations import EXPLANATIONS, ExplanationMethod
from cv_factory_ops.domain import Decoded, Domain
from cv_factory_ops.errors import Rejected
from cv_factory_ops.features.index import MOST, TEXT
from cv_factory_ops.ingestion.decode import PICTURES, decode_one, instances
from cv_factory_ops.server import LARGEST_BODY, Refused, read_body

if TYPE_CHECKING:
    from starlette.datastructures import UploadFile

JSON, MULTIPART = "application/json", "multipart/form-data"
IMAGES = (*PICTURES, "application/x-npy")
ALLOWED = ", ".join(
    [
        *(f"explain={name}" for name in EXPLANATIONS),
        "similar=5, with filters and words as in similar=5&label=normal&text=left+effusion",
    ]
)


@dataclass(frozen=True)
class Part:
    """A study as it was sent, or several images as JSON."""

    content: bytes
    content_type: str


@dataclass(frozen=True)
class Similar:
    """Similar studies that an answer shall come with."""

    k: int | None
    """None: as many as the index gives by default."""
    filters: tuple[tuple[str, str], ...]
    """Names and values, see :meth:`cv_factory_ops.features.index.Index.where`."""
    text: str = ""
    """Words that a hybrid search looks for as well."""


@dataclass(frozen=True)
class Asked:
    """A request that can be tried to answer."""

    parts: list[Part]
    method: ExplanationMethod | None
    """How the answer is explained, if at all."""
    similar: Similar | None
    """What it comes with."""
    wants_study: bool
    """The answer is a study of the domain beside the one of :attr:`parts`; else it is JSON."""


async def read(request: Request, domain: Domain, most_images: int) -> Asked:
    """What is asked for.

    Raises:
        Refused: 415 ``content_type``, 400 ``custom_attributes`` or ``multipart``, 406 ``accept``, 413 ``too_large``.
    """
    given = request.headers.get("content-type", "")
    content_type = given.partition(";")[0].strip().lower()
    _require_allowed(content_type, (domain.content_type, *IMAGES, JSON, MULTIPART))
    attributes = request.headers.get("x-amzn-sagemaker-custom-attributes", "")
    method, similar = _attributes(attributes)
    wants_study = domain.content_type in request.headers.get("accept", "").lower()
    if wants_study and content_type != domain.content_type:
        raise Refused(406, "accept", f"an answer comes as {domain.content_type} where one study of that type is sent")
    if (body := await read_body(request)) is None:
        raise Refused(413, "too_large", f"the body is larger than {LARGEST_BODY} bytes")
    parts = [Part(body, content_type)] if content_type != MULTIPART else await _files(request, body, domain, most_images)
    return Asked(parts, method, similar, wants_study)


def _attributes(given: str) -> tuple[ExplanationMethod | None, Similar | None]:
    """What the header asks for: a form's pairs, of which the first says what and the others are filters."""
    (name, value), *filters = urllib.parse.parse_qsl(given, keep_blank_values=True) or [("", "")]
    match name:
        case "" if not given:
            return None, None
        case "explain" if value in EXPLANATIONS and not filters:
            return EXPLANATIONS[value], None
        case "similar" if not value:
            return None, _similar(None, filters)
        case "similar" if value.isdecimal() and len(value) <= 3 and 1 <= int(value) <= MOST:
            return None, _similar(int(value), filters)
    raise Refused(400, "custom_attributes", f"custom attributes {given[:80]!r} given; allowed: {ALLOWED}")


def _similar(k: int | None, more: Sequence[tuple[str, str]]) -> Similar:
    text = " ".join(value for name, value in more if name == TEXT)
    return Similar(k, tuple(pair for pair in more if pair[0] != TEXT), text)


def decoded(part: Part, domain: Domain, decoding: Decoding) -> list[Decoded]:
    """The images of a part.

    Raises:
        Rejected: it cannot be read, or is a study that is not de-identified.
    """
    if part.content_type == JSON:
        return instances(part.content, decoding)
    if part.content_type == domain.content_type or domain.recognises(part.content):
        domain.require_deidentified(part.content)
    return [decode_one(part.content, part.content_type, domain, decoding)]


def decoded_of_several(part: Part, number: int, domain: Domain, decoding: Decoding) -> list[Decoded]:
    """As :func:`decoded`; a refusal says which of several parts it is about, counted from 1."""
    try:
        return decoded(part, domain, decoding)
    except Rejected as error:
        raise Rejected(error.code, f"part {number}: {error}") from None


def _require_allowed(content_type: str, allowed: tuple[str, ...], of: str = "") -> None:
    if content_type not in allowed:
        raise Refused(415, "content_type", f"{of}content type {content_type[:80]!r} given; allowed: {', '.join(allowed)}")


async def _files(request: Request, body: bytes, domain: Domain, most: int) -> list[Part]:
    """The files of a multipart body, in their order; their names are not looked at."""
    try:
        form = await _InMemory(request.headers, _once(body), max_files=most, max_fields=0).parse()
    except (MultiPartException, KeyError, ValueError):
        raise Refused(400, "multipart", f"is no multipart body of at most {most} files") from None
    files: list[UploadFile] = [file for _, file in form.multi_items() if not isinstance(file, str)]
    if not files:
        raise Refused(400, "multipart", "no files given; at least one is needed")
    parts = [Part(file.file.read(), (file.content_type or "").partition(";")[0].strip().lower()) for file in files]
    for number, part in enumerate(parts, 1):
        _require_allowed(part.content_type, (domain.content_type, *IMAGES), f"part {number}: ")
    return parts


class _InMemory(MultiPartParser):
    spool_max_size = LARGEST_BODY + 1  # studies are never written to the disk


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
