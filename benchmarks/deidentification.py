"""How much of what was planted is gone: `python benchmarks/deidentification.py [studies] [--json FILE]`.

Modelled on the MIDI-B challenge (Medical Image De-Identification Benchmark, MICCAI 2024): identifiers are planted into
generated studies, the studies are de-identified, and each planted thing counts as one action that is right or wrong. Nothing
planted may be found anywhere in the bytes of the copy, in any letter case; what must stay is compared with the original; and
text in pixels counts as removed where no pixel of its letters is left. Seeded: the same versions print the same table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, dcmread, dcmwrite

from cv_factory_ops.domain import DeidentificationConfig
from domain_medical import DOMAIN
from domain_medical.synthetic import studies

SEED, STUDIES, SIZES = 11, 60, (256, 512, 1024)
FAMILY = ("Abernathy", "Boszormenyi", "Carruthers", "Dombrowska", "Etxeberria", "Fitzgerald", "Grabowski", "Hollingworth")
GIVEN = ("Aurelia", "Bartholomew", "Clementine", "Dragomir", "Evangeline", "Ferdinand", "Guinevere", "Hieronymus")
STREETS = ("Larkspur Lane", "Quarrymen Road", "Thistledown Way", "Vermilion Square")
HOSPITALS = ("Saint Wulfric", "Kestrelmoor", "Northgreave", "Ostendorp")
MARKERS = ("L", "R", "PA", "ERECT")
Score = dict[str, list[bool]]


@dataclass
class Planted:
    """One study, and what was planted into it."""

    study: Dataset
    secrets: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What must not be left anywhere in the bytes, by category."""
    letters: NDArray[np.bool_] | None = None
    """(rows, columns) where the pixels of burned-in identity are."""
    marker: NDArray[np.bool_] | None = None
    """(rows, columns) where those of a side marker are."""

    def tell(self, category: str, value: str) -> str:
        self.secrets[category].append(value)
        return value


def plant(number: int) -> Planted:
    """A phantom of a scanner, made a patient's: of each fourth the first has its name in the pixels, the second a marker."""
    rng = np.random.default_rng([SEED, number])
    size = SIZES[number % len(SIZES)]
    (content, _), *_ = studies(1, image_size=size, seed=1000 + number, labels=["normal", "opacity"])
    planted = Planted(dcmread(BytesIO(content)))
    patient = _patient(planted, rng)
    _visit(planted, rng, patient)
    _hidden(planted, rng, patient)
    match number % 4:
        case 0:
            text = str(rng.choice([patient, planted.study.PatientID, "DOB " + date(1950, 3, 14).isoformat()]))
            planted.letters = _burn(planted.study, text.replace("^", " ").upper(), rng, size)
            del planted.study.BurnedInAnnotation
        case 1:
            planted.marker = _burn(planted.study, str(rng.choice(MARKERS)), rng, size)
    return planted


def _patient(planted: Planted, rng: np.random.Generator) -> str:
    study, tell = planted.study, planted.tell
    family, given = str(rng.choice(FAMILY)), str(rng.choice(GIVEN))
    tell("names", family), tell("names", given)
    study.PatientName = f"{family}^{given}"
    study.PatientID = tell("identifiers", f"MRN{rng.integers(10**7, 10**8)}")
    study.OtherPatientIDs = [tell("identifiers", f"SSN-{rng.integers(100, 999)}-{rng.integers(10**5, 10**6)}")]
    study.PatientMotherBirthName = tell("names", f"{rng.choice(FAMILY)}-Ravenscroft")
    study.PatientAddress = tell("contacts", f"{rng.integers(100, 999)} {rng.choice(STREETS)}")
    study.PatientTelephoneNumbers = tell("contacts", f"+44 20 7946 {rng.integers(1000, 9999)}")
    study.PatientBirthDate = tell("dates", f"19{rng.integers(30, 70)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}")
    study.PatientAge = "097Y" if rng.random() < 0.2 else "061Y"
    return f"{family}^{given}"


