"""Phantoms: valid DICOM, the same for the same seed, learnable but not by brightness, and a scanner that differs."""

import csv
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from sklearn.metrics import roc_auc_score

from cv_factory_ops.config.data import Decoding
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.domain import Decoded
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.preprocessing.statistics import image_statistics
from domain_medical import DOMAIN
from domain_medical.synthetic import SCANNERS, SHIFTED_SCANNER, _chest, _Patient, generate, studies

LABELS = ["normal", "opacity"]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def decode(data: bytes) -> Decoded:
    return next(DOMAIN.decode(data, Decoding()))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, patients=6, image_size=48, seed=seed, labels=LABELS)
    first, again, other = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "abc")
    assert first == again
    assert not set(first.values()) & set(other.values()) - {first["labels.csv"]}


def test_files_labels_and_patients(tmp_path: Path) -> None:
    DOMAIN.generate(tmp_path, patients=30, image_size=48, seed=5, labels=LABELS)
    rows = table(tmp_path)
    assert sorted(row["file"] for row in rows) == sorted(f.name for f in tmp_path.glob("*.dcm"))
    patients: dict[str, list[str]] = {}
    for row in rows:
        patients.setdefault(decode((tmp_path / row["file"]).read_bytes()).patient, []).append(row["label"])
    assert len(patients) == 30
    assert {len(labels) for labels in patients.values()} == {1, 2}
    assert all(len(set(labels)) == 1 for labels in patients.values())
    assert [labels[0] for labels in patients.values()].count("opacity") == 15


def test_every_seed_has_patients_of_its_own() -> None:
    one, other = ({decode(data).patient for data, _ in studies(8, image_size=32, seed=seed, labels=LABELS)} for seed in (1, 2))
    assert len(one) == len(other) == 8
    assert not one & other


def test_two_scanners_and_several_depths() -> None:
    decoded = [decode(data).metadata for data, _ in studies(60, image_size=32, seed=3, labels=LABELS)]
    assert {m["photometric"] for m in decoded} == {"MONOCHROME1", "MONOCHROME2"}
    assert {m["model_name"] for m in decoded} == {scanner.model_name for scanner in SCANNERS}
    assert {m["bits_stored"] for m in decoded} == {8.0, 10.0, 12.0, 16.0}
    assert {m["modality"] for m in decoded} == {"CR", "DX"}
    assert len({m["pixel_spacing_mm"] for m in decoded}) == 2


@pytest.mark.parametrize("scanner", [*SCANNERS, SHIFTED_SCANNER])
def test_type_1_attributes_are_there(scanner: object) -> None:
    data, _ = next(studies(1, image_size=32, seed=3, labels=LABELS, scanners=(scanner,)))  # type: ignore[arg-type]
    study = dcmread(BytesIO(data))
    needed = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "PixelData"]
    if study.Modality == "DX":
        needed += ["PresentationIntentType", "ImageLaterality", "ImagerPixelSpacing", "BurnedInAnnotation", "WindowWidth"]
        needed += ["PixelIntensityRelationship", "PresentationLUTShape", "LossyImageCompression", "PatientOrientation"]
        assert (study.RescaleSlope, study.RescaleIntercept) == (1, 0)
    assert [keyword for keyword in needed if study.get(keyword) in (None, "")] == []
    assert str(study.PatientName).startswith("PHANTOM^")


def test_scanners_show_the_same_tissue_alike() -> None:
    means = [
        np.mean([decode(d).image.mean() / 65535 for d, _ in studies(20, image_size=32, seed=4, labels=LABELS, scanners=(s,))])
        for s in (*SCANNERS, SHIFTED_SCANNER)
    ]
    assert abs(means[0] - means[1]) < 0.06
    assert means[0] - means[2] > 0.1


def test_brightness_does_not_tell_the_label() -> None:
    labels, brightness = [], []
    for data, label in studies(200, image_size=64, seed=6, labels=LABELS):
        labels.append(label == "opacity")
        brightness.append(decode(data).image.mean())
    auc = roc_auc_score(labels, brightness)
    assert max(auc, 1 - auc) < 0.8


@pytest.mark.parametrize("number", range(10))
def test_an_opacity_is_a_bright_spot_in_a_lung_and_nothing_else(number: int) -> None:
    healthy, ill = (_chest(_Patient(6, number, kind, 64), np.random.default_rng(1))[0] for kind in (0, 1))
    added = ill - healthy
    assert added.min() >= 0
    assert 0.05 < added.max() < 0.6
    assert (added > 0.05).mean() < 0.2


def test_the_shifted_scanner_differs_in_noise_and_sharpness() -> None:
    def noise(*scanners: object) -> list[float]:
        made = studies(10, image_size=64, seed=8, labels=LABELS, scanners=scanners)  # type: ignore[arg-type]
        return [image_statistics(prepare(decode(d).image, PreprocessingConfig()))["noise"] for d, _ in made]

    assert min(noise(SHIFTED_SCANNER)) > max(noise(*SCANNERS))


def test_further_labels_have_shapes_of_their_own(tmp_path: Path) -> None:
    made = list(studies(6, image_size=48, seed=9, labels=["clear", "nodule", "band"]))
    assert [label for _, label in made] == ["clear", "nodule", "band"] * 2
    generate(tmp_path, patients=9, image_size=32, seed=9, labels=["clear", "nodule", "band"])
    assert {row["label"] for row in table(tmp_path)} == {"clear", "nodule", "band"}
