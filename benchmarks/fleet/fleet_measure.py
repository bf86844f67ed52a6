"""What the cases share: nodes on a network, figures beside what is expected of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from vmconv_fleet.config import NodeConfig
from vmconv_fleet.testing import Driven, Lab, Network, wait_until, why_no_namespaces

LONG = 300.0


class Figure(NamedTuple):
    """One result, and the bound that it is to keep: at most `limit`, or at least with `least`."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    least: bool = False

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit

    def row(self) -> str:
        expected = "" if self.limit is None else f"{'>=' if self.least else '<='} {self.limit:g}"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        return f"{self.name:58} {self.value:10.4g} {self.unit:10} {expected:10} {verdict}".rstrip()

    def plain(self) -> dict[str, Any]:
        return {**self._asdict(), "met": self.met}


def percentiles(
    name: str, times: Sequence[float], *, p50: float | None = None, p99: float | None = None
) -> list[Figure]:
    """Returns median and 99th percentile, in milliseconds."""
    ordered = sorted(times)
    return [
        Figure(f"{name}, p50 of {len(times)}", statistics.median(ordered) * 1e3, "ms", p50),
        Figure(f"{name}, p99", ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3, "ms", p99),
    ]


class Setting:
    """A fleet and its network; ends with the block."""

    def __init__(self, directory: str, *, quick: bool) -> None:
        self.quick = quick
        self.lab = Lab(directory)
        self.nodes: list[Driven] = []
        self.network: Network | None = None
        self._why_not = why_no_namespaces()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.kill()
        if self.network is not None:
            self.network.close()

    @property
    def ids(self) -> list[str]:
        return [config.node for config in self.lab.nodes]

    def need_network(self, size: int) -> Network:
        if self._why_not is not None:
            raise RuntimeError(f"this case needs network namespaces: {self._why_not}")
        self.network = Network(size)
        return self.network

    def mesh(self, size: int, *, started: int | None = None) -> None:
        """Makes nodes of which each is a neighbour of all, and starts the first of them."""
        if self._why_not is None:
            self.need_network(size)
        else:
            print(f"  on loopback: {self._why_not}", file=sys.stderr)
        for number in range(size):
            host = self.network.address(number) if self.network else "127.0.0.1"
            connect = [config.listen[0] for config in self.lab.nodes]
            self.lab.add(host=host, port=7447 if self.network else None, connect=connect)
        count = size if started is None else started
        for number in range(count):
            self.start(number)
        self.wait(lambda: all(len(self.neighbours(n)) == count - 1 for n in range(count)), "all are neighbours")

    def start(self, number: int, *, ready: bool = True) -> Driven:
        prefix = self.network.prefix(number) if self.network else ()
        node = Driven(self.lab.nodes[number], prefix=prefix)
        self.nodes.append(node)
        if ready:
            node.answer()
        return node

    def config(self, number: int) -> NodeConfig:
        return self.lab.nodes[number]

    def neighbours(self, number: int) -> list[str]:
        found: list[str] = self.nodes[number].ask("state")["neighbours"]
        return found

    def wait(self, condition: Callable[[], object], what: str, timeout: float = LONG) -> float:
        return wait_until(condition, timeout, what)
