"""The features of one wrapped model. Those of one optimizer are made where that is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..collectives import Transport
from ..collectives.turnout import Turnout
from ..feature import Feature, Features
from ..options.config import Config
from ..replica import Replica
from .audit import Audit
from .captures import Captures
from .clipping import BucketNorms
from .foresight import Foresight
from .join import Join, Joining
from .micro_batches import MicroBatches
from .step_in_backward import StepInBackward


class ModelFeatures:
    """What takes part in every backward, and in the steps of all optimizers of the model.

    Attributes:
        features: those that are on are called.
        turnout: which ranks still train.
        join: tells ranks that have run out of data what this one does.
        norms: of gradients, for clipping.
        foresight: of the order of gradients; None where nobody could follow it.
        audit: looks at gradients and parameters in some steps; None: in none.
        captures: sees CUDA graphs; None where there are none, on the CPU.
        step_in_backward: steps buckets while backward runs; None: `step()` does.
    """

    def __init__(self, transport: Transport) -> None:
        self.features = Features()
        self.turnout = Turnout(transport.control.size)
        self.join = Join(transport, self.turnout)
        self.norms = BucketNorms(self.features)
        self.foresight: Foresight | None = None
        self.audit: Audit | None = None
        self.captures: Captures | None = None
        self.step_in_backward: StepInBackward | None = None
        self._joining: Joining | None = None

    def add_all(self, replica: Replica, config: Config, device: torch.device, further: Sequence[Feature] = ()) -> None:
        """Take up the features that the options ask for, and what a user brings.

        Args:
            device: of the parameters that are trained; others may be frozen, and elsewhere.
        """
        self._joining = Joining(self.join, replica.reducer.view, self.turnout)
        self.features.add(self._joining, on=False)
        if device.type == "cuda":
            self.captures = Captures(device, replica.gathers)
            self.features.add(self.captures)
        # A user's features may look for the parameters of a bucket, and a step in backward has to.
        if config.placement.shard_gradient and not config.step_in_backward and not further:
            self.foresight = Foresight(replica.module, replica.transport)
            self.features.add(self.foresight)
        # Before those that look at what travels.
        if config.micro_batches is not None:
            self.features.add(
                MicroBatches(config.micro_batches, replica.params, replica.reducer, replica.transport, self.turnout)
            )
        if config.check_every is not None:
            self.audit = Audit(config.check_every, replica.params, replica.transport, replica.gathers.finish_all)
            self.features.add(self.audit)
        for feature in further:
            self.features.add(feature)
        # Behind those that may change sums, of which it keeps the norm.
        self.features.add(self.norms, on=config.max_grad_norm is not None and config.micro_batches is None)
        if config.step_in_backward:
            self.step_in_backward = StepInBackward(replica)
            self.features.add(self.step_in_backward)

    def check_between_steps(self, what: str) -> None:
        """Raise StateError where something cannot be done now: within `join()`, or between a backward that has stepped and its
        `step()`."""
        self.join.check_outside(what)
        if self.step_in_backward is not None:
            self.step_in_backward.check_not_due(what)

    def follow_join(self) -> None:
        """A `join()` has been opened or closed."""
        assert self._joining is not None
        self.features.switch(self._joining, on=self.join.is_on)
