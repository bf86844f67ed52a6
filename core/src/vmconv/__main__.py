"""The program: `vmconv` and `python -m vmconv`. Holds tricks for a fast start and exit that no library may use."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from vmconv.system.platforms import refusal


class _NDArray:
    """Replaces `numpy.typing.NDArray`, which only type checkers use."""

    def __class_getitem__(cls, _item: object) -> type[_NDArray]:
        return cls


_SELDOM_USED: dict[str, dict[str, Any]] = {
    "cmd": {},
    "ctypes": {},
    # argparse looks up a translation of each of its words. There are none.
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
"""Modules that numpy, construct, inspect and argparse import at once and that few runs need, with the attributes that
every run reads."""

_DOCSTRINGS = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars")
"""Modules that set the docstrings of numpy's C code, a tenth of numpy's import time."""


class _Postponed(ModuleType):
    """A module that is imported when one of its attributes is read."""

    def __getattr__(self, name: str) -> Any:
        from importlib import import_module

        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        self.__dict__.update(vars(import_module(self.__name__)))
        if name not in self.__dict__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self.__dict__[name]


def run() -> NoReturn:
    """Runs the command of the command line and ends the process with its exit code."""
    _prepare("vmconv")
    from vmconv.cli.main import main

    _end(main)


def run_qemu_img() -> NoReturn:
    """Runs the command of the command line as qemu-img, and ends the process with its exit code."""
    _prepare("qemu-img")
    from vmconv.cli.qemu_img.front import main

    _end(main)


def _prepare(program: str) -> None:
    refused = refusal()
    if refused:
        sys.exit(f"{program}: {refused}")
    # Imported modules stay alive. Searching them for garbage again and again takes a tenth of the run.
    gc.set_threshold(50_000)
    for name, known in _SELDOM_USED.items():
        if name not in sys.modules:
            sys.modules[name] = _Postponed(name)
            # `from module import name` reads `__path__` to see whether the module is a package.
            if known:
                vars(sys.modules[name]).update(known, __path__=())
    for name in _DOCSTRINGS:
        sys.modules.setdefault(name, ModuleType(name))


def _end(main: Callable[[], int]) -> NoReturn:
    try:
        code = main()
    except SystemExit as exc:
        # argparse has printed the message.
        code = exc.code if isinstance(exc.code, int) else 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process without interpreter shutdown, which takes longer than sharing a disk.

    Safe because a command's outputs are closed and durable, and its threads ended, when it returns.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # The reader has closed the pipe.
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run()
