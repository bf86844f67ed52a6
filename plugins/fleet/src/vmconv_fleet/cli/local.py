"""HTTP to the node on this machine, by its Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any

from vmconv_fleet.errors import FleetError

TIMEOUT = 30.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def post(path: str, resource: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON that a node answers a POST with; `FleetError` when it refuses or is not there."""
    connection = _UnixConnection(path)
    try:
        connection.request("POST", resource, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        found: dict[str, Any] = json.loads(response.read())
    except OSError as exc:
        raise FleetError(f"{path}: no node answers: {exc.strerror or exc}", hint="vmconv node run starts it") from exc
    except (ValueError, http.client.HTTPException) as exc:
        raise FleetError(f"{path}: answers without JSON") from exc
    finally:
        connection.close()
    if response.status >= 400:
        raise FleetError(str(found.get("detail") or found.get("reason") or response.reason))
    return found
