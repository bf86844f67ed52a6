"""Installed formats, backends and commands with their distributions, and the problems of broken plugins.

A broken plugin does not affect the others: its defects become `Problem`s. A name that two plugins claim is given to
neither, so that the order of loading does not decide which one reads a disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pluggy

from vmconv.errors import ImageError, PluginError, ReadError, UsageError, did_you_mean
from vmconv.interface import hooks
from vmconv.interface.backend import Backend
from vmconv.interface.command import Command
from vmconv.interface.format import Format, FormatKind
from vmconv.interface.machines import MachineFormat
from vmconv.interface.scheme import Scheme
from vmconv.io.discovery import Plugin, entry_points
from vmconv.io.foreign import described_beside, foreign_content, foreign_suffix, hint_for, is_payload, suffix_of
from vmconv.io.known import KNOWN, RAM_NAME, RAW_NAME, known_content, known_format, known_suffix

if TYPE_CHECKING:
    from vmconv.model.sources import File

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,31}")
"""RFC 3986, section 3.1, in lower case."""
_SUFFIX = re.compile(r"\.[a-z0-9][a-z0-9._+-]{0,31}")
_MAX_ITEMS = 1000
"""Limit of objects that one hook may register."""


class Problem(NamedTuple):
    """The reason why a plugin, or a part of it, cannot be used."""

    distribution: str
    reason: str


class Registry:
    """All registered objects by name; `owners` maps `(kind, name)` to the distribution.

    `formats` are those of disks, `memory_formats` those of memory, so that what iterates over one never meets the
    other. Names and suffixes are unique among both; `format` and `probe` know both.
    """

    def __init__(self, formats: Mapping[str, Format] | None = None) -> None:
        given = dict(formats or {})
        self.formats: dict[str, Format] = {name: one for name, one in given.items() if one.kind == "disk"}
        self.memory_formats: dict[str, Format] = {name: one for name, one in given.items() if one.kind == "memory"}
        self.backends: dict[str, Backend] = {}
        self.commands: dict[str, Command] = {}
        self.schemes: dict[str, Scheme] = {}
        self.machines: dict[str, MachineFormat] = {}
        self.owners: dict[tuple[str, str], str] = {}
        self.plugins: list[Plugin] = []
        self.problems: list[Problem] = []
        self._suffixes: dict[str, list[str]] = {}
        self._trusted: dict[str, bool] = {}
        for name, one in self.all_formats.items():
            self.add_suffixes(name, one.suffixes)

    @property
    def all_formats(self) -> dict[str, Format]:
        """The formats of both kinds, disks first."""
        return self.formats | self.memory_formats

    def formats_of(self, kind: FormatKind) -> dict[str, Format]:
        """Returns the formats of one kind."""
        return self.memory_formats if kind == "memory" else self.formats

    def add_problem(self, distribution: str, doing: str, exc: BaseException) -> None:
        """Adds the failure of a plugin, in one line."""
        said = " ".join(str(exc).split())
        self._note(distribution, f"{doing}: {type(exc).__name__}: {said}")

    def _note(self, distribution: str, reason: str) -> None:
        problem = Problem(distribution, reason)
        if problem not in self.problems:
            self.problems.append(problem)

    def add_suffixes(self, name: str, suffixes: tuple[str, ...]) -> None:
        """Assigns suffixes to a format, except those of another known format.

        A suffix that two formats claim names neither; the content may still decide.
        """
        distribution = self.owners.get(("format", name), name)
        for suffix in dict.fromkeys(suffixes):
            known = known_suffix(f"x{suffix}")
            if known and known.name != name:
                self._note(distribution, f"format {name!r} claims the suffix {suffix} of {known.name}: ignored")
                continue
            claimants = self._suffixes.setdefault(suffix, [])
            claimants.append(name)
            if len(claimants) > 1:
                for each in claimants:
                    reason = f"suffix {suffix} is claimed by {' and '.join(claimants)}: neither gets it"
                    self._note(self.owners.get(("format", each), each), reason)

    def format(self, name: str) -> Format:
        """Returns a format by its name or QEMU's name; raises `UsageError` with a hint what to install or repair."""
        return self._format(name, self.all_formats)

    def _format(self, name: str, meant: Iterable[str]) -> Format:
        """Returns a format; `meant` are the names that a wrong one may have been meant for."""
        known = known_format(name)
        formats = self.all_formats
        for either in (name, known.name if known else name):
            if either in formats:
                return formats[either]
        raise UsageError(f"format {name!r} is not installed", hint=self._missing(known.name if known else name, meant))

    def writer(self, name: str) -> Format:
        """Returns a format that images can be made of; raises `UsageError` for one that is only read."""
        one = self._format(name, [each for each, other in self.all_formats.items() if other.can_write])
        if not one.can_write:
            have = ", ".join(sorted(name for name, other in self.formats_of(one.kind).items() if other.can_write))
            raise UsageError(f"{one.name} is only read: vmconv makes no such images", hint=f"it makes {have}")
        return one

    def _missing(self, name: str, names: Iterable[str]) -> str:
        broken = self._broken(name)
        if broken:
            return broken
        known = known_format(name)
        if known and known.distribution:
            return f"pip install {known.distribution}"
        have = ", ".join(sorted(self.formats)) or "none"
        if self.memory_formats:
            have += f"; of memory: {', '.join(sorted(self.memory_formats))}"
        about = f"{known.title}: no plugin is known to read it; " if known else ""
        meant = did_you_mean(name, names)
        return about + ((known and known.hint) or f"{meant}installed formats: {have}")

    def _broken(self, name: str) -> str | None:
        """Returns the problem of the plugin that should have registered this name."""
        for problem in self.problems:
            # The reason quotes the name if the plugin got as far as registering it.
            if repr(name) in problem.reason or problem.distribution.endswith(f"-{name}"):
                return f"{problem.distribution}: {problem.reason}"
        return None

    def backend(self, name: str) -> Backend:
        """Returns a backend by its name; raises `UsageError`."""
        if name not in self.backends:
            have = ", ".join(sorted(self.backends))
            raise UsageError(f"backend {name!r} is not installed", hint=self._broken(name) or f"installed: {have}")
        return self.backends[name]

    def scheme(self, name: str) -> Scheme:
        """Returns the scheme of URLs with this name; raises `UsageError`."""
        if name not in self.schemes:
            have = ", ".join(f"{each}://" for each in sorted(self.schemes))
            raise UsageError(f"{name}:// is not installed", hint=self._broken(name) or f"installed: {have}")
        return self.schemes[name]

    def format_by_suffix(self, path: str, kind: FormatKind | None = None) -> str | None:
        """Returns the name of the format of a file name's suffix, installed or not; with `kind` only of this kind."""
        claimants = self._claimants(path)
        if claimants:
            name = claimants[0] if len(claimants) == 1 else None
            return name if name is None or kind in (None, self.format(name).kind) else None
        known = known_suffix(path)
        return known.name if known and kind in (None, known.kind) else None

    def _claimants(self, path: str) -> list[str]:
        """Returns the installed formats that claim the longest suffix of a file name."""
        lower = path.lower()
        longest = max((suffix for suffix in self._suffixes if lower.endswith(suffix)), key=len, default="")
        return self._suffixes.get(longest, [])

    def stem(self, name: str) -> str:
        """Returns a file name without a format's suffix."""
        # The longest first, because one suffix may end with another.
        suffixes = {*self._suffixes, *(ending for known in KNOWN for ending in known.suffixes)}
        for ending in sorted(suffixes, key=len, reverse=True):
            if name.lower().endswith(ending) and len(name) > len(ending):
                return name[: -len(ending)]
        return name

    def probe(self, file: File) -> str | None:
        """Returns the name of the format of the content's signature; None without a signature.

        Raises `ImageError` if several formats claim the content.
        """
        claimants = [name for name, one in self.all_formats.items() if self._claims(one, file)]
        # Core's own table of magic numbers settles conflicts, and knows formats that are not installed.
        known = known_content(file) if len(claimants) != 1 else None
        if known and (not claimants or known.name in claimants):
            return known.name
        if len(claimants) > 1:
            both = " and ".join(claimants[:2])
            raise ImageError(
                f"{file.name}: content has the signatures of {both}", hint=f"use -f {' or -f '.join(claimants)}"
            )
        return claimants[0] if claimants else None

    def _claims(self, one: Format, file: File) -> bool:
        """True if a format recognises the content, and its probe is trusted; see `vmconv.io.trial`."""
        distribution = self.owners.get(("format", one.name), one.name)
        try:
            return bool(one.probe(file)) and self._is_trusted(one, distribution)
        except ReadError:
            # The content is unknown, so any format would be a guess.
            raise
        except (Exception, SystemExit) as exc:
            self.add_problem(distribution, f"probe of {one.name!r}", exc)
            return False

    def _is_trusted(self, one: Format, distribution: str) -> bool:
        if one.name not in self._trusted:
            from vmconv.io.trial import overclaimed

            claimed = overclaimed(one)
            self._trusted[one.name] = claimed is None
            if claimed is not None:
                self._note(distribution, f"probe of {one.name!r} claims {claimed}: it is disabled")
        return self._trusted[one.name]

    def examine(self) -> None:
        """Tests the probes of all formats; adds defects to `problems`."""
        for name, one in self.all_formats.items():
            distribution = self.owners.get(("format", name), name)
            try:
                self._is_trusted(one, distribution)
            except (Exception, SystemExit) as exc:
                self.add_problem(distribution, f"probe of {name!r}", exc)

    def identify(self, file: File, named: str | None = None, *, option: str = "-f") -> Format:
        """Returns the format of `file`: the one `named`, else the one that both suffix and content indicate.

        Content alone does not decide, because a guest can write any header into the first sector of its raw disk. So it
        can into a flat extent of a VMDK, which has the suffix of its descriptor.
        Raises `ImageError` if suffix and content differ. `option` is the command line option that names the format, for
        hints; empty if there is none.
        """
        if named is not None:
            return self.format(named)
        content = self.probe(file)
        if content is not None and content in self._claimants(file.path):
            if is_payload(file.path):
                raise ImageError(
                    f"{file.name}: its name says flat extent, whose content is a guest's: the signature of {content}",
                    hint=described_beside(file.path) or self._choice(content, option),
                )
            return self.format(content)
        suffix = self.format_by_suffix(file.path)
        if content is None:
            _refuse_foreign(file, suffix, option)
            if suffix and self._is_plain(suffix, file):
                return self.format(suffix)
            if suffix not in (None, RAW_NAME):
                raise self._unsigned(file, suffix, option)
            return self.format(RAW_NAME)
        if content != suffix:
            spoken = f"its name says {suffix}" if suffix else "its name has no format's suffix"
            raise ImageError(
                f"{file.name}: content has the signature of {content} but {spoken}",
                hint=self._choice(content, option),
            )
        return self.format(content)

    def recognise(self, file: File, *, option: str = "-f") -> tuple[Format, tuple[str, ...]]:
        """Returns the format of the content, and warnings if the suffix differs; for commands that only describe."""
        content, suffix = self.probe(file), self.format_by_suffix(file.path)
        if content is None:
            _refuse_foreign(file, suffix, option)
            # The name says memory, and nothing says disk.
            if suffix and not self._is_plain(suffix, file) and self.format_by_suffix(file.path, "memory"):
                raise self._unsigned(file, suffix, option)
        found = content or (suffix if suffix and self._is_plain(suffix, file) else RAW_NAME)
        if suffix in (None, found):
            return self.format(found), ()
        return self.format(found), (f"{file.name}: its name says {suffix}, its content is {found}",)

    def _is_plain(self, name: str, file: File) -> bool:
        """True if files with this suffix have no signature in the format `name`, that of the suffix."""
        one = self.all_formats.get(name)
        return one is not None and file.path.lower().endswith(tuple(one.plain_suffixes))

    def _unsigned(self, file: File, suffix: str, option: str) -> ImageError:
        """Returns the error of a file without the signature of its suffix's format."""
        by_raw = f"if it is a raw disk, {_say(option, RAW_NAME)}"
        memory = self.format_by_suffix(file.path, "memory")
        hint = f"if it is raw memory, {_say(option, RAM_NAME)}; {by_raw}" if memory else described_beside(file.path)
        return ImageError(f"{file.name}: no signature of {suffix}, the format of its suffix", hint=hint or by_raw)

    def _choice(self, content: str, option: str) -> str:
        """Returns the hint for a file whose signature does not match its suffix."""
        if content in self.all_formats:
            said = f"{_say(option, content)} or {option} {RAW_NAME}" if option else "give it the suffix of its format"
            return f"a guest can write such a header into its raw disk: {said}"
        missing = self._missing(content, self.all_formats)
        return f"{missing}; if a guest wrote that into its raw disk, {_say(option, RAW_NAME)}"


