"""Runs one command of `vmconv-qemu-img`: answers it, or hands it over."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from vmconv.cli.qemu_img.arguments import Given
from vmconv.cli.qemu_img.handing import NAME, VERBS, NotAnsweredError, find, hand_over, note

_HOMES = {
    "bitmap": "changes",
    "check": "answers",
    "commit": "changes",
    "compare": "answers",
    "convert": "making",
    "create": "making",
    "info": "description",
    "map": "answers",
    "measure": "answers",
    "rebase": "changes",
    "resize": "changes",
    "snapshot": "changes",
}
"""The module of each verb's function."""

_REAL_FIRST = {
    "check": "qemu-img counts fragments, too",
    "measure": "the space must be enough for an image that qemu-img writes",
}
"""Verbs that the front end answers only if there is no other qemu-img."""

_ERROR_CODES = {"check": 1, "compare": 2}
"""Exit codes of commands that failed, where 1 is an answer or not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; does not return if the command is handed over."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    verb = given[0] if given else ""
    code = _ERROR_CODES.get(verb, 1)
    if verb not in _HOMES:
        return hand_over(given, f"{verb or 'no command'}: not a command of vmconv's front end")
    if verb in os.environ.get(VERBS, "").split(","):
        return hand_over(given, f"{VERBS} says so", code)
    if verb in _REAL_FIRST and find() is not None:
        return hand_over(given, _REAL_FIRST[verb], code)
    try:
        asked = Given(verb, given[1:])
        answer = _answer(verb, asked)
    except NotAnsweredError as exc:
        return hand_over(given, str(exc), code)
    note("vmconv", given)
    return answer


def _answer(verb: str, asked: Given) -> int:
    """Returns the exit code of a command that vmconv answers. Raises `NotAnsweredError` if it does not."""
    import gc

    from vmconv.cli.starting import prepare

    prepare()
    from vmconv.cli.stops import code_for
    from vmconv.errors import BackendError, ReadError, VmconvError
    from vmconv.io.faults import plugin_faults

    run: Callable[[Given], int] = getattr(
        import_module(f"vmconv.cli.qemu_img.{_HOMES[verb]}"), "map_disk" if verb == "map" else verb
    )
    gc.enable()
    try:
        with plugin_faults():
            code = run(asked)
        sys.stdout.flush()
        return code
    # Storage that failed once would fail the other program, too.
    except (BackendError, ReadError) as exc:
        print(f"{NAME}: {exc}", file=sys.stderr)
    except VmconvError as exc:
        raise NotAnsweredError(str(exc)) from exc
    except KeyboardInterrupt as exc:
        return code_for(exc)
    except BrokenPipeError:
        from vmconv.cli.streams import drop_output

        drop_output()
    except OSError as exc:
        print(f"{NAME}: {exc.filename or asked.names}: {exc.strerror or exc}", file=sys.stderr)
    note("vmconv", [verb, *asked.arguments], "failed")
    return _ERROR_CODES.get(verb, 1)
