"""Parameters that are taken in or let go while training goes on: unfrozen ones, further groups, and groups edited by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..admission.group_edits import GroupEdit, GroupMembers, inspect_edit
from ..admission.matrix_splits import apply_splits
from ..collectives.control import lone_control
from ..errors import StateError
from ..options.config import check_param_dtypes
from ..plan.agreement import agree
from ..plan.params import ManagedParam
from ..state.whole_tensors import whole_states
from ..stepping.stepper import check_fused
from ..trained import Trained
from .captures import Captures


class Growth:
    """Keeps what is trained as `param_groups` say.

    It is asked at the beginning of every call of an optimizer, which is why it is no `Feature`: most calls are no steps.

    Args:
        check_now: raises where what it is told cannot be done now, as within `join()`.
        changed: is called when parameters have come or gone.
        captures: sees CUDA graphs; None where there are none.
    """

    def __init__(
        self,
        trained: Trained,
        check_now: Callable[[str], None],
        changed: Callable[[], None],
        captures: Captures | None = None,
    ) -> None:
        self._trained = trained
        self._replica = trained.replica
        self._check_now = check_now
        self._changed = changed
        self._captures = captures
        self._members = GroupMembers()

    def begin(self, params: Sequence[ManagedParam]) -> None:
        """Have the first parameters trained. Collective."""
        self._trained.extend(params)
        self._note_groups()

    def _note_groups(self) -> None:
        trained = self._trained
        self._members.note(trained.inner.param_groups)
        managed = {m.param for m in trained.params}
        own = {p for group in trained.inner.param_groups for p in group["params"]}
        self._frozen = [(n, p) for n, p in self._replica.module.named_parameters() if p in own and p not in managed]
        trained.attach_buckets()

    def check_frozen(self) -> None:
        """Raise StateError when a parameter that did not require gradients at the last forward, and so is in no bucket, has one."""
        for name, param in self._frozen:
            if param.grad is not None:
                raise StateError(
                    f"parameter {name!r} was frozen and has got a gradient of this rank alone; unfreeze parameters before a "
                    "forward of the model that zeroopt.wrap returned, with gradients enabled"
                )

    def is_edited(self) -> bool:
        """Whether `param_groups` are no longer what is trained."""
        return self._members.differ(self._trained.inner.param_groups)

    def follow_groups(self, *, unfrozen: bool = False) -> None:
        """Go by `param_groups` as they are. Collective where they have been edited since the last time: every rank has to make the
        same of them.

        Args:
            unfrozen: have parameters trained that were frozen and now require gradients, too; collective where there are any.

        Raises:
            ConfigError, NotSupportedError: they cannot be trained as they are. Nothing has been changed.
            StateError: parameters are gone, and a CUDA graph still reads them. Nothing has been changed.
            RankMismatchError: they were edited in another way on another rank; on all ranks. Nothing has been changed.
        """
        if self.is_edited() or (unfrozen and any(param.requires_grad for _, param in self._frozen)):
            self.take_up_groups()

    def take_up_groups(self, problem: Exception | None = None) -> None:
        """Collective.

        Args:
            problem: what is wrong on this rank, if anything is.
        """
        what = "taking up param_groups"
        self._check_now(what)
        trained, replica = self._trained, self._replica
        # Told through the transport, which notices when another rank goes on to something else.
        device = trained.params[0].param.device
        replica.transport.gather_scalar(torch.ones((), dtype=torch.float32, device=device), label="edited param_groups")
        edit = GroupEdit()
        if problem is None:
            try:
                edit = inspect_edit(
                    replica.module,
                    trained.inner,
                    replica.params,
                    trained.params,
                    self._members,
                    trained.config.placement.home,
                )
                if self._captures is not None:
                    if edit.gone:
                        self._captures.check_may_leave()
                    if edit.new:
                        self._captures.check_may_replace_state("taking up parameters")
                replica.count_copies(edit.new)
                check_param_dtypes(trained.config, {managed.name: managed.param.dtype for managed in edit.new})
                check_fused(trained.inner, [*edit.places, *edit.new], trained.config)
                apply_splits(trained.inner, edit.new, trained.config)
            except Exception as error:  # noqa: BLE001  whatever it is, the other ranks have to hear of it
                problem = error
        groups = [(replica.control, edit.lines), *((group, []) for group in replica.mesh_groups)]
        agree(groups, problem, what)
        self._apply(edit)

    def _apply(self, edit: GroupEdit) -> None:
        """Collective."""
        trained = self._trained
        begun = [managed for managed in trained.params if managed.position in trained.state_dicts.begun]
        if edit.gone:
            self._take_out(edit.gone)
        for managed, (group, position) in edit.places.items():
            managed.group, managed.position = group, position
        trained.state_dicts.begun = {managed.position for managed in begun if managed in edit.places}
        if edit.new:
            for index, managed in enumerate(edit.new, len(self._replica.params)):
                managed.index = index
            trained.extend(edit.new)
        self._note_groups()
        if edit.gone or edit.new:
            self._changed()

    def _take_out(self, params: Sequence[ManagedParam]) -> None:
        """Train parameters no longer: they keep their values, their gradients and, as under torch, their state. Collective."""
        trained, replica = self._trained, self._replica
        gone = set(params)
        replica.reducer.finish()
        grads = replica.reducer.view.as_under_torch(params)
        is_local = replica.reducer.has_local_gradients
        cut = [segment for segment in trained.segments() if segment.owner in gone]
        control = lone_control() if replica.ownership.has_all else replica.transport.control
        states = whole_states(trained.state_dicts.with_masters(), cut, params, control)
        replica.take_out(gone)
        for segment in cut:
            trained.inner.state.pop(segment.shard, None)
        for managed in params:
            if managed in states:
                trained.inner.state[managed.param] = states[managed]
            managed.param.grad = grads[managed]
        if is_local:
            replica.reducer.untrained.mark({managed.param for managed in params})
        trained.keep([managed for managed in trained.params if managed not in gone])
