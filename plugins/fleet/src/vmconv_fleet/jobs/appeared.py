"""Asks a store whether an object has appeared that a job was making, for `journal`.

    python -m vmconv_fleet.jobs.appeared < {"container": URL, "target": NAME, "version": VERSION}

The exit code is 0 if it has.
"""

from __future__ import annotations

import json
import sys

from vmconv_fleet.catalogue.containers import container_at


def main() -> int:
    said = json.load(sys.stdin)
    return 0 if container_at(said["container"]).version(said["target"]) == said["version"] else 1


if __name__ == "__main__":
    sys.exit(main())
