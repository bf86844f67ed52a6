"""Follows jobs until they end, by the events of a node."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vmconv.plugin import ProgressBar
from vmconv_fleet.cli.client import NodeClient, NotThereError


class Ended(NamedTuple):
    """How a job ended; `body` is that of its record."""

    state: str
    body: Mapping[str, Any]


def follow(
    client: NodeClient, events: Iterator[str], asked: Sequence[Mapping[str, Any]], *, bar: bool
) -> dict[str, Ended]:
    """Returns how the jobs ended that were not refused, once all have."""
    waiting = {one["job"]: one["node"] for one in asked if one["answer"].get("ok") is not False}
    requests = {one["answer"]["request"]: one["job"] for one in asked}
    ended: dict[str, Ended] = {}
    progress = _Progress(shown=bar)
    try:
        for job, node in waiting.items():
            _note(_looked_up(client, node, job), job, ended, progress)
        for kind, record in _records(events):
            if kind == "lost":
                for job in waiting.keys() - ended.keys():
                    _note(_looked_up(client, waiting[job], job), job, ended, progress)
            elif kind == "response" and record["body"].get("ok") is False:
                # Refused later: there will be no job.
                waiting.pop(requests.get(record["body"].get("request"), ""), None)
            elif kind == "job" and waiting.get(record["id"]) == record["owner"]:
                _note(record["body"], record["id"], ended, progress)
            if waiting.keys() <= ended.keys():
                break
    finally:
        progress.close()
    return ended


def _records(events: Iterator[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the events, after an empty one: the jobs may have ended already."""
    yield "", {}
    kind = ""
    for line in events:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def _looked_up(client: NodeClient, node: str, job: str) -> Mapping[str, Any] | None:
    try:
        body: Mapping[str, Any] = client.get(f"/api/v1/records/{node}/job/{job}")["body"]
    except NotThereError:
        return None
    return body


def _note(body: Mapping[str, Any] | None, job: str, ended: dict[str, Ended], progress: _Progress) -> None:
    if body is None:
        return
    state = body["state"]
    progress.tell(job, body)
    if state in ("done", "failed", "cancelled") or (state == "planned" and body.get("dry_run")):
        ended[job] = Ended(state, body)


class _Progress:
    """One bar for all jobs."""

    def __init__(self, *, shown: bool) -> None:
        import sys

        self._bar = ProgressBar() if shown and sys.stderr.isatty() else None
        self._jobs: dict[str, tuple[int, int]] = {}

    def tell(self, job: str, body: Mapping[str, Any]) -> None:
        said = body.get("progress")
        if self._bar and said:
            self._jobs[job] = said["done"], said["total"]
            self._bar(sum(done for done, _ in self._jobs.values()), sum(total for _, total in self._jobs.values()))

    def close(self) -> None:
        if self._bar:
            self._bar.close()
