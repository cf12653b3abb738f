"""The Serve deployment around a shard group."""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.artifacts import ArtifactRef
from cluster.registry import Registry
from serving.args import parse_args
from serving.shard_group import ShardGroup
from serving.shards import open_group


class ShardGroupReplica(ShardGroup):
    """One replica of one group.

    It loads what the alias names before it takes its first call, so that a replica which the autoscaler
    adds does not begin with misses. What it lacks of what fronts want, it learns from their next sync.

    Args:
        args: what :func:`serving.app.build` was given.
        number: the group's number, from 0.
    """

    def __init__(self, args: dict[str, Any], number: int) -> None:
        parsed = parse_args(args)
        config = parsed.serve
        registry = Registry.open(parsed.storage)
        name = parsed.index.partition("@")[0]

        def open_version(version: str) -> Any:
            ref = ArtifactRef("indexes", name, version)
            return open_group(registry, ref, number, config.groups, config.threads_per_group)

        super().__init__(
            serve.get_replica_context().replica_id.unique_id,
            open_version,
            config.threads_per_group,
            # Three polls: a front that missed one is not taken for gone.
            idle_s=3 * config.poll_alias_s,
        )
        self.load(registry.resolve("indexes", parsed.index).version)

    def __del__(self) -> None:
        if hasattr(self, "_searches"):
            self.close()
