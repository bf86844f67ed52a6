"""What a program prepares before it runs a command: streams, signals, and libraries' environment."""

from __future__ import annotations

import os
import signal

from vmconv.cli import streams
from vmconv.system.signals import Stopped


def prepare() -> None:
    """Prepares the process; `gc.enable` afterwards ends what is only for the start."""
    import gc

    # A run is short: garbage collection during imports costs more than it frees.
    gc.disable()
    # Otherwise OpenBLAS starts a thread per processor when numpy is imported. vmconv uses no linear algebra.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Otherwise pydantic imports importlib.metadata to look for plugins, which takes a quarter of its own import.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    streams.prepare()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup, and shells for background jobs, start programs with ignored signals.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _frame: object) -> None:
    raise Stopped(number)
