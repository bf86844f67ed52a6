"""QEMU's own tests of qemu-img, run with vmconv's front end in its place: `python tests/qemuimg/iotests.py --help`.

The tests are those of the Debian source package of the installed QEMU. They are under the GPL: they are unpacked into a
temporary directory and run there, and nothing of them is in this repository. Each is run with the real qemu-img first;
only what passes there counts.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from qemuimg.accepted import ACCEPTED, BY_QEMU, FORMATS, LEFT_OUT, TESTS

UNPACKED = "VMCONV_QEMU_IOTESTS"
"""Variable with the directory of an unpacked QEMU source package."""

_PROGRAMS = {
    "QEMU_PROG": "qemu-system-x86_64",
    "QEMU_IO_PROG": "qemu-io",
    "QEMU_NBD_PROG": "qemu-nbd",
    "QSD_PROG": "qemu-storage-daemon",
}
_LINE = re.compile(r"^(\S+)\s+(pass|fail|not run)\s+\[")
_SUPPORTED = re.compile(r"^\s*_supported_fmt\s+(.*)|supported_fmts\s*=\s*\[([^\]]*)\]", re.MULTILINE)
_UNSUPPORTED = re.compile(r"^\s*_unsupported_fmt\s+(.*)|unsupported_fmts\s*=\s*\[([^\]]*)\]", re.MULTILINE)


class Outcome(NamedTuple):
    """What became of one test: status, lines that differ from QEMU's, and who answered how many commands."""

    status: str
    differences: tuple[str, ...] = ()


def unpacked(directory: Path) -> Path:
    """Returns the tests of the installed QEMU's source package, unpacked in `directory` by apt."""
    given = os.environ.get(UNPACKED)
    if not given:
        _download(directory)
    tree = Path(given) if given else next(path for path in directory.iterdir() if (path / "tests").is_dir())
    return tree / "tests" / "qemu-iotests"


def _download(directory: Path) -> None:
    """Unpacks the source package with lists of apt's own, so that the machine's are not changed."""
    parts = directory / "parts"
    parts.mkdir(parents=True)
    for number, text in enumerate(_sources()):
        suffix = "sources" if re.search("^Types:", text, re.MULTILINE) else "list"
        (parts / f"{number}.{suffix}").write_text(text)
    for folder in ("lists/partial", "cache"):
        (directory / folder).mkdir(parents=True)
    config = directory / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{parts}";\n'
        f'Dir::State::lists "{directory}/lists";\nDir::Cache "{directory}/cache";\nAPT::Sandbox::User "root";\n'
    )
    env = {**os.environ, "APT_CONFIG": str(config)}
    version = _output(["dpkg-query", "-W", "-f", "${source:Version}", "qemu-utils"])
    # Other sources of this machine may have no source packages.
    subprocess.run(["apt-get", "-qq", "update"], env=env, capture_output=True, check=False)
    subprocess.run(
        ["apt-get", "-qq", "source", f"qemu={version}"], env=env, cwd=directory, capture_output=True, check=True
    )


def _sources() -> Iterator[str]:
    """Yields the machine's own package sources, for source packages."""
    apt = Path("/etc/apt")
    for path in (apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))):
        if not path.is_file():
            continue
        text = path.read_text()
        for block in re.split(r"\n\s*\n", text) if path.suffix == ".sources" else [text]:
            yield (
                re.sub(r"^deb\s", "deb-src ", re.sub(r"^Types:.*$", "Types: deb-src", block, flags=re.M), flags=re.M)
                + "\n"
            )


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def suits(test: Path, format_name: str) -> bool:
    """True if the test says that it is for the format."""
    text = test.read_text(errors="replace")
    supported, unsupported = (
        {word for match in pattern.finditer(text) for word in re.findall(r"[\w-]+", match[1] or match[2] or "")}
        for pattern in (_SUPPORTED, _UNSUPPORTED)
    )
    return format_name not in unsupported and bool({"generic", format_name} & supported)


