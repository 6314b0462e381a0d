"""Similar studies, from the stage that indexes them to the gateway that is asked for them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import INDEX, Bundle, pack, unpack
from cv_factory_ops.cli import main
from cv_factory_ops.config.retrieval import RetrievalConfig
from cv_factory_ops.domain import DeidentificationConfig, open_domain
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.features.index import Index, read_manifest
from cv_factory_ops.features.stores import Between
from cv_factory_ops.preprocessing.shards import open_split, read_rows
from cv_factory_ops.records import DeployRecord, IndexRecord, TrainRecord
from cv_factory_ops.serving.app import create_app
from cv_factory_ops.stage import read_result, run_stage, training_of
from domain_medical.finding import finding
from domain_medical.synthetic import generate, studies
from tests.bundles import free_port, wait_until
from tests.conftest import TINY
from tests.loop import Loop, finished_loop

EFFUSION, CLEAR = "Small effusion on the left.", "Lungs are clear, heart is not enlarged."
RETRIEVAL: dict[str, Any] = {"store": {"kind": "faiss", "index": {"kind": "flat"}}, "retriever": {"kind": "hybrid"}}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """Its first image of every four has a report of an effusion, whatever its label; the others have one of none, or none."""
    home = tmp_path_factory.mktemp("similar")
    generate(home / "data", patients=60, image_size=48, seed=3, labels=TINY["labels"])
    table = pd.read_csv(home / "data" / "labels.csv")
    table["report"] = [(EFFUSION, CLEAR, "", CLEAR)[number % 4] for number in range(len(table))]
    table.to_csv(home / "labels.csv", index=False)
    (home / "data" / "labels.csv").unlink()
    source = {"kind": "files", "path": str(home / "data"), "labels": str(home / "labels.csv")}
    data, gateway = {"source": source, "report_column": "report"}, {"access": {"kind": "open"}}
    with finished_loop(home, data=data, retrieval=RETRIEVAL, gateway=gateway) as found:
        yield found


@pytest.fixture(autouse=True)
def in_its_home(loop: Loop, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in loop.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bundle(loop: Loop) -> Bundle:
    return Bundle.load(Path(storage.local(TrainRecord.model_validate(read_result(loop.run, "train").record).bundle, loop.home)))


@pytest.fixture
def folder(loop: Loop) -> Path:
    return storage.local(IndexRecord.model_validate(read_result(loop.run, "index").record).index, loop.home)


@pytest.fixture
def index(folder: Path, bundle: Bundle) -> Iterator[Index]:
    with Index.open(folder, bundle.digest) as found:
        yield found


def rows_of(loop: Loop, split: str) -> pd.DataFrame:
    return read_rows(loop.home / "runs" / "first" / "preprocess", split)


def images_of(loop: Loop, split: str) -> NDArray[Any]:
    return open_split(loop.home / "runs" / "first" / "preprocess", split)[:]


def study() -> bytes:
    """A phantom that is none of the project's, de-identified."""
    [(found, _)] = studies(1, image_size=48, seed=99, labels=["normal", "opacity"])
    return open_domain("medical").deidentify(found, DeidentificationConfig()).content


VECTORS = """
import sys
import numpy as np
from pathlib import Path
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.engine import open_engine
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.preprocessing.shards import open_split

bundle = Bundle.load(Path(sys.argv[1]))
predictor = Predictor(bundle, open_engine(bundle, "openvino", 1).network)
images = open_split(Path(sys.argv[2]), "train")[:]
for kind in ("embedding", "components"):
    one_by_one = [predictor.vectors(predictor.forward(images[i : i + 1])[1], kind) for i in range(len(images))]
    np.save(f"{sys.argv[3]}/{kind}.npy", np.concatenate(one_by_one))
"""


