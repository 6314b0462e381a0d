"""Decoding of DICOM: the standard's order of intensity transforms, declared ranges, and refusals that quote nothing."""

import logging
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, Sequence, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_windowing
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, RLELossless

from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import Rejected
from domain_medical import DOMAIN
from domain_medical.dicom import MAX_PIXELS, window

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


def image(study: Dataset) -> NDArray[np.float32]:
    return DOMAIN.decode(encode(study)).image


def refusal(data: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        DOMAIN.decode(data)
    return caught.value


def lut(first: int, bits: int, values: NDArray[np.uint16]) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return Sequence([item])


class TestIntensities:
    def test_range_is_that_of_the_stored_bits(self) -> None:
        assert np.allclose(image(make()), RAMP / 4095)

    def test_same_value_means_the_same_in_every_image(self) -> None:
        dark, bright = RAMP // 4, RAMP // 2
        assert image(make(dark)).max() == pytest.approx(1023 / 4095, abs=1e-6)
        assert image(make(bright)).max() == pytest.approx(2047 / 4095, abs=1e-6)

    def test_signed_pixels(self) -> None:
        signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
        assert np.allclose(image(make(signed)), RAMP / 4095)

    def test_monochrome1_is_inverted(self) -> None:
        assert np.allclose(image(make(PhotometricInterpretation="MONOCHROME1")), 1 - RAMP / 4095)

    def test_rescale_comes_before_the_window(self) -> None:
        shown = image(make(RescaleSlope=2.0, RescaleIntercept=-1000.0, WindowCenter=1000.0, WindowWidth=401.0))
        expected = np.clip((2.0 * RAMP - 1000.0 - 999.5) / 400.0 + 0.5, 0, 1)
        assert np.allclose(shown, expected, atol=1e-6)

    def test_window_comes_before_the_inversion(self) -> None:
        attributes = {"WindowCenter": 100.0, "WindowWidth": 50.0}
        shown = image(make(PhotometricInterpretation="MONOCHROME1", **attributes))
        assert np.allclose(shown, 1 - image(make(**attributes)))
        assert shown[0, 0] == 1.0
        assert shown[-1, -1] == 0.0

    def test_first_of_several_windows_is_used(self) -> None:
        one = image(make(WindowCenter=100.0, WindowWidth=50.0))
        assert np.array_equal(image(make(WindowCenter=[100.0, 2000.0], WindowWidth=[50.0, 4000.0])), one)

    def test_window_of_no_width_is_no_window(self) -> None:
        assert np.allclose(image(make(WindowCenter=0.0, WindowWidth=0.0)), RAMP / 4095)

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_window_agrees_with_pydicom(self, function: str) -> None:
        study = make(WindowCenter=1500.0, WindowWidth=900.0, VOILUTFunction=function)
        theirs = apply_windowing(RAMP, study) / 4095
        assert np.allclose(window(RAMP.astype(float), 1500.0, 900.0, function), theirs, atol=1e-3)
        assert np.allclose(image(study), theirs, atol=1e-3)

    def test_voi_lut_has_precedence_over_the_window(self) -> None:
        table = np.arange(4096, dtype=np.uint16)[::-1].copy()
        shown = image(make(VOILUTSequence=lut(0, 12, table), WindowCenter=5.0, WindowWidth=3.0))
        assert np.allclose(shown, 1 - RAMP / 4095)

    def test_voi_lut_with_more_entries_than_grey_levels(self) -> None:
        table = (np.arange(4096) // 16).astype(np.uint16)
        assert np.allclose(image(make(VOILUTSequence=lut(0, 8, table))), (RAMP // 16) / 255)

    def test_modality_lut_is_clamped_at_its_ends(self) -> None:
        shown = image(make(ModalityLUTSequence=lut(1000, 10, np.arange(1024, dtype=np.uint16))))
        assert np.allclose(shown, np.clip(RAMP.astype(int) - 1000, 0, 1023) / 1023)

    def test_colour_becomes_luminance(self) -> None:
        colours = np.zeros((8, 8, 3), np.uint8)
        colours[..., 1] = 255
        study = make(colours, bits=8, PhotometricInterpretation="RGB", PlanarConfiguration=0)
        assert np.allclose(image(study), 0.587)

    def test_middle_frame_of_several(self) -> None:
        frames = np.stack([np.full((8, 8), value, np.uint8) for value in (10, 51, 200)])
        study = make(frames[0], bits=8, NumberOfFrames=3)
        study.PixelData = frames.tobytes()
        assert np.allclose(image(study), 0.2)

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
        assert np.allclose(image(study), RAMP / 4095)

    @pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "examples_palette.dcm", "examples_ybr_color.dcm"])
    def test_real_files(self, name: str) -> None:
        decoded = DOMAIN.decode(Path(str(get_testdata_file(name, download=False))).read_bytes())
        assert decoded.image.dtype == np.float32
        assert 0 <= decoded.image.min() < decoded.image.max() <= 1


class TestMetadata:
    def test_names_are_the_declared_ones_and_kinds_fit(self) -> None:
        study = make(PatientAge="018M", PatientSex="F", KVP="120", ImagerPixelSpacing=[0.14, 0.15], Manufacturer=" Acme ")
        found = DOMAIN.decode(encode(study)).metadata
        assert list(found) == list(DOMAIN.metadata)
        assert (found["age_years"], found["sex"], found["kvp"]) == (1.5, "F", 120.0)
        assert (found["manufacturer"], found["pixel_spacing_mm"], found["bits_stored"]) == ("Acme", 0.14, 12.0)
        for name, kind in DOMAIN.metadata.items():
            assert found[name] is None or isinstance(found[name], float if kind == "number" else str)

    def test_missing_and_senseless_values_are_none(self) -> None:
        study = make(PatientSex="X")
        study.add_new("PatientAge", "AS", "abc")
        study.add_new("KVP", "DS", "NaN")
        found = DOMAIN.decode(encode(study)).metadata
        assert [found[name] for name in ("sex", "age_years", "kvp", "pixel_spacing_mm", "view_position")] == [None] * 5

    def test_nothing_of_the_patient_is_in_what_is_decoded(self) -> None:
        study = make(PatientBirthDate="19700203", OtherPatientNames="Jane^Roe")
        text = repr(DOMAIN.decode(encode(study)))
        for secret in ("MRN-4711", "Doe", "Jane", "19700203", "2.25.2'"):
            assert secret not in text

    def test_identity_is_a_pseudonym(self) -> None:
        decoded = DOMAIN.decode(encode(make()))
        assert decoded.patient == pseudonym("MRN-4711", "patient")
        assert decoded.study.startswith("2.25.")
        assert DOMAIN.decode(encode(make(StudyInstanceUID="2.25.3"))).study != decoded.study

    def test_pseudonyms_of_deidentified_files_are_kept(self) -> None:
        decoded = DOMAIN.decode(encode(make(PatientIdentityRemoved="YES", PatientID="p1", StudyInstanceUID="2.25.9")))
        assert (decoded.patient, decoded.study) == ("p1", "2.25.9")

    def test_no_identity_gives_none(self) -> None:
        decoded = DOMAIN.decode(encode(make(PatientID="", StudyInstanceUID="")))
        assert (decoded.patient, decoded.study) == ("", "")


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
            DOMAIN.decode(data)
            DOMAIN.deidentify(data)
        assert not [w for w in caught if "Doe" in str(w.message)]
        assert "Doe" not in caplog.text + "".join(capfd.readouterr())

    @pytest.mark.skipif(not ODD.is_dir(), reason="the collection of odd DICOM files is not on this machine")
    def test_odd_files_are_decoded_or_refused(self) -> None:
        decoded, codes = 0, set()
        for path in sorted(item for item in ODD.rglob("*") if item.is_file()):
            data = path.read_bytes()
            try:
                found = DOMAIN.decode(data)
            except Rejected as error:
                codes.add(error.code)
            else:
                decoded += 1
                assert found.image.ndim == 2, path
                assert 0 <= found.image.min() <= found.image.max() <= 1, path
        assert decoded >= 150
        assert codes <= {"not_dicom", "truncated", "no_pixels", "too_large", "undecodable"}


def test_importing_the_domain_imports_no_pydicom() -> None:
    code = "import sys, domain_medical; print([m for m in ('pydicom', 'numpy', 'pandas', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_encoding_helper_round_trips() -> None:
    assert dcmread(BytesIO(encode(make()))).PatientID == "MRN-4711"
