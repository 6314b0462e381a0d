"""Drift on real chest X-rays, beside what others decide on the same windows.

    python benchmarks/drift_detection.py DATA [--size 100] [--quiet 300] [--shifted 40] [--nannyml venv/bin/python]
    python benchmarks/drift_detection.py DATA --hospital IMAGES.TAR [--size 100] [--shifted 40] [--nannyml venv/bin/python]
    python benchmarks/drift_detection.py DATA --slow [--sequences 12]
    python benchmarks/drift_detection.py --large [--rows 1000000]

DATA is PneumoniaMNIST's file. Features are ours: image statistics, and score, entropy and eight principal components of the
embedding of a small network that is trained here on the file's validation and test images (8 epochs, seed 0). Each window of
the training images meets a reference of its own, half of them, so that rows are exchangeable. A shifted window is changed in
every study or, in the rows named so, in 30 % of them, as where one scanner of three changes. IMAGES.TAR are another hospital's
studies, which stand in the place of so many of a window. Seeded: the same versions print the same table.

The peers decide as they do by default: Evidently's preset (its test for each column, drift from half of the columns on; the
tests are called directly, which gives the preset's verdict without its pages), Kolmogorov-Smirnov on each column with
Bonferroni's correction, maximum mean discrepancy as in Alibi Detect (Gaussian kernel of the median distance, 100 permutations;
columns standardized), and NannyML's univariate drift (Jensen-Shannon, alarm where any column alerts), which runs in an
environment of its own. Those that give a p-value are held to the rate that ours declares, and to their usual 0.05.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from cv_factory_ops.config.drift import DriftConfig
from cv_factory_ops.config.models import SmallCnn
from cv_factory_ops.domain import Kind
from cv_factory_ops.drift import sequential
from cv_factory_ops.drift.detect import compare, judge, sampled
from cv_factory_ops.preprocessing.statistics import STATISTICS, image_statistics

ALPHA, USUAL, REFERENCE, COMPONENTS = 0.01, 0.05, 2354, 8
COLUMNS = [*(f"image_{name}" for name in STATISTICS), *(f"embedding_{i}" for i in range(COMPONENTS)), "score", "entropy"]
KINDS: dict[str, Kind] = dict.fromkeys(COLUMNS, "number")
Images = NDArray[np.float32]
"""(N, 28, 28) in 0..1"""
Table = NDArray[np.float64]
"""(N, columns)"""
Verdicts = dict[str, bool]
"""By method: whether it calls the window drifted."""


def blur(images: Images, rng: np.random.Generator) -> Images:
    return np.stack([cv2.GaussianBlur(image, (0, 0), 0.5) for image in images])


def gamma(images: Images, rng: np.random.Generator) -> Images:
    return images**1.2


def noise(images: Images, rng: np.random.Generator) -> Images:
    return images + rng.normal(0, 0.01, images.shape).astype(np.float32)


def rotation(images: Images, rng: np.random.Generator) -> Images:
    turns = [cv2.getRotationMatrix2D((13.5, 13.5), float(degrees), 1) for degrees in rng.choice([-5, 5], len(images))]
    pairs = zip(images, turns, strict=True)
    return np.stack([cv2.warpAffine(image, turn, (28, 28), borderMode=cv2.BORDER_REFLECT) for image, turn in pairs])


def scanner(images: Images, rng: np.random.Generator) -> Images:
    """Coarser pixels (24 of 28), 5 % less contrast, a little brighter."""
    coarse = [cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA) for image in images]
    return np.stack([cv2.resize(image, (28, 28), interpolation=cv2.INTER_LINEAR) for image in coarse]) * 0.95 + 0.02


SHIFTS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "blur": blur,
    "gamma": gamma,
    "noise": noise,
    "rotation": rotation,
    "scanner": scanner,
}
ROWS = [*SHIFTS, *(f"{name} in 30 %" for name in SHIFTS), "class balance"]
ELSEWHERE = ["another hospital", "another hospital in 30 %", "another hospital in 10 %"]


@dataclass(frozen=True)
class Data:
    """Features of the training images as they are, and changed, and of another hospital's; and whether each shows pneumonia."""

    tables: dict[str, Table]
    ill: NDArray[np.bool_]

    @classmethod
    def load(cls, path: str, hospital: str | None = None) -> Data:
        arrays = np.load(path)
        images = {name: arrays[f"{name}_images"].astype(np.float32) / 255 for name in ("train", "val", "test")}
        labels = {name: arrays[f"{name}_labels"].ravel().astype(np.int64) for name in images}
        known = [np.concatenate([part["val"], part["test"]]) for part in (images, labels)]
        describe = describer(*known)
        rng = np.random.default_rng(0)
        tables = {name: describe(change(images["train"], rng)) for name, change in SHIFTS.items()}
        if hospital:
            tables["another hospital"] = describe(images_in(hospital))
        return cls({"quiet": describe(images["train"]), **tables}, labels["train"] == 1)


