"""What a request brings: read within limits, told apart, and without identity before it leaves the gateway."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.data import DeidentificationConfig
from cv_factory_ops.config.serving import GatewayConfig
from cv_factory_ops.domain import Domain, open_domain
from cv_factory_ops.errors import Rejected
from cv_factory_ops.ingestion.decode import PICTURES, SIGNATURES, UNKNOWN_TYPES, without_metadata
from cv_factory_ops.server import Refused

NPY = "application/x-npy"
NPY_SIGNATURE = b"\x93NUMPY"


class Study(NamedTuple):
    """One file as it came."""

    content: bytes
    content_type: str


class Intake:
    """Makes what comes ready to be sent, or refuses it."""

    def __init__(self, config: ProjectConfig) -> None:
        self._limits: GatewayConfig = config.gateway
        self._deidentification: DeidentificationConfig | None = config.deidentification if config.gateway.deidentify else None
        self.domain: Domain = open_domain(config.domain)

    @property
    def content_types(self) -> tuple[str, ...]:
        """Of a study."""
        return (self.domain.content_type, *PICTURES, NPY)

    def ready(self, study: Study) -> Study:
        """The study as it may leave the gateway.

        Raises:
            Refused: 413 ``too_large``, 415 ``content_type``, or 400 with a code of the domain, ``identified`` for one.
        """
        if len(study.content) > self._limits.max_bytes:
            raise too_large(self._limits.max_bytes)
        kind = self._kind(study)
        is_study = kind == self.domain.content_type or self.domain.recognises(study.content)
        try:
            if not is_study:
                _check_pixels(study.content, kind, self._limits.max_pixels)
            if self._deidentification is None:
                if is_study:
                    self.domain.require_deidentified(study.content)
                return Study(study.content, kind)
            if is_study:
                clean = self.domain.deidentify(study.content, self._deidentification)
                return Study(clean.content, self.domain.content_type)
            return Study(*without_metadata(study.content))
        except Rejected as error:
            raise Refused(400, error.code, str(error)) from None

    def _kind(self, study: Study) -> str:
        """The content type; where none is given, by signature: browsers know neither DICOM nor npy."""
        given = study.content_type.partition(";")[0].strip().lower()
        if given in UNKNOWN_TYPES:
            if self.domain.recognises(study.content):
                return self.domain.content_type
            signatures = zip((*SIGNATURES, NPY_SIGNATURE), (*PICTURES, PICTURES[-1], NPY), strict=True)
            given = next((kind for start, kind in signatures if study.content.startswith(start)), given)
        if given not in self.content_types:
            raise Refused(415, "content_type", f"another content type given; allowed: {', '.join(self.content_types)}")
        return given


def too_large(limit: int) -> Refused:
    """The refusal of a body."""
    return Refused(413, "too_large", f"the body is larger than {limit} bytes")


async def read_study(request: Request, limit: int) -> Study:
    """The body of a request.

    Raises:
        Refused: 413 ``too_large``.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large(limit)
    return Study(bytes(body), request.headers.get("content-type", ""))


def require_type(request: Request, allowed: str) -> None:
    """
    Raises:
        Refused: 415 ``content_type``.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != allowed:
        raise Refused(415, "content_type", f"another content type given; allowed: {allowed}")


class _InMemory(MultiPartParser):
    """A study is never written to a temporary file."""

    spool_max_size = 1 << 62


class Batches:
    """Reads the batches of all requests, which together hold a limited number of bytes."""

    def __init__(self, limits: GatewayConfig) -> None:
        self._limits, self._held = limits, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[list[Study]]:
        """The files of a multipart body, in their order, and room for them; their names are not looked at.

        Raises:
            Refused: 413 ``too_large``, 415 ``content_type``, 400 ``multipart``, 503 ``busy``.
        """
        held, most = 0, self._limits.max_batch_bytes

        async def counted() -> AsyncGenerator[bytes, None]:
            nonlocal held
            async for part in request.stream():
                held, self._held = held + len(part), self._held + len(part)
                if held > most:
                    raise too_large(most)
                if self._held > self._limits.batches_bytes:
                    raise Refused(503, "busy", "other batches take up the memory; try again later")
                yield part

        require_type(request, "multipart/form-data")
        try:
            yield await self._parsed(request, counted())
        finally:
            self._held -= held

    async def _parsed(self, request: Request, body: AsyncGenerator[bytes, None]) -> list[Study]:
        most = self._limits.max_files
        needed = Refused(400, "multipart", f"is no multipart body of 1 to {most} files named `files`")
        try:
            form = await _InMemory(request.headers, body, max_files=most, max_fields=0).parse()
        except (MultiPartException, ValueError, KeyError):
            raise needed from None
        studies = []
        for name, file in form.multi_items():
            if name == "files" and not isinstance(file, str):
                studies.append(Study(await file.read(), file.content_type or ""))
                await file.close()  # frees its copy before the next one is made
        if not studies:
            raise needed
        return studies


def _check_pixels(content: bytes, kind: str, most: int) -> None:
    """Refuse a picture or array that says to have too many pixels; whatever it does not say clearly is the container's to tell.

    Raises:
        Refused: 413 ``too_large``.
    """
    from PIL import Image

    try:
        rows, columns = _npy_shape(content) if kind == NPY else _picture_shape(content)
    except Image.DecompressionBombError:  # more than Pillow itself takes
        raise Refused(413, "too_large", f"has more than {most} pixels") from None
    except Exception:  # header readers raise whatever broken bytes make them
        return
    if rows * columns > most:
        raise Refused(413, "too_large", f"has more than {most} pixels")


def _npy_shape(content: bytes) -> tuple[int, int]:
    file, layout = BytesIO(content), np.lib.format
    read = layout.read_array_header_1_0 if layout.read_magic(file) == (1, 0) else layout.read_array_header_2_0
    shape, _, _ = read(file)
    return shape[0], shape[1]


def _picture_shape(content: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(BytesIO(content), formats=("PNG", "JPEG", "TIFF")) as picture:
        return picture.height, picture.width
