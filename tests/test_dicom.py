"""Decoding of DICOM: the standard's order of intensity transforms, declared ranges, and refusals that quote nothing."""

import logging
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from pydicom import Dataset, Sequence, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_windowing
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from cv_factory_ops.config.data import DeidentificationConfig, FileWindow
from cv_factory_ops.domain import Decoded, Decoding, FixedWindow, FullWindow, pseudonym
from cv_factory_ops.errors import Rejected
from domain_medical import DOMAIN
from domain_medical.intensities import Window
from domain_medical.pixels import MAX_PIXELS

ODD = Path(__file__).parents[2] / "shared" / "data" / "dicom_odd"
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def make(pixels: NDArray[np.generic] = RAMP, bits: int = 12, **attributes: object) -> Dataset:
    study = Dataset()
    study.file_meta = FileMetaDataset()
    study.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    study.SOPClassUID, study.SOPInstanceUID = ComputedRadiographyImageStorage, "2.25.1"
    study.StudyInstanceUID = "2.25.2"
    study.PatientID, study.PatientName = "MRN-4711", "Doe^Jane"
    study.Modality = "CR"
    study.Rows, study.Columns = pixels.shape[:2]
    study.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[2]
    study.PhotometricInterpretation = "MONOCHROME2"
    study.BitsAllocated, study.BitsStored, study.HighBit = 8 * pixels.itemsize, bits, bits - 1
    study.PixelRepresentation = int(pixels.dtype.kind == "i")
    study.PixelData = pixels.tobytes()
    study["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(study, keyword, value)
    return study


def encode(study: Dataset) -> bytes:
    target = BytesIO()
    dcmwrite(target, study, enforce_file_format=True)
    return target.getvalue()


def decode(data: bytes, **decoding: Any) -> Decoded:
    """The only image of a file."""
    (found,) = DOMAIN.decode(data, Decoding(**decoding))
    return found


def image(study: Dataset, **decoding: Any) -> NDArray[np.float32]:
    return unit(decode(encode(study), **decoding))


def unit(found: Decoded) -> NDArray[np.float32]:
    return found.image.astype(np.float32) / np.float32(65535)


def close(shown: ArrayLike, wanted: ArrayLike, atol: float = 1e-5) -> bool:
    """But for the rounding to one of 65536 levels."""
    return np.allclose(shown, wanted, rtol=0, atol=atol)


def refusal(data: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        list(DOMAIN.decode(data, Decoding()))
    return caught.value


def lut(first: int, bits: int, values: NDArray[np.uint16]) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return Sequence([item])


class TestIntensities:
    def test_range_is_that_of_the_stored_bits(self) -> None:
        assert close(image(make()), RAMP / 4095)

    def test_same_value_means_the_same_in_every_image(self) -> None:
        dark, bright = RAMP // 4, RAMP // 2
        assert image(make(dark)).max() == pytest.approx(1023 / 4095, abs=1e-5)
        assert image(make(bright)).max() == pytest.approx(2047 / 4095, abs=1e-5)

    def test_signed_pixels(self) -> None:
        signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
        assert close(image(make(signed)), RAMP / 4095)

    def test_monochrome1_is_inverted(self) -> None:
        assert close(image(make(PhotometricInterpretation="MONOCHROME1")), 1 - RAMP / 4095)

    def test_rescale_comes_before_the_window(self) -> None:
        shown = image(make(RescaleSlope=2.0, RescaleIntercept=-1000.0, WindowCenter=1000.0, WindowWidth=401.0))
        expected = np.clip((2.0 * RAMP - 1000.0 - 999.5) / 400.0 + 0.5, 0, 1)
        assert close(shown, expected)

    def test_window_comes_before_the_inversion(self) -> None:
        attributes = {"WindowCenter": 100.0, "WindowWidth": 50.0}
        shown = image(make(PhotometricInterpretation="MONOCHROME1", **attributes))
        assert close(shown, 1 - image(make(**attributes)))
        assert shown[0, 0] == 1.0
        assert shown[-1, -1] == 0.0

    def test_first_of_several_windows_is_used(self) -> None:
        one = image(make(WindowCenter=100.0, WindowWidth=50.0))
        assert np.array_equal(image(make(WindowCenter=[100.0, 2000.0], WindowWidth=[50.0, 4000.0])), one)

    def test_window_of_no_width_is_no_window(self) -> None:
        assert close(image(make(WindowCenter=0.0, WindowWidth=0.0)), RAMP / 4095)

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_window_agrees_with_pydicom(self, function: str) -> None:
        study = make(WindowCenter=1500.0, WindowWidth=900.0, VOILUTFunction=function)
        theirs = apply_windowing(RAMP, study) / 4095
        assert close(Window(1500.0, 900.0, function)(RAMP.astype(float)), theirs, atol=1e-3)
        assert close(image(study), theirs, atol=1e-3)

    def test_voi_lut_has_precedence_over_the_window(self) -> None:
        table = np.arange(4096, dtype=np.uint16)[::-1].copy()
        shown = image(make(VOILUTSequence=lut(0, 12, table), WindowCenter=5.0, WindowWidth=3.0))
        assert close(shown, 1 - RAMP / 4095)

    def test_voi_lut_with_more_entries_than_grey_levels(self) -> None:
        table = (np.arange(4096) // 16).astype(np.uint16)
        assert close(image(make(VOILUTSequence=lut(0, 8, table))), (RAMP // 16) / 255)

    def test_modality_lut_is_clamped_at_its_ends(self) -> None:
        shown = image(make(ModalityLUTSequence=lut(1000, 10, np.arange(1024, dtype=np.uint16))))
        assert close(shown, np.clip(RAMP.astype(int) - 1000, 0, 1023) / 1023)

    def test_colour_becomes_luminance(self) -> None:
        colours = np.zeros((8, 8, 3), np.uint8)
        colours[..., 1] = 255
        study = make(colours, bits=8, PhotometricInterpretation="RGB", PlanarConfiguration=0)
        assert close(image(study), 0.587)

    def test_middle_frame_of_several(self) -> None:
        frames = np.stack([np.full((8, 8), value, np.uint8) for value in (10, 51, 200)])
        study = make(frames[0], bits=8, NumberOfFrames=3)
        study.PixelData = frames.tobytes()
        assert close(image(study), 0.2)

    def test_window_of_the_frame_in_enhanced_images(self) -> None:
        study = make()
        voi, group = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = 100.0, 50.0
        group.FrameVOILUTSequence = [voi]
        study.PerFrameFunctionalGroupsSequence = [group]
        assert np.array_equal(image(study), image(make(WindowCenter=100.0, WindowWidth=50.0)))

    def test_compressed_pixels(self) -> None:
        study = make()
        study.compress(RLELossless, generate_instance_uid=False)
        assert close(image(study), RAMP / 4095)

    @pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "examples_palette.dcm", "examples_ybr_color.dcm"])
    def test_real_files(self, name: str) -> None:
        decoded = decode(Path(str(get_testdata_file(name, download=False))).read_bytes())
        assert decoded.image.dtype == np.uint16
        assert decoded.image.min() < decoded.image.max()


class TestChoices:
    """What ``decoding`` of a project chooses."""

    def test_index_chooses_among_windows_and_takes_the_last_of_fewer(self) -> None:
        study = make(WindowCenter=[100.0, 2000.0], WindowWidth=[50.0, 4000.0])
        second = image(make(WindowCenter=2000.0, WindowWidth=4000.0))
        assert np.array_equal(image(study, window=FileWindow(index=1)), second)
        assert np.array_equal(image(study, window=FileWindow(index=7)), second)

    def test_index_chooses_among_voi_luts(self) -> None:
        tables = [np.arange(4096, dtype=np.uint16), np.arange(4096, dtype=np.uint16)[::-1].copy()]
        study = make(VOILUTSequence=Sequence([lut(0, 12, table)[0] for table in tables]))
        assert close(image(study), RAMP / 4095)
        assert close(image(study, window=FileWindow(index=1)), 1 - RAMP / 4095)

    def test_fixed_window_is_in_modality_units(self) -> None:
        study = make(RescaleSlope=2.0, RescaleIntercept=-1000.0, WindowCenter=1.0, WindowWidth=2.0)
        shown = image(study, window=FixedWindow(center=1000, width=400))
        assert close(shown, np.clip((2.0 * RAMP - 1000 - 1000) / 400 + 0.5, 0, 1))

    def test_full_window_heeds_no_window_of_the_file(self) -> None:
        assert close(image(make(WindowCenter=1.0, WindowWidth=2.0), window=FullWindow()), RAMP / 4095)

    def test_linear_window_of_width_one_is_a_threshold(self) -> None:
        shown = image(make(WindowCenter=1000.5, WindowWidth=1.0))
        assert np.array_equal(shown, RAMP > 1000)

    def test_grey_as_rgb_is_repeated(self) -> None:
        shown = image(make(), color="rgb")
        assert shown.shape == (64, 64, 3)
        assert all(np.array_equal(shown[..., channel], image(make())) for channel in range(3))

    @pytest.mark.parametrize("window", [FileWindow(), FixedWindow(center=5, width=9)])
    def test_colours_have_no_window(self, window: FileWindow | FixedWindow) -> None:
        colours = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
        study = make(colours, bits=8, PhotometricInterpretation="RGB", PlanarConfiguration=0, WindowCenter=5, WindowWidth=3)
        assert close(image(study, color="rgb", window=window), colours / 255)

    def test_planes_of_colours(self) -> None:
        colours = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
        study = make(colours, bits=8, PhotometricInterpretation="RGB", PlanarConfiguration=1)
        study.PixelData = colours.transpose(2, 0, 1).tobytes()
        assert close(image(study, color="rgb"), colours / 255)

    def test_ybr_becomes_rgb(self) -> None:
        grey = np.full((8, 8, 3), 128, np.uint8)
        grey[..., 0] = 77
        study = make(grey, bits=8, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=0)
        assert close(image(study, color="rgb"), 77 / 255)

    def test_all_frames_one_after_the_other(self) -> None:
        frames = np.stack([np.full((8, 8), value, np.uint8) for value in (10, 51, 200)])
        study = make(frames[0], bits=8, NumberOfFrames=3)
        study.PixelData = frames.tobytes()
        found = list(DOMAIN.decode(encode(study), Decoding(frames="all")))
        assert [item.frame for item in found] == [0, 1, 2]
        assert [round(float(unit(item).mean() * 255)) for item in found] == [10, 51, 200]
        assert decode(encode(study)).frame == 1
        assert decode(encode(make())).frame is None

    def test_each_frame_has_its_own_attributes(self) -> None:
        study = make(NumberOfFrames=2)
        study.PixelData = RAMP.tobytes() * 2
        shared, measures, voi, rescale = Dataset(), Dataset(), Dataset(), Dataset()
        measures.PixelSpacing = [0.5, 0.25]
        voi.WindowCenter, voi.WindowWidth = 100.0, 50.0
        rescale.RescaleSlope, rescale.RescaleIntercept = 2, -7
        shared.PixelMeasuresSequence, shared.PixelValueTransformationSequence = [measures], [rescale]
        first, second = Dataset(), Dataset()
        first.FrameVOILUTSequence = [voi]
        study.SharedFunctionalGroupsSequence, study.PerFrameFunctionalGroupsSequence = [shared], [first, second]
        found = list(DOMAIN.decode(encode(study), Decoding(frames="all")))
        assert [item.spacing for item in found] == [(0.5, 0.25)] * 2
        both = {"RescaleSlope": 2, "RescaleIntercept": -7}
        assert np.array_equal(unit(found[0]), image(make(WindowCenter=100.0, WindowWidth=50.0, **both)))
        assert np.array_equal(unit(found[1]), image(make(**both)))

    def test_memory_is_that_of_a_frame(self) -> None:
        study = make(np.zeros((512, 512), np.uint16), NumberOfFrames=60)
        study.PixelData = bytes(512 * 512 * 2 * 60)
        data = encode(study)
        tracemalloc.start()
        assert sum(1 for _ in DOMAIN.decode(data, Decoding(frames="all"))) == 60
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20  # the file has 30 MiB, a frame 1 MiB as float32


class TestStoredValues:
    def test_high_bit_says_where_the_value_lies(self) -> None:
        assert close(image(make((RAMP << 4).astype(np.uint16), HighBit=15)), RAMP / 4095)

    @pytest.mark.parametrize("signed", [False, True])
    def test_overlays_in_unused_bits_are_not_seen(self, signed: bool) -> None:
        values = RAMP.astype(np.int64) - (2048 if signed else 0)
        words = ((values & 4095) | (RAMP.astype(np.int64) % 16 << 12)).astype("<u2")
        assert close(image(make(words, PixelRepresentation=int(signed))), RAMP / 4095)

    def test_large_images_are_looked_up_and_small_ones_computed_alike(self) -> None:
        attributes = {"RescaleSlope": 0.7, "WindowCenter": 900.0, "WindowWidth": 333.0, "VOILUTFunction": "SIGMOID"}
        large = image(make(np.tile(RAMP, (4, 4)), **attributes))
        assert np.array_equal(large[:64, :64], image(make(**attributes)))
        signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
        large = image(make(np.tile(signed, (4, 4)), **attributes))
        assert np.array_equal(large[:64, :64], image(make(signed, **attributes)))

    def test_32_bits(self) -> None:
        wide = RAMP.astype(np.uint32) * 1000
        assert close(
            image(make(wide, bits=32, WindowCenter=2000000, WindowWidth=100000)),
            np.clip((wide - 1999999.5) / 99999 + 0.5, 0, 1),
            atol=1e-5,
        )

    def test_floating_point_has_its_own_extremes_as_range_without_its_padding(self) -> None:
        study = make(SOPClassUID="1.2.840.10008.5.1.4.1.1.30", FloatPixelPaddingValue=-9999.0)
        del study.PixelData, study.BitsStored, study.HighBit, study.PixelRepresentation
        values = np.array([[-9999, 1, 2], [3, 4, 5]], "<f4")
        study.Rows, study.Columns, study.BitsAllocated, study.FloatPixelData = 2, 3, 32, values.tobytes()
        assert close(image(study), [[0, 0, 0.25], [0.5, 0.75, 1]])

    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_padding_is_black(self, photometric: str) -> None:
        shown = image(make(PixelPaddingValue=7, PixelPaddingRangeLimit=9, PhotometricInterpretation=photometric))
        plain = image(make(PhotometricInterpretation=photometric))
        assert not shown.ravel()[7:10].any()
        assert np.array_equal(np.delete(shown, range(7, 10)), np.delete(plain, range(7, 10)))

    def test_padding_outside_of_the_stored_bits(self) -> None:
        words = RAMP.astype(np.int16) - 2048
        words[0, 0] = -32768
        study = make(words, WindowCenter=0, WindowWidth=100, PhotometricInterpretation="MONOCHROME1")
        study.add_new("PixelPaddingValue", "US", 32768)
        shown = image(study)
        assert shown[0, 0] == 0
        assert shown[0, 1] == 1

    @pytest.mark.parametrize(("photometric", "shape", "inverted"), [
        ("MONOCHROME1", "INVERSE", True), ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "IDENTITY", False), ("MONOCHROME2", "INVERSE", True),
    ])  # fmt: skip
    def test_shape_of_the_presentation_lut(self, photometric: str, shape: str, inverted: bool) -> None:
        shown = image(make(PhotometricInterpretation=photometric, PresentationLUTShape=shape))
        assert close(shown, 1 - RAMP / 4095 if inverted else RAMP / 4095)

    def test_palette_of_eight_bits_in_words(self) -> None:
        study = make(np.array([[0, 1], [2, 200]], np.uint8), bits=8, PhotometricInterpretation="PALETTE COLOR")
        for name, top in (("Red", 255), ("Green", 100), ("Blue", 0)):
            study.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [3, 0, 8])
            data = np.array([0, top // 2, top], "<u2").tobytes()
            study.add_new(f"{name}PaletteColorLookupTableData", "OW", data)
        assert close(image(study, color="rgb")[..., 0] * 255, [[0, 127], [255, 255]], atol=0.01)
        assert close(image(study, color="rgb")[..., 1] * 255, [[0, 50], [100, 100]], atol=0.01)
        assert close(image(study)[1, 1] * 255, 0.299 * 255 + 0.587 * 100, atol=0.01)


class TestSpacing:
    @pytest.mark.parametrize(("attributes", "expected"), [
        ({"PixelSpacing": [0.5, 0.25], "ImagerPixelSpacing": [9, 9]}, (0.5, 0.25)),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1)),
        ({"ImagerPixelSpacing": [0.2, 0.1], "EstimatedRadiographicMagnificationFactor": 2}, (0.1, 0.05)),
        ({"NominalScannedPixelSpacing": [0.3, 0.4]}, (0.3, 0.4)),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1)),
        ({"PixelSpacing": [-1, 1]}, None),
        ({}, None),
    ])  # fmt: skip
    def test_sources_in_their_order(self, attributes: dict[str, Any], expected: tuple[float, float] | None) -> None:
        found = decode(encode(make(**attributes))).spacing
        assert found == (pytest.approx(expected) if expected else None)

    def test_ultrasound_regions(self) -> None:
        def region(delta: float, units: int = 3, form: int = 1) -> Dataset:
            made = Dataset()
            made.RegionSpatialFormat, made.PhysicalUnitsXDirection, made.PhysicalUnitsYDirection = form, units, units
            made.PhysicalDeltaX, made.PhysicalDeltaY = delta, 2 * delta
            return made

        def spacing(*regions: Dataset) -> tuple[float, float] | None:
            return decode(encode(make(SequenceOfUltrasoundRegions=list(regions)))).spacing

        assert spacing(region(0.03), region(7, units=4, form=3)) == pytest.approx((0.6, 0.3))
        assert spacing(region(0.03), region(0.03)) == pytest.approx((0.6, 0.3))
        assert spacing(region(0.03), region(0.04)) is None


