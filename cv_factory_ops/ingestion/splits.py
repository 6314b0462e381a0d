"""Who is trained on and who is tested on: duplicates, splits by patient, the locked test set, and the refusal of leakage."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cv_factory_ops.config.data import SplitConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import Refusal, Row


def drop_duplicates(rows: Iterable[Row]) -> tuple[list[Row], list[Refusal]]:
    """Keep the first of pixel-identical images; the base data and its test and validation images come first.

    Also where labels conflict the first stays: otherwise a wrong late label could take an image out of the locked test
    set. Two kinds of repetition stay: within a test or validation split that the source fixes (a published split is used
    as it was published), and captures of reserved images, which are set aside for just that.
    """
    first: dict[str, Row] = {}
    kept, refused = [], []
    for row in sorted(rows, key=lambda row: (row.label < 0, row.pseudo < 0)):  # of two copies the one with a label
        known = first.get(row.digest)
        if known is None or (known.split == "reserve" and row.source == "capture"):
            first[row.digest] = row
            kept.append(row)
        elif row.source == "base" and row.split == known.split and row.split in {"val", "test"}:
            kept.append(row)
        elif row.label in {known.label, -1} and row.places == known.places:
            refused.append(Refusal(row.id, "duplicate", f"has the same pixels as {known.id}"))
        else:
            what = "mask" if row.mask else "label" if row.boxes is None else "boxes"
            refused.append(
                Refusal(
                    row.id,
                    "conflicting_label",
                    f"has the same pixels as {known.id}, but {'' if what == 'boxes' else 'an'}other {what}",
                )
            )
    return kept, refused


def with_patients(rows: Sequence[Row]) -> list[Row]:
    """A study is one patient's: images that do not say whose they are take it from others of their study."""
    patients = {row.study: row.patient for row in rows if row.study and row.patient}
    return [row if row.patient else replace(row, patient=patients.get(row.study, "")) for row in rows]


def reserve(row: Row, share: float) -> Row:
    """Set a training image aside as later traffic, chosen by its pixels so that copies go together."""
    return replace(row, split="reserve") if row.split == "train" and position(row.digest, "reserve") < share else row


def assign(rows: Sequence[Row], drawn: Mapping[str, str], locked: frozenset[str]) -> list[Row]:
    """Give each row its split: as the source fixes it, else what was drawn for its group, see :func:`draw`.

    ``locked`` are the pixel digests of the locked test set: then exactly those images are ``test``. Held-out images that
    came later are ``recent``: captures, and whatever belongs to a patient of the locked test set.

    Raises:
        DataError: images of the locked test set are missing; a captured copy, with a label of its own, takes no one's place.
    """
    if missing := locked - {row.digest for row in rows if row.label >= 0 and row.source != "capture"}:
        raise DataError(
            f"{len(missing)} of the {len(locked)} images of the locked test set are missing from the data: challenger and"
            " champion could not be compared; put them back, or delete locked_test.json of the project's storage to lock a"
            " new test set at the next promotion"
        )
    held_out = {group(row) for row in rows if row.digest in locked}
    return [replace(row, split=_split(row, drawn, locked, held_out)) for row in rows]


def _split(row: Row, drawn: Mapping[str, str], locked: frozenset[str], held_out: set[str]) -> str:
    if row.digest in locked:
        return "test"
    split = row.split or drawn[group(row)]
    came_later = bool(locked) or row.source == "capture"
    return "recent" if group(row) in held_out or (split == "test" and came_later) else split


def set_unlabelled_apart(rows: Iterable[Row]) -> tuple[list[Row], list[Refusal]]:
    """Images without a label train as the split ``unlabelled``; those of patients who are held out are refused."""
    kept, refused = [], []
    for row in rows:
        if row.label >= 0:
            kept.append(row)
        elif row.split == "train":
            kept.append(replace(row, split="unlabelled"))
        else:
            refused.append(Refusal(row.id, "held_out", f"has no label, and belongs to a patient of the {row.split} split"))
    return kept, refused


def learn_from_answers(rows: Iterable[Row]) -> list[Row]:
    """Images without a label of their own, for which the champion's answer may stand in, train with that. Until here they were
    without one, so that no answer has a say in who is validated or tested on."""
    return [
        replace(row, label=row.pseudo, split="train") if row.pseudo >= 0 and row.split == "unlabelled" else row for row in rows
    ]


