"""What a test needs of the machine: it is skipped without it, or fails where `VMCONV_REQUIRE` asks for it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

REQUIRED = frozenset(filter(None, os.environ.get("VMCONV_REQUIRE", "").split(",")))

CORPUS = Path(os.environ.get("VMCONV_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))


def missing(what: str, reason: str) -> None:
    """Skips the test, or fails it when this run requires what is missing."""
    if what in REQUIRED:
        pytest.fail(f"{reason}, and VMCONV_REQUIRE asks for {what}")
    pytest.skip(reason)


def oracle_module(name: str) -> ModuleType:
    """Returns a module that we did not write, to ask for a second opinion."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        missing("oracle", f"{name}: {exc}")
        raise


def oracle_program(name: str) -> str:
    """Returns the path of a program that we did not write, to ask for a second opinion."""
    # Programs of Python packages lie beside the interpreter.
    program = shutil.which(name, path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        missing("oracle", f"{name} is not installed")
    return str(program)


@cache
def oracle_driver(name: str) -> str:
    """Returns the name of a driver of QEMU's; distributions have those for the network in a package of its own."""
    asked = subprocess.run(
        [oracle_program("qemu-img"), "info", f'json:{{"driver": "{name}"}}'],
        capture_output=True,
        text=True,
        check=False,
    )
    if f"Unknown driver '{name}'" in asked.stderr:
        missing("oracle", f"qemu-img has no driver {name}")
    return name


@cache
def another_user(number: int) -> tuple[str, ...]:
    """Returns what to put in front of a command to run it as this user; skips where such a user cannot run Python."""
    prefix = ("setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups")
    done = subprocess.run([*prefix, sys.executable, "-c", "import vmconv, numpy"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"other users may not read what is installed below {sys.prefix}")
    return prefix
