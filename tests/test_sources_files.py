"""Files of every kind: archives, DICOMDIR, frames, colours, tables of labels, and the gate that each image passes."""

import csv
import io
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydicom.fileset import FileSet

from cv_factory_ops import storage
from cv_factory_ops.config import as_uri, load
from cv_factory_ops.config.data import Decoding, ValidationConfig
from cv_factory_ops.domain import Decoded, pseudonym
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.ingestion.decode import decode
from cv_factory_ops.ingestion.labels import read_labels
from cv_factory_ops.ingestion.manifest import read_images, read_manifest, read_reports
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.ingestion.validate import check, refusal
from cv_factory_ops.records import IngestRecord
from cv_factory_ops.stage import run_stage
from domain_medical import DOMAIN
from domain_medical.synthetic import studies
from tests.conftest import TINY, retell_place

LABELS = ["normal", "opacity"]
ODD = Path(__file__).parents[2] / "shared" / "data" / "dicom_odd"
Project = Callable[..., Path]


def ingest(path: Path, run: str = "run") -> IngestRecord:
    return IngestRecord.model_validate(run_stage("ingest", load(path), as_uri(run)).record)


def manifest(home: Path, run: str = "run") -> Any:
    return read_manifest(home / run / "ingest").set_index("id")


def quarantine(home: Path) -> dict[str, str]:
    lines = (home / "run" / "ingest" / "quarantine.jsonl").read_text().splitlines()
    return {item["item"]: item["code"] for item in map(json.loads, lines)}


def phantoms(count: int) -> dict[str, tuple[bytes, str]]:
    found = studies(count, image_size=32, seed=1, labels=LABELS)
    return {f"{i:03d}.dcm": study for i, study in enumerate(found)}


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def files(path: str = "data", labels: str = "data.csv", **options: Any) -> dict[str, Any]:
    return {"source": {"kind": "files", "path": path, "labels": labels}, "workers": 1, **options}


