"""Decoding compared, pixel for pixel, with dcmtk: another implementation, by other people."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import data as pydicom_data
from pydicom.uid import JPEGLSTransferSyntaxes, JPEGTransferSyntaxes, RLELossless

from cv_factory_ops.domain import Decoded, Decoding, FixedWindow, FullWindow
from cv_factory_ops.errors import Rejected
from domain_medical import DOMAIN
from domain_medical.dicom import numbers, read
from domain_medical.pixels import Pixels

needs_dcmtk = pytest.mark.skipif(not shutil.which("dcm2pnm"), reason="dcmtk is not installed")
ODD = Path(__file__).parents[2] / "shared" / "data" / "dicom_odd"
BUNDLED = Path(pydicom_data.__file__).parent / "test_files"
FILES = sorted({path.name: path for path in [*BUNDLED.rglob("*"), *ODD.rglob("*")] if path.is_file()}.values())
LOSSY = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}

DIFFERENT = {
    "liver.dcm": "a single bit: dcm2pnm shows the value 1 as the grey level 128, we as white",
    "liver_1frame.dcm": "a single bit, as above",
    "liver_expb.dcm": "a single bit, as above",
    "liver_expb_1frame.dcm": "a single bit, as above",
    "liver_nonbyte_aligned.dcm": "a single bit, as above",
    "rtdose_expb.dcm": "32 bits, big endian: dcmtk swaps the bytes of 16-bit words; our values are those of rtdose.dcm",
    "rtdose_expb_1frame.dcm": "32 bits, big endian, as above",
}
LEVELS = {"YBR_FULL": 3, "YBR_FULL_422": 3}
"""Grey levels, of 255, that images may differ by: conversions of colour round, and chroma is enlarged in two ways. Else 1;
3 for lossy JPEG, whose inverse transform is only defined up to an error."""


def decoded(path: Path, decoding: Decoding) -> Decoded | None:
    try:
        return next(DOMAIN.decode(path.read_bytes(), decoding))
    except Rejected:
        return None


def known_to_dcmtk(path: Path) -> bool:
    """Whether it is compressed by JPEG, JPEG-LS or RLE: those that dcmtk decompresses."""
    try:
        syntax = read(path.read_bytes()).file_meta.TransferSyntaxUID
        return syntax == RLELossless or syntax in {*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes}
    except Rejected:
        return False


def shown_by_dcmtk(path: Path, folder: Path, frame: int, options: list[str]) -> NDArray[np.uint8] | None:
    """(rows, columns, 3) of 0..255; compressed files go through dcmtk's decompressors first. None where it cannot."""
    picture, plain = folder / "picture.ppm", folder / "plain.dcm"
    for tool in (None, "dcmdjpeg", "dcmdjpls", "dcmdrle"):
        if tool and subprocess.run([tool, "-q", path, plain], capture_output=True).returncode:
            continue
        command = ["dcm2pnm", "-q", "-O", *options, "+F", str(frame + 1), plain if tool else path, picture]
        if not subprocess.run(command, capture_output=True).returncode:
            found = cv2.imread(str(picture), cv2.IMREAD_UNCHANGED)
            return np.repeat(found[..., None], 3, axis=2) if found.ndim == 2 else found[..., ::-1]
    return None


def windows(path: Path) -> list[tuple[Decoding, list[str]]]:
    """The ways to show a file, for us and for dcm2pnm. It reads no window from functional groups: there it is given ours."""
    study = read(path.read_bytes())
    full = (Decoding(window=FullWindow(), color="rgb"), ["-W"])
    fixed = Decoding(window=FixedWindow(center=100, width=500, function="LINEAR"), color="rgb")
    fixed_too = (fixed, ["+Ww", "100", "500", "+Wfl"])
    if study.get("SamplesPerPixel") != 1 or study.get("PhotometricInterpretation") == "PALETTE COLOR":
        return [full]
    if "PerFrameFunctionalGroupsSequence" in study:
        return [full, fixed_too]
    if "VOILUTSequence" in study:
        options = ["+Wl", "1"]
    else:
        options = ["+Wi", "1"] if (numbers(study, "WindowWidth") or [0])[0] > 0 else ["-W"]
    return [full, fixed_too, (Decoding(color="rgb"), options)]


