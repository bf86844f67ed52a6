"""The stable interface for plugins: all names that formats, backends and commands of third parties may import.

    from vmconv.plugin import Format, hookimpl

All other modules of core may change with any release. The names here keep their meaning within one version of the
interface. A plugin may state its version in the module of its entry point: `VMCONV_INTERFACE = 1`. A plugin with an
unsupported version is listed as broken and not used.

Names are imported on first use (PEP 562), so importing this module is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vmconv.interface.hooks import OLDEST_INTERFACE, VMCONV_INTERFACE

if TYPE_CHECKING:
    from vmconv.cli.options import SetOptions, access, add_access, add_format, add_options, add_output, formatter
    from vmconv.cli.output import ProgressBar, print_json, print_table, size_text
    from vmconv.errors import (
        AccessError,
        BackendError,
        ExistsError,
        ImageError,
        PlanError,
        PluginError,
        ReadError,
        UsageError,
        VerifyError,
        VmconvError,
        ZeroCopyError,
        counted,
        in_words,
        os_errors,
        printable,
        warn,
    )
    from vmconv.fields import Structure, damaged, field_offset, read_part, table_slices
    from vmconv.inspect.images import opened
    from vmconv.interface.arguments import Reading
    from vmconv.interface.backend import (
        DEFAULT_ACCESS,
        Access,
        Backend,
        Capabilities,
        Congruence,
        Output,
        Survey,
        Transaction,
    )
    from vmconv.interface.command import Command
    from vmconv.interface.findings import Findings
    from vmconv.interface.format import CheckReport, Format, FormatKind, NoOptions, SnapshotChange
    from vmconv.interface.hooks import hookimpl
    from vmconv.interface.machines import (
        Adapted,
        ConfigFile,
        Digest,
        MachineFormat,
        Manifest,
        Member,
        Substitution,
    )
    from vmconv.io.decompressing import Decompressed, compression_of, decoded_head
    from vmconv.io.directory import Directory
    from vmconv.io.foreign import described_beside
    from vmconv.io.known import RAM_NAME, RAW_NAME, qemu_name
    from vmconv.io.opener import MAX_CHAIN_DEPTH, Opener
    from vmconv.io.registry import Registry, installed
    from vmconv.machine.beginning import Beginning
    from vmconv.machine.decoding import NewFile
    from vmconv.model.disk import Disk
    from vmconv.model.draft import Draft
    from vmconv.model.extents import (
        MAX_SIZE,
        Column,
        Columns,
        Extents,
        Kind,
        Kinds,
        clip_to_sources,
        cut,
        distinct,
        gather,
        on_storage,
        spread,
    )
    from vmconv.model.facts import DiskFacts, Geometry
    from vmconv.model.identity import derived, fresh
    from vmconv.model.image import Image
    from vmconv.model.layout import Allocation, Backing, Layout, OutFile, Placement, Reference
    from vmconv.model.options import Identified, Size, describe, option, parse_size
    from vmconv.model.paths import from_url, from_windows, is_foreign, named_by, text_of, to_windows
    from vmconv.model.plan import Plan, Progress, ShareSteps
    from vmconv.model.references import Dependency, Record, read_records, refer
    from vmconv.model.sources import Blob, Decoded, File, Placeholder, Reserved, Source, Stamp
    from vmconv.model.usage import GUEST, Metadata, Usage, overlaps, refuse_overlaps
    from vmconv.placing import blocks
    from vmconv.placing.pinning import Pinned, pin
    from vmconv.placing.ranges import Ranges, joined_over_holes, ranges_in_files
    from vmconv.system.parallel import in_order

_HOMES = {
    "Substitution": "interface.machines",
    "Member": "interface.machines",
    "MachineFormat": "interface.machines",
    "ConfigFile": "interface.machines",
    "Digest": "interface.machines",
    "Manifest": "interface.machines",
    "Adapted": "interface.machines",
    "SnapshotChange": "interface.format",
    "Stamp": "model.sources",
    "Access": "interface.backend",
    "AccessError": "errors",
    "Allocation": "model.layout",
    "Backend": "interface.backend",
    "BackendError": "errors",
    "ExistsError": "errors",
    "Backing": "model.layout",
    "Beginning": "machine.beginning",
    "Blob": "model.sources",
    "Capabilities": "interface.backend",
    "CheckReport": "interface.format",
    "Column": "model.extents",
    "Columns": "model.extents",
    "Command": "interface.command",
    "Congruence": "interface.backend",
    "DEFAULT_ACCESS": "interface.backend",
    "Decoded": "model.sources",
    "Decompressed": "io.decompressing",
    "Dependency": "model.references",
    "Directory": "io.directory",
    "Draft": "model.draft",
    "Disk": "model.disk",
    "DiskFacts": "model.facts",
    "Extents": "model.extents",
    "File": "model.sources",
    "Findings": "interface.findings",
    "Format": "interface.format",
    "FormatKind": "interface.format",
    "GUEST": "model.usage",
    "Geometry": "model.facts",
    "Identified": "model.options",
    "Image": "model.image",
    "ImageError": "errors",
    "Kind": "model.extents",
    "Kinds": "model.extents",
    "Layout": "model.layout",
    "MAX_CHAIN_DEPTH": "io.opener",
    "MAX_SIZE": "model.extents",
    "Metadata": "model.usage",
    "NoOptions": "interface.format",
    "Opener": "io.opener",
    "OutFile": "model.layout",
    "Output": "interface.backend",
    "Pinned": "placing.pinning",
    "Placeholder": "model.sources",
    "Placement": "model.layout",
    "Plan": "model.plan",
    "PlanError": "errors",
    "PluginError": "errors",
    "Progress": "model.plan",
    "ProgressBar": "cli.output",
    "RAM_NAME": "io.known",
    "RAW_NAME": "io.known",
    "Ranges": "placing.ranges",
    "ReadError": "errors",
    "NewFile": "machine.decoding",
    "Reading": "interface.arguments",
    "Record": "model.references",
    "Reference": "model.layout",
    "Registry": "io.registry",
    "Reserved": "model.sources",
    "SetOptions": "cli.options",
    "ShareSteps": "model.plan",
    "Size": "model.options",
    "Source": "model.sources",
    "Structure": "fields",
    "Survey": "interface.backend",
    "Transaction": "interface.backend",
    "Usage": "model.usage",
    "UsageError": "errors",
    "VerifyError": "errors",
    "VmconvError": "errors",
    "ZeroCopyError": "errors",
    "access": "cli.options",
    "add_access": "cli.options",
    "add_format": "cli.options",
    "add_options": "cli.options",
    "add_output": "cli.options",
    "blocks": "placing.blocks",
    "clip_to_sources": "model.extents",
    "compression_of": "io.decompressing",
    "cut": "model.extents",
    "damaged": "fields",
    "decoded_head": "io.decompressing",
    "derived": "model.identity",
    "describe": "model.options",
    "described_beside": "io.foreign",
    "distinct": "model.extents",
    "field_offset": "fields",
    "formatter": "cli.options",
    "fresh": "model.identity",
    "from_url": "model.paths",
    "from_windows": "model.paths",
    "gather": "model.extents",
    "hookimpl": "interface.hooks",
    "in_order": "system.parallel",
    "counted": "errors",
    "in_words": "errors",
    "installed": "io.registry",
    "is_foreign": "model.paths",
    "joined_over_holes": "placing.ranges",
    "named_by": "model.paths",
    "on_storage": "model.extents",
    "opened": "inspect.images",
    "option": "model.options",
    "os_errors": "errors",
    "overlaps": "model.usage",
    "parse_size": "model.options",
    "pin": "placing.pinning",
    "print_json": "cli.output",
    "print_table": "cli.output",
    "printable": "errors",
    "qemu_name": "io.known",
    "ranges_in_files": "placing.ranges",
    "read_part": "fields",
    "read_records": "model.references",
    "refer": "model.references",
    "refuse_overlaps": "model.usage",
    "size_text": "cli.output",
    "spread": "model.extents",
    "table_slices": "fields",
    "text_of": "model.paths",
    "to_windows": "model.paths",
    "warn": "errors",
}

__all__ = [
    "DEFAULT_ACCESS",
    "GUEST",
    "MAX_CHAIN_DEPTH",
    "MAX_SIZE",
    "OLDEST_INTERFACE",
    "RAM_NAME",
    "RAW_NAME",
    "VMCONV_INTERFACE",
    "Access",
    "AccessError",
    "Adapted",
    "Allocation",
    "Backend",
    "BackendError",
    "Backing",
    "Beginning",
    "Blob",
    "Capabilities",
    "CheckReport",
    "Column",
    "Columns",
    "Command",
    "ConfigFile",
    "Congruence",
    "Decoded",
    "Decompressed",
    "Dependency",
    "Digest",
    "Directory",
    "Disk",
    "DiskFacts",
    "Draft",
    "ExistsError",
    "Extents",
    "File",
    "Findings",
    "Format",
    "FormatKind",
    "Geometry",
    "Identified",
    "Image",
    "ImageError",
    "Kind",
    "Kinds",
    "Layout",
    "MachineFormat",
    "Manifest",
    "Member",
    "Metadata",
    "NewFile",
    "NoOptions",
    "Opener",
    "OutFile",
    "Output",
    "Pinned",
    "Placeholder",
    "Placement",
    "Plan",
    "PlanError",
    "PluginError",
    "Progress",
    "ProgressBar",
    "Ranges",
    "ReadError",
    "Reading",
    "Record",
    "Reference",
    "Registry",
    "Reserved",
    "SetOptions",
    "ShareSteps",
    "Size",
    "SnapshotChange",
    "Source",
    "Stamp",
    "Structure",
    "Substitution",
    "Survey",
    "Transaction",
    "Usage",
    "UsageError",
    "VerifyError",
    "VmconvError",
    "ZeroCopyError",
    "access",
    "add_access",
    "add_format",
    "add_options",
    "add_output",
    "blocks",
    "clip_to_sources",
    "compression_of",
    "counted",
    "cut",
    "damaged",
    "decoded_head",
    "derived",
    "describe",
    "described_beside",
    "distinct",
    "field_offset",
    "formatter",
    "fresh",
    "from_url",
    "from_windows",
    "gather",
    "hookimpl",
    "in_order",
    "in_words",
    "installed",
    "is_foreign",
    "joined_over_holes",
    "named_by",
    "on_storage",
    "opened",
    "option",
    "os_errors",
    "overlaps",
    "parse_size",
    "pin",
    "print_json",
    "print_table",
    "printable",
    "qemu_name",
    "ranges_in_files",
    "read_part",
    "read_records",
    "refer",
    "refuse_overlaps",
    "size_text",
    "spread",
    "table_slices",
    "text_of",
    "to_windows",
    "warn",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"vmconv.{home}")
    found = module if name == "blocks" else getattr(module, name)
    # Later uses find the name without calling this function.
    globals()[name] = found
    return found
