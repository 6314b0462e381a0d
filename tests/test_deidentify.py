"""De-identification: nothing that identifies is left anywhere in the bytes, and what a model needs is."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from cv_factory_ops.cli import main
from cv_factory_ops.domain import Box, DeidentificationConfig, Deidentified, pseudonym
from cv_factory_ops.errors import Rejected
from domain_medical import DOMAIN, burned_in
from domain_medical.deidentify import _ACTIONS, CODES, _code
from domain_medical.synthetic import studies
from tests.test_dicom import ODD, RAMP, decode, encode, make

UNSEEN = DeidentificationConfig(pixels="trust")
"""The defaults, without the seconds that looking at pixels takes."""
BASIC = DeidentificationConfig(pixels="trust", dates="remove", device=False, patient_characteristics=False)
TABLE = list(csv.DictReader((Path(__file__).parents[1] / "domain_medical" / "ps3_15.csv").open(encoding="ascii")))

SECRETS = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19700203",
    "PatientAddress": "12 Elm Street",
    "OtherPatientIDs": "SSN-123",
    "AccessionNumber": "ACC-99",
    "StudyID": "ST-77",
    "ReferringPhysicianName": "House^Gregory",
    "OperatorsName": "Operator^Olga",
    "InstitutionName": "Mercy Hospital",
    "InstitutionAddress": "1 Mercy Road",
    "StudyDescription": "Chest of Jane",
    "ImageComments": "wife of John",
    "ReasonForStudy": "known to Dr House",
    "StudyDate": "20230405",
    "AcquisitionDateTime": "20230405101112",
    "MilitaryRank": "Major",
    "StudyInstanceUID": "1.2.3.4711.1",
    "SeriesInstanceUID": "1.2.3.4711.2",
    "SOPInstanceUID": "1.2.3.4711.3",
    "FrameOfReferenceUID": "1.2.3.4711.4",
}


DIRECT = {
    "PatientName": "Doe^Jane",
    "PatientBirthDate": "19700203",
    "OtherPatientIDs": "SSN-123",
    "OtherPatientNames": "Roe^Jane",
    "PatientAddress": "12 Elm Street",
    "PatientTelephoneNumbers": "555-0199",
    "AccessionNumber": "ACC-99",
    "ReferringPhysicianName": "House^Gregory",
}


def identified(**attributes: object) -> Dataset:
    study = make(
        **SECRETS, PatientAge="053Y", PatientSex="F", Manufacturer="Acme", ManufacturerModelName="X1", KVP="120", **attributes
    )
    item, inner = Dataset(), Dataset()
    inner.RequestingPhysician, inner.PatientID, inner.ReferencedSOPInstanceUID = "Nested^Nora", "NEST-1", "1.2.3.4711.3"
    inner.ContentDate = "20230405"
    item.RequestedProcedureDescription, item.ReferencedImageSequence = "Nested text", [inner]
    study.SourceImageSequence = [item]
    study.add_new(0x00091010, "LO", "private Jane")
    study.add_new(0x60003000, "OW", b"overlay Jane")
    study.OriginalAttributesSequence = [inner]
    return study


def after(study: Dataset | bytes, settings: DeidentificationConfig = UNSEEN) -> Dataset:
    data = study if isinstance(study, bytes) else encode(study)
    return dcmread(BytesIO(DOMAIN.deidentify(data, settings).content))


@pytest.fixture
def before() -> bytes:
    data = encode(identified())
    return b"sender: Mercy Hospital".ljust(128, b"\0") + data[128:]


class TestTable:
    def test_it_is_complete_and_its_keywords_are_the_dictionary_s(self) -> None:
        assert len({row["tag"] for row in TABLE}) == len(TABLE) == 617
        assert [row for row in TABLE if keyword_for_tag(int(row["tag"], 16)) != row["keyword"]] == []
        assert {row["basic"] for row in TABLE} <= set(_ACTIONS)
        assert {row["patient"] + row["device"] + row["dates"] for row in TABLE} <= {"", "K", "C", "KC"}

    def test_every_listed_attribute_loses_its_value(self) -> None:
        """One study says them all; nothing is retained."""
        study, values = identified(), 0
        for number, row in enumerate(TABLE):
            tag, vr = int(row["tag"], 16), dictionary_VR(int(row["tag"], 16))
            if (value := self.planted(vr, number)) is not None and tag >> 16 > 2:
                study.add_new(tag, vr, value)
                values += 1
        assert values > 530
        data = encode(study)
        assert data.count(b"SECRET") > 300
        made = DOMAIN.deidentify(data, BASIC).content
        assert b"SECRET" not in made.upper()
        assert b"19860315" not in made
        assert b"1.2.3.4711" not in made

    @staticmethod
    def planted(vr: str, number: int) -> Any:
        match vr:
            case "SQ":
                item = Dataset()
                item.CodeValue, item.CodeMeaning, item.PersonName = "SECRET", "a SECRET", "SECRET^A"
                return [item]
            case "DA" | "DT":
                return "19860315" if vr == "DA" else "19860315101112"
            case "TM":
                return "101112"
            case "UI":
                return f"1.2.3.4711.{number}"
            case "OB" | "UN":
                return b"SECRET"
            case "AS":
                return "053Y"
            case "DS" | "IS" | "US":
                return None
            case _:
                return f"SECRET {number}"[:16]

    def test_codes_are_those_of_cid_7050(self) -> None:
        known = {code.value: code.meaning for code in (getattr(codes.CID7050, name) for name in codes.CID7050.dir())}
        assert {value: known[value] for value in CODES} == CODES


class TestAttributes:
    def test_no_identifier_is_left_anywhere(self, before: bytes) -> None:
        made = DOMAIN.deidentify(before, UNSEEN).content
        hidden = [*SECRETS.values(), "Jane", "Nested", "Nora", "NEST-1", "Mercy", "4711"]
        assert [secret for secret in hidden if secret.encode() not in before] == []
        assert [secret for secret in hidden if secret.encode() in made] == []

    def test_what_a_model_needs_stays(self, before: bytes) -> None:
        first, second = decode(before), decode(DOMAIN.deidentify(before, UNSEEN).content)
        assert np.array_equal(first.image, second.image)
        assert first.metadata == second.metadata
        assert second.metadata["age_years"] == 53.0
        assert second.metadata["sex"] == "F"

    def test_pseudonyms_are_the_same_before_and_after(self, before: bytes) -> None:
        first, second = decode(before), decode(DOMAIN.deidentify(before, UNSEEN).content)
        assert second.patient == first.patient == pseudonym("MRN-4711", "patient")
        assert second.study == first.study != ""

    def test_references_still_point_to_the_image(self, before: bytes) -> None:
        study = after(before)
        reference = study.SourceImageSequence[0].ReferencedImageSequence[0].ReferencedSOPInstanceUID
        assert reference == study.SOPInstanceUID == study.file_meta.MediaStorageSOPInstanceUID
        assert study.SOPClassUID == make().SOPClassUID

    def test_options_retain_what_they_name(self) -> None:
        study = make(
            PatientAge="053Y",
            PatientSex="F",
            PatientWeight="70",
            StationName="XR1",
            DeviceSerialNumber="SN 12",
            DetectorID="D 3",
        )
        kept, gone = after(study), after(study, BASIC)
        assert [kept[name].value for name in ("PatientAge", "PatientSex", "PatientWeight")] == ["053Y", "F", 70]
        assert [kept[name].value for name in ("StationName", "DeviceSerialNumber", "DetectorID")] == ["XR1", "SN 12", "D 3"]
        assert "PatientAge" not in gone
        assert "PatientWeight" not in gone
        assert gone.PatientSex == ""
        assert {gone[name].value for name in ("StationName", "DeviceSerialNumber", "DetectorID")} == {"DEIDENTIFIED"}

    def test_texts_that_would_stay_do_not_when_they_name_somebody(self) -> None:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99LOCAL", "Chest of Jane"
        study = identified(StationName="MERCY-XR1", DeviceSerialNumber="for MRN-4711", BodyPartExamined="HOUSE")
        study.AnatomicRegionSequence = [code]
        study.Manufacturer = "House of Imaging"
        made = after(study)
        assert made.StationName == made.DeviceSerialNumber == "DEIDENTIFIED"
        assert made.AnatomicRegionSequence[0].CodeMeaning == "DEIDENTIFIED"
        assert made.BodyPartExamined == "HOUSE"
        assert made.Manufacturer == "House of Imaging"

    def test_what_the_table_does_not_list_is_judged_by_its_kind(self) -> None:
        study = make(
            RescaleType="HU", SequenceName="fl3d1", DerivationDescription="by Jane", PixelDataProviderURL="http://mercy"
        )
        study.add_new(0x00181318, "FL", 2.5)
        study.add_new(0x0019FFFE, "UN", b"unknown")
        study.add_new(0x00080006, "SQ", [make()])
        study.CodingSchemeIdentificationSequence = [Dataset()]
        study.CodingSchemeIdentificationSequence[0].CodingSchemeUID = "2.16.840.1.113883.6.96"
        made = after(study)
        assert made.RescaleType == "HU"
        assert made.SequenceName == "fl3d1"
        assert made.CodingSchemeIdentificationSequence[0].CodingSchemeUID == "2.16.840.1.113883.6.96"
        assert made.LanguageCodeSequence[0].PatientID == "DEIDENTIFIED"
        assert "http" not in str(made)
        assert "Jane" not in str(made)
        assert 0x0019FFFE not in made

    @pytest.mark.parametrize(("age", "said"), [("089Y", "089Y"), ("097Y", "090Y"), ("018M", "018M"), ("Jane", "")])
    def test_great_ages_are_one_group(self, age: str, said: str) -> None:
        assert (after(make(PatientAge=age)).PatientAge or "") == said

    def test_a_dicomdir_is_refused(self) -> None:
        data = Path(str(get_testdata_file("DICOMDIR", download=False))).read_bytes()
        with pytest.raises(Rejected, match="DICOMDIR") as caught:
            DOMAIN.deidentify(data, UNSEEN)
        assert caught.value.code == "no_pixels"


class TestDates:
    def days(self, before: str, moved: str) -> int:
        return (date.fromisoformat(before[:8]) - date.fromisoformat(moved[:8])).days

    def test_all_of_a_patient_move_back_by_the_same_days(self) -> None:
        first = after(make(StudyDate="20230405", StudyTime="101112", AcquisitionDateTime="20230406101112.500000+0130"))
        second = after(make(StudyDate="20240101", StudyInstanceUID="2.25.77"))
        days = self.days("20230405", first.StudyDate)
        assert 1 <= days <= 3650
        assert days == self.days("20230406", first.AcquisitionDateTime) == self.days("20240101", second.StudyDate)
        assert first.AcquisitionDateTime[8:] == "101112.500000+0130"
        assert first.StudyTime == "101112"
        assert first.LongitudinalTemporalInformationModified == "MODIFIED"

    def test_patients_and_keys_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moved = {after(make(PatientID=f"MRN {i}", StudyDate="20230405")).StudyDate for i in range(20)}
        assert len(moved) > 15
        here = after(make(StudyDate="20230405")).StudyDate
        monkeypatch.setenv("CVF_PSEUDONYM_KEY", "another key")
        assert after(make(StudyDate="20230405")).StudyDate != here

    def test_nested_ones_and_lists_move_too(self) -> None:
        study = after(identified(DateOfLastCalibration=["20230401", "20230402"]))
        days = self.days("20230405", study.StudyDate)
        assert [self.days(f"2023040{i}", moved) for i, moved in enumerate(study.DateOfLastCalibration, 1)] == [days, days]
        inner = study.SourceImageSequence[0].ReferencedImageSequence[0]
        assert self.days("20230405", inner.ContentDate) == days

    @pytest.mark.parametrize("value", ["Jane Doe", "20231345", "2023", "00010101", "20230101-20230202"])
    def test_what_is_no_date_goes(self, value: str) -> None:
        study = make()
        study.add_new("StudyDate", "DA", value)
        study.add_new("AcquisitionDateTime", "DT", value)
        study.add_new("StudyTime", "TM", value + " at home")
        made = after(study)
        assert not made.StudyDate
        assert not made.AcquisitionDateTime
        assert not made.StudyTime

    def test_dates_of_before_2000_s_style_are_read(self) -> None:
        study = make()
        study.add_new("StudyDate", "DA", "2023.04.05")
        assert after(study).StudyDate == after(make(StudyDate="20230405")).StudyDate

    def test_they_can_be_removed(self) -> None:
        study = after(identified(StudyTime="101112", TimezoneOffsetFromUTC="+0100"), BASIC)
        assert study.StudyDate == study.StudyTime == ""
        assert study.AcquisitionDateTime == "19000101000000"
        assert "TimezoneOffsetFromUTC" not in study
        assert study.LongitudinalTemporalInformationModified == "REMOVED"

    def test_a_birth_date_never_stays(self) -> None:
        assert after(identified()).PatientBirthDate == ""

    def test_public_dates_do_not_give_the_days_away(self) -> None:
        code = Dataset()
        code.ContextIdentifier, code.ContextGroupVersion = "4031", "20021013"
        study = make()
        study.AnatomicRegionSequence = [code]
        assert after(study).AnatomicRegionSequence[0].ContextGroupVersion == "19000101000000"


class TestMarks:
    def test_the_file_says_what_was_done(self, before: bytes) -> None:
        study, basic = after(before), after(before, BASIC)
        assert study.PatientIdentityRemoved == "YES"
        assert max(map(len, study.DeidentificationMethod)) <= 64
        assert self.codes(study) == ["113100", "113107", "113108", "113109"]
        assert self.codes(basic) == ["113100"]
        assert {item.CodingSchemeDesignator for item in study.DeidentificationMethodCodeSequence} == {"DCM"}

    def codes(self, study: Dataset) -> list[str]:
        return [item.CodeValue for item in study.DeidentificationMethodCodeSequence]

    @pytest.mark.parametrize("settings", [UNSEEN, BASIC])
    def test_it_is_the_same_every_time_and_can_be_repeated(self, before: bytes, settings: DeidentificationConfig) -> None:
        once = DOMAIN.deidentify(before, settings).content
        assert DOMAIN.deidentify(before, settings).content == once
        assert DOMAIN.deidentify(once, settings).content == once

    def test_another_key_gives_other_pseudonyms(self, before: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        first = decode(before).patient
        monkeypatch.setenv("CVF_PSEUDONYM_KEY", "another key")
        assert decode(before).patient != first

    def test_the_key_is_nowhere_in_the_file(self, before: bytes) -> None:
        assert b"a key for tests" not in DOMAIN.deidentify(before, UNSEEN).content

    def test_identified_studies_are_not_accepted(self, before: bytes) -> None:
        DOMAIN.require_deidentified(DOMAIN.deidentify(before, UNSEEN).content)
        DOMAIN.require_deidentified(DOMAIN.deidentify(before, BASIC).content)
        DOMAIN.require_deidentified(encode(make(PatientIdentityRemoved="YES", PatientID="p1", PatientName="p1")))
        marked = {"PatientIdentityRemoved": "YES"}
        refused = [
            before,
            *(encode(make(**marked, PatientID="p1", **{keyword: value})) for keyword, value in DIRECT.items()),
            encode(make(**marked, OtherPatientIDs=["", "1970"])),
            encode(make(**marked, BurnedInAnnotation="YES")),
            encode(make(PatientIdentityRemoved="NO")),
        ]
        for data in refused:
            with pytest.raises(Rejected, match="de-identify the study before sending it") as caught:
                DOMAIN.require_deidentified(data)
            assert caught.value.code == "identified"
            assert not any(value in str(caught.value) for value in (*DIRECT.values(), "1970"))
        with pytest.raises(Rejected) as caught:
            DOMAIN.require_deidentified(b"not a study")
        assert caught.value.code == "not_dicom"


def phantom(size: int = 256, seed: int = 3) -> Dataset:
    return dcmread(BytesIO(next(studies(1, image_size=size, seed=seed, labels=["normal", "opacity"]))[0]))


def write(
    pixels: NDArray[Any], text: str, height: int, at: tuple[int, int], ink: float
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Pixels with text in them, and where its letters are."""
    canvas = Image.new("L", pixels.shape[1::-1], 0)
    ImageDraw.Draw(canvas).text(at, text, font=ImageFont.load_default(size=height), fill=255)
    share = np.asarray(canvas) / 255.0
    weight = share[..., None] if pixels.ndim == 3 else share
    return np.rint(pixels * (1 - weight) + ink * weight).astype(pixels.dtype), share > 0.5


