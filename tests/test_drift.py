"""Stage ``drift`` on real parts: a bundle on disk, captures as the endpoint writes them, MLflow in SQLite, Evidently."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import Bundle, BundleManifest, Pca, missing_to_nan
from cv_factory_ops.config import DataConfig, DriftConfig, MlflowConfig, NpzSource, PreprocessingConfig, ProjectConfig, SmallCnn
from cv_factory_ops.domain import Kind
from cv_factory_ops.drift import detect
from cv_factory_ops.drift.report import evidently_verdict
from cv_factory_ops.drift.window import Cursor, consume, read_cursor, read_window
from cv_factory_ops.errors import DataError, Unavailable
from cv_factory_ops.records import DriftRecord, Result
from cv_factory_ops.stage import Stage, run_stage

KINDS: dict[str, Kind] = {
    "image_mean": "number",
    "image_sharpness": "number",
    "metadata_kvp": "number",
    "metadata_manufacturer": "category",
    "metadata_photometric": "category",
    "score": "number",
}


def quiet(rng: np.random.Generator, size: int) -> list[dict[str, str | float | None]]:
    """Features of ordinary studies."""
    return [
        {
            "image_mean": float(rng.normal(0.5, 0.1)),
            "image_sharpness": float(rng.normal(-4, 0.5)),
            "metadata_kvp": None if rng.random() < 0.1 else float(rng.choice([80.0, 110.0, 125.0])),
            "metadata_manufacturer": str(rng.choice(["Alpha", "Beta", "Gamma"], p=[0.6, 0.38, 0.02])),
            "metadata_photometric": "MONOCHROME2",
            "score": float(rng.beta(2, 5)),
        }
        for _ in range(size)
    ]


def table(rows: list[dict[str, str | float | None]]) -> pd.DataFrame:
    return pd.DataFrame([missing_to_nan(row, KINDS) for row in rows])


@dataclass
class Project:
    """A project with a promoted champion, and the hand that writes its captures."""

    config: ProjectConfig
    digest: str
    runs: str
    written: int = 0

    def capture(self, rows: list[dict[str, str | float | None]], digest: str = "") -> None:
        """One capture file, one line a request."""
        predictions = [{"label": "a", "score": 0.1, "scores": {"a": 0.9, "b": 0.1}, "features": row} for row in rows]
        answers = [{"predictions": [prediction], "bundle_digest": digest or self.digest} for prediction in predictions]
        self.capture_answers([json.dumps(answer).encode() for answer in answers])

    def capture_answers(self, answers: list[bytes]) -> None:
        time = datetime(2026, 3, 1, 10, tzinfo=UTC)
        lines = [
            captures.encode(
                event_id=f"{self.written}-{i}",
                inference_id=f"study-{self.written}-{i}",
                time=time,
                request=b"pixels",
                content_type="application/dicom",
                answer=answer,
                answer_type="application/json",
            )
            for i, answer in enumerate(answers)
        ]
        self.capture_lines(lines)

    def capture_lines(self, lines: list[str]) -> None:
        folder = f"{captures.folder(self.config)}/{self.config.endpoint_name}/AllTraffic/2026/03/01/10"
        storage.write_bytes(f"{folder}/{self.written:03d}.jsonl", ("\n".join(lines) + "\n").encode())
        self.written += 1

    def check(self, name: str, *, force: bool = False) -> DriftRecord:
        result: Result = run_stage("drift", self.config, f"{self.runs}/{name}", force=force)
        return DriftRecord.model_validate(result.record)

    def stage(self, name: str) -> Stage:
        path = storage.path_of(f"{self.runs}/{name}")
        assert path is not None
        return Stage("drift", self.config, path.as_uri(), path)

    def out(self, name: str) -> Path:
        path = storage.path_of(f"{self.runs}/{name}/drift")
        assert path is not None
        return path


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> ProjectConfig:
    for name in ("CVF_STORAGE", "CVF_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return ProjectConfig(
        project=request.node.name.partition("[")[0].lower()[:40].rstrip("_"),
        labels=["a", "b"],
        storage=str(tmp_path / "storage"),
        data=DataConfig(source=NpzSource(path="none.npz")),
        mlflow=MlflowConfig(tracking_uri=tracking_uri),
        drift=DriftConfig(minimum=50, alpha=0.01),
    )


@pytest.fixture
def project(config: ProjectConfig, tmp_path: Path) -> Project:
    bundle = write_bundle(tmp_path / "bundle", table(quiet(np.random.default_rng(0), 150)))
    promote(config, bundle)
    return Project(config, bundle.digest, (tmp_path / "runs").as_uri())


def write_bundle(path: Path, reference: pd.DataFrame) -> Bundle:
    from cv_factory_ops.models import build

    manifest = BundleManifest(
        project="test",
        domain="medical",
        labels=["a", "b"],
        model=SmallCnn(width=4),
        preprocessing=PreprocessingConfig(size=8),
        mean=0.5,
        std=0.2,
        threshold=0.5,
        features=KINDS,
        data_digest="",
        test_digest="",
        code_version="0",
        git_sha="",
    )
    return Bundle.write(path, manifest, build(SmallCnn(width=4), 2), Pca(np.zeros(16), np.eye(2, 16)), reference)


def promote(config: ProjectConfig, bundle: Bundle) -> None:
    """A registered version under the alias champion, tagged as the stage ``register`` tags it."""
    from cv_factory_ops.registry import connect

    client = connect(config)
    client.create_registered_model(config.project)
    tags = {"bundle": bundle.path.as_uri(), "bundle_digest": bundle.digest, "test_digest": ""}
    version = client.create_model_version(config.project, source=bundle.path.as_uri(), tags=tags)
    client.set_registered_model_alias(config.project, "champion", version.version)


def test_quiet_window_is_no_drift_and_says_why(project: Project) -> None:
    project.capture(quiet(np.random.default_rng(1), 80))
    record = project.check("r1")
    assert (record.verdict, record.requests, record.drifted) == ("no drift", 80, {})
    assert record.summary.startswith("no drift: smallest p 0.")
    assert "threshold 0.001" in record.summary  # 0.01 over 6 features and one column of missing values
    assert record.bundle_digest == project.digest


def test_shifted_window_is_drift_with_report_and_picture(project: Project) -> None:
    rows = quiet(np.random.default_rng(1), 80)
    project.capture([row | {"image_sharpness": float(row["image_sharpness"] or 0) - 1} for row in rows])
    record = project.check("r1")
    assert record.verdict == "drift"
    assert list(record.drifted) == ["image_sharpness"]
    assert record.summary.startswith("drift in 1 of 7 features (image_sharpness p=")
    out = project.out("r1")
    assert record.report == record.links["report"] == (out / "report.html").as_uri()
    assert len(pd.read_parquet(out / "features.parquet")) == 80
    assert (out / "drift.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "report.json").read_text())["metrics"]
    (p,) = [item["value"] for item in results if item["config"].get("column") == "image_sharpness"]
    assert p == pytest.approx(record.drifted["image_sharpness"])


def test_unseen_category_and_missing_numbers_are_drift(project: Project) -> None:
    rows = quiet(np.random.default_rng(1), 60)
    project.capture([row | {"metadata_manufacturer": "New", "metadata_kvp": None} for row in rows])
    record = project.check("r1")
    assert set(record.drifted) == {"metadata_manufacturer", "metadata_kvp_missing"}
    page = (project.out("r1") / "report.html").read_text()
    assert "Dataset Drift is detected" in page
    assert all(name in page for name in record.drifted)
    reader = LinkReader()
    reader.feed(page)
    assert reader.tags >= {"html", "script", "body"}
    assert [link for link in reader.links if not link.startswith("data:")] == []


class LinkReader(HTMLParser):
    """Collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(
    ("changed", "column"),
    [
        ({"metadata_manufacturer": "Gamma"}, "metadata_manufacturer"),
        ({"metadata_manufacturer": "Unseen"}, "metadata_manufacturer"),
        ({"metadata_photometric": "MONOCHROME1"}, "metadata_photometric"),
        ({"metadata_photometric": None}, "metadata_photometric"),
        ({"metadata_kvp": None}, "metadata_kvp_missing"),
        ({"metadata_kvp": float("inf")}, "metadata_kvp_missing"),
        ({"score": None}, "score_missing"),
    ],
    ids=["rare", "unseen", "constant changes", "category missing", "number missing", "infinite", "never missing before"],
)
def test_degenerate_columns_are_evidence(changed: dict[str, str | float | None], column: str, share: float) -> None:
    reference, rows = quiet(np.random.default_rng(0), 150), quiet(np.random.default_rng(1), 80)
    window = [row | changed if i < share * len(rows) else row for i, row in enumerate(rows)]
    comparison = detect.compare(table(reference), table(window), KINDS, 0.01)
    assert list(detect.Verdict(detect.p_values(comparison), comparison.threshold).drifted) == [column]


