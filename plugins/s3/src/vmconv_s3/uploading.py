"""`vmconv upload`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vmconv.plugin import (
    Command,
    Parser,
    UsageError,
    access,
    add_access,
    add_format,
    add_options,
    add_output,
    add_report,
    add_secret,
)

if TYPE_CHECKING:
    from vmconv_s3.backend import S3Backend


def _configure(parser: argparse.ArgumentParser) -> None:
    if isinstance(parser, Parser):
        parser.intermixed = True
    parser.add_argument("source", metavar="SOURCE", help="image or disk to upload: a file or a URL; never changed")
    parser.add_argument("target", metavar="TARGET", help="object to make, s3://BUCKET/KEY; its suffix is its format")
    add_format(parser, "-f", "SOURCE")
    parser.add_argument("-O", dest="format_O", metavar="FMT", help="format of TARGET (default: by its suffix)")
    add_options(parser, "the target format")
    parser.add_argument(
        "--zero-copy",
        choices=("auto", "require"),
        default="auto",
        help="require: fail before anything is sent if there is payload: objects of S3 share none (default: auto)",
    )
    parser.add_argument("--force", action="store_true", help="replace a TARGET that exists")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done, and change nothing")
    # The plan is verified before anything is sent, and the object after it has appeared.
    parser.set_defaults(verify="metadata")
    add_report(parser)
    add_output(parser)
    add_access(parser)
    add_secret(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.plugin import (
        ObjectTarget,
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

    storage = _storage(options)
    source = Reading(options.source, options.format_f, **access(options))
    targets = [ObjectTarget(storage.store.shown, options.format_O, options.options)]
    if options.dry_run:
        with planned_objects(storage, source, targets, force=options.force) as ready:
            show_plan(ready, as_json=options.output == "json", details=options.verbose)
            if options.zero_copy == "require" and ready.plan.copies:
                raise ZeroCopyError(f"{storage.store.shown}: payload would have to be copied")
        return 0

    def make(**reports: Any) -> Any:
        return make_objects(storage, source, targets, zero_copy=options.zero_copy, force=options.force, **reports)

    status = run_and_report(options, make)
    traffic = storage.traffic
    if options.output == "json":
        print_json({"event": "sent", "bytes": storage.store.sent, **traffic._asdict()})
    elif not options.quiet:
        say(
            f"sent {size_text(traffic.payload)} of payload ({traffic.payload} bytes), "
            f"{size_text(traffic.metadata)} of metadata, {size_text(traffic.zeros)} of zeros; "
            f"the store copied {size_text(traffic.copied_by_store)}"
        )
    return status


def _storage(options: argparse.Namespace) -> S3Backend:
    from vmconv.plugin import parse_url
    from vmconv_s3.backend import S3Backend
    from vmconv_s3.store import Store

    url = parse_url(options.target)
    if url.scheme != "s3":
        raise UsageError(f"{url.shown}: is not s3://BUCKET/KEY", hint="vmconv publish is for OpenStack Swift")
    return S3Backend(Store(url), force=options.force)


COMMAND = Command(
    "upload",
    "make a disk an object of S3, with payload of the same store copied by the store",
    "Makes an object of S3 that is the disk in any format. Payload that lies in an object of the same store is copied\n"
    "by the store, and does not pass through this machine. All else is sent, holes as zeros. The object appears\n"
    "complete or not at all, and is compared with the plan then.",
    _configure,
    _run,
    """exit status:
  0  uploaded
  1  the image, the store or the plan does not allow it; no TARGET was made
  2  the request makes no sense: an unknown format, option or combination
  3  --zero-copy=require, and there is payload; nothing was touched
  4  TARGET exists; nothing was touched

examples:
  vmconv upload disk.qcow2 s3://images/disk.qcow2
  vmconv upload s3://images/disk.raw s3://images/disk.vmdk""",
)