def picture(values: NDArray[Any], format: str, **options: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(values).save(target, format, **options)
    return target.getvalue()


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[bytes, str]], IngestRecord]:
    """A home, the phantoms that lie there as plain files, and what ingestion makes of them."""
    home, found = tmp_path_factory.mktemp("ingested"), phantoms(40)
    (home / "data").mkdir()
    for name, (data, _) in found.items():
        (home / "data" / name).write_bytes(data)
    write_table(home / "data.csv", [{"file": name, "label": label} for name, (_, label) in found.items()])
    (home / "project.yaml").write_text(yaml.safe_dump(TINY | {"data": files()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_HOME", str(home))
        patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
        return home, found, ingest(home / "project.yaml")


@pytest.fixture
def plain(ingested: tuple[Path, dict[str, tuple[bytes, str]], IngestRecord], home: Path) -> Any:
    """The phantoms with their labels and their ingestion, in the test's own home."""
    there, found, record = ingested
    shutil.copytree(there, home, dirs_exist_ok=True)
    retell_place(home / "run", there, home)
    return found, record


class TestArchives:
    def test_an_archive_is_read_like_a_folder(self, plain: Any, project: Project, home: Path) -> None:
        found, record = plain
        with zipfile.ZipFile(home / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (data, _) in found.items():
                archive.writestr(name, data)
            archive.writestr("__MACOSX/000.dcm", b"x")
        with tarfile.open(home / "data.tar.gz", "w:gz") as tar:
            tar.add(home / "data", ".")
        for name in ("data.zip", "data.tar.gz"):
            assert ingest(project(data=files(name)), f"run-{name}") == record

    def test_zipped_studies_in_a_folder(self, plain: Any, project: Project, home: Path) -> None:
        found, record = plain
        (home / "zipped").mkdir()
        rows = []
        for name, (data, label) in found.items():
            with zipfile.ZipFile(home / "zipped" / f"{name}.zip", "w") as archive:
                archive.writestr("IMAGES/IM1", data)
            rows.append({"file": f"{name}.zip", "label": label})
        write_table(home / "zipped.csv", rows)
        zipped = ingest(project(data=files("zipped", "zipped.csv")), "run2")
        assert zipped.splits == record.splits
        assert set(manifest(home, "run2").index) == {f"{name}.zip/IMAGES/IM1" for name in found}

    def test_broken_archives_go_to_quarantine(self, plain: Any, project: Project, home: Path) -> None:
        (home / "data" / "cut.zip").write_bytes(b"PK\x03\x04 half an archive")
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w:gz") as tar:
            tar.add(home / "data" / "000.dcm", "x/000.dcm")
        (home / "data" / "cut.tgz").write_bytes(whole.getvalue()[:-500])
        with (home / "data.csv").open("a") as table:
            table.write("cut.zip,normal\ncut.tgz,normal\nspoilt.zip,normal\n")
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.dcm", bytes(range(256)) * 400)
        spoilt = bytearray(whole.getvalue())
        spoilt[40:60] = b"\xff" * 20
        (home / "data" / "spoilt.zip").write_bytes(spoilt)
        assert ingest(project(data=files())).accepted == 40
        assert quarantine(home) == {"cut.zip": "truncated", "cut.tgz": "truncated", "spoilt.zip": "truncated"}

    def test_archive_on_s3(self, plain: Any, project: Project, home: Path, bucket: str) -> None:
        found, record = plain
        with zipfile.ZipFile(home / "data.zip", "w") as archive:
            for name, (data, _) in found.items():
                archive.writestr(name, data)
        storage.upload_file(home / "data.zip", f"s3://{bucket}/in/data.zip")
        assert ingest(project(data=files(f"s3://{bucket}/in/data.zip")), "run2") == record


def test_dicomdir(plain: Any, project: Project, home: Path) -> None:
    found, record = plain
    media = FileSet()
    for name in found:
        media.add(home / "data" / name)
    media.write(home / "media")
    rows = []
    for instance in FileSet(home / "media" / "DICOMDIR"):
        name = Path(instance.path).relative_to(home / "media").as_posix()
        label = next(
            label
            for data, label in found.values()
            if pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID == instance.SOPInstanceUID
        )
        rows.append({"file": name, "label": label})
    write_table(home / "media.csv", rows)
    (home / "media" / "not listed.dcm").write_bytes(b"x")
    listed = ingest(project(data=files("media/DICOMDIR", "media.csv")), "run2")
    assert (listed.splits, listed.quarantined) == (record.splits, 0)
    (home / "media" / "not listed.dcm").unlink()
    assert ingest(project(data=files("media", "media.csv")), "run3").splits == record.splits


class TestLabels:
    @pytest.mark.parametrize("key", ["study", "instance"])
    @pytest.mark.parametrize("pseudonymised", [False, True])
    def test_by_identifier(self, plain: Any, project: Project, home: Path, key: str, pseudonymised: bool) -> None:
        found, _ = plain
        keyword = {"study": "StudyInstanceUID", "instance": "SOPInstanceUID"}[key]
        rows = []
        for data, label in found.values():
            uid = str(pydicom.dcmread(io.BytesIO(data))[keyword].value)
            rows.append({key: DOMAIN.remapped(uid) if pseudonymised else uid, "label": label})
        absent = {key: "1.2.3.4", "label": "normal"}
        write_table(home / "data.csv", [*rows[1:], absent])
        result = ingest(project(data=files()))
        assert result.accepted == 39
        assert quarantine(home) == {"000.dcm": "unlabelled", "labels line 41": "label_without_image"}
        assert "1.2.3.4" not in (home / "run" / "ingest" / "quarantine.jsonl").read_text()

    def test_json_gives_what_csv_gives(self, plain: Any, project: Project, home: Path) -> None:
        found, record = plain
        rows = [{"file": name, "label": label, "patient": None} for name, (_, label) in found.items()]
        (home / "data.json").write_text(json.dumps(rows))
        assert ingest(project(data=files(labels="data.json")), "run2") == record

    def test_a_folder_may_have_one_label(self, plain: Any, project: Project, home: Path) -> None:
        found, record = plain
        for name, (data, label) in found.items():
            (home / "sorted" / label).mkdir(parents=True, exist_ok=True)
            (home / "sorted" / label / name).write_bytes(data)
        write_table(home / "sorted.csv", [{"file": label, "label": label} for label in LABELS])
        assert ingest(project(data=files("sorted", "sorted.csv")), "run2").splits == record.splits

    @pytest.mark.parametrize("text", ["{}", "[1]", '[{"file": "a"}', '[{"file": "a", "label": "Doe^Jane"}]', "[]"])
    def test_wrong_json(self, plain: Any, project: Project, home: Path, text: str) -> None:
        (home / "data.json").write_text(text)
        with pytest.raises(DataError, match=r"data\.json: ") as caught:
            ingest(project(data=files(labels="data.json")), "run2")
        assert "Doe" not in str(caught.value)

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            ('[{"file": "", "label": "normal"}]', "line 1: file is empty"),
            ('[{"file": "a", "label": {"a": 1}}]', "line 1: label is neither a text nor a whole number"),
            ('[{"file": "a", "label": "normal", "patient": ["Doe"]}]', "line 1: patient is neither a text nor a whole number"),
        ],
    )
    def test_cells_that_are_no_text(self, plain: Any, project: Project, home: Path, rows: str, reason: str) -> None:
        (home / "data.json").write_text(rows)
        with pytest.raises(DataError, match=reason):
            ingest(project(data=files(labels="data.json")), "run2")

    def test_numbers_are_labels_too(self, home: Path) -> None:
        (home / "t.json").write_text('[{"file": "a", "label": 0, "patient": 0}]')
        table = read_labels((home / "t.json").as_uri(), ["0", "1"], DOMAIN)
        found = table.of_file("a")
        assert found
        assert (found.label, found.patient) == ("0", pseudonym("0", "patient"))
        assert table.of_file("/b") is None

    @pytest.mark.parametrize("key", ["file", "study"])
    def test_words_of_reports_are_kept_apart_from_the_manifest(
        self, plain: Any, project: Project, home: Path, key: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        found, record = plain
        rows = []
        for name, (data, label) in found.items():
            uid = str(pydicom.dcmread(io.BytesIO(data)).StudyInstanceUID)
            said = "Small effusion, left; seen 12.3.2026 by tel. 555-0100 (MRN A77)." if name == "000.dcm" else ""
            rows.append({key: name if key == "file" else uid, "label": label, "report": said})
        write_table(home / "data.csv", rows)
        with caplog.at_level(logging.DEBUG, logger="cvf"):
            result = ingest(project(data=files(report_column="report")))
        folder = home / "run" / "ingest"
        assert read_reports(folder / "reports.parquet") == {"000.dcm": "Small effusion left seen by tel MRN"}
        assert result.data_digest == record.data_digest
        assert result.reports_digest
        assert "effusion" not in caplog.text
        assert [path.name for path in folder.iterdir() if b"effusion" in path.read_bytes()] == ["reports.parquet"]
        assert "effusion" not in str(manifest(home).to_dict())

    def test_no_report_is_read_where_no_column_is_named(self, plain: Any, project: Project, home: Path) -> None:
        found, record = plain
        rows = [{"file": name, "label": label, "report": "Effusion."} for name, (_, label) in found.items()]
        write_table(home / "data.csv", rows)
        assert ingest(project(data=files())) == record
        assert not (home / "run" / "ingest" / "reports.parquet").exists()

    @pytest.mark.parametrize(
        ("named", "report", "reason"),
        [
            ("findings", "a", r"data\.csv: column findings is missing, which data\.report_column names"),
            ("report", "effusion " * 3000, r"data\.csv: line 2: report has words of 26999 characters; allowed are 20000"),
        ],
    )
    def test_unusable_reports(self, plain: Any, project: Project, home: Path, named: str, report: str, reason: str) -> None:
        write_table(home / "data.csv", [{"file": "000.dcm", "label": "normal", "report": report}])
        with pytest.raises(DataError, match=reason):
            ingest(project(data=files(report_column=named)))

    @pytest.mark.parametrize("data", [TINY["data"], files()])
    def test_a_column_that_cannot_hold_reports_is_refused(self, project: Project, data: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"data\.report_column"):
            load(project(data={**data, "report_column": "patient"}))


class TestNames:
    def test_any_name_of_a_file(self, project: Project, home: Path) -> None:
        names = [f"{odd} {i}.png" for i in range(8) for odd in ("a#1", "b%20c", "d?e", "ä b", "f%41")]
        (home / "my data").mkdir()
        for i, name in enumerate(names):
            (home / "my data" / name).write_bytes(picture(noise(12, 12, seed=i), "PNG"))
        rows = [{"file": name, "label": LABELS[i // 5 % 2]} for i, name in enumerate(names)]
        write_table(home / "my data" / "the labels.csv", rows)
        record = ingest(project(data=files("my data", "my data/the labels.csv")))
        assert (record.accepted, record.quarantined) == (40, 0)

    def test_a_name_that_an_archive_holds_twice(self, plain: Any, project: Project, home: Path) -> None:
        found, _ = plain
        with zipfile.ZipFile(home / "data.zip", "w") as archive:
            for name, (data, _) in found.items():
                archive.writestr(f"/{name}", data)
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("/000.dcm", found["001.dcm"][0])
        record = ingest(project(data=files("data.zip")))
        assert record.accepted == 40
        assert record.quarantine_reasons == {"duplicate_id": 1}


class TestFrames:
    def test_each_frame_may_be_an_image(self, project: Project, home: Path) -> None:
        (home / "data").mkdir()
        for i in range(24):
            first, *more = [Image.fromarray(noise(20, 24, seed=10 * i + j)) for j in range(3)]
            first.save(home / "data" / f"{i}.tiff", save_all=True, append_images=more)
        write_table(home / "data.csv", [{"file": f"{i}.tiff", "label": LABELS[i % 2], "patient": str(i)} for i in range(24)])
        assert ingest(project(data=files())).accepted == 24
        record = ingest(project(data=files(), decoding={"frames": "all"}), "run2")
        assert record.accepted == 72
        images = dict(read_images(home / "run2" / "ingest"))
        assert np.array_equal(images["7.tiff#0002"], noise(20, 24, seed=72).astype(np.uint16) * 257)
        assert manifest(home, "run2").groupby("patient")["split"].nunique().eq(1).all()

    def test_middle_frame_and_all_frames_of_dicom(self) -> None:
        data = Path(pydicom.examples.get_path("ybr_color")).read_bytes()
        every = list(decode(data, None, DOMAIN, Decoding(frames="all")))
        [middle] = decode(data, None, DOMAIN, Decoding())
        assert [image.frame for image in every] == list(range(30))
        assert np.array_equal(middle.image, every[15].image)
        assert not np.array_equal(every[0].image, every[29].image)


class TestColours:
    def test_tiff_png_and_jpeg_keep_their_values(self) -> None:
        deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
        [grey] = decode(picture(deep, "TIFF"), None, DOMAIN, Decoding())
        assert np.array_equal(grey.image, deep)
        values = noise(9, 12, 3)
        for data in (picture(values, "TIFF"), picture(values, "PNG")):
            [image] = decode(data, None, DOMAIN, Decoding(color="rgb"))
            assert np.array_equal(image.image, values.astype(np.uint16) * 257)
            [image] = decode(data, None, DOMAIN, Decoding())
            assert np.abs(image.image - values * 257.0 @ [0.299, 0.587, 0.114]).max() < 0.6

    def test_grey_becomes_three_equal_channels_where_colour_is_asked_for(self) -> None:
        [image] = decode(picture(noise(9, 12), "PNG"), None, DOMAIN, Decoding(color="rgb"))
        assert image.image.shape == (9, 12, 3)
        assert np.array_equal(image.image[..., 0], image.image[..., 2])

    def test_pictures_stand_as_their_exif_says(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        values = np.repeat(np.repeat(noise(2, 3), 16, 0), 16, 1)
        [image] = decode(picture(values, "PNG", exif=exif), None, DOMAIN, Decoding())
        assert np.array_equal(image.image, np.rot90(values, -1).astype(np.uint16) * 257)

    def test_colour_reaches_the_manifest(self, project: Project, home: Path) -> None:
        (home / "data").mkdir()
        for i in range(24):
            (home / "data" / f"{i}.png").write_bytes(picture(noise(9, 12, 3, seed=i), "PNG"))
        write_table(home / "data.csv", [{"file": f"{i}.png", "label": LABELS[i % 2]} for i in range(24)])
        ingest(project(data=files(), decoding={"color": "rgb"}))
        images = dict(read_images(home / "run" / "ingest"))
        assert np.array_equal(images["3.png"], noise(9, 12, 3, seed=3).astype(np.uint16) * 257)
        assert set(manifest(home)["channels"]) == {3}


class TestValidation:
    def test_each_rule_has_its_reason(self, plain: Any, project: Project, home: Path) -> None:
        found, _ = plain
        study = pydicom.dcmread(io.BytesIO(found["000.dcm"][0]))
        changes: dict[str, dict[str, Any]] = {
            "no_patient.dcm": {"PatientID": ""},
            "other.dcm": {"Modality": "MR"},
            "spacing.dcm": {"PixelSpacing": [900.0, 900.0], "ImagerPixelSpacing": [900.0, 900.0]},
        }
        for name, values in changes.items():
            copy = pydicom.dcmread(io.BytesIO(found["000.dcm"][0]))
            for keyword, value in values.items():
                setattr(copy, keyword, value)
            copy.PixelData = bytes(reversed(study.PixelData))
            copy.save_as(home / "data" / name)
        (home / "data" / "tiny.png").write_bytes(picture(noise(20, 4), "PNG"))
        (home / "data" / "strip.png").write_bytes(picture(noise(10, 200), "PNG"))
        (home / "data" / "blank.png").write_bytes(picture(np.full((600, 700), 9, np.uint8), "PNG"))
        extra = [*changes, "tiny.png", "strip.png", "blank.png"]
        with (home / "data.csv").open("a") as table:
            table.writelines(f"{name},normal\n" for name in extra)
        rules = {"required": ["patient", "modality"], "allowed": {"modality": ["CR", "DX"]}}
        record = ingest(project(data=files(validation=rules)))
        assert quarantine(home) == {
            "no_patient.dcm": "missing",
            "other.dcm": "not_allowed",
            "spacing.dcm": "geometry",
            "tiny.png": "missing",
            "strip.png": "missing",
            "blank.png": "missing",
        }
        ingest(project(data=files(validation={"min_side": 9})))
        codes = quarantine(home)
        assert {codes.get(name) for name in ("tiny.png", "strip.png", "spacing.dcm")} == {"geometry"}
        assert codes["blank.png"] == "blank"
        assert record.quarantine_reasons == {"missing": 4, "not_allowed": 1, "geometry": 1}

    def test_a_newborn_has_an_age(self) -> None:
        image = Decoded(noise(9, 9).astype(np.uint16) * 257, metadata={"age_years": 0.0, "modality": None})
        check(image, "", ValidationConfig(required=["age_years"]))
        with pytest.raises(DataError, match="says no modality"):
            check(image, "", ValidationConfig(required=["age_years", "modality"]))

    def test_only_the_item_s_own_fault_is_a_refusal(self) -> None:
        item = Item("a", b"")
        assert refusal(item, DataError("x")).code == "unreadable"
        assert refusal(item, KeyError("Doe^Jane")).reason == "cannot be read (KeyError)"
        with pytest.raises(Unavailable):
            refusal(item, Unavailable("the store does not answer"))

    def test_another_window_is_another_ingestion(self, plain: Any, project: Project, home: Path) -> None:
        before = manifest(home)["digest"]
        ingest(project(data=files(), decoding={"window": {"kind": "fixed", "center": 2000, "width": 8000}}))
        assert not manifest(home)["digest"].equals(before)

    def test_spacing_is_kept_in_mm(self, plain: Any, home: Path) -> None:
        found, _ = plain
        study = pydicom.dcmread(io.BytesIO(found["003.dcm"][0]))
        spacing = study.get("PixelSpacing") or study.ImagerPixelSpacing
        row = manifest(home).loc["003.dcm"]
        assert (row["row_spacing"], row["column_spacing"]) == pytest.approx(tuple(map(float, spacing)))

    @pytest.mark.skipif(not ODD.is_dir(), reason="the collection of odd DICOM files is not on this machine")
    def test_every_odd_file_is_read_or_refused(self, project: Project, home: Path) -> None:
        (home / "odd.csv").write_text("file,label\n.,normal\ntestfiles,opacity\n")
        count = sum(path.is_file() and not path.name.startswith(".") and path.name != "DICOMDIR" for path in ODD.rglob("*"))
        record = ingest(project(data=files(str(ODD), "odd.csv", max_quarantined=1.0)))
        assert record.accepted + record.quarantined == count > 100
        assert not {"crashed", "too_slow", "unreadable"} & record.quarantine_reasons.keys()
