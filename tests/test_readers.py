"""Processes that decode: a file that hangs, crashes or eats memory costs itself, in bounded time, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cv_factory_ops.config.data import ValidationConfig
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.readers import read_all
from cv_factory_ops.ingestion.sources.item import Item

ODD = Path(__file__).parents[2] / "shared" / "data" / "dicom_odd"
LIMITS = ValidationConfig(max_seconds=3, max_memory=1 << 30)


class Reader:
    """Does what the item's bytes say."""

    def __init__(self, settings: str) -> None:
        self.settings = settings

    def __call__(self, items: Sequence[Item]) -> list[str]:
        return [self._read(item) for item in items]

    def _read(self, item: Item) -> str:
        match item.content:
            case b"hang":
                time.sleep(600)
            case b"spin":
                while True:
                    pass
            case b"crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case b"exit":
                os._exit(3)
            case b"eat":
                bytearray(2 << 30)
        return f"{self.settings} {item.id} {os.environ.get('CVF_PSEUDONYM_KEY')}"


def read(contents: dict[str, bytes], **options: Any) -> list[Any]:
    items = [Item(name, content) for name, content in contents.items()]
    return list(read_all(items, Reader, "read", LIMITS, options.get("workers", 2)))


def test_results_come_in_the_order_of_the_items_with_this_moments_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("one key", "another key"):
        monkeypatch.setenv("CVF_PSEUDONYM_KEY", key)
        assert read({f"{i}": b"" for i in range(50)}) == [f"read {i} {key}" for i in range(50)]


def test_each_broken_file_becomes_a_refusal_and_the_others_are_read() -> None:
    contents = {name: name.rstrip("2").encode() for name in ("hang", "a", "crash", "spin", "b", "exit", "eat", "crash2", "c")}
    results = read(contents)
    codes = [result.code if isinstance(result, Refusal) else "read" for result in results]
    assert codes == ["too_slow", "read", "crashed", "too_slow", "read", "crashed", "too_large", "crashed", "read"]
    assert [result.item for result in results if isinstance(result, Refusal)] == [n for n in contents if n not in "abc"]
    assert results[0].reason == "takes longer than 3 s to read"


def test_refusals_of_the_source_pass_in_their_place() -> None:
    refusal = Refusal("x", "unlabelled", "")
    results = list(read_all([Item("a", b""), refusal, Item("b", b"")], Reader, "read", LIMITS, 1))
    assert results[1] == refusal
    assert len(results) == 3


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    program = (
        "from tests.test_readers import LIMITS, Reader\n"
        "from cv_factory_ops.ingestion.readers import read_all\n"
        "from cv_factory_ops.ingestion.sources.item import Item\n"
        "items = (Item(str(i), b'' if i < 64 else b'spin') for i in range(999))\n"
        "for result in read_all(items, Reader, 'read', LIMITS.model_copy(update={'max_seconds': 600.0}), 2):\n"
        "    print(result, flush=True)\n"
    )
    import psutil

    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for _ in range(9):
        parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


@pytest.mark.skipif(not ODD.is_dir(), reason="the collection of odd DICOM files is not on this machine")
def test_odd_files_end_as_images_or_refusals_within_the_limits(tmp_path: Path) -> None:
    """In a process that has read nothing else, so that its children's memory is that of the readers."""
    program = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from cv_factory_ops.config.data import Decoding, ValidationConfig\n"
        "from cv_factory_ops.ingestion.manifest import Refusal\n"
        "from cv_factory_ops.ingestion.readers import read_all\n"
        "from cv_factory_ops.ingestion.sources.item import Item, Ref\n"
        "from cv_factory_ops.ingestion.validate import Validated, Validation\n"
        "if __name__ == '__main__':\n"
        "    files = sorted(path for path in Path(sys.argv[1]).rglob('*') if path.is_file())\n"
        "    settings = Validation('medical', ['a'], Decoding(frames='all'), ValidationConfig(), Path(sys.argv[2]))\n"
        "    items = (Item(str(i), Ref(path.as_uri()), 'a') for i, path in enumerate(files))\n"
        "    found = list(read_all(items, Validated, settings, ValidationConfig(), 2))\n"
        "    codes = {one.code for one in found if isinstance(one, Refusal)}\n"
        "    rows = [one for several in found if not isinstance(several, Refusal) for one in several]\n"
        "    images = sum(not isinstance(row, Refusal) for row in rows)\n"
        "    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "    print(json.dumps([len(files), len(found), sorted(codes), images, peak]))\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py"), str(ODD), str(tmp_path)]
    environment = os.environ | {"CVF_PSEUDONYM_KEY": "test"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=600)
    files, results, codes, images, peak = json.loads(done.stdout.splitlines()[-1])
    assert results == files
    assert codes == []  # neither crashed nor too slow nor too large
    assert images >= 150
    assert peak < 2 << 20, "KiB"
