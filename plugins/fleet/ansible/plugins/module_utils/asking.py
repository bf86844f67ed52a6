"""The API of a node, as the modules of this collection use it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode

from ansible.module_utils.urls import open_url

T = TypeVar("T")

ARGUMENTS: dict[str, dict[str, Any]] = {
    "node": {"type": "str", "required": True},
    "token": {"type": "str", "no_log": True},
    "ca": {"type": "path"},
    "timeout": {"type": "int", "default": 3600},
}
"""The options of all modules."""

_PATIENCE_S = 60
_PAGE = 1000
_MAX_ANSWER = 256 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0


class FleetError(Exception):
    """The node refuses, or cannot be reached."""


class Node:
    """Requests to one node. Raises FleetError for what it refuses."""

    def __init__(self, params: dict[str, Any]) -> None:
        where = params["node"]
        self._headers = {"Accept": "application/json"}
        self._more: dict[str, Any] = {"use_proxy": False}
        if "://" in where:
            if not where.startswith("https://") or not params["token"]:
                raise FleetError(f"{where}: https and a token are needed")
            self._base = where.rstrip("/")
            self._headers["Authorization"] = f"Bearer {params['token']}"
            self._more["ca_path"] = params["ca"]
        else:
            self._base = "http://localhost"
            self._more["unix_socket"] = os.path.join(where, "api.sock")
        self._until = time.monotonic() + params["timeout"]

    def get(self, path: str, **query: Any) -> Any:
        return self._call("GET", path, None, query)

    def send(self, method: str, path: str, body: dict[str, Any], **query: Any) -> dict[str, Any]:
        """Requests a change; returns its answer once the owner has given it. Raises FleetError if it refuses."""
        return self.settled(self._call(method, path, body, query))

    def settled(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Returns the owner's answer to a request. Raises FleetError if it refuses."""
        answer = asked if "ok" in asked else self.until(lambda: self._answered(asked))
        if not answer["ok"]:
            raise FleetError(f"refused: {answer.get('reason')}")
        return answer

    def _answered(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        found: dict[str, Any] = self.get(f"/requests/{asked['requester']}/{asked['request']}")
        return found if "ok" in found else None

    def everything(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Yields all items of a list."""
        after = None
        while True:
            page = self.get(path, limit=_PAGE, **query, **({"after": after} if after else {}))
            yield from page["items"]
            after = page["next"]
            if after is None:
                return

    def id_of(self, named: str) -> str:
        """Returns the id of a node, given by name or id."""
        return str(self.get(f"/nodes/{quote(named, safe='')}")["node"])

    def disk(self, named: str) -> dict[str, Any]:
        """Returns the disk that is `NODE:NAME`, or has this id."""
        node, _, name = named.partition(":")
        select = f"id={_pattern(named)}" + (f" or node={_pattern(node)} and name={_pattern(name)}" if name else "")
        # A pattern fits more than the name itself.
        found = [
            one
            for one in self.everything("/disks", select=select)
            if named in (one["id"], f"{one['node']}:{one['body']['name']}")
        ]
        if len(found) != 1:
            raise FleetError(f"{len(found) or 'no'} disks are {named!r}: write NODE:NAME, or an id")
        return found[0]

    def disk_at(self, owner: str, datastore: str, name: str) -> dict[str, Any] | None:
        """Returns the disk in this place of the catalogue."""
        found = self.everything(
            "/disks", node=owner, select=f"datastore={_pattern(datastore)} and name={_pattern(name)}"
        )
        place = (datastore, name)
        return next((one for one in found if (one["body"]["datastore"], one["body"]["name"]) == place), None)

    def until(self, look: Callable[[], T | None]) -> T:
        """Returns what `look` finds once it finds something. Raises FleetError when the time is over."""
        pause = _FIRST_PAUSE_S
        while (found := look()) is None:
            if time.monotonic() + pause > self._until:
                raise FleetError("the fleet has not done it within the timeout; the request stays")
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)
        return found

    def _call(self, method: str, path: str, body: dict[str, Any] | None, query: dict[str, Any]) -> Any:
        url = f"{self._base}/api/v1{path}" + (f"?{urlencode(query)}" if query else "")
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        data = None if body is None else json.dumps(body)
        try:
            with open_url(
                url,
                method=method,
                data=data,
                headers=headers,
                timeout=_PATIENCE_S,
                follow_redirects="none",
                use_netrc=False,
                **self._more,
            ) as answer:
                return json.loads(answer.read(_MAX_ANSWER))
        except HTTPError as exc:
            return _refused(exc)
        except (URLError, OSError, ValueError) as exc:
            raise FleetError(f"{self._base}: the node cannot be asked: {exc}") from exc


def _refused(exc: HTTPError) -> dict[str, Any]:
    """Returns the answer of an owner that refuses. Raises FleetError for any other error."""
    try:
        said = json.loads(exc.read(_MAX_ANSWER))
    except ValueError:
        said = {}
    if not isinstance(said, dict):
        said = {}
    if exc.code == 409 and "request" in said:
        return said
    hint = f" ({said['hint']})" if said.get("hint") else ""
    raise FleetError(f"{said.get('error', f'status {exc.code}')}{hint}")


def _pattern(text: str) -> str:
    """Returns a quoted pattern of a selection that fits the text."""
    return "'" + re.sub(r"[*?\['\"]", "?", text) + "'"
