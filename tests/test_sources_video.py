"""Videos and streams as a source: which frames are taken, what they are called, and what happens when a camera drops out."""

from __future__ import annotations

import base64
import io
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from typing import Any

import boto3
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cv_factory_ops.config import as_uri, load
from cv_factory_ops.config.sources import VideoSource
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.ingestion.manifest import Refusal, read_manifest
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.ingestion.sources.video import _times, fetch_frames
from cv_factory_ops.stage import run_stage
from cv_factory_ops.storage import read_bytes

FORMATS = [("avi", "MJPG"), ("mp4", "mp4v"), ("mkv", "MJPG")]


def write_video(
    path: Path, count: int = 35, rate: float = 10, codec: str = "MJPG", pictures: NDArray[np.uint8] | None = None
) -> None:
    """Frame ``i`` is of the grey value ``7 i``, where no pictures are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, (64, 48))
    for picture in pictures if pictures is not None else (np.full((48, 64, 3), 7 * i % 256, np.uint8) for i in range(count)):
        writer.write(picture)
    writer.release()


def source(path: Path | str, **options: Any) -> VideoSource:
    return VideoSource(path=str(path), labels="labels.csv", **options)


@pytest.fixture
def inbox(home: Path) -> Inbox:
    return Inbox((home / "inbox").as_uri())


def frames(inbox: Inbox) -> dict[str, NDArray[np.uint8]]:
    found = [item.id for item in inbox.items() if isinstance(item, Item)]
    return {plain(name): np.asarray(Image.open(io.BytesIO(read_bytes(f"{inbox.uri}/{name}")))) for name in found}


def plain(name: str) -> str:
    """The name of a frame without the version of its video."""
    return re.sub(r"/[0-9a-f]{8}/", "/", name)


def refused(inbox: Inbox) -> dict[str, str]:
    return {item.item: item.code for item in inbox.items() if isinstance(item, Refusal)}


class Counting(Inbox):
    """Remembers what was put."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.put_names: list[str] = []

    def put(self, name: str, *given: Any, **more: Any) -> None:
        super().put(name, *given, **more)
        self.put_names.append(plain(name))


