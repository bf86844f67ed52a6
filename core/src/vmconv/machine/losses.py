"""What becomes of each setting: carried, substituted or lost, computed from the machine and the format's `carries`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.errors import PlanError, PluginError, UsageError, counted, in_words
from vmconv.machine.model import About, Unless
from vmconv.machine.paths import carried, is_field, marks, plain, stated, still_states
from vmconv.machine.request import Loss

if TYPE_CHECKING:
    from vmconv.interface.machines import Adapted, MachineFormat, Substitution
    from vmconv.machine.model import Machine


class Fate(NamedTuple):
    """The paths that are carried, the substitutions with a new value, and the losses."""

    carried: tuple[str, ...]
    substitutions: tuple[Substitution, ...]
    losses: tuple[Loss, ...]


def fate(machine: Machine, adapted: Adapted, target: MachineFormat) -> Fate:
    """Returns what becomes of each field that `machine` states.

    Raises `PluginError` if the target changes a field that it carries, and gives no reason.
    """
    before, after = dict(stated(machine)), dict(stated(adapted.machine))
    kept, losses = [], []
    for path, value in before.items():
        substitution = _about(path, adapted.substitutions)
        if substitution is not None or _is_no_loss(path, before, target.carries):
            continue
        if not carried(path, target.carries):
            losses.append(Loss(path, _named(value), f"{target.name} has no place for it"))
        elif not still_states(after, path, value):
            raise PluginError(f"changes {path} from {value!r} without a reason", format_name=target.name)
        else:
            kept.append(path)
    losses += [Loss(each.path, each.before, each.reason) for each in adapted.substitutions if not each.after]
    changed = tuple(each for each in adapted.substitutions if each.after)
    return Fate(tuple(kept), changed, tuple(losses))


def _is_no_loss(path: str, before: Mapping[str, Any], carries: Collection[str]) -> bool:
    """Returns whether the model marks the field as one whose absence is no loss, or is reported with another field."""
    mark, beside = marks().get(plain(path)), path.rpartition(".")[0]
    if isinstance(mark, Unless):
        return f"{beside}.{mark.stated}" in before
    if isinstance(mark, About):
        return carried(f"{beside}.{mark.carried}", carries)
    return mark is not None


def _about(path: str, substitutions: Iterable[Substitution]) -> Substitution | None:
    """Returns the substitution of a field, of the same field of all devices, or of the part that has the field."""
    for each in substitutions:
        if any(at == each.path or at.startswith((f"{each.path}.", f"{each.path}[")) for at in (path, plain(path))):
            return each
    return None


def words(value: Any) -> str:
    """Returns a value of a field for people: settings of a vendor by their number."""
    if isinstance(value, dict):
        return counted(len(value), "setting")
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return in_words(value)


def _named(value: Any) -> str:
    """Returns a lost value for people: settings of a vendor by their names."""
    return f"{words(value)} ({', '.join(value)})" if isinstance(value, dict) else words(value)


def refuse(losses: Iterable[Loss], *, strict: bool, keep: Collection[str]) -> None:
    """Raises `PlanError` for losses: all with `strict`, else of fields in or below `keep`.

    Raises `UsageError` for a name in `keep` that is no field.
    """
    for name in keep:
        if not is_field(name):
            hint = "vmconv machine info lists the fields of a machine, such as tpm and nics.mac"
            raise UsageError(f"--keep {name}: machines have no such field", hint=hint)
    refused = [loss for loss in losses if strict or carried(loss.path, keep) or loss.path in keep]
    if refused:
        raise PlanError("; ".join(_lines(refused)), hint="vmconv machine plan lists what becomes of each setting")


def _lines(losses: Iterable[Loss]) -> Iterator[str]:
    for loss in losses:
        yield f"{loss.path} {loss.value} would be lost: {loss.reason}"
