"""What is installed: formats, backends and commands, from which distribution, and which plugins are broken and why.

One broken plugin never stops the others: whatever is wrong with it becomes a `Problem`. A name that two plugins claim
is given to neither, so that nobody's disks are read by whichever happened to load first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from vmconv import hooks
from vmconv.discovery import Plugin, entry_points
from vmconv.errors import ImageError, PluginError, ReadError, UsageError
from vmconv.formats import Format
from vmconv.known import KNOWN, RAW_NAME, known_content, known_format, known_suffix
from vmconv.storage import Backend

if TYPE_CHECKING:
    from vmconv.cli.command import Command
    from vmconv.sources import File

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class Problem(NamedTuple):
    """A plugin, or a part of one, that cannot be used, and why."""

    distribution: str
    reason: str


class Registry:
    """Everything that plugins registered, by name; `owners` maps `(kind of thing, name)` to the distribution."""

    def __init__(self, formats: Mapping[str, Format] | None = None) -> None:
        self.formats: dict[str, Format] = dict(formats or {})
        self.backends: dict[str, Backend] = {}
        self.commands: dict[str, Command] = {}
        self.owners: dict[tuple[str, str], str] = {}
        self.plugins: list[Plugin] = []
        self.problems: list[Problem] = []

    def add_problem(self, distribution: str, doing: str, exc: BaseException) -> None:
        """Notes that a plugin failed, in one line."""
        said = " ".join(str(exc).split())
        self.problems.append(Problem(distribution, f"{doing}: {type(exc).__name__}: {said}"))

    def format(self, name: str) -> Format:
        """Returns a format by its name, or by QEMU's; raises `UsageError` saying what to install or what is broken."""
        known = known_format(name)
        for either in (name, known.name if known else name):
            if either in self.formats:
                return self.formats[either]
        raise UsageError(f"format {name!r} is not installed", hint=self._missing(known.name if known else name))

    def _missing(self, name: str) -> str:
        broken = self._broken(name)
        if broken:
            return broken
        known = known_format(name)
        if known and known.distribution:
            return f"pip install {known.distribution}"
        have = ", ".join(sorted(self.formats)) or "none"
        about = f"{known.title}: no plugin is known to read it; " if known else ""
        return f"{about}installed formats: {have}"

    def _broken(self, name: str) -> str | None:
        """Returns what is wrong with the plugin that would have brought this name."""
        for problem in self.problems:
            if repr(name) in problem.reason or problem.distribution.endswith(f"-{name}"):
                return f"{problem.distribution}: {problem.reason}"
        return None

    def backend(self, name: str) -> Backend:
        """Returns a backend by its name."""
        if name not in self.backends:
            have = ", ".join(sorted(self.backends))
            raise UsageError(f"backend {name!r} is not installed", hint=self._broken(name) or f"installed: {have}")
        return self.backends[name]

    def format_by_suffix(self, path: str) -> str | None:
        """Returns the name of the format that the ending of a file name speaks of, installed or not."""
        lower = path.lower()
        for name, candidate in self.formats.items():
            if lower.endswith(candidate.suffixes) and candidate.suffixes:
                return name
        known = known_suffix(path)
        return known.name if known else None

    def stem(self, name: str) -> str:
        """Returns a file name without the ending that speaks of a format."""
        suffixes = [*(one.suffixes for one in self.formats.values()), *(known.suffixes for known in KNOWN)]
        endings = {ending for each in suffixes for ending in each}
        for ending in sorted(endings, key=len, reverse=True):
            if name.lower().endswith(ending) and len(name) > len(ending):
                return name[: -len(ending)]
        return name

    def probe(self, file: File) -> str | None:
        """Returns the name of the format whose signature the content bears; None when it bears none."""
        for name, candidate in self.formats.items():
            try:
                if candidate.probe(file):
                    return name
            except ReadError:
                # It is not known what is in there: another format, or raw, would be a guess.
                raise
            except Exception:
                # A probe must not raise; one that does has not recognised its format, and others may.
                continue
        known = known_content(file)
        return known.name if known else None

    def identify(self, file: File, named: str | None = None) -> Format:
        """Returns the format to read `file` with: the one `named`, else what suffix and content agree on.

        Content alone decides nothing: a guest can write any header into the first sector of its raw disk. So a file
        that bears a signature its name does not speak of is refused until the user names the format.
        """
        if named is not None:
            return self.format(named)
        suffix, content = self.format_by_suffix(file.path), self.probe(file)
        if content is None:
            if suffix not in (None, RAW_NAME):
                raise ImageError(
                    f"{file.name}: no signature of {suffix}, the format its name speaks of",
                    hint=f"if it is a raw disk, say so with -f {RAW_NAME}",
                )
            return self.format(RAW_NAME)
        if content != suffix:
            spoken = f"its name speaks of {suffix}" if suffix else "its name speaks of no format"
            raise ImageError(
                f"{file.name}: content has the signature of {content} but {spoken}",
                hint=f"a guest can write such a header into its raw disk: say -f {content} or -f {RAW_NAME}",
            )
        return self.format(content)


