"""The same model trained by others, by what they send and when."""

from __future__ import annotations

from .events import Process
from .training import Course
from .travelling import Travelling


class DdpTraining(Course):
    """DistributedDataParallel: an all-reduce a bucket beside backward, and a step of everything on every rank."""

    def _step(self) -> Process:
        loads = self._workload.loads
        for load in reversed(loads):
            yield from self._compute(load.forward, "forward")
        travelling: list[Travelling] = []
        for load in loads:
            yield from self._compute(load.backward, "backward", load.packed)
            halves = self._halves(load.gradients)
            travelling.append(self._travel(halves.reduce_scatter + halves.all_gather))
            for pending in travelling:
                if pending.asks:
                    yield from self._own_work(pending.progress())
        for pending in travelling:
            yield from self._own_work(pending.finish())
        for load in loads:
            yield from self._compute(0.0, "step", load.stepped)


class Fsdp2Training(Course):
    """FSDP2 with `reshard_after_forward`: each layer's parameters are gathered before its forward and once more before its backward, one
    layer ahead; gradients are reduce-scattered behind it."""

    def _step(self) -> Process:
        loads = self._workload.loads
        forwards, backwards = loads[::-1], loads
        yield from self._pass([(load.parameters, load.forward, 0.0) for load in forwards], "forward")
        yield from self._pass([(load.parameters, load.backward, load.gradients) for load in backwards], "backward")
        for load in loads:
            yield from self._compute(0.0, "step", load.stepped / self._ranks.world_size)

    def _pass(self, layers: list[tuple[float, float, float]], part: str) -> Process:
        reduces: list[Travelling] = []
        ahead = self._travel(self._halves(layers[0][0]).all_gather)
        for place, (_, operations, gradients) in enumerate(layers):
            yield from self._own_work(ahead.finish())
            if place + 1 < len(layers):
                ahead = self._travel(self._halves(layers[place + 1][0]).all_gather)
            yield from self._compute(operations, part)
            if gradients:
                reduces.append(self._travel(self._halves(gradients).reduce_scatter))
        for pending in reduces:
            yield from self._own_work(pending.finish())