class TestFiles:
    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
    def test_without_preamble(self, syntax: str) -> None:
        study = make()
        if syntax == ExplicitVRBigEndian:
            study.PixelData = RAMP.byteswap().tobytes()
        study.file_meta.TransferSyntaxUID = syntax
        whole = encode(study)
        meta = 144 + int.from_bytes(whole[140:144], "little")
        for bare in (whole[meta:], whole[132:]):
            assert DOMAIN.recognises(bare)
            assert close(unit(decode(bare)), RAMP / 4095)

    def test_deflated(self) -> None:
        study = make()
        study.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        data = encode(study)
        assert len(data) < RAMP.nbytes
        assert close(unit(decode(data)), RAMP / 4095)
        assert refusal(data[:-100]).code == "truncated"

    def test_deflated_bomb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("domain_medical.dicom.MAX_INFLATED", 1 << 22)
        study = make()
        study.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        data = encode(study)
        stream = zlib.compressobj(1, wbits=-15)
        bomb = stream.compress(bytes(1 << 26)) + stream.flush()
        start = 144 + int.from_bytes(data[140:144], "little")
        tracemalloc.start()
        assert refusal(data[:start] + bomb).code == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()

    def test_text_and_noise_are_no_dicom(self) -> None:
        noise = np.random.default_rng(0)
        for data in (b"label,file\n" * 99, b"\x08\0\x05\0" + noise.bytes(5000), b"\x08\0\x16\0UI\x1a\0" + noise.bytes(5000)):
            assert refusal(data).code == "not_dicom"

    def test_codestream_larger_than_the_image_is_not_decoded(self) -> None:
        study = make()
        study.compress(JPEG2000Lossless, generate_instance_uid=False)
        data = bytearray(encode(study))
        at = data.index(b"\xff\x4f\xff\x51") + 8
        data[at : at + 8] = struct.pack(">2L", 1 << 20, 1 << 20)
        assert refusal(bytes(data)).code == "undecodable"

    def test_rows_of_a_frame_too_large(self) -> None:
        assert refusal(encode(make(Rows=20000, Columns=4000, BitsAllocated=64, BitsStored=64, HighBit=63))).code == "too_large"


