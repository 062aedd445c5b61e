"""Sending by SMTP."""

from __future__ import annotations

import os
import secrets
import smtplib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate
from urllib.parse import unquote, urlsplit

from corollary.web.settings import LOOPBACK

_SECONDS = 30.0


class Refused(Exception):
    """The server will never take this mail: trying again is of no use."""


class Gone(OSError):
    """The connection broke off; another may hold."""


@dataclass(frozen=True)
class MailSettings:
    """Which server takes our mail, and whom it is from.

    Args:
        host, port: of the server.
        sender: address that the mails are from.
        name: name beside it.
        user, password: where the server wants them; they go over TLS alone, except to this machine.
        tls: ``starttls`` (taken where the server offers it, and demanded where there is a password; a server on this machine, whose
            certificate as a rule names another, is spoken to plainly), or ``tls`` from the start.

    Raises:
        ValueError: for what is no server or no address.
    """

    host: str
    port: int
    sender: str
    name: str = "Corollary"
    user: str = ""
    password: str = field(default="", repr=False)
    tls: str = "starttls"

    def __post_init__(self) -> None:
        check_address(self.sender)
        if self.tls not in ("starttls", "tls"):
            raise ValueError(f"tls must be 'starttls' or 'tls', not '{self.tls}'")
        if not self.host or not 0 < self.port < 65536:
            raise ValueError(f"no mail server is at host '{self.host}', port {self.port}")

    @classmethod
    def of(cls, url: str, sender: str) -> MailSettings:
        """From ``smtp://user:password@host:587`` or ``smtps://host`` and an address.

        Example:
            >>> MailSettings.of("smtp://mail.example.org", "page@example.org").port
            587
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError("the mail server must be given as smtp://user:password@host:587 or smtps://host") from error
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError("the mail server must be given as smtp://user:password@host:587 or smtps://host")
        tls = "tls" if parts.scheme == "smtps" else "starttls"
        return cls(
            parts.hostname, port or (465 if tls == "tls" else 587), sender, user=unquote(parts.username or ""),
            password=unquote(parts.password or ""), tls=tls,
        )  # fmt: skip

    @classmethod
    def from_environment(cls) -> MailSettings | None:
        """From ``COROLLARY_SMTP`` and ``COROLLARY_MAIL_FROM``; None where the first is not set."""
        url = os.environ.get("COROLLARY_SMTP")
        if not url:
            return None
        sender = os.environ.get("COROLLARY_MAIL_FROM", "")
        if not sender:
            raise ValueError("COROLLARY_SMTP is set, so COROLLARY_MAIL_FROM must name the address that mails are from")
        return cls.of(url, sender)


def check_address(text: str) -> str:
    """The address as it is kept: host in lower case, nothing around it.

    Raises:
        ValueError: for anything but one plain address; never for one that a mail server could take and a header could not.

    Example:
        >>> check_address(" Ada@Example.ORG ")
        'Ada@example.org'
    """
    text = text.strip()
    local, at, domain = text.rpartition("@")
    plain = text.isprintable() and not any(c in text for c in ' ",;:<>()[]\\') and text.isascii()
    labels = domain.split(".")
    fits = at and 0 < len(local) <= 64 and len(text) <= 254 and "@" not in local and not domain.startswith("-")
    if not plain or not fits or not all(0 < len(label) <= 63 and label.replace("-", "a").isalnum() for label in labels):
        raise ValueError("that is no mail address")
    address = f"{local}@{domain.lower()}"
    try:
        Address(addr_spec=address)
    except (ValueError, IndexError) as error:
        raise ValueError("that is no mail address") from error
    return address


def person(address: str) -> tuple[str, str]:
    """Whose address it is, as far as can be told: case and what stands behind a ``+`` make no other person.

    Example:
        >>> person("Ada+papers@Example.org")
        ('ada', 'example.org')
    """
    local, _, domain = address.lower().rpartition("@")
    return local.partition("+")[0], domain


def letter(sender: Address, address: str, subject: str, kind: str) -> EmailMessage:
    """A mail that a program writes, with its headers and an id of its own; the text is still to be set.

    Args:
        sender: whom it is from.
        address: one plain address, as `check_address` gives it.
        subject: one line.
        kind: what the id begins with.
    """
    message = EmailMessage()
    message["From"] = sender
    message["To"] = Address(addr_spec=address)
    message["Subject"] = subject
    message["Date"] = formatdate()
    message["Message-ID"] = f"<{kind}.{secrets.token_hex(12)}@{sender.domain}>"
    message["Auto-Submitted"] = "auto-generated"
    return message


class Mailer:
    """Sends messages; `session` keeps one connection for many."""

    def __init__(self, settings: MailSettings) -> None:
        self.settings = settings

    @property
    def sender(self) -> Address:
        """Whom mails are from."""
        return Address(self.settings.name, addr_spec=self.settings.sender)

    def __call__(self, message: EmailMessage) -> None:
        """Send one message, from our own address where it names none; raises ``OSError`` where it cannot be sent now, and `Refused`."""
        if "From" not in message:
            message["From"] = self.sender
        with self.session() as server:
            self.send(
                server,
                message.as_bytes(policy=policy.SMTP.clone(max_line_length=900)),
                str(message["To"].addresses[0].addr_spec),
            )

    @contextmanager
    def session(self) -> Iterator[smtplib.SMTP]:
        """A connection that is greeted, encrypted and signed in to; ``OSError`` where that fails."""
        own, context = self.settings, ssl.create_default_context()
        try:
            if own.tls == "tls":
                server: smtplib.SMTP = smtplib.SMTP_SSL(own.host, own.port, timeout=_SECONDS, context=context)
            else:
                server = smtplib.SMTP(own.host, own.port, timeout=_SECONDS)
        except OSError as error:
            raise OSError(f"the mail server {own.host}:{own.port} cannot be reached: {error}") from error
        try:
            server.ehlo_or_helo_if_needed()
            if own.tls == "starttls" and own.host not in LOOPBACK:
                if server.has_extn("starttls"):
                    server.starttls(context=context)
                elif own.password:
                    raise OSError(f"the mail server {own.host} offers no TLS, and the password is not sent without")
            if own.user:
                server.login(own.user, own.password)
            yield server
        except smtplib.SMTPException as error:
            # Its words may repeat what was sent to it: only the code is told.
            code = getattr(error, "smtp_code", "")
            raise OSError(f"the mail server {own.host} does not serve us ({type(error).__name__} {code})") from None
        finally:
            try:
                server.quit()
            except (OSError, smtplib.SMTPException):
                server.close()

    def send(self, server: smtplib.SMTP, message: bytes, address: str) -> None:
        """Hand over one message; when this returns, the server has taken it."""
        try:
            server.sendmail(self.settings.sender, [address], message)
        except smtplib.SMTPRecipientsRefused as error:
            code = next(iter(error.recipients.values()))[0]
            what, ours = "the address", False
        except smtplib.SMTPResponseException as error:
            code, what = error.smtp_code, "the message"
            ours = isinstance(error, smtplib.SMTPSenderRefused)
        except (smtplib.SMTPServerDisconnected, ConnectionError, TimeoutError) as error:
            raise Gone(f"the connection to the mail server broke off ({type(error).__name__})") from None
        else:
            return
        # Only the code is told: the server's own words may repeat what was sent to it.
        if code == 421:
            raise Gone("the mail server ended the connection (421)")
        if ours:  # that is about us, not about this mail
            raise OSError(f"the server takes no mail from {self.settings.sender} ({code})")
        if code >= 500:
            raise Refused(f"the server refuses {what} ({code})")
        raise OSError(f"the server does not take {what} now ({code})")
