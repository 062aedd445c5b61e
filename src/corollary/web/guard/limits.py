"""Limits on how often one client may do what costs something or could be guessed at."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

# How many at once, and over how many seconds that many come back.
RATES: Mapping[str, tuple[int, float]] = {
    "sign-in": (5, 900.0),  # links asked for, by client and by address
    "token": (20, 600.0),  # links that lead nowhere: guesses
    "subscribe": (5, 3600.0),
    "run": (10, 600.0),
    "write": (120, 60.0),
    "search": (120, 60.0),
    "read": (600, 60.0),
}
_KEPT = 20_000


class TooMany(Exception):
    """The client has to wait; ``seconds`` says how long."""

    def __init__(self, action: str, seconds: float) -> None:
        super().__init__(f"too many requests ({action}); try again in {max(1, round(seconds))} s")
        self.seconds = max(1, round(seconds))


def network(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 that an IPv6 host draws its addresses from."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:100]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Limits:
    """Token buckets by action and client, in memory.

    Args:
        rates: for each action how many at once, and the seconds in which as many come back.
        clock: gives seconds.
    """

    def __init__(self, rates: Mapping[str, tuple[int, float]] = RATES, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates, self._clock = rates, clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, action: str, client: str) -> None:
        """Count one; raises `TooMany` where the client has none left."""
        size, period = self._rates[action]
        key, now = (action, network(client)), self._clock()
        with self._lock:
            level, at = self._buckets.pop(key, (float(size), now))
            level = min(size, level + (now - at) * size / period)
            enough = level >= 1
            self._buckets[key] = (level - 1 if enough else level, now)
            while len(self._buckets) > _KEPT:
                self._buckets.popitem(last=False)
        if not enough:
            raise TooMany(action, (1 - level) * period / size)
