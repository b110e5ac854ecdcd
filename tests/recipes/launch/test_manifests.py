"""The manifests say the same about ranks wherever they say it, and torchrun understands them as the cluster would hand them over."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from paths import ROOT
from torch.distributed.run import config_from_args, get_args_parser

FOLDER = ROOT / "recipes" / "launch"
TORCHRUN = ["python", "-m", "torch.distributed.run"]
POD = {"restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"}
CONTAINER = {"name", "image", "command", "args", "ports", "resources", "volumeMounts"}


def load(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return manifest


def started(command: list[str], args: list[str], **environment: str) -> tuple[Any, list[str]]:
    """What torchrun would do: its options, and what it starts."""
    assert command == TORCHRUN
    with patch.dict(os.environ, environment):
        config, program, arguments = config_from_args(get_args_parser().parse_args(args))
    return config, [program, *arguments] if isinstance(program, str) else arguments


def check_pod(pod: dict[str, Any]) -> dict[str, Any]:
    """Known fields, and volumes that are mounted; returns its container."""
    (container,) = pod["containers"]
    assert pod.keys() <= POD and container.keys() <= CONTAINER
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/runs", "/dev/shm"}
    assert any(argument.startswith("--out=/runs") for argument in container["args"])
    return dict(container)


def test_jobset() -> None:
    manifest = load("jobset.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job.keys() == {"completionMode", "parallelism", "completions", "backoffLimit", "template"}
    assert job["completionMode"] == "Indexed" and replicated["replicas"] == 1
    container = check_pod(job["template"]["spec"])
    for index in range(job["completions"]):
        args = [argument.replace("$(JOB_COMPLETION_INDEX)", str(index)) for argument in container["args"]]
        config, program = started(container["command"], args)
        assert config.min_nodes == config.max_nodes == job["parallelism"] == job["completions"]
        assert config.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
        assert config.rdzv_configs["rank"] == index
        address, port = config.rdzv_endpoint.split(":")
        name = manifest["metadata"]["name"]
        assert address == f"{name}-{replicated['name']}-0-0.{name}"
        assert container["ports"] == [{"containerPort": int(port)}]
        assert program[-3:] == ["recipes.generate", "--preset=1.5b", "--out=/runs/generate"]


def test_pytorchjob() -> None:
    manifest = load("pytorchjob.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert manifest["spec"].keys() == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    pods = sum(spec["replicas"] for spec in replicas.values())
    for index, spec in enumerate(replicas.values()):
        assert spec.keys() == {"replicas", "restartPolicy", "template"}
        container = check_pod(spec["template"]["spec"])
        assert container["name"] == "pytorch"
        told = {"NNODES": pods, "NPROC_PER_NODE": manifest["spec"]["nprocPerNode"], "NODE_RANK": index}
        told |= {"MASTER_ADDR": "zeroopt-master-0", "MASTER_PORT": 23456}
        config, program = started(
            container["command"], container["args"], **{f"PET_{name}": str(value) for name, value in told.items()}
        )
        assert config.min_nodes == config.max_nodes == 2
        assert config.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
        assert (config.rdzv_configs["rank"], config.rdzv_endpoint) == (index, "zeroopt-master-0:23456")
        assert program[-3:] == ["recipes.generate", "--preset=1.5b", "--out=/runs/generate"]


def test_azure_ml() -> None:
    job = load("azure_ml.yaml")
    assert job.keys() == {
        *(
            "$schema",
            "type",
            "experiment_name",
            "display_name",
            "code",
            "command",
            "environment",
            "compute",
            "resources",
        ),
        *("distribution", "environment_variables", "outputs"),
    }
    assert job["type"] == "command" and job["distribution"].keys() == {"type", "process_count_per_instance"}
    assert job["environment_variables"]["LOCAL_WORLD_SIZE"] == str(job["distribution"]["process_count_per_instance"])
    assert (FOLDER / job["code"] / "recipes").is_dir()
    assert (
        job["command"] == "python -m recipes.generate --preset 1.5b --out ${{outputs.runs}}"
        and "runs" in job["outputs"]
    )


@pytest.mark.parametrize("name", ["jobset.yaml", "pytorchjob.yaml", "azure_ml.yaml"])
def test_nothing_is_said_twice_in_one_place(name: str) -> None:
    """YAML's loader takes the last of two equal keys."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    yaml.load((FOLDER / name).read_text(), Loader=Strict)
