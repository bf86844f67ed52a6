"""The state of a TPM goes with the machine. Oracles: swtpm and tpm2-tools, and a state that VirtualBox wrote."""

from __future__ import annotations

import json
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, make_disk
from support.requirements import oracle_program
from support.tpm_states import SECRET, VIRTUALBOX, running
from vmconv.cli.main import main
from vmconv.errors import ImageError
from vmconv.machine import nvram
from vmconv.machine.nvram import Store, tpm

CONF = """\
name: web
ostype: win11
bios: ovmf
memory: 2048
scsihw: virtio-scsi-single
scsi0: local:100/vm-100-disk-0.raw,size=4M
smbios1: uuid=564d1234-0000-1111-2222-333344445555
"""
STATE = "vm-100-disk-1.raw"
WITH_TPM = f"{CONF}tpmstate0: local:100/{STATE},size=4M,version=v2.0\n"


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, bytes]:
    """The linear file of a TPM that keeps a secret, the same state for a directory, and the TPM's key."""
    directory = tmp_path_factory.mktemp("tpm")
    file = directory / "state.raw"
    with file.open("wb") as made:
        made.truncate(tpm.LINEAR_SIZE)
    with running(directory / "run", f"backend-uri=file://{file}") as one:
        one.keep_secret()
        key = one.endorsement_key()
    linear = file.read_bytes()
    state = tpm.read(linear, "state")
    assert state is not None
    return linear, tpm.swtpm(state), key


def test_the_files_of_swtpm_are_written_as_swtpm_writes_them(used: tuple[bytes, bytes, bytes], tmp_path: Path) -> None:
    state = tpm.read(used[0], "a")
    assert state is not None
    assert tpm.linear(state).rstrip(b"\0") == used[0].rstrip(b"\0")
    command = [oracle_program("swtpm_setup"), "--tpm2", "--tpmstate", str(tmp_path), "--create-ek-cert"]
    subprocess.run(command, check=True, capture_output=True)
    other = (tmp_path / "tpm2-00.permall").read_bytes()
    found = tpm.read(other, "c")
    assert found is not None
    assert tpm.swtpm(found) == other


def test_swtpm_takes_the_state_of_virtualbox(tmp_path: Path) -> None:
    keys = []
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tpm2-00.permall").write_bytes(tpm.swtpm(VIRTUALBOX))
    (tmp_path / "state.raw").write_bytes(tpm.linear(VIRTUALBOX))
    (tmp_path / "new").mkdir()
    for name, backend in (("a", "dir=own"), ("b", "backend-uri=file://state.raw"), ("c", "dir=new")):
        kind, _, path = backend.rpartition("//" if "//" in backend else "=")
        with running(tmp_path / name, f"{kind}{'//' if '//' in backend else '='}{tmp_path / path}") as one:
            keys.append(one.endorsement_key())
    assert keys[0] == keys[1]
    # A new TPM has another seed.
    assert keys[2] != keys[0]


@given(state=st.binary(max_size=5000))
def test_a_state_is_read_as_it_was_written(state: bytes) -> None:
    whole = VIRTUALBOX[:8] + state
    assert tpm.read(tpm.swtpm(whole), "a") == whole
    assert tpm.read(tpm.linear(whole), "a") == whole
    store = nvram.converted(Store("ovmf", ()), "virtualbox")[0]
    assert nvram.read(tpm.virtualbox(store, whole), "a").tpm == whole


@given(data=st.binary(max_size=300), at=st.integers(0, 250), linear=st.booleans())
def test_any_bytes_are_a_state_or_refused(data: bytes, at: int, linear: bool) -> None:
    whole = bytearray((tpm.linear if linear else tpm.swtpm)(VIRTUALBOX)[:2000])
    whole[at : at + len(data)] = data
    try:
        found = tpm.read(bytes(whole), "a")
    except ImageError as exc:
        assert str(exc).startswith("a: ")
    else:
        assert found is None or found[2:6] == VIRTUALBOX[2:6]


