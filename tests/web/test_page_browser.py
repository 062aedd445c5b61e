"""A reader's walk in a real browser, and axe over every page in both colour schemes, wide and narrow."""

from __future__ import annotations

import re
import time

import pytest
from tests.web.filled import filled, serving
from tests.web.mailbox import link, mailbox
from tests.web.test_subscribe_browser import _wrong

from corollary.web.settings import Settings
from corollary.web.store import get_paper, vote


def test_a_walk_from_today_to_a_digest_and_out_of_it(tmp_path, browser):
    store = filled(tmp_path / "full")
    with mailbox() as box, serving(store, settings=Settings(runs=tmp_path / "runs"), mail=box.mailer) as app:
        home = app.state.settings.address
        page = browser.new_page()
        trouble = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
        page.goto(home)
        page.locator("article.card").first.wait_for()
        # Search by what one remembers of it, and open it.
        page.get_by_role("searchbox", name="Search papers").fill("low-rank optimizer that saves memory")
        page.get_by_role("button", name="Search").first.click()
        page.get_by_role("link", name=re.compile("^Fira")).click()
        assert re.search(r"\d+ of 7 claims hold here", page.inner_text("main"))
        assert "95% interval" in page.inner_text("main")
        # Vote without leaving the page.
        page.locator(".acts .vote button").click()
        page.locator(".acts .vote button[aria-pressed=true]").wait_for()
        # Run it, and see its progress come in.
        page.get_by_label("Scale").select_option("smoke")
        page.get_by_role("button", name="Run it here").click()
        page.get_by_role("heading", name=re.compile("Running")).wait_for(timeout=20_000)
        page.locator("tbody tr").first.wait_for(timeout=60_000)
        assert "smoke scale gives no verdict" in page.inner_text("tbody")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("heading", name="Cancelled").wait_for(timeout=20_000)
        # Subscribe, confirm from the mail that was sent, and end it.
        page.get_by_role("link", name="Digest by mail").click()
        page.get_by_label("Your mail address").fill("ada@example.org")
        page.get_by_role("button", name="Subscribe").click()
        page.get_by_text("a mail is on its way").wait_for()
        until = time.monotonic() + 20
        while not box.mails and time.monotonic() < until:
            time.sleep(0.05)
        address = link(box.mails[0], "/subscribe/confirm/")
        assert address.startswith(home)
        page.goto(address)
        page.get_by_role("button", name="Confirm").click()
        page.get_by_role("heading", name="Confirmed").wait_for()
        page.goto(f"{home}/subscribe")
        page.get_by_role("link", name="change it or end it").click()
        page.get_by_role("button", name="Unsubscribe").click()
        page.get_by_role("heading", name="Unsubscribed").wait_for()
        assert trouble == []
        page.close()
    store.close()


PAGES = ("/", "/day/2024-10-02", "/week/2024-W40", "/month/2024-10", "/trending", "/methods", "/search", "/search?q=low-rank+optimizer",
         "/papers/fira", "/papers/triadaptlora", "/papers/none", "/desk", "/runs", "/subscribe", "/api")  # fmt: skip


def test_axe_finds_nothing_and_nothing_sticks_out(tmp_path, browser):
    store = filled(tmp_path / "full")
    with mailbox() as box, serving(store, mail=box.mailer) as app:
        home = app.state.settings.address
        vote(store, 1, get_paper(store, "fira").id)
        page = browser.new_page()
        wrong = []
        for path in PAGES:
            page.goto(home + path)
            wrong += _wrong(page)
        assert wrong == []
        page.close()
    store.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_by_keys_alone(tmp_path, browser, scripts):
    """The first Tab leads past the navigation; a form can be filled and sent, with scripts and without."""
    store = filled(tmp_path / "full")
    with serving(store) as app:
        home = app.state.settings.address
        context = browser.new_context(java_script_enabled=scripts)
        page = context.new_page()
        page.goto(f"{home}/day/2024-10-02")
        page.keyboard.press("Tab")
        assert page.get_by_role("link", name="Skip to the content").is_visible()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.locator("main :focus").count() == 1
        if scripts:
            page.keyboard.press("j")
            assert "Fira" in page.locator(":focus").inner_text()
            page.keyboard.press("/")
        else:
            page.get_by_role("searchbox").focus()
        page.keyboard.type("fira")
        page.keyboard.press("Enter")
        page.get_by_role("link", name=re.compile("^Fira")).wait_for()
        context.close()
    store.close()
