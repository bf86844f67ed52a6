"""The Ansible collection: ansible-playbook against a fleet."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from fleet.in_memory import Node, nodes
from fleet.serving import Served, served
from support.disks import MIB, make_disk
from support.requirements import missing
from vmconv.api import compare
from vmconv_fleet.catalogue.scanning import Scanner
from vmconv_fleet.jobs.runner import JobRunner

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide" / "ansible.md"
COLLECTION = ROOT / "plugins" / "fleet" / "ansible"
MODULES = ("convert", "fanout", "policy")


CALLBACK = """
import json
from ansible.plugins.callback import CallbackBase

class CallbackModule(CallbackBase):
    CALLBACK_VERSION, CALLBACK_TYPE, CALLBACK_NAME = 2.0, "stdout", "lines"

    def v2_runner_on_ok(self, result, failed=False):
        print("RESULT " + json.dumps({**result._result, "failed": failed}, default=str))

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self.v2_runner_on_ok(result, failed=True)
"""
"""Prints the result of each task in a line."""


class House(NamedTuple):
    """Two nodes, the second with disks; Ansible asks the first."""

    here: Node
    other: Node
    api: Served
    images: Path
    directory: Path
    token: str

    def play(self, *tasks: object, options: Sequence[str] = (), code: int = 0) -> list[dict[str, Any]]:
        """Runs tasks on this machine; returns the results of their modules."""
        defaults = {"node": self.api.url, "token": "{{ fleet_token }}", "ca": self.api.ca, "timeout": 120}
        play = {
            "hosts": "localhost",
            "gather_facts": False,
            "module_defaults": {"group/vmconv.fleet.fleet": defaults},
            "tasks": list(tasks),
        }
        return self.run(yaml.safe_dump([play]), options=options, code=code)

    def run(self, playbook: str, *, options: Sequence[str] = (), code: int = 0) -> list[dict[str, Any]]:
        path = self.directory / "play.yml"
        path.write_text(playbook)
        known = {"fleet_node": self.api.url, "fleet_token": self.token, "fleet_ca": self.api.ca}
        own = {"ansible_python_interpreter": sys.executable, "ansible_connection": "local"}
        more = ["-i", "localhost,", "-e", json.dumps(known | own), *options]
        done = ansible(self.directory, "playbook", str(path), *more)
        assert done.returncode == code, done.stdout + done.stderr
        assert self.token not in done.stdout + done.stderr
        lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return [json.loads(line) for line in lines]

    def disks(self) -> set[str]:
        return {str(one.body["name"]) for one in self.other.service.view().find("disk", self.other.id)}

    def jobs(self) -> int:
        return len(self.other.service.view().find("job", self.other.id))


def ansible(directory: Path, what: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of Ansible that knows the collection."""
    more = {
        "ANSIBLE_COLLECTIONS_PATH": str(directory),
        "ANSIBLE_HOME": str(directory / "home"),
        "ANSIBLE_CALLBACK_PLUGINS": str(directory / "callbacks"),
        "ANSIBLE_STDOUT_CALLBACK": "lines",
    }
    command = [sys.executable, "-m", "ansible", what, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **more}, check=False, cwd=directory
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the collection, as Ansible finds it."""
    if importlib.util.find_spec("ansible") is None:
        missing("oracle", "ansible-core is not installed")
    (tmp_path / "ansible_collections" / "vmconv").mkdir(parents=True)
    (tmp_path / "ansible_collections" / "vmconv" / "fleet").symlink_to(COLLECTION)
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "lines.py").write_text(CALLBACK)
    return tmp_path


@pytest.fixture
def house(directory: Path, tmp_path: Path) -> Iterator[House]:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("web-1", "web-2"):
        make_disk(images / f"{name}.raw", MIB)
    with nodes(2, tmp_path) as (here, other), served(here) as api:
        # The administrators of n01 may change the policy of n02.
        parts = Scanner(other.service, {"ds": str(images)}), JobRunner(other.service, str(other.directory))
        for part in parts:
            part.start()
        here.until(lambda: len(here.service.view().find("disk", other.id)) == 2)
        try:
            yield House(here, other, api, images, directory, api.token("admin")["token"])
        finally:
            for part in parts:
                part.stop()


def test_the_playbook_of_the_guide_changes_nothing_the_second_time(house: House) -> None:
    (playbook,) = re.findall(r"<!-- playbook -->\n```yaml\n(.*?)```", GUIDE.read_text(), re.S)
    before = house.run(playbook, options=["--check", "--diff"])
    assert [one["changed"] for one in before] == [True, True, True]
    assert before[0]["diff"]["after"] == {"max_parallel": 3, "may_remove_source": False}
    assert before[2]["diff"] == {"before": "", "after": "web-2.qcow2\nweb-2.vhdx\n"}
    assert house.disks() == {"web-1.raw", "web-2.raw"}
    assert not house.jobs()
    first = house.run(playbook)
    assert [one["changed"] for one in first] == [True, True, True, False]
    assert first[3]["msg"] == "n02:web-1.qcow2, 1048576 bytes"
    assert house.disks() == {"web-1.raw", "web-2.raw", "web-1.qcow2", "web-2.qcow2", "web-2.vhdx"}
    for name in ("web-1.qcow2", "web-2.qcow2", "web-2.vhdx"):
        assert compare(str(house.images / f"{name[:5]}.raw"), str(house.images / name))
    for options in ([], ["--check"]):
        assert [one["changed"] for one in house.run(playbook, options=options)] == [False] * 4
    assert house.jobs() == 3


def task(module: str, **options: Any) -> dict[str, Any]:
    return {f"vmconv.fleet.{module}": options, "ignore_errors": True}


def convert(target: str, **options: Any) -> dict[str, Any]:
    return task("convert", **{"disk": "n02:web-1.raw", "format": "qcow2", "target": target, **options})


def test_what_cannot_be_is_told_in_one_line(house: House) -> None:
    (house.images / "other.qcow2").write_bytes(b"no image")
    make_disk(house.images / "small.raw", MIB // 2)
    house.api.local.call("POST", "/api/v1/nodes/n02/scan", {}, query={"wait": 30})
    house.here.until(lambda: house.disks() >= {"other.qcow2", "small.raw"})
    targets = [{"format": "qcow2", "target": "x"}] * 2
    cases = {
        "n02:other.qcow2 exists and cannot be read": convert("other.qcow2"),
        "n02:web-2.raw exists and is raw, not qcow2": convert("web-2.raw"),
        "n02:small.raw exists with 524288 bytes, and the source has 1048576": convert("small.raw", format="raw"),
        "no disks are 'n02:none.raw'": convert("x", disk="n02:none.raw"),
        "this node cannot write nosuch": convert("x", format="nosuch"),
        "datastore none does not exist": convert("x", target_datastore="none"),
        "cluster_size": convert("x", options={"cluster_size": "3"}),
        "is not the name of a file": convert("../x"),
        "this token is not known here": convert("x", token="vmf_" + "1" * 32 + "_" + "0" * 12 + "_" + "x" * 43),
        "https and a token are needed": convert("x", node="http://127.0.0.1:1"),
        "the node cannot be asked": convert("x", node="https://127.0.0.1:1"),
        "no certificate or crl found": convert("x", ca=str(ROOT / "LICENSE")),
        "targets: two have the same name": task("fanout", disk="n02:web-1.raw", targets=targets),
        "no node 'n77'": task("policy", of="n77", max_parallel=3),
        "max_parallel": task("policy", of="n02", max_parallel=0),
        "no node 'n78'": task("policy", of="n02", administrators_of=["n78"]),
    }
    results = house.play(*cases.values())
    for said, result in zip(cases, results, strict=True):
        assert result["failed"], (said, result)
        assert said in result["msg"], result
        assert "\n" not in result["msg"]
    assert not [name for name in os.listdir(house.images) if name == "x"]


def test_rules_are_reset_and_compared(house: House) -> None:
    rules = {
        "formats": ["vhdx", "qcow2"],
        "administrators_of": ["n01"],
        "between": "22:00-05:00",
        "bandwidth": {"ds": 5000000},
    }
    again = {**rules, "formats": ["qcow2", "vhdx"]}
    none = {"formats": ["all"], "administrators_of": ["all"], "between": "none", "bandwidth": {}}
    # Whose administrators are accepted is decided on the node itself.
    tasks = [task("policy", of="n01", **one) for one in (rules, again, none, none)]
    assert [one["changed"] for one in house.play(*tasks)] == [True, False, True, False]
    record = house.here.service.view().get(house.here.id, "policy", "conversion")
    assert record
    assert record.body["formats"] is None


def test_what_is_under_way_is_not_requested_again(house: House) -> None:
    """A request that its owner has not answered: the nodes are apart during the first run."""
    house.here.wire.disconnect()
    apart, again = house.play(convert("x.qcow2", timeout=1), convert("x.qcow2", timeout=1))
    assert "not done it within the timeout" in apart["msg"]
    assert "not done it within the timeout" in again["msg"]
    requests = house.here.service.view().find("request", house.here.id)
    assert [one.body["verb"] for one in requests].count("convert") == 1
    house.here.wire.reconnect()
    (result,) = house.play(convert("x.qcow2"))
    assert result["target"]["name"] == "x.qcow2"
    assert house.jobs() == 1


@pytest.mark.parametrize("module", MODULES)
def test_the_documentation_has_each_option(directory: Path, module: str) -> None:
    done = ansible(directory, "doc", "--json", f"vmconv.fleet.{module}")
    assert done.returncode == 0, done.stderr
    documented = json.loads(done.stdout)[f"vmconv.fleet.{module}"]["doc"]["options"]
    text = (COLLECTION / "plugins" / "modules" / f"{module}.py").read_text()
    probe = (
        "import json, sys\n"
        "import ansible.module_utils.basic as basic\n"
        "class Found(Exception): pass\n"
        "def found(spec, **_more): print(json.dumps(spec)); raise SystemExit\n"
        "basic.AnsibleModule = found\n"
        "from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder as Finder\n"
        f"Finder(paths=[{str(directory)!r}])._install()\n"
        f"exec(compile({text!r}, 'module', 'exec'), {{'__name__': '__main__'}})\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert documented.keys() == taken.keys()
    for name, spec in taken.items():
        for key, usual in (("type", "str"), ("required", False), ("default", None), ("choices", None)):
            assert documented[name].get(key, usual) == spec.get(key, usual), (name, key)
    assert taken["token"]["no_log"]


def test_the_token_is_not_shown_by_the_most_verbose_run(house: House) -> None:
    house.play(task("policy", of="n02", max_parallel=3), options=["-vvv"])


def test_a_node_on_the_same_machine_is_asked_by_its_socket(house: House) -> None:
    own = {"node": str(house.here.directory), "token": ""}
    (result,) = house.play(task("policy", of="n01", max_parallel=4, **own))
    assert result["changed"], result
