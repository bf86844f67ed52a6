"""EFI variable stores: what is read, what is carried into new ones, and what other firmware makes of them."""

from __future__ import annotations

import json
import lzma
import random
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.efi_stores import guest_state, with_tpm
from support.requirements import CORPUS, missing, oracle_program
from vmconv.errors import ImageError, PlanError, VmconvError
from vmconv.machine.nvram import Store, Variable, converted, enforces_secure_boot, ovmf, read, vmware, written_into
from vmconv.testing import image_file
from vmconv.testing.malformed import memory_limit, time_limit

GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
SECURITY = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SHIM = UUID("605dab50-e046-4300-abb6-3dd810dd8b23")
ENABLE = UUID("f0a30bc7-af08-4556-99c4-001009c93a44")
TIME = struct.pack("<HBBBBBBIhBB", 2010, 3, 6, 19, 17, 21, 0, 0, 0, 0, 0)
FIRMWARE = Path("/usr/share/OVMF")
BOOT_TIMEOUT = 120


def option(path: bytes, title: str = "debian") -> bytes:
    """Returns an EFI_LOAD_OPTION with a device path."""
    path += bytes.fromhex("7fff0400")
    return struct.pack("<IH", 1, len(path)) + f"{title}\0".encode("utf-16-le") + path


HD = option(bytes.fromhex("04012a00") + bytes(38))
FILE = option(bytes.fromhex("04040600") + b"a\0")
PCI = option(bytes.fromhex("02010c00d041030a00000000") + bytes.fromhex("04012a00") + bytes(38))


def boot(*numbers: int) -> Variable:
    return Variable(GLOBAL, "BootOrder", 7, struct.pack(f"<{len(numbers)}H", *numbers))


def entry(number: int, data: bytes) -> Variable:
    return Variable(GLOBAL, f"Boot{number:04X}", 7, data)


PK = Variable(GLOBAL, "PK", 0x27, b"platform key", TIME)
SOURCE = Store(
    "vmware",
    (
        PK,
        Variable(SECURITY, "db", 0x27, b"x" * 5000, TIME),
        Variable(GLOBAL, "db", 0x27, b"of another GUID"),
        Variable(SHIM, "MokListTrusted", 3, b"\1"),
        Variable(GLOBAL, "ConOut", 7, b"console"),
        boot(1, 0xA, 2, 7, 1),
        entry(1, HD),
        entry(2, PCI),
        entry(3, HD),
        entry(0xA, FILE),
    ),
)


def corpus(name: str) -> bytes:
    path = CORPUS / "nvram" / f"{name}.xz"
    if not path.exists():
        missing("corpus", f"{path} is not there")
    return lzma.decompress(path.read_bytes())


def firmware(name: str) -> Path:
    path = FIRMWARE / name
    if not path.exists():
        missing("oracle", f"{path} is not there (Debian's ovmf)")
    return path


def names(variables: Sequence[Variable]) -> list[str]:
    return [variable.name for variable in variables]


def by_another_program(store: bytes, directory: Path) -> list[tuple[str, str, int, bytes, str]]:
    """Returns the variables that virt-fw-vars finds: name, GUID, attributes, data, time in hexadecimal."""
    (directory / "store").write_bytes(store)
    command = [oracle_program("virt-fw-vars"), "-i", str(directory / "store"), "--output-json", str(directory / "json")]
    subprocess.run(command, capture_output=True, check=True)
    found = json.loads((directory / "json").read_text())["variables"]
    return [(v["name"], v["guid"], v["attr"], bytes.fromhex(v["data"]), v.get("time", bytes(16).hex())) for v in found]


def as_stated(variables: Sequence[Variable]) -> list[tuple[str, str, int, bytes, str]]:
    return [(v.name, str(v.guid), v.attributes, v.data, v.time.hex()) for v in variables]


@pytest.mark.parametrize(("size", "template"), [("2M", "OVMF_VARS.fd"), ("4M", "OVMF_VARS_4M.fd")])
def test_a_store_without_variables_is_the_one_that_comes_with_ovmf(size: str, template: str) -> None:
    assert ovmf.write((), size) == firmware(template).read_bytes()


