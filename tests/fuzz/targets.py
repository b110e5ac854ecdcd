"""All that is attacked, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz import calls, files, plans


@dataclass(frozen=True)
class Target:
    """What inputs are given to.

    Attributes:
        run: raises where something is wrong with zeroopt, whatever is wrong with the input.
        examples: inputs to begin with.
    """

    run: Callable[[bytes], None]
    examples: Callable[[], list[bytes]]


def _checkpoint(name: str) -> Target:
    return Target(files.read_checkpoint_with(name), lambda: [files.checkpoint()[name]])


def _deepspeed(name: str) -> Target:
    return Target(files.convert_deepspeed_with(name), lambda: files.deepspeed_files(name))


TARGETS = {
    "manifest": Target(files.read_manifest, lambda: [files.checkpoint()[files.NAME]]),
    "metadata": _checkpoint(files.METADATA),
    "checkpoint": _checkpoint(files.DATA),
    "torch": Target(files.read_torch_file, files.torch_files),
    "transformed": Target(files.read_transformed, files.transformed_files),
    "saved_model": Target(files.read_saved_model, files.saved_models),
    "zero_redundancy": Target(files.convert_zero_redundancy, files.zero_redundancy_files),
    "deepspeed_model": _deepspeed(files.DEEPSPEED_MODEL),
    "deepspeed_rank": _deepspeed(files.DEEPSPEED_RANK),
    "deepspeed_universal": Target(files.convert_universal, files.universal_files),
    "calls": Target(calls.call, calls.examples),
    "planner": Target(plans.plan, plans.examples),
}
