"""The case of a web server: a qcow2 image, half of it payload, from nginx on this machine to raw and to VHDX."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench import HASTY, VMCONV, Bench
from correct import same_as
from images import GIB, Place, command, random_raw
from measure import BenchmarkError, Contender

_PIECE = 16 << 20


def remote(bench: Bench, place: Place) -> None:
    """Payload crosses the loopback interface; the other half of the disk is not asked for."""
    if not (shutil.which("nginx") and shutil.which("curl")):
        raise BenchmarkError("needs nginx (Debian: nginx-light) and curl")
    size = bench.size // 2
    with place.scratch("half.raw", "web.qcow2", "made.img", "nginx.conf", "nginx.pid") as (raw, image, made, conf, pid):
        random_raw(raw, size)
        for at in range(_PIECE, size, 2 * _PIECE):
            command("fallocate", "--punch-hole", "--offset", str(at), "--length", str(_PIECE), raw)
        command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        with _served(os.path.dirname(image), conf, pid) as address:
            url = f"{address}/{os.path.basename(image)}"
            for target in ("raw", "vhdx"):
                _remote(bench, place, raw, url, made, target, size)


def _remote(bench: Bench, place: Place, raw: str, url: str, made: str, target: str, size: int) -> None:
    ours = [VMCONV, "convert", "-q", "-f", "qcow2", "-O", target]
    # QEMU 7.2 stalls on URLs: after 55 s it had made 30 of 256 MiB.
    script = 'curl -sf -o "$2" "$1" && qemu-img convert -W -m 16 -f qcow2 -O "$3" "$2" "$4" && rm "$2"'
    theirs = ["sh", "-c", script, "sh", url, f"{made}.download", target, made]
    contenders = [
        Contender("vmconv", [*ours, url, made], target=made, check=same_as(raw, "raw", target)),
        Contender(HASTY, [*ours, "-t", "unsafe", url, made], target=made, durable=False),
        Contender("curl, then qemu-img -W -m 16", theirs, target=made, durable=False),
    ]
    title = f"qcow2 on a web server -> {target}, {size / GIB:.3g} GiB, half of it payload"
    measured = bench.measure("remote", place, title, contenders)
    bench.at_least(measured, f"{title}: at least as fast", "vmconv", contenders[2].name, 1, hasty=HASTY)


@contextmanager
def _served(directory: str, conf: str, pid: str) -> Iterator[str]:
    """Yields the address of a web server of a directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""
    with open(conf, "w") as file:
        file.write(
            f"daemon off; {user} pid {pid}; error_log /dev/null; events {{}}\n"
            f"http {{ access_log off; sendfile on; keepalive_requests 100000;\n"
            f"server {{ listen 127.0.0.1:{port}; root {directory}; }} }}\n"
        )
    server = subprocess.Popen(["nginx", "-c", conf], stdin=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