def test_the_keys_of_debians_store_are_written_as_they_are_there(tmp_path: Path) -> None:
    template = firmware("OVMF_VARS_4M.ms.fd").read_bytes()
    store = read(template, "OVMF_VARS_4M.ms.fd")
    assert as_stated(store.variables) == by_another_program(template, tmp_path)
    assert {"PK", "KEK", "db", "dbx"} < set(names(store.variables))
    assert read(ovmf.write(store.variables), "copy").variables == store.variables


def test_what_virtualbox_wrote_is_read_and_written_by_byte(tmp_path: Path) -> None:
    source = corpus("virtualbox7.nvram")
    store = read(source, "virtualbox7.nvram")
    assert as_stated(store.variables) == by_another_program(source, tmp_path)
    ours = ovmf.write(store.variables)
    # VirtualBox fills up to the next variable with zeros, and its checksum of the working block is another.
    other = [at for at in range(len(ours)) if ours[at] != source[at]]
    assert [at for at in other if not 0x41010 <= at < 0x41014] == [0xCA3, 0x3707, 0x565B, 0x5AAA, 0x5AAB]


def test_what_esxi_wrote_is_read_to_its_last_variable(tmp_path: Path) -> None:
    store = read(corpus("esxi7.nvram"), "esxi7.nvram")
    assert store.kind == "vmware"
    assert len(store.variables) == 25
    sizes = {variable.name: len(variable.data) for variable in store.variables}
    assert (sizes["PK"], sizes["KEK"], sizes["db"], sizes["dbx"]) == (45, 1560, 5161, 3724)
    assert store.variables[-1].name == "MemoryTypeInformation"


@pytest.mark.parametrize(("size", "kind"), [("2M", "ovmf"), ("4M", "ovmf"), ("4M", "virtualbox")])
def test_another_program_finds_in_a_new_store_what_esxis_had(size: str, kind: str, tmp_path: Path) -> None:
    store = read(corpus("esxi7.nvram"), "esxi7.nvram")
    made, dropped = converted(store, kind, size=size)
    keys = [variable for variable in store.variables if variable.name in ("PK", "KEK", "db", "dbx")]
    assert len(made) == {"2M": 131072, "4M": 540672}[size]
    assert by_another_program(made, tmp_path) == as_stated(keys)
    assert len(dropped) == 21
    assert "ConOut: belongs to the firmware or the hardware of the source" in dropped


def test_a_new_store_has_keys_and_entries_of_partitions_and_files() -> None:
    made, dropped = converted(SOURCE, "ovmf")
    found = {str(variable): variable for variable in read(made, "made").variables}
    assert list(found) == ["PK", f"db-{SECURITY}", f"MokListTrusted-{SHIM}", "BootOrder", "Boot0001", "Boot000A"]
    assert found["PK"] == PK
    assert found["BootOrder"].data == struct.pack("<2H", 1, 0xA)
    assert dropped == (
        "db: belongs to the firmware or the hardware of the source",
        "ConOut: belongs to the firmware or the hardware of the source",
        "Boot0002: begins with a device of the source's hardware, not with a partition or a file",
        "Boot0003: BootOrder does not name it",
    )


def test_a_boot_order_without_carried_entries_is_dropped() -> None:
    made, dropped = converted(Store("ovmf", (boot(2), entry(2, PCI))), "ovmf")
    assert made == ovmf.write(())
    assert dropped == (
        "BootOrder: none of its entries is carried",
        "Boot0002: begins with a device of the source's hardware, not with a partition or a file",
    )


@pytest.mark.parametrize("data", [b"", b"\1\0\0\0\4\0", b"a\0" * 20, b"\0" * 8, b"\0" * 9, option(b"")], ids=len)
def test_a_damaged_boot_entry_is_dropped(data: bytes) -> None:
    _, dropped = converted(Store("ovmf", (boot(1), entry(1, data))), "ovmf")
    assert len(dropped) == 2


@pytest.mark.parametrize("stated", [True, False])
def test_secure_boot_is_as_the_configuration_states_it(stated: bool) -> None:
    own = Variable(ENABLE, "SecureBootEnable", 3, bytes([not stated]))
    store = Store("ovmf", (PK, own))
    assert read(converted(store, "ovmf")[0], "made").variables == (PK, own)
    set_by_us = read(converted(store, "ovmf", secure_boot=stated)[0], "made").variables
    assert set_by_us == (PK, own._replace(data=bytes([stated])))


