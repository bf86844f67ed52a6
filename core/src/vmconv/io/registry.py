"""What is installed: formats, backends and commands, from which distribution, and which plugins are broken and why.

One broken plugin never stops the others: whatever is wrong with it becomes a `Problem`. A name that two plugins claim
is given to neither, so that nobody's disks are read by whichever happened to load first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from vmconv.errors import ImageError, PluginError, ReadError, UsageError
from vmconv.interface import hooks
from vmconv.interface.backend import Backend
from vmconv.interface.command import Command
from vmconv.interface.format import Format
from vmconv.io.discovery import Plugin, entry_points
from vmconv.io.foreign import described_beside, foreign_content, foreign_suffix, suffix_of
from vmconv.io.known import KNOWN, RAW_NAME, known_content, known_format, known_suffix

if TYPE_CHECKING:
    from vmconv.model.sources import File

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SUFFIX = re.compile(r"\.[a-z0-9][a-z0-9._+-]{0,31}")
_MAX_ITEMS = 1000
"""Things that one hook may register."""


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
        self._suffixes: dict[str, list[str]] = {}
        self._trusted: dict[str, bool] = {}
        for name, one in self.formats.items():
            self.add_suffixes(name, one.suffixes)

    def add_problem(self, distribution: str, doing: str, exc: BaseException) -> None:
        """Notes that a plugin failed, in one line."""
        said = " ".join(str(exc).split())
        self._note(distribution, f"{doing}: {type(exc).__name__}: {said}")

    def _note(self, distribution: str, reason: str) -> None:
        problem = Problem(distribution, reason)
        if problem not in self.problems:
            self.problems.append(problem)

    def add_suffixes(self, name: str, suffixes: tuple[str, ...]) -> None:
        """Gives a format its suffixes, but those that are another known format's.

        A suffix that two formats claim belongs to neither, unless the content decides.
        """
        distribution = self.owners.get(("format", name), name)
        for suffix in dict.fromkeys(suffixes):
            known = known_suffix(f"x{suffix}")
            if known and known.name != name:
                self._note(
                    distribution, f"format {name!r} claims the suffix {suffix} of {known.name}; it is not given it"
                )
                continue
            claimants = self._suffixes.setdefault(suffix, [])
            claimants.append(name)
            if len(claimants) > 1:
                for each in claimants:
                    reason = f"suffix {suffix} is claimed by {' and '.join(claimants)}: it speaks of neither"
                    self._note(self.owners.get(("format", each), each), reason)

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
        return about + ((known and known.hint) or f"installed formats: {have}")

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
        claimants = self._claimants(path)
        if claimants:
            return claimants[0] if len(claimants) == 1 else None
        known = known_suffix(path)
        return known.name if known else None

    def _claimants(self, path: str) -> list[str]:
        """Returns the installed formats that claim the longest ending of a file name."""
        lower = path.lower()
        longest = max((suffix for suffix in self._suffixes if lower.endswith(suffix)), key=len, default="")
        return self._suffixes.get(longest, [])

    def stem(self, name: str) -> str:
        """Returns a file name without the ending that speaks of a format."""
        suffixes = {*self._suffixes, *(ending for known in KNOWN for ending in known.suffixes)}
        for ending in sorted(suffixes, key=len, reverse=True):
            if name.lower().endswith(ending) and len(name) > len(ending):
                return name[: -len(ending)]
        return name

    def probe(self, file: File) -> str | None:
        """Returns the name of the format whose signature the content bears; None when it bears none.

        Raises `ImageError` when two formats claim it.
        """
        claimants = [name for name, one in self.formats.items() if self._claims(one, file)]
        known = known_content(file) if len(claimants) != 1 else None
        if known and (not claimants or known.name in claimants):
            return known.name
        if len(claimants) > 1:
            both = " and ".join(claimants[:2])
            raise ImageError(
                f"{file.name}: content has the signatures of {both}", hint=f"say -f {' or -f '.join(claimants)}"
            )
        return claimants[0] if claimants else None

    def _claims(self, one: Format, file: File) -> bool:
        """True when a format recognises the content, and does not recognise what is none of its own."""
        distribution = self.owners.get(("format", one.name), one.name)
        try:
            return bool(one.probe(file)) and self._is_trusted(one, distribution)
        except ReadError:
            # It is not known what is in there: another format, or raw, would be a guess.
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
                self._note(distribution, f"probe of {one.name!r} claims {claimed}: it is not asked any more")
        return self._trusted[one.name]

    def examine(self) -> None:
        """Looks for faults that show only when a format is used; what is found is among the `problems`."""
        for name, one in self.formats.items():
            distribution = self.owners.get(("format", name), name)
            try:
                self._is_trusted(one, distribution)
            except (Exception, SystemExit) as exc:
                self.add_problem(distribution, f"probe of {name!r}", exc)

    def identify(self, file: File, named: str | None = None, *, option: str = "-f") -> Format:
        """Returns the format to read `file` with: the one `named`, else what suffix and content agree on.

        Content alone decides nothing: a guest can write any header into the first sector of its raw disk. So a file
        that bears a signature its name does not speak of is refused until the user names the format. `option` is how
        the user does that; empty where only the file's name can say it.
        """
        if named is not None:
            return self.format(named)
        content = self.probe(file)
        if content is not None and content in self._claimants(file.path):
            return self.format(content)
        suffix = self.format_by_suffix(file.path)
        if content is None:
            _refuse_foreign(file, suffix, option)
            if suffix not in (None, RAW_NAME):
                raise ImageError(
                    f"{file.name}: no signature of {suffix}, the format its name speaks of",
                    hint=described_beside(file.path) or f"if it is a raw disk, {_say(option, RAW_NAME)}",
                )
            return self.format(RAW_NAME)
        if content != suffix:
            spoken = f"its name speaks of {suffix}" if suffix else "its name speaks of no format"
            raise ImageError(
                f"{file.name}: content has the signature of {content} but {spoken}",
                hint=self._choice(content, option),
            )
        return self.format(content)

    def recognise(self, file: File, *, option: str = "-f") -> tuple[Format, tuple[str, ...]]:
        """Returns the format of the content, whatever the name speaks of, and warnings: for what nothing depends on."""
        content, suffix = self.probe(file), self.format_by_suffix(file.path)
        if content is None:
            _refuse_foreign(file, suffix, option)
        found = content or RAW_NAME
        if suffix in (None, found):
            return self.format(found), ()
        return self.format(found), (f"{file.name}: its name speaks of {suffix}, its content of {found}",)

    def _choice(self, content: str, option: str) -> str:
        """Returns what a user can say of a file whose content has a signature that its name does not speak of."""
        if content in self.formats:
            said = f"{_say(option, content)} or {option} {RAW_NAME}" if option else "let its name speak of its format"
            return f"a guest can write such a header into its raw disk: {said}"
        return f"{self._missing(content)}; if a guest wrote that into its raw disk, {_say(option, RAW_NAME)}"


def _say(option: str, name: str) -> str:
    """Returns what a user can do to name a format."""
    return f"say {option} {name}" if option else f"convert it by itself and say -f {name}"


def _refuse_foreign(file: File, suffix: str | None, option: str) -> None:
    """Raises `ImageError` for a file without the signature of a format that is no disk by its content or suffix.

    `suffix` is the format that its name speaks of.
    """
    kind = foreign_content(file)
    if kind:
        raise ImageError(
            f"{file.name}: content has the signature of {kind.title}, which is no disk",
            hint=f"{kind.hint}; if a guest wrote that into its raw disk, {_say(option, RAW_NAME)}",
        )
    ending = None if suffix or file.is_device else suffix_of(file.path)
    if ending is None:
        return
    by_raw = f"if it is a raw disk, {_say(option, RAW_NAME)}"
    kind = foreign_suffix(ending)
    if kind:
        raise ImageError(
            f"{file.name}: its name speaks of {kind.title}, which is no disk", hint=f"{kind.hint}; {by_raw}"
        )
    raise ImageError(f"{file.name}: no format has the suffix {ending}, and content has no signature", hint=by_raw)


@cache
def installed() -> Registry:
    """Returns the registry of this environment; found once per process."""
    registry = Registry()
    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks)
    names: dict[str, str] = {}
    for entry in entry_points(hooks.GROUP):
        try:
            plugin = import_module(entry.module)
        except (Exception, SystemExit) as exc:
            registry.add_problem(entry.distribution, "cannot be imported", exc)
            continue
        _register(registry, manager, names, entry, plugin)
    for kind, base in (("format", Format), ("backend", Backend), ("command", Command)):
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
    refusal = _other_interface(getattr(module, "VMCONV_INTERFACE", hooks.VMCONV_INTERFACE))
    if refusal:
        manager.unregister(name=key)
        registry.problems.append(Problem(plugin.distribution, refusal))
        return
    registry.plugins.append(plugin)
    callers = manager.get_hookcallers(module) or ()
    for caller in callers:
        if not caller.has_spec():
            registry.problems.append(Problem(plugin.distribution, _unknown_hook(caller.name)))
    unmarked = [
        name for name in vars(module) if name.startswith("vmconv_register_") and callable(getattr(module, name))
    ]
    for name in set(unmarked) - {caller.name for caller in callers}:
        what = f"{name} is not marked with hookimpl" if hasattr(hooks, name) else _unknown_hook(name)
        registry.problems.append(Problem(plugin.distribution, what))
    if not callers and not unmarked:
        registry.problems.append(Problem(plugin.distribution, f"{plugin.module} registers nothing"))


def _other_interface(wanted: object) -> str | None:
    """Returns why a plugin that was written for this version of the interface cannot be used."""
    newest, oldest = hooks.VMCONV_INTERFACE, hooks.OLDEST_INTERFACE
    have = f"this vmconv has {newest}" if newest == oldest else f"this vmconv has {oldest} to {newest}"
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        return f"VMCONV_INTERFACE is {wanted!r}, which is no version of the interface; {have}"
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
    """Calls one registering hook of each plugin by itself, so that what goes wrong is known to be that plugin's."""
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
        for name, one in registry.formats.items():
            registry.add_suffixes(name, one.suffixes)


