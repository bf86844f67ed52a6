"""Measures a fleet of real nodes with mutual TLS. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback

from fleet_cases import CASES
from fleet_measure import Figure, Setting


def main() -> int:
    options = _options()
    figures: list[Figure] = []
    failed = False
    for name in options.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vmconv-fleet-", dir=options.directory) as work:
            try:
                with Setting(work, quick=options.quick) as setting:
                    found = CASES[name](setting)
            except Exception:
                traceback.print_exc()
                failed = True
                continue
        for figure in found:
            print(figure.row(), flush=True)
        figures += found
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if options.json:
        _write(options.json, figures)
    return 1 if failed else 0


def _write(path: str, figures: list[Figure]) -> None:
    machine = {"system": platform.platform(), "python": platform.python_version(), "processors": os.cpu_count()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": machine, "figures": [figure.plain() for figure in figures]}, file, indent=2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...")
    parser.add_argument("--directory", metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.only or ()) - set(CASES)):
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