@pytest.mark.parametrize(
    ("key", "switch", "enforced"),
    [(b"k", None, True), (b"k", b"\1", True), (b"k", b"\0", False), (None, b"\1", False), (b"", None, False)],
    ids=["key", "on", "off", "no-key", "empty-key"],
)
def test_secure_boot_is_on_with_a_platform_key_unless_it_is_switched_off(
    key: bytes | None, switch: bytes | None, enforced: bool
) -> None:
    stated = [(GLOBAL, "PK", 0x27, key), (ENABLE, "SecureBootEnable", 3, switch)]
    found = tuple(Variable(guid, name, flags, data) for guid, name, flags, data in stated if data is not None)
    assert enforces_secure_boot(Store("ovmf", found)) is enforced


@pytest.mark.parametrize("kind", ["vmware", "vmgs", "other"])
def test_other_stores_are_not_made(kind: str) -> None:
    with pytest.raises(PlanError, match=f"a new EFI variable store of kind '{kind}' cannot be made"):
        converted(SOURCE, kind)


def test_variables_that_do_not_fit_are_refused() -> None:
    large = Store("ovmf", (PK._replace(data=bytes(60000)),))
    assert len(converted(large, "ovmf", size="4M")[0]) == 540672
    with pytest.raises(PlanError, match="EFI variables have 60068 bytes, a store of size 2M holds 57244"):
        converted(large, "ovmf", size="2M")


def test_a_tar_of_virtualbox_has_a_store_and_a_tpm() -> None:
    tar = with_tpm(ovmf.write(SOURCE.variables))
    store = read(tar, "a.nvram")
    assert store == Store("virtualbox", SOURCE.variables, (), b"state")
    names = ("efi/nvram", "other")
    assert converted(read(with_tpm(ovmf.write(()), names), "a.nvram"), "ovmf")[1] == ("other: is no EFI variable",)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (["TpmEmuTpms/permall"], "tar without a member 'efi/nvram'"),
        (["efi/nvram", "efi/nvram"], "is there twice"),
        ([f"a{number}" for number in range(70)], "is one too many"),
        (["x" * 200], "is no plain file"),
    ],
    ids=["without", "twice", "many", "long"],
)
def test_other_tars_are_refused(members: list[str], problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        read(with_tpm(ovmf.write(()), members), "a.nvram")


def test_a_guest_state_file_of_hyper_v_is_read() -> None:
    made = [(v.guid, v.name, v.attributes, v.data, v.time) for v in SOURCE.variables]
    assert read(guest_state(made), "a.vmgs") == Store("vmgs", SOURCE.variables)
    assert read(guest_state(made, sequences=(0xFFFFFFFF, 0), tpm=True), "a.vmgs").others == ("state of the TPM",)
    assert read(guest_state([]), "a.vmgs").variables == ()


def _with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


STATE = guest_state([(GLOBAL, "PK", 0x27, b"key", TIME)])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (guest_state([], encryption=1), r"a.vmgs: is encrypted \(algorithm 1\)"),
        (guest_state([], sequences=(3, 9)), "sequence numbers 3 and 9 do not follow"),
        (_with_bytes(_with_bytes(STATE, 40, b"x"), 512 + 40, b"x"), "neither it nor its copy is a valid header"),
        (_with_bytes(STATE, 8192 + 64 + 4, b"\xff\xff"), r"file 1 at 0x2040: blocks 3\+65535 are not in the file"),
        (_with_bytes(STATE, 8192 + 64 + 8, b"\xff\xff"), "file 1 at 0x2040: 65535 bytes in 1 blocks"),
        (_with_bytes(STATE, 12288, b"\1"), "variable at 0x3000: kind 1"),
        (_with_bytes(STATE, 12288 + 4, b"\xff"), r"variable at 0x3000: kind 0, 255 bytes with 6\+3 in them"),
        (_with_bytes(STATE, 12288 + 50, b"\0"), "variable at 0x3000: its name 'P.*' does not end with its only NUL"),
        (b"vhdxfile" + bytes(600), "a.vmgs: is a VHDX image"),
        (b"", "a.vmgs: is no EFI variable store of a known kind"),
    ],
    ids=["encrypted", "sequence", "checksum", "blocks", "valid", "kind", "length", "name", "vhdx", "empty"],
)
def test_guest_state_files_that_cannot_be_read_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        read(content, "a.vmgs")


