"""The cards of model and data: Markdown, and one self-contained HTML page of each that is made from it.

What they say stands in ``model_card.md.jinja`` and ``data_card.md.jinja``. Neither holds an identifier, not even a pseudonym:
all of it is counts, settings, digests and plots; pictures of patients stay in the MLflow run.
"""

from __future__ import annotations

import base64
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.evaluation.pictures import in_order
from cv_factory_ops.evaluation.subgroups import is_worse
from cv_factory_ops.evaluation.tasks import open_task
from cv_factory_ops.metrics import BINS
from cv_factory_ops.preprocessing.shards import read_index, read_rows
from cv_factory_ops.records import EvaluateRecord, Frozen, IngestRecord, PreprocessRecord, Subgroup, TrainRecord

if TYPE_CHECKING:
    from jinja2 import Environment

    from cv_factory_ops.domain import Domain
    from cv_factory_ops.stage import Stage

GALLERIES = ("data.png", "errors.png", "explanations.png")
"""Pictures that show images of patients."""
NAMES = ("model_card", "data_card")
TITLES = {
    "auc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "calibration error",
    "brier": "Brier score",
    "abstained": "share abstained",
    "accuracy_answered": "accuracy of the answered",
    "dice": "Dice",
    "hd95": "Hausdorff 95 (mm)",
    "map": "mAP",
    "map50": "mAP at IoU 0.5",
}
LIBRARIES = ("torch", "monai", "numpy", "scikit-learn", "mlflow")
MOST_VALUES = 12
"""Values of a metadata category that are listed; the others are summed up."""


def write(stage: Stage, record: EvaluateRecord, bundle: Bundle, pictures: Sequence[str]) -> None:
    """Write ``<name>.md`` and ``<name>.html`` of each card beside the pictures."""
    pages, facts = templates(), _facts(stage, record, bundle.manifest)
    for name in NAMES:
        markdown = pages.get_template(f"{name}.md.jinja").render(facts, pictures=pictures, galleries=GALLERIES)
        (stage.out / f"{name}.md").write_text(markdown, encoding="utf-8")
        title = f"{name.replace('_', ' ').capitalize()}: {stage.config.project}"
        page = pages.get_template("card.html.jinja").render(title=title, body=html(markdown, stage.out, pictures))
        (stage.out / f"{name}.html").write_text(page, encoding="utf-8")


def html(markdown: str, folder: Path, pictures: Iterable[str]) -> Any:
    """HTML with the pictures of the folder in it, as Jinja's ``Markup``. HTML in the Markdown stays text."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = renderer.parse(markdown)
    for image in (child for token in tokens for child in token.children or [] if child.type == "image"):
        if (name := str(image.attrGet("src"))) in pictures:
            image.attrSet("src", f"data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}")
    return Markup(renderer.renderer.render(tokens, renderer.options, {}))  # noqa: S704 - it escapes what it is given


def templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "code": _code, "settings": _settings, "picture": _picture}
    return environment


def _facts(stage: Stage, record: EvaluateRecord, manifest: BundleManifest) -> dict[str, Any]:
    """What the templates speak of."""
    shards, config, ingest = stage.local(f"{stage.run}/preprocess"), stage.config, stage.read(IngestRecord)
    rows = pd.concat([read_rows(shards, split) for split in in_order(read_index(shards).splits)], ignore_index=True)
    preprocess, train = stage.read(PreprocessRecord), stage.read(TrainRecord)
    chosen, told = config.evaluation.subgroups, open_task(manifest.task).of_subgroups
    return {
        "config": config,
        "manifest": manifest,
        "record": record,
        "ingest": ingest,
        "preprocess": preprocess,
        "train": train,
        "rows": rows,
        "bins": BINS,
        "masks": manifest.task == "segmentation",
        "boxes": manifest.task == "detection",
        "today": f"{datetime.now(UTC):%Y-%m-%d}",
        "colour": "grey" if manifest.channels == 1 else "colour",
        "came": f"Source: {_code(config.data.source.kind)}, {ingest.accepted - ingest.captured} images; {_captured(ingest)}.",
        "counts": _counts(rows, manifest.labels),
        "metrics": _metrics(record, f"{config.evaluation.confidence:.0%} interval"),
        "subgroups": _subgroups(record, told),
        "worse": list(_worse_groups(record, told)),
        "small": [f"{name} ({group.patients})" for name, group in _groups(record) if not group.metrics],
        "unmeasured": [
            _title(name) for name in (stage.domain.subgroups if chosen is None else chosen) if name not in record.subgroups
        ],
        "without_width": [metric_title(name) for name, (low, high) in record.intervals["test"].items() if low == high],
        "without_patient": int((rows["patient"] == "").sum()),
        "metadata": _metadata(rows, stage.domain),
        "digests": _digests(ingest, preprocess, train, manifest),
    }


def _captured(ingest: IngestRecord) -> str:
    """Images that came by the endpoint, by what is known of them."""
    told, labelled, pseudo = f"{ingest.captured} images are captured requests", ingest.late_labels, ingest.pseudo_labels
    if labelled is None or pseudo is None:
        return told
    kinds = {"have late labels": labelled, "no label": ingest.captured - labelled - pseudo}
    kinds["train with the champion's answer in place of a label"] = pseudo
    counted = ", ".join(f"{count} {what}" for what, count in kinds.items() if count)
    return f"{told} ({counted})" if counted else told


def _counts(rows: pd.DataFrame, labels: Sequence[str]) -> str:
    """Images of each split by label, with the patients."""
    names = dict(enumerate(labels)) | ({-1: "no label"} if (rows["label"] < 0).any() else {})
    table = []
    for split, own in rows.groupby("split", sort=False):
        patients = own.loc[own["patient"] != "", "patient"].nunique()
        by_label = [str((own["label"] == label).sum()) for label in names]
        table.append([_code(str(split)), str(len(own)), str(patients or "not known"), *by_label])
    return _table(["split", "images", "patients", *map(_plain, names.values())], table)


def _metrics(record: EvaluateRecord, interval: str) -> str:
    """Metrics of the challenger with their intervals, and beside them the champion's and those of new studies."""
    columns = [
        ("locked test set", record.metrics, record.intervals["test"]),
        ("champion on it", record.champion_metrics, None),
        ("new studies", record.recent_metrics, record.intervals.get("recent", {})),
        ("champion on them", record.champion_recent_metrics, None),
    ]
    shown = [column for column in columns if column[1]]
    header = [title if intervals is None else f"{title} ({interval})" for title, _, intervals in shown]
    table = [[_plain(metric_title(name)), *(_number(name, *column[1:]) for column in shown)] for name in record.metrics]
    return _table(["", *header], table)