def test_the_index_is_a_stage_of_the_training_and_goes_to_the_endpoint(loop: Loop, bundle: Bundle, folder: Path) -> None:
    assert "index" in training_of(loop.config)
    manifest, deployed = read_manifest(folder), DeployRecord.model_validate(read_result(loop.run, "deploy").record)
    labelled = sum(len(rows_of(loop, split)) for split in ("train", "val"))
    assert (manifest.bundle_digest, manifest.count) == (bundle.digest, labelled)
    assert deployed.bundle_digest == bundle.digest
    with_index = bundle.with_index(folder, loop.home / "release")
    assert with_index.digest == bundle.digest != with_index.packed_digest
    assert with_index.packed_digest[:12] in deployed.model_name
    archive = loop.config.root.removeprefix("file://") + f"/models/{with_index.packed_digest}/model.tar.gz"
    unpack(Path(archive), loop.home / "unpacked")
    assert (loop.home / "unpacked" / INDEX / "index.json").exists()


def test_an_image_has_the_same_vector_bit_for_bit_wherever_it_is_embedded(loop: Loop, bundle: Bundle, index: Index) -> None:
    """Another process, other batches, another number of threads; the stage has embedded 64 at a time."""
    shards = loop.home / "runs" / "first" / "preprocess"
    subprocess.run([sys.executable, "-c", VECTORS, bundle.path, shards, loop.home], check=True)
    embedded, ids = np.load(loop.home / "embedding.npy"), list(rows_of(loop, "train")["id"])
    found = [index.store.search(vector, 1)[0] for vector in embedded]
    assert [match.item.id for match in found] == ids
    for kind, dimensions in (("embedding", 16), ("components", 8)):
        settings = RetrievalConfig.model_validate({"store": {"kind": "faiss", "metric": "l2"}, "vector": kind})
        run_stage("index", loop.config.model_copy(update={"retrieval": settings}), copied(loop, kind))
        with Index.open(loop.home / "runs" / kind / "index" / "index", bundle.digest) as other:
            assert other.manifest.dimensions == dimensions
            assert other.store.vectors(ids).tobytes() == np.load(loop.home / f"{kind}.npy").tobytes()


def copied(loop: Loop, name: str) -> str:
    """The run up to its training under another name."""
    for stage in ("ingest", "preprocess", "train"):
        source, target = loop.home / "runs" / "first" / stage, loop.home / "runs" / name / stage
        shutil.copytree(source, target)
        (target / "result.json").write_text((target / "result.json").read_text().replace("/runs/first", f"/runs/{name}"))
    return (loop.home / "runs" / name).as_uri()


def test_an_index_of_another_bundle_is_refused(loop: Loop, folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"was made for bundle .*, not for 0000"):
        Index.open(folder, "0" * 64)
    other = bundle.with_index(folder, tmp_path / "bundle")
    (other.path / "reference.parquet").write_bytes((other.path / "reference.parquet").read_bytes() + b" ")
    with pytest.raises(DataError, match="was made for bundle"):
        create_app(other.path)


def test_an_index_that_has_lost_vectors_is_refused(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "index")
    manifest = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(manifest | {"count": manifest["count"] + 1}))
    with pytest.raises(DataError, match=r"holds \d+ vectors, not \d+"):
        Index.open(copy, bundle.digest)


def test_neighbours_are_of_different_patients_and_as_the_filter_wants_them(loop: Loop, index: Index) -> None:
    (vector,) = index.store.vectors([rows_of(loop, "train")["id"][0]])
    found = index.similar(vector, 10, index.where([("label", "normal")]))
    assert len({each.patient for each in found}) == len(found) == 10
    assert {each.label for each in found} == {"normal"}
    every = index.similar(vector, 100)
    patients = {*rows_of(loop, "train")["patient"], *rows_of(loop, "val")["patient"]}
    assert {each.patient for each in every} == patients
    assert len(every) == len(patients)
    assert len(index.similar(vector)) == 5
    own = rows_of(loop, "train")["patient"][0]
    assert every[0].patient == own
    assert {each.patient for each in index.similar(vector, 100, patient=own)} == patients - {own}
    assert not {"split", "position", "label"} & set(every[0].metadata)


