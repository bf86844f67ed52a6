"""Any-to-any conversion of virtual machine disks without copying their payload.

    import vmconv
    result = vmconv.convert("disk.raw", "disk.qcow2")

Names are imported when they are first used: `import vmconv` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmconv.api import check, compare, convert, fanout, info, map_disk, plan, prove, recover, stream, undo
    from vmconv.arguments import Cache, OptionValue, StrPath, ZeroCopy
    from vmconv.comparison import Comparison
    from vmconv.conversion import Request, Result
    from vmconv.errors import (
        AccessError,
        BackendError,
        ImageError,
        PlanError,
        PluginError,
        ReadError,
        UsageError,
        VerifyError,
        VmconvError,
        ZeroCopyError,
    )
    from vmconv.formats import CheckReport
    from vmconv.mapping import MapRow
    from vmconv.planner import Plan
    from vmconv.proof import Proof
    from vmconv.registry import Registry, installed

__all__ = [
    "AccessError",
    "BackendError",
    "Cache",
    "CheckReport",
    "Comparison",
    "ImageError",
    "MapRow",
    "OptionValue",
    "Plan",
    "PlanError",
    "PluginError",
    "Proof",
    "ReadError",
    "Registry",
    "Request",
    "Result",
    "StrPath",
    "UsageError",
    "VerifyError",
    "VmconvError",
    "ZeroCopy",
    "ZeroCopyError",
    "check",
    "compare",
    "convert",
    "fanout",
    "info",
    "installed",
    "map_disk",
    "plan",
    "prove",
    "recover",
    "stream",
    "undo",
]

_HOMES = {
    "Cache": "arguments",
    "CheckReport": "formats",
    "Comparison": "comparison",
    "MapRow": "mapping",
    "OptionValue": "arguments",
    "Plan": "planner",
    "Proof": "proof",
    "Registry": "registry",
    "Request": "conversion",
    "Result": "conversion",
    "StrPath": "arguments",
    "ZeroCopy": "arguments",
    "installed": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "errors" if name.endswith("Error") else _HOMES.get(name, "api")
    return getattr(import_module(f"{__name__}.{home}"), name)