def metric_title(metric: str) -> str:
    """Of a metric, also of one of a class: ``dice_<label>``."""
    measure, _, label = metric.partition("_")
    return TITLES[metric] if metric in TITLES else f"{TITLES[measure]} of {label}"


def _subgroups(record: EvaluateRecord, metrics: Sequence[str]) -> str:
    """Every group with its counts, and the metrics of those that have some; empty where there is none."""
    table = [
        [
            name,
            str(group.images),
            str(group.patients),
            *(_number(metric, group.metrics, group.intervals) for metric in metrics),
        ]
        for name, group in _groups(record)
    ]
    return _table(["group", "images", "patients", *map(metric_title, metrics)], table) if table else ""


def _worse_groups(record: EvaluateRecord, metrics: Sequence[str]) -> Iterator[str]:
    """Groups whose interval lies on the wrong side of the value of the whole test set."""
    for name, group in _groups(record):
        for metric in metrics:
            if is_worse(group, record.metrics, metric):
                yield f"{metric_title(metric)} of {name}"


def _groups(record: EvaluateRecord) -> Iterator[tuple[str, Subgroup]]:
    for name, groups in record.subgroups.items():
        for value, group in groups.items():
            yield f"{_title(name)} {_plain(value)}", group


def _metadata(rows: pd.DataFrame, domain: Domain) -> str:
    """How often each value of the domain's metadata occurs, and of numbers their range; empty where there is none."""
    table = []
    for name, kind in domain.metadata.items():
        values = rows.get(f"meta_{name}", pd.Series(dtype=object)).dropna()
        if len(values):
            told = _range(values) if kind == "number" else _frequencies(values)
            table.append([_title(name), told, str(len(rows) - len(values))])
    return _table(["", "", "images that do not tell it"], table) if table else ""


def _range(values: pd.Series) -> str:
    low, middle, high = values.quantile([0.05, 0.5, 0.95])
    return f"median {middle:.4g}, nine tenths within {low:.4g} to {high:.4g}"


def _frequencies(values: pd.Series) -> str:
    counts = values.value_counts()
    told = [f"{_plain(str(value))} {count}" for value, count in counts.head(MOST_VALUES).items()]
    return ", ".join(told + ([f"others {counts.iloc[MOST_VALUES:].sum()}"] if len(counts) > MOST_VALUES else []))


def _digests(ingest: IngestRecord, preprocess: PreprocessRecord, train: TrainRecord, manifest: BundleManifest) -> str:
    used = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    table = [
        ["bundle", _code(train.bundle_digest)],
        ["data", _code(ingest.data_digest)],
        ["test set", _code(ingest.test_digest)],
        ["shards", _code(preprocess.shards_digest)],
        ["MLflow run", _code(train.mlflow_run_id)],
        ["code", f"cv-factory {manifest.code_version}, commit {_code(manifest.git_sha)}"],
        ["libraries", f"Python {platform.python_version()}, {used}"],
    ]
    return f"## Digests and versions\n\n{_table(['', ''], table)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _number(name: str, metrics: dict[str, float], intervals: dict[str, tuple[float, float]] | None) -> str:
    """The metric, and its interval where there are some; empty where it is undefined."""
    if name not in metrics:
        return ""
    between = f" ({intervals[name][0]:.3f} to {intervals[name][1]:.3f})" if intervals else ""
    return f"{metrics[name]:.3f}{between}"


def _settings(config: Frozen) -> str:
    """The choice and its settings, in one line."""
    kind, told = str(getattr(config, "kind", "")), []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name != "kind" and value not in (None, [], {}):
            told.append(f"{_title(name)} {_value(value)}")
    if not kind:
        return ", ".join(told)
    return f"{_code(kind)} ({', '.join(told)})" if told else _code(kind)


def _value(value: object) -> str:
    if isinstance(value, Frozen):
        return _settings(value)
    if isinstance(value, list):
        return "; ".join(map(_value, value))
    return _plain(f"{value:.3g}" if isinstance(value, float) else str(value))


def _picture(name: str) -> str:
    return f"![{_title(name.removesuffix('.png'))}]({name})"


def _title(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: str) -> str:
    """As plain text in one line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#!~&])", r"\\\1", " ".join(value.split()))


def _code(value: str) -> str:
    return f"`{' '.join(value.replace('`', ' ').split())}`"
