"""Pages kept until something changes, within a budget of memory."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace

_FRESH_BYTES = _PRESSED_BYTES = 32 * 2**20
_LARGEST = 2**20


@dataclass
class Kept:
    """A page: its status, headers and body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    again: bool = False  # whether it was asked for after it was made


class Pages:
    """The newest pages as they are, and of older ones those that were asked for again, pressed to a fifth of their size.

    Pressing a page takes a fifth of the time that making it takes, which is lost on a page that nobody asks for again.

    Args:
        fresh: bytes of pages kept as they are.
        pressed: bytes of pages kept pressed.
    """

    def __init__(self, fresh: int = _FRESH_BYTES, pressed: int = _PRESSED_BYTES) -> None:
        self._most = (fresh, pressed)
        self.clear()

    def clear(self) -> None:
        """Forget all pages."""
        self._fresh: OrderedDict[Hashable, Kept] = OrderedDict()
        self._pressed: OrderedDict[Hashable, Kept] = OrderedDict()
        self._bytes = [0, 0]

    def get(self, key: Hashable) -> Kept | None:
        """The page of a key."""
        page = self._fresh.get(key)
        if page is not None:
            page.again = True
            self._fresh.move_to_end(key)
            return page
        page = self._pressed.get(key)
        if page is None:
            return None
        self._pressed.move_to_end(key)
        return replace(page, body=zlib.decompress(page.body))

    def put(self, key: Hashable, page: Kept) -> None:
        """Keep a page that was not kept."""
        if len(page.body) > _LARGEST:
            return
        self._fresh[key] = page
        self._bytes[0] += len(page.body)
        while self._bytes[0] > self._most[0]:
            old, left = self._fresh.popitem(last=False)
            self._bytes[0] -= len(left.body)
            if left.again:
                self._pressed[old] = replace(left, body=zlib.compress(left.body, 1))
                self._bytes[1] += len(self._pressed[old].body)
        while self._bytes[1] > self._most[1]:
            _, left = self._pressed.popitem(last=False)
            self._bytes[1] -= len(left.body)
