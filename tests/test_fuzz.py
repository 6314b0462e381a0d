"""Readers under random damage: only our own errors come out.

A few seconds by default; ``CVF_FUZZ_SECONDS`` says for how long each reader is tried. DICOM is read in a process of its
own: where a native decoder dies or hangs on damaged data, which worker processes contain in use, that is reported as a
warning with the bytes kept in a file, and not as a failure of ours.
"""

from __future__ import annotations

import os
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import get_encoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from cv_factory_ops.config import load
from cv_factory_ops.config.data import DeidentificationConfig
from cv_factory_ops.domain import Decoding, FixedWindow
from cv_factory_ops.errors import ConfigError, Rejected

SECONDS = float(os.environ.get("CVF_FUZZ_SECONDS", 0))
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
ENCODED = {"rle": RLELossless, "jpeg_ls": JPEGLSLossless, "jpeg_2000": JPEG2000Lossless}


def study(**attributes: object) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    made.StudyInstanceUID, made.PatientID, made.PatientName = "2.25.2", "p", "Doe^Jane"
    made.Rows, made.Columns, made.SamplesPerPixel, made.NumberOfFrames = 36, 32, 1, 3
    made.PhotometricInterpretation, made.PixelRepresentation = "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.PixelData = (np.arange(3 * 36 * 32) * 11 % 4096).astype("<u2").tobytes()
    made["PixelData"].VR = "OW"
    made.PixelSpacing, made.RescaleSlope, made.RescaleIntercept = [0.1, 0.2], 2, -5
    made.WindowCenter, made.WindowWidth, made.PixelPaddingValue = [40, 50], [400, 500], 0
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def nested(keyword: str, *items: Dataset, **attributes: object) -> Dataset:
    made = Dataset()
    setattr(made, keyword, list(items))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def lut() -> Dataset:
    made = Dataset()
    made.LUTDescriptor, made.LUTData = [256, 0, 12], (np.arange(256, dtype="<u2") * 16).tobytes()
    made["LUTDescriptor"].VR, made["LUTData"].VR = "US", "OW"
    return made


