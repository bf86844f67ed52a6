"""The case of backups: a machine in a repository of restic, restored for another hypervisor or seen before that."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench import VMCONV, Bench, vmconv
from correct import same_as
from images import GIB, Place, command
from measure import BenchmarkError, Contender

_PATIENCE = 60
_DISK = 10 * GIB
_VIEW = "vmconv mount, until QEMU has opened it"
_USUAL = "restic restore, qemu-img convert"


def backups(bench: Bench, place: Place) -> None:
    """A qcow2 of 10 GiB for its guest, as VHDX: what people do today, converted from the mount, and as a view."""
    if not shutil.which("restic"):
        print("backups: restic is not installed")
        return
    payload = min(bench.size, GIB)
    machine, repository, point, shown = (place.path(name) for name in ("vm", "repository", "mounted", "shown"))
    for directory in (machine, point, shown):
        os.mkdir(directory)
    original = os.path.join(machine, "web.qcow2")
    _disk(bench, place, original, payload)
    os.environ["RESTIC_PASSWORD"] = "benchmark"
    restic = ["restic", "-q", "-r", repository, "--no-cache"]
    command(*restic, "init")
    command(*restic, "backup", machine)
    with _mounted([*restic, "mount", point], point), place.scratch("new.vhdx") as (target,):
        source = f"{point}/snapshots/latest{machine}/web.qcow2"
        check = same_as(original, "qcow2", "vhdx")
        contenders = [
            Contender(_VIEW, ["sh", "-c", _VIEW_SCRIPT, "-", VMCONV, os.path.dirname(source), shown]),
            vmconv(source, target, check=check),
            Contender(
                _USUAL,
                ["sh", "-c", _USUAL_SCRIPT, "-", repository, place.path("restored"), machine, target],
                target,
                durable=False,
                check=check,
            ),
        ]
        title = f"qcow2 in restic -> VHDX, {payload / GIB:.3g} GiB of payload"
        measured = bench.measure("backups", place, title, contenders, min(bench.runs, 3))
    for name, limit in ((_VIEW, 0.2), ("vmconv", 1)):
        value = measured.times_faster(_USUAL, name)
        bench.at_most(measured, f"{name}: in restoring and converting", value, limit, "x")
    for directory in (machine, repository, point, shown):
        shutil.rmtree(directory)


_VIEW_SCRIPT = (
    '"$1" mount --fork "$2" "$3" && qemu-img info -f vhdx "$3/web.qcow2/vhdx/web.vhdx" >&2; fusermount3 -u -z "$3"'
)
_USUAL_SCRIPT = (
    'restic -q -r "$1" --no-cache restore latest --target "$2" && '
    'qemu-img convert -f qcow2 -O vhdx -W -m 16 "$2$3/web.qcow2" "$4" && rm -r "$2"'
)


def _disk(bench: Bench, place: Place, path: str, payload: int) -> None:
    raw = bench.random(place)
    with place.scratch("part.raw") as (part,):
        command("cp", "--reflink=always", raw, part)
        os.truncate(part, payload)
        os.truncate(part, _DISK)
        command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", part, path)


@contextmanager
def _mounted(arguments: list[str], point: str) -> Iterator[None]:
    """Keeps a repository mounted."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + _PATIENCE
            while not os.path.ismount(point):
                if process.poll() is not None or time.monotonic() > until:
                    raise BenchmarkError(f"{' '.join(arguments)}: does not get ready")
                time.sleep(0.05)
            yield
        finally:
            command("fusermount3", "-u", "-z", point)
            process.wait()
