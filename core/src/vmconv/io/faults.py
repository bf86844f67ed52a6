"""Turns exceptions of plugins into one line with the plugin's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from vmconv.errors import PluginError, VmconvError

if TYPE_CHECKING:
    from vmconv.io.registry import Registry


@contextmanager
def plugin_faults() -> Iterator[None]:
    """Turns exceptions of a plugin's code into `PluginError`; `VmconvError`, `OSError` and exceptions of core pass."""
    try:
        yield
    except PluginError as exc:
        if exc.format_name is None:
            raise
        name = exc.format_name
        owner = _registry().owners.get(("format", name), name)
        raise PluginError(f"{owner}: format {name!r}: {exc}", hint=_hint(owner)) from exc
    except (VmconvError, OSError):
        raise
    # A plugin that calls sys.exit must not end a caller of the API.
    except (Exception, SystemExit) as exc:
        found = _owner(exc)
        if found is None:
            raise
        said = " ".join(str(exc).split())
        raise PluginError(
            f"{found}: failed with {type(exc).__name__}{': ' if said else ''}{said}",
            hint=_hint(found),
        ) from exc


def _registry() -> Registry:
    from vmconv.io.registry import installed

    return installed()


def _hint(owner: str) -> str:
    return f"this is a defect of {owner}: report it there; vmconv formats lists what is installed"


def _owner(exc: BaseException) -> str | None:
    """Returns the distribution of the innermost plugin code in the traceback; None if there is none."""
    registry = _registry()
    owners = {_top(plugin.module): plugin.distribution for plugin in registry.plugins}
    owners.pop("vmconv", None)
    found = None
    for name in _modules(exc.__traceback__):
        found = owners.get(_top(name), found)
    if found is None and isinstance(exc, TypeError):
        # A method with other parameters fails before any frame of its own exists.
        for name, one in registry.all_formats.items():
            if str(exc).startswith(f"{type(one).__qualname__}."):
                return registry.owners.get(("format", name))
    return found


def _modules(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next


def _top(module: str) -> str:
    return module.partition(".")[0]
