"""`vmconv plugin new`: the skeleton of a format plugin, which passes the conformance kit.

The texts in `vmconv/skeleton` are the example of docs/plugins.md, the format "toy".
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator

from vmconv.cli.options import formatter
from vmconv.cli.verbs import Verb
from vmconv.errors import UsageError

_NAME = re.compile(r"[a-z][a-z0-9]{1,15}")
_MAGIC = 7
"""Bytes of the signature before the version."""


def files(name: str) -> Iterator[tuple[str, str]]:
    """Yields the path and the text of each file of a plugin for the format `name`."""
    skeleton = os.path.join(os.path.dirname(os.path.dirname(__file__)), "skeleton")
    magic = f"{name.upper()}DISK"[:_MAGIC].ljust(_MAGIC, "_")
    for entry in sorted(os.listdir(skeleton)):
        with open(os.path.join(skeleton, entry), encoding="utf-8") as file:
            text = file.read().replace("TOYDISK", magic).replace("Toy", name.capitalize()).replace("toy", name)
        path = entry.removesuffix(".txt").replace("src-", f"src/vmconv_{name}/").replace("tests-", "tests/")
        yield path.replace("toy", name), text


def _check(name: str) -> None:
    """Raises `UsageError` for a name that a plugin cannot have, or that would clash with another format."""
    from vmconv.io.known import known_format, known_suffix
    from vmconv.io.registry import installed

    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a format: 2 to 16 lower case letters and digits, a letter first")
    if name in installed().all_formats or known_format(name) or known_suffix(f"x.{name}"):
        raise UsageError(f"{name!r} is the name or the suffix of another format", hint="choose another name")


def _run(options: argparse.Namespace) -> int:
    import shutil
    import tempfile

    _check(options.name)
    target = options.directory or f"vmconv-{options.name}"
    if os.path.lexists(target):
        raise UsageError(f"{target} exists", hint="name another directory with --directory")
    # A directory with some of the files would be taken for a plugin.
    new = tempfile.mkdtemp(dir=os.path.dirname(target) or ".", prefix=".vmconv-")
    try:
        for path, text in files(options.name):
            os.makedirs(os.path.dirname(os.path.join(new, path)), exist_ok=True)
            with open(os.path.join(new, path), "x", encoding="utf-8") as file:
                file.write(text)
        os.chmod(new, 0o777 & ~_umask())
        os.rename(new, target)
    except BaseException:
        shutil.rmtree(new)
        raise
    print(f"{target}: a plugin for the format {options.name}, with its tests")
    print(f"next: pip install 'vmconv[testing]' -e {target} && pytest {target}/tests")
    return 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    new = verbs.add_parser("new", help="write the skeleton of a format plugin", formatter_class=formatter)
    new.description = (
        "Writes a distribution with a reader, a writer, a check, options, a command and tests of a small format:\n"
        "a header, then the disk. It passes the conformance kit as it is. docs/plugins.md explains it."
    )
    new.add_argument("name", metavar="NAME", help="name of the format: 2 to 16 lower case letters and digits")
    new.add_argument("--directory", metavar="DIR", help="directory to make (default: vmconv-NAME)")


VERB = Verb(
    "Helps to write a plugin.", _configure, _run, "example:\n  vmconv plugin new acme\n  pytest vmconv-acme/tests"
)
