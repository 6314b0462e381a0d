"""No package with an unknown licence or an unexplained strong copyleft slips into the lock."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "licences.py")
assert spec is not None
assert spec.loader is not None
licences = importlib.util.module_from_spec(spec)
spec.loader.exec_module(licences)


def test_every_pinned_package_has_a_licence_that_is_known_and_explained_where_it_must_be() -> None:
    found = licences.rows()
    assert len(found) > 200
    assert licences.unexplained(found) == []


def test_the_page_lists_what_is_pinned() -> None:
    rows = [line.split(" | ")[:2] for line in (ROOT / "docs" / "licences.md").read_text().splitlines() if line.startswith("| ")]
    listed = {name.removeprefix("| "): version for name, version in rows if name != "| package"}
    assert listed == licences.pins(), "run `make licences`"


@pytest.mark.parametrize("told", ["GPL-3.0-only", "AGPL-3.0", "GNU General Public License v3 (GPLv3)", "SSPL", ""])
def test_unknown_and_strong_copyleft_are_found(told: str) -> None:
    assert len(licences.unexplained([licences.Row("new", "1", told, ["base"])])) == 1


@pytest.mark.parametrize("told", ["MIT", "LGPL-2.1", "GNU Library or Lesser General Public License (LGPL)", "MPL-2.0"])
def test_others_pass(told: str) -> None:
    assert licences.unexplained([licences.Row("new", "1", told, ["base"])]) == []


def test_roles_follow_the_extras() -> None:
    roles = licences.roles()
    assert roles["pydicom"] == ["base"]
    assert roles["apache-airflow"] == ["airflow"]
    assert "moto" not in roles, "it is for development only"
