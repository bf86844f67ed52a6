"""The program: `vmconv` and `python -m vmconv`. What makes it start and end quickly is here and not in the library."""

from __future__ import annotations

import gc
import os
import sys
from types import ModuleType
from typing import Any, NoReturn


class _NDArray:
    """Stands for `numpy.typing.NDArray`, which says something to type checkers only."""

    def __class_getitem__(cls, _item: object) -> type[_NDArray]:
        return cls


_SELDOM_USED: dict[str, dict[str, Any]] = {
    "cmd": {},
    "ctypes": {},
    # argparse has each of its words translated, of which there are no translations.
    "gettext": {
        "gettext": lambda text: text,
        "ngettext": lambda one, many, n: one if n == 1 else many,
    },
    "hashlib": {},
    "numpy._typing": dict.fromkeys(("ArrayLike", "DTypeLike", "NBitBase", "NDArray"), _NDArray),
    "numpy._typing._add_docstring": {"_docstrings": ""},
    "pdb": {},
    "pickle": {},
    "platform": {"system": lambda: os.uname().sysname},
    "tokenize": {},
    "traceback": {},
}
"""What numpy, construct, inspect and argparse import at once, for parts of them that hardly any run comes to; with what
every run asks of it."""

_DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")
"""Give what numpy has written in C its docstrings, which takes a tenth of its import."""


class _Postponed(ModuleType):
    """Stands for a module until something of it is asked for; then that is imported."""

    def __getattr__(self, name: str) -> Any:
        from importlib import import_module

        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        self.__dict__.update(vars(import_module(self.__name__)))
        if name not in self.__dict__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self.__dict__[name]


def run() -> NoReturn:
    """Runs the command that the command line names and ends the process with its exit code."""
    # What is imported stays: to look through it for garbage, again and again, takes a tenth of the time.
    gc.set_threshold(50_000)
    for name, known in _SELDOM_USED.items():
        if name not in sys.modules:
            sys.modules[name] = _Postponed(name)
            # Of a module from which names are imported it is asked whether it is a package.
            if known:
                vars(sys.modules[name]).update(known, __path__=())
    for name in _DOCSTRINGS:
        sys.modules.setdefault(name, ModuleType(name))
    from vmconv.cli.main import main

    try:
        code = main()
    except SystemExit as exc:
        # From argparse, which has said what there is to say.
        code = exc.code if isinstance(exc.code, int) else 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process at once: taking all modules apart again takes longer than sharing a disk.

    What a command makes is closed and durable when it returns, and its threads have ended.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Who read it has gone.
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run()