class TestFiles:
    @pytest.mark.parametrize(("suffix", "codec"), FORMATS)
    def test_frames_are_sampled_by_time(self, home: Path, inbox: Inbox, suffix: str, codec: str) -> None:
        write_video(home / f"scan.{suffix}", codec=codec)
        fetch_frames(source("scan." + suffix), inbox)
        found = frames(inbox)
        assert list(found) == [f"scan.{suffix}/{time:09d}.png" for time in (0, 1000, 2000, 3000)]
        for image, expected in zip(found.values(), (0, 70, 140, 210), strict=True):
            assert image.shape == (48, 64, 3)
            assert abs(image.astype(int) - expected).max() <= 6  # both codecs are lossy

    @pytest.mark.parametrize(
        ("rate", "every", "times"),
        [
            (30, 0.1, [0, 100, 200, 300]),  # every third frame, though 1/30 s has no exact decimal
            (10, 0.25, [0, 300, 500, 800, 1000]),  # the first frame at or after each multiple
            (10, 0.01, [0, 100, 200, 300]),  # no more than there are
        ],
    )
    def test_the_first_frame_at_or_after_each_multiple_is_taken(
        self, home: Path, inbox: Inbox, rate: float, every: float, times: list[int]
    ) -> None:
        write_video(home / "scan.avi", count=12 if len(times) > 4 or rate > 10 else 4, rate=rate)
        fetch_frames(source("scan.avi", every_seconds=every), inbox)
        assert list(frames(inbox)) == [f"scan.avi/{time:09d}.png" for time in times]

    def test_all_frames_of_a_video_are_of_one_patient(self, home: Path, inbox: Inbox) -> None:
        write_video(home / "videos" / "a.avi")
        write_video(home / "videos" / "site" / "a.avi")
        fetch_frames(source("videos"), inbox)
        patients = {plain(item.id).rpartition("/")[0]: item.patient for item in inbox.items() if isinstance(item, Item)}
        assert patients == {name: pseudonym(name, "video") for name in ("a.avi", "site/a.avi")}
        assert {item.content_type for item in inbox.items() if isinstance(item, Item)} == {"image/png"}

    def test_a_broken_run_goes_on_where_it_stopped(self, home: Path, inbox: Inbox) -> None:
        for name in ("a", "b"):
            write_video(home / "videos" / f"{name}.avi")

        class Full(Inbox):
            def put(self, name: str, *given: Any, **more: Any) -> None:
                if len(self) == 6:
                    raise KeyboardInterrupt
                super().put(name, *given, **more)

        with pytest.raises(KeyboardInterrupt):
            fetch_frames(source("videos"), Full(inbox.uri))
        again = Counting(inbox.uri)
        fetch_frames(source("videos"), again)
        assert again.put_names == ["b.avi/000002000.png", "b.avi/000003000.png"]

    def test_a_finished_video_is_not_opened_again_until_it_changes(
        self, home: Path, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_video(home / "scan.avi")
        fetch_frames(source("scan.avi"), inbox)
        with monkeypatch.context() as patched:
            patched.delattr(cv2, "VideoCapture")
            fetch_frames(source("scan.avi"), Inbox(inbox.uri))

    def test_a_changed_video_gives_its_new_frames_only(self, home: Path, inbox: Inbox) -> None:
        write_video(home / "videos" / "scan.avi")
        write_video(home / "videos" / "scan.avi.more" / "scan.avi")
        fetch_frames(source("videos"), inbox)
        before = {item.id for item in inbox.items() if isinstance(item, Item)}
        write_video(home / "videos" / "scan.avi", pictures=np.full((15, 48, 64, 3), 255, np.uint8))
        fetch_frames(source("videos"), Inbox(inbox.uri))
        found = frames(Inbox(inbox.uri))
        assert {name: image.min() > 240 for name, image in found.items() if name.startswith("scan.avi/")} == {
            "scan.avi/000000000.png": True,
            "scan.avi/000001000.png": True,
        }
        after = {item.id for item in Inbox(inbox.uri).items() if isinstance(item, Item)}
        assert {plain(name) for name in before & after} == {
            f"scan.avi.more/scan.avi/{ms:09d}.png" for ms in range(0, 4000, 1000)
        }

    def test_what_is_no_video_is_refused_among_others(self, home: Path, inbox: Inbox) -> None:
        write_video(home / "videos" / "good.avi")
        (home / "videos" / "broken.mp4").write_bytes(b"\0" * 5000)
        (home / "videos" / "empty.avi").write_bytes(b"")
        (home / "videos" / "labels.csv").write_text("file,label\ngood.avi,normal\n")
        (home / "videos" / "notes.txt").write_text("notes\n" * 100)
        (home / "videos" / ".good.avi.draft.avi").write_bytes(b"")
        fetch_frames(source("videos"), inbox)
        assert refused(inbox) == {"broken.mp4": "not_video", "empty.avi": "not_video"}
        assert len(frames(inbox)) == 4
        write_video(home / "videos" / "broken.mp4", codec="mp4v")
        again = Inbox(inbox.uri)
        fetch_frames(source("videos"), again)
        assert set(refused(again)) == {"empty.avi"}

    def test_a_file_that_breaks_off_gives_what_it_has(self, home: Path, inbox: Inbox) -> None:
        write_video(home / "scan.avi")
        data = (home / "scan.avi").read_bytes()
        (home / "scan.avi").write_bytes(data[: len(data) // 2])
        fetch_frames(source("scan.avi"), inbox)
        assert 1 <= len(frames(inbox)) < 4

    @pytest.mark.parametrize("name", ["scan.avi", "missing.avi", "empty", "notes.txt"])
    def test_nothing_to_read_is_an_error(self, home: Path, inbox: Inbox, name: str) -> None:
        (home / "scan.avi").write_bytes(b"no video")
        (home / "notes.txt").write_text("notes\n" * 100)
        (home / "empty").mkdir()
        with pytest.raises(DataError, match=f"{name}: holds no"):
            fetch_frames(source(name), inbox)

    def test_videos_in_a_bucket(self, home: Path, inbox: Inbox, bucket: str) -> None:
        write_video(home / "scan.avi")
        for key in ("videos/a.avi", "videos/site/b.avi"):
            boto3.client("s3").upload_file(str(home / "scan.avi"), bucket, key)
        fetch_frames(source(f"s3://{bucket}/videos"), inbox)
        assert {name.rpartition("/")[0] for name in frames(inbox)} == {"a.avi", "site/b.avi"}
        alone = Inbox(f"s3://{bucket}/inbox")
        fetch_frames(source(f"s3://{bucket}/videos/a.avi"), alone)
        assert len(frames(Inbox(alone.uri))) == 4
        again = Counting(alone.uri)
        fetch_frames(source(f"s3://{bucket}/videos/a.avi"), again)
        assert again.put_names == []

    def test_a_video_without_times_is_sampled_by_its_rate(self) -> None:
        class Timeless:
            """What OpenCV gives of a raw elementary stream."""

            left = 6

            def grab(self) -> bool:
                self.left -= 1
                return self.left > 0

            def get(self, property: int) -> float:
                return 20.0 if property == cv2.CAP_PROP_FPS else 0.0

        assert list(_times(Timeless())) == [0, 50, 100, 150, 200]


def test_a_video_gives_its_label_to_all_its_frames_and_stays_in_one_split(project: Callable[..., Path], home: Path) -> None:
    random = np.random.default_rng(0)
    rows = ["file,label"]
    for i in range(20):
        write_video(home / "videos" / f"{i}.avi", pictures=random.integers(0, 256, (30, 48, 64, 3), dtype=np.uint8))
        rows.append(f"{i}.avi,{'opacity' if i % 2 else 'normal'}")
    (home / "videos" / "labels.csv").write_text("\n".join(rows))
    path = project(data={"source": {"kind": "video", "path": "videos", "labels": "videos/labels.csv"}})
    run_stage("ingest", load(path), as_uri("run"))
    manifest = read_manifest(home / "run" / "ingest")
    videos = manifest["id"].str.split("/").str[0]
    assert len(manifest) == 60
    assert manifest.groupby(videos)["split"].nunique().eq(1).all()
    assert [int(video.removesuffix(".avi")) % 2 for video in videos] == list(manifest["label"])


class Camera:
    """MJPEG over HTTP: each connection is a list of grey values, after which it drops; after the last one it is gone."""

    def __init__(self, connections: list[list[int]], credentials: str = "", endless: bool = False) -> None:
        self.opened = 0
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                expected = f"Basic {base64.b64encode(credentials.encode()).decode()}"
                if credentials and self.headers.get("Authorization") != expected:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                    self.end_headers()
                    return
                if camera.opened == len(connections):
                    self.send_error(503)
                    return
                values = connections[camera.opened]
                camera.opened += 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                while True:
                    for value in values:
                        self._send(value)
                    if not endless:
                        return

            def _send(self, value: int) -> None:
                picture = cv2.imencode(".jpg", np.full((48, 64, 3), value, np.uint8))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n")

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Who watches may hang up at any time."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def camera() -> Iterator[Callable[..., Camera]]:
    started: list[Camera] = []

    def start(*connections: list[int], **options: Any) -> Camera:
        started.append(Camera(list(connections), **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


class TestStreams:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cv_factory_ops.ingestion.sources.video.FIRST_WAIT", 0.01)

    def test_a_stream_that_drops_is_opened_again(self, camera: Callable[..., Camera], inbox: Inbox) -> None:
        cam = camera([10] * 5, [100] * 5, [200] * 5)
        with pytest.raises(Unavailable, match=r"^http://127\.0\.0\.1:\d+/live: the stream ended or does not answer"):
            fetch_frames(source(f"http://{cam.host}/live", every_seconds=1e-6, reconnects=1, max_seconds=60), inbox)
        assert cam.opened == 3
        found = frames(inbox)
        assert [round(float(image.mean()), -1) for image in found.values()] == [10.0] * 5 + [100.0] * 5 + [200.0] * 5
        assert all(name.startswith("stream/2") and name.endswith("Z.png") for name in found)
        assert len({item.patient for item in inbox.items() if isinstance(item, Item)}) == 1

    def test_frames_are_sampled_by_the_clock(self, camera: Callable[..., Camera], inbox: Inbox) -> None:
        cam = camera([10] * 20)
        with pytest.raises(Unavailable):
            fetch_frames(source(f"http://{cam.host}/", every_seconds=3600, reconnects=0), inbox)
        assert len(frames(inbox)) == 1

    def test_it_ends_when_its_time_is_over(self, camera: Callable[..., Camera], inbox: Inbox) -> None:
        cam = camera([10], endless=True)
        fetch_frames(source(f"http://{cam.host}/", every_seconds=0.1, max_seconds=1), inbox)
        assert 1 <= len(frames(inbox)) <= 10

    def test_a_camera_that_is_away_is_told_and_ffmpeg_is_silent(self, inbox: Inbox) -> None:
        program = (
            "import sys\n"
            "from cv_factory_ops.config.sources import VideoSource\n"
            "from cv_factory_ops.errors import Unavailable\n"
            "from cv_factory_ops.ingestion.sources.inbox import Inbox\n"
            "from cv_factory_ops.ingestion.sources.video import fetch_frames\n"
            "try:\n"
            "    fetch_frames(VideoSource(path=sys.argv[1], labels='', reconnects=1), Inbox(sys.argv[2]))\n"
            "except Unavailable as error:\n"
            "    print(error)\n"
        )
        command = [sys.executable, "-c", program, "rtsp://user:s3cret@127.0.0.1:1/live", inbox.uri]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ended.stdout.startswith("rtsp://127.0.0.1:1/live: the stream ended or does not answer")
        assert ended.stderr == ""

    def test_a_camera_that_says_nothing_counts_as_dropped(self, inbox: Inbox) -> None:
        with create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            with pytest.raises(Unavailable):
                fetch_frames(source(address, timeout=0.5, reconnects=0), inbox)

    def test_a_password_comes_from_the_environment_and_is_never_shown(
        self,
        camera: Callable[..., Camera],
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("CAMERA_USER", "user")
        monkeypatch.setenv("CAMERA_PASSWORD", "s3cret/@:%#")
        cam = camera([10] * 5, credentials="user:s3cret/@:%#")
        path = f"http://${{CAMERA_USER}}:${{CAMERA_PASSWORD}}@{cam.host}/live?token=s3cret"
        with pytest.raises(Unavailable) as failure:
            fetch_frames(source(path, every_seconds=1e-6, reconnects=1), inbox)
        assert len(frames(inbox)) == 5
        assert f"http://{cam.host}/live: " in str(failure.value)
        assert "opening it again" in caplog.text
        assert "s3cret" not in str(failure.value) + caplog.text + "".join(capfd.readouterr())

    def test_a_missing_variable_is_named(self, inbox: Inbox) -> None:
        with pytest.raises(ConfigError, match="the variable NO_SUCH_VARIABLE is not set"):
            fetch_frames(source("rtsp://${NO_SUCH_VARIABLE}@host/"), inbox)
