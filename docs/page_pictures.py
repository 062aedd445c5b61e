"""Makes the picture of the daily page in ``docs/assets``, by a real browser, from a store with nothing but the first issue.

Usage: python docs/page_pictures.py
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright

from corollary.web.app import create_app
from corollary.web.importers import first_issue
from corollary.web.search import catch_up
from corollary.web.settings import Settings
from corollary.web.store import open_store

ASSETS = Path(__file__).parent / "assets"
QUERY = "low-rank optimizer that saves memory"


def main() -> None:
    browser_path = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"sqlite:///{folder}/daily.sqlite")
        first_issue(store)
        catch_up(store)
        server = uvicorn.Server(uvicorn.Config(create_app(store, Settings(jobs=False)), port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1040, "height": 820})
            page.goto(f"http://127.0.0.1:{port}/search?q={QUERY.replace(' ', '+')}")
            page.screenshot(path=ASSETS / "daily.png")
            browser.close()
        server.should_exit = True
        thread.join()
        store.close()


if __name__ == "__main__":
    main()
