"""A model's step from its plan to its time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from zeroopt import ConfigError, NotSupportedError
from zeroopt.__main__ import main
from zeroopt.optim import FusedLAMB
from zeroopt.planner.transformer import transformer_of
from zeroopt.simulator import Machine, command, simulate
from zeroopt.simulator.simulate import Simulator

MACHINE = Machine(host_ranks=2, flops=1e11, memory_bandwidth=1e10, cores=2, network_bandwidth=1e7)
WORLD_SIZE = 8


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(transformer_of(0, layers=2, width=128, vocabulary=256), torch.optim.AdamW, tokens=32)


@pytest.fixture(scope="module")
def parameters() -> int:
    return sum(param.numel() for param in transformer_of(0, layers=2, width=128, vocabulary=256).parameters())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_is_the_sum_of_its_parts_and_sends_what_its_plan_has(
    simulator: Simulator, parameters: int, stage: int
) -> None:
    step = simulator.run(MACHINE, WORLD_SIZE, stage=stage, bucket_mb=0.25)
    assert (step.collectives, step.method, step.world_size) == ("hybrid", "zeroopt", WORLD_SIZE)
    assert step.num_buckets > 3
    assert sum(step.parts.values()) == pytest.approx(step.step_s)
    moved = 2 * 4 * parameters * 3 / 4  # of four hosts
    assert step.network_s * MACHINE.network_bandwidth == pytest.approx(moved, rel=0.02)  # with padding
    assert step.step_s > max(step.compute_s, step.network_s)


def test_16_bit_gradients_are_half_the_bytes(simulator: Simulator) -> None:
    plain, half = (simulator.run(MACHINE, WORLD_SIZE, stage=2, reduce_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.network_s == pytest.approx(0.75 * plain.network_s, rel=0.02)
    assert half.step_s < plain.step_s


def test_others_by_their_traffic(simulator: Simulator) -> None:
    steps = {method: simulator.run(MACHINE, WORLD_SIZE, method=method) for method in ("DDP", "FSDP2")}
    assert steps["FSDP2"].network_s == pytest.approx(1.5 * steps["DDP"].network_s, rel=0.02)
    assert steps["DDP"].collectives == "ring"


def test_a_faster_machine_is_faster(simulator: Simulator) -> None:
    first = simulator.run(MACHINE, WORLD_SIZE).step_s
    for name in ("network_bandwidth", "flops", "memory_bandwidth"):
        faster = replace(MACHINE, **{name: 2 * getattr(MACHINE, name)})
        assert simulator.run(faster, WORLD_SIZE).step_s < first


def test_the_function_does_what_the_simulator_does(simulator: Simulator) -> None:
    model = transformer_of(0, layers=2, width=128, vocabulary=256)
    step = simulate(model, torch.optim.AdamW, MACHINE, world_size=WORLD_SIZE, tokens=32, collectives="three levels")
    assert step == simulator.run(MACHINE, WORLD_SIZE, collectives="three levels")


def test_what_makes_no_sense_is_refused(simulator: Simulator) -> None:
    with pytest.raises(ConfigError, match="expected method to be one of zeroopt, DDP, FSDP2, got 'ddp'"):
        simulator.run(MACHINE, WORLD_SIZE, method="ddp")
    with pytest.raises(ConfigError, match="expected collectives to be one of"):
        simulator.run(MACHINE, WORLD_SIZE, collectives="star")
    with pytest.raises(NotSupportedError, match="does not know what average_every would change"):
        simulator.run(MACHINE, WORLD_SIZE, average_every=4)
    with pytest.raises(NotSupportedError, match="does not know what parameter_compression would change"):
        simulator.run(MACHINE, WORLD_SIZE, parameter_compression="int8")
    whole = Simulator(transformer_of(0, layers=1, width=64, vocabulary=64), FusedLAMB, tokens=8)
    with pytest.raises(NotSupportedError, match="brought to owners"):
        whole.run(MACHINE, WORLD_SIZE)
    with pytest.raises(ConfigError, match="multiple of host_ranks"):
        simulator.run(MACHINE, 7)
    with pytest.raises(ConfigError, match="expected either tokens or sample"):
        Simulator(transformer_of(0, layers=1, width=64, vocabulary=64), torch.optim.AdamW)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["zeroopt", "simulate", *map(str, arguments)])
    return main()


TINY = ("--layers", 2, "--width", 128, "--vocabulary", 256, "--tokens", 32)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], simulator: Simulator) -> None:
    monkeypatch.setattr(command, "read_machine", lambda path: MACHINE)
    asked = (*TINY, "--machine", "here", "--world-size", 4, 8, "--methods", "DDP", "zeroopt", "--option", "stage=1")
    assert run(monkeypatch, *asked, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    expected = [
        simulator.run(MACHINE, ranks, method=method, stage=1) for ranks in (4, 8) for method in ("DDP", "zeroopt")
    ]
    assert told == [step.as_json() for step in expected]
    assert run(monkeypatch, *asked) == 0
    assert capsys.readouterr().out.count("a step\n") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --machine and --world-size, or --measure"),
        (("--machine", "h100", "--world-size", 8), "expected --model, --params"),
        (("--machine", "h100", "--world-size", 8, "--params", "1M"), "expected --tokens"),
        (("--machine", "nowhere", "--world-size", 8, *TINY), "expected a machine"),
    ],
)
def test_the_command_says_what_it_misses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err
