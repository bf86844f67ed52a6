"""`vmconv publish`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vmconv.plugin import (
    Command,
    Parser,
    UsageError,
    access,
    add_access,
    add_format,
    add_making,
    add_options,
    add_output,
    add_secret,
)

if TYPE_CHECKING:
    from vmconv.plugin import ObjectTarget
    from vmconv_swift.backend import SwiftBackend


def _configure(parser: argparse.ArgumentParser) -> None:
    if isinstance(parser, Parser):
        parser.intermixed = True
    parser.add_argument("source", metavar="SOURCE", help="image or disk to publish: a file or a URL; never changed")
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="object to make, swift://CLOUD/CONTAINER/OBJECT; its suffix is its format. Several are made of one\n"
        "payload, in one container",
    )
    add_format(parser, "-f", "SOURCE")
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="format of a single TARGET (default: by its suffix)")
    add_options(parser, "the target format; for several, FMT.NAME=VALUE")
    parser.add_argument(
        "--zero-copy",
        choices=("auto", "require"),
        default="auto",
        help="require: fail before any change rather than send payload (default: auto)",
    )
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="refer to payload in other containers than vmconv's own, too; whoever deletes or replaces it\n"
        "there breaks TARGET",
    )
    parser.add_argument("--force", action="store_true", help="replace a TARGET that exists")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and change nothing")
    add_making(parser)
    add_output(parser)
    add_access(parser)
    add_secret(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.plugin import parse_url
    from vmconv_swift.remote import opened_ahead

    storage = _storage(options)
    source = options.source
    # The store answers while the modules that plan are loaded.
    with opened_ahead(parse_url(source)) if source.startswith("swift://") else nullcontext():
        return _publish(options, storage)


def _publish(options: argparse.Namespace, storage: SwiftBackend) -> int:
    from vmconv.plugin import (
        Reading,
        ZeroCopyError,
        make_objects,
        planned_objects,
        print_json,
        run_and_report,
        say,
        show_plan,
        size_text,
    )

    source = Reading(options.source, options.format_f, **access(options))
    targets = _targets(options)
    if options.dry_run:
        with planned_objects(storage, source, targets, force=options.force) as ready:
            show_plan(ready, as_json=options.output == "json", details=options.verbose)
            if options.zero_copy == "require" and ready.plan.copies:
                raise ZeroCopyError(f"{options.targets[0]}: payload would have to be sent")
        return 0

    def make(**reports: Any) -> Any:
        return make_objects(storage, source, targets, zero_copy=options.zero_copy, force=options.force, **reports)

    status = run_and_report(options, make)
    payload, metadata = storage.client.sent
    if options.output == "json":
        print_json({"event": "sent", "payload": payload, "metadata": metadata})
    elif not options.quiet:
        say(f"sent {size_text(payload)} of payload ({payload} bytes), {size_text(metadata)} of metadata")
    return status


def _storage(options: argparse.Namespace) -> SwiftBackend:
    from vmconv.plugin import parse_url
    from vmconv_swift.backend import SwiftBackend, Target
    from vmconv_swift.client import Client
    from vmconv_swift.cloud import cloud_of
    from vmconv_swift.names import object_of

    urls = [parse_url(target) for target in options.targets]
    for url in urls:
        if url.scheme != "swift":
            raise UsageError(
                f"{url.shown}: is not swift://CLOUD/CONTAINER/OBJECT",
                hint="vmconv upload (vmconv-s3) makes objects of S3, which refer to no ranges",
            )
    if len({url.host for url in urls}) > 1:
        raise UsageError("the targets are in several clouds", hint="publish into one after the other")
    wanted = [Target(object_of(url), url) for url in urls]
    return SwiftBackend(Client(cloud_of(urls[0].host)), wanted, adopt=options.adopt, force=options.force)


def _targets(options: argparse.Namespace) -> list[ObjectTarget]:
    from vmconv.plugin import ObjectTarget, installed, parse_url

    registry = installed()
    names = [parse_url(target).shown for target in options.targets]
    if len(names) == 1:
        return [ObjectTarget(names[0], options.format_O, options.options)]
    if options.format_O is not None:
        raise UsageError("-O is for one TARGET", hint="suffixes name the formats of several")
    by_format = _by_format(options.options)
    formats = [registry.format_by_suffix(name) for name in names]
    for one in by_format.keys() - set(formats):
        raise UsageError(f"options for {one}, which is not made")
    return [ObjectTarget(name, None, by_format.get(one or "", {})) for name, one in zip(names, formats, strict=True)]


def _by_format(given: Mapping[str, str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, value in given.items():
        one, dot, option = name.partition(".")
        if not dot:
            raise UsageError(f"option {name!r} names no format", hint=f"write FMT.{name}={value}")
        found.setdefault(one, {})[option] = value
    return found


COMMAND = Command(
    "publish",
    "make a disk available as objects of a store, without sending payload that is there",
    "Makes an object of OpenStack Swift that is the disk in any format: a large object whose segments are ranges of\n"
    "payload that lies beside it, in the container CONTAINER_vmconv, and new metadata. Payload is sent once, whatever\n"
    "it is published as afterwards. The object is read back and verified before it appears under its name.",
    _configure,
    _run,
    """exit status:
  0  published
  1  the image, the store or the plan does not allow it; no TARGET was made
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and payload would have to be sent; nothing was touched
  4  TARGET exists; nothing was touched

examples:
  vmconv publish disk.qcow2 swift://cloud/images/disk.qcow2
  vmconv publish swift://cloud/images/disk.qcow2 swift://cloud/images/disk.vmdk swift://cloud/images/disk.vhdx""",
)