def test_one_unseen_category_is_not_drift(project: Project) -> None:
    rows = quiet(np.random.default_rng(1), 80)
    project.capture([row | {"metadata_manufacturer": "Unseen"} if i == 0 else row for i, row in enumerate(rows)])
    assert project.check("r1").verdict == "no drift"


def test_small_windows_add_up(project: Project) -> None:
    rng = np.random.default_rng(1)
    empty = project.check("r0")
    assert (empty.verdict, empty.report) == ("not enough data", None)
    assert empty.summary == "not enough data: 0 of at least 50 requests, 50 more are needed"
    project.capture(quiet(rng, 12))
    assert project.check("r1").summary == "not enough data: 12 of at least 50 requests, 38 more are needed"
    assert read_cursor(project.config) is None
    project.capture(quiet(rng, 40))
    assert project.check("r2").requests == 52


def test_second_check_takes_only_new_captures(project: Project) -> None:
    rng = np.random.default_rng(1)
    project.capture(quiet(rng, 60))
    first = project.check("r1")
    project.capture(quiet(rng, 70))
    second = project.check("r2")
    assert (first.requests, second.requests) == (60, 70)
    assert (first.window_start, second.window_start) == ("", first.window_end)
    assert project.check("r1", force=True).window_end == first.window_end
    assert project.check("r3").requests == 0


