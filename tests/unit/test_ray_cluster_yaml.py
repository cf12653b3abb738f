"""The cluster files: `ray up`'s schema, and what of the KubeRay manifests can be checked offline."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.config import ServeConfig, StorageConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text(encoding="utf-8"))


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "deploy" / name).read_text(encoding="utf-8"))


def check(config: dict[str, Any]) -> None:
    """What `ray up` does before it asks for credentials."""
    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    check(cluster)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "max_wrokers", 3),
        (("available_node_types", "cpu"), "min_worker", 1),
        (("available_node_types", "cpu"), "min_workers", "one"),
        ((), "head_node_type", "heda"),
    ],
)
def test_ray_refuses_a_typo(cluster: dict[str, Any], place: tuple[str, ...], key: str, value: Any) -> None:
    broken = copy.deepcopy(cluster)
    target = broken
    for part in place:
        target = target[part]
    target[key] = value
    with pytest.raises(Exception, match=key if key != "min_workers" else "one"):
        check(broken)


def test_node_types_are_what_the_jobs_ask_for(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert set(types) == {"head", "a100", "cpu"}
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["a100"]["resources"] == {"CPU": 96, "GPU": 8}
    assert types["a100"]["node_config"]["InstanceType"] == "p4d.24xlarge"
    assert types["a100"]["min_workers"] == 0, "an idle A100 node is the dearest mistake of all"
    assert types["cpu"]["max_workers"] > types["cpu"]["min_workers"] >= 1
    assert cluster["max_workers"] == sum(kind["max_workers"] for kind in types.values())
    for kind in types.values():
        assert kind["node_config"]["IamInstanceProfile"]["Name"]


def test_everything_mounted_exists_and_is_installed_with_the_tested_versions(cluster: dict[str, Any]) -> None:
    packages = set()
    for remote, local in cluster["file_mounts"].items():
        if local.startswith("~"):
            continue
        assert (ROOT / local).exists(), local
        packages.add(Path(remote).name)
    assert {"colbert_core", "cluster", "jobs", "serving", "pyproject.toml"} <= packages
    install = next(command for command in cluster["setup_commands"] if "pip install" in command)
    assert "--constraint ~/raycolbert/constraints.txt" in install
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = cluster[commands][-1]
        assert "RAY_AUTH_MODE=token" in start and "venv/bin" in start


@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "RayJob"), ("rayservice.yaml", "RayService")])
def test_manifests_have_the_shape_that_the_operator_reads(name: str, kind: str) -> None:
    document = manifest(name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    spec = document["spec"]["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"]
    import ray

    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_rayjob_runs_a_job_that_exists() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    program, flag, module, recipe = spec["entrypoint"].split()[:4]
    assert (program, flag) == ("python", "-m")
    assert callable(import_module(module).run)
    assert (ROOT / recipe).is_file()
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] >= 1


def test_rayservice_builds_the_application_it_names() -> None:
    config = yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, name = application.import_path.partition(":")
    built = getattr(import_module(module), name)(application.args)
    assert built._bound_deployment.name == "front"
    serve = ServeConfig.model_validate(application.args["serve"])
    StorageConfig.model_validate(application.args["storage"])
    deployments = {"front", *(f"shards-{number}" for number in range(serve.groups))}
    assert set(application.deployment_names) == deployments


def test_max_ongoing_requests_is_a_field_of_the_deployment() -> None:
    config = yaml.safe_load(manifest("rayservice.yaml")["spec"]["serveConfigV2"])
    for deployment in config["applications"][0]["deployments"]:
        scaling = deployment["autoscaling_config"]
        assert "max_ongoing_requests" not in scaling
        assert deployment["max_ongoing_requests"] > scaling["target_ongoing_requests"]
        assert "ray_actor_options" not in deployment


def test_rayservice_workers_hold_the_replicas_that_always_run() -> None:
    spec = manifest("rayservice.yaml")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    serve = ServeConfig.model_validate(config["applications"][0]["args"]["serve"])
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    cpus = workers["minReplicas"] * int(container["resources"]["requests"]["cpu"])
    needed = serve.fronts[0] * serve.cpus_per_front
    needed += serve.groups * serve.group_replicas[0] * serve.cpus_per_group
    assert needed <= cpus
    assert any(item["name"] == serve.api_keys_env for item in container["env"])
