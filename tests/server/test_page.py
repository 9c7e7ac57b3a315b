"""The page in a real browser: the path of a person, by mouse and by keyboard, from dropping a file to the download.

The browser is Debian's chromium (apt-get install chromium), driven by Playwright; STATECODEC_CHROMIUM names another.
"""

import hashlib
import os
import re
import shutil
import time

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = os.environ.get("STATECODEC_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 90_000
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium"),
    # Playwright's own pipes are closed by the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """A page that fails the test when anything is logged as an error or asked of another host."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    found = context.new_page()
    trouble = []
    found.on("pageerror", lambda error: trouble.append(str(error)))
    found.on("request", lambda request: trouble.append(request.url) if "//127.0.0.1" not in request.url[:18] else None)
    yield found
    context.close()
    assert [item for item in trouble if not item.startswith(("blob:", "data:"))] == []


def checkpoint(path):
    """A small AdamW checkpoint."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 128)).pow(2).mean().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def test_from_a_dropped_file_to_a_smaller_one_that_restores(real, page, tmp_path, artefacts):
    import torch

    import statecodec

    source = checkpoint(tmp_path / "ckpt.pt")
    page.goto(f"{real.url}/#token={real.add_token('page')}")
    expect(page.locator("#health")).to_have_class(re.compile("good"), timeout=PATIENCE)
    assert "token" not in page.url
    page.get_by_role("radio", name=re.compile("Resume")).check()
    page.locator("#file").set_input_files(source)
    expect(page.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("img", name=re.compile("Where the bytes went"))).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("update direction"))).to_be_visible()
    page.screenshot(path=artefacts / "page-light.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=artefacts / "page-dark.png", full_page=True)
    with page.expect_download(timeout=PATIENCE) as download:
        page.get_by_role("button", name=re.compile("^Download")).click()
    small = tmp_path / download.value.suggested_filename
    download.value.save_as(small)
    assert small.name == "ckpt.sc.safetensors"
    assert small.stat().st_size < source.stat().st_size / 2
    statecodec.restore(small, tmp_path / "restored.pt")
    before, after = (torch.load(path, weights_only=True) for path in (source, tmp_path / "restored.pt"))
    assert before["optimizer"]["param_groups"] == after["optimizer"]["param_groups"]
    for name, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][name], tensor, rtol=1e-4, atol=5e-5)  # 2 % of a step, in rms
    page.reload()
    expect(page.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)  # what was started survives the page


def choose_over_a_slow_line(page, source):
    session = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": 50_000_000, "uploadThroughput": 8_000_000}
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", slow)
    page.locator("#file").set_input_files(source)


def test_an_upload_pauses_resumes_and_survives_a_reload(service, page, tmp_path):
    source = tmp_path / "large.pt"
    source.write_bytes(os.urandom(1 << 20) * 60)
    page.goto(f"{service.url}/#token={service.token}")
    page.locator(".preset").first.wait_for(timeout=PATIENCE)
    choose_over_a_slow_line(page, source)
    card = page.locator(".card", has_text="large.pt").first  # not one that an earlier test left on the page
    expect(card.locator(".detail")).to_contain_text("MB of", timeout=PATIENCE)
    beyond_5_mb = re.compile(r"^(?:[5-9]|[1-6][0-9])(?:\.\d+)? MB of 62\.9 MB")
    expect(card.locator(".detail")).to_have_text(beyond_5_mb, timeout=PATIENCE)
    with service.client() as client:  # the page counts what it has sent; what is there is what the service has kept
        until = time.monotonic() + PATIENCE / 1000
        while not any(u["name"] == "large.pt" and u["offset"] > 6_000_000 for u in client.get("/v1/uploads").json()):
            assert time.monotonic() < until
            time.sleep(0.05)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".state.paused")).to_be_visible()
    page.reload()
    page.locator(".preset").first.wait_for(timeout=PATIENCE)
    page.locator("#file").set_input_files(source)
    # It goes on where it was: the first thing the page says is not zero.
    expect(card.locator(".detail")).to_have_text(beyond_5_mb, timeout=PATIENCE)
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    with service.client() as client:
        found = [item for item in client.get("/v1/uploads").json() if item["name"] == "large.pt"]
    assert [item["state"] for item in found] == ["ready"]  # one upload, not two
    assert found[0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_an_upload_that_began_before_the_list_was_there_has_one_card(service, page, tmp_path):
    source = tmp_path / "early.pt"
    source.write_bytes(os.urandom(1 << 20) * 20)
    held = []
    page.route("**/v1/jobs", lambda route: held.append(route) if route.request.method == "GET" else route.continue_())
    page.goto(f"{service.url}/#token={service.token}")
    page.locator(".preset").first.wait_for(timeout=PATIENCE)
    choose_over_a_slow_line(page, source)
    cards = page.locator(".card", has_text="early.pt")
    expect(cards.locator(".detail").first).to_contain_text("MB of", timeout=PATIENCE)
    held[0].continue_()
    expect(cards.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    expect(cards).to_have_count(1)


def test_by_keyboard_and_with_a_screen_reader_in_mind(service, page):
    page.goto(service.url)
    expect(page.locator("#token-problem")).to_have_text("This service asks for a token.", timeout=PATIENCE)
    expect(page.locator("#token")).to_be_focused()
    page.keyboard.type(service.token)
    page.keyboard.press("Enter")
    page.locator(".preset").first.wait_for(timeout=PATIENCE)
    page.get_by_role("radio", name=re.compile("Compress")).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "resume"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.querySelector('input[name=preset]:checked').value") == "small"
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a file").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "keys.pt", "mimeType": "application/octet-stream", "buffer": b"x" * 10_000})
    expect(page.locator("#announce")).to_contain_text("keys.pt: Done", timeout=PATIENCE)
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, textarea, a, summary')]
             .filter((one) => !(one.textContent.trim() || one.labels?.length || one.getAttribute('aria-label')))
             .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('h1').length") == 1


def test_a_refused_checkpoint_says_why(service, page):
    page.goto(f"{service.url}/#token={service.token}")
    page.locator(".preset").first.wait_for(timeout=PATIENCE)
    page.locator("#file").set_input_files(
        {"name": "<b>bad<b>.pt", "mimeType": "application/octet-stream", "buffer": b"BEHAVE refuse\n"}
    )
    card = page.locator(".card", has_text="<b>bad<b>.pt").first
    expect(card.locator(".state.failed")).to_be_visible(timeout=PATIENCE)
    expect(card.locator(".detail")).to_contain_text("layout.malformed")
    assert page.locator(".name b").count() == 0  # a name is text, never markup


def test_the_page_works_on_a_phone(service, browser, artefacts):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(f"{service.url}/#token={service.token}")
    page.locator(".preset").first.wait_for(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=artefacts / "page-phone.png", full_page=True)
    context.close()