def test_other_bundles_and_broken_lines_are_left_out(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(1)
    project.capture(quiet(rng, 60))
    project.capture(quiet(rng, 9), digest="another")
    project.capture_answers([b"oops", b'{"error": "no"}', b"[1]"])
    project.capture_lines(["{", '{"captureData": 1}'])
    record = project.check("r1")
    assert (record.verdict, record.requests) == ("no drift", 60)
    assert "; 9 answers of another model left out; 3 unreadable answers left out" in record.summary
    assert caplog.text.count("skipped, not a capture record") == 2
    assert project.check("r2").requests == 0


def test_killed_check_takes_the_same_window_again(project: Project) -> None:
    rng = np.random.default_rng(1)
    project.capture(quiet(rng, 60))
    first = project.check("r1")
    cursor = read_cursor(project.config)
    unpublish(project, "r1")  # kill -9 after the cursor was moved and before the folder was published
    project.capture(quiet(rng, 70))
    again = project.check("r1")
    assert (again.requests, again.window_end) == (60, first.window_end)
    assert read_cursor(project.config) == cursor
    assert project.check("r2").requests == 70


def test_captures_of_a_check_that_never_finished_are_not_lost(project: Project) -> None:
    rng = np.random.default_rng(1)
    project.capture(quiet(rng, 60))
    project.check("r1")
    unpublish(project, "r1")
    project.capture(quiet(rng, 70))
    assert project.check("r2").requests == 130
    assert project.check("r1").requests == 0


def unpublish(project: Project, name: str) -> None:
    storage.delete_tree(f"{project.runs}/{name}/drift")


def test_two_checks_do_not_consume_the_same_captures(project: Project) -> None:
    project.capture(quiet(np.random.default_rng(1), 60))
    first, second = project.stage("r1"), project.stage("r2")
    windows = [read_window(stage, project.digest, KINDS) for stage in (first, second)]
    consume(first, windows[0])
    with pytest.raises(Unavailable, match="another drift check has moved it"):
        consume(second, windows[1])
    assert read_cursor(project.config) == Cursor(run=first.run, start="", end=windows[0].end)


def test_without_champion_there_is_one_clear_line(config: ProjectConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"project {config.project}: has no champion to compare with"):
        run_stage("drift", config, (tmp_path / "run").as_uri())


def test_broken_cursor_and_reference_are_named(project: Project, tmp_path: Path) -> None:
    project.capture(quiet(np.random.default_rng(1), 60))
    (tmp_path / "bundle" / "reference.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"reference\.parquet: cannot be read"):
        project.check("r1")
    table(quiet(np.random.default_rng(0), 5))[["score"]].to_parquet(tmp_path / "bundle" / "reference.parquet")
    with pytest.raises(DataError, match="lacks the columns image_mean"):
        project.check("r1")
    storage.write_bytes(f"{project.config.root}/drift/cursor.json", b"{}")
    with pytest.raises(DataError, match=r"cursor\.json: is not a cursor"):
        project.check("r1")


def test_evidently_and_detect_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    reference, window = quiet(rng, 90), quiet(rng, 120)
    window = [row | {"image_mean": float(row["image_mean"] or 0) + 0.05, "metadata_manufacturer": "Gamma"} for row in window]
    comparison = detect.compare(table(reference), table(window).assign(score=np.nan), KINDS, 0.01)
    verdict = evidently_verdict(comparison, tmp_path)
    own = detect.p_values(comparison)
    assert verdict.p_values == pytest.approx(own)
    assert list(verdict.drifted) == list(detect.Verdict(own, comparison.threshold).drifted)
    assert own["score"] == 1.0  # no value in the window: its column of missing values says so
    assert "score_missing" in verdict.drifted


def test_quiet_windows_alarm_no_more_often_than_declared() -> None:
    alpha, windows = 0.1, 300
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(windows):
        comparison = detect.compare(table(quiet(rng, 60)), table(quiet(rng, 50)), KINDS, alpha)
        alarms += bool(detect.Verdict(detect.p_values(comparison), comparison.threshold).drifted)
    assert binomtest(alarms, windows, alpha, alternative="greater").pvalue > 0.01, f"{alarms} of {windows}"
    assert alarms > 0  # the tests are not asleep


def test_category_test_is_exact_where_approximations_fail() -> None:
    rng = np.random.default_rng(6)
    shares = [0.9, 0.06, 0.02, 0.01, 0.01]
    draws = [[pd.Series(rng.choice(list("abcde"), size, p=shares)) for size in (90, 100)] for _ in range(200)]
    alarms = sum(detect.category_p_value(reference, window, 0.05) <= 0.05 for reference, window in draws)
    assert binomtest(alarms, 200, 0.05, alternative="greater").pvalue > 0.01, f"{alarms} of 200"
    same = pd.Series(["a"] * 50)
    assert detect.category_p_value(same, same, 1e-3) == 1.0
    assert detect.category_p_value(same, pd.Series(["b"] * 50), 1e-6) < 1e-6


def test_report_opens_no_connection(tmp_path: Path) -> None:
    program = f"""
import sys
connections = []
sys.addaudithook(lambda event, arguments: connections.append(arguments) if event == "socket.connect" else None)
import numpy as np, pandas as pd
from pathlib import Path
from cv_factory_ops.drift import detect, report
rng = np.random.default_rng(0)
frames = [pd.DataFrame({{"x": rng.normal(size=60), "c": rng.choice(["a", "b"], 60)}}) for _ in range(2)]
report.evidently_verdict(detect.compare(*frames, {{"x": "number", "c": "category"}}, 0.01), Path({str(tmp_path)!r}))
print(connections)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
