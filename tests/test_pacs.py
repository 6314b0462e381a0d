"""A PACS as a source, by DICOMweb and by DIMSE, and the C-STORE receiver: against a real Orthanc."""

import base64
import csv
import http.server
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.uid import ComputedRadiographyImageStorage, JPEG2000Lossless, MultiFrameGrayscaleWordSecondaryCaptureImageStorage
from pynetdicom import AE, AllStoragePresentationContexts, _config, build_context
from pynetdicom.association import Association

from cv_factory_ops import storage
from cv_factory_ops.config import as_uri, load
from cv_factory_ops.config.sources import DicomWebSource, DimseSource, ReceivedSource, VideoSource
from cv_factory_ops.domain import DeidentificationConfig, Deidentified
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Rejected, Unavailable
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources import Item, dicomweb, dimse, inbox_uri, pacs
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.records import IngestRecord
from cv_factory_ops.stage import run_stage
from domain_medical import DOMAIN, Medical
from domain_medical.synthetic import studies
from tests.certificates import Certificate

LABELS = ["normal", "opacity"]
PLUGIN = next(Path("/usr").glob("*/orthanc*/**/libOrthancDicomWeb.so*"), None)
SETTINGS = DeidentificationConfig(pixels="declared")  # looking for text in every image takes a second each
PASSWORD = "a secret of the PACS"  # noqa: S105
RETRIEVES = ("dicomweb", "c_get", "c_move")
Project = Callable[..., Path]

