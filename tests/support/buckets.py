"""A bucket of a running Swift, by its S3 interface, and what its proxy has received."""

from __future__ import annotations

import json
from urllib.parse import quote
from uuid import uuid4

from support.swift import Swift
from vmconv.cli.main import main

MIB = 1 << 20


class Bucket:
    """An empty bucket."""

    def __init__(self, swift: Swift) -> None:
        self.swift = swift
        self.name = f"disks-{uuid4().hex[:8]}"
        assert swift.request("PUT", f"/{self.name}").status == 201
        self._seen = len(swift.logged())

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def http(self, key: str) -> str:
        """Returns a URL of an object that needs no credentials."""
        return self.swift.temporary_url(f"/{self.name}/{key}")

    def put(self, key: str, data: bytes) -> None:
        assert self.swift.request("PUT", f"/{self.name}/{quote(key)}", data).status == 201

    def get(self, key: str) -> bytes:
        answer = self.swift.request("GET", f"/{self.name}/{quote(key)}")
        assert answer.status == 200
        return answer.body

    def keys(self) -> list[str]:
        return self._names(self.name)

    def left(self) -> list[str]:
        """Returns what uploads have beside the bucket: parts of objects, and unfinished uploads with theirs."""
        return self._names(f"{self.name}+segments")

    def unfinished(self) -> list[str]:
        """Returns the unfinished uploads, KEY/ID; parts of objects that were removed stay for Swift's expirer."""
        return [name for name in self.left() if not name.rpartition("/")[2].isdecimal()]

    def received(self) -> int:
        """Returns the bytes that the proxy has received from clients since this or `client_traffic` was last asked."""
        return self.client_traffic()[0]

    def client_traffic(self) -> tuple[int, int]:
        """Returns the bytes that the proxy has received from clients, and sent to them, as `received` does."""
        logged = self.swift.logged()
        new, self._seen = logged[self._seen :], len(logged)
        clients = [one for one in new if one.source == "-"]
        return sum(one.received for one in clients), sum(one.sent for one in clients)

    def _names(self, container: str) -> list[str]:
        answer = self.swift.request("GET", f"/{quote(container)}?format=json")
        return [] if answer.status == 404 else [row["name"] for row in json.loads(answer.body)]


def upload(*arguments: object) -> int:
    return main(["upload", *map(str, arguments)])