def test_words_of_reports_are_found_and_never_told(index: Index) -> None:
    said = {item.id: item.text for item in index.store.items()}
    assert {*said.values()} == {"Small effusion on the left", "Lungs are clear heart is not enlarged", ""}
    vector = index.store.vectors([next(each for each, text in said.items() if not text)])[0]
    before, found = index.similar(vector, 10), index.similar(vector, 10, text="effusion")
    assert sum("effusion" in said[each.id] for each in found) > sum("effusion" in said[each.id] for each in before)
    assert "effusion" in said[found[0].id]
    assert "effusion" not in "".join(each.model_dump_json() for each in found)


def test_a_text_needs_an_index_that_reads_words(loop: Loop, bundle: Bundle, index: Index) -> None:
    with pytest.raises(Rejected, match="kind: hybrid"), dense(loop, bundle) as other:
        other.similar(np.ones(16, np.float32), text="effusion")


@contextmanager
def dense(loop: Loop, bundle: Bundle) -> Iterator[Index]:
    """The same index, searched by vectors alone."""
    folder = shutil.copytree(loop.home / "runs" / "first" / "index" / "index", loop.home / "dense")
    manifest = json.loads((folder / "index.json").read_text())
    manifest["retrieval"]["retriever"] = {"kind": "dense"}
    (folder / "index.json").write_text(json.dumps(manifest))
    with Index.open(folder, bundle.digest) as found:
        yield found


def test_filters_are_read_as_people_write_them(index: Index) -> None:
    number = next(name for name, kind in index.manifest.metadata.items() if kind == "number" and name != "position")
    assert index.where([("label", "normal"), ("label", "opacity"), (number, "40..65")]) == {
        "label": ["normal", "opacity"],
        number: Between(40, 65),
    }
    assert index.where([(number, "40..")]) == {number: Between(40, None)}
    assert index.where([(number, "..65")]) == {number: Between(None, 65)}
    assert index.where([(number, "40")]) == {number: Between(40, 40)}
    for wrong in (("position", "1"), ("nothing", "x"), (number, "old"), (number, "nan"), (number, ""), ("label", "\udcff")):
        with pytest.raises(Rejected):
            index.where([wrong])


def test_cvf_similar_tells_and_draws_the_neighbours_of_the_champion(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "study.dcm").write_bytes(study())
    arguments = ["similar", str(tmp_path / "study.dcm"), "--config", str(loop.path), "--k", "3", "--where", "label:opacity"]
    done = loop.cvf(*arguments, "--out", str(tmp_path / "similar.png"))
    assert done.returncode == 0, done.stderr
    told, header, *lines = done.stdout.splitlines()
    assert told.startswith("the model answers ")
    assert header.split() == ["label", "distance", "patient", "study", "image"]
    assert [line.split()[:2] for line in lines] == [["1", "opacity"], ["2", "opacity"], ["3", "opacity"]]
    drawn = cv2.imread(str(tmp_path / "similar.png"))
    assert drawn is not None
    assert drawn.shape[1] > 3 * drawn.shape[0] / 2
    assert drawn.std() > 10


def test_cvf_similar_looks_for_words(loop: Loop, index: Index, tmp_path: Path) -> None:
    (tmp_path / "study.dcm").write_bytes(study())
    arguments = ["similar", str(tmp_path / "study.dcm"), "--config", str(loop.path), "--k", "1", "--text", "effusion left"]
    done = loop.cvf(*arguments)
    assert done.returncode == 0, done.stderr
    [item] = index.store.get([done.stdout.splitlines()[-1].split()[-1]])
    assert item is not None
    assert item.text == "Small effusion on the left"
    assert "effusion" not in done.stdout + done.stderr


