"""Aliases: names that move from version to version by compare-and-swap, and remember every movement."""

from __future__ import annotations

import getpass
import platform
import random
import time
from collections.abc import Callable
from datetime import datetime, timezone

from cluster.artifacts import ArtifactRef, Kind
from cluster.manifest import Alias, Movement, check_ref
from cluster.storage import ObjectStore
from colbert_core.errors import ArtifactNotFound, ObjectNotFound, PreconditionFailed

Move = Callable[[Alias | None], Movement]
"""Decides where an alias goes from where it is (None: it does not exist yet), or raises."""


def alias_prefix(kind: Kind, name: str) -> str:
    """The storage key that all aliases of a name start with."""
    return f"{kind}/{name}/aliases/"


def alias_key(kind: Kind, name: str, alias: str) -> str:
    """The storage key of an alias."""
    check_ref(ArtifactRef(kind, name, alias))
    return f"{alias_prefix(kind, name)}{alias}.json"


def alias_names(store: ObjectStore, kind: Kind, name: str) -> list[str]:
    """All aliases of a name, in order."""
    prefix = alias_prefix(kind, name)
    return [info.key.removeprefix(prefix).removesuffix(".json") for info in store.list(prefix)]


def read_alias(store: ObjectStore, kind: Kind, name: str, alias: str) -> tuple[Alias, str]:
    """An alias and the etag it was read with.

    Raises:
        ArtifactNotFound: there is no such alias.
        IntegrityError: its record is damaged.
    """
    key = alias_key(kind, name, alias)
    try:
        data, etag = store.get_with_etag(key)
    except ObjectNotFound:
        raise ArtifactNotFound(f"no alias {alias!r} of {kind}/{name} in {store.uri}") from None
    return Alias.from_bytes(data, key), etag


def move_alias(store: ObjectStore, kind: Kind, name: str, alias: str, move: Move) -> Alias:
    """Repeats compare-and-swap until it succeeds; ``move`` decides anew on what it then finds.

    Raises:
        PreconditionFailed: others were faster for as long as a request may take.
    """
    key = alias_key(kind, name, alias)
    deadline = time.monotonic() + store.config.request_timeout_s
    while True:
        current: Alias | None
        etag: str | None
        try:
            current, etag = read_alias(store, kind, name, alias)
        except ArtifactNotFound:
            current, etag = None, None
        movement = move(current)
        history = (*(current.history if current else ()), movement)
        changed = Alias(kind=kind, name=name, alias=alias, version=movement.version, history=history)
        try:
            store.put(key, changed.to_bytes(), if_absent=etag is None, if_match=etag)
        except PreconditionFailed:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.0, 0.05))
        else:
            return changed


def promotion(ref: ArtifactRef, alias: str, expected: str | None, by: str | None) -> Move:
    """Moves an alias to ``ref``, if it points to ``expected`` (where that is given)."""

    def move(current: Alias | None) -> Movement:
        now = current.version if current else None
        if expected is not None and now != expected:
            where = f"alias {ref.kind}/{ref.name}@{alias}"
            raise PreconditionFailed(f"{where} points to {now or 'nothing'}, not to {expected}")
        return _movement("promote", ref.version, now, by)

    return move


def rolling_back(
    kind: Kind, name: str, alias: str, exists: Callable[[ArtifactRef], bool], by: str | None
) -> Move:
    """Moves an alias to the version before its present one."""
    where = f"alias {kind}/{name}@{alias}"

    def move(current: Alias | None) -> Movement:
        if current is None:
            raise ArtifactNotFound(f"{where} does not exist")
        earlier = current.earlier()
        if earlier is None:
            raise ArtifactNotFound(f"{where} has no version before {current.version}")
        if not exists(ArtifactRef(kind, name, earlier)):
            raise ArtifactNotFound(f"{where}: the version before, {earlier}, no longer exists")
        return _movement("rollback", earlier, current.version, by)

    return move


def _movement(action: str, version: str, previous: str | None, by: str | None) -> Movement:
    return Movement.model_validate(
        {
            "action": action,
            "version": version,
            "previous": previous,
            "at": datetime.now(timezone.utc),
            "by": by or f"{getpass.getuser()}@{platform.node()}",
        }
    )
