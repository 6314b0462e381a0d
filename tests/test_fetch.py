"""A bundle from the storage, for a container that serves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import boto3
import pytest

from cv_factory_ops import cli
from cv_factory_ops.bundle import Bundle, pack
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle", seed=1)


def archive(bundle: Bundle, home: Path, digest: str) -> Path:
    path = home / "models" / digest / "model.tar.gz"
    path.parent.mkdir(parents=True)
    pack(bundle.path, path)
    return path


def test_an_archive_on_s3_becomes_the_bundle_whose_digest_its_address_says(
    bundle: Bundle, bucket: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"demo/models/{bundle.digest}/model.tar.gz"
    boto3.client("s3").upload_file(str(archive(bundle, home, bundle.digest)), bucket, name)
    assert cli.main(["fetch", f"s3://{bucket}/{name}", str(home / "model")]) == 0
    assert capsys.readouterr().out == f"{bundle.digest}\n"
    assert Bundle.load(home / "model").digest == bundle.digest


def test_a_directory_is_copied_also_over_what_a_killed_try_has_left(bundle: Bundle, home: Path) -> None:
    (home / "model").mkdir()
    (home / "model" / "bundle.json").write_text("{")
    assert cli.main(["fetch", str(bundle.path), str(home / "model")]) == 0
    assert Bundle.load(home / "model").digest == bundle.digest


def test_another_bundle_than_the_address_says_is_refused(
    bundle: Bundle, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = archive(bundle, home, "0" * 64)
    assert cli.main(["fetch", str(path), str(home / "model")]) == 3
    assert f"holds the bundle {bundle.digest}, another than its address says" in capsys.readouterr().err


def test_what_is_no_bundle_is_one_line(bundle: Bundle, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive(bundle, home, bundle.digest)
    path.write_bytes(path.read_bytes()[:100])
    assert cli.main(["fetch", str(path), str(home / "model")]) == 3
    shutil.copytree(bundle.path, home / "part", ignore=shutil.ignore_patterns("bundle.json"))
    assert cli.main(["fetch", str(home / "part"), str(home / "empty")]) == 3
    assert cli.main(["fetch", str(home / "nothing"), str(home / "nowhere")]) == 3
    unusable, missing, nothing = capsys.readouterr().err.splitlines()
    assert "is not a usable model.tar.gz" in unusable
    assert "bundle.json is missing" in missing
    assert "is not there" in nothing
