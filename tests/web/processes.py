"""What tests of servers in processes of their own ask."""

from __future__ import annotations

import socket
import time
from pathlib import Path


def wait(ready, seconds=90):
    until = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