def written(made: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    made.file_meta.TransferSyntaxUID = syntax
    target = BytesIO()
    dcmwrite(target, made, enforce_file_format=True)
    return target.getvalue()


def compressed(syntax: str) -> bytes:
    made = study()
    made.compress(syntax, generate_instance_uid=False)
    return written(made, syntax)


def palette() -> Dataset:
    made = study(
        PhotometricInterpretation="PALETTE COLOR", BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=bytes(range(256)) * 14
    )
    for name in ("Red", "Green", "Blue"):
        setattr(made, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
        made[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(made, f"{name}PaletteColorLookupTableData", bytes(range(256)))
    return made


def enhanced() -> Dataset:
    voi, measures = nested("DerivationCodeSequence", WindowCenter=5, WindowWidth=9), Dataset()
    measures.PixelSpacing = [1, 1]
    frames = [nested("FrameVOILUTSequence", voi) for _ in range(3)]
    shared = nested("PixelMeasuresSequence", measures)
    return study(SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=frames)


def directory() -> bytes:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = MediaStorageDirectoryStorage, "2.25.3"
    record = Dataset()
    record.RecordInUseFlag, record.ReferencedFileID = 0xFFFF, ["A", "B"]
    made.DirectoryRecordSequence = [record, record]
    return written(made)


def seeds() -> dict[str, bytes]:
    """Small valid files, one for each part of the reader."""
    marked = study(ReferencedImageSequence=[nested("PurposeOfReferenceCodeSequence", Dataset())], VOILUTSequence=[lut()])
    plain = written(study())
    return {
        "plain": plain,
        "bare": written(marked, ImplicitVRLittleEndian)[132:],
        "implicit": written(marked, ImplicitVRLittleEndian),
        "deflated": written(study(), DeflatedExplicitVRLittleEndian),
        "big_endian": written(study(), ExplicitVRBigEndian),
        "palette": written(palette()),
        "enhanced": written(enhanced()),
        "directory": directory(),
        **{name: compressed(syntax) for name, syntax in ENCODED.items() if get_encoder(syntax).is_available},
    }


Change = tuple[str, float, bytes]
places = st.one_of(st.floats(0, 1), st.floats(0, 0.3), st.floats(0.9, 1))
changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "cut", "splice", "huge"]), places, st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, todo: list[Change]) -> bytes:
    for what, place, new in todo:
        at = int(place * max(len(data) - 1, 0))
        match what:
            case "flip":
                data = data[:at] + new + data[at + len(new) :]
            case "insert":
                data = data[:at] + new + data[at:]
            case "delete":
                data = data[:at] + data[at + len(new) ** 2 :]
            case "cut":
                data = data[:at]
            case "splice":
                data = data[:at] + data[len(data) // 2 : len(data) // 2 + 40] + data[at:]
            case "huge":
                data = data[:at] + b"\xff\xff\xff\x7f"[: len(new)] + data[at + 4 :]
    return data


def serve(line: Connection) -> None:
    """Read what comes, and answer what went wrong with it: nothing, or the traceback of what is not our own error."""
    from domain_medical import DOMAIN

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    reads: list[Callable[[bytes], object]] = [
        lambda data: list(islice(DOMAIN.decode(data, Decoding(frames="all", color="rgb")), 4)),
        lambda data: list(DOMAIN.decode(data, Decoding(window=FixedWindow(center=5, width=9)))),
        DOMAIN.listed,
        DOMAIN.require_deidentified,
        lambda data: DOMAIN.deidentify(data, DeidentificationConfig(pixels="trust")),
    ]
    while True:
        data, answer = line.recv_bytes(), ""
        for one in reads:
            try:
                one(data)
            except Rejected:
                pass
            except BaseException:
                answer += traceback.format_exc()
        line.send(answer)


class Reader:
    """The reading process, started anew where it has died or hangs."""

    def __init__(self) -> None:
        self.deaths: list[str] = []
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.line.send_bytes(b"warm up")
        self.line.recv()

    def read(self, name: str, data: bytes) -> str:
        try:
            self.line.send_bytes(data)
            if self.line.poll(30):
                return str(self.line.recv())
            self.process.kill()
        except (EOFError, OSError):
            pass
        self.process.join()
        with tempfile.NamedTemporaryFile(prefix=f"fuzz-{name}-", suffix=".dcm", delete=False) as file:
            file.write(data)
        self.deaths.append(f"{name}: ended by {self.process.exitcode}, {file.name}")
        self.start()
        return "" if name in ENCODED else self.deaths[-1]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    found = Reader()
    yield found
    found.process.kill()
    if found.deaths:
        warnings.warn("native decoders did not survive: " + "; ".join(found.deaths), stacklevel=1)


def tried(check: Callable[..., None], *strategies: st.SearchStrategy[Any], examples: int) -> None:
    """Run a property, again and again until the time is up."""
    end = time.monotonic() + SECONDS
    kept = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while True:
        kept(given(*strategies)(check))()
        if time.monotonic() >= end:
            return


def test_damaged_dicom_is_refused_or_read(reader: Reader) -> None:
    files = seeds()
    for name, data in files.items():
        assert reader.read(name, data) == "", name

    def check(name: str, todo: list[Change]) -> None:
        answer = reader.read(name, damaged(files[name], todo))
        assert not answer, answer

    tried(check, st.sampled_from(sorted(files)), changes, examples=300)


def test_random_bytes_are_refused_or_read(reader: Reader) -> None:
    def check(start: bytes, data: bytes) -> None:
        answer = reader.read("random", start + data)
        assert not answer, answer

    starts = st.sampled_from([b"", b"\0" * 128 + b"DICM", b"\x08\0\x05\0CS\x0a\0", b"\x02\0\0\0UL\x04\0"])
    tried(check, starts, st.binary(max_size=400), examples=100)


@pytest.fixture
def read_config(tmp_path: Path) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        path = tmp_path / "fuzz.yaml"
        path.write_bytes(content)
        try:
            load(path)
        except ConfigError as error:
            assert str(error)  # noqa: PT017

    return read


def test_damaged_config_is_refused_or_read(read_config: Callable[[bytes], None]) -> None:
    texts = [path.read_bytes() for path in CONFIGS]
    words = st.sampled_from(
        [b"[", b"{a: ", b"!!int x", b"!!timestamp 1", b"2024-13-99", b"&a [*a]", b"\0", b"\xff", b": ", b"\n- ", b"1e999"]
    )

    def check(text: bytes, todo: list[Change], word: bytes, place: float) -> None:
        at = int(place * len(text))
        read_config(damaged(text[:at] + word + text[at:], todo))

    tried(check, st.sampled_from(texts), changes, words, st.floats(0, 1), examples=100)


def test_random_trees_are_refused_or_read(read_config: Callable[[bytes], None]) -> None:
    whole = [yaml.safe_load(path.read_text()) for path in CONFIGS]
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    trees = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    )

    def check(tree: dict[str, Any], value: Any, where: int) -> None:
        """One value somewhere in a valid tree is replaced."""
        node, chosen = yaml.safe_load(yaml.safe_dump(tree)), random.Random(where)
        copy = node
        while True:
            key = chosen.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not (isinstance(node[key], dict | list) and node[key]) or chosen.random() < 0.3:
                break
            node = node[key]
        node[key] = value
        read_config(yaml.safe_dump(copy).encode("utf-8", "replace"))

    tried(check, st.sampled_from(whole), trees, st.integers(0, 1 << 30), examples=100)


@pytest.mark.parametrize("content", [b"[" * 1500, b"2024-13-99", b"a: !!timestamp x", b"a: &a [*a]", b"- 1", b"", b"\xff\xfe"])
def test_strange_configs_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "strange.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load(path)