def _give(registry: Registry, kind: str, name: str, claimants: list[tuple[str, Any]]) -> None:
    """Gives a name to who claims it; of several to nobody.

    What core itself brings is no plugin's to take away: least of all the command that lists the problems.
    """
    own = [claimant for claimant in claimants if claimant[0] == "vmconv"]
    if len(claimants) == 1 or len(own) == 1:
        registry.owners[kind, name], getattr(registry, f"{kind}s")[name] = (own or claimants)[0]
    if len(claimants) > 1:
        who = " and ".join(f"{_class_of(item)} of {distribution}" for distribution, item in claimants)
        for distribution in dict.fromkeys(distribution for distribution, _ in claimants):
            registry.problems.append(Problem(distribution, f"{kind} {name!r} is claimed by {who}; uninstall one"))


def _registered(registry: Registry, distribution: str, hook: Any) -> Iterator[Any]:
    """Yields what a hook registers, until it fails."""
    try:
        yield from islice(hook(), _MAX_ITEMS)
    except (Exception, SystemExit) as exc:
        registry.add_problem(distribution, hook.__name__, exc)


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
    for suffix in suffixes:
        if not _SUFFIX.fullmatch(suffix):
            raise PluginError(
                f"suffix {suffix!r} of {kind} {item.name!r} is not a dot and lower case letters or digits"
            )


def _class_of(item: object) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"
