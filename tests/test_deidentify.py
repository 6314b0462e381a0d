"""De-identification: nothing that identifies is left anywhere in the bytes, and what a model needs is."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import Rejected
from domain_medical import DOMAIN
from domain_medical.deidentify import METHOD
from tests.test_dicom import ODD, encode, make

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
    "StationName": "STATION-XR1",
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


def identified() -> Dataset:
    study = make(**SECRETS, PatientAge="053Y", PatientSex="F", Manufacturer="Acme", ManufacturerModelName="X1", KVP="120")
    item, inner = Dataset(), Dataset()
    inner.RequestingPhysician, inner.PatientID, inner.ReferencedSOPInstanceUID = "Nested^Nora", "NEST-1", "1.2.3.4711.3"
    item.RequestedProcedureDescription, item.ReferencedPatientSequence = "Nested text", [inner]
    study.RequestAttributesSequence = [item]
    study.add_new(0x00091010, "LO", "private Jane")
    study.add_new(0x60003000, "OW", b"overlay Jane")
    study.OriginalAttributesSequence = [inner]
    return study


@pytest.fixture
def before() -> bytes:
    data = encode(identified())
    return b"sender: Mercy Hospital".ljust(128, b"\0") + data[128:]


def test_no_identifier_is_left_anywhere(before: bytes) -> None:
    after = DOMAIN.deidentify(before)
    hidden = [*SECRETS.values(), "Jane", "Nested", "Nora", "NEST-1", "Mercy", "4711"]
    assert [secret for secret in hidden if secret.encode() not in before] == []
    assert [secret for secret in hidden if secret.encode() in after] == []


def test_what_a_model_needs_stays(before: bytes) -> None:
    first, second = DOMAIN.decode(before), DOMAIN.decode(DOMAIN.deidentify(before))
    assert np.array_equal(first.image, second.image)
    assert first.metadata == second.metadata
    assert second.metadata["age_years"] == 53.0
    assert second.metadata["sex"] == "F"


def test_pseudonyms_are_the_same_before_and_after(before: bytes) -> None:
    first, second = DOMAIN.decode(before), DOMAIN.decode(DOMAIN.deidentify(before))
    assert second.patient == first.patient == pseudonym("MRN-4711", "patient")
    assert second.study == first.study != ""


def test_references_still_point_to_the_image(before: bytes) -> None:
    study = dcmread(BytesIO(DOMAIN.deidentify(before)))
    reference = study.RequestAttributesSequence[0].ReferencedPatientSequence[0].ReferencedSOPInstanceUID
    assert reference == study.SOPInstanceUID == study.file_meta.MediaStorageSOPInstanceUID
    assert study.SOPClassUID == make().SOPClassUID


def test_the_file_says_what_was_done(before: bytes) -> None:
    study = dcmread(BytesIO(DOMAIN.deidentify(before)))
    assert study.PatientIdentityRemoved == "YES"
    assert list(study.DeidentificationMethod) == METHOD
    assert max(map(len, METHOD)) <= 64


def test_it_is_the_same_every_time_and_can_be_repeated(before: bytes) -> None:
    once = DOMAIN.deidentify(before)
    assert DOMAIN.deidentify(before) == once
    assert DOMAIN.deidentify(once) == once


def test_another_key_gives_other_pseudonyms(before: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DOMAIN.decode(before).patient
    monkeypatch.setenv("CVF_PSEUDONYM_KEY", "another key")
    assert DOMAIN.decode(before).patient != first


def test_burned_in_identity_is_refused() -> None:
    with pytest.raises(Rejected, match="burned into the pixels") as caught:
        DOMAIN.deidentify(encode(make(BurnedInAnnotation="YES")))
    assert caught.value.code == "identified"


def test_identified_studies_are_not_accepted(before: bytes) -> None:
    DOMAIN.require_deidentified(DOMAIN.deidentify(before))
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


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "examples_ybr_color.dcm", "JPEG2000.dcm"])
def test_real_files_keep_their_pixels(name: str) -> None:
    data = Path(str(get_testdata_file(name, download=False))).read_bytes()
    after = DOMAIN.deidentify(data)
    DOMAIN.require_deidentified(after)
    assert np.array_equal(DOMAIN.decode(after).image, DOMAIN.decode(data).image)
    name_before = str(dcmread(BytesIO(data)).get("PatientName", ""))
    assert not name_before or name_before.encode() not in after


@pytest.mark.skipif(not ODD.is_dir(), reason="the collection of odd DICOM files is not on this machine")
def test_odd_files_are_deidentified_or_refused() -> None:
    done, codes = 0, set()
    for path in sorted(item for item in ODD.rglob("*") if item.is_file()):
        try:
            DOMAIN.require_deidentified(DOMAIN.deidentify(path.read_bytes()))
            done += 1
        except Rejected as error:
            codes.add(error.code)
    assert done >= 150
    assert codes <= {"not_dicom", "truncated", "undecodable", "identified"}


def test_the_command_copies_what_it_can_under_new_names(
    before: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cv_factory_ops.cli import main

    (tmp_path / "doe_jane.dcm").write_bytes(before)
    (tmp_path / "notes.txt").write_text("not a study")
    files = [str(tmp_path / name) for name in ("doe_jane.dcm", "notes.txt")]
    assert main(["deidentify", *files, "--out", str(tmp_path / "out")]) == 3
    shown = capsys.readouterr()
    assert "1 of 2 studies de-identified" in shown.out
    assert "notes.txt: is not a DICOM Part 10 file" in shown.err
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["00000.dcm"]
    DOMAIN.require_deidentified((tmp_path / "out" / "00000.dcm").read_bytes())
