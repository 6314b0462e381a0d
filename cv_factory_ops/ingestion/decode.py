"""Bytes to an image: what ingestion, serving and batches all read studies with."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.domain import Decoded, Domain
from cv_factory_ops.errors import Rejected

MAX_PIXELS = 80_000_000
"""Rows times columns above which a picture is refused before it is decompressed; Pillow warns a little above it."""

UNKNOWN_TYPES = {"", "application/octet-stream", "binary/octet-stream"}
"""Content types that say nothing: the signature decides."""


def decode(data: bytes, content_type: str | None, domain: Domain) -> Decoded:
    """The image in a file or in the body of a request.

    By content type, or by signature where that says nothing: studies of the domain, ``image/png``, ``image/jpeg``,
    ``application/x-npy`` (rows x columns; uint8, uint16, or floating point in 0..1) and ``application/json``
    (``{"instances": [[[0.0, ...], ...]]}``: one image as rows of numbers in 0..1).

    Raises:
        Rejected: ``unsupported``, ``undecodable``, ``truncated``, ``too_large``, or a code of the domain.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind == domain.content_type or (kind in UNKNOWN_TYPES and domain.recognises(data)):
        return domain.decode(data)
    if kind in {"image/png", "image/jpeg"} or (kind in UNKNOWN_TYPES and data.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff"))):
        return Decoded(_picture(data))
    if kind == "application/x-npy" or (kind in UNKNOWN_TYPES and data.startswith(b"\x93NUMPY")):
        return Decoded(_npy(data))
    if kind == "application/json":
        return Decoded(_instance(data))
    if kind in UNKNOWN_TYPES:
        return domain.decode(data)  # for its reason of refusal
    allowed = f"{domain.content_type}, image/png, image/jpeg, application/x-npy, application/json"
    raise Rejected("unsupported", f"content type {kind!r} given; allowed: {allowed}")


def as_unit_range(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """(rows, columns) of uint8, uint16, or floating point in 0..1 -> float32 in 0..1.

    Raises:
        Rejected: ``undecodable``: another shape, type or range.
    """
    if array.ndim != 2 or 0 in array.shape:
        raise Rejected("undecodable", f"an array of shape {array.shape} given; allowed is rows x columns")
    top = {"uint8": 255, "uint16": 65535}.get(array.dtype.name, 1)
    if top == 1 and array.dtype.kind != "f":
        raise Rejected("undecodable", f"an array of {array.dtype} given; allowed: uint8, uint16, floating point in 0..1")
    image: NDArray[np.float32] = array.astype(np.float32) / np.float32(top)
    if not (image.min() >= 0.0 and image.max() <= 1.0):  # also refuses NaN
        raise Rejected("undecodable", "an array with values outside of 0..1 given")
    return image


def _picture(data: bytes) -> NDArray[np.float32]:
    """PNG or JPEG, colours to luminance (ITU-R BT.601)."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if picture.mode.startswith("I"):  # 16 bits of grey
                return as_unit_range(np.asarray(picture).astype(np.uint16))
            return as_unit_range(np.asarray(picture.convert("L")))
    except Rejected:
        raise
    except Image.DecompressionBombError:
        raise Rejected("too_large", f"has too many pixels; allowed are {MAX_PIXELS}") from None
    except OSError as error:
        code = "truncated" if "truncated" in str(error) else "undecodable"
        raise Rejected(code, f"is {'cut off' if code == 'truncated' else 'not a PNG or JPEG picture'}") from None
    except Exception as error:
        raise Rejected("undecodable", f"is not a usable PNG or JPEG picture ({type(error).__name__})") from None


def _npy(data: bytes) -> NDArray[np.float32]:
    try:
        array: NDArray[np.generic] = np.load(BytesIO(data), allow_pickle=False)
    except Exception:
        raise Rejected("undecodable", "is not a usable .npy array") from None
    return as_unit_range(array)


def _instance(data: bytes) -> NDArray[np.float32]:
    try:
        instances = json.loads(data)["instances"]
        arrays = [np.asarray(instance, dtype=np.float64) for instance in instances]
    except Exception:
        raise Rejected("undecodable", 'is not {"instances": [image]} with the image as rows of numbers') from None
    if len(arrays) != 1:
        raise Rejected("undecodable", f"{len(arrays)} instances given; allowed is one image a request")
    return as_unit_range(arrays[0])