def test_one_header_is_enough_for_a_guest_state_file() -> None:
    assert names(read(_with_bytes(STATE, 40, b"x"), "a.vmgs").variables) == ["PK"]


VMWARE = struct.pack("<4sI", b"MRVN", 1) + struct.pack("<8sI", b"CMOS", 4) + b"cmos"


def empty(size: int) -> bytes:
    """Returns a file of VMware with a section of this size for variables."""
    return VMWARE + struct.pack("<8sI8sII", b"EFI_NV", size, b"VMWNVRAM", 0, 16) + b"\xff" * (size - 16)


EFI = empty(0x4000)
SMALL = ovmf.write((PK,))


@pytest.mark.parametrize(
    ("at", "new", "problem"),
    [
        (0x10, b"\0", "firmware volume header at 0x10: volume .* holds no variables"),
        (0x20, b"\xff\xff\xff\xff", "firmware volume at 0x0: length .* is past the end of the file"),
        (0x30, b"\0\0", "firmware volume header at 0x30: length 0 is not possible"),
        (0x32, b"\0\0", "firmware volume header at 0x32: its checksum is wrong"),
        (0x48, b"\0", "variable store header at 0x48: stores of kind .* are not supported"),
        (0x58, b"\xff\xff\xff", "variable store header at 0x58: size 0xffffff is past the volume's end"),
        (0x5D, b"\xff", "variable store header at 0x5c: format 0x5a, state 0xff: not healthy"),
        (0x64, b"\0", "variable at 0x64: begins with 0x5500, not 0x55aa"),
        (0x64 + 36, b"\xff\xff\xff", "variable at 0xa0: .* bytes reach past the end at 0x40000"),
        (0x64 + 62, b"\0\0", "variable at 0x64: its name .* does not end with its only NUL"),
        (0x64 + 60, b"\0\xdc", "variable at 0x64: its name is not UTF-16"),
    ],
    ids=["guid", "length", "header", "checksum", "kind", "size", "state", "start", "data", "nul", "utf-16"],
)
def test_damaged_stores_of_ovmf_are_refused_with_the_offset(at: int, new: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=f"^a.fd: {problem}"):
        read(_with_bytes(SMALL, at, new), "a.fd")


def test_a_variable_counts_by_its_state() -> None:
    records = [PK._replace(data=data) for data in (b"deleted", b"was deleted when it stopped", b"added", b"later")]
    data = bytearray(ovmf.write((*records, Variable(GLOBAL, "torn", 7, b"half"))))
    starts = [at for at in range(0x64, 0x400, 4) if data[at : at + 2] == b"\xaa\x55"]
    for at, state in zip(starts, (0x3C, 0x3E, 0x3F, 0x3F, 0x7F), strict=True):
        data[at + 2] = state
    assert read(bytes(data), "a.fd").variables == (records[2],)
    data[starts[2] + 2] = data[starts[3] + 2] = 0x3D
    assert read(bytes(data), "a.fd").variables == (records[1],)


WRITE = bytes.fromhex("fcffffff48b20c47ace83c47bb4f81069a1fe6fdffffffff01000000000000000000000000000000")
WRITE_PART = bytes.fromhex("ffffffffffffffff00000000000000004800000000000000b8ff03000000000000e0fbffffffffff")
"""What OVMF had in its working block when QEMU was killed while it rewrote the store in its spare blocks."""


@pytest.mark.parametrize(
    ("write", "flags", "is_read"),
    [(0xFC, 0xFF, True), (0xFC, 0xFD, False), (0xFC, 0xF9, True), (0xF8, 0xFD, True), (0xFE, 0xFD, True)],
    ids=["in-spare", "in-place", "moved", "complete", "not-stated"],
)
def test_a_store_that_was_being_moved_is_refused(write: int, flags: int, is_read: bool) -> None:
    complete = bytes([0xF8]) + WRITE[1:] + bytes([0xF9]) + WRITE_PART[1:]
    queue = complete + bytes([write]) + WRITE[1:] + bytes([flags]) + WRITE_PART[1:]
    data = _with_bytes(SMALL, 0x41020, queue)
    if is_read:
        assert read(data, "a.fd").variables == (PK,)
    else:
        with pytest.raises(ImageError, match="fault tolerant write at 0x41070: was not completed"):
            read(data, "a.fd")


