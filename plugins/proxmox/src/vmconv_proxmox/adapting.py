"""Puts a machine into Proxmox's terms, with a reason for each change."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

from vmconv.machine import Board, Changes, Cpu, Firmware, GuestOS, Identity, Machine, Memory, name_in
from vmconv.plugin import Adapted, PlanError
from vmconv_proxmox.adapting_devices import adapt_nics, adapt_others
from vmconv_proxmox.adapting_drives import adapt_boot, adapt_drives
from vmconv_proxmox.places import is_windows
from vmconv_proxmox.writer import own_settings, smbios1

if TYPE_CHECKING:
    from vmconv_proxmox.options import Options

_MAX_DESCRIPTION = 8192
_MAX_SMBIOS1 = 512
_MAX_CPUS = 4096

_CPU_MODELS = re.compile(
    r"(?:host|max|486|pentium[23]?|core2?duo|athlon|phenom|(?:kvm|qemu)(?:32|64)|x86-64-v(?:2|2-AES|3|4)"
    r"|(?:Conroe|Penryn|Nehalem|Westmere|SandyBridge|IvyBridge|Haswell|Broadwell|Skylake-(?:Client|Server)"
    r"|Cascadelake-Server|Cooperlake|KnightsMill|Icelake-(?:Client|Server)|SapphireRapids|GraniteRapids|SierraForest"
    r"|ClearwaterForest|Opteron_G[1-5]|EPYC(?:-Rome|-Milan|-Genoa|-Turin)?)(?:-noTSX)?(?:-IBRS|-IBPB)?(?:-v\d)?"
    r"|a64fx|cortex-a\d{2,3}|neoverse-[nv]\d|custom-[A-Za-z0-9_-]{1,40})"
)
_CPU_NAMES = {"host-passthrough": "host", "maximum": "max"}
_EXTRA = re.compile(r"[a-z][a-z_-]*\d*(?:\.[A-Za-z0-9_-]+)?")


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine in Proxmox's terms; raises `PlanError` for more processors or drives than it has."""
    changes = Changes()
    system = _system(machine.os, changes)
    windows = is_windows(system.source_id)
    values: dict[str, Any] = {
        "name": _name(machine.name, changes),
        "description": _description(machine.description, changes),
        "os": system,
        "cpu": _cpu(machine.cpu, system, options, changes),
        "memory": _memory(machine.memory, changes),
        "firmware": _firmware(machine.firmware, system, changes),
        "tpm": machine.tpm and machine.tpm.model_copy(update={"version": machine.tpm.version or "2.0", "state": None}),
        "identity": _identity(machine.identity, changes),
        "board": _board(machine.board, system, changes),
        "nics": adapt_nics(machine, windows, options, changes),
        **adapt_others(machine, changes),
    }
    adapted = adapt_drives(machine.model_copy(update=values), windows, options, changes)
    adapted = adapt_boot(adapted, changes)
    return Adapted(_extra(adapted, options, changes), tuple(changes.found))


def _name(name: str | None, changes: Changes) -> str | None:
    if name is None:
        return None
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    labels = (label.strip("-")[:63].strip("-") for label in re.sub(r"[^A-Za-z0-9.]+", "-", plain).split("."))
    return changes.set("name", name, ".".join(filter(None, labels)) or None, "Proxmox takes DNS names only")


def _description(text: str | None, changes: Changes) -> str | None:
    if text is None or len(text) <= _MAX_DESCRIPTION:
        return text
    kept = text[:_MAX_DESCRIPTION].strip()
    changes.add("description", f"{len(text)} characters", f"{len(kept)}", "Proxmox takes at most 8192 characters")
    return kept


def _system(system: GuestOS, changes: Changes) -> GuestOS:
    kind = name_in("proxmox", system) or "other"
    for path, before in (("os.id", system.id), ("os.source_id", system.source_id)):
        changes.set(path, before, kind, "Proxmox names families of systems")
    architecture = system.architecture
    if architecture != "aarch64":
        architecture = changes.set(
            "os.architecture", architecture, "x86_64", "Proxmox's processors have 64 bits; 32-bit systems run on them"
        )
    return GuestOS(architecture=architecture, source_id=kind)


