"""KubeVirt's published types, and another YAML parser, on the objects that vmconv writes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.requirements import missing, oracle_program
from vmconv.machine import Board, Controller, Cpu, Disk, Firmware, GuestOS, Identity, Machine, Memory, Nic, Tpm
from vmconv.testing.machines import HOSTILE
from vmconv_kubevirt import Kubevirt
from vmconv_kubevirt.options import Options

KUBEVIRT = Kubevirt()
PACKAGES = ("@kubevirt-ui-ext/kubevirt-api@1.7.0", "typescript@5.9.3", "yaml@2.8.1")
CHECK = """
import type {{ V1VirtualMachine }} from "@kubevirt-ui-ext/kubevirt-api/kubevirt";
import type {{ V1beta1DataVolume }} from "@kubevirt-ui-ext/kubevirt-api/containerized-data-importer";
{lines}
"""
PARSE = """
const YAML = require("yaml"), text = require("fs").readFileSync(0, "utf8");
const read = version => YAML.parseAllDocuments(text, {version}).map(each => each.toJS());
console.log(JSON.stringify(["1.1", "1.2"].map(read)));
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the packages of npm."""
    directory = tmp_path_factory.mktemp("npm")
    command = [oracle_program("npm"), "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        missing("oracle", f"npm: {done.stderr.strip()[-200:]}")
    return directory


def written(subject: Machine, **options: Any) -> bytes:
    chosen = Options(**options)
    return KUBEVIRT.write(KUBEVIRT.adapt(subject, chosen).machine, chosen)[-1].content


def everything() -> Machine:
    return Machine(
        name="web",
        description="a\nb",
        os=GuestOS(id="win2k22", architecture="x86_64"),
        cpu=Cpu(count=8, sockets=2, cores=2, threads=2, model="host-model"),
        memory=Memory(size=3 << 30),
        firmware=Firmware(kind="uefi", secure_boot=True, boot_order=("disk", "network")),
        tpm=Tpm(),
        identity=Identity(serial="S", chassis_serial="C", asset_tag="A"),
        board=Board(clock="utc"),
        controllers=(Controller(bus="scsi", model="pvscsi"),),
        disks=(
            Disk(file="a.qcow2", format="qcow2", capacity=1 << 30, bus="scsi", controller=0, serial="S1", shared=True),
            Disk(device="persistentVolumeClaim:data", bus="virtio"),
            Disk(device="/dev/sdb"),
            Disk(capacity=1 << 20),
        ),
        nics=(Nic(mac="00:50:56:aa:bb:cc", model="vmxnet3", connected=False), Nic(network="lan", boot_index=0)),
        sound="hda",
        watchdog="i6300esb",
        rng=True,
    )


SUBJECTS: dict[str, tuple[Machine, dict[str, Any]]] = {
    "everything": (everything(), {"namespace": "vms", "storage_class": "fast", "running": True}),
    "nothing": (Machine(memory=Memory(size=1 << 20)), {}),
    "bios": (
        Machine(memory=Memory(size=1 << 20), firmware=Firmware(kind="bios"), disks=(Disk(file="a", capacity=5),)),
        {},
    ),
}


def typed(content: bytes) -> str:
    """Returns TypeScript that assigns each object to a constant of its type."""
    types = {"VirtualMachine": "V1VirtualMachine", "DataVolume": "V1beta1DataVolume"}
    found = enumerate(yaml.safe_load_all(content))
    return "\n".join(f"export const o{at}: {types[each['kind']]} = {json.dumps(each)};" for at, each in found)


def problems(node: Path, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        (node / f"{name}.ts").write_text(CHECK.format(lines=text))
    compiler = [str(node / "node_modules" / ".bin" / "tsc"), "--noEmit", "--strict", "--skipLibCheck"]
    flags = ["--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext"]
    command = [*compiler, *flags, *(f"{name}.ts" for name in texts)]
    done = subprocess.run(command, cwd=node, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout + done.stderr


def test_objects_have_the_fields_of_kubevirts_types(node: Path) -> None:
    assert (
        problems(node, {name: typed(written(subject, **options)) for name, (subject, options) in SUBJECTS.items()})
        == ""
    )


def test_the_types_find_fields_at_wrong_places(node: Path) -> None:
    # virt-v2v 2.10 writes these.
    content = yaml.safe_load(written(everything()).split(b"\n---\n")[0])
    content["spec"]["template"]["spec"]["domain"]["cpu"]["thread"] = 1
    content["spec"]["template"]["spec"]["networks"][0]["networkName"] = "lan"
    found = problems(node, {"wrong": typed(yaml.safe_dump(content).encode())})
    assert "'\"thread\"' does not exist" in found
    assert "'\"networkName\"' does not exist" in found


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_is_text_for_every_version_of_yaml(node: Path, text: str) -> None:
    identity = Identity(chassis_serial=text.replace("\n", " "), asset_tag="1e3")
    subject = Machine(name="on", description=text, memory=Memory(size=1 << 20), identity=identity)
    content = written(subject)
    command = [oracle_program("node"), "-e", PARSE]
    done = subprocess.run(command, cwd=node, input=content, capture_output=True, timeout=60, check=True)
    old, new = json.loads(done.stdout)
    assert old == new == list(yaml.safe_load_all(content))
    assert old[0]["metadata"]["annotations"]["description"] == text
    chassis = old[0]["spec"]["template"]["spec"]["domain"]["chassis"]
    assert chassis == {"serial": identity.chassis_serial, "asset": "1e3"}
    assert old[0]["metadata"]["name"] == "on"
