"""The pages of subscriptions in a browser: they work without scripts, and axe finds nothing wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.web.filled import filled, serving
from tests.web.mailbox import link, mailbox
from tests.web.test_digest_killed import confirmed

from corollary.web.digest import flush, queue_digests

AXE = (Path(__file__).parent / "assets" / "axe.min.js").read_text()


@pytest.fixture
def served(tmp_path):
    """A page on a port of its own, with mail."""
    store = filled(tmp_path / "full")
    with mailbox() as box, serving(store, mail=box.mailer, threads=False) as app:
        yield app, store, box
    store.close()


def _wrong(page):
    """What axe finds, in both colour schemes and on a phone."""
    found = []
    for scheme, width in (("light", 1200), ("dark", 380)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (page.url, width)
        result = page.evaluate(f"(() => {{ {AXE}; return axe.run() }})()")
        assert len(result["passes"]) > 10
        found += [(page.url, v["id"], [n["html"] for n in v["nodes"]]) for v in result["violations"]]
    return found


@pytest.mark.parametrize("scripts", [False, True])
def test_subscribe_confirm_change_end(served, browser, scripts):
    app, store, box = served
    home = app.state.settings.address
    context = browser.new_context(java_script_enabled=scripts)
    page = context.new_page()
    wrong = []

    def look():
        wrong.extend(_wrong(page) if scripts else [])

    page.goto(f"{home}/subscribe?kind=like&papers=5,6")
    look()
    page.get_by_label("Your mail address").fill("ada@example.org")
    page.get_by_label("How often").select_option("weekly")
    page.get_by_label("Everything new").check()
    page.get_by_role("button", name="Subscribe").click()
    page.get_by_text("a mail is on its way").wait_for()
    look()
    flush(store, box.mailer)
    page.goto(link(box.mails[0], "/subscribe/confirm/"))
    look()
    page.get_by_role("button", name="Confirm").click()
    page.get_by_role("heading", name="Confirmed").wait_for()
    look()
    confirmed(store, people=())
    state = app.state
    queue_digests(store, state.sessions, state.settings, box.mailer.sender, state.verdicts)
    flush(store, box.mailer)
    page.goto(link(box.mails[1], "/unsubscribe/"))
    look()
    page.get_by_label("How often").select_option("daily")
    page.get_by_role("button", name="Change").click()
    page.get_by_text("From now on it comes daily").wait_for()
    look()
    page.goto(f"{home}/subscribe")
    look()
    page.get_by_role("link", name="change it or end it").click()
    page.get_by_role("button", name="Unsubscribe").click()
    page.get_by_role("heading", name="Unsubscribed").wait_for()
    look()
    assert wrong == []
    context.close()


def test_the_mail_itself_shows_in_a_browser(served, browser):
    app, store, box = served
    confirmed(store, ("a@example.org",))
    queue_digests(store, app.state.sessions, app.state.settings, box.mailer.sender, app.state.verdicts)
    flush(store, box.mailer)
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_content(box.mails[0].get_body(("html",)).get_content())
    assert "First Light" in page.inner_text("body")
    assert asked == []  # nothing is loaded from anywhere
    assert [w for w in _wrong(page) if w[1] not in ("region", "landmark-one-main", "page-has-heading-one")] == []
    page.close()