class TestListed:
    @pytest.mark.parametrize("name", ["DICOMDIR", "DICOMDIR-nooffset", "DICOMDIR-implicit.dcm", "DICOMDIR-bigEnd"])
    def test_dicomdir(self, name: str) -> None:
        path = next((path for path in ODD.rglob(name) if path.is_file()), None)
        if path is None:
            pytest.skip("the collection of odd DICOM files is not on this machine")
        found = DOMAIN.listed(path.read_bytes())
        assert found
        assert len(set(found)) == len(found)
        assert all((path.parent / item).is_file() for item in found) or name != "DICOMDIR"

    def test_other_bytes_are_no_list(self) -> None:
        for data in (b"", b"x" * 5000, encode(make())):
            assert DOMAIN.listed(data) is None

    @pytest.mark.parametrize("parts", [["..", "x"], ["a/b"], ["", "etc"]])
    def test_files_outside_are_refused(self, parts: list[str]) -> None:
        with pytest.raises(Rejected) as caught:
            DOMAIN.listed(dicomdir([parts]))
        assert caught.value.code == "undecodable"

    def test_records_not_in_use_are_left_out(self) -> None:
        assert DOMAIN.listed(dicomdir([["A", "B"], ["C"]], in_use=[0xFFFF, 0])) == ["A/B"]

    def test_cut(self) -> None:
        whole = dicomdir([["A", "B"], ["C"]])
        for length in range(len(whole)):
            with suppress(Rejected):
                assert set(DOMAIN.listed(whole[:length]) or []) <= {"A/B", "C"}


