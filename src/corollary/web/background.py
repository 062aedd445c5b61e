"""A thread of the server that works beside it."""

from __future__ import annotations

import threading


class Background:
    """Works again and again until it is stopped; `work` is what a subclass does once.

    Args:
        name: of the thread.
        every: seconds between two looks where there is nothing to do; `wake` cuts them short.
        patience: seconds that `stop` waits for what is at hand.
    """

    def __init__(self, name: str, every: float, patience: float) -> None:
        self._every, self._patience = every, patience
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def work(self) -> bool:
        """Do what there is; whether to look again at once."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def stopping(self) -> bool:
        """Whether the server is about to end."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End when what is at hand is done, or after some patience."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._patience)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            if not self.work():
                self._wake.wait(self._every)
