"""``cvf deidentify``: copies of studies without identity, and a list of those that a person should look at."""

from __future__ import annotations

import hashlib
import json
import mimetypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cv_factory_ops import storage
from cv_factory_ops.domain import Box, DeidentificationConfig, Deidentified, Domain, pseudonym
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.progress import with_progress

REVIEW = "review.jsonl"
"""In the folder of the copies: a line for each copy to look at, with its new name, the codes and the blanked boxes."""

mimetypes.add_type("application/dicom", ".dcm")  # Python's own table lacks it


@dataclass
class Counts:
    """What became of the files."""

    done: int = 0
    refused: int = 0
    skipped: int = 0
    """Files of a folder that are no studies of the domain."""
    review: int = 0


def deidentify_files(paths: Sequence[Path], out: Path, domain: Domain, settings: DeidentificationConfig) -> Counts:
    """De-identify files, and those in folders, into a folder. A bad file is told on standard error and left out.

    A copy's name is a keyed pseudonym of the content: the old name may be a patient's, and a second run makes no second copy.
    """
    counts, reviews = Counts(), _reviews(out)
    files = list(_files(paths, out))
    try:
        for file, is_named in with_progress(files, len(files), "de-identify", "file"):
            try:
                data = storage.read_bytes(file.absolute().as_uri())
                if not is_named and not domain.recognises(data):
                    counts.skipped += 1
                    continue
                made = domain.deidentify(data, settings)
            except DataError as error:
                counts.refused += 1
                print(f"cvf deidentify: {file}: {error}", file=sys.stderr)
                continue
            name = _name(data, domain)
            storage.write_bytes((out.absolute() / name).as_uri(), made.content)
            counts.done += 1
            counts.review += bool(made.review)
            reviews[name] = replace(made, content=b"")
    finally:
        _write_reviews(out, reviews)
    return counts


def _name(data: bytes, domain: Domain) -> str:
    return pseudonym(hashlib.sha256(data).hexdigest(), "file") + (mimetypes.guess_extension(domain.content_type) or "")


def _files(paths: Sequence[Path], out: Path) -> Iterator[tuple[Path, bool]]:
    """Files, each with whether it was named itself; of folders all that is below, but for the copies."""
    for path in paths:
        if not path.is_dir():
            yield path, True
            continue
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.resolve().is_relative_to(out.resolve()):
                yield file, False


def _reviews(out: Path) -> dict[str, Deidentified]:
    """What earlier runs into the same folder left to look at, by name of the copy."""
    path = out / REVIEW
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {
        said["file"]: Deidentified(b"", tuple(Box(**box) for box in said["boxes"]), tuple(said["review"]))
        for said in map(json.loads, lines)
    }


def _write_reviews(out: Path, reviews: dict[str, Deidentified]) -> None:
    lines = [
        json.dumps({"file": name, "review": made.review, "boxes": [asdict(box) for box in made.boxes]}) + "\n"
        for name, made in sorted(reviews.items())
        if made.review
    ]
    storage.write_bytes((out.absolute() / REVIEW).as_uri(), "".join(lines).encode())
