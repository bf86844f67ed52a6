"""Virtual machines: the neutral model, and what readers and writers of configurations share.

    from vmconv.machine import Machine, Nic, parse_xml

These names are stable for plugins, like those of `vmconv.plugin`. Import this package late: pydantic, which the model
needs, takes longer to import than a disk to convert.
"""

from vmconv.machine.changes import Changes
from vmconv.machine.guests import guest, name_in
from vmconv.machine.model import (
    CONTROLLER_MODELS,
    MAX_DEVICES,
    NIC_MODELS,
    Board,
    Controller,
    Cpu,
    Disk,
    Display,
    Firmware,
    GuestOS,
    Identity,
    Layer,
    Machine,
    Memory,
    Nic,
    Nvram,
    Property,
    Removable,
    Serial,
    Tpm,
)
from vmconv.machine.paths import carried, plain, restricted, stated
from vmconv.machine.reading import (
    MAX_CONFIG,
    config_bytes,
    config_text,
    mac_address,
    number,
    parse_xml,
    part,
    quoted,
    refused,
    unknown,
)

__all__ = [
    "CONTROLLER_MODELS",
    "MAX_CONFIG",
    "MAX_DEVICES",
    "NIC_MODELS",
    "Board",
    "Changes",
    "Controller",
    "Cpu",
    "Disk",
    "Display",
    "Firmware",
    "GuestOS",
    "Identity",
    "Layer",
    "Machine",
    "Memory",
    "Nic",
    "Nvram",
    "Property",
    "Removable",
    "Serial",
    "Tpm",
    "carried",
    "config_bytes",
    "config_text",
    "guest",
    "mac_address",
    "name_in",
    "number",
    "parse_xml",
    "part",
    "plain",
    "quoted",
    "refused",
    "restricted",
    "stated",
    "unknown",
]
