"""transformers' Trainers on the ranks of a test: tiny models made from configurations, and datasets made in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from zeroopt.integrations.transformers import enable

VOCABULARY = 61
LENGTH = 12
GLOBAL_BATCH = 12  # sequences in a step, on 1, 2 or 3 ranks

Log = list[dict[str, float]]


class Sequences(Dataset[dict[str, Tensor]]):
    """Random tokens, the same on all ranks."""

    def __init__(self, count: int = 5 * GLOBAL_BATCH) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def arguments(cls: type[TrainingArguments], folder: Path, **given: Any) -> Any:
    """TrainingArguments that log each step, on the CPU."""
    ranks = int(os.environ["WORLD_SIZE"]) * given.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "per_device_eval_batch_size": GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "report_to": [],
        "disable_tqdm": True,
    }
    return cls(**{**defaults, **given})


def make(
    folder: Path,
    zero: Mapping[str, Any] | None,
    model: nn.Module | None = None,
    besides: Mapping[str, Any] | None = None,
    **given: Any,
) -> Trainer:
    """A Trainer of a Llama on random sequences.

    Args:
        zero: options for `enable`; None: as transformers has it, with DistributedDataParallel.
        besides: what Trainer takes besides the model, the data and TrainingArguments.
        given: TrainingArguments.
    """
    trainer = Trainer(
        model=llama() if model is None else model,
        args=arguments(TrainingArguments, folder, **given),
        train_dataset=Sequences(),
        eval_dataset=Sequences(GLOBAL_BATCH),
        **(besides or {}),
    )
    return trainer if zero is None else enable(trainer, **zero)


def log_of(trainer: Trainer) -> Log:
    """What it has logged, without what differs from run to run."""
    timed = ("_runtime", "_per_second", "_preparation_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_log(log: Log, expected: Log, tolerance: float = 0.0) -> None:
    """The same entries, with values that are equal or, where a tolerance is given, differ by no more of their size."""
    assert [entry.keys() for entry in log] == [entry.keys() for entry in expected]
    for entry, other in zip(log, expected, strict=True):
        for name, value in other.items():
            assert abs(entry[name] - value) <= tolerance * abs(value), (name, entry, other)
