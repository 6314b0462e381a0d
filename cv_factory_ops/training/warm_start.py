"""Begin a training with the champion's weights. Which champion that is, is asked once: a resumed training, and every node of
one, goes on with what it began with, whoever is champion by then."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cv_factory_ops import registry, storage
from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import WarmStart

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")


def pinned(stage: Stage, uri: str) -> WarmStart | None:
    """What is kept at a URI; at the first start the present champion, which is kept there. None without a warm start.

    Raises:
        DataError: the champion's bundle is not there, or is not the one that was registered.
    """
    if stage.config.training.warm_start == "none":
        return None
    if not storage.exists(uri):
        storage.create_bytes(uri, _from_champion(stage).model_dump_json().encode())  # another node may be first
    found = WarmStart.model_validate_json(storage.read_bytes(uri))
    log.info("%s", found.told)
    return found


def _from_champion(stage: Stage) -> WarmStart:
    champion = registry.champion(stage.config)
    if champion is None:
        return WarmStart(misfit="there is none yet")
    bundle = Bundle.load(stage.local(champion.bundle))
    if bundle.digest != champion.bundle_digest:
        raise DataError(
            f"{champion.bundle}: has digest {bundle.digest[:12]}, version {champion.version} was registered with "
            f"{champion.bundle_digest[:12]}; training.warm_start: none begins without it"
        )
    return WarmStart(
        version=champion.version,
        bundle_digest=champion.bundle_digest,
        weights=f"{champion.bundle}/model.safetensors",
        misfit=misfit(stage.config, bundle.manifest),
    )


def misfit(config: ProjectConfig, champion: BundleManifest) -> str:
    """Why a bundle's network is another than the project's; empty where it is the same."""
    ours, theirs = (model.model_dump(exclude={"weights"}) for model in (config.model, champion.model))
    changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if "kind" in changed:
        return f"its network is {theirs['kind']}, the project's {ours['kind']}"
    if changed:
        return ", ".join(f"its model.{name} is {theirs.get(name)}, the project's {ours.get(name)}" for name in changed)
    if champion.labels != config.labels:
        return f"its labels are {', '.join(champion.labels)}, the project's {', '.join(config.labels)}"
    if champion.channels != config.decoding.channels:
        return f"it takes images of {champion.channels} channels, the project has {config.decoding.channels}"
    return ""
