"""Who may import whom: the table in docs/architecture.md, as import-linter and the interpreter see it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_import_rules_hold() -> None:
    checked = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_wheel_holds_every_package() -> None:
    """The checkout is installed in place, so nothing else here would notice a package that an image lacks."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    roots = (ROOT / "cv_factory_ops", ROOT / "domain_medical", ROOT / "plugins" / "cv_factory_airflow")
    found = [file.parent.relative_to(root.parent) for root in roots for file in root.rglob("__init__.py")]
    assert sorted(said) == sorted(".".join(package.parts) for package in found)


def test_all_but_three_modules_are_closed_to_a_domain() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (closed,) = (
        contract["forbidden_modules"] for contract in contracts if contract.get("source_modules") == ["domain_medical"]
    )
    inside = [path for path in (ROOT / "cv_factory_ops").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    opened = {path.stem for path in inside} - {name.removeprefix("cv_factory_ops.") for name in closed}
    assert opened == {"__init__", "answers", "domain", "errors"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("cv_factory_ops.config", {"numpy", "boto3", "torch", "airflow"}),
        ("cv_factory_ops.stage", {"numpy", "boto3", "torch", "mlflow", "airflow", "domain_medical"}),
        ("cv_factory_ops.registry", {"mlflow", "torch", "airflow"}),
        ("cv_factory_ops.evaluation.gate", {"mlflow", "torch", "scipy", "airflow"}),
        ("cv_factory_ops.gateway.app", {"pandas", "mlflow", "torch", "airflow"}),
        ("domain_medical", {"pydicom", "torch", "mlflow", "airflow"}),
    ],
)
def test_importing_a_module_is_light(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(sorted(set({sorted(forbidden)!r}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