@cache
def installed() -> Registry:
    """Returns the registry of this environment; found once per process."""
    registry = Registry()
    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks)
    names: dict[str, str] = {}
    for distribution, version, module, plugin in _builtin():
        _register(registry, manager, names, Plugin(distribution, version, module), plugin)
    for entry in entry_points(hooks.GROUP):
        try:
            plugin = import_module(entry.module)
        except (Exception, SystemExit) as exc:
            registry.add_problem(entry.distribution, "cannot be imported", exc)
            continue
        _register(registry, manager, names, entry, plugin)
    from vmconv.cli.command import Command

    for kind, base in (("format", Format), ("backend", Backend), ("command", Command)):
        _collect(registry, manager, names, kind, base)
    return registry


def _builtin() -> Iterator[tuple[str, str, str, Any]]:
    from vmconv import backends, cli

    for module in (backends, cli):
        yield "vmconv", "", module.__name__, module


def _register(
    registry: Registry, manager: pluggy.PluginManager, names: dict[str, str], plugin: Plugin, module: Any
) -> None:
    key = f"{plugin.distribution}:{plugin.module}"
    names[key] = plugin.distribution
    try:
        manager.register(module, name=key)
    except (pluggy.PluginValidationError, ValueError) as exc:
        registry.problems.append(Problem(plugin.distribution, str(exc).splitlines()[-1]))
        return
    registry.plugins.append(plugin)
    for caller in manager.get_hookcallers(module) or ():
        if not caller.has_spec():
            registry.problems.append(Problem(plugin.distribution, _unknown_hook(caller.name)))


def _unknown_hook(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, [n for n in vars(hooks) if n.startswith("vmconv_")], n=1)
    return f"unknown hook {name}" + (f", did you mean {close[0]}" if close else "")


def _collect(registry: Registry, manager: pluggy.PluginManager, names: dict[str, str], kind: str, base: Any) -> None:
    """Calls one registering hook of each plugin by itself, so that what goes wrong is known to be that plugin's."""
    claims: dict[str, list[tuple[str, Any]]] = {}
    for implementation in getattr(manager.hook, f"vmconv_register_{kind}s").get_hookimpls():
        distribution = names[implementation.plugin_name]
        try:
            for item in implementation.function():
                _checked(item, kind, base)
                claims.setdefault(item.name, []).append((distribution, item))
        except (Exception, SystemExit) as exc:
            registry.add_problem(distribution, implementation.function.__name__, exc)
    things: dict[str, Any] = getattr(registry, f"{kind}s")
    for name, claimants in claims.items():
        if len(claimants) == 1:
            registry.owners[kind, name], things[name] = claimants[0]
            continue
        who = " and ".join(f"{_class_of(item)} of {distribution}" for distribution, item in claimants)
        for distribution in dict.fromkeys(distribution for distribution, _ in claimants):
            registry.problems.append(Problem(distribution, f"{kind} {name!r} is claimed by {who}; uninstall one"))


def _checked(item: Any, kind: str, base: Any) -> None:
    if not isinstance(item, base):
        raise PluginError(f"registers {item!r}, which is no {base.__name__}")
    if not _NAME.fullmatch(getattr(item, "name", "")):
        raise PluginError(f"{kind} name {getattr(item, 'name', None)!r} is not lower case letters, digits, - and _")
    field = "help" if kind == "command" else "title"
    if not isinstance(getattr(item, field, None), str):
        raise PluginError(f"{kind} {item.name!r} has no {field}, a few words on what it is")
    suffixes = getattr(item, "suffixes", ())
    if not (isinstance(suffixes, tuple) and all(isinstance(suffix, str) for suffix in suffixes)):
        raise PluginError(f"suffixes of {kind} {item.name!r} are not a tuple of strings")


def _class_of(item: object) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"
