"""`vmconv unpublish`."""

from __future__ import annotations

import argparse

from vmconv.plugin import Command, UsageError, add_output

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="+",
        metavar="OBJECT",
        help="object to remove, swift://CLOUD/CONTAINER/OBJECT; with --unused a container, swift://CLOUD/CONTAINER",
    )
    parser.add_argument(
        "--unused",
        action="store_true",
        help="remove what no publication of the container uses any more: payload, metadata, and what interrupted\n"
        "publications have left",
    )
    parser.add_argument(
        "--older-than",
        type=_seconds,
        metavar="TIME",
        help="with --unused: leave what is younger, such as 12h (default: 1d). Less than the longest\n"
        "publication takes breaks one that is under way",
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    add_output(parser)


def _seconds(text: str) -> int:
    if not text[:-1].isascii() or not text[:-1].isdigit() or text[-1:] not in _UNITS or len(text) > 9:
        raise ValueError
    return int(text[:-1]) * _UNITS[text[-1]]


def _run(options: argparse.Namespace) -> int:
    if options.older_than is not None and not options.unused:
        raise UsageError("--older-than is for --unused")
    for name in options.names:
        (_collect if options.unused else _unpublish)(options, name)
    return 0


def _unpublish(options: argparse.Namespace, text: str) -> None:
    from vmconv.plugin import AccessError, parse_url
    from vmconv_swift.client import client_for
    from vmconv_swift.names import object_of, own_container
    from vmconv_swift.records import records_of, refuse_stranger

    url = parse_url(text)
    _refuse_other_scheme(url.scheme, url.shown)
    where = object_of(url)
    client = client_for(url)
    there = client.head(where)
    if there is None:
        raise AccessError(f"{url.shown}: there is no such object")
    records = records_of(client, where) if refuse_stranger(client, own_container(where.container)) else []
    if all(record.etag != there.etag for _, record in records):
        raise AccessError(
            f"{url.shown}: vmconv publish has not made it, or something else has replaced it",
            hint="the store's own client deletes it",
        )
    if not options.dry_run:
        client.delete(where)
        # Others are of publications under way.
        mine = [(name, record) for name, record in records if record.etag == there.etag]
        for name, _ in mine:
            client.delete(name)
        # Of the same content, one that was under way may have appeared since: it needs its record.
        again = client.head(where)
        if again and again.etag == there.etag:
            for name, record in mine:
                client.put(name, record.body())
    _say(options, url.shown, there.size, done=not options.dry_run)


def _collect(options: argparse.Namespace, text: str) -> None:
    from vmconv.plugin import AccessError, parse_url
    from vmconv_swift.client import client_for
    from vmconv_swift.names import container_of, own_container
    from vmconv_swift.records import GRACE, refuse_stranger, remove, unused

    url = parse_url(text)
    _refuse_other_scheme(url.scheme, url.shown)
    container = container_of(url)
    client = client_for(url)
    if not refuse_stranger(client, own_container(container)):
        raise AccessError(f"{url.shown}: vmconv has published nothing in it")
    grace = GRACE if options.older_than is None else options.older_than
    for one in unused(client, container, grace):
        if options.dry_run or remove(client, one, grace):
            _say(options, client.shown(one.where), one.size, done=not options.dry_run)


def _refuse_other_scheme(scheme: str, shown: str) -> None:
    if scheme != "swift":
        raise UsageError(f"{shown}: is not swift://CLOUD/CONTAINER/OBJECT")


def _say(options: argparse.Namespace, name: str, size: int, *, done: bool) -> None:
    from vmconv.plugin import print_json, say, size_text

    if options.output == "json":
        print_json({"name": name, "bytes": size, "removed": done})
    else:
        say(f"{name}: {'removed' if done else 'would be removed'}, {size_text(size)}")


COMMAND = Command(
    "unpublish",
    "remove what vmconv publish has made, and payload that nothing uses",
    "Removes objects that vmconv publish has made. Payload stays, because other objects may refer to it: --unused\n"
    "removes what no publication uses. Nothing is removed that vmconv has not made.",
    _configure,
    _run,
    """exit status:
  0  removed, or with --dry-run shown
  1  the store does not allow it, or the object is not vmconv's
  2  the request makes no sense

examples:
  vmconv unpublish swift://cloud/images/disk.vmdk
  vmconv unpublish --unused --dry-run swift://cloud/images""",
)
