"""Finds the machine format of a configuration: named by the user, or by suffix and content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv.errors import ImageError, PluginError, ReadError, UsageError
from vmconv.io.decompressing import Decompressed, compression_of
from vmconv.io.known_machines import DISTRIBUTIONS, SUFFIXES
from vmconv.io.registry import installed_machines

if TYPE_CHECKING:
    from vmconv.interface.machines import MachineFormat
    from vmconv.model.sources import File


def machine_format(name: str) -> MachineFormat:
    """Returns a machine format by its name; raises `UsageError` with a hint what to install."""
    registry = installed_machines()
    if name in registry.machines:
        return registry.machines[name]
    for problem in registry.problems:
        if problem.distribution == DISTRIBUTIONS.get(name) or repr(name) in problem.reason:
            raise UsageError(
                f"machine format {name!r} cannot be used", hint=f"{problem.distribution}: {problem.reason}"
            )
    have = ", ".join(sorted(registry.machines)) or "none"
    hint = f"pip install {DISTRIBUTIONS[name]}" if name in DISTRIBUTIONS else f"installed: {have}"
    raise UsageError(f"machine format {name!r} is not installed", hint=hint)


def format_by_suffix(path: str) -> str | None:
    """Returns the machine format of a file name's suffix, installed or not; None for other suffixes."""
    lower = path.lower()
    claims = {suffix: one.name for one in installed_machines().machines.values() for suffix in one.suffixes}
    found = max((suffix for suffix in {**SUFFIXES, **claims} if lower.endswith(suffix)), key=len, default=None)
    return None if found is None else claims.get(found) or SUFFIXES[found]


def identify(file: File, named: str | None) -> MachineFormat:
    """Returns the format of a configuration: the one `named`, else the one whose content it has.

    Configurations are text whose content is specific, so the suffix decides only between formats that both claim the
    content. Raises `ImageError` if no format claims it, or several do.
    """
    if named is not None:
        return machine_format(named)
    by_suffix = format_by_suffix(file.path)
    found = claimants(file)
    chosen = [one for one in found if one.name == by_suffix] or found
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        names = [one.name for one in chosen]
        raise ImageError(
            f"{file.name}: content is claimed by {' and '.join(names)}", hint=f"use -f {' or -f '.join(names)}"
        )
    if by_suffix is not None and by_suffix not in installed_machines().machines:
        return machine_format(by_suffix)
    _refuse_undecodable(file)
    raise ImageError(
        f"{file.name}: is not a configuration of a known machine format",
        hint="vmconv machine formats lists them; vmconv convert converts a single disk",
    )


def _refuse_undecodable(file: File) -> None:
    """Raises `ImageError` for a compressed file whose beginning cannot be decoded: so no format claims it."""
    compression = compression_of(file)
    if compression:
        Decompressed(file, compression).read(1)


def claimants(file: File) -> list[MachineFormat]:
    """Returns the installed formats with a reader that claim the content of a configuration."""
    return [one for one in installed_machines().machines.values() if one.can_read and _claims(one, file)]


def _claims(one: MachineFormat, file: File) -> bool:
    registry = installed_machines()
    try:
        return bool(one.probe(file))
    except ReadError:
        # The content is unknown, so any format would be a guess.
        raise
    except (Exception, SystemExit) as exc:
        registry.add_problem(registry.owners.get(("machine", one.name), one.name), f"probe of {one.name!r}", exc)
        return False


def refuse_result(value: object, wanted: type, format_name: str, what: str) -> None:
    """Raises `PluginError` if a plugin returned a value of another type."""
    if not isinstance(value, wanted):
        raise PluginError(f"its {what} returns {type(value).__name__}, not {wanted.__name__}", format_name=format_name)
