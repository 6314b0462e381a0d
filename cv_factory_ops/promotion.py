"""From a verified endpoint to the alias ``champion``, and back: the stages ``approve`` and ``promote``, and what a person may
do by hand.

``cvf promote`` and ``cvf rollback`` by hand run stages of the version's own run again (deploy, verify, evidence, promote), with
an :class:`Order` that names the person and the reason. So endpoint and alias move together or not at all: the alias only
follows an endpoint that answers with the version's bundle.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cv_factory_ops import audit, registry, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import ConfigError, DataError, GateRefused
from cv_factory_ops.records import (
    ApproveRecord,
    EvidenceRecord,
    GateRecord,
    IngestRecord,
    PromoteRecord,
    RegisterRecord,
    VerifyRecord,
)
from cv_factory_ops.stage import Order, read_result, record_digest, run_stage

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

ROLLOUT = ("deploy", "verify", "evidence", "promote")
"""The stages that move endpoint and alias of a registered version."""


def approve(stage: Stage) -> ApproveRecord:
    """Stage ``approve``: keep a person's answer with what it was given to. A rejection ends it with exit code 4.

    Raises:
        ConfigError: no answer is given, or not by one of ``approval.assignees``.
    """
    order, registered, assignees = stage.order, stage.read(RegisterRecord), stage.config.approval.assignees
    if order is None:
        raise ConfigError("--by: nobody given; allowed: the name of the person who answers")
    if assignees and order.who not in assignees:
        raise ConfigError(f"--by: {order.who} given; allowed by approval.assignees: {', '.join(assignees)}")
    approved = order.action == "approval"
    return ApproveRecord(
        summary=f"version {registered.model_version} was {'approved' if approved else 'rejected'} by {order.who}",
        approved=approved,
        who=order.who,
        login=person(),
        time=order.time or datetime.now(UTC),
        note=order.why,
        bundle_digest=registered.bundle_digest,
        gate_digest=record_digest(stage.run, "gate"),
    )


def require_may_roll_out(stage: Stage) -> None:
    """What stage ``deploy`` asks before it touches the endpoint.

    Raises:
        DataError: the history is broken, or names another bundle for this version, or the test set is not the locked one.
        GateRefused: the version is neither challenger nor champion, or was compared with another champion, so that endpoint and
            alias would part; or a person must approve it and has not.
    """
    registered, history = stage.read(RegisterRecord), audit.verify(stage.config)
    aliases, version = history[-1].change.aliases if history else {}, registered.model_version
    changes = [entry.change for entry in history if entry.change.version == version]
    if changes and changes[0].bundle_digest != registered.bundle_digest:
        found, known = registered.bundle_digest[:12], changes[0].bundle_digest[:12]
        raise DataError(f"version {version}: its run now has bundle {found}, by the history it is {known}; train in a new run")
    _require_locked_test_set(stage)
    if stage.order:
        return
    if aliases.get("champion") == version:
        return
    if aliases and aliases.get("challenger") != version:
        known = ", ".join(f"{alias} is version {number}" for alias, number in aliases.items())
        raise GateRefused(
            f"version {version} is neither challenger nor champion ({known}): endpoint and alias would part; "
            f"`cvf promote --to {version}` moves both"
        )
    if aliases:
        _require_passed(stage, registered)
        registry.require_same_rival(stage, aliases, version)
    if stage.config.approval.enabled or any(change.approval_required for change in changes):
        _require_approval(stage, registered)


def approval_of(stage: Stage, registered: RegisterRecord) -> ApproveRecord | None:
    """The approval of exactly this bundle and this verdict; None where there is none."""
    if not storage.exists(f"{stage.run}/approve/result.json"):
        return None
    found = stage.read(ApproveRecord)
    same = (found.bundle_digest, found.gate_digest) == (registered.bundle_digest, record_digest(stage.run, "gate"))
    return found if same and found.approved else None


def promote(stage: Stage, require_served: Callable[[], None]) -> PromoteRecord:
    """Stage ``promote``: only after the live endpoint was verified does ``champion`` move, and ``previous`` to the one before.

    ``require_served`` asks the endpoint, right before the move, whether it still serves what was verified, or raises.
    The first promotion locks the test set: later trainings are judged on exactly these images.

    Raises:
        DataError: the endpoint serves another bundle.
        GateRefused: the gate has refused the version, or another one was promoted meanwhile.
    """
    registered, verified = stage.read(RegisterRecord), stage.read(VerifyRecord)
    if verified.bundle_digest != registered.bundle_digest:
        raise DataError(
            f"endpoint {verified.endpoint_name} serves bundle {verified.bundle_digest[:12]}, "
            f"registered is {registered.bundle_digest[:12]}; the alias stays where it is"
        )
    _require_passed(stage, registered)
    _require_locked_test_set(stage)
    entry = registry.move(stage.config, lambda aliases: _promotion(stage, registered, aliases, require_served))
    _lock_test_set(stage)
    _tag(stage, registered, entry)
    previous = entry.change.aliases.get("previous") if entry else None
    return PromoteRecord(
        summary=f"champion is version {registered.model_version}" + (f" (was {previous})" if previous else ""),
        model_name=registered.model_name,
        model_version=registered.model_version,
        previous_version=previous,
        bundle_digest=registered.bundle_digest,
        entry=entry.number if entry else None,
        entry_digest=entry.digest if entry else "",
    )


def promote_by_hand(config: ProjectConfig, run: str, why: str, override: str = "") -> PromoteRecord:
    """Register a run's bundle where it is not yet, roll it out, promote it, also where another champion has come meanwhile.

    Raises:
        GateRefused: the gate has refused it, and no override is given.
    """
    gate = GateRecord.model_validate(read_result(run, "gate").record)
    if gate.refusal and not override:
        raise GateRefused(f'the gate has refused it: {gate.refusal}; a person may decide otherwise by --override "reason"')
    order = Order("promotion", person(), why, override if gate.refusal else "")
    names = (() if storage.exists(f"{run}/register/result.json") else ("register",)) + ROLLOUT
    return _run_stages(names, config, run, order)


def rollback(config: ProjectConfig, to: int | None, why: str) -> PromoteRecord:
    """Roll out the previous champion, or any version that has once been champion, and make it champion again.

    Where the newest move was a rollback, one that names no version is that one again: it may have been killed, or somebody else
    may have been quicker, and ``previous`` is now the version that they went away from.

    Raises:
        DataError: there is none, or that version has never been champion.
    """
    entries = audit.verify(config)
    known = (aliases for entry in entries for aliases in (entry.before, entry.change.aliases))
    champions = {aliases["champion"] for aliases in known if "champion" in aliases}
    moves = [entry.change for entry in entries if entry.change.action != "registration"]
    if to is None and moves:
        to = moves[-1].version if moves[-1].action == "rollback" else moves[-1].aliases.get("previous")
    if to is None or to not in champions:
        given, allowed = "no version" if to is None else to, ", ".join(map(str, sorted(champions))) or "none yet"
        raise DataError(f"--to: {given} given; allowed is a version that has been champion: {allowed}")
    return _run_stages(ROLLOUT, config, registry.run_of(config, to), Order("rollback", person(), why))


def person() -> str:
    """Login and machine of whoever runs the command."""
    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        login = "unknown"
    return f"{login}@{socket.gethostname()}"


def locked_test(config: ProjectConfig) -> str:
    """URI of the list of pixel digests that the test set is locked to."""
    return f"{config.root}/locked_test.json"


def _run_stages(names: Sequence[str], config: ProjectConfig, run: str, order: Order) -> PromoteRecord:
    for name in names:
        result = run_stage(name, config, run, order=order)
    return PromoteRecord.model_validate(result.record)


def _require_approval(stage: Stage, registered: RegisterRecord) -> None:
    if approval_of(stage, registered) is None:
        raise GateRefused(
            f"version {registered.model_version} has not been approved, and approval.enabled asks for it; "
            "a person approves it in Airflow, or by `cvf approve`"
        )


def _require_passed(stage: Stage, registered: RegisterRecord) -> None:
    """The gate let it pass, or a person has, when it was registered or now."""
    gate = stage.read(GateRecord)
    if not gate.refusal or (stage.order and (stage.order.override or stage.order.action == "rollback")):
        return
    changes = (entry.change for entry in audit.entries(stage.config))
    if not any(change.override for change in changes if change.version == registered.model_version):
        raise GateRefused(f"the gate has refused it: {gate.refusal}")


def _promotion(
    stage: Stage, registered: RegisterRecord, aliases: audit.Aliases, require_served: Callable[[], None]
) -> audit.Change | None:
    """The entry of this promotion; None where it has been written before."""
    version, current = registered.model_version, aliases.get("champion")
    if current == version:
        return None
    # Two rollouts can pass each other between the first question of `deploy` and these; the later one is told here.
    registry.require_same_rival(stage, aliases, version)
    require_served()
    evidence, order = stage.read(EvidenceRecord), stage.order
    moved: audit.Aliases = {**aliases, "champion": version}
    if current is not None:
        moved["previous"] = current
    if moved.get("challenger") == version:
        del moved["challenger"]
    return audit.Change(
        action="rollback" if order and order.action == "rollback" else "promotion",
        who=registry.acting(stage),
        why=order.why if order else f"verified; the gate: {stage.read(GateRecord).summary}",
        run=stage.run,
        version=version,
        bundle_digest=registered.bundle_digest,
        gate_digest=record_digest(stage.run, "gate"),
        evidence=evidence.archive,
        evidence_digest=evidence.archive_digest,
        override=order.override if order else "",
        approval=approval_of(stage, registered),
        approval_required=stage.config.approval.enabled,
        aliases=moved,
    )


def _tag(stage: Stage, registered: RegisterRecord, entry: audit.Entry | None) -> None:
    evidence = stage.read(EvidenceRecord)
    tags = {"evidence": evidence.archive, "evidence_digest": evidence.archive_digest, "audit": entry.digest if entry else ""}
    client = registry.connect(stage.config)
    with registry.explained(f"model {registered.model_name}"):
        for key, value in tags.items():
            client.set_model_version_tag(registered.model_name, str(registered.model_version), key, value)


def _lock_test_set(stage: Stage) -> None:
    """The test set of the first champion: not before it is one, another one may be first."""
    from cv_factory_ops.ingestion.manifest import read_manifest

    if storage.exists(locked_test(stage.config)):
        return
    manifest = read_manifest(stage.local(f"{stage.run}/ingest"))
    digests = sorted(manifest.loc[manifest["split"] == "test", "digest"])
    storage.create_bytes(locked_test(stage.config), json.dumps({"run": stage.run, "digests": digests}).encode())


def _require_locked_test_set(stage: Stage) -> None:
    """A champion with another one could not be compared with any later training. A rollback, which is urgent, goes on."""
    from cv_factory_ops.ingestion.splits import test_digest

    uri = locked_test(stage.config)
    if (stage.order and stage.order.action == "rollback") or not storage.exists(uri):
        return
    locked, own = test_digest(json.loads(storage.read_bytes(uri))["digests"]), stage.read(IngestRecord).test_digest
    if locked != own:
        raise DataError(
            f"the test set of this run (digest {own[:12]}) is not the locked one ({locked[:12]}, {uri}); train in a new run"
        )
