"""`Guard`."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from ..checkpoint.format.extra import EXTRA, pack_extra, rank_file
from ..checkpoint.format.plain import check_plain
from ..checkpoint.format.together import together
from ..checkpoint.wrapped.lineage import runs_of
from ..checkpoint.wrapped.loading import Source, load_source
from ..checkpoint.wrapped.parts import Part, describe_part, join_parts
from ..checkpoint.wrapped.residuals import residual_contents, residual_file
from ..checkpoint.wrapped.saving import Optimizers, begin, optimizers_of, own_contents
from ..collectives import ControlGroup
from ..collectives.hosts import ranks_by_host
from ..collectives.second_group import second_group
from ..errors import CheckpointError, ConfigError, NotSupportedError, StateError
from ..feature import Feature, Step
from ..module import ZeroDataParallel
from .alike import Alike, frozen_parameters
from .contents import Entries, Places, checksum_of, pack, shapes_of, take_out
from .copier import Copier
from .finding import Found, choose, find, forget_all_but
from .neighbours import Fetch, Neighbours, Ring
from .place import (
    MEMORY,
    FileName,
    check_private,
    directory_of,
    files_in,
    job_of_agent,
    make_directory,
    remove_all_but,
    remove_ended,
    remove_job,
)
from .slots import Slots
from .stored import StoredCheckpoint

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


_log = logging.getLogger("zeroopt")


class Guard:
    """Keeps a copy of each rank's part of a training in memory that outlives its process, so that after a kill it goes on from the last
    step, with equal weights.

        with zeroopt.elastic.Guard(model, optimizer, {"scheduler": scheduler, "sampler": sampler}) as guard:
            step = guard.restore().get("step", 0)
            while step < steps:
                ...
                optimizer.step()
                scheduler.step()
                step += 1
                guard.step(step)

    Whoever starts ranks again (torchrun with `--max-restarts`) has to live on; see `job`. Any number of ranks goes on. At the end of the
    context the memory is given back, unless by an exception: then the next ranks need it.

    Each rank copies its part of the parameters, as exact as they are kept, and of the optimizer's state, to a slot of shared memory, and
    to another one after the next step, so that one is always whole. A thread copies while the next forward and backward run; the next
    step of the optimizer, or with `step_in_backward` the next backward, waits for it. Whatever else changes parameters or state before,
    calls `wait` first. On devices the copy is made within `step`.

    Memory: twice what a rank would write into a checkpoint, 24 Ψ/N bytes with AdamW, in the file system in memory of its host; with several
    hosts as much again for a rank of another one. While a run goes on from copies, a host that comes new, and each of
    three or more, has one slot of every rank until the second copy.

    Collective: every rank calls all methods, but for `wait`.

    Args:
        model, optimizer, extra, rank_extra: as for `zeroopt.checkpoint.save`. What is given is asked for its state in each `step`.
        every: steps between copies.
        between_hosts: where there are several, each copy goes to the next host besides. A thread sends what of it not all ranks have
            (parameters are in all models, unless codes, masters, pipeline stages or DTensors make a difference) while training goes on,
            until the next copy. Then a host may be lost with its memory.
        frozen: copy the parameters that no optimizer trains, too. False: whoever goes on has made them as they were, as from the checkpoint of
            a base model, before `restore`, which compares checksums of them.
        job: names the training, the same on all hosts; each model of a process has a name of its own. None: what torchrun's agent has started
            on this host, for as long as that lives. What a job of a given name leaves stays until `close`, or until `python -m zeroopt elastic
            remove JOB`.
        memory: a file system in memory.

    Raises:
        ConfigError: `every` is less than 1, the name is no name, or is missing without torchrun, or the optimizer is not the model's. On all
            ranks: those of one host have different names.
        StateError: by later calls, when another guard of this process has been made for the job since.
        NotSupportedError: `average_every`, or `frozen=False` where ranks hold different parts (pipeline stages, DTensors).
        CheckpointError: such parts have the same names.
    """

    def __init__(
        self,
        model: ZeroDataParallel,
        optimizer: Optimizers,
        extra: Mapping[str, Any] | None = None,
        *,
        rank_extra: Mapping[str, Any] | None = None,
        every: int = 1,
        between_hosts: bool = True,
        frozen: bool = True,
        job: str | None = None,
        memory: str | os.PathLike[str] = MEMORY,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every has to be at least 1, got {every}")
        self._model, self._optimizers = model, optimizers_of(model, optimizer)
        self._extra, self._rank_extra, self._every, self._frozen = extra, rank_extra, every, frozen
        self._directory = directory_of(job_of_agent() if job is None else job, memory)
        self._group = begin(model, None)
        self._control = ControlGroup(self._group)
        replica = model.replica
        # Whether each rank has all of the model.
        self._is_whole = not replica.mesh_groups and replica.transport.control.size == self._control.size
        self._check_supported()
        self._hosts = ranks_by_host(self._control)
        self._check_names()
        _last_guards[self._directory] = self
        self._is_first_of_host = any(ranks[0] == self._control.rank for ranks in self._hosts)
        self._between: ControlGroup | None = None
        if len(self._hosts) > 1:
            self._between = ControlGroup(second_group(self._group, "connecting for copies between hosts"))
        self._sends = self._between is not None and between_hosts
        if self._is_first_of_host:
            remove_ended(memory)
        self._run = 0  # whose copies there are
        self._is_new_run = True  # which has no number yet
        self._layout: int | None = None  # until somebody has looked for what there is
        self._copier: Copier | None = None
        self._neighbours: Neighbours | None = None
        self._copies = 0  # in the present layout
        self._last_step: int | None = None  # that was copied, or gone on from
        self._left_out: dict[str, int] | None = None  # checksums of what is not copied, once there are any
        self._copying, self._sending = _Background("zeroopt.elastic"), _Background("zeroopt.elastic.hosts")
        self._copying_alike = _Background("zeroopt.elastic.alike")
        in_backward = model.features.step_in_backward is not None
        waits = self._copying_alike.wait, self._copying.wait
        self._waiting = _WaitBeforeChanges(*waits, in_backward=in_backward)
        model.features.features.add(self._waiting)

    def restore(self, *, newer_than: int = -1) -> dict[str, Any]:
        """Go on from the last step of which all ranks have a whole copy; where there is none, as at the first start, change nothing.

        Args:
            newer_than: a step that there is already, loaded from a checkpoint for one, or 0 at the beginning: go on from later ones alone.
                The same on all ranks.

        Returns:
            All extra values, with this rank's own where as many ranks go on, and "step", the number that was given to `step`. An empty
            dict where there is nothing.

        Raises:
            CheckpointError: on all ranks: what was copied is of another model, or beside other frozen parameters, there is no room for what is
                on other hosts, or hosts were lost with both copies of some ranks, and no `newer_than` says from what to go on instead.
                Nothing has been changed.
        """
        self._check_is_last()
        self.wait()
        self._sending.wait()
        self._copier = self._neighbours = None  # whatever comes has a file of its own
        self._copies = 0
        found = together(
            self._group,
            f"looking for copies in {self._directory}",
            lambda: find(self._directory),
            lambda everyone: [choose(everyone, self._hosts)] * len(everyone),
        )
        self._run, self._layout = found.run, found.last_layout
        self._is_new_run = found.step is None or found.step <= newer_than
        if found.has_earlier and self._control.rank == 0:
            _log.warning(
                "copies of an earlier run, which a host has come back with, are left out, and removed: %s",
                self._directory,
            )
        if self._is_new_run:
            self._pass_over(found, newer_than)
            self._keep_only(found, ())
            return {}
        assert found.step is not None
        self._fetch(found)
        what = f"opening the copies in {self._directory}"
        frozen = together(self._group, what, partial(self._has_frozen, found), lambda done: done)
        source = Source(str(self._directory), partial(self._open, found))
        loaded = load_source(
            source, self._group, self._model, self._optimizers, self._extra, self._rank_extra, frozen=frozen
        )
        del source  # which maps what is given back
        self._keep_only(found, found.names)
        self._last_step = found.step
        return {**loaded, "step": found.step}

    def step(self, step: int) -> None:
        """Copy what there is after a step, if its number is a multiple of `every`. The whole copy before stays until this one is whole on all
        ranks. Without a `restore` before, a run begins anew, and what another one has left under the same name is removed; and so it does
        where it has gone back, to a number that is no larger than the one before.

        Args:
            step: its number, the same on all ranks.

        Raises:
            CheckpointError: on all ranks: there is not enough memory, or an extra value cannot be copied.
            CollectiveError: a rank is gone.
        """
        self._check_is_last()
        if step % self._every:
            return
        self.wait()
        self._sending.wait()
        if not self._frozen:
            self._note_left_out()
        entries, packed, is_new = self._take_together(step)
        is_back = self._last_step is not None and step <= self._last_step
        self._last_step = step
        if is_new or is_back:
            self._lay_out(entries, packed, anew=is_back or self._layout is None)
        elif self._copies == 1:
            self._take_second()
        assert self._copier is not None
        start, start_alike = self._copying.start, self._copying_alike.start
        if not all(shard.is_cpu for shard in entries.shards()):
            start = start_alike = _call  # behind the step, on its stream
        if self._neighbours is not None:
            start_alike(self._neighbours.begin())
        start(self._copier.begin(entries, packed, step))
        self._copies += 1
        if self._neighbours is not None:
            parts = [one.future for one in (self._copying_alike, self._copying) if one.future is not None]
            self._sending.start(partial(self._send, parts, step))

    def wait(self) -> None:
        """Return when the last copy is whole on this rank, and what it keeps of others' has no need of its model any more. Not collective."""
        self._copying_alike.wait()
        self._copying.wait()

    def close(self) -> None:
        """Give the memory back, on all hosts."""
        self.wait()
        self._sending.wait()
        self._model.features.features.switch(self._waiting, on=False)
        self._control.barrier("giving copies back")
        self._copier = self._neighbours = None
        is_mine = self._is_first_of_host and _last_guards.get(self._directory) is self
        if is_mine:
            forget_all_but(self._directory, ())
        self._control.barrier("giving copies back")
        if is_mine:
            remove_job(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _check_is_last(self) -> None:
        if _last_guards.get(self._directory) is not self:
            raise StateError(
                f"another Guard of this process has been made for {self._directory} since, whose model's copies would be mixed with those of "
                "this one: give each model a job= of its own"
            )

    def _check_names(self) -> None:
        """Ranks that were started by a program of their own each, a shell for one, would have names of their own. Collective."""
        names = self._control.objects(self._directory.name, "comparing jobs")
        for host in self._hosts:
            if len({names[rank] for rank in host}) > 1:
                told = ", ".join(f"rank {rank} {names[rank]}" for rank in host)
                raise ConfigError(
                    f"expected the ranks of a host to be of one job, got {told}: pass job=, the same name on all ranks"
                )

    def _check_supported(self) -> None:
        """Collective where ranks hold different parts."""
        if self._model.replica.config.average_every is not None:
            raise NotSupportedError(
                "copies in memory are of models that ranks train together: with average_every or an outer_optimizer, use zeroopt.checkpoint"
            )
        if self._is_whole:
            return
        if not self._frozen:
            raise NotSupportedError(
                "frozen=False leaves out what all ranks have: with pipeline stages or tensor parallelism, leave it at True"
            )
        self._parts()  # of which several may have the same names

    # Going on.

    def _pass_over(self, found: Found, newer_than: int) -> None:
        """Raise CheckpointError where something was lost, and nobody has said what else there is to go on from. On all ranks alike."""
        if found.lost is None or found.lost.step <= newer_than:
            return
        ranks = ", ".join(map(str, found.lost.ranks))
        what = f"of step {found.lost.step} there are copies of some ranks, but on no host of rank {ranks}: hosts were lost with both of theirs"
        if newer_than < 0:
            raise CheckpointError(
                f"{what}. Load a checkpoint, and give its step as newer_than, or 0 to begin anew where there is none; to go on from these "
                "copies, bring the hosts back"
            )
        if self._control.rank == 0:
            _log.warning("%s; going on from step %d", what, newer_than)

    def _has_frozen(self, found: Found) -> bool:
        """Whether frozen parameters were copied. Raises CheckpointError where they were not, and are not as they were."""
        expected = self._open(found).left_out
        if expected is None:
            return True
        frozen = frozen_parameters(self._model)
        if frozen.keys() != expected.keys():
            raise CheckpointError(
                f"copies were made beside {len(expected)} frozen parameters that they leave out, and the model has {len(frozen)}, or others"
            )
        for name, checksum in self._mine(frozen):
            if checksum != expected[name]:
                raise CheckpointError(
                    f"{name!r}, which is frozen and not among the copies, is not as it was when they were made: make it so before restore()"
                )
        return False

    def _mine(self, frozen: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
        """This rank's share of the checksums of frozen parameters, which all ranks have alike."""
        for number, (name, param) in enumerate(frozen.items()):
            if number % self._control.size == self._control.rank:
                yield name, checksum_of(param)

    def _note_left_out(self) -> None:
        """Compute the checksums of what is not copied, unless they are of the same parameters. Collective then, on all ranks alike."""
        frozen = frozen_parameters(self._model)
        if self._left_out is None or self._left_out.keys() != frozen.keys():
            shares = self._control.objects(dict(self._mine(frozen)), "computing checksums of what is frozen")
            self._left_out = {name: checksum for share in shares for name, checksum in share.items()}

    def _fetch(self, found: Found) -> None:
        """Bring what is on another host alone to each host. Collective."""
        if not found.to_fetch:
            return
        assert self._between is not None and found.step is not None
        between, directory, step, rank = self._between, self._directory, found.step, self._control.rank
        fetches = [
            Fetch(between, directory / str(name), step, ranks) for name, ranks in found.to_fetch if rank in ranks
        ]

        def look() -> None:
            needed = found.room.get(rank, 0)
            if needed:
                make_directory(directory)
                free = shutil.disk_usage(directory).free
                if needed > free:
                    raise CheckpointError(
                        f"{directory} has {free} bytes left, and copies that are on other hosts take {needed}"
                    )
            for one in fetches:
                one.open()

        def hear() -> None:
            for one in fetches:
                one.hear()

        def make_room() -> None:
            for one in fetches:
                one.make_room()

        def bring() -> None:
            for one in fetches:
                one.bring()

        try:
            for part in (look, hear, make_room, bring):
                together(self._group, f"bringing copies of step {step} to all hosts", part, lambda done: done)
        except BaseException:
            for one in fetches:
                one.give_up()
            raise

    def _open(self, found: Found) -> StoredCheckpoint:
        assert found.step is not None
        parts = [Slots.open(self._directory / str(name)) for name in found.names]
        return StoredCheckpoint(self._directory, found.step, parts)

    # Copying.

    def _take_together(self, step: int) -> tuple[Entries, bytes, bool]:
        """What there is to copy, what of it is no tensor, and whether some rank has no place for it. When it returns, all ranks have the copy
        before, and have sent it, so that none needs the one before that. Collective."""
        error: Exception | None = None
        try:
            entries, packed = self._take()
            outcome = _FITS if self._copier is not None and self._copier.fits(entries, packed) else _IS_NEW
        except Exception as raised:  # noqa: BLE001  the other ranks have to hear of it
            outcome, error = _FAILED, raised
        worst = torch.tensor(outcome, dtype=torch.int64, device=self._control.device)
        told = int(self._control.largest(worst, "copying to memory"))
        if told == _FAILED:
            reason = "on another rank, which says why" if error is None else error
            raise CheckpointError(f"step {step} could not be copied: {reason}") from error
        return entries, packed, told == _IS_NEW

    def _parts(self) -> list[Part]:
        """The parts of the model that process groups hold, on the first rank. Nothing is under way then. Collective where there are several."""

        def mine() -> Part | None:
            self._model.replica.gathers.finish_all()
            for one in self._optimizers:
                one.check_can_save(self._group)
                one.follow_writes()
            is_first = self._model.replica.transport.control.rank == 0
            return describe_part(self._model, self._optimizers) if is_first else None

        def join(parts: list[Part | None]) -> list[list[Part]]:
            return [join_parts([part for part in parts if part is not None]), *[[]] * (len(parts) - 1)]

        if self._is_whole:
            return [part] if (part := mine()) is not None else []
        return together(self._group, "describing what is to be copied", mine, join)

    def _take(self) -> tuple[Entries, bytes]:
        """What there is to copy, and what of it is no tensor. Collective as `_parts`."""
        model, rank, parts = self._model, self._control.rank, self._parts()
        nested = own_contents(model, self._optimizers, frozen=self._frozen)
        facts = None
        residuals, kept = take_out(residual_contents(model))
        side: dict[str, Any] = {residual_file(rank): residuals}
        if rank == 0:
            nested["optimizer"]["param_groups"] = [group for part in parts for group in part.param_groups]
            of_optimizers = [entry for part in parts for entry in part.facts]
            facts = {"world_size": self._control.size, "optimizers": of_optimizers, "runs": list(runs_of(model))}
            facts["frozen"] = self._left_out
            side[EXTRA] = pack_extra(self._extra)
        if self._rank_extra is not None:
            side[rank_file(rank)] = pack_extra(self._rank_extra)
        entries = Entries(nested, kept, is_first=rank == 0)
        values = {key: value for key, value in entries.planner.state_dict.items() if not isinstance(value, Tensor)}
        for name, value in (side | values).items():
            check_plain(value, name)
        return entries, pack({"values": values, "side": side, "facts": facts, "kept": shapes_of(kept)})

    def _lay_out(self, entries: Entries, packed: bytes, *, anew: bool) -> None:
        """Find places anew, in another file, and with `anew`, without what there is. Collective."""
        if anew:
            self._begin_anew()
        elif self._copies:
            self._remove_older()
            for slots in self._slots():
                slots.give_back(all_but=max(slots.steps))
        assert self._layout is not None
        self._layout = layout = self._layout + 1
        self._copies = 0
        rank, alike = self._control.rank, Alike.of(self._model) if self._is_whole else Alike({}, {})
        ring = Ring.of(rank, self._hosts)

        def plan_mine() -> SavePlan:
            return entries.planner.create_local_plan()

        def plan_all(plans: list[SavePlan]) -> list[_Planned]:
            planned, metadata = entries.planner.create_global_plan(plans)
            rings = [Ring.of(rank, self._hosts) for rank in range(len(plans))]
            run = max(time.time_ns(), self._run + 1) if self._is_new_run else self._run
            return [
                _Planned(run, plan, None if rank else metadata, [planned[source] for source in rings[rank].sources])
                for rank, plan in enumerate(planned)
            ]

        def make() -> None:
            path = self._directory / str(FileName(self._run, layout, self._control.size, rank))
            places = Places.of(planned.mine, alike.names, entries.kept, len(packed))
            self._copier = Copier(path, places, planned.metadata, entries)

        def find_neighbours() -> None:
            assert self._between is not None and self._copier is not None
            mine, begin = self._copier.slots, self._copier.alike_end
            places = [Places.of(plan, alike.names) for plan in planned.of_sources]
            self._neighbours = Neighbours(self._between, ring, mine, begin, self._directory, places, alike)

        what = f"making room for copies in {self._directory}"
        planned = together(self._group, what, plan_mine, plan_all)
        self._run, self._is_new_run = planned.run, False
        try:
            together(self._group, what, make, lambda done: done)
            if self._sends:
                together(self._group, what, find_neighbours, lambda done: done)
        except CheckpointError:  # on all ranks, of which some have made room
            self._forget_places()
            raise

    def _forget_places(self) -> None:
        """Whoever goes on without a copy finds places anew, and leaves nothing behind each time."""
        self._copier = self._neighbours = None
        for name in files_in(self._directory) if self._is_first_of_host else ():
            if (name.run, name.layout) == (self._run, self._layout):
                (self._directory / str(name)).unlink(missing_ok=True)

    def _begin_anew(self) -> None:
        """What another run may have left, or this one before it went back, is not to be taken for what comes. Collective."""
        self._copier = self._neighbours = None
        self._keep_only(Found(), ())
        self._is_new_run, self._layout = True, 0

    def _keep_only(self, found: Found, names: Collection[FileName]) -> None:
        """Whoever is killed again and again leaves no more than this: of these files, the slots that a run goes on from. Collective."""

        def forget_mine() -> None:
            if self._is_first_of_host:
                check_private(self._directory)
                forget_all_but(self._directory, names)

        def remove_mine() -> None:
            if not self._is_first_of_host:
                return
            remove_all_but(self._directory, names)
            for name in files_in(self._directory):
                assert found.step is not None
                Slots.open(self._directory / str(name)).give_back(all_but=found.step)

        # First of all, nothing is a copy any more: whoever is killed meanwhile must not leave some of a step on one host, and none on another.
        what = f"removing what is left in {self._directory}"
        together(self._group, what, forget_mine, lambda done: done)
        together(self._group, what, remove_mine, lambda done: done)

    def _take_second(self) -> None:
        """All ranks have a whole copy in the present layout: what another one took is for the next copy. Collective."""
        self._remove_older()

        def take() -> None:
            for slots in self._slots():
                slots.take_second()

        together(self._group, f"making room for copies in {self._directory}", take, lambda done: done)

    def _remove_older(self) -> None:
        """All ranks have a whole copy in the present layout, so that nobody needs another. Collective."""
        assert self._layout is not None
        present = self._run, self._layout

        def remove_mine() -> None:
            for name in files_in(self._directory) if self._is_first_of_host else ():
                if (name.run, name.layout) < present:
                    (self._directory / str(name)).unlink(missing_ok=True)

        together(self._group, f"removing what is left in {self._directory}", remove_mine, lambda done: done)

    def _slots(self) -> list[Slots]:
        """Those that this rank writes: its own, and those of ranks of another host."""
        assert self._copier is not None
        return [self._copier.slots, *([] if self._neighbours is None else self._neighbours.kept)]

    # Sending to another host.

    def _send(self, parts: Sequence[Future[None]], step: int) -> None:
        for part in parts:
            part.result()
        assert self._neighbours is not None
        self._neighbours.exchange(step)


_last_guards: WeakValueDictionary[Path, Guard] = WeakValueDictionary()
"""That this process has made last, by where it copies to."""

_FITS, _IS_NEW, _FAILED = range(3)
"""What ranks tell each other of what they have to copy."""


class _Planned(NamedTuple):
    """run: whose copies are made. mine: the plan of a rank. metadata: of all ranks; None but on the first one. of_sources: plans of the ranks
    whose copies it keeps."""

    run: int
    mine: SavePlan
    metadata: Metadata | None
    of_sources: list[SavePlan]


def _call(work: Callable[[], None]) -> None:
    work()


class _Background:
    """A thread that does one thing at a time."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.future: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin something, after what was begun before has been waited for."""
        assert self.future is None
        self.future = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for what was begun, if anything was, and raise what it has raised."""
        future, self.future = self.future, None
        if future is not None:
            future.result()


class _WaitBeforeChanges(Feature):
    """What changes parameters and state waits until they are copied.

    Args:
        wait_alike: until what other ranks step is copied, which they may change as soon as they have this rank's gradients.
        wait: until all else is.
        in_backward: a backward steps.
    """

    def __init__(self, wait_alike: Callable[[], None], wait: Callable[[], None], *, in_backward: bool) -> None:
        self._wait_alike, self._wait, self._in_backward = wait_alike, wait, in_backward

    def backward_begins(self) -> None:
        """What others step may change in it, and with `in_backward` everything."""
        self._wait_alike()
        if self._in_backward:
            self._wait()

    def before_step(self, step: Step) -> None:
        """Parameters change next."""
        self._wait_alike()
        self._wait()
