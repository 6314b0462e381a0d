"""Bytes to an image: what ingestion, serving and batches all read studies with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.domain import Decoded, Decoding, Domain, to_uint16
from cv_factory_ops.errors import Rejected

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 80_000_000
"""Rows times columns above which a picture is refused before it is decompressed; Pillow warns a little above it."""

UNKNOWN_TYPES = {"", "application/octet-stream", "binary/octet-stream"}
"""Content types that say nothing: the signature decides."""
PICTURES = ("image/png", "image/jpeg", "image/tiff")
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in luminance (ITU-R BT.601)."""


def decode(data: bytes, content_type: str | None, domain: Domain, decoding: Decoding) -> Iterator[Decoded]:
    """The image in a file or in the body of a request; each frame, where ``decoding.frames`` says ``all``.

    By content type, or by signature where that says nothing: studies of the domain, ``image/png``, ``image/jpeg``,
    ``image/tiff``, ``application/x-npy`` (rows x columns, or rows x columns x 3; uint8, uint16, or floating point in 0..1) and
    ``application/json`` (``{"instances": [[[0.0, ...], ...]]}``: one image as rows of numbers in 0..1, see :func:`instances`).

    Raises:
        Rejected: ``unsupported``, ``undecodable``, ``truncated``, ``too_large``, or a code of the domain.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    says_nothing = kind in UNKNOWN_TYPES
    if kind == domain.content_type or (says_nothing and domain.recognises(data)):
        return domain.decode(data, decoding)
    if kind in PICTURES or (says_nothing and data.startswith(SIGNATURES)):
        return _picture(data, decoding)
    if kind == "application/x-npy" or (says_nothing and data.startswith(b"\x93NUMPY")):
        return iter([Decoded(as_levels(_npy(data), decoding.color))])
    if kind == "application/json":
        return iter([_instance(data, decoding)])
    if says_nothing:
        return domain.decode(data, decoding)  # for its reason of refusal
    allowed = ", ".join((domain.content_type, *PICTURES, "application/x-npy", "application/json"))
    raise Rejected("unsupported", f"content type {kind!r} given; allowed: {allowed}")


def decode_one(data: bytes, content_type: str | None, domain: Domain, decoding: Decoding) -> Decoded:
    """As :func:`decode`; of several frames the middle one."""
    return next(decode(data, content_type, domain, decoding.model_copy(update={"frames": "middle"})))


def as_levels(array: NDArray[np.generic], color: Literal["grey", "rgb"] = "grey") -> NDArray[np.uint16]:
    """(rows, columns) or (rows, columns, 3) of uint8, uint16, or floating point in 0..1 -> 0..65535 of that color.

    Raises:
        Rejected: ``undecodable``: another shape, type or range.
    """
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise Rejected(
            "undecodable", f"an array of shape {array.shape} given; allowed is rows x columns, or rows x columns x 3"
        )
    image = _levels(array)
    if color == "rgb":
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    return image if image.ndim == 2 else np.rint((image @ LUMA).clip(0, 65535)).astype(np.uint16)


def _levels(array: NDArray[np.generic]) -> NDArray[np.uint16]:
    match array.dtype.name:
        case "uint8":
            return array.astype(np.uint16) * np.uint16(257)
        case "uint16":
            return array.astype(np.uint16, copy=False)  # in this machine's byte order
        case _ if array.dtype.kind != "f":
            raise Rejected("undecodable", f"an array of {array.dtype} given; allowed: uint8, uint16, floating point in 0..1")
    image = array.astype(np.float32)
    if not (image.min() >= 0.0 and image.max() <= 1.0):  # also refuses NaN
        raise Rejected("undecodable", "an array with values outside of 0..1 given")
    return to_uint16(image)


def as_unit_range(image: NDArray[np.uint16]) -> NDArray[np.float32]:
    """(rows, columns) or (rows, columns, 3) levels, 0..65535 -> (rows, columns) luminance in 0..1."""
    unit: NDArray[np.float32] = image.astype(np.float32) / np.float32(65535)
    return unit if unit.ndim == 2 else unit @ LUMA


def without_metadata(data: bytes) -> tuple[bytes, str]:
    """The same picture (PNG, JPEG or TIFF) or ``.npy`` array with nothing but its pixels, and the content type: what
    :func:`decode` makes of it stays the same.

    Raises:
        Rejected: ``unsupported``: it is neither; ``undecodable``, ``truncated``; ``too_large``: its pages together have more
            than ``MAX_PIXELS``.
    """
    target = BytesIO()
    if data.startswith(b"\x93NUMPY"):
        array = _npy(data)
        if array.dtype.kind not in "uf":
            raise Rejected("undecodable", f"an array of {array.dtype.kind!r} given; allowed: uint8, uint16, floating point")
        np.save(target, array)
        return target.getvalue(), "application/x-npy"
    if not data.startswith(SIGNATURES):
        raise Rejected("unsupported", "is neither a study nor a PNG, JPEG or TIFF picture nor a .npy array")
    from PIL import Image

    pages, pixels = list[Image.Image](), 0
    for _, values in _pages(data, every=True):
        pages.append(Image.fromarray(values))
        pixels += values.shape[0] * values.shape[1]
        if pixels > MAX_PIXELS:
            raise Rejected("too_large", f"has pages of more than {MAX_PIXELS} pixels together")
    if len(pages) > 1 or pages[0].mode == "F":  # what PNG does not hold
        pages[0].save(target, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_deflate")
        return target.getvalue(), "image/tiff"
    pages[0].save(target, "PNG")
    return target.getvalue(), "image/png"


def _picture(data: bytes, decoding: Decoding) -> Iterator[Decoded]:
    for index, values in _pages(data, every=decoding.frames == "all"):
        yield Decoded(as_levels(values, decoding.color), frame=index)


def _pages(data: bytes, *, every: bool) -> Iterator[tuple[int | None, NDArray[np.generic]]]:
    """Pages of a PNG, JPEG or TIFF, or the middle one, as they are meant to be seen (EXIF orientation); index None of a single
    one."""
    from PIL import Image, ImageOps

    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            count = getattr(picture, "n_frames", 1)
            for index in range(count) if every else [count // 2]:
                picture.seek(index)
                yield (index if count > 1 else None), _values(ImageOps.exif_transpose(picture))
    except Rejected:
        raise
    except Image.DecompressionBombError:
        raise Rejected("too_large", f"has too many pixels; allowed are {MAX_PIXELS}") from None
    except OSError as error:
        code = "truncated" if "truncated" in str(error) else "undecodable"
        raise Rejected(code, f"is {'cut off' if code == 'truncated' else 'not a PNG, JPEG or TIFF picture'}") from None
    except MemoryError:
        raise
    except Exception as error:
        raise Rejected("undecodable", f"is not a usable PNG, JPEG or TIFF picture ({type(error).__name__})") from None


def _values(picture: Image.Image) -> NDArray[np.generic]:
    """Grey stays grey, of 8 or 16 bits or floating point; everything else becomes red, green, blue of 8 bits."""
    if picture.mode == "F":
        return np.asarray(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise Rejected("undecodable", "a picture of more than 16 bits given; allowed: 8, 16, or floating point in 0..1")
        return values.astype(np.uint16)
    grey = picture.mode in {"1", "L", "LA"}
    return np.asarray(picture.convert("L" if grey else "RGB"))


def _npy(data: bytes) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(BytesIO(data), allow_pickle=False)
    except Exception:
        raise Rejected("undecodable", "is not a usable .npy array") from None
    return array


def instances(data: bytes, decoding: Decoding) -> list[Decoded]:
    """The images of ``{"instances": [image, ...], "spacing": [row, column]}``: an image is rows of numbers in 0..1 (or of three
    each); ``spacing``, in mm, is that of all of them and may be missing.

    Raises:
        Rejected: ``undecodable``: it is anything else.
    """
    try:
        body = json.loads(data.decode())
        arrays = [np.asarray(image, dtype=np.float64) for image in body["instances"]]
        row, column = (float(value) for value in body.get("spacing") or (0, 0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        allowed = '{"instances": [image, ...]} with images as rows of numbers, and "spacing": [row, column] in mm where known'
        raise Rejected("undecodable", f"is not {allowed}") from None
    if not arrays:
        raise Rejected("undecodable", "no instances given; at least one image is needed")
    spacing = (row, column) if 0 < row < math.inf and 0 < column < math.inf else None
    return [Decoded(as_levels(array, decoding.color), spacing=spacing) for array in arrays]


def _instance(data: bytes, decoding: Decoding) -> Decoded:
    found = instances(data, decoding)
    if len(found) != 1:
        raise Rejected("undecodable", f"{len(found)} instances given; allowed is one image a request")
    return found[0]


def class_numbers(data: bytes) -> NDArray[np.integer]:
    """Whole numbers, (rows, columns), as a PNG (grey, or indices of a palette) or ``.npy`` file holds them: what a mask is.

    Raises:
        Rejected: ``undecodable``: it is neither; ``too_large``.
    """
    if data.startswith(b"\x93NUMPY"):
        numbers = _npy(data)
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            given = f"is an array of {numbers.dtype} {numbers.shape}"
            raise Rejected("undecodable", f"{given}; allowed: whole numbers, rows x columns")
        return numbers.astype(np.int64)
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Rejected("too_large", f"has too many pixels; allowed are {MAX_PIXELS}")
            if picture.mode not in {"1", "L", "P", "I", "I;16"}:
                raise Rejected("undecodable", f"is a PNG of mode {picture.mode}; allowed: grey, or a palette")
            return np.asarray(picture).astype(np.int64)
    except Rejected:
        raise
    except MemoryError:
        raise
    except Exception:
        raise Rejected("undecodable", "is neither a PNG nor a .npy file") from None
