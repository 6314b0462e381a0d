"""What a thousand studies cost: ``python -m benchmarks.costs --help``.

Prices are arguments without a default, as they differ by region, contract and day; speeds are those of docs/benchmarks.md, and
arguments too, so that those of your own machine and network can be put in their place.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

HOURS_A_MONTH = 730
"""365 days x 24 hours / 12."""
DAYS_A_MONTH = 365 / 12


class Cost(NamedTuple):
    """What something costs a month."""

    name: str
    arithmetic: str
    a_month: float


def main(given: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(given)
    studies = options.studies_a_day * DAYS_A_MONTH
    found = costs(options)
    print(f"| {studies:.0f} studies a month | arithmetic | a month | per 1000 studies |\n|---|---|---|---|")
    for cost in [*found, Cost("sum", "", sum(cost.a_month for cost in found))]:
        print(f"| {cost.name} | {cost.arithmetic} | {cost.a_month:.2f} | {cost.a_month / studies * 1000:.3f} |")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What a thousand studies cost, in the currency of the prices.")
    prices = parser.add_argument_group("prices")
    prices.add_argument("--serving-hour", type=float, required=True, help="an instance of the endpoint")
    prices.add_argument("--training-hour", type=float, required=True, help="all instances of a training together")
    prices.add_argument("--batch-hour", type=float, required=True, help="an instance that ingests, preprocesses, predicts")
    prices.add_argument("--storage-gb-month", type=float, required=True, help="a GB (10^9 bytes) in the store")
    prices.add_argument("--put-thousand", type=float, required=True, help="a thousand writes to the store")
    load = parser.add_argument_group("load")
    load.add_argument("--studies-a-day", type=float, required=True)
    load.add_argument("--busy-hours", type=float, default=8, help="of a day, in which they all come")
    load.add_argument("--retrainings-a-month", type=float, default=1)
    load.add_argument("--months-kept", type=float, default=12, help="for which studies are in the store")
    load.add_argument("--least-instances", type=int, default=1, help="of the endpoint, also where one had little to do")
    speeds = parser.add_argument_group("speeds, measured on 2 cores (docs/benchmarks.md)")
    speeds.add_argument("--served-a-second", type=float, default=20.5, help="by an instance: DICOM of 1024 x 1024, ResNet-18")
    speeds.add_argument("--load-share", type=float, default=0.5, help="of that which is asked of an instance at most")
    speeds.add_argument("--prepared-a-second", type=float, default=351, help="files ingested and preprocessed")
    speeds.add_argument("--training-minutes", type=float, default=13.3, help="PneumoniaMNIST, the slowest of three")
    speeds.add_argument("--study-mb", type=float, default=2.1, help="10^6 bytes of a study in the store")
    speeds.add_argument("--puts-a-study", type=float, default=2, help="a remote source's object and what is said of it")
    return parser


def costs(options: argparse.Namespace) -> list[Cost]:
    """Each with its arithmetic."""
    studies = options.studies_a_day * DAYS_A_MONTH
    number = instances(options)
    seconds = studies / options.prepared_a_second
    kept = studies * options.months_kept * options.study_mb / 1000
    return [
        Cost(
            "serving",
            f"{number} x {HOURS_A_MONTH} h x {options.serving_hour}",
            number * HOURS_A_MONTH * options.serving_hour,
        ),
        Cost(
            "ingesting, preprocessing",
            f"{seconds:.0f} s / 3600 x {options.batch_hour}",
            seconds / 3600 * options.batch_hour,
        ),
        Cost(
            "retraining",
            f"{options.retrainings_a_month:g} x {options.training_minutes} min / 60 x {options.training_hour}",
            options.retrainings_a_month * options.training_minutes / 60 * options.training_hour,
        ),
        Cost("storage", f"{kept:.0f} GB x {options.storage_gb_month}", kept * options.storage_gb_month),
        Cost(
            "writes",
            f"{studies * options.puts_a_study:.0f} / 1000 x {options.put_thousand}",
            studies * options.puts_a_study / 1000 * options.put_thousand,
        ),
    ]


def instances(options: argparse.Namespace) -> int:
    """Of the endpoint: so many that in the busy hours none is asked for more than its share."""
    a_second = options.studies_a_day / (options.busy_hours * 3600)
    return max(options.least_instances, math.ceil(a_second / (options.served_a_second * options.load_share)))


if __name__ == "__main__":
    main()
