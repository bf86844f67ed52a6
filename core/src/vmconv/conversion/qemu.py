"""Verifies a result with `qemu-img compare`, an independent reader.

The result's files have no names yet, so QEMU opens them through a directory of links with their final names. Formats
and parents are passed explicitly, so that QEMU probes nothing and reads the same chain.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmconv.conversion.readback import bytes_to_read
from vmconv.errors import UsageError, VerifyError
from vmconv.interface.scheme import STANDARD_INPUT
from vmconv.io.known import qemu_name
from vmconv.model.image import Image

if TYPE_CHECKING:
    from vmconv.conversion.verify import Made
    from vmconv.io.registry import Registry

_PROGRAM = "qemu-img"
_SECONDS = 600
_SLOWEST = 10 << 20
"""Bytes per second of the slowest storage that the timeout allows for."""

Node = Mapping[str, Any]
"""A block node as QEMU's JSON file names describe it."""


def refuse_impossible(made: Sequence[Made], registry: Registry) -> None:
    """Raises `UsageError` unless qemu-img is installed and reads both sides of each container as vmconv does."""
    if shutil.which(_PROGRAM) is None:
        raise UsageError(
            f"--verify=qemu needs the program {_PROGRAM}, which is not in PATH",
            hint="install it (Debian: qemu-utils), or use --verify=bytes",
        )
    for one in made:
        for image in (*one.container.source.chain(), one.image, *_kept_layers(one)):
            _refuse_image(image, registry)
        _name(one.container.name)


def _refuse_image(image: Image, registry: Registry) -> None:
    if image.file.is_remote or image.file.path == STANDARD_INPUT:
        raise UsageError(f"--verify=qemu: {image.file.path} is no file that QEMU can open", hint="use --verify=bytes")
    why = registry.format(image.format_name).qemu_incompatibility(image)
    if why:
        raise UsageError(f"--verify=qemu: {image.file.name}: {why}", hint="use --verify=bytes")
    _name(image.file.path)


def _name(path: str) -> str:
    """Returns the path. Raises `UsageError` if it is not UTF-8, which QEMU's JSON needs."""
    try:
        path.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"--verify=qemu: {path!r} is not UTF-8, which QEMU's JSON needs") from exc
    return path


def compare(made: Sequence[Made]) -> None:
    """Raises `VerifyError` unless QEMU reads the same bytes in each result as in its source."""
    nodes: dict[str, Node] = {}
    with _links(made) as directory:
        for one in made:
            below = nodes[one.below.container.name] if one.below else _chain(_kept_layers(one))
            file = {"driver": "file", "filename": os.path.join(directory, one.container.name)}
            found = _node(one.image.format_name, file, below)
            nodes[one.container.name] = found
            wanted = _chain(list(one.container.source.chain()))
            _run(one, wanted, found, directory)


def _kept_layers(one: Made) -> list[Image]:
    """Returns the source's layers below the result."""
    container = one.container
    return list(container.disk.parent.chain()) if container.backing and container.disk.parent and not one.below else []


def _chain(layers: Sequence[Image]) -> Node | None:
    node: Node | None = None
    for layer in reversed(layers):
        driver = "host_device" if layer.file.is_device else "file"
        file = {"driver": driver, "filename": os.path.abspath(_name(layer.file.path))}
        node = _node(layer.format_name, file, node)
    return node


def _node(format_name: str, file: Node, below: Node | None) -> Node:
    node = {"driver": qemu_name(format_name), "file": file}
    return {**node, "backing": below} if below else node


@contextmanager
def _links(made: Sequence[Made]) -> Iterator[str]:
    """Yields a directory of links by final name to the results' files and to those they refer to."""
    with tempfile.TemporaryDirectory(prefix="vmconv-verify-") as directory:
        for one in made:
            for out, file in zip(one.container.layout.files, one.files, strict=True):
                link = os.path.join(directory, out.name or one.container.name)
                os.symlink(f"/proc/{os.getpid()}/fd/{file.descriptor}", link)
            for reference in one.container.layout.references:
                _link_reference(directory, reference.name, reference.file.path)
        yield directory


def _link_reference(directory: str, name: str, path: str) -> None:
    """Links a relative name of the result to the file of the source."""
    link = os.path.join(directory, os.path.normpath(name))
    if not os.path.isabs(name) and not os.path.lexists(link):
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(os.path.abspath(path), link)


def _run(one: Made, wanted: Node | None, found: Node, directory: str) -> None:
    import json

    name = one.container.name
    formats = one.container.source.format_name, one.image.format_name
    # -U: vmconv holds the locks of these files, and checks for changes afterwards.
    command = [_PROGRAM, "compare", "-U", "-f", qemu_name(formats[0]), "-F", qemu_name(formats[1])]
    command += [f"json:{json.dumps(node)}" for node in (wanted, found)]
    seconds = _SECONDS + bytes_to_read(one.sides) // _SLOWEST
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            cwd=directory,
            # Our message quotes the output.
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise VerifyError(f"{name}: {_PROGRAM} compare did not end within {seconds} s") from exc
    except OSError as exc:
        raise VerifyError(f"{name}: {_PROGRAM} cannot be run: {exc.strerror}") from exc
    if done.returncode == 0:
        return
    said = (done.stderr if done.returncode != 1 else done.stdout).decode(errors="replace").strip().splitlines()
    what = "the result differs from the source" if done.returncode == 1 else "the result cannot be compared"
    raise VerifyError(f"{name}: {what}, says {_PROGRAM}: {said[-1] if said else done.returncode}")