def images_in(archive: str) -> Images:
    """As PneumoniaMNIST's were made: the square in the middle, at 28 px (Yang et al. 2023)."""
    found = []
    with tarfile.open(archive) as members:
        for member in members:
            if content := members.extractfile(member):
                found.append(cv2.imdecode(np.frombuffer(content.read(), np.uint8), cv2.IMREAD_GRAYSCALE))
    small = [cv2.resize(square(image), (28, 28), interpolation=cv2.INTER_AREA) for image in found]
    return np.stack(small).astype(np.float32) / 255


def square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The one in the middle."""
    side = min(image.shape)
    top, left = ((length - side) // 2 for length in image.shape)
    return image[top : top + side, left : left + side]


def describer(images: Images, labels: NDArray[np.int64]) -> Callable[[Images], Table]:
    """Train the network on the images; what it returns gives the features of others."""
    import torch

    from cv_factory_ops.models import build
    from cv_factory_ops.predictor import infer
    from cv_factory_ops.preprocessing.pipeline import to_tensor
    from cv_factory_ops.training.release import fit_pca

    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = build(SmallCnn(width=8), 2, mean=0.57, std=0.17)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    inputs, targets = to_tensor(levels(images)), torch.from_numpy(labels)
    for _ in range(8):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs[batch])[0], targets[batch]).backward()
            optimizer.step()
    network.eval()
    pca = fit_pca(infer(network, levels(images))[1], COMPONENTS)

    def describe(images: Images) -> Table:
        prepared = levels(images)
        probabilities, embedding = infer(network, prepared)
        parts = zip(prepared, pca.transform(embedding), probabilities, strict=True)
        return np.array([[*image_statistics(image).values(), *row, *told_by(p)] for image, row, p in parts])

    return describe


def told_by(probabilities: NDArray[np.float32]) -> tuple[float, float]:
    """Score and entropy."""
    return float(probabilities[1]), float(-(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum())


def levels(images: Images) -> NDArray[np.uint16]:
    return (np.clip(images, 0, 1) * 65535).round().astype(np.uint16)


def windows(data: Data, shift: str, size: int, count: int) -> Iterator[tuple[Table, Table]]:
    """References and windows, the same ones for everybody."""
    rng = np.random.default_rng([size, [*ROWS, "quiet", *ELSEWHERE].index(shift)])
    quiet = data.tables["quiet"]
    for _ in range(count):
        order = rng.permutation(len(quiet))
        rows = order[REFERENCE : REFERENCE + size]
        if shift == "class balance":
            rest, ill = order[REFERENCE:], data.ill[order[REFERENCE:]]
            pneumonia = rng.binomial(size, 0.5)
            rows = np.concatenate([rest[ill][:pneumonia], rest[~ill][: size - pneumonia]])
        of, _, share = shift.partition(" in ")
        table = data.tables.get(of, quiet)
        drawn = rng.integers(len(table), size=len(rows)) if of in ELSEWHERE else rows  # fewer images than rows: some come twice
        keep = rng.random(len(rows)) >= (float(share.removesuffix(" %")) / 100 if share else 1)
        yield quiet[order[:REFERENCE]], np.where(keep[:, None], quiet[rows], table[drawn])


def ours(reference: Table, window: Table) -> Verdicts:
    sides = [pd.DataFrame(side, columns=COLUMNS) for side in (reference, window)]
    return {"ours, 0.01": bool(judge(compare(*sides, KINDS, ALPHA)).drifted)}


def ks_bonferroni(reference: Table, window: Table) -> Verdicts:
    p = len(COLUMNS) * min(ks_2samp(reference[:, i], window[:, i], method="asymp").pvalue for i in range(len(COLUMNS)))
    return {"KS, Bonferroni, 0.01": p <= ALPHA, "KS, Bonferroni, 0.05": p <= USUAL}


def evidently_preset(reference: Table, window: Table) -> Verdicts:
    from evidently.legacy.calculations.stattests import get_stattest
    from evidently.legacy.core import ColumnType

    drifted = 0
    for i in range(len(COLUMNS)):
        sides = pd.Series(reference[:, i]), pd.Series(window[:, i])
        test = get_stattest(*sides, ColumnType.Numerical, None)
        drifted += bool(test(*sides, ColumnType.Numerical, None).drifted)
    return {"Evidently's preset": drifted / len(COLUMNS) >= 0.5}


def mmd(reference: Table, window: Table) -> Verdicts:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012), as sums over a kernel without its diagonal."""
    rows = ((np.concatenate([reference, window]) - reference.mean(0)) / reference.std(0)).astype(np.float32)
    lengths = (rows**2).sum(1)
    distances = np.maximum(lengths[:, None] + lengths - 2 * rows @ rows.T, 0)
    kernel = np.exp(-distances / np.median(distances))
    np.fill_diagonal(kernel, 0)
    n, m = len(reference), len(window)
    rng = np.random.default_rng(0)
    inside = np.zeros((101, n + m), np.float32)
    inside[0, n:] = 1
    for line in inside[1:]:
        line[rng.permutation(n + m)[:m]] = 1
    towards = inside @ kernel
    within, across = (towards * inside).sum(1), (towards * (1 - inside)).sum(1)
    rest = kernel.sum() - within - 2 * across
    statistic = within / (m * (m - 1)) + rest / (n * (n - 1)) - 2 * across / (n * m)
    p = float((statistic[1:] >= statistic[0]).mean())
    return {"MMD, 0.01": p <= ALPHA, "MMD, 0.05": p <= USUAL}


