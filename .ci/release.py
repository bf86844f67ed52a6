"""Builds sdists and wheels of all distributions and checks them. Uploads nothing.

    python .ci/release.py            a release; docs/generate.py --release has been run before
    python .ci/release.py --trial    the same of what is not released yet

Everything is built twice, with other times of files, and must be equal, byte for byte. `SHA256SUMS` has the digests.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = [ROOT / "core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]


def build(source: Path, out: Path) -> None:
    """Builds the sdist of a distribution, and its wheel from the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{source}: {done.stdout}{done.stderr}")


def build_again(source: Path, out: Path) -> None:
    """Builds both from a copy with other times and modes of files, the wheel without the sdist."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        # hatchling puts it into sdists.
        shutil.copy(ROOT / ".gitignore", directory)
        shutil.copytree(source, copy, copy_function=shutil.copyfile)
        build_flags = ["--no-isolation", "--sdist", "--wheel", "--outdir", str(out), str(copy)]
        subprocess.run([sys.executable, "-m", "build", *build_flags], check=True, capture_output=True)


def digests(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def refuse_unreleased() -> None:
    """Ends the run if changes are in no release, or the changelog does not begin with the version."""
    fragments = list((ROOT / "changelog.d").glob("*.*.md"))
    if fragments:
        sys.exit(f"{len(fragments)} fragments in changelog.d are in no release: run docs/generate.py --release")


def built_twice(out: Path) -> dict[str, str]:
    """Builds everything into `out`; ends the run if a second build differs."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        again = Path(directory)
        for _ in pool.map(build, DISTRIBUTIONS, [out] * len(DISTRIBUTIONS)):
            pass
        for _ in pool.map(build_again, DISTRIBUTIONS, [again] * len(DISTRIBUTIONS)):
            pass
        first, second = digests(out), digests(again)
    differ = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if differ:
        sys.exit(f"a second build differs: {', '.join(differ)}")
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds all distributions and checks them. Uploads nothing.")
    parser.add_argument("--trial", action="store_true", help="build changes that are in no release too")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "dist", help="a new directory (dist)")
    given = parser.parse_args()
    if not given.trial:
        refuse_unreleased()
    # Files of another version must not be uploaded with these.
    if given.out.exists() and any(given.out.iterdir()):
        sys.exit(f"{given.out} is not empty")
    given.out.mkdir(exist_ok=True)
    # The time of all files in the archives. hatchling has one of its own if none is given.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")
    found = built_twice(given.out)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *given.out.iterdir()], check=True)
    (given.out / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in found.items()))
    print(f"{given.out}: {len(found)} files, built twice and equal; SHA256SUMS has their digests")


if __name__ == "__main__":
    main()