def test_writes_without_end_are_read_in_bounded_time() -> None:
    data = _with_bytes(SMALL, 0x41020, WRITE[:24] + b"\xff" * 16 + WRITE_PART)
    with time_limit():
        assert read(data, "a.fd").variables == (PK,)


def test_a_store_in_a_larger_flash_image_is_read() -> None:
    assert read(image_file(SMALL + b"\xff" * (1 << 20), "flash"), "flash").variables == (PK,)


def test_a_file_that_is_too_large_is_refused_unread() -> None:
    with pytest.raises(ImageError, match="has 67108865 bytes, an EFI variable store has at most 67108864"):
        read(bytes((64 << 20) + 1), "large")


def test_more_variables_than_any_firmware_has_are_refused() -> None:
    space = empty(0x80000)
    crowd = [Variable(GLOBAL, f"v{number}", 7, b"x") for number in range(4097)]
    assert len(read(vmware.write(space, crowd[:4096], "many"), "many").variables) == 4096
    with pytest.raises(ImageError, match="many: has more than 4096 variables"):
        read(vmware.write(space, crowd, "many"), "many")


def test_a_store_of_vmware_keeps_what_is_not_carried() -> None:
    own = Variable(GLOBAL, "Lang", 7, b"eng\0")
    existing = vmware.write(EFI, (PK._replace(data=b"of VMware"), own, boot(2), entry(2, PCI)), "a.nvram")
    made, dropped = written_into(SOURCE, existing, "a.nvram")
    assert len(made) == len(existing)
    assert made.startswith(VMWARE)
    found = read(made, "a.nvram").variables
    assert names(found) == ["PK", "db", "MokListTrusted", "BootOrder", "Boot0001", "Boot000A", "Lang"]
    assert found[0] == PK
    assert len(dropped) == 4
    without = written_into(Store("ovmf", (PK,)), existing, "a.nvram")[0]
    assert names(read(without, "a.nvram").variables) == ["PK", "Lang", "BootOrder", "Boot0002"]


def test_esxis_file_is_written_with_the_keys_of_another() -> None:
    existing = corpus("esxi7.nvram")
    source = read(corpus("virtualbox7.nvram"), "virtualbox7.nvram")
    made, _ = written_into(source, existing, "esxi7.nvram")
    found = {str(variable): variable for variable in read(made, "made").variables}
    assert len(found) == 25
    assert all(found[str(one)] == one for one in source.variables if one.name in ("PK", "KEK", "db", "dbx"))
    assert made[:0x21F8] == existing[:0x21F8]
    assert len(made) == len(existing)


def test_the_last_of_equal_variables_counts_in_vmwares_store() -> None:
    made = vmware.write(EFI, (PK, PK._replace(data=b"later")), "a.nvram")
    assert read(made, "a.nvram").variables == (PK._replace(data=b"later"),)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (VMWARE, "a.nvram: has no section of EFI variables"),
        (VMWARE[:-1], "section b'CMOS.*' at 0x14: 4 bytes reach past the end"),
        (EFI[:-1], "section b'EFI_NV.*' at 0x24: 16384 bytes reach past the end"),
        (_with_bytes(EFI, 0x24, b"x"), "EFI variables at 0x24: begin with b'xMWNVRAM'"),
        (_with_bytes(EFI, 0x30, b"\xff\xff"), "EFI variables at 0x30: length 0xffff is past the end"),
        (_with_bytes(EFI, 0x30, b"\x20"), "variable at 0x34: 28 bytes reach past the end at 0x44"),
        (struct.pack("<4sI", b"MRVN", 1) + struct.pack("<8sI", b"X", 0) * 100, "no section of EFI variables"),
    ],
    ids=["bios", "cut", "short", "magic", "length", "record", "sections"],
)
def test_damaged_stores_of_vmware_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        read(content, "a.nvram")


def test_a_store_of_vmware_has_limited_space() -> None:
    with pytest.raises(PlanError, match=r"a.nvram: EFI variables have \d+ bytes, the file has space for 16368"):
        vmware.write(EFI, (PK._replace(data=bytes(16384)),), "a.nvram")
    with pytest.raises(PlanError, match=r"a\.fd: is no EFI variable store of VMware"):
        written_into(SOURCE, SMALL, "a.fd")