def _say(option: str, name: str) -> str:
    """Returns how the user names a format."""
    return f"use {option} {name}" if option else f"convert it alone with -f {name}"


def _refuse_foreign(file: File, suffix: str | None, option: str) -> None:
    """Raises `ImageError` for a file without a format's signature that is not a disk by content or suffix.

    `suffix` is the format of its suffix.
    """
    kind = foreign_content(file)
    if kind:
        raise ImageError(
            f"{file.name}: content has the signature of {kind.title}, which is not a disk",
            hint=f"{hint_for(kind, file.path)}; if a guest wrote that into its raw disk, {_say(option, RAW_NAME)}",
        )
    ending = None if suffix or file.is_device else suffix_of(file.path)
    if ending is None:
        return
    by_raw = f"if it is a raw disk, {_say(option, RAW_NAME)}"
    kind = foreign_suffix(ending)
    if kind:
        hint = f"{hint_for(kind, file.path)}; {by_raw}"
        raise ImageError(f"{file.name}: its name says {kind.title}, which is not a disk", hint=hint)
    raise ImageError(f"{file.name}: no format has the suffix {ending}, and content has no signature", hint=by_raw)


_KINDS: tuple[tuple[str, Any], ...] = (
    ("format", Format),
    ("backend", Backend),
    ("command", Command),
    ("scheme", Scheme),
    ("machine", MachineFormat),
)


