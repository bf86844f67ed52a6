"""URLs and secrets of this node's webhooks: in one file of the node's directory, and in no record."""

from __future__ import annotations

import json
import os
import threading
from typing import NamedTuple

from vmconv.plugin import os_errors
from vmconv_fleet.errors import FleetError
from vmconv_fleet.trust.identity import write_private

FILE = "webhooks.json"
MAX_HOOKS = 32
MAX_SIZE = 1 << 20
_lock = threading.Lock()


class Target(NamedTuple):
    """Where a webhook is sent, and what it is signed with."""

    url: str
    secret: str


class HookSecrets:
    """The file; all threads of a process may use it."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, FILE)

    def all(self) -> dict[str, Target]:
        with _lock:
            return self._read()

    def add(self, hook: str, target: Target) -> None:
        """Adds a webhook. Raises FleetError if there are too many."""
        with _lock:
            found = self._read()
            if len(found) >= MAX_HOOKS:
                raise FleetError(f"this node has {MAX_HOOKS} webhooks, the most that it may have")
            self._write({**found, hook: target})

    def remove(self, hook: str) -> None:
        with _lock:
            found = self._read()
            if found.pop(hook, None) is not None:
                self._write(found)

    def _read(self) -> dict[str, Target]:
        try:
            with open(self._path, "rb") as file:
                found = json.loads(file.read(MAX_SIZE))
            return {hook: Target(*map(str, one)) for hook, one in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            raise FleetError(f"{self._path}: the webhooks' secrets cannot be read: {exc}") from exc

    def _write(self, found: dict[str, Target]) -> None:
        with os_errors("writing the webhooks' secrets", FleetError):
            write_private(self._path, json.dumps(found).encode())
