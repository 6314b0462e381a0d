"""Ingestion: what is accepted, what goes to quarantine and why, who lands in which split, and that none of it leaks."""

import csv
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cv_factory_ops import captures, storage
from cv_factory_ops.config import ProjectConfig, as_uri, load
from cv_factory_ops.config.data import Decoding, SplitConfig
from cv_factory_ops.domain import DeidentificationConfig, pseudonym
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion import splits
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.ingestion.manifest import (
    Row,
    read_images,
    read_manifest,
    write_manifest,
)
from cv_factory_ops.ingestion.pixels import PixelWriter, Place, pixel_digest
from cv_factory_ops.records import IngestRecord
from cv_factory_ops.stage import run_stage
from domain_medical import DOMAIN
from domain_medical.synthetic import studies
from tests.capture_lines import capture_line

PNEUMONIA = Path(__file__).parents[2] / "shared" / "data" / "pneumoniamnist" / "pneumoniamnist.npz"
LABELS = ["normal", "opacity"]
Project = Callable[..., Path]


def ingest(path: Path, run: str = "run", **options: Any) -> IngestRecord:
    return IngestRecord.model_validate(run_stage("ingest", load(path), as_uri(run), **options).record)


def quarantine(home: Path, run: str = "run") -> dict[str, str]:
    lines = (home / run / "ingest" / "quarantine.jsonl").read_text().splitlines()
    return {item["item"]: item["code"] for item in map(json.loads, lines)}


def png(image: NDArray[Any]) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).save(target, "PNG")
    return target.getvalue()


def npy(image: NDArray[Any]) -> bytes:
    target = io.BytesIO()
    np.save(target, image)
    return target.getvalue()


def noise(seed: int, size: int = 12) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)


def write_folder(folder: Path, count: int = 40, columns: Iterable[str] = ("file", "label")) -> list[dict[str, str]]:
    """Phantoms as files, one a patient, and their table, in ``folder`` and ``folder.csv``."""
    folder.mkdir(parents=True)
    rows = []
    for i, (data, label) in enumerate(studies(count, image_size=32, seed=1, labels=LABELS)):
        name = f"site{i % 2}/{i:03d}.dcm"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        rows.append({"file": name, "label": label})
    write_table(folder.with_suffix(".csv"), rows, columns)
    return rows


def write_table(path: Path, rows: list[dict[str, str]], columns: Iterable[str] = ("file", "label")) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(columns), extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def files(path: str = "data", labels: str = "data.csv", **options: Any) -> dict[str, Any]:
    return {"source": {"kind": "files", "path": path, "labels": labels}, **options}


def row(id: str, **fields: Any) -> Row:
    digest = hashlib.sha256(fields.pop("pixels", id).encode()).hexdigest()
    texts = {"patient": "", "study": "", "instance": "", "split": "", "source": "base", "review": ""}
    numbers = {"label": 0, "rows": 1, "columns": 1, "channels": 1, "row_spacing": None, "column_spacing": None}
    return Row(id=id, digest=digest, **{"metadata": {}, "place": Place("", 0, 0), **texts, **numbers, **fields})


def split(rows: list[Row], config: SplitConfig, locked: Iterable[str] = (), known: dict[str, str] | None = None) -> list[Row]:
    known = known or {}
    return splits.assign(rows, known | splits.draw(rows, config, known), frozenset(locked))


class TestPhantoms:
    def test_manifest_images_and_record_agree(self, project: Project, home: Path) -> None:
        record = ingest(project())
        manifest = read_manifest(home / "run" / "ingest")
        images = list(read_images(home / "run" / "ingest"))
        assert [name for name, _ in images] == list(manifest["id"])
        assert [pixel_digest(pixels) for _, pixels in images] == list(manifest["digest"])
        assert record.accepted == len(manifest) == sum(record.splits.values())
        assert record.splits == manifest["split"].value_counts().to_dict()
        assert (record.quarantined, record.captured) == (0, 0)
        assert {f"meta_{name}" for name in DOMAIN.metadata} <= set(manifest)
        assert manifest["meta_rows"].eq(48).all()
        assert {array.dtype for _, array in images} == {np.dtype(np.uint16)}

    def test_no_patient_is_in_two_splits(self, project: Project, home: Path) -> None:
        ingest(project())
        manifest = read_manifest(home / "run" / "ingest")
        assert manifest.groupby("patient")["split"].nunique().eq(1).all()
        assert manifest["patient"].nunique() == 60 < len(manifest)

    def test_phantoms_are_generated_once(self, project: Project, home: Path) -> None:
        ingest(project())
        [folder] = [f for f in (home / "var" / "storage" / "tiny" / "phantoms").iterdir() if f.is_dir()]
        before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
        first = ingest(project(), run="run2")
        assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before
        assert ingest(project(), run="run3") == first

    def test_a_broken_off_generation_is_begun_anew(self, project: Project, home: Path) -> None:
        ingest(project())
        folder = home / "var" / "storage" / "tiny" / "phantoms"
        [done] = [f for f in folder.iterdir() if f.is_dir()]
        done.rename(folder / f".{done.name}")
        (folder / f".{done.name}" / "00000_0.dcm").write_bytes(b"half")
        assert ingest(project(), run="run2").quarantined == 0

    def test_nothing_is_done_twice_for_the_same_inputs(self, project: Project, home: Path) -> None:
        ingest(project())
        written = (home / "run" / "ingest" / "manifest.parquet").stat().st_mtime_ns
        ingest(project())
        assert (home / "run" / "ingest" / "manifest.parquet").stat().st_mtime_ns == written
        ingest(project(splits={"val": 0.25, "test": 0.25, "seed": 1}))
        assert (home / "run" / "ingest" / "manifest.parquet").stat().st_mtime_ns != written