def dicomdir(files: list[list[str]], in_use: list[int] | None = None) -> bytes:
    study = Dataset()
    study.file_meta = FileMetaDataset()
    study.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    study.file_meta.MediaStorageSOPClassUID, study.file_meta.MediaStorageSOPInstanceUID = MediaStorageDirectoryStorage, "2.25.3"
    records = []
    for parts, used in zip(files, in_use or [0xFFFF] * len(files), strict=True):
        record = Dataset()
        record.ReferencedFileID, record.RecordInUseFlag = parts, used
        records.append(record)
    study.DirectoryRecordSequence = records
    return encode(study)


class TestMetadata:
    def test_names_are_the_declared_ones_and_kinds_fit(self) -> None:
        study = make(PatientAge="018M", PatientSex="F", KVP="120", ImagerPixelSpacing=[0.14, 0.15], Manufacturer=" Acme ")
        found = decode(encode(study)).metadata
        assert list(found) == list(DOMAIN.metadata)
        assert (found["age_years"], found["sex"], found["kvp"]) == (1.5, "F", 120.0)
        assert (found["manufacturer"], found["pixel_spacing_mm"], found["bits_stored"]) == ("Acme", 0.14, 12.0)
        for name, kind in DOMAIN.metadata.items():
            assert found[name] is None or isinstance(found[name], float if kind == "number" else str)

    def test_missing_and_senseless_values_are_none(self) -> None:
        study = make(PatientSex="X")
        study.add_new("PatientAge", "AS", "abc")
        study.add_new("KVP", "DS", "NaN")
        found = decode(encode(study)).metadata
        assert [found[name] for name in ("sex", "age_years", "kvp", "pixel_spacing_mm", "view_position")] == [None] * 5

    def test_nothing_of_the_patient_is_in_what_is_decoded(self) -> None:
        study = make(PatientBirthDate="19700203", OtherPatientNames="Jane^Roe")
        text = repr(decode(encode(study)))
        for secret in ("MRN-4711", "Doe", "Jane", "19700203", "2.25.2'"):
            assert secret not in text

    def test_identity_is_a_pseudonym(self) -> None:
        decoded = decode(encode(make()))
        assert decoded.patient == pseudonym("MRN-4711", "patient")
        assert decoded.study.startswith("2.25.")
        assert decode(encode(make(StudyInstanceUID="2.25.3"))).study != decoded.study

    def test_pseudonyms_of_deidentified_files_are_kept(self) -> None:
        decoded = decode(encode(make(PatientIdentityRemoved="YES", PatientID="p1", StudyInstanceUID="2.25.9")))
        assert (decoded.patient, decoded.study) == ("p1", "2.25.9")

    def test_no_identity_gives_none(self) -> None:
        decoded = decode(encode(make(PatientID="", StudyInstanceUID="")))
        assert (decoded.patient, decoded.study) == ("", "")

    def test_instance_is_a_pseudonym_that_a_table_can_be_matched_by(self) -> None:
        assert decode(encode(make())).instance == DOMAIN.remapped("2.25.1") != "2.25.1"
        assert decode(encode(make(PatientIdentityRemoved="YES"))).instance == "2.25.1"


