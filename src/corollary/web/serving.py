"""Serving the page: from this process, or from several that are dealt its connections in turn.

One interpreter keeps one core busy. With more workers, this process does nothing but accept connections and hand each to the next
worker: left to the kernel, whichever process wakes first would take all of a burst. A worker that ends is started again; workers
whose parent ends do so too.

Usage of a worker, which finds what it serves on standard input: ``python -m corollary.web.serving FD``.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from corollary.web.settings import Settings

_LOG = logging.getLogger("corollary.web")
_PATIENCE = 20.0  # seconds that workers have to end by themselves
_FAILS_WITHIN = 10.0  # seconds: a worker that ends before has not come up


class WorkersFailed(OSError):
    """A worker ends again and again before it serves."""


def _config(app: Any, settings: Settings) -> uvicorn.Config:
    # No access log: addresses hold the tokens of those who confirm and leave.
    return uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, proxy_headers=settings.lab)


def _settle(ready: threading.Event) -> None:
    """Take what stays for good (libraries, records, words) out of the collector's sight, once it is there. It looks through
    a million objects else, for a third of a second every few thousand requests, and everyone waits."""

    def settle() -> None:
        ready.wait()
        gc.collect()
        gc.freeze()
        # An answer makes thousands of objects, nearly all of which go with it.
        gc.set_threshold(20_000, 20, 20)

    threading.Thread(target=settle, name="corollary-settle", daemon=True).start()


def serve(app: Any, settings: Settings, listener: socket.socket) -> None:
    """Serve an app of `corollary.web.app.create_app` from this process until it is interrupted."""
    _settle(app.state.ready)
    uvicorn.Server(_config(app, settings)).run(sockets=[listener])


class _Dealt(uvicorn.Server):
    """A server that gets its connections, already accepted, through a channel."""

    def __init__(self, config: uvicorn.Config, channel: socket.socket) -> None:
        super().__init__(config)
        self._channel = channel
        self._taking: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Get ready, say so, and listen to the channel."""
        await super().startup(sockets=[])
        self._channel.setblocking(False)
        asyncio.get_running_loop().add_reader(self._channel, self._take)
        self._channel.send(b"r")

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    def _take(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            said, handles, _, _ = socket.recv_fds(self._channel, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            said, handles = b"", []
        if not said:  # whoever deals has ended
            loop.remove_reader(self._channel)
            self.should_exit = True
        for handle in handles:
            connection = socket.socket(fileno=handle)
            connection.setblocking(False)
            task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
            self._taking.add(task)
            task.add_done_callback(self._taken)

    def _taken(self, task: asyncio.Task[Any]) -> None:
        self._taking.discard(task)
        if not task.cancelled():
            task.exception()  # the reader has hung up: nothing to say


class _Worker:
    """A worker process, and the channel to it."""

    def __init__(self, asked: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "corollary.web.serving", str(theirs.fileno())]
            # Of a session of its own: Ctrl-C is for the parent, which ends its workers.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], start_new_session=True, text=True
            )
        ours.setblocking(False)
        self.channel, self.started, self.ready = ours, time.monotonic(), False
        with suppress(BrokenPipeError):  # it has ended, which its channel tells
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asked))
            self.process.stdin.close()

    def end(self) -> None:
        """Ask it to end."""
        self.channel.close()
        self.process.terminate()


class Workers:
    """Processes that serve one listening socket.

    Args:
        listener: the socket; stays the caller's.
        count: how many.
        database: URL of the store; each worker opens it.
        settings: how the page is served.
    """

    def __init__(self, listener: socket.socket, count: int, database: str | None, settings: Settings) -> None:
        self._listener, self._asked = listener, {"database": database, "settings": _packed(settings)}
        self._selector = selectors.DefaultSelector()
        self._workers = [self._start(place) for place in range(count)]
        self._turn: deque[_Worker] = deque()
        self._stop, self._fails, self._listening = False, 0, False

    def _start(self, place: int) -> _Worker:
        worker = _Worker({**self._asked, "runner": place == 0})  # one of them works off the queue of runs
        self._selector.register(worker.channel, selectors.EVENT_READ, place)
        return worker

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM.

        Raises:
            WorkersFailed: when workers end before they serve, three times in a row.
        """

        def stop(*_: Any) -> None:
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self._listener.setblocking(False)
        try:
            while not self._stop:
                for key, _ in self._selector.select(timeout=0.5):
                    if key.data is None:
                        self._deal()
                    else:
                        self._hear(key.data)
        finally:
            for worker in self._workers:
                worker.end()
            until = time.monotonic() + _PATIENCE
            for worker in self._workers:
                try:
                    worker.process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    worker.process.kill()
                    worker.process.wait()
            self._selector.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _deal(self) -> None:
        """Hand each connection that waits to the next worker."""
        while self._turn:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                time.sleep(0.1)  # the system is short of something; connections wait with it
                return
            with connection:  # where nobody takes it, it ends
                for _ in range(len(self._turn)):
                    self._turn.rotate(-1)
                    try:
                        socket.send_fds(self._turn[-1].channel, [b"c"], [connection.fileno()])
                        break
                    except BlockingIOError:  # hundreds wait for it already
                        continue
                    except OSError:  # it is ending; its channel will tell
                        self._turn.pop()
                        if not self._turn:
                            break

    def _hear(self, place: int) -> None:
        """A worker is ready, or has ended."""
        worker = self._workers[place]
        try:
            said = worker.channel.recv(1)
        except OSError:
            said = b""
        if said:
            worker.ready, self._fails = True, 0
            self._turn.append(worker)
        else:
            self._selector.unregister(worker.channel)
            worker.end()
            worker.process.wait()
            with suppress(ValueError):
                self._turn.remove(worker)
            if not worker.ready and time.monotonic() - worker.started < _FAILS_WITHIN:
                self._fails += 1
            if self._fails >= 3:
                raise WorkersFailed("the workers end before they serve; one alone, without --workers, says why")
            _LOG.warning("a worker has ended (%s); another takes its place", worker.process.returncode)
            self._workers[place] = self._start(place)
        # While nobody can take them, connections wait with the kernel.
        if bool(self._turn) != self._listening:
            self._listening = not self._listening
            if self._listening:
                self._selector.register(self._listener, selectors.EVENT_READ, None)
            else:
                self._selector.unregister(self._listener)


def _packed(settings: Settings) -> dict[str, Any]:
    fields = ("address", "lab", "open_reading", "jobs", "job_queue", "max_body")
    return {name: getattr(settings, name) for name in fields} | {
        "results": str(settings.results), "runs": str(settings.runs), "scales": list(settings.scales),
    }  # fmt: skip


def _unpacked(told: dict[str, Any]) -> Settings:
    return Settings(**{**told, "results": Path(told["results"]), "runs": Path(told["runs"]), "scales": tuple(told["scales"])})


def main() -> None:
    """Be a worker."""
    from corollary.web.app import create_app
    from corollary.web.digest import Mailer, MailSettings
    from corollary.web.store import open_store

    asked, channel = json.load(sys.stdin), socket.socket(fileno=int(sys.argv[1]))
    _LOG.addHandler(logging.StreamHandler())
    settings, mail = _unpacked(asked["settings"]), MailSettings.from_environment()
    store = open_store(asked["database"])
    try:
        app = create_app(store, settings, mail=Mailer(mail) if mail is not None else None, runner=asked["runner"])
        _settle(app.state.ready)
        _Dealt(_config(app, settings), channel).run()
    finally:
        store.close()


if __name__ == "__main__":
    main()