SOUND = tpm.swtpm(VIRTUALBOX)
LINEAR = tpm.linear(VIRTUALBOX)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x" * 100, "header at 0x0: is not one of swtpm's state of a TPM 2.0"),
        (SOUND[:5], "header at 0x0: 10 bytes reach past the end at 0x5"),
        (SOUND[:-1], "header at 0x0: is not one of swtpm's"),
        (SOUND[:5] + b"\1" + SOUND[6:], "encrypted or split (flags 0x1)"),
        (SOUND[:11] + b"\2" + SOUND[12:], "is encrypted (record 2)"),
        (SOUND[:12] + struct.pack(">I", 9999) + SOUND[16:], "record at 0x10: 9999 bytes reach past the end"),
        (SOUND[:18] + b"\0\0\0\0" + SOUND[22:], "is no state of a TPM 2.0 of libtpms"),
        (LINEAR[:8] + b"\2" + LINEAR[9:], "header at 0x8: version 2 with 192 bytes, not 1 with 192"),
        (LINEAR[:12] + b"\xff\xff\xff\x7f" + LINEAR[16:], "state at 0x7fffffff: "),
        (LINEAR[:14], "entry at 0xc: 12 bytes reach past the end"),
    ],
    ids=["text", "short", "cut", "flags", "record", "length", "other", "linear-version", "linear-place", "linear-cut"],
)
def test_a_damaged_state_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        tpm.read(data, "a")
    assert said in str(caught.value)


@pytest.mark.parametrize("data", [b"", bytes(100), LINEAR[:12] + bytes(180)], ids=["none", "zeros", "linear"])
def test_a_tpm_that_never_ran_has_no_state(data: bytes) -> None:
    assert tpm.read(data, "a") is None


def machine(directory: Path, conf: str, state: bytes | None) -> Path:
    directory.mkdir()
    make_disk(directory / "vm-100-disk-0.raw", 4 * MIB)
    if state is not None:
        (directory / STATE).write_bytes(state)
        (directory / STATE).chmod(0o600)
    (directory / "100.conf").write_text(conf)
    return directory / "100.conf"


def state_in(path: Path) -> bytes | None:
    """Returns the state in the tar of VirtualBox, read by Python's tarfile."""
    with tarfile.open(path) as tar:
        found = tar.extractfile("TpmEmuTpms/permall")
        assert found is not None
        return found.read()


def test_secrets_go_to_virtualbox_and_back(used: tuple[bytes, bytes, bytes], tmp_path: Path) -> None:
    linear, _, key = used
    config = machine(tmp_path / "source", WITH_TPM, linear)
    there = vmconv.machine_convert(config, tmp_path / "there", target_format="vbox")
    assert [loss for loss in there.plan.losses if loss.path.startswith("tpm")] == []
    (store,) = Path(there.target).parent.glob("*.nvram")
    assert state_in(store) == tpm.read(linear, "a")
    assert stat.S_IMODE(store.stat().st_mode) == 0o600
    back = vmconv.machine_convert(there.target, tmp_path / "back", target_format="proxmox")
    assert [loss for loss in back.plan.losses if loss.path.startswith("tpm")] == []
    conf = Path(back.target).read_text()
    (line,) = (line for line in conf.splitlines() if line.startswith("tpmstate0"))
    name = line.partition("/")[2].partition(",")[0]
    (made,) = tmp_path.glob(f"back/**/{name}")
    assert made.stat().st_size == tpm.LINEAR_SIZE
    assert line == f"tpmstate0: local:100/{name},size=4M,version=v2.0"
    with running(tmp_path / "run", f"backend-uri=file://{made}") as one:
        assert one.secret() == SECRET
        assert one.endorsement_key() == key


def test_libvirt_gets_a_file_for_swtpm_and_says_where_it_goes(used: tuple[bytes, bytes, bytes], tmp_path: Path) -> None:
    linear, permall, key = used
    config = machine(tmp_path / "source", WITH_TPM, linear)
    done = vmconv.machine_convert(config, tmp_path / "there", target_format="libvirt")
    made = tmp_path / "there" / "web-tpm2-00.permall"
    assert made.read_bytes() == permall
    place = "/var/lib/libvirt/swtpm/564d1234-0000-1111-2222-333344445555/tpm2/tpm2-00.permall"
    said = f"web-tpm2-00.permall is the state of the TPM: install it as {place} before the machine starts"
    assert said in done.plan.warnings
    (tmp_path / "own").mkdir()
    made.rename(tmp_path / "own" / "tpm2-00.permall")
    with running(tmp_path / "run", f"dir={tmp_path / 'own'}") as one:
        assert (one.secret(), one.endorsement_key()) == (SECRET, key)


