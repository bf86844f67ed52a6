"""Many conversions with one command: which images, under which names, one after the other or beside each other."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from vmconv.conversion.containers import new_name
from vmconv.conversion.needed import is_done
from vmconv.conversion.pipeline import run
from vmconv.conversion.request import Request, Result
from vmconv.errors import ExistsError, UsageError, VmconvError, os_errors, warn
from vmconv.interface.arguments import Existing, Verify
from vmconv.interface.scheme import is_url, parse_url, without_secrets
from vmconv.io.faults import plugin_faults
from vmconv.io.registry import Registry, installed

if TYPE_CHECKING:
    from vmconv.model.image import Image
    from vmconv.model.sources import File

State = Literal["made", "exists", "current", "failed", "stopped"]

_EXISTS_HINT = "--force replaces it; --skip-existing and --if-needed leave it"
_Id = tuple[int, int]
_One = Callable[[Request], "Outcome"]


class Outcome(NamedTuple):
    """What became of one conversion.

    "made": with its `result`. "exists": skipped. "current": the target is the source's disk already. "failed": with
    `message`, `hint` and the exit code of `vmconv convert`. "stopped": by a signal, `message` says what it left.
    """

    source: str
    target: str
    state: State
    result: Result | None = None
    message: str = ""
    hint: str | None = None
    exit_code: int = 0


def requests(
    common: Request, sources: Sequence[str], directory: str, target_format: str, *, recursive: bool
) -> list[Request]:
    """Returns one request per image: `common` with a target in `directory`, named after the image.

    With `recursive`, a directory among the sources stands for all images in its tree, and the targets are in a tree of
    the same shape; if `directory` lies in that tree, it is left out, with a warning.

    Raises `UsageError` for directories without `recursive`, and for two images with one target.
    """
    registry = installed()
    wanted = registry.writer(target_format)
    found: dict[str, Request] = {}
    for source in sources:
        for path, below in _images(source, registry, common, directory if recursive else None):
            name = parse_url(path).name if is_url(path) else os.path.basename(path.rstrip("/"))
            target = os.path.normpath(os.path.join(directory, below, new_name(name, wanted, registry)))
            place = _place(target, common)
            if place in found:
                raise UsageError(
                    f"{without_secrets(found[place].source)} and {without_secrets(path)} would both become {target}",
                    hint="convert one of them alone, with a name of its own",
                )
            found[place] = common._replace(source=path, target=target, target_format=wanted.name)
    if not (common.force and any(map(os.path.lexists, found))):
        return list(found.values())
    spared = frozenset().union(*(_parts(request, registry) for request in found.values()))
    return [request._replace(spared=spared) for request in found.values()]


def _place(target: str, common: Request) -> str:
    """Returns the path of the file that a conversion to `target` makes: symbolic links are followed.

    Without `force` a link that exists is not followed, because nothing is made there.
    """
    if common.force:
        return os.path.realpath(target)
    directory, name = os.path.split(target)
    return os.path.join(os.path.realpath(directory), name)


def _parts(request: Request, registry: Registry) -> set[_Id]:
    """Returns the local files of which a source consists, with those of its parents."""
    # What is at a URL is no target, and a pipe can be read once.
    if not os.path.exists(request.source) or stat.S_ISFIFO(os.stat(request.source).st_mode):
        return set()
    with request.opener(registry) as opener:
        # An image that cannot be read is reported when it is converted.
        with suppress(VmconvError, OSError), plugin_faults():
            opener.image(request.source, request.source_format).payload_files()
        return {_id(file) for file in opener.files if not file.is_remote}


def convert_all(
    requests: Sequence[Request],
    *,
    existing: Existing,
    verify: bool | Verify,
    jobs: int,
    ended: Callable[[Outcome], None],
) -> list[Outcome]:
    """Converts all, at most `jobs` beside each other, each as `vmconv convert` does; none depends on another.

    `ended` is called with each outcome. A signal ends the running ones as it would end each alone, begins no other,
    and is raised when all have ended; then `KeyboardInterrupt` has the attribute `outcomes`.
    """
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        ended(outcome)

    def one(request: Request) -> Outcome:
        return convert_one(request, existing=existing, verify=verify)

    try:
        if jobs == 1:
            _in_turn(requests, one, note)
        else:
            _beside(requests, one, note, jobs)
    except KeyboardInterrupt as exc:
        vars(exc)["outcomes"] = tuple(outcomes)
        raise
    return outcomes


def convert_one(request: Request, *, existing: Existing, verify: bool | Verify) -> Outcome:
    """Converts one image; an error becomes its outcome."""
    names = without_secrets(request.source), request.target
    try:
        with plugin_faults(), os_errors("cannot be converted", VmconvError, where=names[0]):
            if os.path.lexists(request.target):
                if existing == "skip":
                    return Outcome(*names, "exists")
                if existing == "compare" and is_done(request):
                    return Outcome(*names, "current")
            with _directories(os.path.dirname(request.target)):
                return Outcome(*names, "made", run(request, verify=verify)[0])
    except VmconvError as exc:
        ways = existing == "refuse" and isinstance(exc, ExistsError)
        return Outcome(*names, "failed", None, str(exc), _EXISTS_HINT if ways else exc.hint, exc.exit_code)


def _in_turn(requests: Sequence[Request], one: _One, note: Callable[[Outcome], None]) -> None:
    for request in requests:
        try:
            outcome = one(request)
        except KeyboardInterrupt as exc:
            note(_stopped(request, exc))
            raise
        note(outcome)


def _beside(requests: Sequence[Request], one: _One, note: Callable[[Outcome], None], jobs: int) -> None:
    from vmconv.system.children import run_beside

    def work(request: Request) -> Outcome:
        try:
            return one(request)
        except KeyboardInterrupt as exc:
            return _stopped(request, exc)

    def died(request: Request, how: str) -> Outcome:
        names = without_secrets(request.source), request.target
        return Outcome(*names, "failed", None, f"{names[0]}: its process {how}", None, 1)

    run_beside(requests, work, died, note, jobs)


def _stopped(request: Request, exc: KeyboardInterrupt) -> Outcome:
    """Returns the outcome of a conversion that a signal ended, perhaps after its commit."""
    names = without_secrets(request.source), request.target
    made: tuple[Result, ...] = getattr(exc, "results", ())
    if made:
        return Outcome(*names, "made", made[0])
    return Outcome(*names, "stopped", None, getattr(exc, "left", None) or "nothing was created")


@contextmanager
def _directories(path: str) -> Iterator[None]:
    """Makes the missing directories of a path, and removes them if the block fails."""
    made: list[str] = []
    while path and not os.path.isdir(path):
        made.append(path)
        path = os.path.dirname(path)
    for each in reversed(made):
        with suppress(FileExistsError):
            os.mkdir(each)
    try:
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                os.rmdir(each)
        raise


def _images(source: str, registry: Registry, common: Request, left_out: str | None) -> Iterator[tuple[str, str]]:
    """Yields the images that a source stands for, each with its directory relative to the source.

    `left_out` is a directory whose images are not among them; with None, directories are refused.
    """
    if not os.path.isdir(source) or _is_image(source, registry):
        yield source, ""
    elif left_out is not None:
        yield from _images_below(source, registry, common, left_out)
    else:
        raise UsageError(f"{source}: is a directory", hint="--recursive converts the images in its tree")


def _images_below(tree: str, registry: Registry, common: Request, left_out: str) -> Iterator[tuple[str, str]]:
    """Yields the images of a tree, without files that only hold the payload of another one. Follows no links."""
    paths = list(_candidates(tree, registry, os.path.realpath(left_out)))
    payload = _payload(paths, registry, common)
    for path in paths:
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) not in payload:
            yield path, os.path.relpath(os.path.dirname(path), tree)


def _candidates(tree: str, registry: Registry, left_out: str) -> Iterator[str]:
    def fail(exc: OSError) -> None:
        raise exc

    with os_errors("cannot be searched", VmconvError, where=tree):
        for directory, below, files in os.walk(tree, onerror=fail):
            # What an earlier run has made there is no source of this one.
            for name in [name for name in below if os.path.realpath(os.path.join(directory, name)) == left_out]:
                below.remove(name)
                if not os.path.islink(os.path.join(directory, name)):
                    warn(f"{os.path.join(directory, name)}: is no source, because the targets go there")
            bundles = [name for name in below if _is_image(name, registry)]
            below[:] = sorted(name for name in below if name not in bundles)
            for name in sorted([*files, *bundles]):
                path = os.path.join(directory, name)
                if _is_image(name, registry) and not os.path.islink(path):
                    yield path


def _is_image(name: str, registry: Registry) -> bool:
    found = registry.all_formats.get(registry.format_by_suffix(name.rstrip("/"), "disk") or "")
    return found is not None and found.can_read


def _payload(paths: Sequence[str], registry: Registry, common: Request) -> set[_Id]:
    """Returns the files that hold payload of an image beside them, and are no images themselves."""
    found: set[_Id] = set()
    with common.opener(registry) as opener:
        for path in paths:
            # An image that cannot be read is reported when it is converted.
            with suppress(VmconvError, OSError), plugin_faults():
                found |= _only_payload(opener.image(path, common.source_format))
    return found


def _only_payload(image: Image) -> set[_Id]:
    layers = {_id(layer.file) for layer in image.chain()}
    return {_id(file) for file in image.payload_files()} - layers


def _id(file: File) -> _Id:
    return file.stamp.device, file.stamp.inode
