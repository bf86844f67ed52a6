"""Names of guest operating systems on each platform."""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import get_args

import pytest

from support.requirements import oracle_program
from vmconv.machine import GuestOS, guest, name_in
from vmconv.machine.guests import Kind, rows

KINDS = get_args(Kind)

NEWER = {
    *("win2k25", "debian12", "debian13", "rhel10-unknown", "centos-stream10", "almalinux10"),
    *("ubuntu23.04", "ubuntu23.10", "ubuntu24.04", "ubuntu24.10"),
}
"""Ids of systems that are newer than the libosinfo of Debian 12."""

FAMILIES = {
    "linux": {"linux"},
    "winnt": {"windows"},
    "win9x": {"windows"},
    "win16": {"windows"},
    "freebsd": {"bsd"},
    "openbsd": {"bsd"},
    "netbsd": {"bsd"},
    "dragonflybsd": {"bsd"},
    "haiku": {"other"},
    "hurd": {"linux"},
    "darwin": {"darwin"},
    "solaris": {"solaris"},
    "msdos": {"other"},
    "netware": {"other"},
    "": {"linux"},
}


@pytest.fixture(scope="module")
def osinfo() -> dict[str, str]:
    """The families of all systems that libosinfo knows, by short id."""
    query = [oracle_program("osinfo-query"), "os", "--fields=short-id,family"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    return {line.split("|")[0].strip(): line.split("|")[1].strip() for line in listed if "|" in line}


def test_each_id_is_one_of_libosinfo(osinfo: dict[str, str]) -> None:
    ids = {row.id for row in rows() if not row.id.endswith("*")} - {""}
    assert ids - set(osinfo) - NEWER == set()
    assert {row.stem for row in rows() if not any(each.startswith(row.stem) for each in osinfo)} - NEWER == {
        *("freebsd14", "freebsd15", "rhel10", "rocky10", "ol9", "ol10", "sle16", "ubuntu25"),
    }


def test_each_system_of_libosinfo_has_a_row_of_its_family(osinfo: dict[str, str]) -> None:
    other = []
    for short, family in osinfo.items():
        found = {row.family for row in rows() if row.id and row.covers(short)}
        if not found or not found <= FAMILIES.get(family, set()):
            other.append((short, family, *sorted(found)))
    # libosinfo takes FreeDOS for a Linux.
    assert other == [("freedos1.2", "linux", "other"), ("unknown", "")]


def test_each_row_has_a_name_of_each_kind_and_each_id_one_row_per_architecture() -> None:
    assert all(row.names[kind][0].strip("!") for row in rows() for kind in KINDS)
    keys = Counter((row.id, row.architecture) for row in rows() if row.id)
    assert {key for key, count in keys.items() if count > 1} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_read_and_written_again(kind: Kind) -> None:
    for row in rows():
        for name in row.names[kind]:
            if not name.startswith("!"):
                found = guest(kind, name.upper())
                assert found.source_id == name.upper()
                assert found.architecture in (row.architecture, None)
                assert found.id in (row.id, None)
                if found.id and found.architecture:
                    assert name_in(kind, found) == row.names[kind][0], name


@pytest.mark.parametrize(
    ("name", "osinfo_id"),
    [
        ("windows9srv-64", "win2k16"),
        ("windows2019srv-64", "win2k19"),
        ("windows2019srvNext-64", "win2k22"),
        ("windows2022srvNext-64", "win2k25"),
        ("windows9-64", "win10"),
    ],
)
def test_names_of_windows_servers_are_one_release_behind(name: str, osinfo_id: str) -> None:
    assert guest("vmx", name).id == osinfo_id
    assert (name_in("vmx", GuestOS(id=osinfo_id)) or "").lower() == name.lower()


def test_a_shared_name_gives_what_its_systems_have_in_common() -> None:
    assert guest("vmx", "ubuntu-64") == GuestOS(architecture="x86_64", source_id="ubuntu-64")
    assert guest("vmx", "windows8srv-64") == GuestOS(architecture="x86_64", source_id="windows8srv-64")
    assert guest("proxmox", "l26") == GuestOS(source_id="l26")
    assert guest("cim", "80") == GuestOS(id="rhel-unknown", architecture="x86_64", source_id="80")


def test_an_unknown_name_is_kept() -> None:
    assert guest("vmx", " beos-64 ") == GuestOS(source_id="beos-64")
    assert guest("vmx", "") == GuestOS()
    assert name_in("vmx", GuestOS(source_id="beos-64")) == "other-64"
    assert name_in("vmx", GuestOS()) is None


@pytest.mark.parametrize(
    ("os", "names"),
    [
        (GuestOS(id="rhel9.2"), ("rhel9-64", "rhel9_64Guest", "80", "RedHat9_64", "l26")),
        (GuestOS(id="rhel10.1"), ("rhel10-64", "rhel10_64Guest", "80", "RedHat10_64", "l26")),
        (GuestOS(id="win11"), ("windows11-64", "windows11_64Guest", "120", "Windows11_64", "win11")),
        (GuestOS(id="win12"), ("windows9-64", "windows9_64Guest", "120", "WindowsNT_64", "win10")),
        (
            GuestOS(id="alpinelinux3.17", architecture="i686"),
            ("other6xlinux", "other6xLinuxGuest", "36", "Linux", "l26"),
        ),
        (
            GuestOS(id="rhel8.4", architecture="aarch64"),
            ("arm-other6xlinux-64", "rhel8_64Guest", "80", "RedHat8_arm64", "l26"),
        ),
        (
            GuestOS(id="gentoo", architecture="aarch64"),
            ("arm-other6xlinux-64", "other6xLinux64Guest", "101", "Other_arm64", "l26"),
        ),
        (GuestOS(source_id="ubuntu-64"), ("ubuntu-64", "ubuntu64Guest", "94", "Ubuntu_64", "l26")),
        (GuestOS(architecture="i686"), ("other", "otherGuest", "1", "Other", "other")),
    ],
    ids=lambda value: value.id or value.source_id or "architecture" if isinstance(value, GuestOS) else "",
)
def test_a_system_without_its_own_name_has_the_general_one(os: GuestOS, names: tuple[str, ...]) -> None:
    assert tuple(name_in(kind, os) for kind in KINDS) == names


def test_a_name_that_several_systems_share_means_the_system_of_that_name() -> None:
    assert name_in("vbox", GuestOS(source_id="win10")) == "Windows10_64"
