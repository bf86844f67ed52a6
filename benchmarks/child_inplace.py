"""Child: times one conversion in place in a process that has already made one, without the time that syncing takes.

Arguments: SOURCE TARGET TINY-SOURCE TINY-TARGET. Prints what it measured as json.
"""

from __future__ import annotations

import json
import os
import sys
import time

from vmconv.api import convert

source, target, tiny_source, tiny_target = sys.argv[1:]
fsync = os.fsync
synced: list[float] = []


def timed(descriptor: int) -> None:
    start = time.perf_counter()
    fsync(descriptor)
    synced.append(time.perf_counter() - start)


with open(tiny_source, "wb") as file:
    file.write(os.urandom(1 << 20))
convert(tiny_source, tiny_target, in_place=True, keep_undo=True, force=True)
os.unlink(f"{tiny_target}.vmconv-undo")
os.fsync = timed  # type: ignore[assignment]
began = time.perf_counter()
convert(source, target, in_place=True, keep_undo=True)
print(json.dumps({"inner_seconds": time.perf_counter() - began - sum(synced)}))