def group(row: Row) -> str:
    """What stays together: a patient's images; where none is known, those of a study or of a file; else the same pixels."""
    file, _, frame = row.id.rpartition("#")
    is_frame = file and len(frame) >= 4 and frame.isdecimal()
    return row.patient or row.study or (file if is_frame else row.digest)


def draw(rows: Sequence[Row], config: SplitConfig, known: Mapping[str, str]) -> dict[str, str]:
    """The splits of groups that have none yet: stratified by label, seeded, and without touching those that have one.

    Within the groups of a label, in the order of their hashes, each goes to the split that lacks most of its share. A group
    with several labels counts for the rarest of them; groups without any are drawn too, since their labels may still come.
    """
    labels: dict[str, set[int]] = {}
    for row in rows:
        if not row.split:
            labels.setdefault(group(row), set()).add(row.label)
    often = Counter(label for found in labels.values() for label in found)
    stratum = {key: min(found - {-1} or found, key=lambda label: (often[label], label)) for key, found in labels.items()}
    shares = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    counts = Counter((stratum[key], known[key]) for key in stratum if key in known)
    drawn = {}
    for key in sorted(stratum.keys() - known.keys(), key=lambda key: position(key, str(config.seed))):
        own = {split: counts[stratum[key], split] for split in shares}
        total = 1 + sum(own.values())
        drawn[key] = max(shares, key=lambda split: shares[split] * total - own[split])
        counts[stratum[key], drawn[key]] += 1
    return drawn


def position(key: str, seed: str) -> float:
    """A place in 0..1 that depends on nothing but key and seed (first 64 bits of SHA-256)."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8]) / 2**64


PLURAL = {"patient": "patients", "study": "studies", "image": "images"}
"""What must not stand in two splits."""


class Placed(Protocol):
    """What the check for leakage looks at."""

    @property
    def id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def study(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def split(self) -> str: ...


def refuse_leakage(rows: Iterable[Placed]) -> None:
    """Refuse a patient or an image on two sides of training, validation and test (``recent`` is held out like ``test``,
    ``unlabelled`` trained on like ``train``).

    Raises:
        DataError: naming at most three pseudonyms or ids.
    """
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row.split == "reserve":
            continue
        side = {"recent": "test", "unlabelled": "train"}.get(row.split, row.split)
        for kind, key in (("patient", row.patient), ("study", row.study), ("image", row.digest)):
            if key:
                sides.setdefault((kind, key), {}).setdefault(side, row.id)
    for kind in PLURAL:
        leaks = [(key, found) for (k, key), found in sides.items() if k == kind and len(found) > 1]
        if leaks:
            shown = "; ".join(
                f"{' = '.join(found.values()) if kind == 'image' else key} ({', '.join(found)})" for key, found in leaks[:3]
            )
            raise DataError(f"{len(leaks)} {PLURAL[kind]} are in more than one split: {shown}")


def require_classes(rows: Iterable[Row], labels: Sequence[str]) -> None:
    """Training, validation and test each need every label: one without images, or that no mask or box shows, can be neither
    learned nor judged.

    Raises:
        DataError: with what to change.
    """
    counts = Counter((row.split, label) for row in rows for label in row.classes)
    for split, cure in (
        ("train", "give more"),
        ("val", "give more, or raise splits.val"),
        ("test", "give more, or raise splits.test"),
    ):
        missing = [repr(label) for i, label in enumerate(labels) if not counts[split, i]]
        if missing:
            raise DataError(f"the {split} split has no images of {', '.join(missing)}; each label needs some: {cure}")


def data_digest(rows: Iterable[Row]) -> str:
    """SHA-256 over the sorted lines of id, label, split and pixel digest, and that of its mask or boxes where it has some."""
    lines = sorted(f"{row.id} {row.label} {row.split} {row.digest} {row.places}".rstrip(" ") + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_digest(digests: Iterable[str]) -> str:
    """SHA-256 over the sorted, distinct pixel digests of a test set."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in sorted(set(digests))).encode()).hexdigest()
