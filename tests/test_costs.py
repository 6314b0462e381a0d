"""The arithmetic of costs, by numbers that can be checked by hand."""

import pytest

from benchmarks import costs

PRICES = {"serving-hour": 0.1, "training-hour": 6, "batch-hour": 3.6, "storage-gb-month": 0.02, "put-thousand": 0.005}


def options(**given: float) -> list[str]:
    named = PRICES | {name.replace("_", "-"): value for name, value in given.items()}
    return [f"--{name}={value}" for name, value in named.items()]


def test_each_cost_is_what_it_says() -> None:
    given = options(studies_a_day=2400, training_minutes=10, months_kept=1, study_mb=1, prepared_a_second=73, puts_a_study=2)
    found = {cost.name: cost.a_month for cost in costs.costs(costs.arguments().parse_args(given))}
    assert found == {  # 2400 x 365 / 12 = 73,000 studies a month
        "serving": pytest.approx(73.0),  # 730 h x 0.1
        "ingesting, preprocessing": pytest.approx(1.0),  # 1000 s / 3600 x 3.6
        "retraining": pytest.approx(1.0),  # 10 min / 60 x 6
        "storage": pytest.approx(1.46),  # 73 GB x 0.02
        "writes": pytest.approx(0.73),  # 146,000 / 1000 x 0.005
    }


@pytest.mark.parametrize(("a_day", "least", "expected"), [(100, 1, 1), (100, 2, 2), (288_000, 1, 1), (288_001, 1, 2)])
def test_so_many_instances_that_none_is_asked_for_more_than_its_share(a_day: int, least: int, expected: int) -> None:
    given = options(studies_a_day=a_day, least_instances=least, served_a_second=20, load_share=0.5, busy_hours=8)
    assert costs.instances(costs.arguments().parse_args(given)) == expected


def test_no_price_is_invented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        costs.main(["--studies-a-day=1"])
    told = capsys.readouterr().err
    assert all(name in told for name in PRICES)


def test_the_table_ends_with_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    costs.main(options(studies_a_day=2400))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    *parts, total = [float(row[2]) for row in rows]
    assert total == pytest.approx(sum(parts), abs=0.05)
    assert float(rows[-1][3]) == pytest.approx(total / 73, abs=0.001)
