"""How often the drift check raises a false alarm, and how often it sees a change: `python benchmarks/drift.py [quiet windows]`.

Features are generated (18 numbers, of which two are missing now and then, and 6 categories, some with rare values); each
window meets a reference of its own. The declared rate is ``alpha`` for a whole check. Beside it stands the rate of
Evidently's `ks` and `chisquare` at Bonferroni's threshold. Seeded: the same versions print the same table.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pandas as pd
from scipy.stats import chisquare, ks_2samp

from cv_factory_ops.domain import Kind
from cv_factory_ops.drift.detect import TOGETHER, compare, judge

ALPHA, REFERENCE = 0.01, 90
SIZES = (50, 100, 200)
QUIET_WINDOWS, SHIFTED_WINDOWS = 100, 20
NUMBERS = [f"number_{i}" for i in range(18)]
CATEGORIES = {
    "category_0": (0.5, 0.5),
    "category_1": (0.7, 0.3),
    "category_2": (0.5, 0.3, 0.2),
    "category_3": (0.9, 0.06, 0.03, 0.01),
    "category_4": (0.97, 0.03),
    "category_5": (0.4, 0.3, 0.15, 0.1, 0.05),
}
KINDS: dict[str, Kind] = {name: "category" if name in CATEGORIES else "number" for name in (*NUMBERS, *CATEGORIES)}
Change = Callable[[pd.DataFrame, np.random.Generator], None]


def sample(rng: np.random.Generator, size: int) -> pd.DataFrame:
    """Features of ``size`` ordinary studies."""
    frame = pd.DataFrame(rng.normal(size=(size, len(NUMBERS))), columns=NUMBERS)
    for name in NUMBERS[:2]:
        frame.loc[rng.random(size) < 0.1, name] = np.nan
    for name, shares in CATEGORIES.items():
        frame[name] = rng.choice(list("abcdefgh")[: len(shares)], size, p=shares)
    return frame


def shift_one(frame: pd.DataFrame, rng: np.random.Generator) -> None:
    frame["number_5"] += 1.0


def shift_three(frame: pd.DataFrame, rng: np.random.Generator) -> None:
    frame[["number_5", "number_6", "number_7"]] += 0.7


def widen_one(frame: pd.DataFrame, rng: np.random.Generator) -> None:
    frame["number_5"] *= 3.0


def new_scanner(frame: pd.DataFrame, rng: np.random.Generator) -> None:
    frame.loc[rng.random(len(frame)) < 0.3, "category_0"] = "unseen"


def lose_values(frame: pd.DataFrame, rng: np.random.Generator) -> None:
    frame.loc[rng.random(len(frame)) < 0.4, "number_5"] = np.nan


CHANGES: dict[str, Change] = {
    "one number + 1 sd": shift_one,
    "three numbers + 0.7 sd": shift_three,
    "one number x 3": widen_one,
    "30 % new category": new_scanner,
    "40 % missing": lose_values,
}


def check(reference: pd.DataFrame, window: pd.DataFrame) -> tuple[bool, bool]:
    """Whether our check raises an alarm, and Evidently's own tests at Bonferroni's threshold."""
    comparison = compare(reference, window, KINDS, ALPHA)
    theirs = {}
    for name, kind in comparison.testable.items():
        if name == TOGETHER:
            continue
        sides = comparison.reference[name].dropna(), comparison.window[name].dropna()
        theirs[name] = goodness_of_fit(*sides) if kind == "category" else float(ks_2samp(*sides).pvalue)
    return bool(judge(comparison).drifted), min(theirs.values()) <= ALPHA / len(theirs)


def goodness_of_fit(reference: pd.Series[str], window: pd.Series[str]) -> float:
    """Evidently's `chisquare`: the reference's shares are taken for the truth."""
    names = sorted(set(reference) | set(window))
    observed, expected = (np.array([(side == name).sum() for name in names]) for side in (window, reference))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(chisquare(observed, expected * (len(window) / len(reference))).pvalue)


def rates(size: int, windows: int, change: Change | None = None) -> tuple[float, float]:
    """Share of windows with an alarm, ours and Evidently's."""
    rng = np.random.default_rng(size)
    alarms = np.zeros(2)
    for _ in range(windows):
        window = sample(rng, size)
        if change:
            change(window, rng)
        alarms += check(sample(rng, REFERENCE), window)
    ours, theirs = alarms / windows
    return float(ours), float(theirs)


def main() -> None:
    started = time.monotonic()
    quiet_windows = int(sys.argv[1]) if len(sys.argv) > 1 else QUIET_WINDOWS
    versions = ", ".join(f"{name} {version(name)}" for name in ("evidently", "scipy", "numpy", "pandas"))
    print(f"Python {platform.python_version()}, {versions}")
    print(f"{len(KINDS)} features, alpha {ALPHA} a check, reference of {REFERENCE} rows")
    print(f"{quiet_windows} quiet and {SHIFTED_WINDOWS} changed windows a size\n")
    print("| window | " + " | ".join(f"{size} requests" for size in SIZES) + " |")
    print("|---" * (len(SIZES) + 1) + "|")
    quiet = [rates(size, quiet_windows) for size in SIZES]
    print("| quiet: false alarms | " + " | ".join(f"{ours:.1%}" for ours, _ in quiet) + " |")
    print("| quiet: Evidently's `ks` and `chisquare` | " + " | ".join(f"{theirs:.1%}" for _, theirs in quiet) + " |")
    for name, change in CHANGES.items():
        found = [rates(size, SHIFTED_WINDOWS, change)[0] for size in SIZES]
        print(f"| {name}: found | " + " | ".join(f"{rate:.0%}" for rate in found) + " |")
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
