"""What a strategy of Lightning's Trainer does: as DDP's, with `zeroopt.wrap` in the place of DistributedDataParallel."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import ConfigError, NotSupportedError, StateError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...options.checks import check_one_of
from ...unwrap import unwrap
from ..wrap_options import has_meta
from .options import check_precision, split_options
from .saving import check_file, is_parts, load_parts, open_parts, read_file, save_parts, whole_state

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy as _Strategy
else:
    _Strategy = object

_Path: TypeAlias = str | Path
StateDictType: TypeAlias = Literal["full", "sharded"]


class TrainerStrategy(_Strategy):
    """Comes before the DDPStrategy of `lightning.pytorch` or `pytorch_lightning` among a class's bases.

    Processes, devices, samplers and metrics are left to that. While `fit` runs, `trainer.model` is a `zeroopt.ZeroDataParallel`
    and `trainer.optimizers` are `zeroopt.ZeroOptimizer`s; behind it, all of them are plain again.
    """

    def __init__(self, stage: int = 2, *, state_dict_type: StateDictType = "full", **options: Any) -> None:
        check_one_of("state_dict_type", state_dict_type, ("full", "sharded"))
        self._wrap_options, others = split_options({"stage": stage, **options}, super().__init__)
        super().__init__(**others)
        self._saves_parts = state_dict_type == "sharded"
        self._is_interrupted = False
        self._is_built = False

    def setup(self, trainer: Trainer) -> None:
        """Collective."""
        check_precision(self._wrap_options, self.precision_plugin)
        self._is_interrupted = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Of what is on the meta device, `zeroopt.wrap` makes the values on its device."""
        assert self.model is not None
        if has_meta(self.model):
            self.model._apply(self._move)  # type: ignore[no-untyped-call]
        else:
            super().model_to_device()

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(self.root_device)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """What is on the meta device cannot be loaded before."""
        assert self.lightning_module is not None
        return self._is_built or has_meta(self.lightning_module)

    def configure_ddp(self) -> None:
        """Nothing yet: the model is wrapped together with its optimizers, which come next."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Call the module's `configure_optimizers`, and wrap it with what they are. Collective."""
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        # What stands for optimizers where `configure_optimizers` has returned None.
        optimizers = [one for one in self.optimizers if type(one).__name__ != "_MockOptimizer"]
        self._is_built = has_meta(self.lightning_module)
        if optimizers:
            self.model, self.optimizers = self._wrap_options.wrap_all(
                self.lightning_module, optimizers, self.root_device
            )
        elif not self.lightning_module.automatic_optimization:
            raise ConfigError(
                "expected configure_optimizers to return the optimizers that training_step steps, got none: zeroopt averages the "
                "gradients of a model for the optimizers that it was wrapped with"
            )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backward passes within it communicate nothing."""
        if isinstance(self.model, ZeroDataParallel):
            with self.model.no_sync():
                yield
        else:
            yield

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, which writes it, as the plain optimizer has it; elsewhere nothing. Collective."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # within a LightningOptimizer
        if self._saves_parts:
            return {}
        return whole_state(optimizer) if isinstance(optimizer, ZeroOptimizer) else super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _Path, storage_options: Any = None) -> None:
        """Write a file on rank 0, or with `state_dict_type="sharded"` a directory, into which each rank writes its part.

        Raises:
            StateError: a directory is wanted behind `fit`, when the state of the optimizers has been given up.
            NotSupportedError, CheckpointError: what is to be in a directory cannot be saved, or `storage_options` are given.
        """
        if not self._saves_parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        elif storage_options is not None:
            raise NotSupportedError('storage_options cannot be honoured with state_dict_type="sharded"; leave them out')
        elif isinstance(self.model, ZeroDataParallel):
            save_parts(filepath, checkpoint, self.model)
        else:
            raise StateError(
                'with state_dict_type="sharded" checkpoints are saved while fit runs, behind which no rank has the whole state: let a '
                "ModelCheckpoint save (save_last=True), or call trainer.save_checkpoint in on_train_end"
            )

    def load_checkpoint(self, checkpoint_path: _Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or a directory, whatever this strategy saves. Collective. Raises CheckpointError where it is damaged."""
        if os.path.isdir(checkpoint_path):
            return open_parts(checkpoint_path, weights_only, torch.distributed.group.WORLD)
        # Another plugin, or another file system, has its own way.
        if type(self.checkpoint_io).__name__ == "TorchCheckpointIO" and os.path.isfile(checkpoint_path):
            check_file(checkpoint_path)
            with suppress(RuntimeError):
                return read_file(checkpoint_path, weights_only)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, also while they are wrapped (a learning-rate finder does)."""
        if isinstance(self.model, ZeroDataParallel):
            self.model.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            super().load_model_state_dict(checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Of the whole state, which each rank reads, it keeps its own part. Collective."""
        states = checkpoint["optimizer_states"]
        if is_parts(states) and isinstance(self.model, ZeroDataParallel):
            load_parts(states, self.model)
            return
        for optimizer, state in zip(self.optimizers, states, strict=False):
            optimizer.load_state_dict(state)

    def on_exception(self, exception: BaseException) -> None:
        """From here on other ranks may be elsewhere."""
        self._is_interrupted = True
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give back a plain module and plain optimizers. Collective, unless an exception has ended the run."""
        states: list[dict[str, Any]] = []
        if isinstance(self.model, ZeroDataParallel):
            states = self._unwrap(self.model)
        self._is_built = False
        module = self.lightning_module
        if module is not None and has_meta(module):
            self._lightning_module = None  # it was never made, so there is nothing to move
        super().teardown()  # moves the module to the CPU
        self._lightning_module = module
        for optimizer, state in zip(self.optimizers, states, strict=False):
            optimizer.load_state_dict(state)

    def _unwrap(self, model: ZeroDataParallel) -> list[dict[str, Any]]:
        """Undo the wrapping, and return what the plain optimizers are to load: on rank 0, which alone writes files, all."""
        if self._is_interrupted and self.world_size > 1:
            self.model = self.lightning_module
            return []
        states = [] if self._saves_parts else [whole_state(optimizer) for optimizer in model.optimizers]
        plain = [optimizer.optimizer for optimizer in model.optimizers]
        self.model, self.optimizers = unwrap(model), plain
        return states if self.is_global_zero else []