def _visit(planted: Planted, rng: np.random.Generator, patient: str) -> None:
    study, tell = planted.study, planted.tell
    day = f"2023{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
    tell("dates", day)
    study.StudyDate = study.SeriesDate = study.AcquisitionDate = study.ContentDate = day
    study.AcquisitionDateTime = f"{day}101112.5+0100"
    study.AccessionNumber = tell("identifiers", f"ACC{rng.integers(10**6, 10**7)}")
    hospital = tell("institutions", str(rng.choice(HOSPITALS)))
    study.InstitutionName, study.InstitutionAddress = f"{hospital} Hospital", tell("contacts", f"1 {hospital} Drive")
    study.StationName = f"{hospital.split()[-1].upper()}-XR1"
    study.ReferringPhysicianName = tell("names", f"Wetherby{rng.integers(100, 999)}^Ottoline")
    study.OperatorsName = tell("names", f"Zimmerlund{rng.integers(100, 999)}^Percival")
    family = patient.split("^")[0]
    study.StudyDescription = tell("descriptions", f"Chest of Mrs {family}")
    study.ImageComments = tell("descriptions", f"discussed with {family}, ward {rng.integers(100, 999)}")
    study.ProtocolName = tell("descriptions", f"{family} follow-up")
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        study[keyword] = _element(keyword, tell("UIDs", f"1.2.826.0.1.{rng.integers(10**12, 10**13)}"))


def _hidden(planted: Planted, rng: np.random.Generator, patient: str) -> None:
    """Where cleaners that only look at the top forget to look."""
    study, tell = planted.study, planted.tell
    code, source, person = Dataset(), Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "121058", "DCM"
    code.CodeMeaning = tell("nested", f"Procedure for {patient.replace('^', ' ')}")
    source.ReferencedSOPInstanceUID, source.PurposeOfReferenceCodeSequence = str(study.SOPInstanceUID), [code]
    source.PatientID, source.StudyDate = str(study.PatientID), str(study.StudyDate)
    person.PersonName, person.PersonAddress = tell("nested", f"Nesterov{rng.integers(100, 999)}^Nora"), "unused"
    source.ResponsiblePerson = tell("nested", f"Guardian{rng.integers(100, 999)}^Gerta")
    study.SourceImageSequence, study.ReferencedImageSequence = [source], [Dataset()]
    study.ReferencedImageSequence[0].ReferencedSOPInstanceUID = str(study.SOPInstanceUID)
    study.PersonIdentificationCodeSequence = [code, person]
    study.OriginalAttributesSequence = [person]
    block = study.private_block(0x0009, "ACME 1.0", create=True)
    block.add_new(1, "LO", tell("private", f"private of {patient.split('^')[0]} {rng.integers(100, 999)}"))
    nested = Dataset()
    nested.PatientComments = tell("private", f"inside a private sequence {rng.integers(1000, 9999)}")
    block.add_new(2, "SQ", [nested])
    study.add_new(0x50000010, "LO", tell("private", f"curve of {patient.split('^')[0]}"))
    study.add_new(0x60004000, "LT", tell("private", f"overlay of {patient.split('^')[0]}"))


def _element(keyword: str, value: str) -> Any:
    holder = Dataset()
    setattr(holder, keyword, value)
    return holder[keyword]