VARIABLES = st.lists(
    st.builds(
        Variable,
        guid=st.uuids() | st.sampled_from([GLOBAL, SECURITY]),
        name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
        attributes=st.sampled_from([3, 7, 0x27]),
        data=st.binary(min_size=1, max_size=300),
        time=st.just(bytes(16)),
    ),
    max_size=8,
    unique_by=lambda variable: (variable.guid, variable.name),
).map(lambda found: tuple(v._replace(time=TIME) if v.attributes & 0x20 else v for v in found))


def _in_guest_state(variables: Sequence[Variable]) -> bytes:
    return guest_state([(v.guid, v.name, v.attributes, v.data, v.time) for v in variables])


WRITERS: dict[str, Callable[[Sequence[Variable]], bytes]] = {
    "ovmf": ovmf.write,
    "virtualbox": lambda variables: with_tpm(ovmf.write(variables)),
    "vmware": lambda variables: vmware.write(EFI, variables, "a.nvram"),
    "vmgs": _in_guest_state,
}


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=50, deadline=None)
@given(variables=VARIABLES)
def test_written_variables_are_read_again(kind: str, variables: tuple[Variable, ...]) -> None:
    store = read(WRITERS[kind](variables), "a")
    assert store.kind == kind
    assert store.variables == variables


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_stores_are_read_or_refused_soon(kind: str) -> None:
    rng = random.Random(kind)
    sound = WRITERS[kind](SOURCE.variables)
    used = [at for at in range(len(sound)) if sound[at] not in (0, 0xFF)]
    for _ in range(300):
        data = bytearray(sound)
        for at in rng.choices(used, k=rng.randint(1, 5)):
            data[at : at + rng.choice((1, 4))] = rng.choice((b"\0", b"\xff\xff\xff\xff", rng.randbytes(4)))
        del data[rng.choice((len(data), rng.randrange(len(data)))) :]
        with time_limit(), memory_limit():
            try:
                converted(read(bytes(data), "a"), "ovmf")
            except VmconvError as exc:
                assert "\n" not in str(exc)


def _started(store: Path) -> subprocess.Popen[bytes]:
    code = firmware("OVMF_CODE_4M.secboot.fd")
    machine = ["-machine", "q35,smm=on,accel=tcg", "-m", "256", "-nodefaults", "-display", "none"]
    flash = ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    for unit, (path, rights) in enumerate([(code, "on"), (store, "off")]):
        flash += ["-drive", f"if=pflash,unit={unit},format=raw,readonly={rights},file={path}"]
    return subprocess.Popen([oracle_program("qemu-system-x86_64"), *machine, *flash], stderr=subprocess.DEVNULL)


def _after_boot(store: Path) -> dict[str, bytes]:
    """Returns the variables after OVMF has booted.

    It has chosen what to start, which writes BootOrder, and has written nothing since the last look.
    """
    running = _started(store)
    last: dict[str, bytes] = {}
    try:
        deadline = time.monotonic() + BOOT_TIMEOUT
        while time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.5)
            # A store that OVMF is writing may be incomplete.
            try:
                found = {variable.name: variable.data for variable in read(store.read_bytes(), "store").variables}
            except ImageError:
                continue
            if "BootOrder" in found and found == last:
                return found
            last = found
        raise AssertionError(f"OVMF wrote no BootOrder in {BOOT_TIMEOUT} s")
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "stated", "enabled"),
    [("esxi7.nvram", None, 1), ("esxi7.nvram", False, 0), ("virtualbox7.nvram", True, 1)],
    ids=["esxi", "esxi-off", "virtualbox"],
)
def test_ovmf_boots_with_the_keys_of_another_hypervisor(
    source: str, stated: bool | None, enabled: int, tmp_path: Path
) -> None:
    store = read(corpus(source), source)
    flash = tmp_path / "vars.fd"
    flash.write_bytes(converted(store, "ovmf", secure_boot=stated)[0])
    found = _after_boot(flash)
    for variable in store.variables:
        if variable.name in ("PK", "KEK", "db", "dbx"):
            assert found[variable.name] == variable.data
    assert found["SecureBootEnable"] == bytes([enabled])
    by_others = {name: data for name, _, _, data, _ in by_another_program(flash.read_bytes(), tmp_path)}
    assert by_others["SecureBootEnable"] == bytes([enabled])
