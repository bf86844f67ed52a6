"""Turns exceptions of plugins into one line with the plugin's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from vmconv.errors import PluginError, VmconvError

if TYPE_CHECKING:
    from vmconv.io.discovery import Plugin
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
        owner = next(
            (one.owners[kind, name] for one in _registries() for kind in _KINDS if (kind, name) in one.owners), name
        )
        raise PluginError(f"{owner}: format {name!r}: {exc}", hint=_hint(owner)) from exc
    except (VmconvError, OSError):
        raise
    # A plugin that calls sys.exit must not end a caller of the API.
    except (Exception, SystemExit) as exc:
        found = _owner(exc)
        if found is None:
            raise
        said = " ".join(str(exc).split())
        missing = isinstance(exc, ModuleNotFoundError)
        raise PluginError(
            f"{found}: failed with {type(exc).__name__}{': ' if said else ''}{said}",
            hint=f"pip install {found} installs what it needs" if missing else _hint(found),
        ) from exc


_KINDS = ("format", "machine")


def _registries() -> Iterator[Registry]:
    """Yields what is loaded: the plugins of disks, and those of machines if the command is about machines."""
    from vmconv.io.registry import installed, installed_machines

    yield installed()
    if installed_machines.cache_info().currsize:
        yield installed_machines()


def plugins_in(exc: BaseException) -> list[Plugin]:
    """Returns the plugins whose code is in the traceback of an exception, or of one that led to it."""
    plugins = {_top(plugin.module): plugin for one in _registries() for plugin in one.plugins}
    plugins.pop("vmconv", None)
    found: dict[str, Plugin] = {}
    at: BaseException | None = exc
    while at is not None:
        found |= {top: plugins[top] for top in map(_top, _modules(at.__traceback__)) if top in plugins}
        at = at.__cause__ or at.__context__
    return [*found.values()]


def _hint(owner: str) -> str:
    return f"this is a defect of {owner}: report it there, with what vmconv --debug prints"


def _owner(exc: BaseException) -> str | None:
    """Returns the distribution of the innermost plugin code in the traceback; None if there is none."""
    registries = list(_registries())
    owners = {_top(plugin.module): plugin.distribution for one in registries for plugin in one.plugins}
    owners.pop("vmconv", None)
    found = None
    for name in _modules(exc.__traceback__):
        found = owners.get(_top(name), found)
    if found is None and isinstance(exc, TypeError):
        # A method with other parameters fails before any frame of its own exists.
        for registry in registries:
            for kind, formats in (("format", registry.all_formats), ("machine", registry.machines)):
                for name, one in formats.items():
                    if str(exc).startswith(f"{type(one).__qualname__}."):
                        return registry.owners.get((kind, name))
    return found


def _modules(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next


def _top(module: str) -> str:
    return module.partition(".")[0]
