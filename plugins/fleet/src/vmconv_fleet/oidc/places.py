"""The places of sign-ins that wait for the provider: when all are taken, networks get the next ones in turn."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from vmconv_fleet.errors import NotReadyError
from vmconv_fleet.limiter import network_key

AT_ONCE = 16
"""Sign-ins that may ask the provider at the same time, so that strangers do not take all threads."""
OF_ONE, OF_NETWORK = 2, 3
"""Sign-ins of one address, and of one network, that ask or wait."""
WAITING = 256
"""Sign-ins that wait for a place. They take no thread."""
PATIENCE_S = 10.0


class _Waiting(NamedTuple):
    address: bytes
    granted: asyncio.Future[None]


class Places:
    """Places by address; all methods run on one event loop."""

    def __init__(self) -> None:
        self._asking: list[bytes] = []
        self._waiting: list[_Waiting] = []

    @asynccontextmanager
    async def taken(self, address: bytes) -> AsyncIterator[None]:
        """Takes a place within PATIENCE_S. Raises NotReadyError if there is none, or the network has too many."""
        self._refuse_if_many(address)
        if len(self._asking) < AT_ONCE:
            self._asking.append(address)
        else:
            await self._wait(address)
        try:
            yield
        finally:
            self._leave(address)

    def _refuse_if_many(self, address: bytes) -> None:
        known = [*self._asking, *(one.address for one in self._waiting)]
        if known.count(address) >= OF_ONE or _networks(known)[network_key(address)] >= OF_NETWORK:
            raise _full()

    async def _wait(self, address: bytes) -> None:
        if len(self._waiting) >= WAITING:
            self._drop_one()
        one = _Waiting(address, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await one.granted
        except BaseException as exc:
            if one in self._waiting:
                self._waiting.remove(one)
            elif one.granted.done() and not one.granted.cancelled() and one.granted.exception() is None:
                # It got its place in the same moment.
                self._leave(address)
            raise _full() if isinstance(exc, TimeoutError) else exc from None

    def _drop_one(self) -> None:
        """Refuses one that waits, at random, of the networks with most sign-ins: so no flood is sure to win."""
        count = _networks([*self._asking, *(one.address for one in self._waiting)])
        most = max(count[network_key(one.address)] for one in self._waiting)
        one = random.choice([one for one in self._waiting if count[network_key(one.address)] == most])
        self._waiting.remove(one)
        if not one.granted.done():
            one.granted.set_exception(_full())

    def _leave(self, address: bytes) -> None:
        """Gives the place to the network with the fewest, the one that has waited longest among equals."""
        self._asking.remove(address)
        count = _networks(self._asking)
        waiting = [one for one in self._waiting if not one.granted.done()]
        if waiting:
            one = min(waiting, key=lambda one: count[network_key(one.address)])
            self._waiting.remove(one)
            self._asking.append(one.address)
            one.granted.set_result(None)


def _networks(addresses: list[bytes]) -> Counter[bytes]:
    return Counter(map(network_key, addresses))


def _full() -> NotReadyError:
    return NotReadyError("too many people sign in at this moment", hint="try again")
