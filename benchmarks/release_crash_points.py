"""Kill a release at random moments and try again: ``python -m benchmarks.release_crash_points [--points 50] [--seed 0]``.

The stages from ``register`` to ``promote`` of a run that has passed its gate are killed (SIGKILL) at a random moment, then run
again until they succeed, three times at most. History, MLflow and local endpoint are real, the served models those of
``tests/container``. Each point must end with one version and one endpoint config of the run, and with alias, history and
endpoint on it.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from benchmarks.crash_points import TRIES
from cv_factory_ops.deploy.local import stop
from cv_factory_ops.deploy.verify import live
from cv_factory_ops.registry import RUN_TAG
from tests.conftest import prepare
from tests.test_promotion import CONTAINER, RELEASE, World

STAGES = """
import sys, warnings
warnings.simplefilter("ignore")
import boto3, mlflow
from cv_factory_ops import config, promotion, registry, stage
from cv_factory_ops.deploy import verify
from cv_factory_ops.evaluation import evidence
print("ready", flush=True)
for name in sys.argv[3:]:
    stage.run_stage(name, config.load(sys.argv[1]), sys.argv[2])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    moments, rows, missed = random.Random(options.seed), list[tuple[str, ...]](), 0  # noqa: S311
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ |= {"CVF_HOME": folder, "CVF_PSEUDONYM_KEY": "a key for benchmarks", "PYTHONPATH": str(CONTAINER)}
        prepare(home)
        world = World(home)
        try:
            _release(world, world.run())  # starts the endpoint
            seconds = _release(world, world.run())
            print(f"Python {platform.python_version()}, {os.cpu_count()} cores, undisturbed: {seconds:.1f} s", flush=True)
            with tqdm(total=options.points, unit="point") as progress:
                _print("killed after (s)", "in", "tries", "wrong")
                while len(rows) < options.points:
                    if row := _point(world, moments.uniform(0, seconds)):
                        _print(*row)
                        rows.append(row)
                        progress.update()
                    else:
                        missed += 1
        finally:
            stop(home / "var" / "endpoint")
    wrong, hits = sum(bool(row[3]) for row in rows), Counter(row[1] for row in rows)
    print(f"hit: {dict(hits)}; tries needed: {dict(Counter(row[2] for row in rows))}; not hit: {missed}; wrong: {wrong}")
    return 1 if wrong else 0


def _point(world: World, moment: float) -> tuple[str, ...] | None:
    """One release, killed after so many seconds, as a row of the table; None where it was over before."""
    run = world.run()
    if _release(world, run, moment) is not None:
        return None
    during = next(name for name in (*RELEASE, "after all") if not (world.home / "runs" / run.rsplit("/", 1)[1] / name).exists())
    tries = next((number for number in range(2, TRIES + 2) if _release(world, run) is not None), 0)
    wrong = _wrong(world, run) if tries else ["no try succeeded"]
    return f"{moment:.2f}", during, str(tries), "; ".join(wrong)


def _release(world: World, run: str, moment: float | None = None) -> float | None:
    """Seconds that the stages took once Python was ready; None where they were killed after ``moment``, or failed."""
    command = [sys.executable, "-c", STAGES, str(world.path), run, *RELEASE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if process.stdout:
            process.stdout.readline()
        started = time.monotonic()
        try:
            _, told = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            return None
    if process.returncode:
        print(told.decode().strip().splitlines()[-1], file=sys.stderr)
        return None
    return time.monotonic() - started


def _wrong(world: World, run: str) -> list[str]:
    """What is not as after a release that nobody has killed."""
    version, digest, found = world.version(run), world.digest(run), live(world.config)
    state, name = world.home / "var" / "endpoint", f"{world.config.endpoint_name}-{digest[:12]}-*.json"
    moves = Counter(entry.change.action for entry in world.history if entry.change.version == version)
    counted = {
        "versions": len(world.client.search_model_versions(f"name = 'tiny' and tags.`{RUN_TAG}` = '{run}'")),
        "models": len(list((state / "model").glob(name))),
        "endpoint configs": len(list((state / "endpoint-config").glob(name))),
        "registrations": moves["registration"],
        "promotions": moves["promotion"],
    }
    wrong = [f"{count} {what}" for what, count in counted.items() if count != 1]
    names = {"alias": world.aliases.get("champion"), "history": world.history[-1].change.aliases.get("champion")}
    wrong += [f"{what}: champion is {named}, not {version}" for what, named in names.items() if named != version]
    if (found.bundle_digest, found.endpoint_config_name[:-9]) != (digest, name[:-7]):
        wrong.append(f"the endpoint serves {found.endpoint_config_name}")
    return wrong


def _print(*cells: str) -> None:
    tqdm.write("  ".join(cell.ljust(width) for cell, width in zip(cells, (16, 9, 5, 0), strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
