"""The history of aliases: nothing is lost, nothing can be changed unseen, on files and on S3."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cv_factory_ops import audit, promotion, registry, storage
from cv_factory_ops.audit import Aliases, Change, append, entries, verify
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.errors import DataError


@pytest.fixture
def config(project: Callable[..., Path]) -> ProjectConfig:
    return load(project())


def change(version: int, aliases: Aliases, who: str = "run one") -> Change:
    return Change(
        action="promotion",
        who=who,
        why="verified",
        run="file:///runs/one",
        version=version,
        bundle_digest="b" * 64,
        gate_digest="a" * 64,
        aliases={**aliases, "champion": version},
    )


def promote(config: ProjectConfig, version: int) -> audit.Entry | None:
    return append(config, {}, lambda aliases: None if aliases.get("champion") == version else change(version, aliases))


def files(config: ProjectConfig) -> list[Path]:
    folder = storage.path_of(f"{config.root}/audit")
    assert folder is not None
    return sorted(folder.iterdir())


def cvf(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without MLflow: its import fails, as where it is not installed."""
    code = "import sys; sys.modules['mlflow'] = None; from cv_factory_ops.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments, "--config", str(home / "project.yaml")]
    return subprocess.run(command, env=os.environ | {"CVF_HOME": str(home)}, capture_output=True, text=True, timeout=120)


def test_each_entry_names_the_digest_of_the_one_before(config: ProjectConfig) -> None:
    for version in (1, 2, 3):
        promote(config, version)
    stored = [json.loads(path.read_bytes()) for path in files(config)]
    assert [path.name for path in files(config)] == ["00000001.json", "00000002.json", "00000003.json"]
    digests = [
        hashlib.sha256(json.dumps(item["entry"], sort_keys=True, separators=(",", ":")).encode()).hexdigest() for item in stored
    ]
    assert [item["digest"] for item in stored] == digests
    assert [item["entry"]["previous"] for item in stored] == ["0" * 64, *digests[:2]]
    assert [item["entry"]["before"] for item in stored] == [{}, {"champion": 1}, {"champion": 2}]


def test_what_is_there_already_is_not_written_again(config: ProjectConfig) -> None:
    first = promote(config, 1)
    assert promote(config, 1) == first
    assert len(files(config)) == 1


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def remade(path: Path) -> None:
    """A forger who knows the format and makes the digest anew."""
    item = json.loads(path.read_bytes())
    item["entry"]["change"]["why"] = "because"
    text = json.dumps(item["entry"], sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(item | {"digest": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda paths: edited(paths[1], "verified", "forged"), "entry 2 is broken: it was changed"),
        (lambda paths: edited(paths[3], "verified", "forged"), "entry 4 is broken: it was changed"),
        (lambda paths: remade(paths[1]), "entry 3 is broken: it does not follow entry 2"),
        (lambda paths: paths[2].unlink(), r"entry 3 is broken: 00000003\.json is not there"),
        (lambda paths: paths[0].unlink(), r"entry 1 is broken: 00000001\.json is not there"),
        (lambda paths: paths[1].write_bytes(paths[2].read_bytes()), "entry 2 is broken: it was changed"),
        (lambda paths: paths[2].write_text("{}"), "entry 3 is broken: it cannot be read"),
        (lambda paths: paths[2].write_bytes(b"\xff\x00"), "entry 3 is broken: it cannot be read"),
    ],
)
def test_the_first_broken_entry_is_named(config: ProjectConfig, harm: Callable[[list[Path]], None], named: str) -> None:
    for version in (1, 2, 3, 4):
        promote(config, version)
    assert len(verify(config)) == 4
    harm(files(config))
    with pytest.raises(DataError, match=named):
        verify(config)


def test_a_history_that_was_cut_off_lacks_the_noted_digest(config: ProjectConfig) -> None:
    noted = [promote(config, version) for version in (1, 2, 3)][-1]
    assert noted is not None
    assert len(verify(config, noted.digest)) == 3
    files(config)[-1].unlink()
    assert len(verify(config)) == 2, "the chain alone cannot know"
    with pytest.raises(DataError, match="cut off or made anew"):
        verify(config, noted.digest)


def test_nothing_is_added_to_a_history_with_a_gap(config: ProjectConfig) -> None:
    for version in (1, 2, 3):
        promote(config, version)
    files(config)[1].unlink()
    with pytest.raises(DataError, match=r"2 entries, the last is 00000003\.json"):
        promote(config, 4)


def crowd(config: ProjectConfig, writers: int, each: int) -> list[audit.Entry]:
    """Many writers at once, each of which adds entries of its own."""

    def work(writer: int) -> None:
        for i in range(each):
            append(config, {}, lambda aliases: change(100 * writer + i, aliases, f"run {writer}"))  # noqa: B023 - called at once

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    return list(entries(config))