def _burn(study: Dataset, text: str, rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Write into the pixels in a corner, as consoles do, at 2 to 5 % of the side; returns where."""
    height = max(9, int(size * rng.choice([0.02, 0.03, 0.05])))
    font = ImageFont.load_default(size=height)
    width = int(font.getlength(text))
    canvas = Image.new("L", (size, size), 0)
    left = size // 40 if rng.random() < 0.5 else size - width - size // 40
    top = size // 40 if rng.random() < 0.5 else size - 2 * height
    ImageDraw.Draw(canvas).text((left, top), text, font=font, fill=255)
    share = np.asarray(canvas) / 255.0
    kind = "u1" if study.BitsAllocated == 8 else "<u2"
    pixels = np.frombuffer(study.PixelData, kind)[: size * size].reshape(size, size)
    ink = 2**study.BitsStored - 1 if rng.random() < 0.7 else 0
    study.PixelData = np.rint(pixels * (1 - share) + ink * share).astype(kind).tobytes()
    return share > 0.5


def score(planted: Planted, results: Score) -> None:
    """De-identify one study and judge each action."""
    target = BytesIO()
    dcmwrite(target, planted.study, enforce_file_format=True)
    made = DOMAIN.deidentify(target.getvalue(), DeidentificationConfig())
    after, content = dcmread(BytesIO(made.content)), made.content.lower()
    head = content[: -len(after.PixelData)]  # what is searched for are letters: pixels hold them by chance
    for category, secrets in planted.secrets.items():
        results[f"removed: {category}"] += [secret.lower().encode() not in head for secret in secrets]
    results["kept: references"].append(after.SourceImageSequence[0].ReferencedSOPInstanceUID == after.SOPInstanceUID)
    for name, check in CHECKS.items():
        results[name].append(check(planted.study, after))
    _score_pixels(planted, after, made.review, results)


CHECKS: dict[str, Callable[[Dataset, Dataset], bool]] = {
    "kept: sex, age, equipment, geometry": lambda before, after: (
        all(
            str(after[name].value) == str(before[name].value)
            for name in ("PatientSex", "Manufacturer", "ManufacturerModelName", "KVP", "ImagerPixelSpacing", "Modality")
        )
        and after.PatientAge == ("090Y" if before.PatientAge == "097Y" else before.PatientAge)
    ),
    "kept: dates agree with each other": lambda before, after: (
        len({after.StudyDate, after.SeriesDate, after.AcquisitionDate, after.AcquisitionDateTime[:8]}) == 1
        and after.AcquisitionDateTime[8:] == "101112.5+0100"
    ),
    "marked as PS3.15 E.2 and E.3 say": lambda before, after: (
        after.PatientIdentityRemoved == "YES"
        and after.LongitudinalTemporalInformationModified == "MODIFIED"
        and [item.CodeValue for item in after.DeidentificationMethodCodeSequence]
        == ["113100", "113101", "113107", "113108", "113109"]
    ),
    "pseudonym is no identifier": lambda before, after: (
        after.PatientID == after.PatientName and after.PatientID != before.PatientID
    ),
}


def _score_pixels(planted: Planted, after: Dataset, review: tuple[str, ...], results: Score) -> None:
    before = planted.study.pixel_array
    changed = before != after.pixel_array
    if planted.letters is not None:
        blank = np.bincount(after.pixel_array[changed].ravel()).argmax() if changed.any() else -1
        results["pixels: burned-in identity blanked"].append(bool((after.pixel_array[planted.letters] == blank).mean() > 0.995))
        results["pixels: flagged for review"].append("text_blanked" in review)
    elif planted.marker is not None:
        results["pixels: side markers left"].append(not changed[planted.marker].any())
    else:
        results["pixels: clean images left alone"].append(not changed.any() and not review)


def table(results: Score) -> Iterator[str]:
    yield "| actions | right | of | share |"
    yield "|---|---|---|---|"
    for name in sorted(results, key=lambda name: (not name.startswith("removed"), name)):
        yield f"| {name} | {sum(results[name])} | {len(results[name])} | {np.mean(results[name]):.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="?", type=int, default=STUDIES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here as well")
    options = parser.parse_args()
    started, results = time.monotonic(), defaultdict[str, list[bool]](list)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"CVF_HOME": home, "CVF_PSEUDONYM_KEY": "a key for the benchmark"}
        for number in range(options.studies):
            score(plant(number), results)
    versions = ", ".join(f"{name} {version(name)}" for name in ("pydicom", "rapidocr", "onnxruntime"))
    print(f"Python {platform.python_version()}, {versions}; {options.studies} studies, seed {SEED}\n")
    print("\n".join(table(results)))
    tags = [right for name, actions in results.items() if name.startswith("removed") for right in actions]
    print(f"\nplanted tag identifiers removed: {sum(tags)} of {len(tags)}, {np.mean(tags):.1%}")
    print(f"all actions: {np.mean([right for actions in results.values() for right in actions]):.2%}")
    print(f"{(time.monotonic() - started) / options.studies:.2f} s a study, with screening")
    if options.json:
        counts = {name: {"right": sum(actions), "of": len(actions)} for name, actions in results.items()}
        options.json.write_text(json.dumps({"studies": options.studies, "seed": SEED, "actions": counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
