"""docs/moving/ says of every key and argument what becomes of it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

FOLDER = ROOT / "docs" / "moving"


def words(page: str) -> set[str]:
    """What stands in code, word by word."""
    text = re.sub(r"^```.*?^```", "", (FOLDER / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"[\w*]+", " ".join(re.findall(r"`([^`]+)`", text))))


def arguments(function: object) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name not in ("self", "kwargs", "defaults")}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("page", "cls"), [("ddp.md", DistributedDataParallel), ("zero_redundancy.md", ZeroRedundancyOptimizer)]
)
def test_arguments_of_a_class(page: str, cls: type) -> None:
    assert arguments(cls.__init__) <= words(page)  # type: ignore[misc]


def test_arguments_of_fsdp() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    assert arguments(fsdp.FullyShardedDataParallel.__init__) - {"module"} <= words("fsdp.md")
    if hasattr(fsdp, "fully_shard"):
        assert arguments(fsdp.fully_shard) - {"module"} <= words("fsdp.md")


def fields(file: Path, *classes: str) -> Iterator[str]:
    """The fields of a configuration's classes, by the names that they have in JSON. Read, for importing DeepSpeed takes long."""
    for cls in ast.parse(file.read_text()).body:
        if isinstance(cls, ast.ClassDef) and cls.name in classes:
            for field in cls.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    aliases = [
                        k.value.value
                        for k in getattr(field.value, "keywords", ())
                        if k.arg == "alias" and isinstance(k.value, ast.Constant)
                    ]
                    yield str(aliases[0]) if aliases else field.target.id


def test_keys_of_deepspeed() -> None:
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("DeepSpeed is not installed")
    runtime = Path(spec.origin).parent / "runtime"
    keys = {
        *fields(runtime / "zero" / "config.py", "DeepSpeedZeroConfig"),
        *fields(runtime / "zero" / "offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
        *fields(runtime / "precision_config.py", "DeepSpeedBF16Config", "DeepSpeedFP16Config"),
    }
    assert len(keys) > 50  # else they are elsewhere by now
    named = words("deepspeed.md")
    assert {key for key in keys if not key.startswith("stage3_")} <= named and "stage3_*" in named
