"""OpenStack Swift on loopback: a proxy, an account, a container and an object server, on XFS of their own.

The proxy has a memcached, as in each cluster: it keeps what accounts and containers allow.
"""

from __future__ import annotations

import base64
import http.client
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from support.daemons import free_port, wait_until
from support.mounts import mounted
from support.requirements import missing, oracle_program

MODULES = {
    "object": "swift.obj.server",
    "container": "swift.container.server",
    "account": "swift.account.server",
    "proxy": "swift.proxy.server",
}
"""The servers in the order of their start."""
DEVICE = "d1"
DEVICE_SIZE = 4 << 30
"""Bytes of the filesystem with the objects, a sparse file."""
USER, KEY = "test:tester", "testing"
OTHER_USER, OTHER_KEY = "other:tester", "testing2"
TEMP_URL_KEY = "temporary"
CLOUD = "vmconv-tests"
_MARK = "mark-of-the-log-"

# A server reads its storage policies from this file when its modules are imported, whatever its settings say. It ends
# with the tests (man 2 prctl, PR_SET_PDEATHSIG), however they end.
_SERVER = """
import ctypes, importlib, sys
ctypes.CDLL(None).prctl(1, 9)
from swift.common import utils
utils.SWIFT_CONF_FILE, module = sys.argv[1:3]
sys.argv[1:3] = []
importlib.import_module(module).main()
"""

# What `swift-ring-builder create 6 1 0`, `add` and `rebalance` do, in one process for all rings.
_RINGS = """
import sys
from swift.common.ring import RingBuilder
for argument in sys.argv[2:]:
    name, port, device = argument.split(":")
    builder = RingBuilder(6, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": device, "weight": 1})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""

_PIPELINE = (
    "catch_errors gatekeeper healthcheck proxy-logging cache listing_formats bulk tempurl s3api tempauth copy slo dlo "
    "versioned_writes symlink proxy-logging proxy-server"
)

_ENTRY_POINTS = {"cache": "memcache", "proxy-logging": "proxy_logging"}
"""The names of middleware in Swift's package, where they differ from those of pipelines."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes


@dataclass(frozen=True)
class Logged:
    """A request that the proxy has answered; `source` is "-" for a client's, else the middleware's that made it.

    `path` is as in the request: quoted, with the query.
    """

    method: str
    path: str
    status: int
    received: int
    sent: int
    source: str