def test_cvf_similar_finds_an_indexed_image_first(loop: Loop, tmp_path: Path) -> None:
    rows = rows_of(loop, "val")
    path = tmp_path / "image.npy"
    np.save(path, images_of(loop, "val")[0] / 65535)
    done = loop.cvf("similar", str(path), "--config", str(loop.path), "--run", loop.run, "--k", "1")
    assert done.returncode == 0, done.stderr
    *_, distance, _, _, found = done.stdout.splitlines()[-1].split()
    assert found == rows["id"][0]
    assert float(distance) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--k", "0"], 2, "--k: 0 given; allowed: 1 to 100"),
        (["--where", "label"], 2, "--where: a filter is a name and a value"),
        (["--where", "colour:red"], 2, "--where: a filter by 'colour' given; allowed: "),
        (["--out", "similar.jpg"], 2, "similar.jpg: .jpg given; allowed: .png"),
        (["--run", "runs/none"], 3, "run `cvf train`"),
    ],
)
def test_cvf_similar_says_what_is_wrong_in_a_line(
    loop: Loop, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], code: int, told: str
) -> None:
    np.save(tmp_path / "image.npy", np.zeros((48, 48), np.float32))
    assert main(["similar", str(tmp_path / "image.npy"), "--config", str(loop.path), *more]) == code
    errors = capfd.readouterr().err
    assert told in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_without_retrieval_there_is_nothing_to_index(loop: Loop) -> None:
    done = loop.cvf("index", "--config", str(loop.path), "--run", loop.run, "--set", "retrieval=null", "--force")
    assert done.returncode == 2
    assert "retrieval: not set" in done.stderr


@pytest.fixture(scope="module")
def container(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The serving application with the run's bundle and index, as they come out of ``model.tar.gz``."""
    folder = tmp_path_factory.mktemp("container")
    run = loop.home / "runs" / "first"
    released = Bundle.load(run / "train" / "bundle").with_index(run / "index" / "index", folder / "release")
    pack(released.path, folder / "model.tar.gz")
    unpack(folder / "model.tar.gz", folder / "model")
    with TestClient(create_app(folder / "model")) as client:
        yield client


def ask(client: TestClient, attributes: str, **headers: str) -> Any:
    given = {"content-type": "application/dicom", "x-amzn-sagemaker-custom-attributes": attributes, **headers}
    return client.post("/invocations", content=study(), headers=given)


def test_the_container_answers_with_similar_studies_and_a_finding(container: TestClient) -> None:
    found = ask(container, "similar=4&label=normal").json()
    assert [each["label"] for each in found["similar"][0]] == ["normal"] * 4
    distances = [each["distance"] for each in found["similar"][0]]
    assert len(set(distances)) > 1
    answer = found["predictions"][0]
    assert found["findings"] == [finding(answer["label"], answer["scores"][answer["label"]], False, ["normal"] * 4)]
    assert answer == ask(container, "").json()["predictions"][0]
    assert 'kind="similar",status="200"' in container.get("/metrics").text
    assert found["index"].startswith(f"tiny_{found['bundle_digest'][:12]}_")
    assert [len(ask(container, more).json()["similar"][0]) for more in ("similar", "similar=&label=normal")] == [5, 5]


def test_the_container_looks_for_words(container: TestClient, index: Index) -> None:
    answer = ask(container, "similar=1&text=effusion+left")
    [item] = index.store.get([answer.json()["similar"][0][0]["id"]])
    assert item is not None
    assert item.text == "Small effusion on the left"
    assert "effusion" not in answer.text


def test_a_report_says_what_similar_patients_have(container: TestClient) -> None:
    report = pydicom.dcmread(io.BytesIO(ask(container, "similar=5", accept="application/dicom").content))
    said = json.dumps(report.to_json_dict())
    assert "of 5 similar studies" in said
    plain = pydicom.dcmread(io.BytesIO(ask(container, "", accept="application/dicom").content))
    assert "similar" not in json.dumps(plain.to_json_dict())


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ("similar=0", "custom_attributes"),
        ("similar=101", "custom_attributes"),
        ("similar=" + "9" * 5000, "custom_attributes"),
        ("explain=grad_cam&similar=5", "custom_attributes"),
        ("similar=5&colour=red", "filter"),
        ("similar=&label=", "filter"),
    ],
)
def test_the_container_refuses_what_it_does_not_know(container: TestClient, attributes: str, code: str) -> None:
    refused = ask(container, attributes)
    assert (refused.status_code, refused.json()["code"]) == (400, code)


