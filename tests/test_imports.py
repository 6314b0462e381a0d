"""Who may import whom: the table in docs/architecture.md, as import-linter and the interpreter see it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_import_rules_hold() -> None:
    checked = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("cv_factory_ops.config", {"numpy", "boto3", "torch", "airflow"}),
        ("cv_factory_ops.stage", {"numpy", "boto3", "torch", "mlflow", "airflow", "domain_medical"}),
        ("cv_factory_ops.registry", {"mlflow", "torch", "airflow"}),
        ("domain_medical", {"pydicom", "torch", "mlflow", "airflow"}),
    ],
)
def test_importing_a_module_is_light(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(sorted(set({sorted(forbidden)!r}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
