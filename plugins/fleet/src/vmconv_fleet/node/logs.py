"""Structured logs: one JSON document per line, for log collectors.

    {"at": "2026-11-24T18:03:11.042Z", "level": "info", "logger": "vmconv_fleet.jobs", "message": "...", ...fields}

Fields of a message are given as `extra={"fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TextIO


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "at": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= {key: value for key, value in fields.items() if key not in line}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(stream: TextIO, *, level: int = logging.INFO) -> None:
    """Sends log messages from `level` on to `stream`; replaces earlier handlers."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