@cache
def installed() -> Registry:
    """Returns the registry of this environment without machine formats; loaded once per process."""
    return _loaded(hooks.GROUP)


@cache
def installed_machines() -> Registry:
    """Returns the registry of the plugins with machine formats; loaded once per process."""
    return _loaded(hooks.MACHINE_GROUP)


def _loaded(group: str) -> Registry:
    """Returns what the plugins of one group of entry points register."""
    registry = Registry()
    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks)
    names: dict[str, str] = {}
    for entry in entry_points(group):
        try:
            plugin = import_module(entry.module)
        # Whatever a plugin raises, or exits with, must not affect the others.
        except (Exception, SystemExit) as exc:
            registry.add_problem(entry.distribution, "cannot be imported", exc)
            continue
        _register(registry, manager, names, entry, plugin)
    for kind, base in _KINDS:
        _collect(registry, manager, names, kind, base)
    return registry


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
    if not _supports(registry, plugin.distribution, module):
        manager.unregister(name=key)
        return
    registry.plugins.append(plugin)
    callers = manager.get_hookcallers(module) or ()
    for caller in callers:
        if not caller.has_spec():
            registry.problems.append(Problem(plugin.distribution, _unknown_hook(caller.name)))
    # pluggy ignores functions without its mark, so a forgotten decorator would go unnoticed.
    unmarked = [
        name for name in vars(module) if name.startswith("vmconv_register_") and callable(getattr(module, name))
    ]
    for name in set(unmarked) - {caller.name for caller in callers}:
        what = f"{name} is not marked with hookimpl" if hasattr(hooks, name) else _unknown_hook(name)
        registry.problems.append(Problem(plugin.distribution, what))
    if not callers and not unmarked:
        registry.problems.append(Problem(plugin.distribution, f"{plugin.module} registers nothing"))


