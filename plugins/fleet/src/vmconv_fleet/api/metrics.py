"""Metrics in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from vmconv_fleet.api.access import UNAUTHORIZED, Known
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.replication.indexing import UNANSWERED, Where
from vmconv_fleet.replication.store import ReplicaView

router = APIRouter()

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


@router.get("/metrics", summary="Metrics for Prometheus", responses=UNAUTHORIZED, response_class=PlainTextResponse)
def metrics(state: StateOf, _caller: Known) -> PlainTextResponse:
    text = "".join(_family(*one) for one in _families(state))
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


@router.get("/healthz", summary="Whether the node serves; needs no token")
def health(state: StateOf) -> dict[str, bool]:
    return {"serving": state.service.serving}


def _families(state: State) -> Iterator[tuple[str, str, str, Iterable[Sample]]]:
    snapshot, view = state.snapshot(), state.view()
    nodes = snapshot.nodes()
    states = Counter(one.state for one in nodes)
    yield "nodes", "gauge", "Nodes by state, as seen from here", [({"state": key}, n) for key, n in states.items()]
    others = [one for one in nodes if one.node != state.node and one.age_ms is not None]
    yield (
        "node_age_seconds",
        "gauge",
        "Age of the records of a node",
        [({"node": one.name, "id": one.node}, (one.age_ms or 0) / 1000) for one in others],
    )
    yield (
        "node_lag_records",
        "gauge",
        "Records that a node lacked at its last heartbeat",
        [({"node": one.name, "id": one.node}, one.lag) for one in others],
    )
    positions = view.positions()
    yield (
        "records_written_total",
        "counter",
        "Records that an owner has written, as far as they are here",
        [({"node": snapshot.name(owner), "id": owner}, at.seq) for owner, at in positions.items()],
    )
    yield (
        "jobs",
        "gauge",
        "Conversions by node and state",
        [
            ({"node": snapshot.name(owner), "state": key}, n)
            for owner, key, n in view.tally("job", by=("owner", "state"))
        ],
    )
    yield "job_bytes", "gauge", "Bytes of finished conversions, by action", _bytes(view)
    yield (
        "disks",
        "gauge",
        "Disk images by node and format",
        [
            ({"node": snapshot.name(owner), "format": key or "unknown"}, n)
            for owner, key, n in view.tally("disk", by=("owner", "format"))
        ],
    )
    for name, help_, field in (
        ("datastore_free_bytes", "Free space of a datastore", "free"),
        ("datastore_size_bytes", "Size of the filesystem of a datastore", "size"),
    ):
        yield (
            name,
            "gauge",
            help_,
            [
                ({"node": snapshot.name(one.owner), "datastore": one.id}, int(one.body.get(field, 0)))
                for one in snapshot.find("datastore")
            ],
        )
    yield (
        "requests_unanswered",
        "gauge",
        "Requests whose owner has not answered, as seen here",
        [({}, view.tally("request", UNANSWERED)[0][0])],
    )
    yield "problems", "gauge", "Problems of this node", [({}, len(state.problems()))]
    yield "neighbours", "gauge", "Nodes with a direct link", [({}, len(state.service.neighbours()))]
    yield (
        "cut",
        "gauge",
        "1 while the administrator has disconnected this node",
        [({}, float(bool(state.link and state.link.is_disconnected)))],
    )
    yield (
        "events_total",
        "counter",
        "Counters of the replica since its start",
        [({"event": name}, n) for name, n in sorted(state.service.counters().items())],
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield "cpu_seconds_total", "counter", "Processor time of the daemon", [({}, usage.ru_utime + usage.ru_stime)]
    yield "resident_bytes", "gauge", "Memory of the daemon", [({}, _resident())]


def _bytes(view: ReplicaView) -> list[Sample]:
    names = ("copied", "shared", "written")
    ((count, *sums),) = view.tally("job", Where("state = 'done'"), sums=names)
    return [({"how": name}, int(value)) for name, value in zip(names, sums, strict=True)] if count else []


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _family(name: str, kind: str, help_: str, samples: Iterable[Sample]) -> str:
    full = f"vmconv_fleet_{name}"
    lines = [f"# HELP {full} {help_}", f"# TYPE {full} {kind}"]
    lines += [f"{full}{_labels(labels)} {value!r}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    """Returns the value of a label, escaped: untrusted names must not end it or the line."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").replace("\r", " ")
