"""A mail server on this machine that keeps what it takes, and does what a test wants in between."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

from aiosmtpd.controller import Controller

from corollary.web.digest import Mailer, MailSettings

SENDER = "page@papers.example.org"


@dataclass
class Mailbox:
    """``mails`` is what the server has taken, ``raw`` the same to the letter; ``on`` is called with each event's name and may give
    an answer of its own."""

    raw: list[bytes] = field(default_factory=list)
    to: list[str] = field(default_factory=list)
    on: Callable[[str, str], str | None] = lambda event, address: None
    port: int = 0

    @property
    def mails(self) -> list[EmailMessage]:
        return [message_from_bytes(raw, policy=policy.default) for raw in self.raw]  # type: ignore[misc]

    @property
    def mailer(self) -> Mailer:
        return Mailer(MailSettings("127.0.0.1", self.port, SENDER))

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        answer = self.on("MAIL", address)
        envelope.mail_from = address
        return answer or "250 OK"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        answer = self.on("RCPT", address)
        if answer is None:
            envelope.rcpt_tos.append(address)
        return answer or "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        answer = self.on("DATA", envelope.rcpt_tos[0])
        if answer is None:
            self.raw.append(envelope.content)
            self.to.append(envelope.rcpt_tos[0])
            self.on("TAKEN", envelope.rcpt_tos[0])
        return answer or "250 taken"


@contextmanager
def mailbox() -> Iterator[Mailbox]:
    """Take mail for as long as the block lasts."""
    box = Mailbox()
    with socket.create_server(("127.0.0.1", 0)) as free:
        box.port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=box.port)
    controller.start()
    try:
        yield box
    finally:
        controller.stop()


def link(message: EmailMessage, path: str) -> str:
    """The address below ``path`` that stands in a mail."""
    found = re.search(rf"https?://[^\s/]+{path}[\w.=-]+", message.get_body(("plain",)).get_content())  # type: ignore[union-attr]
    assert found is not None, message.as_string()
    return found[0]
