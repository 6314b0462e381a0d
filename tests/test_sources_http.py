"""An HTTP API as a source, against real servers: pages, retries, limits, and what is told to whom."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin

from cv_factory_ops.config.sources import HttpSource
from cv_factory_ops.domain import Decoding, DeidentificationConfig, pseudonym
from cv_factory_ops.errors import ConfigError, DataError, Rejected, Unavailable
from cv_factory_ops.ingestion.decode import decode, without_metadata
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources import downloads
from cv_factory_ops.ingestion.sources.http import at, fetch_images
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.storage import read_bytes
from domain_medical import DOMAIN
from domain_medical.synthetic import studies

SETTINGS = DeidentificationConfig()
Json = dict[str, Any]


@dataclass
class Answer:
    """One answer of a server."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    """The Content-Length that is claimed, where it is not that of the body."""


class Server:
    """Answers what it is given for a path, the last one for ever, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str | None]] = []
        """Path and Authorization of every request."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers.get("Authorization")))
                left = server.answers.get(self.path.partition("?")[0]) or [Answer(status=404)]
                answer = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def page(self, path: str, items: list[Json] | None, **more: Any) -> None:
        self.answers[path] = [Answer(json.dumps({"items": items, **more}).encode())]

    def image(self, path: str, body: bytes, content_type: str = "image/png") -> str:
        self.answers[path] = [Answer(body, headers={"Content-Type": content_type})]
        return self.url + path

    def count(self, path: str) -> int:
        return Counter(asked for asked, _ in self.asked)[path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Callable[[], Server]]:
    started: list[Server] = []

    def start() -> Server:
        started.append(Server())
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def api(server: Callable[[], Server]) -> Server:
    return server()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Back-off is not waited for, only written down."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    return waits


@pytest.fixture
def inbox(home: Path) -> Inbox:
    return Inbox((home / "inbox").as_uri())


def source(api: Server, path: str = "/images", **options: Any) -> HttpSource:
    return HttpSource(url=api.url + path, **{"timeout": 5, "retries": 2, **options})


def fetch(source: HttpSource, inbox: Inbox) -> None:
    fetch_images(source, inbox, DOMAIN, SETTINGS)


def png(seed: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)).save(target, "PNG")
    return target.getvalue()


def refused(inbox: Inbox) -> dict[str, str]:
    return {item.item: item.code for item in inbox.items() if isinstance(item, Refusal)}


def name(id: str) -> str:
    return pseudonym(id.encode(errors="backslashreplace").decode(), "item")


class TestPages:
    def test_items_of_all_pages_arrive(self, api: Server, inbox: Inbox) -> None:
        link = api.image("/files/1.png", png(1))
        api.image("/files/2.png", png(2))
        api.image("/deep/3.png", png(3))
        api.page("/images", [{"id": "A-1", "image": link, "label": "normal"}], next="/images2?cursor=x")
        api.page("/images2", [{"id": 2, "image": "files/2.png", "label": None}], next=f"{api.url}/deep/images3")
        api.page("/deep/images3", [{"id": "3", "image": "3.png", "label": 1}], next=None)
        fetch(source(api), inbox)
        found = {item.id: item for item in inbox.items() if not isinstance(item, Refusal)}
        assert {id: item.label for id, item in found.items()} == {name("A-1"): "normal", name("2"): "", name("3"): "1"}
        assert [read_bytes(f"{inbox.uri}/{name(id)}") for id in ("A-1", "2", "3")] == [png(1), png(2), png(3)]
        assert {item.content_type for item in found.values()} == {"image/png"}

    def test_paths_lead_into_objects_and_lists(self, api: Server, inbox: Inbox) -> None:
        link = api.image("/1", png(1))
        item = {"meta": {"key": "k"}, "content": [{"url": link}], "said": {"finding": "normal"}, "subject": {"mrn": "4711"}}
        api.answers["/images"] = [Answer(json.dumps({"data": {"results": [item]}}).encode())]
        paths = {"items": "data.results", "id": "meta.key", "image": "content.0.url", "label": "said.finding"}
        fetch(source(api, patient="subject.mrn", **paths), inbox)
        [found] = inbox.items()
        assert not isinstance(found, Refusal)
        assert (found.label, found.patient) == ("normal", pseudonym("4711", "patient"))

    def test_a_page_may_be_the_list_itself(self, api: Server, inbox: Inbox) -> None:
        api.answers["/images"] = [Answer(json.dumps([{"id": 1, "image": api.image("/1", png(1))}]).encode())]
        fetch(source(api, items=""), inbox)
        assert len(inbox) == 1

    def test_a_wrong_path_names_what_is_there_but_no_values(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"name": "Doe^Jane", "url": "x", "12345678": 1}])
        with pytest.raises(DataError, match=r"page 1: items: nothing at 'data.items'; in place of 'data': items$"):
            fetch(source(api, items="data.items"), inbox)
        with pytest.raises(DataError, match=r"item 1-1: id: nothing at 'id'; in place of 'id': name, url$"):
            fetch(source(api), inbox)
        with pytest.raises(DataError, match="patient: nothing at 'mrn'"):
            fetch(source(api, id="name", image="url", patient="mrn"), inbox)
        with pytest.raises(DataError, match="leads to str; expected is a list"):
            fetch(source(api, items="items.0.name"), inbox)

    @pytest.mark.parametrize(
        ("id", "message"), [(["a"], "is list; expected is text"), (True, "is bool"), (None, "is empty"), ("", "is empty")]
    )
    def test_an_id_is_text_or_a_whole_number(self, api: Server, inbox: Inbox, id: object, message: str) -> None:
        api.page("/images", [{"id": id, "image": "x"}])
        with pytest.raises(DataError, match=f"item 1-1: id: {message}"):
            fetch(source(api), inbox)

    def test_a_path_through_a_value_names_its_type_alone(self) -> None:
        with pytest.raises(DataError, match=r"nothing at 'a\.b'; there is str"):
            at({"a": "Doe^Jane"}, "a.b", "page 1")

    @pytest.mark.parametrize("next", ["/images", "/images?page=1"])
    def test_pages_that_lead_in_a_circle_end(self, api: Server, inbox: Inbox, next: str) -> None:
        api.page("/images", [], next=next)
        with pytest.raises(DataError, match=r"page [23]: is one that was read before"):
            fetch(source(api), inbox)

    @pytest.mark.parametrize("next", ["ftp://elsewhere/", 7, "http://a:bad/"])
    def test_a_next_that_is_no_address_is_not_taken_for_the_last_page(self, api: Server, inbox: Inbox, next: object) -> None:
        api.page("/images", [], next=next)
        with pytest.raises(DataError, match="next: 'next' leads to no http"):
            fetch(source(api), inbox)

    @pytest.mark.parametrize("body", [b"<html>Doe^Jane</html>", b"", b"\xff", b"[" * 1_000_000], ids=len)
    def test_a_page_that_is_no_json_is_told_without_its_content(self, api: Server, inbox: Inbox, body: bytes) -> None:
        api.answers["/images"] = [Answer(body)]
        with pytest.raises(DataError, match=r"page 1: is not JSON$"):
            fetch(source(api), inbox)

    def test_a_page_that_is_too_large_is_not_read(self, api: Server, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cv_factory_ops.ingestion.sources.http.MAX_PAGE", 1000)
        api.page("/images", [{"filler": "x" * 2000}])
        with pytest.raises(DataError, match="page 1: has more than 1000 bytes"):
            fetch(source(api), inbox)

    def test_an_api_that_lists_nothing_is_told(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [], next="/more")
        api.page("/more", [])
        with pytest.raises(DataError, match="/images: lists no items"):
            fetch(source(api), inbox)


class TestNames:
    @pytest.mark.parametrize("id", ["../../etc/passwd", "/absolute", "a\\b", "4711-Doe", "x" * 5000, ".json", "ü/☃", "\ud800"])
    def test_any_id_becomes_a_name_that_says_nothing(self, api: Server, inbox: Inbox, home: Path, id: str) -> None:
        api.page("/images", [{"id": id, "image": api.image("/1", png(1))}])
        fetch(source(api), inbox)
        assert sorted(path.name for path in (home / "inbox").iterdir()) == [name(id), f"{name(id)}.json"]
        assert not {path.name for path in home.iterdir()} - {"inbox", "var"}

    def test_nothing_that_identifies_is_kept(self, api: Server, inbox: Inbox, home: Path) -> None:
        api.page("/images", [{"id": "MRN4711", "image": api.image("/MRN4711.png", png(1)), "mrn": "MRN4711"}])
        fetch(source(api, patient="mrn"), inbox)
        assert all(b"MRN4711" not in path.read_bytes() for path in (home / "inbox").iterdir())

    def test_an_id_that_comes_twice_is_told(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": api.image(f"/{i}", png(i))} for i in range(2)])
        fetch(source(api), inbox)
        assert refused(inbox) == {f"{name('a')}-1-2": "duplicate_id"}
        assert read_bytes(f"{inbox.uri}/{name('a')}") == png(0)


class TestStudies:
    def test_a_study_is_deidentified_before_it_is_stored(self, api: Server, inbox: Inbox, home: Path) -> None:
        [(study, _)] = list(studies(1, image_size=32, seed=1, labels=["normal", "opacity"]))[:1]
        told = pydicom.dcmread(io.BytesIO(study))
        told.PatientName, told.PatientID, told.PatientIdentityRemoved = "Doe^Jane", "MRN4711", "NO"
        data = io.BytesIO()
        told.save_as(data)
        api.page("/images", [{"id": "s", "image": api.image("/s", data.getvalue(), "application/octet-stream")}])
        fetch(source(api), inbox)
        kept = (home / "inbox" / name("s")).read_bytes()
        assert b"Doe" not in kept
        assert b"MRN4711" not in kept
        assert DOMAIN.recognises(kept)
        [item] = inbox.items()
        assert not isinstance(item, Refusal)
        assert item.content_type == DOMAIN.content_type

    def test_what_says_to_be_a_study_but_is_none_is_refused(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "s", "image": api.image("/s", b"no study", "application/dicom; charset=x")}])
        fetch(source(api), inbox)
        assert refused(inbox) == {name("s"): "not_dicom"}


def tiff(*pages: Image.Image, **more: Any) -> bytes:
    target = io.BytesIO()
    pages[0].save(target, "TIFF", save_all=True, append_images=pages[1:], **more)
    return target.getvalue()


def npy(array: Any) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


class TestPictures:
    @pytest.fixture
    def told(self) -> Image.Exif:
        exif = Image.Exif()
        exif[0x010E], exif[0x013B], exif[0x0112] = "Doe^Jane", "Doe^Jane", 6  # description, artist; turned by 90 degrees
        return exif

    @pytest.mark.parametrize(
        ("format", "mode"),
        [
            *(("PNG", mode) for mode in ("L", "RGB", "I;16", "P", "RGBA")),
            *(("JPEG", mode) for mode in ("L", "RGB")),
            *((format, mode) for format in ("TIFF", "pages") for mode in ("L", "RGB", "I;16", "F", "P", "RGBA")),
        ],
    )
    def test_only_pixels_are_kept_and_none_is_changed(self, told: Image.Exif, mode: str, format: str) -> None:
        values = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
        deep = {"I;16": values.astype(np.uint16) * 257, "F": (values / 255).astype(np.float32)}.get(mode, values)
        picture = Image.fromarray(deep) if mode in {"I;16", "F"} else Image.fromarray(values).convert(mode)
        target = io.BytesIO()
        if format == "PNG":
            note = PngImagePlugin.PngInfo()
            note.add_text("Patient", "Doe^Jane")
            picture.save(target, "PNG", exif=told, pnginfo=note)
        elif format == "JPEG":
            picture.save(target, "JPEG", exif=told, comment=b"Doe^Jane")
        else:
            target.write(tiff(*[picture] * (3 if format == "pages" else 1), tiffinfo={0x010E: "Doe^Jane", 0x0112: 6}))
        assert b"Doe^Jane" in target.getvalue()
        content, content_type = without_metadata(target.getvalue())
        assert b"Doe" not in content
        assert content_type == ("image/tiff" if mode == "F" or format == "pages" else "image/png")
        decoding = Decoding(frames="all", color="rgb")
        before, after = (list(decode(data, None, DOMAIN, decoding)) for data in (target.getvalue(), content))
        assert [image.frame for image in before] == [image.frame for image in after]
        assert before[0].image.shape == (20, 12, 3)
        assert all(np.array_equal(a.image, b.image) for a, b in zip(before, after, strict=True))

    def test_of_an_array_only_its_values_are_kept(self) -> None:
        values = np.arange(12, dtype=np.uint16).reshape(3, 4)
        assert without_metadata(npy(values) + b"Doe^Jane") == (npy(values), "application/x-npy")
        for array in (np.array([["Doe^Jane"]]), np.zeros((2, 2), [("Doe^Jane", "u1")])):
            with pytest.raises(Rejected, match="allowed: uint8"):
                without_metadata(npy(array))

    def test_pages_have_a_limit_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cv_factory_ops.ingestion.decode.MAX_PIXELS", 1000)
        page = Image.new("L", (20, 20))
        without_metadata(tiff(page, page))
        with pytest.raises(Rejected, match="pages of more than 1000 pixels together"):
            without_metadata(tiff(page, page, page))

    def test_the_inbox_keeps_no_metadata(self, api: Server, inbox: Inbox, told: Image.Exif) -> None:
        target = io.BytesIO()
        Image.new("L", (12, 12)).save(target, "JPEG", exif=told)
        api.page("/images", [{"id": "a", "image": api.image("/1", target.getvalue(), "image/jpeg")}])
        fetch(source(api), inbox)
        assert b"Doe" not in read_bytes(f"{inbox.uri}/{name('a')}")
        [item] = inbox.items()
        assert not isinstance(item, Refusal)
        assert item.content_type == "image/png"


class TestRefusals:
    def test_an_image_above_the_limit_is_refused_and_not_read_on(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": "/endless"}])
        api.answers["/endless"] = [Answer(b"x" * 200_000, length=1 << 40)]
        fetch(source(api, max_bytes=100_000), inbox)
        assert refused(inbox) == {name("a"): "too_large"}

    def test_what_another_limit_or_library_may_change_is_asked_for_again(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": api.image("/1", png(1))}])
        fetch(source(api, max_bytes=10), inbox)
        assert refused(inbox) == {name("a"): "too_large"}
        again = Inbox(inbox.uri)
        fetch(source(api), again)
        assert len(again) == 1
        assert refused(again) == {}

    def test_an_image_of_just_the_limit_is_taken(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": api.image("/1", png(1))}])
        fetch(source(api, max_bytes=len(png(1))), inbox)
        assert refused(inbox) == {}

    def test_links_that_lead_nowhere_are_refused_and_asked_again_next_time(
        self, api: Server, server: Callable[[], Server], inbox: Inbox
    ) -> None:
        store = server()
        store.answers["/denied"] = [Answer(status=403)]
        links = ["/missing", f"{store.url}/denied", None, "ftp://x/y", "file:///etc/passwd", 7]
        api.page("/images", [{"id": i, "image": link} for i, link in enumerate(links)])
        fetch(source(api), inbox)
        codes = ["not_found", "denied", "no_image", "no_image", "no_image", "no_image"]
        assert refused(inbox) == {name(str(i)): code for i, code in enumerate(codes)}
        for path, server_ in (("/missing", api), ("/denied", store)):
            server_.image(path, png(1))
        again = Inbox(inbox.uri)
        fetch(source(api), again)
        assert set(refused(again)) == {name(str(i)) for i in range(2, 6)}

    @pytest.mark.parametrize("body", [b"PK\x03\x04 Doe^Jane", b"%PDF-1.7 Doe^Jane", b'{"instances": "Doe^Jane"}'])
    def test_what_is_no_image_is_not_kept(self, api: Server, inbox: Inbox, home: Path, body: bytes) -> None:
        api.page("/images", [{"id": "a", "image": api.image("/1", body, "image/png")}])
        fetch(source(api), inbox)
        assert refused(inbox) == {name("a"): "unsupported"}
        assert all(b"Doe" not in path.read_bytes() for path in (home / "inbox").iterdir())

    def test_an_empty_answer_is_refused(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": api.image("/1", b"")}])
        fetch(source(api), inbox)
        assert refused(inbox) == {name("a"): "empty"}

    def test_links_in_messages_are_hidden(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": "/MRN4711.png"}])
        fetch(source(api), inbox)
        [refusal] = inbox.items()
        assert isinstance(refusal, Refusal)
        assert "MRN4711" not in refusal.reason
        api.answers["/MRN4711.png"] = [Answer(status=500)]
        with pytest.raises(Unavailable) as failure:
            fetch(source(api), Inbox(inbox.uri))
        assert "MRN4711" not in str(failure.value)


class TestRetries:
    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
    def test_what_may_pass_is_tried_again(self, api: Server, inbox: Inbox, quick: list[float], status: int) -> None:
        api.page("/images", [{"id": "a", "image": api.image("/1", png(1))}])
        for path in ("/images", "/1"):
            api.answers[path] = [Answer(status=status), Answer(status=status), *api.answers[path]]
        fetch(source(api), inbox)
        assert [path for path, _ in api.asked] == ["/images"] * 3 + ["/1"] * 3
        assert len(inbox) == 1
        assert len(quick) == 4

    def test_back_off_doubles(self, api: Server, inbox: Inbox, quick: list[float]) -> None:
        api.answers["/images"] = [Answer(status=503)]
        with pytest.raises(Unavailable, match="answered 503; what was fetched is kept"):
            fetch(source(api, retries=8), inbox)
        assert all(0.5 * 2**i <= wait <= 0.5 * 2**i + 0.5 or wait == 30 for i, wait in enumerate(quick))
        assert len(quick) == 8
        assert quick[-1] == 30

    def test_retry_after_is_heeded(self, api: Server, inbox: Inbox, quick: list[float]) -> None:
        dated = Answer(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
        api.page("/images", [{"id": "a", "image": api.image("/1", png(1))}])
        api.answers["/images"] = [Answer(status=429, headers={"Retry-After": "77"}), dated, *api.answers["/images"]]
        fetch(source(api), inbox)
        assert quick[0] == 77
        assert quick[1] < 2

    def test_who_wants_too_long_a_wait_is_left_to_a_later_try(self, api: Server, inbox: Inbox, quick: list[float]) -> None:
        api.answers["/images"] = [Answer(status=429, headers={"Retry-After": "86400"})]
        with pytest.raises(Unavailable, match="asks to come back in 86400 s"):
            fetch(source(api), inbox)
        assert quick == []

    def test_an_answer_that_breaks_off_is_no_image(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": api.image("/1", png(1))}])
        api.answers["/1"] = [Answer(png(1)[:50], length=len(png(1))), *api.answers["/1"]]
        fetch(source(api), inbox)
        assert read_bytes(f"{inbox.uri}/{name('a')}") == png(1)

    def test_nobody_there_is_told_in_one_line(self, api: Server, inbox: Inbox, quick: list[float]) -> None:
        asked = source(api)
        api.close()
        with pytest.raises(Unavailable, match=r"^http://127.0.0.1:\d+: no whole answer \(ConnectError\)"):
            fetch(asked, inbox)
        assert len(quick) == 2

    def test_a_broken_fetch_goes_on_where_it_stopped(self, api: Server, inbox: Inbox) -> None:
        links = [api.image(f"/{i}", png(i)) for i in range(4)]
        api.page("/images", [{"id": i, "image": link} for i, link in enumerate(links)])
        working, api.answers["/2"] = api.answers["/2"], [Answer(status=500)]
        with pytest.raises(Unavailable):
            fetch(source(api, retries=0), inbox)
        assert len(inbox) == 2
        api.answers["/2"] = working
        again = Inbox(inbox.uri)
        fetch(source(api), again)
        assert len(again) == 4
        assert [api.count(f"/{i}") for i in range(4)] == [1, 1, 2, 1]

    def test_a_label_that_changed_replaces_the_old_one(self, api: Server, inbox: Inbox) -> None:
        item = {"id": "a", "image": api.image("/1", png(1))}
        for label in (None, "normal", "opacity"):
            api.page("/images", [item | {"label": label}])
            again = Inbox(inbox.uri)
            fetch(source(api), again)
            [found] = again.items()
            assert not isinstance(found, Refusal)
            assert found.label == (label or "")
        assert api.count("/1") == 1

    def test_a_patient_who_becomes_known_later_is_taken_and_kept(self, api: Server, inbox: Inbox) -> None:
        item = {"id": "a", "image": api.image("/1", png(1))}
        for mrn, expected in ((None, ""), ("4711", pseudonym("4711", "patient")), (None, pseudonym("4711", "patient"))):
            api.page("/images", [item | {"mrn": mrn}])
            again = Inbox(inbox.uri)
            fetch(source(api, patient="mrn"), again)
            [found] = again.items()
            assert not isinstance(found, Refusal)
            assert found.patient == expected


class TestAuthorization:
    @pytest.fixture(autouse=True)
    def token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("API_AUTHORIZATION", "Bearer s3cret")

    def test_it_is_told_to_the_api_alone(self, api: Server, server: Callable[[], Server], inbox: Inbox) -> None:
        store, other = server(), server()
        moved = Answer(status=302, headers={"Location": store.image("/moved", png(3))})
        api.answers["/redirected"] = [moved]
        links = [api.image("/own", png(1)), store.image("/foreign", png(2)), "/redirected"]
        api.page("/images", [{"id": i, "image": link} for i, link in enumerate(links)], next=f"{other.url}/images")
        other.page("/images", [])
        fetch(source(api, authorization_env="API_AUTHORIZATION"), inbox)
        assert len(inbox) == 3
        assert refused(inbox) == {}
        assert {said for _, said in api.asked} == {"Bearer s3cret"}
        assert store.asked == [("/foreign", None), ("/moved", None)]
        assert other.asked == [("/images", None)]

    @pytest.mark.parametrize("value", [None, "", " "])
    def test_a_missing_variable_is_named(
        self, api: Server, inbox: Inbox, monkeypatch: pytest.MonkeyPatch, value: str | None
    ) -> None:
        monkeypatch.delenv("API_AUTHORIZATION")
        if value is not None:
            monkeypatch.setenv("API_AUTHORIZATION", value)
        with pytest.raises(ConfigError, match="API_AUTHORIZATION is not set"):
            fetch(source(api, authorization_env="API_AUTHORIZATION"), inbox)
        assert api.asked == []

    def test_a_value_that_is_no_header_is_told_and_not_shown(
        self, api: Server, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for value in ("Bearer s3crét", "s3cret\nHost: x"):
            monkeypatch.setenv("API_AUTHORIZATION", value)
            with pytest.raises(ConfigError, match="API_AUTHORIZATION is not a header") as failure:
                fetch(source(api, authorization_env="API_AUTHORIZATION"), inbox)
            assert "s3cr" not in str(failure.value)

    @pytest.mark.parametrize(
        ("status", "message"),
        [(401, "denies access"), (403, "denies access"), (404, "answered 404"), (400, "answered 400")],
    )
    def test_a_refused_page_is_told_and_not_tried_again(self, api: Server, inbox: Inbox, status: int, message: str) -> None:
        api.answers["/images"] = [Answer(b"Doe^Jane", status=status)]
        with pytest.raises(ConfigError, match=message) as failure:
            fetch(source(api, "/images?key=s3cret", authorization_env="API_AUTHORIZATION"), inbox)
        assert "s3cret" not in str(failure.value)
        assert "Doe" not in str(failure.value)
        assert len(api.asked) == 1

    def test_a_token_that_expires_ends_the_fetch_and_refuses_nothing(self, api: Server, inbox: Inbox) -> None:
        api.page("/images", [{"id": "a", "image": "/1"}])
        api.answers["/1"] = [Answer(status=401)]
        with pytest.raises(ConfigError, match="check the value of API_AUTHORIZATION"):
            fetch(source(api, authorization_env="API_AUTHORIZATION"), inbox)
        assert len(inbox) == 0

    def test_neither_it_nor_a_link_is_in_a_log(self, api: Server, inbox: Inbox, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        api.page("/images", [{"id": "MRN4711", "image": api.image("/MRN4711.png", png(1))}])
        fetch(source(api, authorization_env="API_AUTHORIZATION"), inbox)
        api.answers["/images"] = [Answer(status=503)]
        with pytest.raises(Unavailable):
            fetch(source(api, authorization_env="API_AUTHORIZATION"), inbox)
        assert "s3cret" not in caplog.text
        assert "MRN4711" not in caplog.text

    def test_an_address_that_is_none_is_refused(self, inbox: Inbox) -> None:
        for url in ("ftp://host/x", "host/x", "http://a:bad/", ""):
            with pytest.raises(ConfigError, match=r"data\.source\.url: is no http"):
                fetch(HttpSource(url=url), inbox)


def test_retry_after_of_any_form() -> None:
    values = ["", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00"]
    assert [downloads._retry_after(value) for value in values] == [0.0] * 5


def test_memory_does_not_grow_with_the_number_of_images(api: Server, home: Path) -> None:
    """40 images of 4 MiB take at most 50 MB more than 2."""
    target = io.BytesIO()
    np.save(target, np.zeros((2 << 10, 2 << 10), np.uint8))
    body = target.getvalue()
    api.image("/1", body, "application/x-npy")
    program = (
        "import resource, sys\n"
        "from cv_factory_ops.config.sources import HttpSource\n"
        "from cv_factory_ops.domain import DeidentificationConfig\n"
        "from cv_factory_ops.ingestion.sources.http import fetch_images\n"
        "from cv_factory_ops.ingestion.sources.inbox import Inbox\n"
        "from domain_medical import DOMAIN\n"
        "fetch_images(HttpSource(url=sys.argv[1]), Inbox(sys.argv[2]), DOMAIN, DeidentificationConfig())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (2, 40):
        api.page(f"/{count}", [{"id": f"{count}-{i}", "image": "/1"} for i in range(count)])
        command = [sys.executable, "-c", program, f"{api.url}/{count}", (home / "inbox").as_uri()]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 50_000