def burned(
    text: str, height: int = 16, at: tuple[int, int] = (8, 8), *, dark: bool = False
) -> tuple[Dataset, NDArray[np.bool_]]:
    study = phantom()
    pixels, letters = write(study.pixel_array, text, height, at, 0 if dark else 2**study.BitsStored - 1)
    study.PixelData = pixels.tobytes()
    return study, letters


def screened(study: Dataset, **settings: Any) -> tuple[Deidentified, Dataset]:
    made = DOMAIN.deidentify(encode(study), DeidentificationConfig(**settings))
    return made, dcmread(BytesIO(made.content))


def is_blank(study: Dataset, letters: NDArray[np.bool_]) -> bool:
    """Whether one value, which is none of an image, is all there is where the letters were."""
    return len(np.unique(study.pixel_array[letters])) == 1


needs_reader = pytest.mark.skipif(not burned_in.can_screen(), reason=burned_in.CURE)


@needs_reader
class TestText:
    @pytest.mark.parametrize(
        ("text", "height", "at", "dark"),
        [
            ("DOE JANE", 9, (4, 4), False),
            ("MRN 4711203", 12, (120, 236), False),
            ("1970-02-03", 20, (100, 120), False),
            ("DOE^JANE", 12, (150, 6), True),
        ],
    )
    def test_it_is_blanked_and_flagged(self, text: str, height: int, at: tuple[int, int], dark: bool) -> None:
        study, letters = burned(text, height, at, dark=dark)
        del study.BurnedInAnnotation
        made, image = screened(study)
        assert is_blank(image, letters)
        assert made.review == ("text_blanked",)
        assert made.boxes
        assert image.BurnedInAnnotation == "NO"
        assert "113101" in [item.CodeValue for item in image.DeidentificationMethodCodeSequence]
        changed = (image.pixel_array != study.pixel_array).mean()
        assert changed < 0.2
        DOMAIN.require_deidentified(made.content)
        assert DOMAIN.deidentify(made.content, DeidentificationConfig()).content == made.content

    @pytest.mark.parametrize("marker", ["R", "PA", "ERECT"])
    def test_side_markers_stay(self, marker: str) -> None:
        study, _ = burned(marker, 20)
        made, image = screened(study)
        assert made.review == ()
        assert np.array_equal(image.pixel_array, study.pixel_array)

    def test_clean_images_are_left_alone(self) -> None:
        for seed in range(4):
            study = phantom(seed=seed)
            made, image = screened(study)
            assert (made.boxes, made.review) == ((), ())
            assert image.PixelData == study.PixelData

    def test_compressed_images_are_stored_uncompressed(self) -> None:
        study, letters = burned("DOE JANE")
        study.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        made, image = screened(study)
        assert made.boxes
        assert image.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert is_blank(image, letters)
        outside = image.pixel_array[128:]
        assert np.array_equal(outside, study.pixel_array[128:])

    def test_colours_and_all_frames(self) -> None:
        plain = np.full((2, 200, 300, 3), 40, np.uint8)
        plain[0], letters = write(plain[0], "DOE JANE 1970", 18, (10, 10), 230)
        study = make(plain[0], bits=8, PhotometricInterpretation="RGB", PlanarConfiguration=0, NumberOfFrames=2)
        study.PixelData = plain.tobytes()
        made, image = screened(study)
        assert made.boxes
        assert (image.pixel_array[:, letters] == 40).all()
        assert image.PhotometricInterpretation == "RGB"

    def test_a_file_that_claims_text_where_none_is_found_is_refused(self) -> None:
        study = phantom()
        study.BurnedInAnnotation = "YES"
        with pytest.raises(Rejected, match="no text is found") as caught:
            screened(study)
        assert caught.value.code == "identified"

    def test_declared_believes_a_no(self) -> None:
        study, _ = burned("DOE JANE")
        made, image = screened(study, pixels="declared")
        assert (made.boxes, image.PixelData) == ((), study.PixelData)
        study.BurnedInAnnotation = "YES"
        assert screened(study, pixels="declared")[0].boxes

    def test_marks_of_others_are_not_believed(self) -> None:
        study, letters = burned("DOE JANE")
        study.PatientIdentityRemoved, study.DeidentificationMethod = "YES", "Pixels screened for text"
        study.DeidentificationMethodCodeSequence = [_code("113100"), _code("113101")]
        study.BurnedInAnnotation = "NO"
        made, image = screened(study)
        assert is_blank(image, letters)
        assert made.review == ("text_blanked",)
        _, trusted = screened(study, pixels="trust")
        assert "113101" not in [item.CodeValue for item in trusted.DeidentificationMethodCodeSequence]

    def test_our_own_marks_spare_a_second_search(self) -> None:
        made, _ = screened(phantom())
        burned_in._reader.cache_clear()
        again = DOMAIN.deidentify(made.content, DeidentificationConfig())
        assert again.content == made.content
        assert burned_in._reader.cache_info().currsize == 0

    def test_broken_pixels_are_refused(self) -> None:
        study = make()
        study.PixelData = study.PixelData[:100]
        with pytest.raises(Rejected) as caught:
            screened(study)
        assert caught.value.code == "truncated"

    def test_the_endpoint_s_door_reads_no_pixels(self) -> None:
        made, _ = screened(phantom())
        burned_in._reader.cache_clear()
        DOMAIN.require_deidentified(made.content)
        assert burned_in._reader.cache_info().currsize == 0


