"""Windows: the times of day at which conversions may begin, such as `22:00-05:00 Europe/Berlin`.

The end does not belong to a window, which may be on the next day. Without a time zone it is in UTC. A conversion that
runs at the end of its window is finished.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta, tzinfo
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from vmconv_fleet.errors import FleetError

_DAYS = 8
_HOUR = timedelta(hours=1)
_MINUTE_MS = 60_000
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
PATTERN = f"^{_TIME}-{_TIME}(?: [A-Za-z0-9_+/-]{{1,64}})?$"


class WindowError(FleetError):
    """A window has no length, or its time zone is unknown."""


class Window(NamedTuple):
    """The times of day from `start` to before `end`."""

    start: time
    end: time
    zone: tzinfo

    def is_open(self, moment: datetime) -> bool:
        at = moment.astimezone(self.zone).time()
        if self.start < self.end:
            return self.start <= at < self.end
        return at >= self.start or at < self.end

    def openings(self, moment: datetime) -> Iterator[datetime]:
        """Yields moments of the next days at which the window may open: each at which it does is one of them."""
        day = moment.astimezone(self.zone).date()
        for number, fold in product(range(-1, _DAYS), (0, 1)):
            # A time that comes twice, because clocks are put back, has two moments.
            local = datetime.combine(day + timedelta(days=number), self.start, self.zone)
            yield local.replace(fold=fold).astimezone(UTC)
        for number in range(24 * _DAYS):
            hour = moment + timedelta(hours=number)
            if hour.astimezone(self.zone).utcoffset() != (hour + _HOUR).astimezone(self.zone).utcoffset():
                yield from (hour + timedelta(minutes=minute) for minute in range(61))


def parsed(text: str) -> Window:
    """Returns a window that fits PATTERN. Raises WindowError."""
    if not re.fullmatch(PATTERN, text):
        raise WindowError(f"{text[:80]!r} is not a window", hint="HH:MM-HH:MM, and a time zone such as Europe/Berlin")
    hours, _, zone = text.partition(" ")
    start, end = (time.fromisoformat(one) for one in hours.split("-"))
    if start == end:
        raise WindowError(f"{text}: begins when it ends", hint="leave it out for the whole day")
    return Window(start, end, _zone(zone) if zone else UTC)


def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as exc:
        raise WindowError(f"{name}: is not a time zone of this machine") from exc


def next_open_ms(windows: Iterable[str], now_ms: int) -> int | None:
    """Returns the first moment from now on at which all windows are open; None if there is none in a week.

    Raises WindowError.
    """
    minute = now_ms // _MINUTE_MS
    found = _next_minute(tuple(windows), minute)
    return now_ms if found == minute else None if found is None else found * _MINUTE_MS


@lru_cache(256)
def _next_minute(windows: Sequence[str], minute: int) -> int | None:
    found = [parsed(text) for text in windows]
    now = datetime.fromtimestamp(minute * 60, UTC)
    if all(one.is_open(now) for one in found):
        return minute
    for opening in sorted(opening for one in found for opening in one.openings(now)):
        if opening > now and all(one.is_open(opening) for one in found):
            return int(opening.timestamp()) // 60
    return None


def windows_of(job: Mapping[str, Any], policy: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the windows of a job: its own and that of its node. A dry run makes nothing, and waits for none."""
    return () if job.get("dry_run") else tuple(filter(None, (job.get("between"), policy.get("between"))))


class Waiting(NamedTuple):
    """For what a queued job waits: a moment, or None for none; `is_forever`: its windows never overlap."""

    until_ms: int | None = None
    is_forever: bool = False


def waiting_of(job: Mapping[str, Any], policy: Mapping[str, Any], now_ms: int) -> Waiting:
    if job.get("state") != "queued":
        return Waiting()
    try:
        earliest = max(now_ms, int(job.get("at_ms") or 0))
        then = next_open_ms(windows_of(job, policy), earliest)
    except (WindowError, TypeError, ValueError, OverflowError, OSError):
        # The records of another node may have any form.
        return Waiting()
    return Waiting(then if then is not None and then > now_ms else None, then is None)