@needs_dcmtk
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_images_are_those_of_dcmtk(path: Path, tmp_path: Path) -> None:
    if (first := decoded(path, Decoding())) is None:
        pytest.skip("is refused")
    if path.name in DIFFERENT:
        pytest.skip(DIFFERENT[path.name])
    study = read(path.read_bytes())
    for decoding, options in windows(path):
        ours = decoded(path, decoding)
        theirs = shown_by_dcmtk(path, tmp_path, first.frame or 0, options)
        if theirs is None:
            pytest.skip(f"dcmtk cannot show {study.file_meta.TransferSyntaxUID.name} of {study.get('BitsAllocated')} bits")
        assert ours is not None
        difference = np.abs(np.rint(ours.image / 257) - theirs)
        if "PixelPaddingValue" in study:  # dcm2pnm shows padding as if it were image
            pixels = Pixels(study)
            padding = pixels.stored.values(next(pixels.words([first.frame or 0]))) == study.PixelPaddingValue
            assert not ours.image[padding].any()
            difference[padding] = 0
        lossy = 3 if study.file_meta.TransferSyntaxUID in LOSSY else 1
        assert difference.max() <= LEVELS.get(study.PhotometricInterpretation, lossy), options


COMPRESSED = [path for path in FILES if known_to_dcmtk(path)]


@needs_dcmtk
@pytest.mark.parametrize("path", COMPRESSED, ids=lambda path: path.name)
def test_stored_values_are_those_of_dcmtk(path: Path, tmp_path: Path) -> None:
    if decoded(path, Decoding()) is None:
        pytest.skip("is refused")
    study = read(path.read_bytes())
    syntax, plain = study.file_meta.TransferSyntaxUID, tmp_path / "plain.dcm"
    tools = ("dcmdjpeg", "dcmdjpls", "dcmdrle")
    if all(subprocess.run([tool, "-q", path, plain], capture_output=True).returncode for tool in tools):
        pytest.skip("dcmtk cannot decompress it")
    pixels = Pixels(study)
    theirs = Pixels(read(plain.read_bytes()))
    several = range(min(pixels.frames, 3))
    for our, their in zip(pixels.words(several), theirs.words(several), strict=True):
        assert np.array_equal(pixels.stored.values(our), theirs.stored.values(their)) or (
            syntax in LOSSY and np.abs(our.astype(int) - their).max() <= 3
        )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("693_J2KR.dcm", "693_UNCR.dcm"),
        ("MR2_J2KR.dcm", "MR2_UNCR.dcm"),
        ("US1_J2KR.dcm", "US1_UNCR.dcm"),
        ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm"),
        ("emri_small_RLE.dcm", "emri_small.dcm"),
        ("emri_small_big_endian.dcm", "emri_small.dcm"),
        ("liver_j2k.dcm", "liver.dcm"),
        ("liver_rle.dcm", "liver.dcm"),
        ("liver_expb.dcm", "liver.dcm"),
        ("liver_nonbyte_aligned_j2k.dcm", "liver_nonbyte_aligned.dcm"),
        ("liver_nonbyte_aligned_rle.dcm", "liver_nonbyte_aligned.dcm"),
        ("SC_rgb_expb_32bit_2frame.dcm", "SC_rgb_32bit_2frame.dcm"),
        ("rtdose_expb.dcm", "rtdose.dcm"),
    ],
)
def test_images_do_not_depend_on_their_encoding(one: str, other: str) -> None:
    paths = {path.name: path for path in FILES}
    if not {one, other} <= set(paths):
        pytest.skip("the collection of odd DICOM files is not on this machine")
    both = [list(DOMAIN.decode(paths[name].read_bytes(), Decoding(frames="all"))) for name in (one, other)]
    assert len(both[0]) == len(both[1]) > 0
    for left, right in zip(*both, strict=True):
        assert left.frame == right.frame
        assert np.array_equal(left.image, right.image)
