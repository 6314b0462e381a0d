import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cv_factory_ops import storage
from cv_factory_ops.errors import ConfigError, DataError, Unavailable


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to write to, on disk and on S3."""
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    return f"s3://{request.getfixturevalue('bucket')}/store"


def test_what_is_written_is_read(root: str) -> None:
    storage.write_bytes(f"{root}/a/b.txt", b"one")
    storage.write_bytes(f"{root}/a/b.txt", b"two")
    assert storage.read_bytes(f"{root}/a/b.txt") == b"two"
    assert storage.exists(f"{root}/a/b.txt")
    assert not storage.exists(f"{root}/a")
    assert not storage.exists(f"{root}/a/c.txt")


def test_listing_is_sorted_and_goes_on_after_a_name(root: str) -> None:
    for name in ("b/2", "a/1", "b/10"):
        storage.write_bytes(f"{root}/{name}", b"x")
    assert list(storage.listing(root)) == ["a/1", "b/10", "b/2"]
    assert list(storage.listing(root, after="a/1")) == ["b/10", "b/2"]
    assert list(storage.listing(f"{root}/nothing")) == []


def test_a_tree_goes_up_comes_down_and_is_deleted(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "large").write_bytes(os.urandom(9 * 1024 * 1024))  # above the multipart limit
    (folder / "result.json").write_text("{}")
    storage.upload_tree(folder, f"{root}/tree", last="deep/large")
    copy = storage.local(f"{root}/tree", tmp_path / "downloads")
    assert storage.tree_digest(copy) == storage.tree_digest(folder)
    assert storage.local(f"{root}/tree", tmp_path / "downloads") == copy
    storage.write_bytes(f"{root}/tree2/neighbour", b"x")
    storage.delete_tree(f"{root}/tree")
    assert storage.exists(f"{root}/tree2/neighbour")
    assert list(storage.listing(f"{root}/tree")) == []


def test_what_is_missing_is_named(root: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: is not there"):
        storage.read_bytes(f"{root}/nothing.txt")
    with pytest.raises(DataError, match="is not there"):
        storage.local(f"{root}/nothing", tmp_path)


def test_a_missing_bucket_is_one_line(bucket: str) -> None:
    with pytest.raises(DataError, match="s3://no-such-bucket/x: the bucket does not exist"):
        storage.read_bytes("s3://no-such-bucket/x")
    with pytest.raises(DataError, match="the bucket does not exist"):
        storage.write_bytes("s3://no-such-bucket/x", b"")


def test_a_store_that_does_not_answer_may_be_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage._s3.cache_clear()
    with pytest.raises(Unavailable, match="EndpointConnectionError"):
        storage.read_bytes(f"s3://{bucket}/x")


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match="scheme 'http' given; allowed: file://, s3://"):
        storage.read_bytes("http://127.0.0.1/x")


def test_a_full_disk_leaves_the_old_content_and_no_draft(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("64k")
    storage.write_bytes((disk / "a").as_uri(), b"old")
    with pytest.raises(Unavailable, match="no space left on the disk"):
        storage.write_bytes((disk / "a").as_uri(), bytes(1_000_000))
    large = tmp_path / "large"
    large.write_bytes(bytes(1_000_000))
    with pytest.raises(Unavailable, match="no space left on the disk"):
        storage.upload_file(large, (disk / "a").as_uri())
    assert (disk / "a").read_bytes() == b"old"
    assert [item.name for item in disk.iterdir()] == ["a"]
