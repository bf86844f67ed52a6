"""Metrics for Prometheus, read from the replica at each scrape."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from vmconv_fleet.api.access import UNAUTHORIZED, Known
from vmconv_fleet.api.state import State, StateOf
from vmconv_fleet.catalogue.places import is_container
from vmconv_fleet.replication.indexing import UNANSWERED, Where
from vmconv_fleet.replication.store import ReplicaView

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    Family = CounterMetricFamily | GaugeMetricFamily

router = APIRouter()

Sample = tuple[Mapping[str, str], float]


@router.get("/metrics", summary="Metrics for Prometheus", responses=UNAUTHORIZED, response_class=PlainTextResponse)
def metrics(request: Request, state: StateOf, _caller: Known) -> Response:
    # Most nodes are never scraped.
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()
    registry.register(_Families(state))
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=media_type)


@router.get("/healthz", summary="Whether the node serves; needs no token")
def health(state: StateOf) -> dict[str, bool]:
    return {"serving": state.service.serving}


class _Families:
    """The metrics of one moment, as a collector of the library."""

    def __init__(self, state: State) -> None:
        self._state = state

    def describe(self) -> list[Family]:
        """Returns none, so that the library does not collect to learn the names."""
        return []

    def collect(self) -> Iterator[Family]:
        yield from _of_nodes(self._state)
        yield from _of_catalogue(self._state)
        yield from _of_daemon(self._state)


def _gauge(name: str, help_: str, samples: Iterable[Sample]) -> Family:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily, name, help_, list(samples))


def _counter(name: str, help_: str, samples: Iterable[Sample]) -> Family:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily, name, help_, list(samples))


def _filled(
    kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, help_: str, samples: list[Sample]
) -> Family:
    names = list(samples[0][0]) if samples else []
    family = kind(f"vmconv_fleet_{name}", help_, labels=names)
    for labels, value in samples:
        family.add_metric([labels[one] for one in names], value)
    return family


def _of_nodes(state: State) -> Iterator[Family]:
    snapshot, view = state.snapshot(), state.view()
    nodes = snapshot.nodes()
    states = Counter(one.state for one in nodes)
    yield _gauge("nodes", "Nodes by state, as seen from here", [({"state": key}, n) for key, n in states.items()])
    others = [one for one in nodes if one.node != state.node and one.age_ms is not None]
    ages = [({"node": one.name, "id": one.node}, (one.age_ms or 0) / 1000) for one in others]
    yield _gauge("node_age_seconds", "Age of the records of a node", ages)
    lags = [({"node": one.name, "id": one.node}, one.lag) for one in others]
    yield _gauge("node_lag_records", "Records that a node lacked at its last heartbeat", lags)
    written = [({"node": snapshot.name(owner), "id": owner}, at.seq) for owner, at in view.positions().items()]
    yield _counter("records_written_total", "Records that an owner has written, as far as they are here", written)


def _of_catalogue(state: State) -> Iterator[Family]:
    snapshot, view = state.snapshot(), state.view()
    name = snapshot.name
    jobs = view.tally("job", by=("owner", "state"))
    # Names are not unique: with the same labels twice Prometheus would refuse all metrics.
    yield _gauge(
        "jobs",
        "Conversions by node and state",
        [({"node": name(owner), "id": owner, "state": key}, n) for owner, key, n in jobs],
    )
    yield _gauge("job_bytes", "Bytes of finished conversions, by action", _bytes(view))
    disks = view.tally("disk", by=("owner", "format"))
    yield _gauge(
        "disks",
        "Disk images by node and format",
        [({"node": name(owner), "id": owner, "format": key or "unknown"}, n) for owner, key, n in disks],
    )
    # Of a store of objects nobody knows the size.
    datastores = [one for one in snapshot.find("datastore") if not is_container(str(one.body.get("path")))]
    for metric, help_, field in (
        ("datastore_free_bytes", "Free space of a datastore", "free"),
        ("datastore_size_bytes", "Size of the filesystem of a datastore", "size"),
    ):
        yield _gauge(
            metric,
            help_,
            [
                ({"node": name(one.owner), "id": one.owner, "datastore": one.id}, int(one.body.get(field, 0)))
                for one in datastores
            ],
        )
    unanswered = view.tally("request", UNANSWERED)[0][0]
    yield _gauge("requests_unanswered", "Requests whose owner has not answered, as seen here", [({}, unanswered)])


def _bytes(view: ReplicaView) -> list[Sample]:
    names = ("copied", "shared", "written")
    ((count, *sums),) = view.tally("job", Where("state = 'done'"), sums=names)
    return [({"how": name}, int(value)) for name, value in zip(names, sums, strict=True)] if count else []


def _of_daemon(state: State) -> Iterator[Family]:
    yield _gauge("problems", "Problems of this node", [({}, len(state.problems()))])
    yield _gauge("neighbours", "Nodes with a direct link", [({}, len(state.service.neighbours()))])
    is_cut = float(bool(state.link and state.link.is_disconnected))
    yield _gauge("cut", "1 while the administrator has disconnected this node", [({}, is_cut)])
    counters = sorted(state.service.counters().items())
    yield _counter(
        "events_total", "Counters of the replica since its start", [({"event": name}, n) for name, n in counters]
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield _counter("cpu_seconds_total", "Processor time of the daemon", [({}, usage.ru_utime + usage.ru_stime)])
    yield _gauge("resident_bytes", "Memory of the daemon", [({}, _resident())])


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
