import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cv_factory_ops import config
from cv_factory_ops.errors import ConfigError

Project = Callable[..., Path]
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_that_ship_are_valid(path: Path) -> None:
    assert config.load(path).project == path.stem


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"model": {"kind": "vgg"}}, "model.kind: 'vgg' given; allowed: 'small_cnn', 'resnet'"),
        ({"model": {"width": 8}}, "model.kind: is missing"),
        ({"training": {"epoch": 3}}, "training.epoch: unknown field (did you mean epochs?)"),
        ({"training": {"epochs": 0}}, "training.epochs: 0 given; allowed: greater than or equal to 1"),
        ({"training": {"epochs": "many"}}, "training.epochs: 'many' given; allowed: a valid integer"),
        ({"labels": ["one"]}, "labels: ['one'] given; allowed: List should have at least 2 items"),
        ({"labels": ["one", "one"]}, "labels must differ"),
        ({"project": "No Good"}, "project: 'No Good' given"),
        ({"gate": {"metric": "f1"}}, "gate.metric: 'f1' given; allowed: 'auc', 'accuracy', 'dice' or 'map'"),
        (
            {"data": {}},
            "data.source: is missing; One of ``phantoms``, ``files``, ``npz``, ``dicomweb``, ``dimse``, ``received``",
        ),
    ],
)
def test_a_wrong_field_is_one_line_with_its_path_and_what_is_allowed(
    project: Project, sections: dict[str, object], expected: str
) -> None:
    path = project(**sections)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    lines = str(caught.value).splitlines()
    assert any(expected in line for line in lines)
    assert all(line.startswith(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [", "is not valid YAML"), ("- 1", "holds list"), ("!!python/object/apply:os.getcwd []", "is not valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        config.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "nowhere.yaml")


def test_overrides_reach_into_sections(project: Project) -> None:
    loaded = config.load(project(), ["training.epochs=7", "model={kind: resnet, depth: 34}", "data.include_captures=true"])
    assert loaded.training.epochs == 7
    assert loaded.model == config.ResNet(depth=34)
    assert loaded.data.include_captures


@pytest.mark.parametrize("override", ["training.epochs", "project.name=x", "training.epochs=["])
def test_a_broken_override_is_refused(project: Project, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        config.load(project(), [override])


def test_storage_root_follows_the_environment(project: Project, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    loaded = config.load(project())
    assert loaded.root == f"file://{home}/var/storage/tiny"
    monkeypatch.setenv("CVF_STORAGE", "s3://bucket/prefix/")
    assert loaded.root == "s3://bucket/prefix/tiny"


def test_check_and_schema_on_the_command_line(project: Project) -> None:
    good = subprocess.run(
        [sys.executable, "-m", "cv_factory_ops.cli", "config", "check", project()], capture_output=True, text=True
    )
    assert good.returncode == 0
    assert "fine, project tiny" in good.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "cv_factory_ops.cli", "config", "check", project(drift={"alpha": 2})],
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2
    assert "drift.alpha: 2 given; allowed: less than 1" in bad.stderr
    assert "Traceback" not in bad.stderr
    schema = subprocess.run([sys.executable, "-m", "cv_factory_ops.cli", "config", "schema"], capture_output=True, text=True)
    assert "project" in json.loads(schema.stdout)["required"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training": {"objective": {"kind": "fine_tuning", "probe": True}}}, "model.weights where training.objective freezes"),
        ({"training": {"objective": {"kind": "fixmatch"}}}, "data.unlabelled: keep where training.objective is fixmatch"),
        (
            {"training": {"objective": {"kind": "contrastive"}, "augment": {"mixup": 0.2}}},
            "training.augment without mixup and cutmix where training.objective is contrastive",
        ),
    ],
)
def test_objectives_that_would_learn_nothing_are_refused(
    project: Callable[..., Path], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.load(project(**settings))
