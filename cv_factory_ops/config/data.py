"""How images are decoded, de-identified, checked and split: ``data``, ``splits``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cv_factory_ops.config.sources import Source
from cv_factory_ops.config.values import Share
from cv_factory_ops.records import Frozen


class FileWindow(Frozen):
    """What the file asks for: its VOI LUT or window; where it has none, its whole range."""

    kind: Literal["file"] = "file"
    index: int = Field(default=0, ge=0)
    """Which of several windows or LUTs (``WindowCenterWidthExplanation`` names them); the last where there are fewer."""


class FixedWindow(Frozen):
    """The same window for every image, in modality units (Hounsfield units for CT)."""

    kind: Literal["fixed"] = "fixed"
    center: float
    width: float = Field(gt=0)
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = "LINEAR_EXACT"
    """PS3.3 C.11.2.1.2 and C.11.2.1.3."""


class FullWindow(Frozen):
    """No window: the whole range that the file declares possible after its Modality LUT."""

    kind: Literal["full"] = "full"


Window = Annotated[FileWindow | FixedWindow | FullWindow, Field(discriminator="kind")]


class Decoding(Frozen):
    """From a file to what a viewer would show of it: the same at training and at serving, so it goes into the bundle."""

    window: Window = FileWindow()
    """One of ``file``, ``fixed``, ``full``."""
    frames: Literal["middle", "all"] = "middle"
    """Of several frames, the middle one; or each as an image of its own (a request is answered for the middle one)."""
    color: Literal["grey", "rgb"] = "grey"
    """``grey`` turns colours to luminance (ITU-R BT.601); ``rgb`` repeats grey three times."""

    @property
    def channels(self) -> int:
        """Of a decoded image: 1 grey, 3 red, green, blue."""
        return 1 if self.color == "grey" else 3


class DeidentificationConfig(Frozen):
    """What stays of a study when its identity goes: options of DICOM PS3.15 Annex E. The defaults are a hospital's."""

    dates: Literal["shift", "remove"] = "shift"
    """``shift`` moves all dates of a patient back by the same secret number of days, 1 to 3650 (Retain Longitudinal Temporal
    Information Modified Dates Option), so that intervals stay; ``remove`` takes dates and times away."""
    device: bool = True
    """Keep which device made the image: serial number, station name, detector (Retain Device Identity Option)."""
    patient_characteristics: bool = True
    """Keep age (above 89 years as 90), sex, size, weight and the like (Retain Patient Characteristics Option)."""
    pixels: Literal["screen", "declared", "trust"] = "screen"
    """``screen`` looks for text in every image and blanks it (Clean Pixel Data Option); ``declared`` only where the file does
    not say that BurnedInAnnotation is NO; ``trust`` looks at none and refuses files that say YES. Looking needs the extra
    ``deidentify``."""


class ValidationConfig(Frozen):
    """What an image must be to be used; whatever is not goes to quarantine with a reason."""

    required: list[str] = []
    """Metadata that must be there: names of the domain (``modality``, ``view_position``), ``patient``, ``study``,
    ``spacing``."""
    allowed: dict[str, list[str]] = {}
    """Values that a metadata category may have: ``{modality: [CR, DX], view_position: [PA, AP]}``."""
    min_side: int = Field(default=8, ge=1)
    """Least rows and columns, in pixels."""
    max_aspect: float = Field(default=8, ge=1)
    """Greatest ratio of the longer to the shorter side."""
    spacing_mm: tuple[float, float] = (0.001, 20.0)
    """Least and greatest plausible pixel spacing, in mm."""
    blank: Share = 1e-3
    """An image whose 0.1 % and 99.9 % quantiles of intensity (0..1) are closer than this shows nothing."""
    max_seconds: float = Field(default=30, gt=0)
    """Seconds that reading and decoding one file may take."""
    max_memory: int = Field(default=2 << 30, ge=256 << 20)
    """Bytes of memory that a process that decodes may take."""


class DataConfig(Frozen):
    """Where the images come from, and which of them are used."""

    source: Source
    """One of ``phantoms``, ``files``, ``npz``, ``dicomweb``, ``dimse``, ``received``, ``http``, ``kafka``, ``video``."""
    include_captures: bool = False
    """Add captured requests whose labels have arrived (the retraining DAG sets this)."""
    unlabelled: Literal["refuse", "keep"] = "refuse"
    """Images without a label, also captured ones: ``keep`` makes them the split ``unlabelled``, for ``fixmatch``."""
    report_column: str | None = Field(default=None, min_length=1)
    """Column of the table of labels that holds a report about the image, whose words a hybrid search of similar studies finds.
    Reports must be de-identified: nothing here finds a name in a sentence. Null: no report is read. See docs/retrieval.md."""
    pseudo_labels: float | None = Field(default=None, gt=0.5, le=1)
    """Captured studies whose label has not arrived are trained on with the champion's answer, where its calibrated probability
    is at least this; never validated or tested on. Null: no answer is taken for a label."""
    validation: ValidationConfig = ValidationConfig()
    max_quarantined: Share = 0.2
    """Share of refused items above which ingestion fails instead of going on without them."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that read and decode; null means one a core."""


class SplitConfig(Frozen):
    """Split by patient, by a hash: a patient never changes sides when others arrive."""

    val: Share = 0.15
    """Share of patients that thresholds and early stopping are chosen on."""
    test: Share = 0.2
    """Share of patients that the gate is judged on; locked at the first promotion."""
    seed: int = 0