def test_a_bundle_without_an_index_says_so(bundle: Bundle) -> None:
    with TestClient(create_app(bundle.path)) as client:
        refused = ask(client, "similar=5")
        assert (refused.status_code, refused.json()["code"]) == (400, "no_index")


def test_the_gateway_answers_with_similar_studies(loop: Loop, index: Index) -> None:
    from cv_factory_ops.gateway.app import create_app as create_gateway

    with TestClient(create_gateway(loop.config)) as client:
        kind = {"content-type": "application/dicom"}
        found = client.post("/similar?k=3&where=label:opacity", content=study(), headers=kind)
        assert found.status_code == 200, found.text
        assert [each["label"] for each in found.json()["similar"]] == ["opacity"] * 3
        assert "of 3 similar studies 3 have opacity" in found.json()["finding"]
        [first] = client.post("/similar?k=1&text=effusion left, 4.5.2026", content=study(), headers=kind).json()["similar"]
        [item] = index.store.get([first["id"]])
        assert item is not None
        assert item.text == "Small effusion on the left"
        for query, status, code in (
            ("k=0", 422, "invalid"),
            ("where=label", 400, "filter"),
            ("where=colour:red", 400, "filter"),
            (f"where=label:{'n' * 1100}", 400, "filter"),
            (f"text={'n' * 501}", 422, "invalid"),
        ):
            refused = client.post(f"/similar?{query}", content=study(), headers=kind)
            assert (refused.status_code, refused.json()["code"]) == (status, code)


def test_drift_checks_and_retraining_read_answers_with_similar_studies(loop: Loop) -> None:
    from cv_factory_ops.gateway.app import create_app as create_gateway

    with TestClient(create_gateway(loop.config)) as client:
        kind = {"content-type": "application/dicom"}
        inference_id = client.post("/similar", content=study(), headers=kind).json()["inference_id"]
    wait_until(lambda: inference_id in {item.inference_id for item in captures.read(loop.config)})
    record = run_stage("drift", loop.config, (loop.home / "runs" / "check").as_uri()).record
    assert record["requests"] >= 1


def test_a_store_that_is_away_costs_similar_studies_alone(loop: Loop, bundle: Bundle, tmp_path: Path) -> None:
    """Of a server that nobody answers for; the container starts and answers all the same."""
    index = shutil.copytree(loop.home / "runs" / "first" / "index" / "index", tmp_path / "index")
    manifest = json.loads((index / "index.json").read_text())
    away = {"kind": "weaviate", "url": f"http://127.0.0.1:{free_port()}", "grpc_port": free_port()}
    manifest["retrieval"]["store"] = away
    (index / "index.json").write_text(json.dumps(manifest))
    served = bundle.with_index(index, tmp_path / "served")
    with TestClient(create_app(served.path)) as client:
        assert ask(client, "").status_code == 200
        refused = ask(client, "similar=5")
        assert (refused.status_code, refused.json()["code"]) == (503, "index_unavailable")
        assert "127.0.0.1" not in refused.text


def test_a_finding_is_one_line_that_names_doubts() -> None:
    assert finding("opacity", 0.934, False, ["opacity"] * 4 + ["normal"]) == (
        "opacity (probability 0.93); of 5 similar studies 4 have opacity, 1 has normal"
    )
    assert "a person should decide" in finding("opacity", 0.5, True, [])
    assert finding("opacity", 0.9, False, ["normal"] * 3).endswith("most of them have another label")
