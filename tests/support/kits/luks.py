"""The conformance kit of LUKS; cryptsetup makes the containers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from support.luks_images import PASSPHRASE, QUICK1, QUICK2, QUICK_ARGON, container, filled, key_of, seal
from vmconv.testing import ReaderTests, Sample, patterned
from vmconv_luks import Luks

_SIZE = 1 << 18
_KINDS = {"1": QUICK1, "2": QUICK2, "argon2": QUICK_ARGON}


@cache
def _made(kind: str) -> Sample:
    disk = patterned(_SIZE, [(0, 4096), (_SIZE - 8192, 8192)])
    with tempfile.TemporaryDirectory() as folder:
        key = key_of(32)
        path = container(Path(folder), *_KINDS[kind], key=key, size=_SIZE)
        data = filled(path, disk.read(0, _SIZE), key).read_bytes()
    if kind == "1":
        return Sample(data, [(0, 592)])
    end = data.index(b"\0", 4096)
    return Sample(data, [(0, 512), (4096, end)])


class LuksKit(ReaderTests):
    format = Luks()
    variants = ({"version": "1"}, {"version": "2"}, {"version": "argon2"})
    passphrases = (PASSPHRASE,)

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Malformed headers may ask for as many iterations as the limit allows, which takes a minute."""
        monkeypatch.setattr("vmconv_luks.structs.MAX_ITERATIONS", 1 << 12)

    def sound(self, variant: Mapping[str, str]) -> Sample:
        return _made(variant.get("version", "1"))

    def seal(self, data: bytearray) -> None:
        seal(data)
