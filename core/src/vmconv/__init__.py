"""Any-to-any conversion of virtual machine disks without copying their payload.

    import vmconv
    result = vmconv.convert("disk.raw", "disk.qcow2")

Names are imported when they are first used: `import vmconv` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vmconv.system.platforms import refusal

if TYPE_CHECKING:
    from vmconv.api import (
        Cache,
        CheckReport,
        CommitResult,
        Comparison,
        Machine,
        MachinePlan,
        MachineResult,
        MapRow,
        Measure,
        OptionValue,
        Plan,
        Proof,
        RebaseResult,
        Registry,
        Request,
        Result,
        StrPath,
        SyncPlan,
        SyncResult,
        ZeroCopy,
        bitmap,
        check,
        commit,
        compare,
        convert,
        create,
        fanout,
        info,
        installed,
        machine_convert,
        machine_info,
        machine_plan,
        map_disk,
        measure,
        plan,
        prove,
        rebase,
        recover,
        repair,
        resize,
        snapshot,
        stream,
        sync,
        sync_plan,
        undo,
    )
    from vmconv.errors import (
        AccessError,
        BackendError,
        ExistsError,
        ImageError,
        PlanError,
        PluginError,
        ReadError,
        SecretError,
        UsageError,
        VerifyError,
        VmconvError,
        ZeroCopyError,
    )

__all__ = [
    "AccessError",
    "BackendError",
    "Cache",
    "CheckReport",
    "CommitResult",
    "Comparison",
    "ExistsError",
    "ImageError",
    "Machine",
    "MachinePlan",
    "MachineResult",
    "MapRow",
    "Measure",
    "OptionValue",
    "Plan",
    "PlanError",
    "PluginError",
    "Proof",
    "ReadError",
    "RebaseResult",
    "Registry",
    "Request",
    "Result",
    "SecretError",
    "StrPath",
    "SyncPlan",
    "SyncResult",
    "UsageError",
    "VerifyError",
    "VmconvError",
    "ZeroCopy",
    "ZeroCopyError",
    "bitmap",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "fanout",
    "info",
    "installed",
    "machine_convert",
    "machine_info",
    "machine_plan",
    "map_disk",
    "measure",
    "plan",
    "prove",
    "rebase",
    "recover",
    "repair",
    "resize",
    "snapshot",
    "stream",
    "sync",
    "sync_plan",
    "undo",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "errors" if name.endswith("Error") else "api"
    refused = refusal()
    if refused and home == "api":
        raise ImportError(f"vmconv {refused}")
    return getattr(import_module(f"{__name__}.{home}"), name)
