"""How the page is served: by whom it may be reached, where its evidence lies, and who may do what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from corollary.claims.store import default_store, published_results

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Settings:
    """One way of serving.

    Args:
        address: as readers reach the page, without a path: ``http://127.0.0.1:8000``. Links in mails and feeds begin with it, and
            requests under another host's name are refused.
        lab: many readers with accounts. Without it there is one reader, who needs none, and nobody else may reach the page.
        open_reading: in a lab, whether papers can be read without signing in.
        results: the published evidence.
        runs: where runs started from the page keep theirs; `corollary verify` of the same folder sees them.
        jobs: whether this process works off the queue of runs.
        job_queue: how many runs may wait.
        scales: the scales that a reader may run.
        max_body: bytes of a request that are read at most.

    Raises:
        ValueError: for an address that is none, or one that others can reach without ``lab``.
    """

    address: str = "http://127.0.0.1:8000"
    lab: bool = False
    open_reading: bool = True
    results: Path = field(default_factory=published_results)
    runs: Path = field(default_factory=default_store)
    jobs: bool = True
    job_queue: int = 20
    scales: tuple[str, ...] = ("smoke", "laptop")
    max_body: int = 1_000_000

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"address must be like 'https://papers.example.org', not '{self.address}'")
        if not self.lab and parts.hostname not in LOOPBACK:
            raise ValueError(
                f"address is '{self.address}': without accounts the page is served on this machine alone (127.0.0.1); take lab mode"
            )
        object.__setattr__(self, "address", self.address.rstrip("/"))

    @property
    def https(self) -> bool:
        """Whether readers come over TLS: then cookies are ``Secure``."""
        return self.address.startswith("https:")

    @property
    def hosts(self) -> frozenset[str]:
        """The names under which the page answers. Loopback's stand for the machine itself, which a proxy may run on."""
        return LOOPBACK | {urlsplit(self.address).hostname or ""}

    @property
    def origin(self) -> str:
        """The page's own origin, as browsers spell it."""
        parts = urlsplit(self.address)
        return f"{parts.scheme}://{parts.netloc}".lower()