def _supports(registry: Registry, distribution: str, module: Any) -> bool:
    """Returns whether this vmconv supports the plugin's interface version; else adds a problem."""
    try:
        refusal = _other_interface(getattr(module, "VMCONV_INTERFACE", hooks.VMCONV_INTERFACE))
    except (Exception, SystemExit) as exc:
        # A number may be too long to print, and a module may compute its attributes.
        registry.add_problem(distribution, "VMCONV_INTERFACE", exc)
        return False
    if refusal is not None:
        registry.problems.append(Problem(distribution, refusal))
    return refusal is None


def _other_interface(wanted: object) -> str | None:
    """Returns why this vmconv does not support a plugin of the interface version `wanted`; None if it does."""
    newest, oldest = hooks.VMCONV_INTERFACE, hooks.OLDEST_INTERFACE
    have = f"this vmconv has {newest}" if newest == oldest else f"this vmconv has {oldest} to {newest}"
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        return f"VMCONV_INTERFACE is {wanted!r}, which is not an interface version; {have}"
    if wanted > newest:
        return f"needs version {wanted} of the plugin interface, {have}: upgrade vmconv"
    if wanted < oldest:
        return f"was written for version {wanted} of the plugin interface, {have}: upgrade the plugin"
    return None


def _unknown_hook(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, [n for n in vars(hooks) if n.startswith("vmconv_")], n=1)
    return f"unknown hook {name}" + (f", did you mean {close[0]}" if close else "")


