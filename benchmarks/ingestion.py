"""From a folder of DICOM files to ready shards: ``python -m benchmarks.ingestion [--files 2000] [--runs 3] [--side 512]``.

For each transfer syntax, files a second of three programs over the same files, each with two processes, alternating:

- ``bare``: ``dcmread`` and ``pixel_array``; nothing is checked, scaled or kept.
- ``MONAI``: ``LoadImage`` (pydicom reader), ``EnsureChannelFirst``, ``Resize`` to 224 x 224, ``numpy.save``.
- ``ours``: ``cvf ingest`` and ``cvf preprocess`` to shards of 224 x 224: decoded and windowed by the standard's order, checked,
  digested, split by patient, refused files listed; the start of both programs included.

Targets: ours at least 2.5 times MONAI and at least 0.5 times bare. ``--memory`` instead runs ours on 1,000 and 10,000 files and
prints the memory of the largest process of each stage (its maximum resident set).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import yaml
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

SYNTAXES = {
    "uncompressed": ExplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
}
PIXELS = 24
"""Different images; every file has its own header and its own rescaling of one of them, so that none is a duplicate."""

BARE = """
import sys
from pydicom import dcmread
for name in sys.stdin.read().splitlines():
    dcmread(name).pixel_array
"""

MONAI = """
import sys
from pathlib import Path
import numpy as np
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize
load = Compose([LoadImage(reader="PydicomReader", image_only=True), EnsureChannelFirst(), Resize((224, 224))])
for name in sys.stdin.read().splitlines():
    np.save(Path(sys.argv[1]) / Path(name).with_suffix(".npy").name, load(name).numpy())
"""

MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, done.stdout, done.stderr[-500:], most]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", type=int, default=512, help="rows and columns of the CT images")
    parser.add_argument("--syntax", choices=SYNTAXES, action="append", help="repeatable; all by default")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    packages = ("pydicom", "pylibjpeg-openjpeg", "pylibjpeg-libjpeg", "monai")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="; ")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, CT {options.side} x {options.side}, 16 bits, seed 0\n")
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            _memory(Path(folder), options.side)
        else:
            _speed(Path(folder), options)


def _speed(folder: Path, options: argparse.Namespace) -> None:
    print(f"{options.files} files, median of {options.runs} runs, files/s of two processes\n")
    print(f"{'':<14}{'bare':>8}{'MONAI':>8}{'ours':>8}{'of bare':>10}{'of MONAI':>10}")
    for name in options.syntax or SYNTAXES:
        files = write_files(folder / name.replace(" ", "_"), name, options.files, options.side)
        seconds: dict[str, list[float]] = {"bare": [], "MONAI": [], "ours": []}
        for run in range(options.runs):
            seconds["bare"].append(_two_processes(BARE, files, folder))
            seconds["MONAI"].append(_two_processes(MONAI, files, folder))
            seconds["ours"].append(sum(_ours(files[0].parent, folder / f"run-{run}-{name}").values()))
        rates = {key: options.files / statistics.median(values) for key, values in seconds.items()}
        ratios = f"{rates['ours'] / rates['bare']:>10.2f}{rates['ours'] / rates['MONAI']:>10.2f}"
        print(f"{name:<14}" + "".join(f"{rate:>8.0f}" for rate in rates.values()) + ratios, flush=True)


def _memory(folder: Path, side: int) -> None:
    print(f"{'files':>8}{'ingest':>12}{'preprocess':>12}")
    for count in (1000, 10_000):
        files = write_files(folder / f"{count}", "uncompressed", count, side)
        _ours(files[0].parent, folder / f"run-{count}", most := {})
        print(f"{count:>8}" + "".join(f"{most[stage] / 1024:>8.0f} MiB" for stage in ("ingest", "preprocess")), flush=True)
        for file in files:
            file.unlink()


def write_files(folder: Path, syntax: str, count: int, side: int) -> list[Path]:
    """CT images of patients with four images each, in one transfer syntax, and their table of labels."""
    folder.mkdir()
    templates = [_template(seed, syntax, side) for seed in range(PIXELS)]
    lines = ["file,label"]
    for i in range(count):
        study = templates[i % PIXELS]
        study.PatientID, study.StudyInstanceUID = f"P{i // 4:05d}", f"1.2.826.0.1.3680043.10.99.{i // 4 + 1}"
        study.SOPInstanceUID = study.file_meta.MediaStorageSOPInstanceUID = f"{study.StudyInstanceUID}.{i % 4 + 1}"
        steeper, darker = divmod(i // PIXELS, 100)  # no two files show the same pixels
        study.RescaleSlope, study.RescaleIntercept = str(1 + steeper / 100), str(-1024 - darker)
        target = BytesIO()
        dcmwrite(target, study, enforce_file_format=True)
        (folder / f"{i:06d}.dcm").write_bytes(target.getvalue())
        lines.append(f"{i:06d}.dcm,{('normal', 'opacity')[i // 4 % 2]}")
    (folder.parent / f"{folder.name}.csv").write_text("\n".join(lines) + "\n")
    return sorted(folder.iterdir())


def _template(seed: int, syntax: str, side: int) -> Dataset:
    """A disc of tissue with structures and noise, in 12 of 16 bits, signed."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    body = np.where(x**2 / 0.8 + y**2 / 0.6 < 1, 1040.0, 24.0)
    for _ in range(12):
        cx, cy, size = *draw.uniform(-0.6, 0.6, 2), draw.uniform(0.03, 0.2)
        body += draw.uniform(-300, 300) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size**2)
    pixels = (body + draw.normal(0, 12, body.shape)).clip(0, 4095).astype(np.int16)
    study = Dataset()
    study.SOPClassUID = CTImageStorage
    study.Modality, study.Manufacturer, study.PatientName, study.PatientSex = "CT", "Benchmark", "Phantom", "O"
    study.PatientAge, study.BodyPartExamined, study.KVP = "050Y", "CHEST", "120"
    study.PixelSpacing, study.SliceThickness = [0.7, 0.7], "1.0"
    study.ImagePositionPatient, study.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    study.SeriesInstanceUID, study.FrameOfReferenceUID = generate_uid(), generate_uid()
    study.RescaleSlope, study.RescaleIntercept, study.WindowCenter, study.WindowWidth = "1", "-1024", "40", "400"
    study.SamplesPerPixel, study.PhotometricInterpretation, study.PixelRepresentation = 1, "MONOCHROME2", 1
    study.Rows, study.Columns = pixels.shape
    study.BitsAllocated, study.BitsStored, study.HighBit = 16, 16, 15
    study.PixelData = pixels.tobytes()
    study.file_meta = FileMetaDataset()
    study.file_meta.MediaStorageSOPClassUID = CTImageStorage
    study.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax != "uncompressed":
        study.compress(SYNTAXES[syntax], generate_instance_uid=False)
    return study


