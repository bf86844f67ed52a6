"""The case of an object store: a random disk published as qcow2 in OpenStack Swift, beside an upload by curl."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bench import VMCONV, Bench
from images import GIB, Place, command, random_raw
from measure import BenchmarkError, Contender
from support.swift import Swift

_MOST_RUNS = 3
"""Each upload is as long as all of the payload."""


def swift(bench: Bench, place: Place) -> None:
    """One payload in the store, from there and from its local file as another format; and all of it sent."""
    with tempfile.TemporaryDirectory(dir=bench.work) as directory:
        store = Swift(Path(directory))
        os.environ |= {"OS_STORAGE_URL": store.storage_url, "OS_AUTH_TOKEN": store.token()}
        try:
            for container in ("images", "first"):
                if store.request("PUT", f"/{container}").status != 201:
                    raise BenchmarkError(f"{container}: was not made")
            _swift(bench, place, store)
        finally:
            del os.environ["OS_STORAGE_URL"], os.environ["OS_AUTH_TOKEN"]
            store.close()


def _swift(bench: Bench, place: Place, store: Swift) -> None:
    raw = place.path("payload.raw")
    # The store's device is small.
    random_raw(raw, GIB)
    images, first = (f"swift://-/{container}" for container in ("images", "first"))
    publish = [VMCONV, "publish", "-q", "--force"]
    command(*publish, raw, f"{images}/disk.raw")
    made = place.path("made.qcow2")
    script = 'qemu-img convert {} -f raw -O qcow2 "$1" "$2" && curl -sf -T "$2" -H "X-Auth-Token: $3" "$4" && rm "$2"'
    given = ["sh", raw, made, store.token(), f"{store.storage_url}/images/theirs.qcow2"]
    # What the last run sent is removed, so that each sends all.
    again = f"{VMCONV} unpublish {first}/made.qcow2; sleep 2; {VMCONV} unpublish --unused --older-than=0s {first}"
    # The old object would take space until the new one is there.
    delete = f"curl -sf -X DELETE -H 'X-Auth-Token: {store.token()}' {store.storage_url}/images/theirs.qcow2"
    contenders = [
        Contender(
            "vmconv, payload in the store", [*publish, "--zero-copy=require", f"{images}/disk.raw", f"{images}/a.qcow2"]
        ),
        Contender("vmconv, local file sent before", [*publish, "--zero-copy=require", raw, f"{images}/b.qcow2"]),
        Contender(
            "vmconv, all sent", [*publish, raw, f"{first}/made.qcow2"], before=["sh", "-c", f"({again}) || true"]
        ),
        *(
            Contender(
                f"{' '.join(['qemu-img', *fast])}, then curl",
                ["sh", "-c", script.format(" ".join(fast)), *given],
                before=["sh", "-c", f"{delete} || true"],
            )
            for fast in ([], ["-W", "-m", "16"])
        ),
    ]
    title = "raw -> qcow2 in Swift, 1 GiB of payload"
    measured = bench.measure("swift", place, title, contenders, runs=min(bench.runs, _MOST_RUNS))
    for contender, other in itertools.product(contenders[:2], contenders[3:]):
        share = measured.median(contender.name) / measured.median(other.name)
        bench.at_most(measured, f"{title}, {contender.name}: of {other.name}", share, 0.1, "x")