def losses(config: Path, directory: Path, target: str) -> list[tuple[str, str]]:
    plan = vmconv.machine_plan(config, directory, target_format=target)
    return [(loss.value, loss.reason) for loss in plan.losses if loss.path == "tpm.state"]


SUSPEND = "; suspend BitLocker in the guest first"


@pytest.mark.parametrize("target", ["hyperv", "kubevirt", "ovf"])
def test_platforms_that_take_no_state_lose_it(target: str, tmp_path: Path) -> None:
    config = machine(tmp_path / "source", WITH_TPM, LINEAR)
    assert losses(config, tmp_path, target) == [(STATE, f"{target} takes no state of a TPM{SUSPEND}")]
    assert main(["machine", "convert", "--keep", "tpm.state", "-O", target, str(config), str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("conf", "state", "said"),
    [
        (WITH_TPM, None, "No such file"),
        (WITH_TPM, b"x" * 100, "header at 0x0"),
        (WITH_TPM, bytes(tpm.MAX_FILE + 1), "the state of a TPM has at most"),
        (WITH_TPM.replace("bios: ovmf\n", ""), LINEAR, "this is a BIOS"),
    ],
    ids=["missing", "damaged", "large", "bios"],
)
def test_a_state_that_cannot_be_carried_is_a_loss_with_its_reason(
    conf: str, state: bytes | None, said: str, tmp_path: Path
) -> None:
    config = machine(tmp_path / "source", conf, state)
    ((name, reason),) = losses(config, tmp_path, "vbox")
    assert name == STATE
    assert said in reason
    assert reason.endswith(SUSPEND)


LIBVIRT = """<domain type='kvm'><name>a</name><memory>524288</memory><vcpu>1</vcpu><os firmware='efi'>
<type arch='x86_64'>hvm</type></os><devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
</devices></domain>"""
VMX = 'config.version = "8"\nvirtualHW.version = "19"\nmemsize = "512"\nfirmware = "efi"\nvtpm.present = "TRUE"\n'


@pytest.mark.parametrize("target", ["libvirt", "proxmox", "vbox", "kubevirt", "ovf"])
@pytest.mark.parametrize(("name", "text"), [("a.xml", LIBVIRT), ("a.vmx", VMX)], ids=["libvirt", "vmx"])
def test_a_tpm_without_a_file_is_a_loss(name: str, text: str, target: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    lost = [("its secrets", f"the configuration names no file with them{SUSPEND}")]
    assert losses(tmp_path / name, tmp_path / "new", target) == lost


def test_state_on_a_storage_without_files_is_a_loss(tmp_path: Path) -> None:
    conf = WITH_TPM.replace(f"local:100/{STATE}", "local-lvm:vm-100-disk-2")
    assert conf != WITH_TPM
    ((name, reason),) = losses(machine(tmp_path / "source", conf, None), tmp_path, "vbox")
    assert name == "local-lvm:vm-100-disk-2"
    assert reason.endswith(SUSPEND)


def test_an_empty_state_is_no_loss_and_proxmox_gets_a_new_one(tmp_path: Path) -> None:
    config = machine(tmp_path / "source", WITH_TPM, bytes(tpm.LINEAR_SIZE))
    assert losses(config, tmp_path, "vbox") == []
    done = vmconv.machine_convert(config, tmp_path / "there", target_format="proxmox", options={"vmid": "101"})
    (made,) = (tmp_path / "there").glob("**/vm-101-disk-1.raw")
    assert made.read_bytes() == bytes(tpm.LINEAR_SIZE)
    assert done.plan.losses == ()


def tpm_findings(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    capsys.readouterr()
    main(["machine", "check", "--output", "json", *arguments, str(config)])
    return [(one["level"], one["text"]) for one in json.loads(capsys.readouterr().out) if one["path"] == "tpm"]


def test_check_says_whether_the_secrets_are_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path / "source", WITH_TPM, LINEAR)
    assert tpm_findings(config, capsys, "-O", "vbox") == [("note", "its state is moved")]
    stays = [("warning", "the secrets in the TPM are not moved")]
    assert tpm_findings(config, capsys, "-O", "kubevirt") == stays
    assert tpm_findings(config, capsys) == stays
    other = machine(tmp_path / "other", WITH_TPM, b"x")
    assert tpm_findings(other, capsys, "-O", "vbox") == stays