needs_orthanc = pytest.mark.skipif(
    not (shutil.which("Orthanc") and PLUGIN), reason="needs Orthanc: apt-get install orthanc orthanc-dicomweb"
)
ELSEWHERE = os.pathsep.join(folder for folder in os.get_exec_path() if Path(folder) != Path(sys.executable).parent)
"""Where dcmtk's programs are: in an activated environment those of pynetdicom, with the same names, would be found first."""
ECHOSCU, STORESCU = (shutil.which(name, path=ELSEWHERE) or "" for name in ("echoscu", "storescu"))
needs_dcmtk = pytest.mark.skipif(not STORESCU, reason="needs storescu: apt-get install dcmtk")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Proxy:
    """A TCP connection, encrypted or not, through which only so many bytes pass before it is cut and no more to be had."""

    def __init__(self, target: int, *, port: int = 0, allowed: int = 1 << 30, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._allowed, self._tls = target, allowed, tls
        self.passed = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._tls:
                    try:
                        near = self._tls.wrap_socket(near, server_side=True)
                    except OSError:
                        continue
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                self.passed += len(data)
                if self.passed > self._allowed:
                    self._listener.close()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Orthanc:
    """A real PACS in a process of its own, with a storage that nobody else has."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.http, self.dicom, self.receive, self.cut = (free_port() for _ in range(4))
        self.url = f"http://127.0.0.1:{self.http}/dicom-web"
        self._folder = folder
        self._settings = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": self.http,
            "DicomPort": self.dicom,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True,
            "DicomModalities": {
                "ours": ["CV_FACTORY", "127.0.0.1", self.receive],
                "cut": ["CVF_CUT", "127.0.0.1", self.cut],
                "away": ["CVF_AWAY", "127.0.0.1", 1],
            },
            "RemoteAccessAllowed": True,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"cvf": PASSWORD},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            **settings,
        }
        self._start()

    def _start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        file = self._folder / "orthanc.json"
        file.write_text(json.dumps(self._settings))
        with (self._folder / "log").open("w") as log:
            self.process = subprocess.Popen(["Orthanc", str(file)], stdout=log, stderr=subprocess.STDOUT)
        while not self._answers():
            assert self.process.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            httpx.get(self.url)
            return True
        return False

    def fill(self, objects: list[bytes]) -> None:
        for content in objects:
            url = f"http://127.0.0.1:{self.http}/instances"
            assert httpx.post(url, content=content, auth=("cvf", PASSWORD)).status_code == 200

    def modalities(self, name: str, **settings: Any) -> None:
        """Replace what it knows of a modality."""
        url = f"http://127.0.0.1:{self.http}/modalities/{name}"
        assert httpx.put(url, json=settings, auth=("cvf", PASSWORD)).status_code == 200

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self._start()

    def __enter__(self) -> "Orthanc":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def encode(study: Dataset) -> bytes:
    target = BytesIO()
    dcmwrite(target, study, enforce_file_format=True)
    return target.getvalue()


def variant(number: int, **attributes: Any) -> bytes:
    """A phantom with identifiers of its own, ending in the number."""
    study = dcmread(BytesIO(next(studies(1, image_size=128, seed=number, labels=LABELS))[0]))
    study.PatientID, study.PatientName, study.AccessionNumber = "MRN-4712", "Doe^Jane", "ACC-4712"
    study.StudyInstanceUID, study.SeriesInstanceUID = "2.25.4712001", "2.25.4712002"
    study.SOPInstanceUID = study.file_meta.MediaStorageSOPInstanceUID = f"2.25.47120{number}"
    study.SOPClassUID = study.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    study.Modality = "CR"
    for keyword, value in attributes.items():
        setattr(study, keyword, value)
    return encode(study)


def multi_frame() -> bytes:
    frames = np.random.default_rng(3).integers(0, 4095, (3, 128, 128), dtype=np.uint16)
    uids = {"PatientID": "MRN-4713", "StudyInstanceUID": "2.25.4713001", "SeriesInstanceUID": "2.25.4713002"}
    kind = {"SOPClassUID": MultiFrameGrayscaleWordSecondaryCaptureImageStorage, "Modality": "OT", "NumberOfFrames": 3}
    shape = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelData": frames.tobytes()}
    return variant(99, **uids, **kind, **shape)


def slices() -> list[bytes]:
    """A series of several objects, which can be retrieved by one request and broken off within."""
    return [variant(number) for number in range(10, 18)]


def compressed() -> bytes:
    study = dcmread(str(get_testdata_file("MR_small_jp2klossless.dcm")))
    study.PatientName, study.PatientID, study.AccessionNumber = "Doe^Jane", "MRN-4711", "ACC-4711"
    study.BurnedInAnnotation = "NO"
    return encode(study)


OBJECTS = [content for content, _ in studies(8, image_size=48, seed=5, labels=LABELS)] + [
    multi_frame(),
    compressed(),
    *slices(),
]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with Orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        server.fill(OBJECTS)
        yield server


@pytest.fixture
def authorization(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the variable that holds the header of Orthanc's user."""
    monkeypatch.setenv("PACS_AUTHORIZATION", "Basic " + base64.b64encode(f"cvf:{PASSWORD}".encode()).decode())
    return "PACS_AUTHORIZATION"


def source_of(retrieve: str, server: Orthanc, **settings: Any) -> DicomWebSource | DimseSource:
    if retrieve == "dicomweb":
        given = {"url": server.url, "authorization_env": "PACS_AUTHORIZATION", "labels": "labels.csv", "timeout": 20}
        return DicomWebSource.model_validate(given | settings)
    given = {"host": "127.0.0.1", "port": server.dicom, "called_ae_title": "ORTHANC", "labels": "labels.csv", "timeout": 20}
    return DimseSource.model_validate(given | {"retrieve": retrieve, "receive_port": server.receive} | settings)


class Counting(Medical):
    """The domain, counting how many objects arrive."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # appending is safe among the threads of several associations

    @property
    def arrived(self) -> int:
        return len(self.lengths)

    def deidentify(self, data: bytes, settings: DeidentificationConfig) -> Deidentified:
        self.lengths.append(len(data))
        return super().deidentify(data, settings)


def fetch(source: DicomWebSource | DimseSource, uri: str = "inbox") -> int:
    """How many objects came."""
    domain, inbox = Counting(), Inbox(as_uri(uri))
    try:
        if isinstance(source, DicomWebSource):
            dicomweb.fetch_studies(source, inbox, domain, SETTINGS)
        else:
            dimse.fetch_studies(source, inbox, domain, SETTINGS)
    except CvFactoryError as error:
        error.add_note(str(domain.arrived))
        raise
    return domain.arrived


def failure(kind: type[CvFactoryError], source: DicomWebSource | DimseSource) -> str:
    with pytest.raises(kind) as caught:
        fetch(source)
    assert PASSWORD not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def name_of(content: bytes) -> str:
    study = dcmread(BytesIO(content), stop_before_pixels=True)
    return f"{DOMAIN.remapped(study.StudyInstanceUID)}/{DOMAIN.remapped(study.SOPInstanceUID)}.dcm"


def identifiers(content: bytes) -> set[bytes]:
    study = dcmread(BytesIO(content), stop_before_pixels=True)
    keywords = ("PatientName", "PatientID", "PatientAddress", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID")
    return {str(study[keyword].value).encode() for keyword in keywords if keyword in study and study[keyword].value}


def stored(uri: str = "inbox") -> dict[str, bytes]:
    """Everything in an inbox, by name."""
    return {name: storage.read_bytes(f"{as_uri(uri)}/{name}") for name in storage.listing(as_uri(uri))}


def assert_complete(objects: list[bytes], uri: str = "inbox") -> None:
    """All are there, each whole, none with an identifier of any."""
    found = stored(uri)
    assert {name for name in found if name.endswith(".dcm")} == {name_of(content) for content in objects}
    secrets = set().union(*map(identifiers, objects)) | {b"PHANTOM", b"Doe", b"Phantom Hospital"}
    assert [secret for secret in secrets if any(secret in content for content in found.values())] == []
    for content in objects:
        before, after = dcmread(BytesIO(content)), dcmread(BytesIO(found[name_of(content)]))
        assert after.PixelData == before.PixelData
        assert after.file_meta.TransferSyntaxUID == before.file_meta.TransferSyntaxUID
        assert json.loads(found[f"{name_of(content)}.json"])["content_type"] == "application/dicom"


@needs_orthanc
@pytest.mark.usefixtures("authorization")
class TestRetrieve:
    @pytest.mark.parametrize("retrieve", RETRIEVES)
    def test_all_objects_come_once_without_identity(self, retrieve: str, orthanc: Orthanc, caplog: Any) -> None:
        caplog.set_level(logging.DEBUG)
        assert fetch(source_of(retrieve, orthanc)) == len(OBJECTS)
        assert_complete(OBJECTS)
        assert fetch(source_of(retrieve, orthanc)) == 0
        assert not any(secret.decode() in caplog.text for content in OBJECTS for secret in identifiers(content))

    def test_what_is_compressed_stays_so(self) -> None:
        assert dcmread(BytesIO(compressed())).file_meta.TransferSyntaxUID == JPEG2000Lossless

    @pytest.mark.parametrize("retrieve", RETRIEVES)
    def test_a_query_and_modalities_choose(self, retrieve: str, orthanc: Orthanc) -> None:
        only_mr = source_of(retrieve, orthanc, query={"PatientID": "MRN-4711"}, modalities=["MR"])
        assert fetch(only_mr) == 1
        assert_complete([compressed()])

    @pytest.mark.parametrize("retrieve", RETRIEVES)
    def test_a_query_of_all_studies_of_a_day(self, retrieve: str, orthanc: Orthanc) -> None:
        january = source_of(retrieve, orthanc, query={"StudyDate": "20240101-20240131"})
        wanted = [content for content in OBJECTS if dcmread(BytesIO(content)).get("StudyDate") == "20240115"]
        assert fetch(january) == len(wanted) > 0
        assert_complete(wanted)

    @pytest.mark.parametrize("retrieve", RETRIEVES)
    def test_nothing_matches(self, retrieve: str, orthanc: Orthanc) -> None:
        said = failure(DataError, source_of(retrieve, orthanc, query={"PatientName": "Nobody^There"}))
        assert "PatientName" in said
        assert "Nobody" not in said

    @pytest.mark.parametrize("retrieve", RETRIEVES)
    def test_goes_on_within_a_series(self, retrieve: str, orthanc: Orthanc) -> None:
        source = source_of(retrieve, orthanc, query={"PatientID": "MRN-4712"})
        assert fetch(source) == 8
        for content in slices()[2:7]:
            for name in (name_of(content), f"{name_of(content)}.json"):
                storage.delete_tree(f"{as_uri('inbox')}/{name}")
        assert fetch(source) == 5
        assert_complete(slices())

    def test_s3(self, orthanc: Orthanc, bucket: str) -> None:
        source = source_of("dicomweb", orthanc, query={"PatientID": "MRN-4712"})
        assert fetch(source, f"s3://{bucket}/inbox") == 8
        assert_complete(slices(), f"s3://{bucket}/inbox")
        assert fetch(source, f"s3://{bucket}/inbox") == 0

    def test_what_is_refused_is_not_fetched_again(self, orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Medical, data: bytes, settings: DeidentificationConfig) -> Deidentified:
            raise Rejected("undecodable", "is broken")

        source = source_of("c_get", orthanc, query={"PatientID": "MRN-4712"})
        monkeypatch.setattr(Medical, "deidentify", refuse)
        assert fetch(source) == 8
        assert fetch(source) == 0
        assert {item.code for item in Inbox(as_uri("inbox")).items() if isinstance(item, Refusal)} == {"undecodable"}
        assert all(name.endswith(".json") for name in stored())

    def test_too_large(self, orthanc: Orthanc) -> None:
        source, inbox = source_of("dicomweb", orthanc, query={"PatientID": "MRN-4712"}, max_bytes=4000), Inbox(as_uri("inbox"))
        assert isinstance(source, DicomWebSource)
        dicomweb.fetch_studies(source, inbox, DOMAIN, SETTINGS)
        refused = list(inbox.items())
        assert len(refused) == 8
        assert all(isinstance(item, Refusal) and item.code == "too_large" for item in refused)
        assert fetch(source.model_copy(update={"max_bytes": 1 << 20})) == 8
        assert_complete(slices())


@needs_orthanc
@pytest.mark.usefixtures("authorization")
class TestBrokenOff:
    """Each of the eight slices has 16 or 32 KiB, and what is said about them less than one."""

    QUERY = {"PatientID": "MRN-4712"}

    @staticmethod
    def missing() -> list[bytes]:
        inbox = Inbox(as_uri("inbox"))
        missing = [content for content in slices() if name_of(content) not in inbox]
        assert 0 < len(missing) < 8
        return missing

    @pytest.mark.parametrize("retrieve", ["dicomweb", "c_get"])
    def test_goes_on_where_it_stopped(self, retrieve: str, orthanc: Orthanc) -> None:
        def through(proxy: Proxy) -> DicomWebSource | DimseSource:
            at = {"url": f"http://127.0.0.1:{proxy.port}/dicom-web"} if retrieve == "dicomweb" else {"port": proxy.port}
            return source_of(retrieve, orthanc, query=self.QUERY, **at)

        target = orthanc.http if retrieve == "dicomweb" else orthanc.dicom
        broken, whole = Proxy(target, allowed=100_000), Proxy(target)
        assert f"127.0.0.1:{broken.port}" in failure(Unavailable, through(broken))
        missing = self.missing()
        assert fetch(through(whole)) == len(missing)
        assert_complete(slices())
        sizes = [len(content) for content in missing]
        assert whole.passed < sum(sizes) + min(sizes), "the PACS was asked for more than what was missing"

    def test_c_move_goes_on_where_it_stopped(self, orthanc: Orthanc) -> None:
        Proxy(orthanc.receive, port=orthanc.cut, allowed=100_000)
        said = failure(Unavailable, source_of("c_move", orthanc, query=self.QUERY, calling_ae_title="CVF_CUT"))
        missing = self.missing()
        assert f"{len(missing)} of 8" in said
        assert fetch(source_of("c_move", orthanc, query=self.QUERY)) == len(missing)
        assert_complete(slices())

    def test_orthanc_is_killed_and_started_again(self, tmp_path: Path) -> None:
        class Killing(Counting):
            def deidentify(self, data: bytes, settings: DeidentificationConfig) -> Deidentified:
                if self.arrived == 3:
                    server.process.kill()
                    server.process.wait()
                return super().deidentify(data, settings)

        with Orthanc(tmp_path / "orthanc") as server:
            server.fill(slices())
            source = source_of("c_get", server)
            with pytest.raises(Unavailable):
                dimse.fetch_studies(source, Inbox(as_uri("inbox")), Killing(), SETTINGS)  # type: ignore[arg-type]
            missing = self.missing()
            server.restart()
            assert fetch(source) == len(missing)
            assert_complete(slices())


@needs_orthanc
@pytest.mark.usefixtures("authorization")
class TestErrors:
    def test_nobody_is_there(self, orthanc: Orthanc) -> None:
        port = free_port()
        assert f"127.0.0.1:{port}" in failure(Unavailable, source_of("c_get", orthanc, port=port))
        assert f"127.0.0.1:{port}" in failure(Unavailable, source_of("dicomweb", orthanc, url=f"http://127.0.0.1:{port}"))

    @pytest.mark.parametrize("retrieve", ["dicomweb", "c_get"])
    def test_nobody_answers(self, retrieve: str, orthanc: Orthanc) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            at = {"url": f"http://127.0.0.1:{port}"} if retrieve == "dicomweb" else {"port": port}
            assert str(port) in failure(Unavailable, source_of(retrieve, orthanc, timeout=0.3, **at))

    def test_wrong_ae_titles(self, orthanc: Orthanc) -> None:
        said = failure(ConfigError, source_of("c_get", orthanc, called_ae_title="WRONG"))
        assert "called ae title not recognised" in said
        assert "'WRONG'" in said
        assert "STRANGER" in failure(CvFactoryError, source_of("c_get", orthanc, calling_ae_title="STRANGER"))

    def test_c_move_to_where_nobody_listens(self, orthanc: Orthanc) -> None:
        failure(Unavailable, source_of("c_move", orthanc, calling_ae_title="CVF_AWAY"))

    def test_taken_port(self, orthanc: Orthanc) -> None:
        with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104
            port = taken.getsockname()[1]
            assert f"{port}: cannot listen" in failure(Unavailable, source_of("c_move", orthanc, receive_port=port))

    def test_credentials(self, orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "authorization_env" in failure(ConfigError, source_of("dicomweb", orthanc, authorization_env=None))
        monkeypatch.setenv("PACS_AUTHORIZATION", f"Basic {PASSWORD}")
        assert "PACS_AUTHORIZATION" in failure(ConfigError, source_of("dicomweb", orthanc))
        monkeypatch.setenv("PACS_AUTHORIZATION", f"{PASSWORD}\nHost: x")
        assert "PACS_AUTHORIZATION is not a header" in failure(ConfigError, source_of("dicomweb", orthanc))
        monkeypatch.delenv("PACS_AUTHORIZATION")
        assert "PACS_AUTHORIZATION is not set" in failure(ConfigError, source_of("dicomweb", orthanc))

    def test_addresses(self, orthanc: Orthanc) -> None:
        root = orthanc.url.removesuffix("/dicom-web")
        assert "404" in failure(ConfigError, source_of("dicomweb", orthanc, url=f"{root}/no-dicom-web"))
        assert "400" in failure(ConfigError, source_of("dicomweb", orthanc, url=root))
        assert "http://" in failure(ConfigError, source_of("dicomweb", orthanc, url="ftp://pacs"))
        with_password = root.replace("://", f"://cvf:{PASSWORD.replace(' ', '')}@")
        said = failure(ConfigError, source_of("dicomweb", orthanc, url=with_password))
        assert PASSWORD.replace(" ", "") not in said


class TestQuery:
    def test_keywords(self) -> None:
        pacs.check_query({"PatientName": "A*", "StudyDate": "2024", "ModalitiesInStudy": "DX"})
        with pytest.raises(ConfigError, match=r"query\.StudyDat: is no DICOM keyword; did you mean StudyDate"):
            pacs.check_query({"StudyDat": "20240101"})
        with pytest.raises(ConfigError, match=r"data\.source\.modalities"):
            pacs.check_query({"Modality": "DX"})

    @needs_orthanc
    def test_a_value_that_cannot_be(self, orthanc: Orthanc) -> None:
        said = failure(ConfigError, source_of("c_get", orthanc, query={"NumberOfStudyRelatedInstances": "Jane"}))
        assert "Jane" not in said

    @needs_orthanc
    @pytest.mark.usefixtures("authorization")
    def test_pages(self, orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dicomweb, "PAGE", 3)
        assert fetch(source_of("dicomweb", orthanc)) == len(OBJECTS)


@contextmanager
def answering(listed: list[tuple[str, str, str]], objects: dict[str, tuple[str, bytes]]) -> Iterator[DicomWebSource]:
    """A DICOMweb service that is not quite what it should be: it gives all results on any page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tags = ("0020000D", "0020000E", "00080018")
            results = [{tag: {"vr": "UI", "Value": [uid]} for tag, uid in zip(tags, uids, strict=True)} for uids in listed]
            query = ("application/dicom+json", json.dumps(results).encode())
            kind, body = query if "?" in self.path else objects.get(self.path.rpartition("/")[2], ("", b""))
            self.send_response(200 if kind else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield DicomWebSource(url=f"http://127.0.0.1:{server.server_port}", labels="labels.csv")
        server.shutdown()


@needs_orthanc
class TestLostAnswers:
    """As pynetdicom loses one: its own thread takes it, and nobody is told."""

    @staticmethod
    def losing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
        send, lost = Association.send_c_find, list[int]()

        def send_c_find(association: Association, *given: Any) -> Iterator[tuple[Dataset, Dataset | None]]:
            answers = send(association, *given)
            if len(lost) < times:
                lost.append(len([next(answers)]))
            return answers

        monkeypatch.setattr(Association, "send_c_find", send_c_find)
        return lost

    def test_are_noticed_and_asked_for_again(self, orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
        lost = self.losing(monkeypatch, 3)
        assert fetch(source_of("c_get", orthanc)) == len(OBJECTS)
        assert len(lost) == 3

    def test_are_an_error_in_the_end(self, orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losing(monkeypatch, 1000)
        assert "answers to C-FIND have come" in failure(Unavailable, source_of("c_get", orthanc))


class TestOddServers:
    def test_one_that_lists_but_does_not_give(self) -> None:
        with answering([("1.2", "1.3", "1.4")], {}) as source:
            assert "1 of 1 listed objects" in failure(Unavailable, source)

    def test_one_that_sends_garbage_among_objects(self) -> None:
        fine, uids = slices()[0], ("2.25.4712001", "2.25.4712002")
        body = b"--b\r\n\r\ngarbage\r\n--b\r\n\r\n" + fine + b"\r\n--b--"
        kind = "multipart/related; type=application/dicom; boundary=b"
        given = {"2.25.4712002": (kind, body), "1.4": ("application/dicom", b"garbage")}
        with answering([(*uids, "2.25.4712010"), (*uids, "1.4")], given) as source:
            assert fetch(source) == 2
        refused = [item for item in Inbox(as_uri("inbox")).items() if isinstance(item, Refusal)]
        assert [item.code for item in refused] == ["not_dicom"]
        assert name_of(fine) in stored()

    def test_one_that_is_no_dicomweb(self) -> None:
        with answering([("1.2", "1.3", "1.4")], {"1.4": ("text/html", b"<html>")}) as source:
            assert "multipart/related" in failure(DataError, source)

    @pytest.mark.parametrize("attribute", [None, "1.2", ["1.2"], {"Value": "1.2"}, {"Value": {"0": "1"}}, {"Value": [{}]}])
    def test_one_that_lists_no_dicom_json(self, attribute: object) -> None:
        page = json.dumps([{"0020000D": attribute}]).encode()
        answer = httpx.MockTransport(lambda _: httpx.Response(200, content=page))
        source = DicomWebSource(url="http://pacs", labels="labels.csv")
        with (
            httpx.Client(transport=answer) as client,
            pytest.raises(DataError, match="http://pacs: lists an attribute 0020000D"),
        ):
            list(dicomweb.DicomWeb(source, client).studies())

    def test_what_has_no_value(self) -> None:
        web = dicomweb.DicomWeb(DicomWebSource(url="http://pacs", labels="labels.csv"), httpx.Client())
        for found in ({}, {"00080060": {"vr": "CS"}}, {"00080060": {"Value": [None]}}, {"00080060": {"Value": []}}):
            assert web._value(found, "00080060") == ""


class TestIntake:
    def test_what_may_pass_another_time_is_asked_for_again(self) -> None:
        for code, is_asked_for, is_kept in (
            ("identified", True, False),
            ("identified", False, True),
            ("not_dicom", True, True),
        ):
            inbox = Inbox(as_uri(f"{code}-{is_asked_for}"))
            intake = pacs.Intake(inbox, DOMAIN, SETTINGS, "1.2", is_asked_for)
            intake.refuse("1.3", code, "is broken")
            assert "1.3" in intake, "not twice in one fetch"
            assert [item.code for item in inbox.items() if isinstance(item, Refusal)] == [code]
            assert len(Inbox(inbox.uri)) == is_kept

    def test_other_settings_have_another_inbox(self, project: Project) -> None:
        received = ReceivedSource(labels="labels.csv")
        declared, screened = (
            load(project(deidentification={"pixels": pixels}, data={"source": received.model_dump()}))
            for pixels in ("declared", "screen")
        )
        assert inbox_uri(declared, received) != inbox_uri(screened, received)
        video = VideoSource(path="videos", labels="labels.csv")
        assert inbox_uri(declared, video) == inbox_uri(screened, video)


class TestContexts:
    def test_as_many_as_an_association_may_have(self) -> None:
        classes = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
        few, many, unknown = (dimse.storage_contexts(given) for given in (set(sorted(classes)[:8]), classes, {""}))
        assert len({context.abstract_syntax for context in few}) == 8
        assert max(map(len, (few, many, unknown))) < dimse.MAX_CONTEXTS  # one more is the retrieve's own
        assert len(unknown) > 100


class TestParts:
    BODY = b"before\r\n--b\r\nContent-Type: a/b\r\n\r\none\r\n--b\r\nA: b\r\n\r\n\r\n-two\r\n\r\n--b\r\n\r\n\r\n--b--\r\nafter"

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 1000])
    def test_any_chunks(self, size: int) -> None:
        chunks = [self.BODY[start : start + size] for start in range(0, len(self.BODY), size)]
        assert list(dicomweb.parts(chunks, b"b", 100)) == [b"one", b"\r\n-two\r\n", b""]

    def test_large_parts_are_passed_over_in_flat_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dicomweb, "MAX_HEADER", 10)
        large = [b"--b\r\n\r\n", *[b"x" * 50] * 100, b"\r\n--b\r\n\r\nsmall\r\n--b", b"--\r\n"]
        assert list(dicomweb.parts(large, b"b", 20)) == [None, b"small"]

    def test_a_body_that_was_cut_gives_its_whole_parts(self) -> None:
        assert list(dicomweb.parts([self.BODY[:-40]], b"b", 100)) == [b"one"]

    def test_no_headers(self) -> None:
        assert list(dicomweb.parts([b"--b\r\nbroken\r\n--b--"], b"b", 100)) == [None]


def shown(own: Certificate, **more: Path) -> dict[str, str]:
    """The setting ``tls`` of who has a certificate."""
    return {name: str(path) for name, path in ({"certificate": own.path, "key": own.key} | more).items()}


@needs_orthanc
class TestTls:
    def test_certificates_are_checked(self, tmp_path: Path, authorization: str, monkeypatch: pytest.MonkeyPatch) -> None:
        its = Certificate(tmp_path, "pacs")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(its.path, its.key)
        with Orthanc(tmp_path / "orthanc", **encrypted(its, its)) as server:
            server.fill([multi_frame()])
            web = {"url": f"https://127.0.0.1:{Proxy(server.http, tls=context).port}/dicom-web"}
            assert "SSL_CERT_FILE" in failure(ConfigError, source_of("dicomweb", server, **web))
            assert failure(Unavailable, source_of("c_get", server, tls={}))
            assert failure(Unavailable, source_of("c_get", server))
            assert fetch(source_of("c_get", server, tls={"authorities": str(its.path)}), "named") == 1
            monkeypatch.setenv("SSL_CERT_FILE", str(its.path))
            assert fetch(source_of("dicomweb", server, **web), "web") == 1
            assert fetch(source_of("c_get", server, tls={}), "dimse") == 1

    def test_both_sides_show_a_certificate(self, tmp_path: Path) -> None:
        ours, its, strange = (Certificate(tmp_path, name) for name in ("ours", "pacs", "strange"))
        with Orthanc(tmp_path / "orthanc", **encrypted(its, ours, required=True)) as server:
            server.modalities("ours", AET="CV_FACTORY", Host="127.0.0.1", Port=server.receive, UseDicomTls=True)
            server.fill(OBJECTS[:3])
            assert failure(Unavailable, source_of("c_get", server, tls={"authorities": str(its.path)}))
            assert failure(Unavailable, source_of("c_get", server, tls=shown(strange, authorities=its.path)))
            for retrieve in ("c_get", "c_move"):
                tls = shown(ours, authorities=its.path)
                assert fetch(source_of(retrieve, server, tls=tls), retrieve) == 3
                assert_complete(OBJECTS[:3], retrieve)
            server.modalities("ours", AET="CV_FACTORY", Host="127.0.0.1", Port=server.receive, UseDicomTls=False)
            assert failure(Unavailable, source_of("c_move", server, tls=shown(ours, authorities=its.path)))
            assert stored() == {}, "what is sent without encryption is not taken"

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        ours, locked = Certificate(tmp_path, "ours"), Certificate(tmp_path, "locked", b"secret of ours")
        (tmp_path / "empty.pem").touch()
        for given, told in (
            ({"authorities": "none.pem"}, "tls.authorities: none.pem: no such file or directory"),
            ({"authorities": str(tmp_path / "empty.pem")}, "no certificate or crl found"),
            (shown(ours, key=tmp_path / "none.key"), "none.key: no such file or directory"),
            (shown(ours, key=locked.key), "without a passphrase"),
            (shown(ours, certificate=locked.path), "key values mismatch"),
        ):
            source = DimseSource.model_validate(
                {"host": "pacs", "called_ae_title": "PACS", "labels": "labels.csv", "tls": given}
            )
            with pytest.raises(ConfigError, match=re.escape(told)) as caught:
                dimse.Dimse(source)
            assert "secret of ours" not in str(caught.value)

    @pytest.mark.parametrize(
        ("source", "told"),
        [
            ({"retrieve": "c_move", "tls": {}}, "by c_move the PACS calls us"),
            ({"tls": {"certificate": "ours.pem"}}, "certificate and key go together"),
        ],
    )
    def test_what_is_missing(self, source: dict[str, Any], told: str) -> None:
        with pytest.raises(ValueError, match=told):
            DimseSource.model_validate({"host": "pacs", "called_ae_title": "PACS", "labels": "labels.csv"} | source)


def encrypted(its: Certificate, trusted: Certificate, *, required: bool = False) -> dict[str, Any]:
    """Settings of Orthanc."""
    settings = {"Enabled": True, "Certificate": str(its.path), "PrivateKey": str(its.key)}
    settings |= {"TrustedCertificates": str(trusted.path), "RemoteCertificateRequired": required}
    return {f"DicomTls{name}": value for name, value in settings.items()}


class TestAeTitles:
    @pytest.mark.parametrize("title", ["", " ", "SEVENTEEN_LETTERS", "A\\B", "\u00c4"])
    def test_what_is_none(self, title: str) -> None:
        with pytest.raises(ValueError, match="called_ae_title"):
            DimseSource(host="pacs", called_ae_title=title, labels="labels.csv")
        with pytest.raises(ConfigError):
            dimse.application_entity(title, 1)


class Receiver:
    """``cvf receive`` in a process of its own."""

    def __init__(self, config: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "cv_factory_ops.cli", "receive", "--config", str(config), "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.said = self.process.stdout.readline()
        self.port = int(self.said.partition(" listens on 127.0.0.1:")[2].partition(",")[0] or 0)

    def stop(self) -> str:
        """Its log; it must have ended well."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, log
        return log


@contextmanager
def receiving(config: Path, *arguments: str) -> Iterator[Receiver]:
    receiver = Receiver(config, *arguments)
    try:
        yield receiver
    finally:
        receiver.process.kill()
        receiver.process.communicate()


def received_source(project: Project, **settings: Any) -> Path:
    source = {"kind": "received", "labels": "labels.csv"} | settings
    return project(data={"source": source}, deidentification=SETTINGS.model_dump())


def files(folder: Path, objects: list[bytes]) -> list[str]:
    folder.mkdir()
    paths = [folder / f"{number:03d}.dcm" for number in range(len(objects))]
    for path, content in zip(paths, objects, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def send(port: int, paths: list[str], called: str = "CV_FACTORY") -> list[int | None]:
    """Statuses of C-STORE requests, each file sent as it is."""
    ae = AE("SENDER")
    metas = [dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta for path in paths]
    for name, syntax in {(meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID) for meta in metas}:
        ae.add_requested_context(name, syntax)
    association = ae.associate("127.0.0.1", port, ae_title=called)
    assert association.is_established
    try:
        return [association.send_c_store(path).get("Status") for path in paths]
    finally:
        association.release()


class TestReceiver:
    def test_what_is_sent_is_stored_without_identity(self, project: Project, tmp_path: Path) -> None:
        config = received_source(project)
        uri = inbox_uri(load(config), ReceivedSource(labels="labels.csv"))
        with receiving(config) as receiver:
            assert uri in receiver.said
            paths = files(tmp_path / "sent", OBJECTS)
            assert send(receiver.port, paths) == [0x0000] * len(OBJECTS)
            assert send(receiver.port, paths[:3]) == [0x0000] * 3, "what is sent again is confirmed"
            log = receiver.stop()
        assert f"{len(OBJECTS)} objects stored, 0 refused" in log
        assert not any(secret.decode() in log for content in OBJECTS for secret in identifiers(content))
        assert_complete(OBJECTS, uri)
        assert all(isinstance(item, Item) for item in Inbox(uri).items())

    @needs_dcmtk
    def test_dcmtk_as_sender(self, project: Project, tmp_path: Path) -> None:
        config = received_source(project)
        with receiving(config, "--ae-title", "RESEARCH") as receiver:
            peer = ["-aec", "RESEARCH", "127.0.0.1", str(receiver.port)]
            assert subprocess.run([ECHOSCU, *peer]).returncode == 0
            assert subprocess.run([STORESCU, *peer, *files(tmp_path / "sent", slices())]).returncode == 0
            assert subprocess.run([ECHOSCU, "-aec", "WRONG", *peer[2:]], capture_output=True).returncode != 0
            receiver.stop()
        assert_complete(slices(), inbox_uri(load(config), ReceivedSource(labels="labels.csv")))

    @needs_dcmtk
    def test_only_encrypted_and_of_senders_with_a_certificate(self, project: Project, tmp_path: Path) -> None:
        ours, its, strange = (Certificate(tmp_path, name) for name in ("ours", "modality", "strange"))
        paths = files(tmp_path / "sent", OBJECTS[:2])

        def send_by(*options: object) -> int:
            command = [STORESCU, "-to", "10", "-aec", "CV_FACTORY", *map(str, options), "127.0.0.1", str(receiver.port), *paths]
            return subprocess.run(command, capture_output=True, timeout=60).returncode

        with receiving(received_source(project, tls=shown(ours, authorities=its.path))) as receiver:
            with socket.create_connection(("127.0.0.1", receiver.port)):  # one that never says a word keeps nobody waiting
                assert send_by("+tls", its.key, its.path, "+cf", ours.path) == 0
            assert send_by() != 0, "not encrypted"
            assert send_by("+tla", "+cf", ours.path) != 0, "without a certificate"
            assert send_by("+tls", strange.key, strange.path, "+cf", ours.path) != 0
            assert "2 objects stored, 0 refused" in receiver.stop()

    def test_refused_objects_fail_and_are_listed(
        self, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
        config = received_source(project)
        start = multi_frame().index(b"\x08\x00\x16\x00UI")  # the data set, after the File Meta Information
        broken = multi_frame()[:start] + b"\x08\x00\x60\x00CS\xff\xff" + b"Doe^Jane" * 20
        with receiving(config) as receiver:
            paths = [*files(tmp_path / "broken", [broken]), *files(tmp_path / "fine", slices()[:1])]
            assert send(receiver.port, [*paths, paths[0]]) == [0xC000, 0x0000, 0xC000]
            log = receiver.stop()
        assert "1 objects stored, 2 refused" in log
        uri = inbox_uri(load(config), ReceivedSource(labels="labels.csv"))
        assert len([item for item in Inbox(uri).items() if isinstance(item, Refusal)]) == 1
        assert b"Doe" not in b"".join(stored(uri).values())
        assert "Doe" not in log

    def test_only_listed_senders(self, project: Project) -> None:
        with receiving(received_source(project, calling_ae_titles=["CT_1"])) as receiver:
            for title, expected in (("CT_1", True), ("STRANGER", False)):
                association = AE(title).associate(
                    "127.0.0.1", receiver.port, [build_context("1.2.840.10008.1.1")], ae_title="CV_FACTORY"
                )
                assert association.is_established == expected
                if expected:
                    association.release()
            receiver.stop()

    def test_a_full_disk_is_a_failure_for_the_sender(self, project: Project, tmp_path: Path) -> None:
        config = received_source(project)
        uri = inbox_uri(load(config), ReceivedSource(labels="labels.csv"))
        blocked = storage.path_of(uri)
        assert blocked
        with receiving(config) as receiver:
            blocked.parent.mkdir(parents=True, exist_ok=True)
            blocked.write_text("a file where the inbox should be")
            paths = files(tmp_path / "sent", slices()[:1])
            assert send(receiver.port, paths) == [0xA700]
            blocked.unlink()
            assert send(receiver.port, paths) == [0x0000]
            assert "Traceback" not in receiver.stop()

    def test_sigterm_answers_what_is_in_hand(self, project: Project, tmp_path: Path) -> None:
        """The sender keeps its association open: it is told to keep what was not stored."""
        config = received_source(project)
        paths = files(tmp_path / "sent", slices())
        with receiving(config) as receiver:
            ae = AE("SENDER")
            ae.add_requested_context(dcmread(paths[0]).SOPClassUID)
            association = ae.associate("127.0.0.1", receiver.port, ae_title="CV_FACTORY")
            statuses = [association.send_c_store(paths[0]).get("Status")]
            receiver.process.send_signal(signal.SIGTERM)
            while statuses[-1] == 0x0000 and len(statuses) < 1000:
                statuses.append(association.send_c_store(paths[len(statuses) % 8]).get("Status"))
            association.release()
            assert statuses[-1] == 0xA700
            _, log = receiver.process.communicate(timeout=30)
            assert receiver.process.returncode == 0
        assert f"{min(len(statuses) - 1, 8)} objects stored" in log

    def test_wrong_projects_and_ports(self, project: Project) -> None:
        with receiving(project()) as receiver:
            _, log = receiver.process.communicate(timeout=30)
        assert receiver.process.returncode == 2
        assert "cvf receive fills a source of kind 'received'" in log
        with socket.create_server(("127.0.0.1", 0)) as taken:
            with receiving(received_source(project), "--port", str(taken.getsockname()[1])) as receiver:
                _, log = receiver.process.communicate(timeout=30)
        assert receiver.process.returncode == 75
        with receiving(received_source(project), "--ae-title", "SEVENTEEN LETTERS") as receiver:
            receiver.process.communicate(timeout=30)
        assert receiver.process.returncode == 2


def labels_by_study(path: Path, objects: list[tuple[bytes, str]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study", "label"])
        table.writerows((dcmread(BytesIO(content)).StudyInstanceUID, label) for content, label in objects)


class TestIngest:
    @needs_orthanc
    @pytest.mark.usefixtures("authorization")
    def test_from_a_pacs(self, project: Project, tmp_path: Path) -> None:
        objects = list(studies(24, image_size=32, seed=9, labels=LABELS))
        labels_by_study(tmp_path / "labels.csv", objects)
        with Orthanc(tmp_path / "orthanc") as server:
            server.fill([content for content, _ in objects])
            source = source_of("dicomweb", server).model_dump()
            config = load(project(data={"source": source}, deidentification=SETTINGS.model_dump()))
            record = IngestRecord.model_validate(run_stage("ingest", config, as_uri("run")).record)
        assert (record.accepted, record.quarantined) == (24, 0)

    def test_of_what_was_received(self, project: Project, tmp_path: Path) -> None:
        objects = list(studies(24, image_size=32, seed=9, labels=LABELS))
        labels_by_study(tmp_path / "labels.csv", objects)
        config = received_source(project)
        with pytest.raises(DataError, match="nothing has been received yet"):
            run_stage("ingest", load(config), as_uri("run"))
        with receiving(config) as receiver:
            send(receiver.port, files(tmp_path / "sent", [content for content, _ in objects]))
            receiver.stop()
        record = IngestRecord.model_validate(run_stage("ingest", load(config), as_uri("run")).record)
        assert (record.accepted, record.quarantined) == (24, 0)
