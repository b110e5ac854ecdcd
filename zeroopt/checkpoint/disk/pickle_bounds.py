"""Pickles that take no more memory than there is in them: looked through before anything is made of them.

A few bytes of a pickle can stand for a great deal: a number under which something is noted makes room for as many, what was noted is
copied again and again, `bytearray` makes as many bytes as it is told, and the hash of a tuple in a tuple in a tuple overflows the stack
of the process. No pickler writes such a thing.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

_BYTES_OF_ONE = 64  # what is made of a byte of a pickle, at most; an empty dict is
_BYTES_AT_LEAST = 1 << 20
_BYTES_OF_ELEMENT = 8
_DEPTH = 1000  # of tuples in each other; Python itself gives up there

_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "INST", "OBJ"}
_EXTENDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}
_GATHERING = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "LIST", "DICT"}
_GETTING = {"GET", "BINGET", "LONG_BINGET"}
_PUTTING = {"PUT", "BINPUT", "LONG_BINPUT"}
_MAKES_AS_TOLD = {"builtins bytearray", "__builtin__ bytearray"}


class _Value:
    """What is known of a value without making it.

    Attributes:
        bytes: that a copy of it takes, without what is in its elements.
        parts: of a tuple, its elements.
        depth: how many tuples are in each other.
        argument: of a number, text or name, itself.
    """

    __slots__ = ("argument", "bytes", "depth", "parts")

    def __init__(self, argument: Any = None, parts: Sequence[_Value] = ()) -> None:
        self.argument, self.parts = argument, parts
        self.bytes = len(argument) if isinstance(argument, (str, bytes)) else _BYTES_OF_ELEMENT * len(parts)
        self.depth: int = 1 + max([part.depth for part in parts]) if parts else 0


_MARK = _Value()
_SMALL = _Value()  # any number of a byte or two, None, True and False: most of what is in a pickle


class _Move(NamedTuple):
    """What an operation does to the stack.

    Attributes:
        to_mark: whether it takes all down to a mark.
        taken: how many values it takes, below that mark.
        gives: whether it puts one there.
    """

    to_mark: bool
    taken: int
    gives: bool

    @staticmethod
    def of(operation: pickletools.OpcodeInfo) -> _Move:
        before = operation.stack_before
        to_mark = pickletools.markobject in before
        return _Move(
            to_mark, before.index(pickletools.markobject) if to_mark else len(before), bool(operation.stack_after)
        )


_MOVES = {operation.name: _Move.of(operation) for operation in pickletools.opcodes}
_SMALL_NUMBERS = {"BININT1", "BININT2", "NONE", "NEWTRUE", "NEWFALSE"}


def check_pickle(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Look through one pickle, and give its operations, by name and argument, as far as they are harmless. Nothing is made of them.

    Args:
        file: at the pickle's first byte; afterwards behind its last one.

    Raises:
        UnpicklingError: it would take more than 64 bytes of memory a byte and 1 MB, or is nested too deeply, or its operations do not
            belong together.
        ValueError: it is no pickle, or cut off.
    """
    scan = _Scan()
    for operation, argument, position in pickletools.genops(file):
        scan.follow(operation.name, argument, position or 0)
        yield operation.name, argument


class _Scan:
    """The unpickler's stack and notes, with what is known of their values."""

    def __init__(self) -> None:
        self._stack: list[_Value] = []
        self._notes: dict[int, _Value] = {}
        self._copied = 0

    def follow(self, name: str, argument: Any, size: int) -> None:
        """Do what an operation does to stack and notes; `size`: bytes before it."""
        try:
            if name == "MEMOIZE":
                self._notes[len(self._notes)] = self._stack[-1]
            elif name in _SMALL_NUMBERS:
                self._stack.append(_SMALL)
            elif name in _GETTING:
                self._stack.append(self._notes[int(argument)])
            elif name in _PUTTING:
                self._note(int(argument), size)
            elif name == "MARK":
                self._stack.append(_MARK)
            else:
                self._compute(name, argument, size)
        except LookupError as error:
            raise pickle.UnpicklingError(f"{name} after {size} bytes takes what is not there") from error

    def _note(self, place: int, size: int) -> None:
        if not 0 <= place <= size:
            raise pickle.UnpicklingError(f"it notes something under {place}, with {size} bytes before")
        self._notes[place] = self._stack[-1]

    def _compute(self, name: str, argument: Any, size: int) -> None:
        move = _MOVES[name]
        taken = self._take(move)
        if name in _CALLS:
            self._stack.append(self._call(taken, size))
        elif name in _EXTENDING:
            taken[0].bytes += _BYTES_OF_ELEMENT * (len(taken) - 1)
            self._stack.append(taken[0])
        elif name in _GATHERING:
            made = _Value(parts=taken)
            if made.depth > _DEPTH:
                raise pickle.UnpicklingError(f"it has more than {_DEPTH} tuples in each other")
            self._stack.append(made)
        elif name == "DUP":
            self._stack += taken * 2
        elif move.gives:
            if name == "STACK_GLOBAL":
                argument = " ".join(str(one.argument) for one in taken)
            self._stack.append(_Value(argument))

    def _take(self, move: _Move) -> list[_Value]:
        """What an operation takes, the lowest first, without a mark."""
        stack = self._stack
        marked: list[_Value] = []
        if move.to_mark:
            while stack[-1] is not _MARK:
                marked.append(stack.pop())
            stack.pop()
        if move.taken > len(stack):
            raise IndexError
        below = stack[len(stack) - move.taken :]
        del stack[len(stack) - move.taken :]
        return below + marked[::-1]

    def _call(self, taken: Sequence[_Value], size: int) -> _Value:
        """Count what a call may copy: its arguments, each of them, and bytes without any content that are told by their number."""
        arguments = [part for value in taken for part in (value, *value.parts)]
        copied = sum([value.bytes for value in arguments])
        if taken and taken[0].argument in _MAKES_AS_TOLD:
            copied += sum(max(value.argument, 0) for value in arguments if isinstance(value.argument, int))
        self._copied += copied
        if self._copied > _BYTES_OF_ONE * size + _BYTES_AT_LEAST:
            raise pickle.UnpicklingError(f"its first {size} bytes would become {self._copied} bytes in memory")
        made = _Value()
        made.bytes = copied
        return made
