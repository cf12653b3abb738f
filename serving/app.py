"""The Ray Serve application: how its deployments are sized and bound together.

``serve deploy`` reads it as ``import_path: serving.app:build`` with the storage and the serve section of a
recipe under ``args``; :func:`deploy` does the same from a recipe.
"""

from __future__ import annotations

import socket
from time import monotonic, sleep
from typing import Any

import httpx
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from cluster.config import Recipe, ServeConfig
from cluster.registry import Registry
from colbert_core.errors import ConfigError
from serving.args import ServiceArgs, api_keys, parse_args, recipe_args
from serving.errors import NotReady
from serving.front import Front
from serving.replica import ShardGroupReplica
from serving.shards import shard_paths

APP_NAME = "raycolbert"
FRONT = "front"
# Every front that polls, syncs and answers a health check calls a group too; these calls must not wait
# behind searches.
SPARE_CALLS = 8
ANY_ADDRESS = ("0.0.0.0", "::")
READY_TIMEOUT_S = 120.0
READY_POLL_S = 0.2
# One line of log per request would cost more than the search that it tells of.
_LOGGING = LoggingConfig(enable_access_log=False)
# Requests that one search thread may have waiting before a group's autoscaler wants another replica.
TARGET_PER_THREAD = 2


def build(args: dict[str, Any]) -> Application:
    """Binds the application.

    Args:
        args: ``{"storage": …, "serve": …}``, the sections of a recipe with these names.

    Returns:
        The front, bound to its shard groups.

    Raises:
        ConfigError: a key or value is refused.
    """
    parsed = parse_args(args)
    config = parsed.serve
    plain = parsed.model_dump(mode="json")
    names = [f"shards-{number}" for number in range(config.groups)]
    groups = [
        serve.deployment(name=name, **_group_options(config))(ShardGroupReplica).bind(plain, number)
        for number, name in enumerate(names)
    ]
    front = serve.deployment(name=FRONT, **_front_options(config))(serve.ingress()(Front))
    return front.bind(plain, names, *groups)


def _front_options(config: ServeConfig) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": config.cpus_per_front},
        # More than the front takes: it answers 429 itself, in JSON, where Serve would let requests queue.
        "max_ongoing_requests": 2 * config.max_inflight + SPARE_CALLS,
        **_scaling(config.fronts, target=max(1, config.max_inflight // 4)),
    }


def _group_options(config: ServeConfig) -> dict[str, Any]:
    target = TARGET_PER_THREAD * config.threads_per_group
    return {
        "ray_actor_options": {"num_cpus": config.cpus_per_group},
        "max_ongoing_requests": 4 * target + SPARE_CALLS,
        **_scaling(config.group_replicas, target=target),
    }


def _scaling(replicas: tuple[int, int], target: int) -> dict[str, Any]:
    fewest, most = replicas
    if fewest == most:
        return {"num_replicas": fewest}
    return {
        "autoscaling_config": {
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": target,
            # Up before a person notices; down slowly, since a replica that comes back loads its shards again.
            "upscale_delay_s": 10,
            "downscale_delay_s": 600,
        }
    }


def deploy(recipe: Recipe) -> str:
    """Deploys the recipe's service on the Ray that this process has joined, and waits until it answers.

    Returns:
        The base URL.

    Raises:
        ConfigError: the recipe names no index, has more groups than the index has shards, no API key is
            set, the port is taken, or Serve listens elsewhere already.
        ArtifactNotFound: the index is not published.
        NotReady: the replicas did not come up; the message says why.
    """
    args = recipe_args(recipe)
    _check_index(args)
    api_keys(args.serve)
    url = base_url(*_listen(args.serve))
    try:
        application = build(args.model_dump(mode="json"))
        serve.run(application, name=APP_NAME, route_prefix="/", logging_config=_LOGGING)
    except RuntimeError as error:
        raise NotReady(f"Ray Serve could not deploy the service: {error}") from None
    _wait_until_ready(url)
    return url


def base_url(host: str, port: int) -> str:
    """Where a service that listens on this host and port is reached from its own machine."""
    if host in ANY_ADDRESS:
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def undeploy(*, stop_serve: bool) -> None:
    """Takes the application down: no new requests, those in work are answered first.

    Args:
        stop_serve: also stop Serve itself, and with it every other application on this Ray.

    What is not there is passed over.
    """
    if stop_serve and serve_runs():
        serve.shutdown()
    elif deployed():
        serve.delete(APP_NAME)


def deployed() -> bool:
    """Whether the application is there, in whatever state."""
    return APP_NAME in serve.status().applications


def serve_runs() -> bool:
    """Whether Serve runs on this Ray, for whichever application."""
    return bool(serve.status().proxies)


def _listen(config: ServeConfig) -> tuple[str, int]:
    """The host and port that Serve listens on; starts it if it does not run.

    Raises:
        ConfigError: the port is taken, or Serve runs and listens where the service would not be found.
    """
    if not serve_runs():
        port = _claim_port(config.host, config.port)
        serve.start(http_options=HTTPOptions(host=config.host, port=port), logging_config=_LOGGING)
        return config.host, port
    # All applications on a Ray share one address, which no public call tells.
    client = _get_global_client()
    assert client is not None  # it raises where Serve does not run
    running = client.http_config
    if config.port not in (0, running.port) or running.host not in (config.host, *ANY_ADDRESS):
        raise ConfigError(
            f"serve.host, serve.port: {config.host}:{config.port}, but Serve runs on this Ray already and "
            f"listens on {running.host}:{running.port}, for all its applications"
        )
    return running.host, running.port


def _check_index(args: ServiceArgs) -> None:
    """Finds out before anything is started what would keep the replicas from starting."""
    registry = Registry.open(args.storage)
    ref = registry.resolve("indexes", args.index)
    shards = len(shard_paths(registry, ref))
    if args.serve.groups > shards:
        raise ConfigError(f"serve.groups: {args.serve.groups}, but {ref} has only {shards} shards")


def _claim_port(host: str, port: int) -> int:
    """A port that can be listened on: the one asked for, or for 0 a free one.

    Raises:
        ConfigError: another program has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"serve.port: cannot listen on {host}:{port}: {error.strerror}") from None
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str) -> None:
    """Waits until /healthz says 200; Serve routes a new application some time after it runs.

    Raises:
        NotReady: it did not in time; the message holds its last answer.
    """
    until = monotonic() + READY_TIMEOUT_S
    answer = "nothing answered"
    with httpx.Client(timeout=READY_TIMEOUT_S) as client:
        while monotonic() < until:
            try:
                response = client.get(f"{url}/healthz")
                if response.status_code == httpx.codes.OK:
                    return
                answer = response.text
            except httpx.TransportError as error:
                answer = f"{type(error).__name__}: {error}"
            sleep(READY_POLL_S)
    raise NotReady(f"{url}/healthz: not ready within {READY_TIMEOUT_S:g} s: {answer}")