def _cpu(cpu: Cpu, system: GuestOS, options: Options, changes: Changes) -> Cpu:
    sockets, cores = _topology(cpu)
    if sockets * cores > _MAX_CPUS:
        raise PlanError(f"machine has {sockets * cores} processors, at most {_MAX_CPUS} are possible")
    agree = "Proxmox has sockets and cores, with one thread each"
    changes.set("cpu.sockets", cpu.sockets, sockets, agree)
    changes.set("cpu.cores", cpu.cores, cores, agree)
    changes.set("cpu.threads", cpu.threads, 1, agree)
    count = cpu.count or sockets * cores
    default = "host" if system.architecture == "aarch64" else options.cpu
    model = _CPU_NAMES.get(cpu.model or "", cpu.model or default)
    if not _CPU_MODELS.fullmatch(model) and model != options.cpu:
        model = default
    changes.set("cpu.model", cpu.model, model, "Proxmox has other names of CPU types")
    return cpu.model_copy(update={"count": count, "sockets": sockets, "cores": cores, "threads": 1, "model": model})


def _topology(cpu: Cpu) -> tuple[int, int]:
    """Returns sockets and cores per socket, for at least as many processors as the guest sees."""
    count = cpu.count or 1
    if cpu.sockets and cpu.cores:
        cores = cpu.cores * (cpu.threads or 1)
        return (cpu.sockets, cores) if cpu.sockets * cores >= count else (1, count)
    if cpu.sockets and count % cpu.sockets == 0:
        return cpu.sockets, count // cpu.sockets
    if cpu.cores and count % cpu.cores == 0:
        return count // cpu.cores, cpu.cores
    return 1, max(count, (cpu.sockets or 1) * (cpu.cores or 1) if cpu.count is None else 1)


def _memory(memory: Memory, changes: Changes) -> Memory:
    size = max(16, -(-(memory.size or 512 << 20) >> 20)) << 20
    changes.set("memory.size", memory.size, size, "Proxmox counts whole MiB, from 16")
    return memory.model_copy(update={"size": size})


def _firmware(firmware: Firmware, system: GuestOS, changes: Changes) -> Firmware:
    kind = firmware.kind
    if system.architecture == "aarch64":
        kind = changes.set("firmware.kind", kind, "uefi", "aarch64 has no BIOS")
    kind = kind or ("uefi" if firmware.nvram else "bios")
    if firmware.secure_boot is not None:
        reason = "the EFI disk holds it; to make one: qm set VMID --efidisk0 STORAGE:0,efitype=4m,pre-enrolled-keys=1"
        after = "as its variables say" if firmware.nvram and kind == "uefi" else None
        reason = reason if kind == "uefi" else "a BIOS has none"
        changes.add("firmware.secure_boot", firmware.secure_boot, after, reason)
    return firmware.model_copy(update={"kind": kind, "secure_boot": None})


def _identity(identity: Identity, changes: Changes) -> Identity:
    for name in ("product", "manufacturer", "serial"):
        if len(smbios1(identity, {})) <= _MAX_SMBIOS1:
            break
        if (value := getattr(identity, name)) is not None:
            changes.add(f"identity.{name}", value, None, f"smbios1 has at most {_MAX_SMBIOS1} characters")
            identity = identity.model_copy(update={name: None})
    return identity


def _board(board: Board, system: GuestOS, changes: Changes) -> Board:
    chipset = board.chipset or "i440fx"
    if system.architecture == "aarch64":
        chipset = changes.set("board.chipset", board.chipset, "virt", "aarch64 has no PC chipset")
    elif chipset == "virt":
        chipset = changes.set("board.chipset", chipset, "q35", "virt is a machine of other architectures")
    clock = board.clock or ("localtime" if is_windows(system.source_id) else "utc")
    return board.model_copy(update={"chipset": chipset, "clock": clock})


_ON_HOST = re.compile(r"args|hookscript|virtiofs\d+")
"""Settings that run or open something on the host: `args` are arguments for QEMU, which runs as root."""


def _extra(machine: Machine, options: Options, changes: Changes) -> Machine:
    """Returns the machine with those settings of its own that still have their device."""
    found = machine.extra.get("proxmox", {})
    own = own_settings(machine, options)
    kept = {key: value for key, value in found.items() if _has_place(key, value, own)}
    for key in found.keys() - kept.keys():
        reason = "reaches the host, where it is another one" if _ON_HOST.fullmatch(key) else "has no place here"
        changes.add("extra.proxmox", f"{key}={found[key]}"[:80].replace("\n", " "), None, reason)
    others = {name: values for name, values in machine.extra.items() if name != "proxmox"}
    return machine.model_copy(update={"extra": {**others, **({"proxmox": kept} if kept else {})}})


def _has_place(key: str, value: str, own: dict[str, Any]) -> bool:
    device, dot, _ = key.partition(".")
    if not _EXTRA.fullmatch(key) or _ON_HOST.fullmatch(key) or "\n" in value or key.startswith("unused"):
        return False
    if not dot:
        return key not in own or key == "scsihw"
    return device in own and bool(value) and ("," not in value or device == "smbios1")
