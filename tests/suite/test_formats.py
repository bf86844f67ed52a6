"""A folder of tests/formats selects all tests of its format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FORMATS = sorted(path.name for path in (TESTS / "formats").iterdir() if list(path.glob(f"test_{path.name}.py")))


def collected(*folders: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    paths = [str(Path("tests/formats", folder)) for folder in folders]
    done = subprocess.run([*command, *paths], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_a_folder_has_the_shared_tests_of_its_format_and_no_others() -> None:
    own = {name: collected(name) for name in ("qcow2", "vhd")}
    assert not own["qcow2"] & own["vhd"]
    for name, tests in own.items():
        shared = {test for test in tests if "/shared/" in test}
        # By its mark, as an option of a test by its name, by QEMU's name of it.
        assert any("test_check.py" in test and "[" not in test for test in shared), name
        assert any("test_metadata.py" in test for test in shared), name
        assert any("test_check.py::test_payload_that_is_used_twice" in test for test in shared) == (name == "vhd")
        assert shared <= collected("shared")
