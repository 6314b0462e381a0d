"""Stage ``drift`` on real parts: a bundle on disk, captures as the endpoint writes them, MLflow in SQLite, Evidently."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cv_factory_ops import storage
from cv_factory_ops.drift.window import consume, read_cursor, read_window
from cv_factory_ops.errors import DataError, Unavailable
from cv_factory_ops.records import Cursor, Reading
from cv_factory_ops.stage import run_stage
from tests.drift import KINDS, Project, project_in, quiet, table


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path, tracking_uri: str) -> Project:
    return project_in(tmp_path, request.node.name, tracking_uri)


def test_quiet_window_is_no_drift_and_says_why(project: Project) -> None:
    project.capture(quiet(np.random.default_rng(1), 80))
    record = project.check("r1")
    assert (record.verdict, record.requests, record.drifted) == ("no drift", 80, {})
    assert record.summary.startswith("no drift: smallest p 0.")
    assert "threshold 0.001" in record.summary  # about 0.01 over 6 features, missing values, and all numbers together
    assert record.bundle_digest == project.digest


def test_shifted_window_is_drift_with_report_and_picture(project: Project) -> None:
    rows = quiet(np.random.default_rng(1), 80)
    project.capture([row | {"image_sharpness": float(row["image_sharpness"] or 0) - 1} for row in rows])
    record = project.check("r1")
    assert record.verdict == "drift"
    assert list(record.drifted) == ["image_sharpness", "numbers_together"]
    assert record.summary.startswith("drift in 2 of 8 features (image_sharpness p=")
    out = project.out("r1")
    assert record.report == record.links["report"] == (out / "index.html").as_uri()
    assert record.links["evidently"] == (out / "report.html").as_uri()
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
    project.capture_answers([b"oops", b'{"error": "no"}', b"[1]", b'{"error": "no study", "code": "identified"}'])
    project.capture_lines(["{", '{"captureData": 1}', ""])
    record = project.check("r1")
    assert (record.verdict, record.requests) == ("no drift", 60)
    assert "; 9 answers of another model left out; 3 unreadable answers left out; 1 refused" in record.summary
    assert "; 2 broken lines left out" in record.summary
    assert record.quality.model_dump(exclude={"missing"}) == {
        "foreign": 9,
        "unreadable": 3,
        "quarantined": 2,
        "refused": {"identified": 1},
    }
    quarantine = [json.loads(line) for line in (project.out("r1") / "quarantine.jsonl").read_text().splitlines()]
    assert [item["reason"] for item in quarantine] == [
        "its answer cannot be read (JSONDecodeError)",
        "its answer cannot be read (KeyError)",
        "its answer cannot be read (TypeError)",
        "is not a capture record (JSONDecodeError)",
        "is not a capture record (KeyError)",
    ]
    assert [item["position"] for item in quarantine][3:] == [f"2026/03/01/10/AllTraffic/003.jsonl#{byte}" for byte in (0, 2)]
    assert "5 could not be read" in caplog.text
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
    assert read_cursor(project.config) == Cursor(run=first.run, start=Reading(), end=windows[0].end)


def test_without_champion_there_is_one_clear_line(project: Project, tmp_path: Path) -> None:
    config = project.config.model_copy(update={"project": "without_champion"})
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
comparison = detect.compare(*frames, {{"x": "number", "c": "category"}}, 0.01)
report.write_report(comparison, detect.judge(comparison), Path({str(tmp_path)!r}))
print(connections)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
