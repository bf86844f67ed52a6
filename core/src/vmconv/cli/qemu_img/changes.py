"""`resize`, `rebase`, `commit`, `snapshot` and `bitmap` as qemu-img's: changes of images, all of one or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from vmconv.cli.qemu_img.arguments import SECTOR, Given, plain_file, plain_name, size_of
from vmconv.cli.qemu_img.handing import NotAnsweredError
from vmconv.cli.qemu_img.images import ANYWHERE, format_of, only_sharing, print_end

if TYPE_CHECKING:
    from vmconv.interface.arguments import Preallocation


def resize(asked: Given) -> int:
    """Gives a disk another size."""
    from vmconv.api import resize as resized

    if len(asked.names) != 2:
        raise NotAnsweredError(f"{len(asked.names)} names")
    preallocation = asked.last("--preallocation") or "off"
    if preallocation not in ("off", "falloc", "full"):
        raise NotAnsweredError(f"--preallocation={preallocation}")
    path, wanted = plain_file(asked.names[0]), asked.names[1]
    sign = wanted[:1] if wanted[:1] in ("+", "-") else ""
    size = size_of(wanted.removeprefix(sign))
    if size % SECTOR:
        raise NotAnsweredError(f"size {size} is not a multiple of {SECTOR}")
    resized(
        path,
        -size if sign == "-" else size,
        relative=bool(sign),
        source_format=format_of(path, asked.format("-f"), written=True),
        shrink=asked.has("--shrink"),
        preallocation=cast("Preallocation", preallocation),
        allow_external=ANYWHERE,
        announce=only_sharing,
    )
    if not asked.has("-q"):
        print("Image resized.")
    return 0


def rebase(asked: Given) -> int:
    """Gives a layer another parent."""
    from vmconv.api import rebase as rebased

    path, backing, backing_format = asked.one_file(), asked.last("-b"), asked.last("-F")
    if backing is None or (backing and backing_format is None):
        raise NotAnsweredError("-b and -F are not both given")
    if backing:
        plain_name(backing)
    for option in ("-t", "-T"):
        asked.cache(option, "writeback")
    rebased(
        path,
        backing,
        backing_format=asked.format("-F"),
        unsafe=asked.has("-u"),
        source_format=format_of(path, asked.format("-f"), written=True),
        allow_external=ANYWHERE,
        announce=only_sharing,
    )
    print_end(asked.has("-p") and not asked.has("-q"))
    return 0


def commit(asked: Given) -> int:
    """Brings a layer's content into its base."""
    from vmconv.api import commit as committed

    path = asked.one_file()
    asked.cache("-t", "writeback")
    # QEMU compares the name with those that the layers store, vmconv looks for the file.
    if asked.has("-b"):
        raise NotAnsweredError("-b")
    committed(
        path,
        keep_top=asked.has("-d"),
        source_format=format_of(path, asked.format("-f"), written=True),
        # qemu-img does not look for other layers.
        force=True,
        allow_external=ANYWHERE,
        announce=only_sharing,
    )
    if not asked.has("-q"):
        print_end(asked.has("-p"))
        print("Image committed.")
    return 0


_VERBS: dict[str, Literal["create", "delete", "apply"]] = {"-c": "create", "-d": "delete", "-a": "apply"}


def snapshot(asked: Given) -> int:
    """Lists, takes, deletes or applies snapshots."""
    path = asked.one_file()
    chosen = [(option, value) for option, value in asked.options if option in (*_VERBS, "-l")]
    if len(chosen) != 1:
        raise NotAnsweredError(f"{len(chosen)} actions")
    option, name = chosen[0]
    if option == "-l":
        return _list(path, asked)
    from vmconv.api import snapshot as changed

    format_name = format_of(path, None, written=True)
    changed(path, _VERBS[option], name, source_format=format_name, allow_external=ANYWHERE)
    return 0


def _list(path: str, asked: Given) -> int:
    from vmconv.api import info
    from vmconv.cli.qemu_img.description import snapshot_lines

    found = info(path, format_name=format_of(path, None), force_share=asked.has("-U"), allow_external=ANYWHERE)
    if found.get("snapshots"):
        print("\n".join(["Snapshot list:", *snapshot_lines(found["snapshots"])]))
    return 0


def bitmap(asked: Given) -> int:
    """Changes a persistent bitmap."""
    from vmconv.api import bitmap as changed

    if len(asked.names) != 2:
        raise NotAnsweredError(f"{len(asked.names)} names")
    path = plain_file(asked.names[0])
    changes = [
        f"merge:{value}" if option == "--merge" else option.removeprefix("--")
        for option, value in asked.options
        if option not in ("-f", "-g")
    ]
    granularity: Any = asked.last("-g")
    changed(
        path,
        asked.names[1],
        changes,
        granularity=0 if granularity is None else size_of(granularity),
        source_format=format_of(path, asked.format("-f"), written=True),
        allow_external=ANYWHERE,
    )
    return 0
