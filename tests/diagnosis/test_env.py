"""A bug report says how zeroopt was built, and what is around it; whatever is missing is said too."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

import zeroopt
from zeroopt import KernelUnavailableError
from zeroopt.diagnosis import env
from zeroopt.diagnosis.env import environment, print_environment

BUILD: dict[str, Any] = {
    "version": "1.2.3",
    "compiler": "GNU 13.2",
    "flags": "-O3",
    "isa": "avx2",
    "isas": ["scalar", "avx2"],
    "openmp": "/torch/lib/libgomp.so.1",
    "cuda": True,
    "cuda_version": "12.4",
    "cuda_problem": "",
    "cuda_archs": ["80", "90"],
}


def built(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> dict[str, str]:
    """The environment of a build of which these facts are others."""
    monkeypatch.setattr(env, "build_info", lambda: {**BUILD, **facts})
    monkeypatch.setattr(env, "describe_driver", lambda: "the driver serves CUDA up to 12.8")
    return environment()


def placed(
    monkeypatch: pytest.MonkeyPatch,
    names: Sequence[str],
    missing: Callable[[torch.device], str | None] = lambda device: None,
    launch: Callable[[torch.device], None] = lambda device: None,
) -> None:
    """Let there be GPUs of these names, of compute capability 9.0, and kernels for them or not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(env, "missing_kernels", missing)
    monkeypatch.setattr(env, "check_launch", launch)


def test_the_build_that_runs_is_described() -> None:
    facts = environment()
    assert facts["zeroopt"] == zeroopt.__version__
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["cores"].endswith(f"torch uses {torch.get_num_threads()} threads")
    assert all(facts.values())


def test_what_is_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = built(monkeypatch)
    assert facts["compiler"] == "GNU 13.2, -O3"
    assert facts["CPU kernels"] == "avx2 (compiled: scalar, avx2)"
    assert facts["OpenMP"] == "/torch/lib/libgomp.so.1"
    assert facts["CUDA kernels"] == "12.4 (80 90)"
    assert facts["CUDA driver"] == "the driver serves CUDA up to 12.8"


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "sve (compiled: generic/SSE2, sve)"),
        ("aarch64", "sve (compiled: generic/NEON, sve)"),
        ("riscv64", "sve (compiled: generic, sve)"),
    ],
)
def test_what_generic_means_is_said(machine: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert built(monkeypatch, isa="sve", isas=["generic", "sve"])["CPU kernels"] == expected


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    facts = built(monkeypatch, openmp="", cuda=False, cuda_version="", cuda_archs=[], cuda_problem="no nvcc")
    assert facts["OpenMP"].startswith("no: ") and "libgomp" in facts["OpenMP"]
    assert facts["CUDA kernels"].startswith("none: no nvcc. To have them, reinstall with ZEROOPT_CUDA=on")
    assert facts["CUDA driver"] == "not asked, without CUDA kernels"
    assert (facts["torch CUDA"], facts["CUDA devices"]) == ("no", "none")


def test_all_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    placed(monkeypatch, ["GPU 0", "GPU 1"])
    facts = built(monkeypatch)
    assert facts["CUDA devices"] == "GPU 0 (9.0), GPU 1 (9.0)"
    assert "cuda:0" not in facts and "cuda:1" not in facts


def test_a_device_on_which_kernels_do_not_run_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device: torch.device) -> None:
        raise KernelUnavailableError(f"no kernel can be launched on {device}")

    placed(monkeypatch, ["old", "new"], lambda device: "too old" if device.index == 0 else None, launch)
    facts = built(monkeypatch)
    assert facts["cuda:0"] == "torch's operations instead of kernels: too old"
    assert facts["cuda:1"] == "no kernel can be launched on cuda:1"


@pytest.mark.parametrize(
    ("available", "expected"),
    [((True, False, True), "gloo, mpi"), ((False, True, False), "nccl"), ((False, False, False), "none")],
)
def test_backends_are_those_of_this_torch(
    available: tuple[bool, bool, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, there in zip(("gloo", "nccl", "mpi"), available, strict=True):
        monkeypatch.setattr(dist, f"is_{name}_available", lambda there=there: there)
    assert environment()["backends"] == expected


def test_a_torch_without_distributed_has_no_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert environment()["backends"] == "none"


def test_every_fact_is_a_line_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_environment()
    lines = capsys.readouterr().out.splitlines()
    facts = environment()
    column = lines[0].index(facts["zeroopt"])
    assert [(line[:column].rstrip(), line[column:]) for line in lines] == list(facts.items())
