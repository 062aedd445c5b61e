"""New papers and changed verdicts by mail.

`subscribe` and `confirm` make a subscription, `queue_digests` writes the mails that are due into the outbox of the store, and `flush`
sends what is in it. Each step is one transaction, so that a process killed anywhere is gone on from where it was.
"""

from __future__ import annotations

from corollary.web.digest.compose import Queued, queue_digests
from corollary.web.digest.mailer import Mailer, MailSettings
from corollary.web.digest.outbox import OutboxRunner, Sent, flush
from corollary.web.digest.routes import router
from corollary.web.digest.subscriptions import confirm, subscribe, unsubscribe

__all__ = [
    "MailSettings", "Mailer", "OutboxRunner", "Queued", "Sent", "confirm", "flush", "queue_digests", "router", "subscribe", "unsubscribe",
]  # fmt: skip
