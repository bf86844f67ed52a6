"""A job by its record: its state, its place in the queue, and the record after each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vmconv.plugin import size_text
from vmconv_fleet.replication.clock import wall_ms
from vmconv_fleet.words import plan_text

_MAX_TEXT = 500
_MAX_LINES = 50


class Job(NamedTuple):
    """A job, and the bodies of its record after each change of its state."""

    id: str
    body: Mapping[str, Any]

    @property
    def state(self) -> str:
        return str(self.body.get("state", ""))

    @property
    def cancel(self) -> bool:
        return bool(self.body.get("cancel"))

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled") or (
            self.state == "planned" and bool(self.body.get("dry_run"))
        )

    @property
    def was_begun(self) -> bool:
        return self.state in ("planned", "running") or self.body.get("started_ms") is not None

    @property
    def at_ms(self) -> int:
        return int(self.body.get("at_ms") or 0)

    @property
    def datastores(self) -> frozenset[str]:
        """Returns the names of the datastores that the job reads and writes."""
        return frozenset(filter(None, (self.body.get("datastore"), self.body.get("target_datastore"))))

    @property
    def batch(self) -> str | None:
        return self.body.get("batch")

    @property
    def max_parallel(self) -> int | None:
        return self.body.get("max_parallel")

    def order(self) -> tuple[int, int, str]:
        """Returns the place in the queue: by due time, then by creation."""
        return self.at_ms, int(self.body.get("created_ms", 0)), self.id

    def begun(self) -> Mapping[str, Any] | None:
        """Returns the record of the started job; None if it does not wait for a start."""
        if self.state != "queued":
            return None
        attempt = self.body.get("attempts", 0) + 1
        return self.logged(f"started, attempt {attempt}", started_ms=wall_ms(), attempts=attempt)

    def planned(self, *, event: Mapping[str, Any], ended: bool = False) -> Mapping[str, Any]:
        """Returns the record with the worker's plan; `ended` for a dry run."""
        end = {"ended_ms": wall_ms()} if ended else {}
        said = f"planned {event['file']}: {plan_text(event['plan'])}"
        return self.logged(said, state="planned", plan=event["plan"], file=event["file"], **end)

    def running(self, *, done: int, total: int) -> Mapping[str, Any]:
        """Returns the record with the progress in bytes."""
        fields = {"state": "running", "progress": {"done": done, "total": total}}
        if self.state == "running":
            return self._changed(**fields)
        return self.logged(f"copies and writes {size_text(total)}", **fields)

    def done(self, *, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the record of the finished job, with warnings and seconds of the worker's last event."""
        changed: dict[str, Any] = {}
        if progress := self.body.get("progress"):
            changed["progress"] = {"done": progress["total"], "total": progress["total"]}
        warnings = list(event.get("warnings", ()))
        if event.get("source_kept"):
            warnings.append(f"the source was kept: {event['source_kept']}")
        if warnings:
            changed["warnings"] = warnings
        if "seconds" in event:
            changed["seconds"] = event["seconds"]
        took = f" after {event['seconds']:.2f} s" if "seconds" in event else ""
        return self.logged(f"done{took}", state="done", ended_ms=wall_ms(), **changed)

    def failed(self, *, message: str, hint: str | None = None) -> Mapping[str, Any]:
        """Returns the record of the failed job."""
        why = {"error": message[:_MAX_TEXT]} | ({"hint": hint[:_MAX_TEXT]} if hint else {})
        text = message if message.startswith("failed") else f"failed: {message}"
        return self.logged(text, state="failed", ended_ms=wall_ms(), **why)

    def cancelled(self) -> Mapping[str, Any]:
        """Returns the record of the cancelled job."""
        return self.logged("cancelled", state="cancelled", ended_ms=wall_ms())

    def logged(self, text: str, **fields: Any) -> Mapping[str, Any]:
        """Returns the record with these fields, and with a new line in its log."""
        line = {"at_ms": wall_ms(), "text": text[:_MAX_TEXT]}
        return self._changed(log=[*self.body.get("log", ()), line][-_MAX_LINES:], **fields)

    def _changed(self, **fields: Any) -> Mapping[str, Any]:
        return {**self.body, **fields}
