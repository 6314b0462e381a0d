"""What is watched, and when it leads to a retraining: ``drift``, ``decision``."""

from __future__ import annotations

import datetime
import re
import zoneinfo
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cv_factory_ops.config.values import Share
from cv_factory_ops.records import Frozen


class DriftConfig(Frozen):
    """When the captured requests count as drifted."""

    window: int = Field(default=100, ge=1)
    """Requests of a full window; the drift sensor waits for as many."""
    minimum: int = Field(default=50, ge=2)
    """Requests below which the verdict is ``not enough data``."""
    alpha: float = Field(default=0.01, ge=1e-4, lt=1)
    """False-alarm rate of one check over all features together."""
    slow_alpha: float = Field(default=0.01, gt=0, lt=1)
    """False-alarm rate of the test of slow drift, over all features and ``horizon`` checks together."""
    horizon: int = Field(default=90, ge=1, le=10_000)
    """Checks in a row that ``slow_alpha`` holds for."""
    wait_minutes: float = Field(default=60, gt=0)
    """How long the sensor waits for a full window before the check goes on with what there is."""
    late_hours: int = Field(default=6, ge=0)
    """Capture files that arrive up to so many hours behind newer ones are still read."""
    sample: int = Field(default=10_000, ge=100)
    """Answers of a window that are compared, drawn from all of them at random; counts and performance cover all."""
    label_days: float = Field(default=30, ge=0)
    """How far back answers are measured once their labels arrive, from the newest of the window; and labels are read."""
    subgroups: list[str] | None = None
    """Metadata whose groups are watched each by itself; null: those that the domain measures models on."""
    example_images: int = Field(default=6, ge=0)
    """Images of either side that the page shows, without anything but their pixels; 0 shows none."""


class DriftTrigger(Frozen):
    """The drift check has found drift."""

    kind: Literal["drift"] = "drift"


class PerformanceTrigger(Frozen):
    """The champion is too bad: by late labels, or by an estimate where there are too few of them."""

    kind: Literal["performance"] = "performance"
    metric: Literal["accuracy", "auc", "sensitivity", "specificity"] = "auc"
    """Which of those that the drift check has measured or estimated."""
    minimum: Share
    """It asks where the metric's whole 95 % interval lies below this, so that few labels alone never ask."""
    estimated: bool = False
    """Also by an estimate, where fewer than ten labels have arrived (for ``auc``, of either class); else by labels alone."""


class AgeTrigger(Frozen):
    """The champion was trained long ago."""

    kind: Literal["age"] = "age"
    days: float = Field(gt=0)
    """Days since its registration."""


class VolumeTrigger(Frozen):
    """Much new data has come."""

    kind: Literal["volume"] = "volume"
    labels: int = Field(ge=1)
    """Captured studies whose labels have arrived since the last retraining was decided."""


Trigger = Annotated[DriftTrigger | PerformanceTrigger | AgeTrigger | VolumeTrigger, Field(discriminator="kind")]


class BudgetConfig(Frozen):
    """What retrainings of the last 30 days may cost; where it is spent, none is decided."""

    runs: int | None = Field(default=None, ge=1)
    """Retrainings that were decided; null: any number."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes that their stage `train` took; null: any."""


def _clock(given: Any) -> Any:
    """YAML 1.1 takes 22:00 for a number to the base of 60, and pydantic a number for seconds."""
    text = f"{given // 60:02d}:{given % 60:02d}" if type(given) is int and given >= 60 else str(given)
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d(:00)?", text):
        raise ValueError("a time of day, 06:00 to 22:30 for example")
    return text


class QuietHours(Frozen):
    """Hours of each day in which no retraining begins: one that is decided then waits for their end."""

    start: Annotated[datetime.time, BeforeValidator(_clock)]
    """Local time, ``22:00``."""
    end: Annotated[datetime.time, BeforeValidator(_clock)]
    """Local time; before ``start``, it is that of the next day."""
    time_zone: str = "UTC"
    """Name in the IANA time zone database, such as ``Europe/Berlin``."""

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            zoneinfo.ZoneInfo(name)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("a time zone of the IANA database, such as Europe/Berlin") from None
        return name

    @model_validator(mode="after")
    def _some_time(self) -> QuietHours:
        if self.start == self.end:
            raise ValueError("start and end that differ")
        return self


class DecisionConfig(Frozen):
    """When a model is trained anew: what asks for it, and the rules that may stop it, but never a person."""

    triggers: list[Trigger] = [DriftTrigger()]
    """Any of ``drift``, ``performance``, ``age``, ``volume``; empty: only people retrain."""
    cooldown_hours: float = Field(default=24, ge=0)
    """Time after a retraining decision in which no other one is made."""
    minimum_labels: int = Field(default=20, ge=0)
    """New labelled studies that must have arrived since the last retraining."""
    repeat_labels: int = Field(default=50, ge=0)
    """As many of them must have arrived before a cause that has already led to a retraining of this champion does so again."""
    budget: BudgetConfig | None = None
    """What the retrainings of the last 30 days may cost; null: anything."""
    quiet_hours: QuietHours | None = None
    """Hours of each day in which no retraining begins; null: there are none."""
