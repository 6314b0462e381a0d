"""The documentation says what the code does."""

import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.runtime import KubernetesRuntime
from cv_factory_ops.config.sources import Source
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert spec is not None
assert spec.loader is not None
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", sorted(generate.PAGES))
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run `make docs`"


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    places = [(page.parent / link if link else page, heading) for link, heading in links]
    assert [place for place, heading in places if not place.exists() or (heading and heading not in headings(place))] == []
    assert page.stat().st_size > 0


def headings(page: Path) -> set[str]:
    """Of a page, as links name them: small letters, hyphens for spaces, nothing else but letters, digits and ``_``."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_yaml_of_a_page_is_part_of_a_valid_project(page: Path) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        section = yaml.safe_load(text)
        if "apiVersion" not in section:  # that is an object of Kubernetes
            data = TINY["data"] | section.get("data", {})
            ProjectConfig.model_validate(TINY | section | {"data": data})


def test_the_readme_names_only_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+[a-z-]*)", (ROOT / "README.md").read_text()))
    assert named - targets == set()


def test_every_setting_has_its_meaning() -> None:
    rows = [line for line in (ROOT / "docs" / "configuration.md").read_text().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.rstrip().endswith("| |")] == []


def test_the_project_in_kubernetes_is_a_valid_one() -> None:
    pages = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL)
    config = ProjectConfig.model_validate(TINY | yaml.safe_load(pages[0]))
    assert isinstance(config.runtime, KubernetesRuntime)
    assert config.runtime.pod_of("train").gpus == config.training.processes_per_node


def test_every_source_has_a_row_and_a_valid_project() -> None:
    page = (ROOT / "docs" / "sources.md").read_text()
    shown = [
        ProjectConfig.model_validate(TINY | yaml.safe_load(text)) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    ]
    kinds = {model.model_fields["kind"].default for model in get_args(get_args(Source)[0])}
    assert {config.data.source.kind for config in shown} == kinds - {"phantoms"}
    assert set(re.findall(r"^\| `(\w+)` \|", page.partition("## Labels")[0], re.MULTILINE)) == kinds