def _two_processes(script: str, files: list[Path], folder: Path) -> float:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    running = []
    for half in (files[::2], files[1::2]):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, str(out)], stdin=subprocess.PIPE, text=True, env=environment
        )
        if process.stdin:
            process.stdin.write("\n".join(map(str, half)))
            process.stdin.close()
        running.append(process)
    if any(process.wait() for process in running):
        raise SystemExit("a program that is compared with has failed")
    return time.perf_counter() - started


def _ours(data: Path, run: Path, most: dict[str, int] | None = None) -> dict[str, float]:
    """Seconds of each stage; the memory of its largest process, in KiB, goes into ``most``."""
    run.mkdir()
    source = {"kind": "files", "path": str(data), "labels": f"{data}.csv"}
    project = {"project": "bench", "labels": ["normal", "opacity"], "data": {"source": source, "workers": 2}}
    (run / "project.yaml").write_text(yaml.safe_dump(project | {"preprocessing": {"size": 224}}))
    environment = os.environ | {"CVF_HOME": str(run), "CVF_PSEUDONYM_KEY": "benchmark"}
    seconds = {}
    for stage in ("ingest", "preprocess"):
        command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", f"{run}/project.yaml", "--run", f"{run}/run"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *command], env=environment, capture_output=True, text=True, check=True
        )
        seconds[stage] = time.perf_counter() - started
        code, output, errors, peak = json.loads(done.stdout)
        if code:
            raise SystemExit(errors)
        record = json.loads(output)["record"]
        count = record["accepted"] if stage == "ingest" else sum(record["counts"].values())
        if count != len(list(data.iterdir())):
            raise SystemExit(f"{stage}: {record['summary']}")
        if most is not None:
            most[stage] = peak
    return seconds


if __name__ == "__main__":
    main()