class Swift:
    """A cluster of one device below `directory`, with two accounts; `close` ends it."""

    def __init__(self, directory: Path) -> None:
        try:
            version("swift")
        except PackageNotFoundError:
            missing("swift", "swift is not installed")
        self.directory = directory
        self.devices = directory / "devices"
        made = mounted("xfs", self.devices, DEVICE_SIZE)
        if isinstance(made, str):
            missing("swift", made)
        (self.devices / DEVICE).mkdir()
        self._ports = {name: free_port() for name in MODULES}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._tokens: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self._ports['proxy']}"
        self.auth_url = f"{self.url}/auth/v1.0"
        self.storage_url = f"{self.url}/v1/AUTH_{USER.partition(':')[0]}"
        self.clouds = directory / "clouds.yaml"
        """A file of openstacksdk (`OS_CLIENT_CONFIG_FILE`) that has the cloud `CLOUD`."""
        cache = free_port()
        self._configure(cache)
        try:
            self._running["cache"] = subprocess.Popen(
                [oracle_program("memcached"), "-l", f"127.0.0.1:{cache}", "-u", "root"], stdin=subprocess.DEVNULL
            )
            wait_until(cache, self._running["cache"])
            for name in MODULES:
                self.start(name)
            self.request("POST", "", headers={"X-Account-Meta-Temp-URL-Key": TEMP_URL_KEY})
        except BaseException:
            self.close()
            raise

    def start(self, name: str) -> None:
        """Starts one server; returns when it answers."""
        command = [sys.executable, "-c", _SERVER, f"{self.directory}/swift.conf", MODULES[name]]
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*command, f"{self.directory}/{name}.conf", "-v"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )
        try:
            wait_until(self._ports[name], self._running[name])
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self._log(name).read_text(errors='replace')[-2000:]}") from exc

    def stop(self, name: str) -> None:
        """Ends one server; what it is doing is not finished."""
        process = self._running.pop(name)
        process.terminate()
        process.wait()

    def kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def is_running(self, name: str) -> bool:
        return name in self._running

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)
        subprocess.run(["umount", self.devices], check=True)

    def token(self, user: str = USER, key: str = KEY) -> str:
        if user not in self._tokens:
            answer = self._ask("GET", self.auth_url, b"", {"X-Auth-User": user, "X-Auth-Key": key})
            assert answer.status == 200, answer
            self._tokens[user] = answer.headers["x-auth-token"]
        return self._tokens[user]

    def request(
        self, method: str, path: str, data: bytes = b"", headers: Mapping[str, str] | None = None, *, user: str = USER
    ) -> Answer:
        """Returns the answer to a request of a user for a path (quoted) below the first account's storage URL."""
        key = KEY if user == USER else OTHER_KEY
        return self._ask(
            method, f"{self.storage_url}{path}", data, {"X-Auth-Token": self.token(user, key), **(headers or {})}
        )

    def temporary_url(self, path: str, method: str = "GET", seconds: int = 3600) -> str:
        """Returns a URL for a path (quoted) below the storage URL that needs no token (TempURL)."""
        import hashlib
        import hmac

        expires = int(time.time()) + seconds
        place = f"{urlsplit(self.storage_url).path}{path}"
        text = f"{method}\n{expires}\n{unquote(place)}"
        signature = hmac.new(TEMP_URL_KEY.encode(), text.encode(), hashlib.sha256).hexdigest()
        return f"{self.url}{place}?temp_url_sig={signature}&temp_url_expires={expires}"

    def logged(self) -> list[Logged]:
        """Returns what the proxy has answered so far, those of this class too, in the order of their ends."""
        mark = f"{_MARK}{uuid4().hex}"
        # Whatever ended before this request began has its line in the file before this one's.
        self.request("HEAD", f"/{mark}")
        deadline = time.monotonic() + 60
        while mark not in (text := self._log("proxy").read_text(errors="replace")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lines = [line.partition("LOGGED ")[2].split()[:6] for line in text.splitlines() if "LOGGED " in line]
        return [
            Logged(method, unquote(path), int(status), _number(received), _number(sent), source)
            for method, path, status, received, sent, source in lines
            if _MARK not in path
        ]

    def stored(self) -> int:
        """Returns the bytes of all objects on the device, manifests among them."""
        return sum(path.stat().st_size for path in self.devices.rglob("*.data"))

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _ask(self, method: str, url: str, data: bytes, headers: Mapping[str, str]) -> Answer:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        try:
            connection.request(method, url[len(self.url) :], data, dict(headers))
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def _configure(self, cache: int) -> None:
        rings = [f"{name}:{self._ports[name]}:{DEVICE}" for name in ("account", "container", "object")]
        subprocess.run([sys.executable, "-W", "ignore", "-c", _RINGS, self.directory, *rings], check=True)
        self._write(
            "swift.conf",
            "[swift-hash]\nswift_hash_path_suffix = tests\nswift_hash_path_prefix = tests\n"
            "[storage-policy:0]\nname = one\ndefault = yes\n",
        )
        for name in ("account", "container", "object"):
            self._write(
                f"{name}.conf",
                f"{self._common(name)}devices = {self.devices}\nmount_check = false\n"
                "disable_fallocate = true\nfallocate_reserve = 0\n"
                f"recon_cache_path = {self.directory}\n"
                # A busy machine must not turn updates into work for daemons that do not run here.
                "container_update_timeout = 60\nnode_timeout = 60\nconn_timeout = 20\n"
                f"[pipeline:main]\npipeline = {name}-server\n[app:{name}-server]\nuse = egg:swift#{name}\n",
            )
        filters = "".join(
            f"[filter:{name}]\nuse = egg:swift#{_ENTRY_POINTS.get(name, name)}\n{more}"
            for name, more in self._filters(cache).items()
        )
        self._write(
            "proxy.conf",
            f"{self._common('proxy')}[pipeline:main]\npipeline = {_PIPELINE}\n{filters}"
            "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nallow_account_management = true\n"
            "node_timeout = 60\nconn_timeout = 20\n"
            # A server that a test has killed is asked again as soon as it runs.
            "error_suppression_interval = 0\n",
        )
        # python-swiftclient brings this kind of authentication.
        self._write(
            self.clouds.name,
            f"clouds:\n  {CLOUD}:\n    auth_type: v1password\n    auth:\n      auth_url: {self.auth_url}\n"
            f"      username: {USER}\n      password: {KEY}\n    region_name: ''\n",
        )

    def _common(self, name: str) -> str:
        # Without workers a server is one process, and killing that kills it.
        return (
            f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {self._ports[name]}\nworkers = 0\n"
            f"user = {pwd.getpwuid(os.geteuid()).pw_name}\nswift_dir = {self.directory}\n"
        )

    @staticmethod
    def _filters(cache: int) -> dict[str, str]:
        """Returns the settings of the middleware; limits and rates are those that Swift comes with."""
        key = base64.urlsafe_b64encode(bytes(range(32))).decode()
        users = "".join(
            f"user_{user.replace(':', '_')} = {password} .admin\n"
            for user, password in ((USER, KEY), (OTHER_USER, OTHER_KEY))
        )
        own = {
            "cache": f"memcache_servers = 127.0.0.1:{cache}\n",
            "proxy-logging": (
                "log_msg_template = LOGGED {method} {path} {status_int} {bytes_recvd} {bytes_sent} {source}\n"
            ),
            "tempauth": f"fernet_key_tests = {key}\nactive_fernet_key_id = tests\n{users}",
            "versioned_writes": "allow_versioned_writes = true\nallow_object_versioning = true\n",
        }
        return {name: own.get(name, "") for name in dict.fromkeys(_PIPELINE.split()[:-1])}

    def _write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
