"""The front: gateway, query encoder and router in one replica, so that a request makes one hop more."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.artifacts import ArtifactRef
from cluster.registry import Registry
from serving.args import api_keys, parse_args
from serving.gateway import build_gateway
from serving.groups import ServeGroup, broadcast
from serving.metrics import Metrics, merge_expositions
from serving.router import Router
from serving.service import SearchService
from serving.versions import ServedVersion, VersionKeeper, load_served

logger = logging.getLogger("ray.serve")

# A new front takes no traffic before it has a version to answer from; if none can be had for this long
# it comes up all the same, so that /healthz can say why.
START_PATIENCE_S = 120.0


class Front:
    """One front replica.

    Args:
        args: what :func:`serving.app.build` was given.
        names: the shard groups' deployment names.
        handles: the shard groups' handles.
    """

    # Ray Serve awaits a constructor that is a coroutine; Python's type rules know none.
    async def __init__(  # type: ignore[misc]
        self, args: dict[str, Any], names: list[str], *handles: DeploymentHandle[Any]
    ) -> None:
        parsed = parse_args(args)
        config = parsed.serve
        self._config = config
        self._keys = api_keys(config)
        torch.set_num_threads(max(1, int(config.cpus_per_front)))
        self._registry = Registry.open(parsed.storage)
        self._index = parsed.index
        self._metrics = Metrics()
        groups = [ServeGroup(name, handle) for name, handle in zip(names, handles, strict=True)]
        self._versions = VersionKeeper(
            self._resolve,
            self._load,
            groups,
            self._metrics,
            poll_s=config.poll_alias_s,
            grace_s=config.grace_s,
        )
        router = Router(groups, config.deadline_ms / 1000, self._metrics)
        self._service = SearchService(config, self._versions, router, self._metrics)
        await self._versions.start(START_PATIENCE_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_gateway(self._service, self._config, self._metrics, self._scrape, self._keys)

    def __del__(self) -> None:
        # A constructor that failed leaves some of these out.
        for name in ("_versions", "_service"):
            if hasattr(self, name):
                getattr(self, name).close()

    async def exposition(self) -> tuple[str, str]:
        """This replica's id and its Prometheus text."""
        return serve.get_replica_context().replica_id.unique_id, self._metrics.exposition()

    async def _scrape(self) -> str:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        answers = await broadcast(handle, "exposition")
        return merge_expositions(dict(answer for answer in answers if isinstance(answer, tuple)))

    def _resolve(self) -> ArtifactRef:
        return self._registry.resolve("indexes", self._index)

    def _load(self, ref: ArtifactRef) -> ServedVersion:
        return load_served(self._registry, ref)
