"""A mask's file to the classes of an image's pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage
from cv_factory_ops.domain import Decoded, Domain
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion.decode import class_numbers


def read_mask(uri: str, domain: Domain, image: Decoded, labels: Sequence[str]) -> NDArray[np.uint8]:
    """(rows, columns) each pixel's class as an index into ``labels``, of a PNG of 8 or 16 bits grey or of a palette's indices,
    a ``.npy`` of whole numbers, or a mask in the domain's own format.

    Raises:
        Rejected: ``mask_missing``; ``mask_undecodable``: it is none of these; ``mask_shape``: its shape is not the image's;
            ``mask_class``: it holds a class that is none of the labels; ``mask_image``: it says that it is of another image.
    """
    try:
        data = storage.read_bytes(uri)
    except DataError:
        raise Rejected("mask_missing", "has no mask: the file is not there") from None
    try:
        mask = domain.read_mask(data, labels, image.instance) if domain.recognises(data) else class_numbers(data)
    except Rejected as error:
        code = error.code if error.code in {"mask_class", "mask_image"} else "mask_undecodable"
        raise Rejected(code, f"its mask {error}") from None
    if mask.shape != (shape := image.image.shape[:2]):
        given, wanted = (" x ".join(map(str, each)) for each in (mask.shape, shape))
        raise Rejected("mask_shape", f"its mask has {given} pixels, the image {wanted}")
    if mask.size and not (mask.min() >= 0 and mask.max() < len(labels)):
        wrong = int(mask.min() if mask.min() < 0 else mask.max())
        raise Rejected("mask_class", f"its mask holds the class {wrong}; allowed: 0 to {len(labels) - 1}")
    return mask.astype(np.uint8)