class TestRefusals:
    def test_not_dicom(self) -> None:
        for data in (b"", b"PNG", b"\0" * 5000):
            assert refusal(data).code == "not_dicom"
            assert not DOMAIN.recognises(data)
        assert DOMAIN.recognises(encode(make()))

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
    def test_truncated_pixels(self, share: float) -> None:
        whole = encode(make())
        assert refusal(whole[: int(len(whole) * share)]).code == "truncated"

    def test_every_cut_is_refused(self) -> None:
        whole = encode(make(RAMP[:4, :4], bits=12))
        for length in range(len(whole)):
            assert refusal(whole[:length]).code in {"not_dicom", "truncated", "no_pixels", "undecodable"}

    def test_no_pixels(self) -> None:
        study = make(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
        del study.PixelData, study.Rows
        assert refusal(encode(study)).code == "no_pixels"

    def test_wrong_value_representation(self) -> None:
        study = make()
        del study.BitsStored
        study.add_new("BitsStored", "LO", "twelve of Doe^Jane")
        error = refusal(encode(study))
        assert error.code == "undecodable"
        assert "Jane" not in str(error)

    def test_too_large(self) -> None:
        error = refusal(encode(make(Rows=60000, Columns=60000)))
        assert error.code == "too_large"
        assert str(MAX_PIXELS) in str(error)

    def test_garbled_compression(self) -> None:
        study = make()
        study.compress(RLELossless, generate_instance_uid=False)
        data = bytearray(encode(study))
        header = data.rindex(b"\xfe\xff\x00\xe0") + 8
        data[header : header + 12] = b"\xff" * 12
        assert refusal(bytes(data)).code == "undecodable"

    def test_warnings_do_not_quote_values(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        study = make()
        study.add_new("PatientBirthDate", "LO", "Doe 3 Feb 1970")
        study.add_new("StudyDate", "DA", "Doe")
        study.SpecificCharacterSet = "ISO_IR 100"
        data = encode(study).replace(b"ISO_IR 100", b"Doe_IR 100")
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
            warnings.simplefilter("always")
            decode(data)
            DOMAIN.deidentify(data, DeidentificationConfig(pixels="trust"))
        assert not [w for w in caught if "Doe" in str(w.message)]
        assert "Doe" not in caplog.text + "".join(capfd.readouterr())

    @pytest.mark.skipif(not ODD.is_dir(), reason="the collection of odd DICOM files is not on this machine")
    def test_odd_files_are_decoded_where_pydicom_can_else_refused(self) -> None:
        counts = Counter[str]()
        for path in sorted(item for item in ODD.rglob("*") if item.is_file()):
            data = path.read_bytes()
            try:
                for found in DOMAIN.decode(data, Decoding(frames="all", color="rgb")):
                    assert found.image.ndim == 3, path
                    assert found.image.dtype == np.uint16, path
                counts["decoded"] += 1
            except Rejected as error:
                counts[error.code] += 1
                assert not pydicom_decodes(data), path
        assert counts["decoded"] >= 150
        assert set(counts) <= {"decoded", "not_dicom", "truncated", "no_pixels", "too_large", "undecodable"}


def pydicom_decodes(data: bytes) -> bool:
    try:
        return dcmread(BytesIO(data), force=True).pixel_array.size > 0
    except Exception:
        return False


def test_importing_the_domain_imports_no_pydicom() -> None:
    code = "import sys, domain_medical; print([m for m in ('pydicom', 'numpy', 'pandas', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_encoding_helper_round_trips() -> None:
    assert dcmread(BytesIO(encode(make()))).PatientID == "MRN-4711"