def _collect(registry: Registry, manager: pluggy.PluginManager, names: dict[str, str], kind: str, base: Any) -> None:
    """Calls one hook of each plugin separately, so that a failure is attributed to its plugin."""
    claims: dict[str, list[tuple[str, Any]]] = {}
    for implementation in getattr(manager.hook, f"vmconv_register_{kind}s").get_hookimpls():
        distribution = names[implementation.plugin_name]
        for item in _registered(registry, distribution, implementation.function):
            try:
                _checked(item, kind, base)
            except (Exception, SystemExit) as exc:
                registry.add_problem(distribution, implementation.function.__name__, exc)
            else:
                claims.setdefault(item.name, []).append((distribution, item))
    for name, claimants in claims.items():
        _give(registry, kind, name, claimants)
    if kind == "format":
        for name, one in registry.all_formats.items():
            registry.add_suffixes(name, one.suffixes)


def _give(registry: Registry, kind: str, name: str, claimants: list[tuple[str, Any]]) -> None:
    """Assigns a name to its only claimant; core keeps its own names, such as the command that lists problems."""
    own = [claimant for claimant in claimants if claimant[0] == "vmconv"]
    if len(claimants) == 1 or len(own) == 1:
        registry.owners[kind, name], one = (own or claimants)[0]
        table = registry.formats_of(one.kind) if kind == "format" else getattr(registry, f"{kind}s")
        table[name] = one
    if len(claimants) > 1:
        who = " and ".join(f"{_class_of(item)} of {distribution}" for distribution, item in claimants)
        for distribution in dict.fromkeys(distribution for distribution, _ in claimants):
            registry.problems.append(Problem(distribution, f"{kind} {name!r} is claimed by {who}; uninstall one"))


def _registered(registry: Registry, distribution: str, hook: Any) -> Iterator[Any]:
    """Yields the objects of a hook until it fails."""
    try:
        # A hook may be an endless generator.
        yield from islice(hook(), _MAX_ITEMS)
    except (Exception, SystemExit) as exc:
        registry.add_problem(distribution, hook.__name__, exc)


def _checked(item: Any, kind: str, base: Any) -> None:
    if not isinstance(item, base):
        raise PluginError(f"registers {item!r}, which is not a {base.__name__}")
    if not (_SCHEME if kind == "scheme" else _NAME).fullmatch(getattr(item, "name", "")):
        letters = "+, - and ." if kind == "scheme" else "- and _"
        raise PluginError(f"{kind} name {getattr(item, 'name', None)!r} is not lower case letters, digits, {letters}")
    field = "help" if kind == "command" else "title"
    if not isinstance(getattr(item, field, None), str):
        raise PluginError(f"{kind} {item.name!r} has no {field}, a short description")
    if kind == "format" and item.kind not in get_args(FormatKind):
        raise PluginError(f"kind {item.kind!r} of format {item.name!r} is not disk or memory")
    suffixes = getattr(item, "suffixes", ())
    if not (isinstance(suffixes, tuple) and all(isinstance(suffix, str) for suffix in suffixes)):
        raise PluginError(f"suffixes of {kind} {item.name!r} are not a tuple of strings")
    for suffix in suffixes:
        if not _SUFFIX.fullmatch(suffix):
            raise PluginError(
                f"suffix {suffix!r} of {kind} {item.name!r} is not a dot and lower case letters or digits"
            )


def _class_of(item: object) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"