class TestFiles:
    def test_directory(self, project: Project, home: Path) -> None:
        write_folder(home / "data")
        record = ingest(project(data=files()))
        assert record.accepted == 40
        assert set(read_manifest(home / "run" / "ingest")["id"]) == {f"site{i % 2}/{i:03d}.dcm" for i in range(40)}

    def test_refused_items_are_listed_with_their_reasons(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data")
        folder = home / "data"
        whole = (folder / rows[0]["file"]).read_bytes()
        for name, content in {
            "cut.dcm": whole[:-100],
            "text.dcm": b"not a study",
            "blank.png": png(np.full((9, 9), 77, np.uint8)),
            "z_copy.dcm": whole,
            "z_contrary.dcm": whole,
            "nobody.png": png(noise(1)),
        }.items():
            (folder / name).write_bytes(content)
        (folder / ".DS_Store").write_bytes(b"x")
        other = next(label for label in LABELS if label != rows[0]["label"])
        rows += [{"file": name, "label": rows[0]["label"]} for name in ("cut.dcm", "text.dcm", "blank.png", "z_copy.dcm")]
        rows += [{"file": "z_contrary.dcm", "label": other}, {"file": "absent.png", "label": "normal"}]
        write_table(home / "data.csv", rows)
        record = ingest(project(data=files()))
        assert quarantine(home) == {
            "z_copy.dcm": "duplicate",
            "z_contrary.dcm": "conflicting_label",
            "cut.dcm": "truncated",
            "text.dcm": "not_dicom",
            "blank.png": "blank",
            "nobody.png": "unlabelled",
            "absent.png": "label_without_image",
        }
        assert record.quarantined == 7
        assert record.accepted == 40
        assert sum(record.quarantine_reasons.values()) == 7
        assert "7 in quarantine" in record.summary

    def test_too_much_refused(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data", count=20)
        for item in rows[:8]:
            path = home / "data" / item["file"]
            path.write_bytes(path.read_bytes()[:1500])
        for item in rows[8:12]:
            (home / "data" / item["file"]).write_bytes(b"nothing")
        with pytest.raises(DataError) as caught:
            ingest(project(data=files()))
        message = str(caught.value)
        assert message.startswith("12 of 20 images refused (truncated 8, not_dicom 4); allowed share 0.2; list: file://")
        kept = Path(message.rpartition("file://")[2]).read_text().splitlines()
        assert len(kept) == 12
        assert not (home / "run" / "ingest").exists()

    def test_copies_alone_do_not_stop_it(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data")
        for item in list(rows):
            copy = f"copy/{item['file']}"
            (home / "data" / copy).parent.mkdir(parents=True, exist_ok=True)
            (home / "data" / copy).write_bytes((home / "data" / item["file"]).read_bytes())
            rows.append({"file": copy, "label": item["label"]})
        write_table(home / "data.csv", rows)
        record = ingest(project(data=files(max_quarantined=0.0)))
        assert record.quarantine_reasons == {"duplicate": 40}
        assert record.accepted == 40

    def test_patient_column_decides_the_split_and_is_not_kept(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data")
        for i, item in enumerate(rows):
            item["patient"] = f"MRN-{i // 2}"
        write_table(home / "data.csv", rows, ("file", "label", "patient"))
        ingest(project(data=files()))
        manifest = read_manifest(home / "run" / "ingest")
        assert set(manifest["patient"]) == {pseudonym(f"MRN-{i}", "patient") for i in range(20)}
        assert "MRN" not in manifest.to_csv()

    def test_pictures_and_arrays(self, project: Project, home: Path) -> None:
        (home / "data").mkdir()
        rows = []
        for i in range(60):
            name, content = [("p.png", png(noise(i))), ("a.npy", npy(noise(i) / 255))][i % 2]
            (home / "data" / f"{i}{name}").write_bytes(content)
            rows.append({"file": f"./{i}{name}", "label": LABELS[i % 4 // 2]})
        write_table(home / "data" / "labels.csv", rows)
        record = ingest(project(data=files(labels="data/labels.csv")))
        assert (record.accepted, record.quarantined) == (60, 0)
        manifest = read_manifest(home / "run" / "ingest")
        assert manifest["patient"].eq("").all()
        assert manifest["meta_modality"].isna().all()

    def test_a_changed_file_is_read_again(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data")
        path = project(data=files())
        first = ingest(path)
        (home / "data" / rows[3]["file"]).write_bytes(png(noise(5)))
        assert ingest(path).data_digest != first.data_digest

    def test_s3(self, project: Project, home: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(home / "data")
        local = ingest(project(data=files()))
        storage.upload_tree(home / "data", f"s3://{bucket}/in/images")
        storage.upload_tree(home / "data", f"s3://{bucket}/in/images-of-others")
        storage.upload_file(home / "data.csv", f"s3://{bucket}/in/labels.csv")
        monkeypatch.setenv("CVF_STORAGE", f"s3://{bucket}/store")
        path = project(data=files(f"s3://{bucket}/in/images", f"s3://{bucket}/in/labels.csv"))
        run = f"s3://{bucket}/store/tiny/runs/1"
        assert ingest(path, run) == local
        names = set(storage.listing(f"{run}/ingest"))
        pixels = {name for name in names if name.startswith("pixels-")}
        assert pixels
        assert names - pixels == {"result.json", "manifest.parquet", "quarantine.jsonl"}
        storage.write_bytes(f"s3://{bucket}/in/images/site0/000.dcm", png(noise(5)))
        assert ingest(path, run).data_digest != local.data_digest

    def test_phantoms_with_storage_on_s3(self, project: Project, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        local = ingest(project())
        monkeypatch.setenv("CVF_STORAGE", f"s3://{bucket}")
        assert ingest(project(), f"s3://{bucket}/tiny/runs/1") == local

    def test_missing_bucket(self, project: Project, bucket: str) -> None:
        for data in (
            files("s3://no-such-bucket/x", f"s3://{bucket}/l.csv"),
            files(f"s3://{bucket}/x", "s3://no-such-bucket/l"),
        ):
            with pytest.raises(DataError, match=r"no-such-bucket/.*: the bucket does not exist"):
                ingest(project(data=data))

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (
                "file;label\na;normal\n",
                "column label and file, study or instance is missing; needed: label, one of file, study",
            ),
            ("file,class\na,normal\n", "column label is missing"),
            ("", "column label and file, study or instance is missing"),
            ("file,label\na.png,Doe^Jane\n", "line 2: the label is none of those allowed: normal, opacity"),
            ("file,label\na.png\n", "line 2: the label is none of those allowed"),
            ("file,label\na.png,normal\n./a.png,normal\n", "line 3: this file has a row already"),
            ("file,label\n\xff\xfe,normal\n", "is not a CSV table in UTF-8"),
        ],
    )
    def test_wrong_tables(self, project: Project, home: Path, table: str, message: str) -> None:
        write_folder(home / "data", count=4)
        (home / "data.csv").write_bytes(table.encode("latin-1"))
        with pytest.raises(DataError) as caught:
            ingest(project(data=files()))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "data.csv" in str(caught.value)
        assert "Doe" not in str(caught.value), "with swapped columns, a cell may be a person's name"

    def test_missing_places(self, project: Project, home: Path) -> None:
        with pytest.raises(DataError, match="/data: is not there"):
            ingest(project(data=files()))
        (home / "data").mkdir()
        with pytest.raises(DataError, match="/data: holds no files"):
            ingest(project(data=files()))
        (home / "data" / "a.png").write_bytes(png(noise(1)))
        with pytest.raises(DataError, match=r"data\.csv: is not there"):
            ingest(project(data=files()))
        (home / "data.csv").write_text("file,label\n")
        with pytest.raises(DataError, match=r"data\.csv: is a file; allowed: a directory, a DICOMDIR, or an archive"):
            ingest(project(data=files(path="data.csv")))

    def test_nothing_usable(self, project: Project, home: Path) -> None:
        (home / "data").mkdir()
        (home / "data" / "README").write_text("hello")
        (home / "data.csv").write_text("file,label\n")
        with pytest.raises(DataError, match=r"1 of 1 images refused \(unlabelled 1\)"):
            ingest(project(data=files(max_quarantined=1.0)))

    def test_no_identity_is_logged(self, project: Project, home: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_folder(home / "data")
        with caplog.at_level(logging.DEBUG, logger="cvf"):
            ingest(project(data=files()))
        assert "PHANTOM" not in caplog.text
        for path in (home / "run" / "ingest").iterdir():
            assert b"PHANTOM" not in path.read_bytes()


class TestSplits:
    def test_each_label_has_the_shares_asked_for(self) -> None:
        rows = [row(f"{i}", patient=f"p{i}", label=int(i % 10 == 0)) for i in range(1000)]
        found = split(rows, SplitConfig(val=0.1, test=0.3))
        for label, size in ((0, 900), (1, 100)):
            counts = Counter(r.split for r in found if r.label == label)
            assert counts == {"train": 0.6 * size, "val": 0.1 * size, "test": 0.3 * size}

    def test_the_seed_decides_and_the_order_does_not(self) -> None:
        rows = [row(f"{i}", patient=f"p{i}") for i in range(100)]
        found = {r.id: r.split for r in split(rows, SplitConfig())}
        assert {r.id: r.split for r in split(rows[::-1], SplitConfig())} == found
        assert {r.id: r.split for r in split(rows, SplitConfig(seed=1))} != found

    def test_nobody_moves_when_patients_arrive(self) -> None:
        rows = [row(f"{i}", patient=f"p{i}", label=int(i % 5 == 0)) for i in range(300)]
        known: dict[str, str] = {}
        for count in (20, 21, 100, 300):
            new = splits.draw(rows[:count], SplitConfig(), known)
            assert not new.keys() & known.keys()
            known |= new
        shares = Counter(known[f"p{i}"] for i in range(0, 300, 5))
        assert shares["test"] == pytest.approx(0.2 * 60, abs=1)
        assert shares["val"] == pytest.approx(0.15 * 60, abs=1)

    def test_all_images_of_a_patient_stay_together(self) -> None:
        rows = [row(f"{i}", patient=f"p{i % 30}", label=int(i == 29)) for i in range(120)]
        found = split(rows, SplitConfig())
        splits.refuse_leakage(found)
        assert len({(r.patient, r.split) for r in found}) == 30

    def test_studies_and_frames_without_a_patient_stay_together(self) -> None:
        rows = [row(f"{i}", study=f"s{i % 20}") for i in range(40)]
        rows += [row(f"cine{i % 20}.tiff#{i // 20:04d}") for i in range(60)]
        found = split(rows, SplitConfig())
        assert len({(r.study or r.id.partition("#")[0], r.split) for r in found}) == 40
        told = splits.with_patients([row("a", study="s", patient="p"), row("b", study="s"), row("c", study="t")])
        assert [r.patient for r in told] == ["p", "p", ""]
        with pytest.raises(DataError, match=r"1 studies are in more than one split: s \(train, test\)"):
            splits.refuse_leakage([row("a", study="s", split="train"), row("b", study="s", split="test")])

    def test_runs_of_a_project_remember_who_was_where(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data", count=60)
        write_table(home / "data.csv", rows[:30])
        ingest(project(data=files(max_quarantined=1.0)))
        first = read_manifest(home / "run" / "ingest").set_index("id")["split"]
        write_table(home / "data.csv", rows)
        ingest(project(data=files()), "run2")
        second = read_manifest(home / "run2" / "ingest").set_index("id")["split"]
        assert second[first.index].equals(first)
        assert len(second) == 60

    def test_captures_are_never_test(self) -> None:
        rows = [row(f"{i}", source="capture") for i in range(100)]
        assert {r.split for r in split(rows, SplitConfig())} == {"train", "val", "recent"}

    def test_locked_test_set_stays_exactly_itself(self) -> None:
        rows = [row(f"{i}", patient=f"p{i}") for i in range(100)]
        before = split(rows, SplitConfig())
        locked = frozenset(r.digest for r in before if r.split == "test")
        more = [row(f"n{i}", patient=f"p{i}") for i in range(100)] + [row(f"m{i}", patient=f"q{i}") for i in range(100)]
        for config in (SplitConfig(), SplitConfig(test=0.05, seed=3)):
            after = split(rows + more, config, locked)
            assert {r.digest for r in after if r.split == "test"} == locked
            splits.refuse_leakage(after)
            tested = {r.patient for r in after if r.split == "test"}
            assert {r.split for r in after if r.patient in tested} == {"test", "recent"}
        assert "recent" in {r.split for r in after if r.id.startswith("m")}

    def test_missing_locked_images(self) -> None:
        rows = [row(f"{i}") for i in range(10)]
        with pytest.raises(DataError, match=r"2 of the 3 images of the locked test set are missing .*locked_test\.json"):
            split(rows, SplitConfig(), [rows[0].digest, "gone", "lost"])

    def test_leakage_names_patients_and_images(self) -> None:
        leaking = [row(f"{s}{i}", patient=f"p{i}", split=s) for i in range(5) for s in ("train", "test")]
        with pytest.raises(DataError, match=r"5 patients are in more than one split: p0 \(train, test\); p1 .*; p2 [^;]*$"):
            splits.refuse_leakage(leaking)
        with pytest.raises(DataError, match=r"1 images are in more than one split: a = b \(train, val\)"):
            splits.refuse_leakage([row("a", pixels="x", split="train"), row("b", pixels="x", split="val")])
        splits.refuse_leakage([row("a", patient="p", split="test"), row("b", patient="p", split="recent")])

    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            (("train", 1), "the train split has no images of 'opacity'"),
            (("val", 0), "the val split has no images of 'normal'"),
            (("test", None), r"the test split has no images of 'normal', 'opacity'.*raise splits\.test"),
        ],
    )
    def test_one_class(self, missing: tuple[str, int | None], message: str) -> None:
        rows = [row(f"{s}{i}", split=s, label=i) for s in ("train", "val", "test") for i in (0, 1)]
        splits.require_classes(rows, LABELS)
        left = [r for r in rows if not (r.split == missing[0] and missing[1] in (None, r.label))]
        with pytest.raises(DataError, match=message):
            splits.require_classes(left, LABELS)

    def test_one_class_data_set(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data")
        write_table(home / "data.csv", [item | {"label": "normal"} for item in rows])
        with pytest.raises(DataError, match="the train split has no images of 'opacity'"):
            ingest(project(data=files()))

    def test_empty_validation(self, project: Project) -> None:
        with pytest.raises(DataError, match=r"the val split has no images of 'normal', 'opacity'.*raise splits\.val"):
            ingest(project(splits={"val": 0.0, "test": 0.3}))

    def test_duplicates(self) -> None:
        rows = [
            row("t1", pixels="t", split="test"),
            row("t2", pixels="t", split="test"),
            row("v1", pixels="t", split="val"),
            row("a", pixels="t", split="train"),
            row("b", pixels="x", split="train"),
            row("c", pixels="x", split="train", label=1),
            row("r", pixels="r", split="reserve"),
            row("capture-1", pixels="r", source="capture"),
            row("capture-2", pixels="r", source="capture"),
            row("capture-3", pixels="t", source="capture", label=1),
        ]
        kept, refused = splits.drop_duplicates(rows)
        assert [r.id for r in kept] == ["t1", "t2", "b", "r", "capture-1"]
        assert {r.item: r.code for r in refused} == {
            "v1": "duplicate",
            "a": "duplicate",
            "c": "conflicting_label",
            "capture-2": "duplicate",
            "capture-3": "conflicting_label",
        }

    def test_images_without_a_label_train_apart_unless_their_patient_is_held_out(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data", 60)
        known = rows[:40]
        write_table(home / "data.csv", known)
        assert ingest(project(data=files(max_quarantined=1.0))).quarantine_reasons == {"unlabelled": 20}
        record = ingest(project(data=files(unlabelled="keep")), run="kept")
        manifest = read_manifest(home / "kept" / "ingest")
        apart = manifest[manifest["split"] == "unlabelled"]
        held_out = quarantine(home, "kept")
        assert set(held_out.values()) == {"held_out"}
        assert set(apart["id"]) | set(held_out) == {row["file"] for row in rows[40:]}
        assert apart["label"].eq(-1).all()
        assert record.splits["unlabelled"] == len(apart) >= 10
        assert manifest.loc[manifest["split"] != "unlabelled", "label"].ge(0).all()

    def test_a_label_that_comes_later_meets_the_patient_where_he_was_drawn(self, project: Project, home: Path) -> None:
        rows = write_folder(home / "data", 60)
        write_table(home / "data.csv", rows[:40])
        ingest(project(data=files(unlabelled="keep")))
        apart = set(read_manifest(home / "run" / "ingest").query("split == 'unlabelled'")["id"])
        write_table(home / "data.csv", rows)
        ingest(project(data=files(unlabelled="keep")), run="later")
        later = read_manifest(home / "later" / "ingest").set_index("id")["split"]
        assert set(later[list(apart)]) == {"train"}
        assert set(later[[row["file"] for row in rows[40:] if row["file"] not in apart]]) <= {"val", "test"}

    def test_of_two_copies_the_one_with_a_label_stays(self) -> None:
        kept, refused = splits.drop_duplicates([row("a", pixels="x", label=-1), row("b", pixels="x", label=1)])
        assert [found.id for found in kept] == ["b"]
        assert [(found.item, found.code) for found in refused] == [("a", "duplicate")]

    def test_digests(self) -> None:
        rows = [row("a", split="train"), row("b", split="test")]
        assert splits.data_digest(rows) == splits.data_digest(rows[::-1])
        assert splits.data_digest(rows) != splits.data_digest([rows[0], row("b", split="test", label=1)])
        assert splits.test_digest(["b", "a"]) == splits.test_digest(["a", "b", "b"]) != splits.test_digest(["a"])


class TestLockedRuns:
    def lock(self, path: Path, digests: list[str]) -> None:
        storage.write_bytes(f"{load(path).root}/locked_test.json", json.dumps({"digests": digests}).encode())

    def test_promotion_of_a_run_does_not_repeat_its_ingestion(self, project: Project, home: Path) -> None:
        path = project()
        first = ingest(path)
        manifest = read_manifest(home / "run" / "ingest")
        written = (home / "run" / "ingest" / "manifest.parquet").stat().st_mtime_ns
        self.lock(path, list(manifest.loc[manifest["split"] == "test", "digest"]))
        assert ingest(path) == first
        assert (home / "run" / "ingest" / "manifest.parquet").stat().st_mtime_ns == written
        assert ingest(path, "run2") == first
        assert ingest(path, "run2") == first

    def test_later_runs_test_on_the_locked_images(self, project: Project, home: Path) -> None:
        path = project()
        first = ingest(path)
        manifest = read_manifest(home / "run" / "ingest")
        self.lock(path, list(manifest.loc[manifest["split"] == "test", "digest"]))
        more = ingest(project(splits={"val": 0.25, "test": 0.4}), "run2")
        assert more.test_digest == first.test_digest
        assert more.splits["test"] == first.splits["test"]
        assert more.splits["recent"] > 0

    def test_another_lock_repeats_the_ingestion(self, project: Project, home: Path) -> None:
        path = project()
        ingest(path)
        manifest = read_manifest(home / "run" / "ingest")
        digests = list(manifest.loc[manifest["split"] == "test", "digest"])[3:]
        self.lock(path, digests)
        assert ingest(path).test_digest == splits.test_digest(digests)

    def test_unusable_lock(self, project: Project) -> None:
        path = project()
        storage.write_bytes(f"{load(path).root}/locked_test.json", b"[]")
        with pytest.raises(DataError, match=r"locked_test\.json: is not a list"):
            ingest(path)
        self.lock(path, ["0" * 64])
        with pytest.raises(DataError, match="1 of the 1 images of the locked test set are missing"):
            ingest(path)


class TestArrays:
    def write(self, path: Path, **changes: Any) -> None:
        arrays = {}
        for split, count, offset in (("train", 40, 0), ("val", 10, 100), ("test", 10, 200)):
            arrays[f"{split}_images"] = np.stack([noise(offset + i) for i in range(count)])
            arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
        np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})

    def source(self, **options: Any) -> dict[str, Any]:
        return {"source": {"kind": "npz", "path": "data.npz", **options}}

    def test_official_split_with_copies(self, project: Project, home: Path) -> None:
        train = np.stack([noise(i) for i in range(40)])
        train[0], train[1], train[2] = noise(200), noise(100), noise(5)
        test = np.stack([noise(200 + i) for i in range(10)])
        test[4] = test[2]
        self.write(home / "data.npz", train_images=train, test_images=test)
        record = ingest(project(data=self.source()))
        assert record.splits == {"train": 37, "val": 10, "test": 10}
        assert quarantine(home) == {
            "train-000000": "duplicate",
            "train-000001": "conflicting_label",
            "train-000005": "conflicting_label",
        }
        manifest = read_manifest(home / "run" / "ingest").set_index("id")
        assert (manifest["split"] == manifest.index.str.partition("-").get_level_values(0)).all()
        images = dict(read_images(home / "run" / "ingest"))
        assert np.array_equal(images["test-000003"], noise(203).astype(np.uint16) * 257)
        assert manifest.loc["test-000003", "label"] == 1

    def test_reserve(self, project: Project, home: Path) -> None:
        self.write(home / "data.npz")
        record = ingest(project(data=self.source(reserve=0.5)))
        assert 8 < record.splits["reserve"] < 32
        assert record.splits["train"] + record.splits["reserve"] == 40
        assert record.splits["test"] == 10

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"val_images": None}, "val_images is missing; expected: <split>_images"),
            (
                {"test_images": np.zeros((10, 4), np.uint8)},
                r"test_images is uint8 \(10, 4\); allowed: uint8, N x rows x columns, or",
            ),
            ({"test_images": np.zeros((10, 4, 4))}, r"test_images is float64"),
            ({"val_labels": np.zeros((9, 1), np.uint8)}, r"val_labels is uint8 \(9, 1\); allowed: integers, 10 x 1"),
            ({"val_labels": np.full((10, 1), 2)}, r"val_labels holds 2; allowed: 0\.\.1 \(normal, opacity\)"),
            ({"val_labels": np.full((10, 1), -1)}, r"val_labels holds -1"),
            ({"val_labels": np.array([[None]] * 10)}, r"is not a usable \.npz file \(ValueError\)"),
        ],
    )
    def test_wrong_arrays(self, project: Project, home: Path, changes: dict[str, Any], message: str) -> None:
        self.write(home / "data.npz", **changes)
        with pytest.raises(DataError, match=message):
            ingest(project(data=self.source()))

    def test_not_an_archive(self, project: Project, home: Path) -> None:
        with pytest.raises(DataError, match=r"data\.npz: is not there"):
            ingest(project(data=self.source()))
        (home / "data.npz").write_bytes(b"PK\x03\x04 half an archive")
        with pytest.raises(DataError, match=r"data\.npz: is not a usable \.npz file"):
            ingest(project(data=self.source()))

    @pytest.mark.skipif(not PNEUMONIA.is_file(), reason="PneumoniaMNIST is not on this machine")
    def test_pneumoniamnist_keeps_its_official_val_and_test(self, project: Project, home: Path) -> None:
        record = ingest(project(data={"source": {"kind": "npz", "path": str(PNEUMONIA)}}, labels=["normal", "pneumonia"]))
        assert record.splits == {"train": 4682, "val": 524, "test": 624}
        assert record.quarantine_reasons == {"duplicate": 26}


def sent(data: bytes) -> bytes:
    """A study as a sender makes it ready."""
    return DOMAIN.deidentify(data, DeidentificationConfig(pixels="trust")).content


class TestCaptures:
    def capture(self, config: ProjectConfig, requests: dict[str, tuple[bytes, str]]) -> None:
        lines = [
            capture_line(name, body, content_type=content_type, time=datetime.now(UTC))
            for name, (body, content_type) in requests.items()
        ]
        uri = f"{captures.folder(config)}/{config.endpoint_name}/AllTraffic/2024/01/01/00/{len(requests)}.jsonl"
        storage.write_bytes(uri, ("\n".join(lines) + "\n").encode())

    def test_labelled_captures_join_the_data(self, project: Project, home: Path) -> None:
        path = project(
            data={"source": {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}, "include_captures": True}
        )
        config = load(path)
        before = ingest(path)
        new = list(studies(40, image_size=48, seed=99, labels=LABELS))
        known = sorted((home / "var" / "storage" / "tiny" / "phantoms").rglob("*.dcm"))[0]
        requests = {f"id{i}": (sent(data), "application/dicom") for i, (data, _) in enumerate(new)}
        requests |= {
            "known": (sent(known.read_bytes()), "application/dicom"),
            "broken": (b"\x89PNG\r\n\x1a\n", "image/png"),
            "odd": (png(noise(1)), "image/png"),
            "unlabelled": (png(noise(2)), "image/png"),
            "json": (json.dumps({"instances": [(noise(3) / 255).tolist()]}).encode(), "application/json"),
        }
        self.capture(config, requests)
        labels = {f"id{i}": label for i, (_, label) in enumerate(new)}
        labels |= {"known": "normal", "broken": "normal", "odd": "tumour", "json": "opacity", "never captured": "normal"}
        captures.add_labels(config, labels)
        after = ingest(path, force=True)
        manifest = read_manifest(home / "run" / "ingest")
        captured = manifest[manifest["source"] == "capture"]
        assert after.captured == len(captured) == 41
        assert set(captured["split"]) == {"train", "val", "recent"}
        assert captured.set_index("id").loc["capture-id1", "label"] == 1
        assert after.test_digest == before.test_digest
        assert quarantine(home) == {
            "capture-known": "duplicate",
            "capture-broken": "undecodable",
            "capture-odd": "unknown_label",
        }

    def test_patient_of_a_capture_stays_on_its_side(self, project: Project, home: Path) -> None:
        path = project(
            data={"source": {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}, "include_captures": True}
        )
        ingest(path)
        base = read_manifest(home / "run" / "ingest").groupby("patient")["split"].first()
        same_people = list(studies(60, image_size=40, seed=3, labels=LABELS))
        self.capture(load(path), {f"id{i}": (sent(d), "application/dicom") for i, (d, _) in enumerate(same_people)})
        captures.add_labels(load(path), {f"id{i}": label for i, (_, label) in enumerate(same_people)})
        ingest(path, force=True)
        manifest = read_manifest(home / "run" / "ingest")
        captured = manifest[manifest["source"] == "capture"]
        assert len(captured) == 60
        expected = base.loc[captured["patient"]].replace("test", "recent")
        assert list(captured["split"]) == list(expected)

    def test_a_run_keeps_to_what_was_captured_at_its_first_start(self, project: Project, home: Path) -> None:
        path = project(
            data={"source": {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}, "include_captures": True}
        )
        config = load(path)
        self.capture(config, {"a": (png(noise(1)), "image/png"), "late": (png(noise(2)), "image/png")})
        captures.add_labels(config, {"a": "normal"})
        before = ingest(path)
        file = next((home / "var" / "storage" / "tiny" / "captures").rglob("2.jsonl"))
        self.capture(config, {"b": (png(noise(3)), "image/png")})  # a file of its own
        file.write_text(file.read_text() + file.read_text().replace('"late"', '"c"'))  # and one that goes on
        captures.add_labels(config, {"late": "normal", "b": "opacity", "c": "opacity"})
        assert ingest(path) == before
        (home / "run" / "ingest" / "result.json").unlink()  # killed before it was published
        assert ingest(path) == before
        assert before.captured == 1
        assert ingest(path, "next").captured == ingest(path, force=True).captured == 3

    def test_captures_are_left_out_unless_asked_for(self, project: Project) -> None:
        path = project()
        first = ingest(path)
        self.capture(load(path), {"x": (png(noise(1)), "image/png")})
        captures.add_labels(load(path), {"x": "normal"})
        assert ingest(path) == first

    def test_captures_without_a_label_are_kept_where_asked_for(self, project: Project, home: Path) -> None:
        source = {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}
        path = project(data={"source": source, "include_captures": True, "unlabelled": "keep"})
        names = [f"id-{i}" for i in range(8)]
        self.capture(load(path), {name: (png(noise(i)), "image/png") for i, name in enumerate(names)})
        record = ingest(path)
        manifest = read_manifest(home / "run" / "ingest")
        apart = manifest[(manifest["split"] == "unlabelled") & (manifest["source"] == "capture")]
        assert set(apart["id"]) | set(quarantine(home)) == {f"capture-{name}" for name in names}
        assert record.captured == len(apart) > 0

    def test_repeated_inference_id_counts_once(self, project: Project, home: Path) -> None:
        path = project(
            data={"source": {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}, "include_captures": True}
        )
        self.capture(load(path), {"x": (png(noise(1)), "image/png")})
        self.capture(load(path), {"x": (png(noise(2)), "image/png"), "y": (png(noise(3)), "image/png")})
        captures.add_labels(load(path), {"x": "normal", "y": "opacity"})
        assert ingest(path).captured == 2
        assert quarantine(home) == {"capture-x": "duplicate"}


class TestDecode:
    def test_every_kind_gives_the_same_image(self) -> None:
        image = noise(1)
        wanted = image / np.float32(255)
        bodies = [
            (png(image), "image/png"),
            (png(image), None),
            (npy(image), "application/x-npy"),
            (npy(image.astype(np.uint16) * 257), None),
            (npy(wanted), "application/x-npy; charset=binary"),
            (npy(wanted.astype(np.float64)), "application/octet-stream"),
            (json.dumps({"instances": [wanted.tolist()]}).encode(), "application/json"),
        ]
        for body, content_type in bodies:
            decoded = decode_one(body, content_type, DOMAIN, Decoding())
            assert np.array_equal(decoded.image, image.astype(np.uint16) * 257)

    def test_pictures_of_other_kinds(self) -> None:
        deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
        assert np.array_equal(decode_one(png(deep), None, DOMAIN, Decoding()).image, deep)
        colour = np.zeros((8, 8, 4), np.uint8)
        colour[..., 0] = colour[..., 3] = 255
        assert np.all(decode_one(png(colour), None, DOMAIN, Decoding()).image == round(0.299 * 65535))
        target = io.BytesIO()
        Image.fromarray(np.full((16, 8), 100, np.uint8)).save(target, "JPEG")
        assert decode_one(target.getvalue(), "image/jpeg", DOMAIN, Decoding()).image.shape == (16, 8)

    def test_studies_are_found_by_type_and_by_signature(self) -> None:
        data, _ = next(studies(1, image_size=32, seed=1, labels=LABELS))
        for content_type in ("application/dicom", "", None, "application/octet-stream"):
            assert decode_one(data, content_type, DOMAIN, Decoding()).patient

    @pytest.mark.parametrize(
        ("body", "content_type", "code"),
        [
            (b"a,b", "text/csv", "unsupported"),
            (b"hello", None, "not_dicom"),
            (b"hello", "image/png", "undecodable"),
            (png(noise(1, 64))[:900], "image/png", "truncated"),
            (png(noise(1))[:20], None, "undecodable"),
            (b"\x93NUMPY\x01\x00", "application/x-npy", "undecodable"),
            (npy(noise(1))[:-1], None, "undecodable"),
            (npy(np.zeros((2, 3, 4), np.uint8)), None, "undecodable"),
            (npy(np.zeros((0, 4), np.uint8)), None, "undecodable"),
            (npy(np.zeros((4, 4), np.int64)), None, "undecodable"),
            (npy(np.full((4, 4), np.nan)), None, "undecodable"),
            (npy(np.full((4, 4), 1.5)), None, "undecodable"),
            (npy(np.array([[None]])), None, "undecodable"),
            (b"{", "application/json", "undecodable"),
            (b'{"instances": 3}', "application/json", "undecodable"),
            (b'{"instances": []}', "application/json", "undecodable"),
            (b'{"instances": [[0.5]]}', "application/json", "undecodable"),
            (b'{"instances": [[[0.5, 2]]]}', "application/json", "undecodable"),
            (b'{"instances": [[[0.5], [0.1, 0.2]]]}', "application/json", "undecodable"),
            (b"[" * 100000, "application/json", "undecodable"),
        ],
    )
    def test_refusals(self, body: bytes, content_type: str | None, code: str) -> None:
        with pytest.raises(Rejected) as caught:
            decode_one(body, content_type, DOMAIN, Decoding())
        assert caught.value.code == code
        assert "\n" not in str(caught.value)

    def test_pickles_are_never_loaded(self, tmp_path: Path) -> None:
        target = io.BytesIO()
        np.save(target, np.array([[print]], dtype=object), allow_pickle=True)
        with pytest.raises(Rejected):
            decode_one(target.getvalue(), "application/x-npy", DOMAIN, Decoding())

    def test_decompression_bombs(self) -> None:
        target = io.BytesIO()
        Image.new("1", (20000, 10000)).save(target, "PNG")
        assert len(target.getvalue()) < 100_000
        with pytest.raises(Rejected) as caught:
            decode_one(target.getvalue(), "image/png", DOMAIN, Decoding())
        assert caught.value.code == "too_large"


def test_images_of_several_writers_are_read_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    shapes = [(10, 5), (3, 7, 3), (1, 1)]
    images = {f"i{i}": np.random.default_rng(i).integers(0, 65536, shapes[i % 3], dtype=np.uint16) for i in range(200)}
    images["columns first"] = np.asfortranarray(np.arange(50, dtype=np.uint16).reshape(10, 5) * 5 * 257)  # of 8 bits
    images["larger than a block"] = np.random.default_rng(1).integers(0, 65536, (2500, 1000), dtype=np.uint16)
    rows = []
    with PixelWriter(tmp_path / "pixels-a.bin") as a, PixelWriter(tmp_path / "pixels-b.bin") as b:
        for i, (name, pixels) in enumerate(images.items()):
            place = (a, b)[i % 2].append(pixels)
            shape = {"rows": pixels.shape[0], "columns": pixels.shape[1], "channels": 3 if pixels.ndim == 3 else 1}
            rows.append(row(name, place=place, **shape))
    with (tmp_path / "pixels-a.bin").open("ab") as file:
        file.write(b"what a killed process leaves")
    write_manifest(tmp_path, [r for r in rows if r.id != "i7"], {})
    found = dict(read_images(tmp_path))
    assert list(found) == list(read_manifest(tmp_path)["id"])
    assert found.keys() == images.keys() - {"i7"}
    assert all(np.array_equal(found[name], images[name]) for name in found)
