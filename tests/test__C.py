"""The stub of the compiled module says what is in it: `zeroopt/_C.pyi` is all that type checkers see of it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import zeroopt
from zeroopt import _C

STUB = ast.parse(Path(zeroopt.__file__).with_name("_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {
    node.name: node
    for node in STUB.body
    if isinstance(node, ast.ClassDef) and not any(ast.unparse(base) == "TypedDict" for base in node.bases)
}
OF_PYTHON = {*dir(object), "__module__", "__buffer__", "__release_buffer__"}  # the last two from Python 3.12 on


def arguments(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    """Their names, and whether they may be left out. Without `self`."""
    named = function.args.posonlyargs + function.args.args
    optional = [False] * (len(named) - len(function.args.defaults)) + [True] * len(function.args.defaults)
    return [(arg.arg, may) for arg, may in zip(named, optional, strict=True) if arg.arg != "self"]


def compiled_arguments(function: object) -> list[tuple[str, bool]] | None:
    """The same of what pybind11 has made, which writes a signature into the docstring. C's own methods tell nothing of theirs."""
    told = re.match(r"\w+\((.*)\)( -> .*)?\n", f"{inspect.getdoc(function)}\n")
    if told is None:
        return None
    [parsed] = ast.parse(f"def f({re.sub(r'<[^<>]*>', '...', told[1])}): ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return arguments(parsed)


def test_names_are_those_of_the_compiled_module() -> None:
    assert {name for name in vars(_C) if not name.startswith("__")} == set(FUNCTIONS) | set(CLASSES)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_take_what_the_stub_says(name: str) -> None:
    assert compiled_arguments(getattr(_C, name)) == arguments(FUNCTIONS[name])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_have_what_the_stub_says(name: str) -> None:
    methods = {node.name: node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)}
    attributes = {ast.unparse(node.target) for node in CLASSES[name].body if isinstance(node, ast.AnnAssign)}
    compiled = getattr(_C, name)
    members = {member for member in vars(compiled) if member not in OF_PYTHON and not member.startswith("_pybind")}
    assert members == (set(methods) | attributes) - OF_PYTHON
    for member, node in methods.items():
        if hasattr(compiled, member) and not any(
            ast.unparse(decorator) == "property" for decorator in node.decorator_list
        ):
            assert compiled_arguments(getattr(compiled, member)) in (None, arguments(node)), member


@pytest.mark.parametrize(
    ("name", "value"), [("BuildInfo", _C.build_info()), ("OptimizerFacts", _C.optimizers()["adamw"])]
)
def test_dictionaries_have_the_keys_of_the_stub(name: str, value: dict[str, object]) -> None:
    [node] = (node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == name)
    assert set(value) == {ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)}
