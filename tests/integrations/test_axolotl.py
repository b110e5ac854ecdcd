"""axolotl's plugin. axolotl itself wants a GPU, so a stand-in has the methods of its BasePlugin that count here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import zeroopt

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class BasePlugin:
    def get_input_args(self) -> str | None:
        return None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        pass


@pytest.fixture
def plugin_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    name = "zeroopt.integrations.axolotl"
    for parent in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", BasePlugin, raising=False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_without_axolotl_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", None)
    monkeypatch.delitem(sys.modules, "zeroopt.integrations.axolotl", raising=False)
    with pytest.raises(ImportError, match="zeroopt.integrations.axolotl needs axolotl"):
        importlib.import_module("zeroopt.integrations.axolotl")


def test_the_trainer_is_enabled_with_what_the_configuration_says(
    plugin_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(plugin_module, "enable", lambda trainer, **options: calls.append((trainer, options)))
    plugin, trainer = plugin_module.ZerooptPlugin(), object()
    plugin.post_trainer_create(
        {"zeroopt": {"stage": 1, "param_dtype": "bfloat16", "state_dtype": "torch.int8"}}, trainer
    )
    plugin.post_trainer_create({}, trainer)
    assert calls == [(trainer, {"stage": 1, "param_dtype": torch.bfloat16, "state_dtype": torch.int8}), (trainer, {})]


def test_axolotl_finds_the_arguments(plugin_module: Any) -> None:
    """By the name of a pydantic class, as its `config.py` looks for them."""
    module, _, name = plugin_module.ZerooptPlugin().get_input_args().rpartition(".")
    args = getattr(importlib.import_module(module), name)
    assert args(zeroopt={"stage": 2}).zeroopt == {"stage": 2} and args().zeroopt is None


def test_a_dtype_that_there_is_not_is_refused(plugin_module: Any) -> None:
    with pytest.raises(zeroopt.ConfigError, match="expected param_dtype of zeroopt: to be the name of a dtype.*'bf16'"):
        plugin_module.options_of({"param_dtype": "bf16"})
