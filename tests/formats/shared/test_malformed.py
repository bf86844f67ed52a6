"""Malformed images of every format, as files and in a process of their own: what each command does, and what it costs.

What the conformance kit tries in memory and by the thousand is tried here as users would meet it.
"""

from __future__ import annotations

import fcntl
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, make_disk
from support.kits import kit as kit_of
from support.malformed import names, names_with_parents
from vmconv.errors import VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.layout import Backing, Placement
from vmconv.testing import disk_of, make_in_memory
from vmconv.testing.malformed import KINDS, SOON, Malformed, time_limit
from vmconv.testing.memory import MemoryFile

MUCH_MEMORY = 500 << 20
"""Bytes that a process may have resident at most; 100 MiB of them are Python and numpy."""

FICLONE = 0x40049409

CHILD = """
import os, resource, sys, time
from vmconv import api
from vmconv.errors import VmconvError

directory, name, suffix = sys.argv[1:]
target = os.path.join(directory, "target.raw")
operations = {
    "info": lambda path: api.info(path, format_name=name),
    "map": lambda path: api.map_disk(path, format_name=name),
    "check": lambda path: api.check(path, format_name=name),
    "convert": lambda path: api.convert(path, target, source_format=name, force=True),
}
# So that what goes wrong ends this process and not the machine.
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for image in sorted(os.listdir(directory)):
    if not image.endswith(suffix):
        continue
    for operation, run in operations.items():
        began, said = time.process_time(), "done"
        try:
            run(os.path.join(directory, image))
        except VmconvError as exc:
            assert len(str(exc).splitlines()) == 1, str(exc)
            said = "refused"
        print(image, operation, said, time.process_time() - began, flush=True)
    if os.path.exists(target):
        os.unlink(target)
# The most that was ever resident; getrusage would tell that of the parent, which this process once was.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak) << 10)
"""


def write_images(name: str, directory: Path) -> int:
    """Writes some images of each kind and each way to write the format, and returns how many."""
    kit, suffix, count = kit_of(name), installed().formats[name].suffixes[0], 0
    for seed, variant in enumerate(kit.each_variant()):
        sample = kit.sound(variant)
        sound = directory / f"sound-{seed}"
        sound.write_bytes(sample.data)
        for kind, maker in KINDS.items():
            chosen = islice(maker(sample, random.Random(100 + seed), kit.seal), seed, None, 19)
            for number, malformed in enumerate(chosen):
                path = directory / f"{kind.replace(' ', '_')}-{seed}-{number}{suffix}"
                write(path, malformed, sound if malformed.data is sample.data else None)
                count += 1
    return count


def write(path: Path, malformed: Malformed, sound: Path | None) -> None:
    """Writes an image; its unchanged blocks are those of `sound`."""
    with path.open("wb") as file:
        if sound:
            with sound.open("rb") as base:
                fcntl.ioctl(file, FICLONE, base.fileno())
            for at, value in malformed.changes:
                file.seek(at)
                file.write(value)
        else:
            file.write(malformed.content())
        file.truncate(malformed.size or len(malformed.data))


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_no_command_fails_in_another_way_or_takes_much_time_or_memory(xfs_dir: Path, name: str) -> None:
    suffix = installed().formats[name].suffixes[0]
    count = write_images(name, xfs_dir)
    command = [sys.executable, "-c", CHILD, str(xfs_dir), name, suffix]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1000)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    results = [line.split() for line in lines]
    assert len(results) == 4 * count
    assert {said for _, _, said, _ in results} == {"done", "refused"}
    assert max(float(seconds) for *_, seconds in results) < 2 * SOON
    assert int(last.removeprefix("peak ")) < MUCH_MEMORY


def layer(base: Path, path: Path, name: str, parent: str) -> None:
    """Writes an empty layer on the disk in `base` that says that its parent is the file `parent`."""
    one = installed().formats[name]
    with Opener(installed()) as opener:
        below = opener.image(str(base))
        top = disk_of(Extents.filled(below.size, Kind.HOLE), MemoryFile("top", 0), parent=below)
        layout = one.write(top, one.options()(), Placement(512, path.name), backing=Backing(parent, name))
        _, files = make_in_memory(layout, top)
        path.write_bytes(files[-1].read(0, files[-1].size))


@pytest.mark.parametrize("name", names_with_parents())
@pytest.mark.parametrize("parents", [{"one": "one"}, {"one": "two", "two": "one"}], ids=["itself", "each other"])
def test_a_chain_that_comes_back_to_itself_is_refused(tmp_path: Path, name: str, parents: dict[str, str]) -> None:
    suffix = installed().formats[name].suffixes[0]
    raw, base = make_disk(tmp_path / "disk.raw", MIB), tmp_path / f"base{suffix}"
    vmconv.convert(str(raw), str(base))
    for child, parent in parents.items():
        layer(base, tmp_path / f"{child}{suffix}", name, f"{parent}{suffix}")
    with time_limit(), pytest.raises(VmconvError) as caught:
        vmconv.convert(str(tmp_path / f"one{suffix}"), str(tmp_path / "flat.raw"))
    # Where parents have identities, a file that becomes the parent of its own parent no longer matches.
    assert len(str(caught.value).splitlines()) == 1
    assert len(parents) == 2 or "loop" in str(caught.value)
    assert not (tmp_path / "flat.raw").exists()