class TestBlanking:
    """The boxes are given: what a reader finds is tested above."""

    BOX = Box(4, 2, 20, 8)

    @pytest.fixture(autouse=True)
    def found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(burned_in, "can_screen", lambda: True)
        looks = iter([[self.BOX]])
        monkeypatch.setattr(burned_in, "find", lambda image: next(looks, []))

    def images(self, study: Dataset) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Before and after blanking, and where the box is."""
        made, _ = screened(study)
        assert made.boxes == (self.BOX,)
        box = np.zeros((study.Rows, study.Columns), np.bool_)
        box[burned_in._area(self.BOX)] = True
        return decode(encode(study)).image, decode(made.content).image, box

    @pytest.mark.parametrize("limit", [{}, {"PixelPaddingRangeLimit": -32760}])
    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    @pytest.mark.parametrize("high_bit", [11, 15])
    def test_padding_stays_black(self, limit: dict[str, int], photometric: str, high_bit: int) -> None:
        values = (RAMP.astype(np.int16) - 2048).astype(np.int16) << (high_bit - 11)
        values[20:30] = -32768
        values[30:32] = -32765 if limit else -32768
        study = make(values, PixelPaddingValue=-32768, PhotometricInterpretation=photometric, HighBit=high_bit, **limit)
        first, second, box = self.images(study)
        assert (second[20:32] == 0).all()
        assert np.array_equal(first[~box], second[~box])
        assert (first[~box] > 0.4).any()
        assert (second[box] == 0).all()

    @pytest.mark.parametrize("is_packed", [False, True])
    @pytest.mark.parametrize("dtype", [np.int16, np.uint16])
    def test_values_in_the_high_bits_stay(self, dtype: type[np.integer[Any]], is_packed: bool) -> None:
        study = make((RAMP << 4).view(dtype), HighBit=15)
        if is_packed:
            study.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        first, second, box = self.images(study)
        assert np.array_equal(first[~box], second[~box])
        assert len(np.unique(second)) > 3900
        assert len(np.unique(second[box])) == 1

    @pytest.mark.parametrize("is_packed", [False, True])
    def test_colours_stay(self, is_packed: bool) -> None:
        plain = np.dstack([RAMP, RAMP[::-1], RAMP.T]).copy()
        study = make(plain, HighBit=15, PhotometricInterpretation="RGB", PlanarConfiguration=0)
        if is_packed:
            study.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        first, second, box = self.images(study)
        assert np.array_equal(first[~box], second[~box])
        assert len(np.unique(second[box])) == 1


class TestPixels:
    def test_burned_in_identity_is_refused_where_nobody_looks(self) -> None:
        with pytest.raises(Rejected, match="burned into the pixels") as caught:
            DOMAIN.deidentify(encode(make(BurnedInAnnotation="YES")), UNSEEN)
        assert caught.value.code == "identified"

    def test_without_the_extra_it_says_what_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(burned_in, "can_screen", lambda: False)
        with pytest.raises(Rejected, match=r"pip install 'cv-factory\[deidentify\]'"):
            screened(make(BurnedInAnnotation="YES"))
        made, image = screened(make())
        assert made.review == ("not_screened",)
        assert "113101" not in [item.CodeValue for item in image.DeidentificationMethodCodeSequence]
        assert "BurnedInAnnotation" not in image

    def test_overlays_in_unused_bits_go(self) -> None:
        hidden = np.arange(4096, dtype=np.uint16).reshape(64, 64)
        study = make(hidden | 0x8000)
        study.add_new(0x60000102, "US", 15)
        image = after(study)
        assert np.array_equal(np.frombuffer(image.PixelData, "<u2").reshape(64, 64), hidden)

    def test_faces_are_for_a_person_to_look_at(self) -> None:
        made = DOMAIN.deidentify(encode(make(RecognizableVisualFeatures="YES")), UNSEEN)
        assert made.review == ("recognizable_visual_features",)

    @pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "examples_ybr_color.dcm", "JPEG2000.dcm"])
    def test_real_files_keep_their_pixels(self, name: str) -> None:
        data = Path(str(get_testdata_file(name, download=False))).read_bytes()
        made = DOMAIN.deidentify(data, UNSEEN).content
        DOMAIN.require_deidentified(made)
        assert np.array_equal(decode(made).image, decode(data).image)
        name_before = str(dcmread(BytesIO(data)).get("PatientName", ""))
        assert not name_before or name_before.encode() not in made


@pytest.mark.skipif(not ODD.is_dir(), reason="the collection of odd DICOM files is not on this machine")
def test_odd_files_are_deidentified_or_refused() -> None:
    done, refused = 0, set()
    for path in sorted(item for item in ODD.rglob("*") if item.is_file()):
        try:
            made = DOMAIN.deidentify(path.read_bytes(), UNSEEN).content
        except Rejected as error:
            refused.add(error.code)
            continue
        DOMAIN.require_deidentified(made)
        assert DOMAIN.deidentify(made, UNSEEN).content == made, path
        done += 1
    assert done >= 200
    assert refused <= {"not_dicom", "truncated", "undecodable", "identified", "no_pixels", "too_large"}


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of the Debian package dicom3tools")
@pytest.mark.parametrize("settings", [UNSEEN, BASIC])
def test_a_validator_finds_no_new_errors(tmp_path: Path, settings: DeidentificationConfig) -> None:
    files = [data for data, _ in studies(6, image_size=32, seed=1, labels=["normal", "opacity"])]
    files.append(Path(str(get_testdata_file("CT_small.dcm", download=False))).read_bytes())
    modalities = set()
    for data in files:
        made = DOMAIN.deidentify(data, settings).content
        modalities.add(str(dcmread(BytesIO(made)).Modality))
        assert complaints(made, tmp_path) <= complaints(data, tmp_path)
    assert modalities == {"CR", "DX", "CT"}


def complaints(data: bytes, folder: Path) -> set[str]:
    (folder / "study.dcm").write_bytes(data)
    said = subprocess.run(["dciodvfy", folder / "study.dcm"], capture_output=True, text=True, errors="replace")
    return {line for line in said.stderr.splitlines() if line.startswith("Error")}


class TestCommand:
    @pytest.fixture
    def quick(self, project: Any) -> str:
        return str(project(deidentification={"pixels": "trust"}))

    def test_it_copies_what_it_can_under_new_names(
        self, before: bytes, tmp_path: Path, quick: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "doe_jane.dcm").write_bytes(before)
        (tmp_path / "notes.txt").write_text("not a study")
        files = [str(tmp_path / name) for name in ("doe_jane.dcm", "notes.txt")]
        out = tmp_path / "out"
        for _ in range(2):
            assert main(["deidentify", *files, "--out", str(out), "--config", quick]) == 3
            shown = capsys.readouterr()
            assert "1 of 2 studies de-identified" in shown.out
            assert "notes.txt: is not a DICOM" in shown.err
            copies = [item for item in out.iterdir() if item.name != "review.jsonl"]
            assert [item.suffix for item in copies] == [".dcm"]
            assert "doe" not in copies[0].name
            DOMAIN.require_deidentified(copies[0].read_bytes())

    def test_folders_are_searched_and_what_to_look_at_is_listed(
        self, before: bytes, tmp_path: Path, quick: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        below = tmp_path / "in" / "deep"
        below.mkdir(parents=True)
        (below / "a").write_bytes(before)
        (below / "b").write_bytes(encode(make(RecognizableVisualFeatures="YES")))
        (below / "labels.csv").write_text("a,b")
        out = tmp_path / "in" / "out"
        for _ in range(2):
            assert main(["deidentify", str(tmp_path / "in"), "--out", str(out), "--config", quick]) == 0
            shown = capsys.readouterr().out
            assert "2 of 2 studies" in shown
            assert "1 other files left alone" in shown
            (line,) = [json.loads(text) for text in (out / "review.jsonl").read_text().splitlines()]
            assert line["review"] == ["recognizable_visual_features"]
            assert (out / line["file"]).is_file()

    @needs_reader
    def test_the_list_has_boxes_and_no_text(self, tmp_path: Path) -> None:
        study, _ = burned("DOE JANE")
        (tmp_path / "a.dcm").write_bytes(encode(study))
        assert main(["deidentify", str(tmp_path / "a.dcm"), "--out", str(tmp_path / "out")]) == 0
        said = (tmp_path / "out" / "review.jsonl").read_text()
        assert set(json.loads(said)["boxes"][0]) == {"left", "top", "width", "height"}
        assert "DOE" not in said
