"""The tree that a YAML file holds: setting a value by its dotted name, explaining what is wrong with one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted name.

    Raises:
        ValueError: the name leads through a value.
    """
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{parent} is a value, not a section")
    node[last] = value


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each wrong field: its path, what was given, what is allowed."""
    return [_explain_one(item, model) for item in error.errors(include_url=False)]


def _explain_one(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    path, context = ".".join(location), item.get("ctx", {})
    match item["type"]:
        case "missing":
            return f"{path}: is missing; {_description(model, location)}"
        case "extra_forbidden":
            known = _fields(model, location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            return f"{path}: unknown field{hint}; allowed: {', '.join(known)}"
        case "union_tag_invalid":
            return f"{path}.kind: {context['tag']!r} given; allowed: {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{path}.kind: is missing; it chooses the implementation"
        case "search":
            return str(item["msg"])
        case "literal_error":
            return f"{path}: {item['input']!r} given; allowed: {context['expected']}"
        case _:
            secret = {"env", "secret_env"} & set(location)  # who mistakes one for the other must not read a password here
            given = "a mapping" if isinstance(item["input"], dict) else "a value" if secret else repr(item["input"])[:60]
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            return f"{path or 'project'}: {given} given; allowed: {message}"


def _submodels(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _submodels(argument)]


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """The model that a location leads to; a union's location holds the chosen ``kind`` as a step of its own."""
    choices = [model]
    for step in location:
        tagged = [choice for choice in choices if "kind" in choice.model_fields and choice.model_fields["kind"].default == step]
        if tagged:
            choices = tagged
            continue
        choices = [
            sub for choice in choices if step in choice.model_fields for sub in _submodels(choice.model_fields[step].annotation)
        ]
    return choices[0] if choices else None


def _fields(model: type[BaseModel], location: list[str]) -> list[str]:
    at = _model_at(model, location)
    return list(at.model_fields) if at else []


def _description(model: type[BaseModel], location: list[str]) -> str:
    at = _model_at(model, location[:-1])
    field = at.model_fields.get(location[-1]) if at else None
    return " ".join((field.description or "a value is needed").split()) if field else "a value is needed"
