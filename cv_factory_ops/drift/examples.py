"""Example images of both sides of a comparison: pixels alone, prepared as the model sees them.

Those of the window are the captured requests, de-identified anew by the project's settings, so that text is looked for where
these want that; what a person should look at first is left out. Those of the reference lie in the champion's own run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_factory_ops import captures, registry, storage
from cv_factory_ops.errors import CvFactoryError, Rejected
from cv_factory_ops.ingestion.decode import decode_one, instances
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.preprocessing.shards import one_a_patient, read_image

if TYPE_CHECKING:
    from cv_factory_ops.bundle import Bundle
    from cv_factory_ops.domain import Decoded
    from cv_factory_ops.drift.window import Window
    from cv_factory_ops.registry import Champion
    from cv_factory_ops.stage import Stage

SPLIT = "val"
"""The split that the drift reference comes from."""


@dataclass
class Examples:
    """Images of one side, each with its value of the feature that they were chosen by."""

    images: list[NDArray[np.uint16]] = field(default_factory=list)
    """(size, size) or (size, size, 3)"""
    values: list[float] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Why an image is not shown, in words."""


def spread(values: pd.Series, count: int) -> list[int]:
    """Rows from the least to the greatest value, evenly spaced in rank, without the outermost twentieths."""
    order = values.reset_index(drop=True).dropna().sort_values(kind="stable").index.to_numpy()
    if not len(order):
        return []
    places = np.linspace(0.05, 0.95, min(count, len(order))) * (len(order) - 1)
    return [int(row) for row in order[np.unique(np.rint(places).astype(int))]]


def of_window(stage: Stage, bundle: Bundle, window: Window, values: pd.Series, count: int) -> Examples:
    """Captured requests, read again where they lie; ``values``: of each row of the window's sample."""
    found = Examples()
    for row in spread(values, count):
        _, position, number = window.sample.rows[row]
        try:
            if capture := captures.at(stage.config, position):
                found.images.append(_prepared(_decoded(stage, bundle, capture, number), bundle))
                found.values.append(float(values.iloc[row]))
        except Rejected as error:
            found.left_out.append(str(error))
        except CvFactoryError:
            found.left_out.append("its capture cannot be read any more")
    return found


def of_reference(stage: Stage, model: Champion, values: pd.Series, count: int) -> Examples:
    """Images of the champion's run; ``values``: of each row of the bundle's reference."""
    try:
        uri = f"{registry.run_of(stage.config, model.version)}/preprocess"
        table = pd.read_parquet(BytesIO(storage.read_bytes(f"{uri}/{SPLIT}.parquet")), columns=["patient"])
        places = one_a_patient(table)
        if len(places) != len(values):
            return Examples(left_out=["the champion's prepared images are not those of its reference any more"])
        rows = spread(values, count)
        return Examples([read_image(uri, SPLIT, int(places[row])) for row in rows], [float(values.iloc[row]) for row in rows])
    except (CvFactoryError, OSError, ValueError, KeyError):
        return Examples(left_out=["the champion's prepared images cannot be reached"])


def _decoded(stage: Stage, bundle: Bundle, capture: captures.Capture, number: int) -> Decoded:
    kind, decoding = capture.content_type.partition(";")[0].strip().lower(), bundle.manifest.decoding
    content, domain, settings = capture.request, stage.domain, stage.config.deidentification
    if kind == domain.content_type or domain.recognises(content):
        clean = domain.deidentify(content, settings)
        if clean.review:
            raise Rejected("review", f"should be looked at first: {', '.join(clean.review)}")
        return decode_one(clean.content, kind, domain, decoding)
    if settings.pixels != "trust":
        raise Rejected("not_screened", "only studies are looked through for text, and deidentification.pixels asks for it")
    return instances(content, decoding)[number] if kind == "application/json" else decode_one(content, kind, domain, decoding)


def _prepared(study: Decoded, bundle: Bundle) -> NDArray[np.uint16]:
    return prepare(study.image, bundle.manifest.preprocessing, study.spacing)


def reasons(sides: Sequence[Examples]) -> str:
    """Why images are not shown, in one line; empty where all are."""
    left_out = [reason for side in sides for reason in side.left_out]
    return "; ".join(f"{left_out.count(reason)} not shown: {reason}" for reason in dict.fromkeys(left_out))
