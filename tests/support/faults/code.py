"""Code that is wrong for a while: functions of a loaded module run with one line of their source replaced."""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["Change", "changed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """``old``, which is in the source of ``module`` exactly once, becomes ``new``.

    Attributes:
        module: below ``qie``, such as ``compiler.graphs.vae``.
        old, new: source inside functions.
    """

    module: str
    old: str
    new: str


@contextmanager
def changed(change: Change) -> Iterator[None]:
    """Inside the block, every function of the module runs as if its source were the changed one.

    Whoever has imported a function runs the changed one too, because the function stays and its code is exchanged.
    """
    module = importlib.import_module(f"qie.{change.module}")
    file = inspect.getfile(module)
    source = Path(file).read_text(encoding="utf-8")
    assert source.count(change.old) == 1, (change.module, change.old, source.count(change.old))
    compiled = compile(source.replace(change.old, change.new), file, "exec", dont_inherit=True)
    exchanged = [
        (function, function.__code__, code)
        for code in _functions(compiled)
        if (function := _live(module, code.co_qualname)).__code__ != code
    ]
    assert exchanged, f"{change.new!r} changes no function"
    for function, _, code in exchanged:
        function.__code__ = code
    try:
        yield
    finally:
        for function, code, _ in exchanged:
            function.__code__ = code


def _functions(code: CodeType) -> Iterator[CodeType]:
    """The code of the functions of a module and of the methods of its classes."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant.co_name[0] != "<":
            if constant.co_flags & inspect.CO_NEWLOCALS:
                yield constant
            else:
                yield from _functions(constant)


def _live(module: ModuleType, qualname: str) -> FunctionType:
    """The function ``qualname`` of a loaded module, without its decorators."""
    found: Any = module
    for name in qualname.split("."):
        found = vars(found)[name]
    found = getattr(found, "fget", None) or inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(found, FunctionType), qualname
    return found