def test_no_entry_is_lost_where_many_write_at_once(config: ProjectConfig) -> None:
    found = crowd(config, writers=8, each=12)
    assert sorted(entry.change.version for entry in found) == sorted(100 * w + i for w in range(8) for i in range(12))
    assert all(later.before == earlier.change.aliases for earlier, later in itertools.pairwise(found))


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto compares and puts in two steps; S3 does both at once. A lock in the server makes it as S3 is."""
    import threading

    from moto.s3.responses import S3Response

    lock, put = threading.Lock(), S3Response.put_object

    def alone(self: S3Response) -> object:
        with lock:
            return put(self)

    monkeypatch.setattr(S3Response, "put_object", alone)


def test_no_entry_is_lost_on_s3(project: Callable[..., Path], bucket: str, one_at_a_time: None) -> None:
    config = load(project(storage=f"s3://{bucket}/root"))
    found = crowd(config, writers=4, each=5)
    assert sorted(entry.change.version for entry in found) == sorted(100 * w + i for w in range(4) for i in range(5))


def test_an_object_is_created_once(bucket: str, home: Path) -> None:
    for uri in (f"s3://{bucket}/a/b.json", (home / "a" / "b.json").as_uri()):
        assert storage.create_bytes(uri, b"first")
        assert not storage.create_bytes(uri, b"second")
        assert storage.read_bytes(uri) == b"first"
    assert [path.name for path in (home / "a").iterdir()] == ["b.json"], "no draft is left"


def test_the_loser_of_a_race_thinks_again(config: ProjectConfig) -> None:
    """Two promotions see the same champion; the one that comes second must see what the first has done."""
    seen: list[Aliases] = []

    def second(aliases: Aliases) -> Change:
        seen.append(aliases)
        if len(seen) == 1:
            promote(config, 7)  # comes in between
        return change(8, aliases)

    entry = append(config, {}, second)
    assert seen == [{}, {"champion": 7}]
    assert entry is not None
    assert (entry.number, entry.before) == (2, {"champion": 7})


def test_audit_commands_need_no_mlflow(config: ProjectConfig, home: Path) -> None:
    assert cvf(home, "audit", "verify").stdout == f"0 entries, unbroken, nothing lies in {config.root}/audit\n"
    entry = [promote(config, version) for version in (1, 2)][-1]
    assert entry is not None
    checked = cvf(home, "audit", "verify", "--holds", entry.digest)
    assert (checked.returncode, checked.stdout) == (0, f"2 entries, unbroken, the newest is {entry.digest}\n")
    log = cvf(home, "audit", "log")
    header, first, second = log.stdout.splitlines()
    assert header.split()[:2] == ["no", "time"]
    assert "champion ->1" in first
    assert "champion 1>2" in second
    edited(files(config)[0], "verified", "forged")
    broken = cvf(home, "audit", "verify")
    assert (broken.returncode, broken.stdout) == (3, "")
    assert "entry 1 is broken: it was changed after it was written" in broken.stderr


def test_a_reason_cannot_pass_for_an_entry(config: ProjectConfig) -> None:
    forged = change(1, {}).model_copy(update={"why": "fine\n2   2026-01-01 promotion", "override": "an\nexpert"})
    append(config, {}, lambda _: forged)
    assert len(audit.table(list(entries(config))).splitlines()) == 2


FIRST_FORMAT = {
    "entry": {
        "number": 1,
        "time": "2026-01-02T03:04:05.678901Z",
        "before": {},
        "change": {
            "action": "promotion",
            "who": "run one",
            "why": "verified",
            "run": "file:///runs/one",
            "version": 1,
            "bundle_digest": "b" * 64,
            "gate_digest": "a" * 64,
            "evidence": "",
            "evidence_digest": "",
            "override": "",
            "approval": {
                "summary": "version 1 was approved by mara",
                "links": {},
                "approved": True,
                "who": "mara",
                "time": "2026-01-02T03:04:05.678901Z",
                "note": "gr\u00f6\u00dfer",
                "bundle_digest": "b" * 64,
                "gate_digest": "a" * 64,
            },
            "aliases": {"champion": 1},
        },
        "previous": "0" * 64,
    },
    "digest": "65485b5711b27829e516a56f629610f55ed65ce2acc039aeba80f21bec58fb39",
}
"""An entry as the first version of this format wrote it, with the digest that it had then."""


def test_a_history_of_an_earlier_version_stays_whole(config: ProjectConfig) -> None:
    storage.write_bytes(f"{config.root}/audit/00000001.json", json.dumps(FIRST_FORMAT, ensure_ascii=False, indent=1).encode())
    promote(config, 2)
    first, second = verify(config)
    assert first.change.approval is not None
    assert (first.digest, first.change.approval.note) == (FIRST_FORMAT["digest"], "gr\u00f6\u00dfer")
    assert second.previous == first.digest


def test_fields_of_a_later_version_do_not_break_a_history(config: ProjectConfig) -> None:
    entry = json.loads(json.dumps(FIRST_FORMAT["entry"]))
    entry["change"]["signature"] = entry["change"]["approval"]["role"] = "new"
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    content = {"entry": entry, "digest": hashlib.sha256(text.encode()).hexdigest()}
    storage.write_bytes(f"{config.root}/audit/00000001.json", json.dumps(content).encode())
    assert [item.digest for item in verify(config)] == [content["digest"]]
    edited(files(config)[0], '"signature": "new"', '"signature": "old"')
    with pytest.raises(DataError, match="entry 1 is broken: it was changed"):
        verify(config)


@pytest.fixture
def in_mlflow(run: str, config: ProjectConfig) -> ProjectConfig:
    """Versions 1 to 3 in MLflow; 1 is champion there, without a history."""
    client = registry.connect(config)
    client.create_registered_model("tiny")
    for number in (1, 2, 3):
        tags = {"bundle": "b", "bundle_digest": "d", "test_digest": "t", registry.RUN_TAG: f"file:///runs/{number}"}
        client.create_model_version("tiny", run, tags=tags)
    client.set_registered_model_alias("tiny", "champion", "1")
    return config


def move(config: ProjectConfig, version: int, action: str = "promotion", **aliases: int) -> audit.Entry:
    """Make a version champion, and other aliases as they are given."""
    told = change(version, aliases).model_copy(update={"action": action, "run": f"file:///runs/{version}"})
    entry = registry.move(config, lambda _: told)
    assert entry is not None
    registry.connect(config).set_model_version_tag("tiny", str(version), "audit", entry.digest)
    return entry


def test_a_version_deleted_in_mlflow_stops_only_who_asks_for_it(in_mlflow: ProjectConfig) -> None:
    client = registry.connect(in_mlflow)
    move(in_mlflow, 2, previous=1, challenger=3)
    client.set_model_version_tag("tiny", "2", registry.RUN_TAG, "file:///elsewhere")
    assert registry.run_of(in_mlflow, 2) == "file:///runs/2", "the history knows"
    client.delete_model_version("tiny", "1")
    found = registry.champion(in_mlflow)
    assert found is not None
    assert found.version == 2
    client.delete_model_version("tiny", "2")
    with pytest.raises(DataError, match=r"version 2 of model tiny: is not in MLflow any more; `cvf rollback --to`"):
        registry.champion(in_mlflow)
    move(in_mlflow, 3, previous=2)
    again = registry.champion(in_mlflow)
    assert again is not None
    assert again.version == 3, "there is a way out"


@pytest.mark.parametrize("left", [0, 2])
def test_a_history_that_lacks_what_mlflow_has_noted_is_not_gone_on_with(in_mlflow: ProjectConfig, left: int) -> None:
    """Deleted, cut off, or looked for at another place: aliases are not put back, and no second history begins."""
    for version, before in ((2, 1), (3, 2), (1, 3)):
        move(in_mlflow, version, previous=before)
    for path in files(in_mlflow)[left:]:
        path.unlink()
    for asked in (lambda: registry.champion(in_mlflow), lambda: move(in_mlflow, 2)):
        with pytest.raises(DataError, match="cut off or made anew, or `storage` is another"):
            asked()
    assert len(list(entries(in_mlflow))) == left
    client = registry.connect(in_mlflow)
    assert client.get_model_version_by_alias("tiny", "champion").version == 1


def test_a_broken_history_is_not_gone_on_with(in_mlflow: ProjectConfig) -> None:
    for version in (1, 2, 3):
        move(in_mlflow, version)
    edited(files(in_mlflow)[1], "verified", "forged")
    with pytest.raises(DataError, match="entry 2 is broken"):
        move(in_mlflow, 1)


@pytest.fixture
def rolled_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs whose stages would be run again."""
    runs: list[str] = []
    monkeypatch.setattr(promotion, "_run_stages", lambda names, config, run, order: runs.append(run))
    return runs


def test_a_champion_older_than_the_history_can_be_rolled_back_to(in_mlflow: ProjectConfig, rolled_out: list[str]) -> None:
    move(in_mlflow, 2, previous=1)
    promotion.rollback(in_mlflow, None, "worse")
    promotion.rollback(in_mlflow, 1, "worse")
    assert rolled_out == ["file:///runs/1"] * 2


def test_a_second_rollback_without_a_version_goes_to_the_same_one(in_mlflow: ProjectConfig, rolled_out: list[str]) -> None:
    move(in_mlflow, 2, previous=1)
    move(in_mlflow, 1, "rollback", previous=2)
    promotion.rollback(in_mlflow, None, "worse")
    assert rolled_out == ["file:///runs/1"], "not to version 2, which is `previous` now"
    move(in_mlflow, 3, previous=1)
    promotion.rollback(in_mlflow, None, "worse again")
    assert rolled_out == ["file:///runs/1"] * 2
    with pytest.raises(DataError, match="--to: 0 given; allowed is a version that has been champion: 1, 2, 3"):
        promotion.rollback(in_mlflow, 0, "a slip")