class Runner:
    """Runs tests in `room`, a directory on a filesystem that shares blocks, with one program as qemu-img."""

    def __init__(self, tests: Path, room: Path, program: str) -> None:
        self.tests = tests
        self.room = room
        self.program = program
        self.log = room / "log"

    def run(self, format_name: str, names: Sequence[str], hand_over: Sequence[str] = ()) -> dict[str, Outcome]:
        """Returns the outcome of each test."""
        folder = self.room / format_name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as sockets:
            env = {
                **os.environ,
                **{name: str(shutil.which(program)) for name, program in _PROGRAMS.items()},
                "QEMU_IMG_PROG": self.program,
                "TEST_DIR": str(folder),
                "SOCK_DIR": sockets,
                "VMCONV_QEMU_IMG_REAL": str(shutil.which("qemu-img")),
                "VMCONV_QEMU_IMG_LOG": str(self.log),
                "VMCONV_QEMU_IMG_HAND_OVER": ",".join(hand_over),
            }
            found: dict[str, Outcome] = {}
            left = list(names)
            while left:
                found.update(self._checked(left, format_name, env))
                left = [name for name in left if name.rpartition("/")[2] not in found]
                # QEMU's program ends at a test whose output is no UTF-8; the others are run without it.
                bad = next((name for name in left if self._bad(name, format_name).exists()), None)
                if bad is None:
                    break
                left.remove(bad)
                base = bad.rpartition("/")[2]
                found[base] = self._outcome("fail", base, names, format_name)
        return found

    def _checked(self, names: Sequence[str], format_name: str, env: Mapping[str, str]) -> dict[str, Outcome]:
        """Returns the outcomes that QEMU's program for its tests prints."""
        done = subprocess.run(
            [sys.executable, "./check", f"-{format_name}", *(name.rpartition("/")[2] for name in names)],
            cwd=self.tests,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        matches = map(_LINE.match, done.stdout.replace("\r", "\n").splitlines())
        return {one[1]: self._outcome(one[2], one[1], names, format_name) for one in matches if one}

    def _bad(self, name: str, format_name: str) -> Path:
        """Returns the file of an output that differs."""
        return self.room / format_name / f"{name.rpartition('/')[2]}.out.bad"

    def _outcome(self, status: str, base: str, names: Sequence[str], format_name: str) -> Outcome:
        if status != "fail":
            return Outcome(status)
        name = next(name for name in names if name.rpartition("/")[2] == base)
        bad = self._bad(name, format_name)
        wanted = next(
            path for path in (self.tests / f"{name}.out.{format_name}", self.tests / f"{name}.out") if path.exists()
        )
        theirs, ours = (
            [line.rstrip() for line in path.read_text(errors="replace").splitlines()] for path in (wanted, bad)
        )
        changed = difflib.unified_diff(theirs, ours, n=0, lineterm="")
        return Outcome(status, tuple(line for line in changed if not re.match(r"---|\+\+\+|@@", line)))

    def answered(self) -> Counter[str]:
        """Returns how many commands vmconv and qemu-img have answered."""
        if not self.log.exists():
            return Counter()
        return Counter(
            "vmconv" if line.startswith("vmconv:") else "qemu-img" for line in self.log.read_text().splitlines()
        )


def unaccepted(name: str, format_name: str, differences: Iterable[str]) -> list[str]:
    """Returns the lines that differ from QEMU's without an accepted reason."""
    patterns = [
        re.compile(one.pattern)
        for one in ACCEPTED
        if (name in one.tests or not one.tests) and (format_name in one.formats or not one.formats)
    ]
    return [line for line in differences if not any(pattern.search(line) for pattern in patterns)]


def compare(
    tests: Path, room: Path, program: str, format_name: str, names: Sequence[str], *, verbose: bool = False
) -> Counter[str]:
    """Runs the tests of one format by both programs, prints what differs, and returns the counts."""
    names = [name for name in names if (tests / name).exists() and suits(tests / name, format_name)]
    names = [name for name in names if (name, format_name) not in LEFT_OUT and (name, "") not in LEFT_OUT]
    if not names:
        return Counter()
    real = Runner(tests, room / "real", str(shutil.which("qemu-img"))).run(format_name, names)
    bases = {name: name.rpartition("/")[2] for name in names}
    sound = [name for name in names if bases[name] in real and real[bases[name]].status == "pass"]
    counts: Counter[str] = Counter({"left out: not for this QEMU": len(names) - len(sound)})
    ours = Runner(tests, room / "ours", program)
    for hand_over in sorted({BY_QEMU.get(name, ()) for name in sound}):
        group = [name for name in sound if BY_QEMU.get(name, ()) == hand_over]
        found = ours.run(format_name, group, hand_over)
        for name in group:
            outcome = found.get(bases[name], Outcome("fail", ("no outcome",)))
            left = unaccepted(name, format_name, outcome.differences)
            word = (
                "same" if outcome.status == "pass" else "accepted" if outcome.differences and not left else "different"
            )
            counts.update([word, "run"])
            if word == "different" or verbose:
                print(f"{format_name} {name}: {word}", *(left or outcome.differences), sep="\n  ", flush=True)
    counts.update({f"commands by {who}": count for who, count in ours.answered().items()})
    return counts


def main() -> int:
    """Runs the tests that the command line names, by default all."""
    parser = argparse.ArgumentParser(description="Runs QEMU's own tests with vmconv's front end as qemu-img.")
    parser.add_argument("--format", action="append", choices=FORMATS, help="only these formats")
    parser.add_argument("--room", type=Path, required=True, help="directory on XFS or Btrfs; several GiB, sparse")
    parser.add_argument("-v", "--verbose", action="store_true", help="print accepted differences, too")
    parser.add_argument("tests", nargs="*", help="only these tests")
    asked = parser.parse_args()
    program = str(Path(sys.executable).with_name("vmconv-qemu-img"))
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        tests = unpacked(Path(directory))
        for format_name in asked.format or FORMATS:
            counts = compare(tests, asked.room, program, format_name, asked.tests or TESTS, verbose=asked.verbose)
            print(
                f"{format_name}: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}", flush=True
            )
            total.update(counts)
    print(f"all: {', '.join(f'{count} {what}' for what, count in sorted(total.items()))}")
    return 1 if total["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