METHODS = (ours, ks_bonferroni, evidently_preset, mmd)
NANNYML = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, pandas as pd, nannyml
arrays = np.load(sys.argv[1])
for reference, window in zip(arrays["references"], arrays["windows"]):
    sides = [pd.DataFrame(side, columns=[f"x{i}" for i in range(side.shape[1])]) for side in (reference, window)]
    test = nannyml.UnivariateDriftCalculator(column_names=list(sides[0]), chunk_size=len(window)).fit(sides[0])
    found = test.calculate(sides[1]).filter(period="analysis").to_df()
    print(int(found.xs("alert", axis=1, level=-1).to_numpy(bool).any()))
"""


def nannyml(python: str, pairs: list[tuple[Table, Table]]) -> float:
    """Share of windows with an alert; the windows are handed over as a file."""
    references, found = zip(*pairs, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "windows.npz"), references=references, windows=found)
        command = [python, "-c", NANNYML, str(Path(folder, "windows.npz"))]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "NML_DISABLE_USAGE_LOGGING": "1"}
        )
    return float(np.mean([int(line) for line in done.stdout.split()]))


SHARE = 5
"""MMD and NannyML take long: they get the first windows of each row, one in so many."""


def detection(data: Data, size: int, counts: dict[str, int], python: str | None) -> None:
    """A table of one window size, of so many windows by row. Whoever alarms always finds everything: the last row is the mean
    over the shifts less the rate of false alarms."""
    table = []
    for shift, count in counts.items():
        pairs = list(windows(data, shift, size, count))
        few = pairs[: max(count // SHARE, 10)]
        rates = {
            name: float(found)
            for method in METHODS
            for name, found in pd.DataFrame([method(*pair) for pair in (few if method is mmd else pairs)]).mean().items()
        }
        if python:
            rates["NannyML"] = nannyml(python, few)
        if not table:
            print(f"\n| windows of {size} | " + " | ".join(rates) + " |\n|---" + "|---" * len(rates) + "|")
        table.append(list(rates.values()))
        print(f"| {shift} | " + " | ".join(f"{rate:.1%}" if shift == "quiet" else f"{rate:.0%}" for rate in table[-1]) + " |")
        sys.stdout.flush()
    if "quiet" not in counts:
        return
    mean = np.mean(table[1:], 0)
    print("| mean of the shifts | " + " | ".join(f"{rate:.1%}" for rate in mean) + " |")
    print("| mean less false alarms | " + " | ".join(f"{rate:.1%}" for rate in mean - table[0]) + " |")


NIGHTS, NIGHTLY, ONSET = 30, 100, 5


def nights(data: Data, drift: str, seed: int) -> tuple[Table, list[Table]]:
    """A reference and a month of windows; from the sixth night on the drift grows night by night."""
    rng = np.random.default_rng(seed)
    order = list(rng.permutation(len(data.ill)))
    reference, order = order[: 4708 - NIGHTS * NIGHTLY - 1000], order[4708 - NIGHTS * NIGHTLY - 1000 :]
    found = []
    for night in range(NIGHTS):
        grown = max(0, night - ONSET + 1)
        if drift == "class balance":
            wanted = rng.random(NIGHTLY) < 0.742 - 0.004 * grown
            rows = [order.pop(next(i for i, row in enumerate(order) if data.ill[row] == ill)) for ill in wanted]
            found.append(data.tables["quiet"][rows])
        else:
            rows = [order.pop() for _ in range(NIGHTLY)]
            changed = rng.random(NIGHTLY) < (0.01 * grown if drift in SHIFTS else 0)
            found.append(np.where(changed[:, None], data.tables[drift][rows], data.tables["quiet"][rows]))
    return data.tables["quiet"][reference], found


def slow(data: Data, sequences: int) -> None:
    """Nights until the first alarm after the onset; in brackets, sequences with none."""
    config = DriftConfig(alpha=ALPHA, slow_alpha=0.01, horizon=90)
    print(
        "\n| drift | our window test | with our test of slow drift | KS, Bonferroni, 0.05 | alarms before: window, slow, KS |"
    )
    print("|---|---|---|---|---|")
    for drift in ("quiet", "scanner", "noise", "class balance"):
        first = np.array([first_alarms(*nights(data, drift, seed), config) for seed in range(sequences)])
        after = np.where(first >= ONSET, first - ONSET + 1, np.inf)
        early = ", ".join(str(int(count)) for count in (first < ONSET).sum(0))
        nights_of = [f"{median:g}" if np.isfinite(median) else "none" for median in np.median(after, 0)]
        missed = np.isinf(after).sum(0)
        told = [f"{median} ({count} of {sequences} not)" for median, count in zip(nights_of, missed, strict=True)]
        print(f"| {drift} | " + " | ".join(told) + f" | {early} |", flush=True)


def first_alarms(reference: Table, found: list[Table], config: DriftConfig) -> list[float]:
    """Night of the first alarm of the window test, of either of our tests, and of the peer."""
    state, first = None, [np.inf] * 3
    for night, window in enumerate(found):
        sides = [pd.DataFrame(side, columns=COLUMNS) for side in (reference, window)]
        comparison = compare(*sides, KINDS, ALPHA)
        drifted = judge(comparison).drifted
        state = sequential.advance(state, comparison, config, drifted)
        alarm = bool(drifted)
        peer = ks_bonferroni(reference, window)["KS, Bonferroni, 0.05"]
        alarms = (alarm, alarm or bool(sequential.drifted(state, config)), peer)
        first = [min(earlier, night) if alarm else earlier for earlier, alarm in zip(first, alarms, strict=True)]
    return first


def large(rows: int) -> None:
    """Seconds and memory of our verdict with Evidently's report of the sample, and of Evidently's preset on all rows."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    from cv_factory_ops.drift.report import write_report

    rng = np.random.default_rng(0)
    kinds: dict[str, Kind] = {f"x{i}": "number" for i in range(26)} | {f"c{i}": "category" for i in range(6)}
    reference, window = (table_of(rng, size, kinds) for size in (rows // 10, rows))
    print(f"memory with both tables: {memory():.0f} MiB")
    sample = DriftConfig().sample
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter(), time.process_time()
        comparison = compare(sampled(reference, sample), sampled(window, sample), kinds, ALPHA)
        verdict = judge(comparison)
        print(f"ours, {sample:,} rows a side: verdict {told(started)}")
        write_report(comparison, verdict, Path(folder))
        print(f"ours: verdict and report {told(started)}, {memory():.0f} MiB at most")
    definition = DataDefinition(
        numerical_columns=[name for name in kinds if kinds[name] == "number"],
        categorical_columns=[name for name in kinds if kinds[name] == "category"],
    )
    started = time.perf_counter(), time.process_time()
    Report([DataDriftPreset()]).run(*(Dataset.from_pandas(side, data_definition=definition) for side in (window, reference)))
    print(f"Evidently's preset on all rows: {told(started)}, {memory():.0f} MiB at most")


def table_of(rng: np.random.Generator, rows: int, kinds: dict[str, Kind]) -> pd.DataFrame:
    def column(kind: Kind) -> NDArray[np.float64] | pd.Categorical:
        return rng.normal(size=rows) if kind == "number" else rng.choice(list("abcde"), rows, p=[0.6, 0.2, 0.1, 0.05, 0.05])

    return pd.DataFrame({name: column(kind) for name, kind in kinds.items()})


def memory() -> float:
    """MiB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def told(started: tuple[float, float]) -> str:
    return f"{time.perf_counter() - started[0]:.1f} s ({time.process_time() - started[1]:.1f} s processor)"


def speed() -> None:
    """Processor time of the nightly verdict, best of nine."""
    rng = np.random.default_rng(0)
    kinds: dict[str, Kind] = {f"x{i}": "number" for i in range(26)} | {f"c{i}": "category" for i in range(6)}
    sides = [table_of(rng, size, kinds) for size in (REFERENCE, 200)]
    taken = []
    for _ in range(9):
        started = time.process_time()
        judge(compare(*sides, kinds, ALPHA))
        taken.append(time.process_time() - started)
    print(f"verdict on {REFERENCE} and 200 rows of 32 columns: {min(taken):.3f} s processor")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?")
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--quiet", type=int, default=300)
    parser.add_argument("--shifted", type=int, default=40)
    parser.add_argument("--nannyml", help="interpreter of an environment with NannyML")
    parser.add_argument("--hospital", help="archive of another hospital's images; only its rows")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    started = time.monotonic()
    versions = {name: version(name) for name in ("evidently", "scipy", "numpy", "pandas", "torch")}
    given = " ".join(sys.argv[1:]).replace(str(options.data), "DATA").replace(str(options.hospital), "IMAGES.TAR")
    print(f"Python {platform.python_version()}, {json.dumps(versions)}, {given}")
    if options.large:
        speed()
        large(options.rows)
    elif options.slow:
        slow(Data.load(options.data), options.sequences)
    else:
        counts = {"quiet": options.quiet, **dict.fromkeys(ROWS, options.shifted)}
        if options.hospital:
            counts = dict.fromkeys(ELSEWHERE, options.shifted)
        detection(Data.load(options.data, options.hospital), options.size, counts, options.nannyml)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
