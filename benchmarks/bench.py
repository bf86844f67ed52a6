"""What the cases share: the programs that take part, the images they convert, the results so far."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from images import GIB, Place, compressed, copied, random_raw
from measure import Contender, Measured, side_by_side
from report import Expectation, print_measured

Check = Callable[[str], None]
# The console script of the interpreter that runs this: no shim that looks for an interpreter first is measured.
VMCONV = os.path.join(os.path.dirname(sys.executable), "vmconv")
HASTY = "vmconv -t unsafe"


@dataclass
class Bench:
    """One run of the suite: `size` is that of ordinary images, `work` a directory for what is built once."""

    work: str
    size: int
    runs: int
    quick: bool
    results: list[Measured] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)

    def measure(
        self, case: str, place: Place, title: str, contenders: Sequence[Contender], runs: int | None = None
    ) -> Measured:
        """Measures programs side by side, prints and keeps the figures."""
        measured = side_by_side(Measured(case, place.kind, title), contenders, runs or self.runs, place.settle)
        print_measured(measured)
        self.results.append(measured)
        return measured

    def at_most(self, measured: Measured, text: str, value: float, limit: float, unit: str = "s") -> None:
        self.expectations.append(Expectation(measured.case, measured.place, text, value, limit, unit))

    def at_least(
        self, measured: Measured, text: str, name: str, other: str, limit: float, *, hasty: str | None = None
    ) -> None:
        """Expects `name` to be `limit` times faster than `other`, as that is and when both are made durable.

        `hasty` is the same program when it does not wait for storage either: a third comparison, like with like.
        """
        pairs = [(name, "seconds", "as is"), (name, "durable", "both durable")]
        if hasty:
            pairs.append((hasty, "seconds", "neither durable"))
        for mine, figure, how in pairs:
            value = measured.times_faster(mine, other, figure)
            found = Expectation(measured.case, measured.place, f"{text} ({how})", value, limit, "x", at_least=True)
            self.expectations.append(found)

    def random(self, place: Place) -> str:
        """Returns a raw image of random bytes in this place; made once, and gone with the place."""
        path = place.path("random.raw")
        return path if os.path.exists(path) else random_raw(path, self.size)

    def compressed(self, place: Place, kind: str) -> str:
        """Returns a compressed qcow2 image in this place."""
        original = os.path.join(self.work, f"{kind}.qcow2")
        if not os.path.exists(original):
            compressed(original, GIB // 4 if self.quick else GIB, kind)
        return copied(original, place.path(f"{kind}.qcow2"))


def vmconv(source: str, target: str, *flags: str, check: Check | None = None) -> Contender:
    return Contender("vmconv", [VMCONV, "convert", "-q", *flags, source, target], target, check=check)


def vmconv_hasty(source: str, target: str) -> Contender:
    """Returns `vmconv convert` as it is when it leaves flushing to the system, as `qemu-img convert` does."""
    command = [VMCONV, "convert", "-q", "-t", "unsafe", source, target]
    return Contender(HASTY, command, target, durable=False)


def qemu_img(
    source: str, source_format: str, target: str, target_format: str, *flags: str, heavy: bool = True
) -> Contender:
    """Returns `qemu-img convert`, which leaves flushing to the system: it is measured with and without."""
    formats = ["-f", source_format, "-O", target_format]
    command = ["qemu-img", "convert", *flags, *formats, source, target]
    return Contender(" ".join(("qemu-img", *flags)), command, target, durable=False, heavy=heavy)


def python(
    name: str,
    script: str,
    *arguments: str,
    target: str,
    check: Check | None = None,
    back: Sequence[str] | None = None,
) -> Contender:
    """Returns a child of this suite, in this interpreter."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    return Contender(name, [sys.executable, path, *arguments], target, check=check, back=back)
