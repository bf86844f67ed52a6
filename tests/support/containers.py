"""A container of a running Swift, what is in it, and what its proxy has received."""

from __future__ import annotations

import json
import time
from urllib.parse import quote
from uuid import uuid4

from support.requirements import oracle_driver
from support.swift import CLOUD, Answer, Swift
from vmconv.cli.main import main

MIB = 1 << 20
PAYLOAD = 7 * MIB + 512 + 4096
"""Bytes of payload of `disk`; a filesystem may add the rest of a block."""


class Container:
    """An empty container, and vmconv's own beside it once something is published."""

    def __init__(self, swift: Swift) -> None:
        self.swift = swift
        self.name = f"images-{uuid4().hex[:8]}"
        self.own = f"{self.name}_vmconv"
        assert swift.request("PUT", f"/{self.name}").status == 201
        self._seen = len(swift.logged())

    def url(self, name: str) -> str:
        """Returns the URL of an object as vmconv has it."""
        return f"swift://{CLOUD}/{self.name}/{name}"

    def for_qemu(self, name: str, driver: str) -> str:
        """Returns an object as QEMU takes a file name: read over http, without a token."""
        url = self.swift.temporary_url(f"/{self.name}/{name}")
        return f"json:{json.dumps({'driver': driver, 'file': {'driver': oracle_driver('http'), 'url': url}})}"

    def put(self, name: str, data: bytes, *, container: str | None = None) -> None:
        assert self.swift.request("PUT", f"/{container or self.name}/{quote(name)}", data).status == 201

    def get(self, name: str) -> bytes:
        answer = self.swift.request("GET", f"/{self.name}/{name}")
        assert answer.status == 200
        return answer.body

    def manifest(self, name: str) -> Answer:
        return self.swift.request("GET", f"/{name}?multipart-manifest=get")

    def names(self, container: str | None = None) -> list[str]:
        """Returns the names of all objects in a container, by default in this one."""
        answer = self.swift.request("GET", f"/{container or self.name}?format=json")
        return [] if answer.status == 404 else [row["name"] for row in json.loads(answer.body)]

    def received(self) -> int:
        """Returns the bytes that the proxy has received from clients since this was last asked."""
        logged = self.swift.logged()
        new, self._seen = logged[self._seen :], len(logged)
        return sum(one.received for one in new if one.source == "-")

    def segments(self) -> list[str]:
        """Returns the names of the payload in vmconv's own container."""
        return [name for name in self.names(self.own) if name.startswith("payload/")]


def publish(*arguments: object) -> int:
    return main(["publish", *map(str, arguments)])


def unpublish(*arguments: object) -> int:
    return main(["unpublish", *map(str, arguments)])


def let_time_pass() -> None:
    """Waits until the store's clock, which states seconds, is past all that was made."""
    time.sleep(1.1 + -time.time() % 1)


def collected(container: Container, *arguments: str) -> int:
    return unpublish("--unused", "--older-than=0s", *arguments, f"swift://{CLOUD}/{container.name}")
