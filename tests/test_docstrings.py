"""Docstrings of everything public say what goes in, what comes out and what is raised; their examples run.

Public is what the packages in PUBLIC export: what their `__all__` names, or, without one, what they define under a name
without an underscore. Of a class, its methods and properties are public as well.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import statecodec
from statecodec import errors
from statecodec.errors import UsageError

ROOT = Path(statecodec.__file__).parent
PUBLIC = (
    "statecodec", "statecodec.choose", "statecodec.codecs", "statecodec.codecs.plain", "statecodec.distributed",
    "statecodec.distributed.on_ray", "statecodec.errors", "statecodec.format", "statecodec.integrations.accelerate",
    "statecodec.integrations.lightning", "statecodec.integrations.transformers", "statecodec.kernels",
    "statecodec.kernels.reference", "statecodec.kernels.reference.steps", "statecodec.layouts",
    "statecodec.operations", "statecodec.optim", "statecodec_client",
)  # fmt: skip
SAME_AS_REFERENCE = ("statecodec.kernels.cpu", "statecodec.kernels.triton")  # functions of the same names
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)} | {"ServiceError"}
NOTHING = (None, "None", inspect.Signature.empty)


def with_examples() -> list[str]:
    """Names of the modules with examples; found by reading, so that nothing is imported for it."""
    files = (p.relative_to(ROOT.parent).with_suffix("") for p in sorted(ROOT.rglob("*.py")) if ">>> " in p.read_text())
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def exported(module: ModuleType) -> dict[str, Any]:
    """What a package exports, without constants and type aliases."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    values = {name: getattr(module, name) for name in names}
    return {name: v for name, v in values.items() if inspect.isclass(v) or inspect.isroutine(inspect.unwrap(v))}


def members(kind: type) -> dict[str, Any]:
    """The public methods and properties that a class defines itself."""
    plain = (getattr(value, "__func__", getattr(value, "func", value)) for value in vars(kind).values())
    found = {name: value for name, value in zip(vars(kind), plain, strict=True) if not name.startswith("_")}
    return {n: v for n, v in found.items() if isinstance(v, property) or inspect.isroutine(inspect.unwrap(v))}


def section(text: str, name: str) -> str | None:
    """The lines of a section, with the indentation of its entries removed; None if there is none."""
    found = re.search(rf"^{name}:\n((?:[ ].*\n?|\n)+)", text, re.MULTILINE)
    return textwrap.dedent(found[1]) if found else None


def entries(text: str, name: str) -> list[str]:
    """The names that a section explains."""
    return re.findall(r"^\*{0,2}(\w+):", section(text, name) or "", re.MULTILINE)


def undocumented(names: list[str], text: str) -> list[str]:
    return [name for name in names if name not in entries(text, "Args")]


def raised(function: Any) -> set[str]:
    """Our errors that the function's own lines raise."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = (node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return {call.id for call in calls if isinstance(call, ast.Name)} & ERRORS


def function_gaps(function: Any, bases: tuple[type, ...] = ()) -> Iterator[str]:
    """What the docstring of a function lacks. A method may leave to the class above what is said there."""
    overridden = [base for base in bases if function.__name__ in vars(base)]
    above = [inspect.unwrap(vars(base)[function.__name__]) for base in overridden]
    function = inspect.unwrap(function)
    texts = [inspect.cleandoc(f.__doc__) for f in (function, *above) if f.__doc__]
    if not texts:
        yield "no docstring"
        return
    if any(not base.__module__.startswith("statecodec") for base in overridden):
        return  # another package says what goes in and what comes out
    signature = inspect.signature(function)
    parameters = [name for name in signature.parameters if name not in ("self", "cls")]
    if missing := min((undocumented(parameters, text) for text in texts), key=len):
        yield f"Args lacks {', '.join(missing)}"
    gives = bool(parameters) and signature.return_annotation not in NOTHING
    if gives and not any(section(text, "Returns") or section(text, "Yields") for text in texts):
        yield "no Returns"
    documented = {name for text in texts for name in entries(text, "Raises")}
    if unnamed := raised(function) - documented:
        yield f"Raises lacks {', '.join(sorted(unnamed))}"
    if unknown := documented - ERRORS - {*vars(builtins)}:
        yield f"Raises has {', '.join(sorted(unknown))}, which is no error"


def class_gaps(kind: type) -> Iterator[str]:
    text = inspect.cleandoc(kind.__doc__ or "")
    if not text:
        yield "no docstring"
    if dataclasses.is_dataclass(kind):
        parameters = [f.name for f in dataclasses.fields(kind) if f.init and not f.name.startswith("_")]
    elif inspect.isfunction(init := vars(kind).get("__init__")) and not getattr(kind, "_is_protocol", False):
        parameters = [name for name in inspect.signature(init).parameters if name != "self"]
    else:
        parameters = []
    if missing := undocumented(parameters, text):
        yield f"Args lacks {', '.join(missing)}"
    if stale := set(entries(text, "Args")) - set(parameters):
        yield f"Args has {', '.join(sorted(stale))}, which is no parameter"


def gaps(name: str, value: Any) -> Iterator[str]:
    """What the docstrings of an exported function or class lack."""
    if not inspect.isclass(value):
        yield from (f"{name}: {gap}" for gap in function_gaps(value))
        return
    yield from (f"{name}: {gap}" for gap in class_gaps(value))
    for key, member in members(value).items():
        if isinstance(member, property):
            own = member.__doc__ or any(getattr(vars(b).get(key), "__doc__", None) for b in value.__mro__[1:])
            yield from () if own else (f"{name}.{key}: no docstring",)
        else:
            yield from (f"{name}.{key}: {gap}" for gap in function_gaps(member, value.__mro__[1:]))


@pytest.mark.parametrize("package", PUBLIC)
def test_everything_public_is_documented(package: str) -> None:
    try:
        module = importlib.import_module(package)
    except (ImportError, errors.BackendUnavailable) as error:
        pytest.skip(f"{package}: {error}")
    found = [gap for name, value in exported(module).items() for gap in gaps(name, value)]
    assert not found, "\n".join([f"{len(found)} gaps in {package}", *found])


def test_every_package_that_exports_is_listed() -> None:
    exporting = {p.parent for p in ROOT.rglob("__init__.py") if "__all__ = [" in p.read_text()}
    names = {".".join(folder.relative_to(ROOT.parent).parts) for folder in exporting}
    assert names <= {*PUBLIC, *SAME_AS_REFERENCE}


def test_gaps_are_found() -> None:
    def add(a: int, b: int) -> int:  # noqa: D417
        """Add two numbers.

        Args:
            a: One number.

        Raises:
            NegativeError: Never.
        """
        if a < 0:
            raise UsageError("negative")
        return a + b

    @dataclasses.dataclass
    class Sum:
        """A sum.

        Args:
            terms: Numbers.
        """

        numbers: tuple[int, ...]

    assert list(function_gaps(add)) == [
        "Args lacks b", "no Returns", "Raises lacks UsageError", "Raises has NegativeError, which is no error",
    ]  # fmt: skip
    assert list(class_gaps(Sum)) == ["Args lacks numbers", "Args has terms, which is no parameter"]


@pytest.mark.parametrize("name", with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_there_are_some() -> None:
    assert {"statecodec.names", "statecodec.optim.cast_model", "statecodec.optim.groups"} <= set(with_examples())
