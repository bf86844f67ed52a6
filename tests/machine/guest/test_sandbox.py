"""Hostile filesystems, and readers that they have taken over: neither harms vmconv."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.disks import MIB
from support.guest_systems import filesystem, write_tree
from support.requirements import another_user, missing, oracle_module
from support.windows_guests import hive, ntfs
from vmconv.errors import ReadError
from vmconv.guest import Facts, Task, Volume, look, parent, sandbox
from vmconv.guest.protocol import ANSWER, LENGTH, READ, REQUEST
from vmconv.model.extents import Extents
from vmconv.testing import image_file

ATTEMPTS = """
import os, signal, socket, sys, ctypes, json
from vmconv.guest.sandbox import confine
libc = ctypes.CDLL(None, use_errno=True)
confine()
def tried(what):
    try:
        what()
    except Exception as exc:
        return type(exc).__name__
    return "done"
def call(*given):
    if libc.syscall(*given) < 0:
        raise OSError(ctypes.get_errno(), "")
said = {
    "open": tried(lambda: os.open("/", os.O_RDONLY)),
    "socket": tried(lambda: socket.socket()),
    "pipe": tried(os.pipe),
    "fork": tried(os.fork),
    "root": tried(lambda: os.setuid(0)),
    "kill": tried(lambda: os.kill(os.getppid(), signal.SIGCONT)),
    "exec": tried(lambda: os.execv(sys.executable, ["python"])),
    "limit": tried(lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_NOFILE, (64, 64))),
    "memory": tried(lambda: bytearray(2 << 30)),
    "trace": tried(lambda: call(101, 16, os.getppid(), 0, 0)),
    "mount": tried(lambda: call(165, 0, 0, 0, 0, 0)),
}
os.write(1, json.dumps(said).encode())
os.close(1)
os.read(0, 1)
os._exit(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("user", [0, 1000], ids=["root", "user"])
def test_a_confined_process_can_do_nothing(user: int) -> None:
    prefix = another_user(user) if user else ()
    # Modules imported after the confinement can no longer be opened.
    preloaded = f"import resource\n{ATTEMPTS}"
    command = [*prefix, sys.executable, "-c", preloaded]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        said = json.loads(child.stdout.read())
        status = Path(f"/proc/{child.pid}/status").read_text()
    assert {name: what for name, what in said.items() if what == "done"} == {}
    own = user or 65534
    assert f"Uid:\t{own}\t{own}\t{own}\t{own}\n" in status
    assert "NoNewPrivs:\t1\nSeccomp:\t2\n" in status


LEFT = (
    "read write close fstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn sched_yield "
    "mremap madvise getpid sendto recvfrom exit futex clock_gettime exit_group getrandom"
)
HEADERS = {"x86_64": "*/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}


@pytest.mark.parametrize("architecture", HEADERS)
def test_the_numbers_of_the_calls_are_those_of_the_kernel(architecture: str) -> None:
    header = next(Path("/usr/include").glob(HEADERS[architecture]), None)
    if header is None:
        missing("oracle", "the kernel's headers (linux-libc-dev) are not installed")
        return
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    names = LEFT if architecture == "x86_64" else LEFT.replace(" poll ", " ppoll ")
    assert sandbox._CALLS[architecture][1] == tuple(int(numbers[name]) for name in names.split())


TASK = Task((Volume(0, 0, 0, MIB, "ext"),), ("virtio_blk",), ())


def disk(content: bytes) -> Extents:
    return Extents.whole(image_file(content))


def answered(*sent: bytes, then: str = "") -> Facts:
    """Returns the facts of a child that sends these bytes, whatever it is asked."""
    script = f"import os\nfor each in {sent!r}:\n    os.write(0, each)\n{then}"
    return look([disk(bytes(MIB))], TASK, command=[sys.executable, "-S", "-c", script])


OTHER_FORM = "their reader gave an answer of another form"


@pytest.mark.parametrize(
    ("sent", "then", "said"),
    [
        ((), "os.abort()", "their reader was ended by SIGABRT"),
        ((), "os._exit(3)", "their reader ended with status 3"),
        ((b"x",), "", "their reader ended with status 0"),
        ((REQUEST.pack(READ, 1, 0, 1),), "os.read(0, 1)", "their reader asked for what is not on the disks"),
        ((REQUEST.pack(READ, 0, MIB, 1),), "os.read(0, 1)", "their reader asked for what is not on the disks"),
        ((REQUEST.pack(READ, 0, 0, 2 * MIB),), "os.read(0, 1)", "their reader asked for what is not on the disks"),
        ((REQUEST.pack(9, 0, 0, 0),), "os.read(0, 1)", "their reader asked for what is not on the disks"),
        ((REQUEST.pack(ANSWER, 0, 0, 1 << 30),), "os.read(0, 1)", "their reader asked for what is not on the disks"),
        ((REQUEST.pack(ANSWER, 0, 0, 2) + b"{}",), "", ""),
        ((REQUEST.pack(ANSWER, 0, 0, 2) + b"[]",), "", OTHER_FORM),
        ((REQUEST.pack(ANSWER, 0, 0, 16) + b'{"systems":[{}]}',), "", OTHER_FORM),
        ((REQUEST.pack(ANSWER, 0, 0, 2) + b"\xff\xff",), "", OTHER_FORM),
    ],
    ids=[
        *("abort", "status", "part", "disk", "end", "length", "kind", "answer-length"),
        *("empty", "list", "fields", "bytes"),
    ],
)
def test_a_reader_that_breaks_the_rules_is_a_problem_and_no_more(sent: tuple[bytes, ...], then: str, said: str) -> None:
    found = answered(*sent, then=then)
    assert found.systems == ()
    assert [one.text for one in found.problems] == ([said] if said else [])


def test_a_reader_that_sleeps_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "_PATIENCE", 0.2)
    assert "did not answer" in answered(then="import time\ntime.sleep(1000)").problems[0].text


def test_a_reader_may_read_only_so_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    oracle_module("pyfsext")
    tree = write_tree(tmp_path / "tree", {"etc/fstab": "x" * 100_000})
    data = filesystem(tmp_path / "fs", "ext4", tree, 8 * MIB).read_bytes()
    task = TASK._replace(volumes=(Volume(0, 0, 0, 8 * MIB, "ext"),))
    assert len(look([disk(data)], task).systems) == 1
    monkeypatch.setattr(parent, "MAX_READ", 64 << 10)
    found = look([disk(data)], task)
    assert (found.systems, [one.text for one in found.problems]) == ((), ["too much would have to be read"])


def test_an_error_of_storage_is_no_problem_of_the_guest() -> None:
    class Failing:
        size = MIB

        def read(self, offset: int, length: int) -> bytes:
            raise ReadError("disk.raw: input/output error")

    oracle_module("pyfsext")
    with pytest.raises(ReadError):
        look([Failing()], TASK)  # type: ignore[list-item]


class Sound(dict[str, bytes]):
    """Filesystems by their kind."""

    def __repr__(self) -> str:
        # hypothesis shows arguments, and these are large.
        return "sound"


class Damaged:
    """A disk with a few other bytes."""

    def __init__(self, data: bytes, changes: dict[int, bytes]) -> None:
        self._data, self._changes, self.size = data, changes, len(data)

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(self._data[offset : offset + length])
        for at, change in self._changes.items():
            for position, byte in enumerate(change, at - offset):
                if 0 <= position < len(found):
                    found[position] = byte
        return bytes(found)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """A small filesystem of each kind."""
    directory = tmp_path_factory.mktemp("sound")
    lines = "".join(f"kernel/{n}/driver{n}.ko:\n" for n in range(2000))
    tree = write_tree(
        directory / "tree", {"etc/fstab": "/dev/sda1 / ext4 x 0 0\n", "usr/lib/modules/1/modules.dep": lines}
    )
    keys: dict[str, dict[str, int | str]] = {
        "Select": {"Current": 1},
        "ControlSet001\\Services\\viostor": {"Start": 0},
    }
    registry = hive(directory / "SYSTEM", keys).read_bytes()
    windows = write_tree(directory / "windows", {"Windows/System32/config/SYSTEM": registry})
    return Sound(
        ntfs=ntfs(directory / "ntfs", windows, 8 * MIB).read_bytes(),
        ext=filesystem(directory / "ext", "ext4", tree, 4 * MIB).read_bytes(),
        xfs=filesystem(directory / "xfs", "xfs", tree, 300 * MIB).read_bytes(),
    )


@settings(max_examples=18, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["ext", "xfs", "ntfs"]),
    changes=st.lists(
        st.tuples(st.integers(0, 255), st.integers(0, 4095), st.binary(min_size=1, max_size=8)), max_size=20
    ),
)
def test_damaged_filesystems_end_in_facts(kind: str, changes: list[tuple[int, int, bytes]], sound: Sound) -> None:
    for name in ("pyfsxfs", "pyfsntfs", "pyregf"):
        oracle_module(name)
    damaged = Damaged(sound[kind], {block * 4096 + offset: change for block, offset, change in changes})
    task = Task((Volume(0, 0, 0, damaged.size, kind),), ("virtio_blk",), ("viostor",))
    found = look([damaged], task)  # type: ignore[list-item]
    assert isinstance(found, Facts)
    if not changes:
        assert len(found.systems) == 1


def test_the_protocol_is_read_whole(tmp_path: Path) -> None:
    """Pieces of a socket may be of any length."""
    oracle_module("pyfsext")
    script = f"""
import os, struct
first = os.read(0, 4)
(length,) = struct.unpack("<I", first)
while length:
    length -= len(os.read(0, length))
for each in {REQUEST.pack(READ, 0, 5, 3)!r}:
    os.write(0, bytes([each]))
got = b""
while len(got) < {LENGTH.size} + 3:
    got += os.read(0, 1)
assert got[{LENGTH.size}:] == b"abc", got
os.write(0, {REQUEST.pack(ANSWER, 0, 0, 2) + b"{}"!r})
"""
    found = look([disk(b"12345abc")], TASK, command=[sys.executable, "-c", script])
    assert found == Facts()
