"""What a strategy of Lightning's Trainer does: as DDP's, with `zeroopt.wrap` in the place of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ...errors import ConfigError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...unwrap import unwrap
from .options import split_options
from .saving import whole_state

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy as _Strategy
else:
    _Strategy = object


class TrainerStrategy(_Strategy):
    """Comes before the DDPStrategy of `lightning.pytorch` or `pytorch_lightning` among a class's bases.

    Processes, devices, samplers and metrics are left to that. While `fit` runs, `trainer.model` is a `zeroopt.ZeroDataParallel`
    and `trainer.optimizers` are `zeroopt.ZeroOptimizer`s; behind it, all of them are plain again.
    """

    def __init__(self, stage: int = 2, **options: Any) -> None:
        self._wrap_options, others = split_options({"stage": stage, **options}, super().__init__)
        super().__init__(**others)
        self._is_interrupted = False

    def setup(self, trainer: Trainer) -> None:
        """Collective."""
        self._is_interrupted = False
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Nothing yet: the model is wrapped together with its optimizers, which come next."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Call the module's `configure_optimizers`, and wrap it with what they are. Collective."""
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        # What stands for optimizers where `configure_optimizers` has returned None.
        optimizers = [one for one in self.optimizers if type(one).__name__ != "_MockOptimizer"]
        if optimizers:
            self.model, self.optimizers = self._wrap_options.wrap_all(self.lightning_module, optimizers)
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
        if not isinstance(optimizer, ZeroOptimizer):
            return super().optimizer_state(optimizer)
        return whole_state(optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, also while they are wrapped (a learning-rate finder does)."""
        if isinstance(self.model, ZeroDataParallel):
            self.model.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            super().load_model_state_dict(checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Of the whole state, which each rank reads, it keeps its own part. Collective."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
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
        super().teardown()  # moves the module to the CPU
        for optimizer, state in zip(self.optimizers, states, strict=False):
            optimizer.load_state_dict(state)

    def _unwrap(self, model: ZeroDataParallel) -> list[dict[str, Any]]:
        """Undo the wrapping. On rank 0, which alone saves, the whole state of all optimizers is returned."""
        if self._is_interrupted and self.world_size > 1:
            self.model = self.lightning_module
            return []
        states = [whole_state(optimizer) for optimizer in model.optimizers]
        plain = [optimizer.optimizer for optimizer in model.optimizers]
        self.model, self.optimizers = unwrap(model), plain
        return states if self.is_global_zero else []
