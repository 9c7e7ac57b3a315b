"""The page in every state, at the width of a phone and of a desk, light and dark; each is kept as a picture.

`make page` writes them to build/artefacts/page. What can be measured is asserted: nothing is wider than the window, no
button wraps, and each state says what it should.
"""

import base64
import os
import re

import pytest
from playwright.sync_api import expect
from test_page import PATIENCE, browser, checkpoint, pytestmark  # noqa: F401

TUS = {"Tus-Resumable": "1.0.0"}
LONG = "transformer.encoder.block_17.self_attention.query_key_value_projection"
FITS = "document.documentElement.scrollWidth <= innerWidth"
ONE_LINE = """[...document.querySelectorAll('button')].filter((one) => one.offsetParent)
    .filter((one) => one.getClientRects()[0].height > 52).map((one) => one.textContent)"""


@pytest.fixture(params=[375, 1280])
def page(request, browser):  # noqa: F811
    context = browser.new_context(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    found = context.new_page()
    found.width = request.param
    yield found
    context.close()


@pytest.fixture
def keep(page, artefacts):
    folder = artefacts / "page"
    folder.mkdir(exist_ok=True)

    def shoot(state):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            page.screenshot(path=folder / f"{state}-{page.width}-{scheme}.png", full_page=True)
        assert page.evaluate(FITS), state
        assert page.evaluate(ONE_LINE) == [], state

    return shoot


def named(path):
    """A checkpoint with long names."""
    import torch

    torch.manual_seed(0)
    layers = {f"{LONG}_{index}.weight": torch.randn(96, 96) for index in range(6)}
    state = {
        index: {
            "step": torch.tensor(5.0),
            "exp_avg": torch.randn(96, 96) * 1e-3,
            "exp_avg_sq": torch.rand(96, 96) * 1e-6,
        }
        for index in range(6)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": list(range(6))}
    torch.save({"model": layers, "optimizer": {"state": state, "param_groups": [group]}}, path)
    return path


def enter(page, service, token=None):
    page.goto(f"{service.url}/#token={token or service.token}")
    page.locator(".preset").first.wait_for(state="attached", timeout=PATIENCE)


def test_before_anything(service, page, keep):
    page.goto(service.url)
    expect(page.locator("#token-problem")).to_have_text("This service asks for a token.", timeout=PATIENCE)
    keep("no-token")
    enter(page, service, service.add_token(f"anna-{page.width}"))
    page.reload()
    expect(page.locator("#who")).to_contain_text(f"anna-{page.width}", timeout=PATIENCE)
    expect(page.locator("#health-text")).to_have_text("ready", timeout=PATIENCE)
    expect(page.locator("#plan")).to_contain_text("Next: Compress, preset resume")
    keep("empty")


def test_each_operation_has_its_own_words(real, page, keep):
    enter(page, real)
    for label, words in [
        ("Restore", "Drop a compressed checkpoint here"), ("Inspect", "look into"), ("Verify", "to check"),
        ("Compare", "first of two"), ("Analyze", "to measure"), ("Convert", "to convert"),
        ("Compress", "Drop a checkpoint here"),
    ]:  # fmt: skip
        page.get_by_role("radio", name=label, exact=True).check()
        expect(page.locator("#drop-title")).to_contain_text(words)
        if page.locator("#more").is_visible():
            page.locator("#more").evaluate("one => one.open = true")
        keep(f"form-{label.lower()}")


def test_settings_are_understood_or_refused_and_shown(real, page, keep, tmp_path):
    token = real.add_token(f"settings-{page.width}")
    enter(page, real, token)
    page.locator("#more").evaluate("one => one.open = true")
    budget = page.get_by_label("Largest error of the update")
    for text in ("much", "7", "-1", "1 %%", "1.000,5"):
        budget.fill(text)
        expect(page.locator("#plan")).to_contain_text("is no number above 0 and at most 1")
        page.locator("#file").set_input_files({"name": "x.pt", "mimeType": "a/b", "buffer": b"x"})
        assert page.locator(".card").count() == 0  # nothing is started that is not understood
    keep("not-understood")
    for text, meaning in (("0,02", "0.02"), ("2 %", "0.02"), ("2e-2", "0.02"), (".02", "0.02")):
        budget.fill(text)
        expect(page.locator("#plan")).to_contain_text(f"largest error of the update {meaning}")
    page.locator("#file").set_input_files(named(tmp_path / "ckpt.pt"))
    card = page.locator(".card").first
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    expect(card.locator(".meta")).to_contain_text("preset resume, largest error of the update 0.02, checked afterwards")
    with real.client(token) as client:
        assert client.get("/v1/jobs").json()[0]["options"] == {
            "preset": "resume", "max_update_error": 0.02, "verify": True,
        }  # fmt: skip


def drawn_width(card) -> float:
    """The width that the card's first plot was drawn for, in units of the width that it has."""
    ratio = "one => one.viewBox.baseVal.width / one.getBoundingClientRect().width"
    return card.locator(".plot svg").first.evaluate(ratio)


def test_a_finished_job(real, page, keep, tmp_path):
    enter(page, real)
    page.locator("#file").set_input_files(named(tmp_path / "named.pt"))
    card = page.locator(".card", has_text="named.pt").first
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    while not card.locator("details.table[open]").count():  # what is drawn anew just then takes no click
        card.locator("details.table summary").click()
        page.wait_for_timeout(50)
    keep("done")
    svg = card.locator(".plot svg").first
    assert 0.97 < drawn_width(card) < 1.03, "a letter of the plot is as large as it says"
    error = card.locator("th", has_text="step error").bounding_box()
    assert error["x"] + error["width"] <= page.width
    cell = card.locator("td", has_text="weight").first
    expect(cell).to_contain_text("\u2026")
    assert LONG in cell.get_attribute("title")
    shown = [card.locator(".figure", has_text="size now").inner_text(), svg.text_content()]
    sizes = [re.findall(r"[\d.]+ [kMG]?B", text) for text in shown]
    assert set(sizes[0]) <= set(sizes[1]), "the same file has one size"
    page.set_viewport_size({"width": 700, "height": 900})
    expect(card.locator(".plot svg").first).to_be_visible()
    while not 0.97 < drawn_width(card) < 1.03:  # no wait_for_function: the page's policy forbids it to look twice
        page.wait_for_timeout(50)


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_what_unpickling_would_run_is_said(real, page, keep, tmp_path):
    import torch

    saved = {"state_dict": {"weight": torch.zeros(80, 80)}, "pytorch-lightning_version": "2.6.6", "extra": Attack()}
    torch.save(saved, tmp_path / "risky.pt")
    enter(page, real, real.add_token(f"pickles-{page.width}"))
    page.locator("#file").set_input_files(named(tmp_path / "plain.pt"))
    card = page.locator(".card", has_text="plain.pt").first
    expect(card.locator(".imports")).to_contain_text("import nothing that can run code", timeout=PATIENCE)
    page.locator("#file").set_input_files(tmp_path / "risky.pt")
    card = page.locator(".card", has_text="risky.pt").first
    expect(card.locator(".imports")).to_contain_text("what can run code: posix.system", timeout=PATIENCE)
    expect(card.locator(".figure", has_text="written by")).to_contain_text("Lightning 2.6.6")
    keep("risky")
    page.get_by_role("radio", name="Inspect", exact=True).check()
    page.locator("#more").evaluate("one => one.open = true")
    page.get_by_label("Refuse files whose unpickling could run code").check()
    expect(page.locator("#plan")).to_contain_text("Inspect, safe files only")
    page.locator("#file").set_input_files(tmp_path / "risky.pt")
    card = page.locator(".card", has_text="Inspect").first
    expect(card.locator(".detail")).to_contain_text("(layout.unsafe)", timeout=PATIENCE)


def test_cards_fold_and_deleting_can_be_undone(real, page, keep, tmp_path):
    token = real.add_token(f"folder-{page.width}")
    enter(page, real, token)
    for name in ("first.pt", "second.pt"):
        page.locator("#file").set_input_files(named(tmp_path / name))
        expect(page.locator(".card", has_text=name).locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    page.reload()
    expect(page.locator(".card")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator(".card.folded")).to_have_count(1, timeout=PATIENCE)
    keep("folded")
    newest = page.locator(".card", has_text="second.pt")
    newest.get_by_role("button", name="Delete").click()
    expect(page.locator(".undo")).to_contain_text("second.pt is being deleted")
    keep("undo")
    page.get_by_role("button", name="Undo").click()
    expect(newest).to_be_visible()
    newest.get_by_role("button", name="Delete").click()
    page.goto("about:blank")  # leaving the page is not a change of mind
    enter(page, real, token)
    expect(page.locator(".card", has_text="first.pt")).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".card", has_text="second.pt")).to_have_count(0)


def test_restore_compare_and_convert(real, page, keep, tmp_path):
    import statecodec

    source = named(tmp_path / "source.pt")
    small = tmp_path / "source.sc.safetensors"
    statecodec.compress(source, small)
    enter(page, real, real.add_token(f"three-{page.width}"))
    page.get_by_role("radio", name="Compare", exact=True).check()
    page.locator("#file").set_input_files(source)
    expect(page.locator("#plan")).to_contain_text("Choose the second checkpoint first")
    page.locator("#second-file").set_input_files(small)
    expect(page.locator("#plan")).to_contain_text("with source.sc.safetensors")
    page.locator("#file").set_input_files(source)
    card = page.locator(".card", has_text="source.pt").first
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    expect(card.locator(".figure").first).to_contain_text("different")
    page.get_by_role("radio", name="Restore", exact=True).check()
    page.locator("#file").set_input_files(small)
    card = page.locator(".card", has_text="source.sc.safetensors").first
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("radio", name="Convert", exact=True).check()
    page.locator("#file").set_input_files(source)
    expect(page.locator("#plan")).to_contain_text("fill in")
    page.get_by_label("Another framework's files").select_option("dcp")
    expect(page.locator("#plan")).to_contain_text("another framework's files dcp")
    page.get_by_label("Convert to").fill("foam(level=1)")
    expect(page.locator("#plan")).to_contain_text("not both")
    page.get_by_label("Another framework's files").select_option("")
    page.locator("#file").set_input_files(source)
    card = page.locator(".card", has_text="Convert").first
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    keep("restore-compare-convert")


def test_under_way_and_failed(service, page, keep):
    enter(page, service)
    page.locator("#file").set_input_files(
        {"name": "slow.pt", "mimeType": "a/b", "buffer": b"BEHAVE slow 2000\n" + b"x" * 9000}
    )
    card = page.locator(".card", has_text="slow.pt").first
    expect(card.locator(".state.running")).to_be_visible(timeout=PATIENCE)
    expect(card.locator(".detail")).to_contain_text("encoding", timeout=PATIENCE)
    keep("running")
    card.get_by_role("button", name="Cancel").click()
    expect(card.locator(".state.cancelled")).to_be_visible(timeout=PATIENCE)
    page.locator("#file").set_input_files({"name": "bad.pt", "mimeType": "a/b", "buffer": b"BEHAVE refuse\n"})
    bad = page.locator(".card", has_text="bad.pt").first
    expect(bad.locator(".state.failed")).to_be_visible(timeout=PATIENCE)
    expect(bad.locator(".detail")).to_have_text("bad.pt is truncated (layout.malformed)")
    keep("failed")


def test_an_interrupted_upload_is_listed_goes_on_or_is_discarded(service, page, keep, tmp_path):
    source = tmp_path / "half.pt"
    source.write_bytes(b"x" * 5_000_000)
    token = service.add_token(f"half-{page.width}")
    enter(page, service, token)
    with service.client(token) as client:
        for name, key in (("half.pt", source.stat().st_mtime), ("gone.pt", 0)):
            called = {"Upload-Metadata": f"filename {base64.b64encode(name.encode()).decode()}"}
            made = client.post("/v1/uploads", headers=TUS | called | {"Upload-Length": "5000000"}).headers["Location"]
            path = "/" + made.split("/", 3)[3]
            body = TUS | {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
            client.patch(path, content=b"x" * 2_000_000, headers=body)
            about = {"title": name, "operation": "compress", "options": {"preset": "tiny"}}
            page.evaluate(
                """([name, key, url, about]) => localStorage.setItem("statecodec.uploads", JSON.stringify({
                     ...JSON.parse(localStorage.getItem("statecodec.uploads") || "{}"),
                     [`${location.origin}|${name}|5000000|${key}`]: {url, name, size: 5000000, about}}))""",
                [name, int(key * 1000), path, about],
            )
    page.reload()
    half, gone = (page.locator(".card", has_text=name) for name in ("half.pt", "gone.pt"))
    expect(half.locator(".state.paused")).to_have_text("Interrupted", timeout=PATIENCE)
    expect(half.locator(".detail")).to_contain_text("2.00 MB of 5.00 MB are here")
    keep("interrupted")
    gone.get_by_role("button", name="Discard").click()
    expect(gone).to_have_count(0)
    half.locator("input[type=file]").set_input_files({"name": "half.pt", "mimeType": "a/b", "buffer": b"short"})
    expect(half.locator(".detail")).to_contain_text("That is another file")
    half.locator("input[type=file]").set_input_files(source)
    expect(half.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    expect(half.locator(".meta")).to_contain_text("preset tiny")  # as it was asked for
    with service.client(token) as client:
        uploads = client.get("/v1/uploads").json()
    assert [item["state"] for item in uploads] == ["ready"]


def test_a_service_that_goes_and_comes_back(fresh, page, keep, tmp_path):
    one = fresh()
    enter(page, one)
    expect(page.locator("#health-text")).to_have_text("ready", timeout=PATIENCE)
    page.locator("#more").evaluate("one => one.open = true")
    page.get_by_role("radio", name=re.compile("Small")).check()
    one.stop()
    expect(page.locator("#health-text")).to_have_text("not reachable", timeout=PATIENCE)
    keep("gone")
    page.locator("#file").set_input_files({"name": "later.pt", "mimeType": "a/b", "buffer": b"x" * 1000})
    one.start()
    card = page.locator(".card", has_text="later.pt").first
    expect(card.locator(".state.succeeded")).to_be_visible(timeout=PATIENCE)
    expect(card.locator(".meta")).to_contain_text("preset small")
    with one.client() as client:
        assert client.get("/v1/jobs").json()[0]["options"]["preset"] == "small"


def test_nothing_starts_before_the_operations_are_known(service, page):
    answers = []
    page.route(
        "**/v1/operations",
        lambda route: route.abort() if len(answers) < 1 and not answers.append(1) else route.continue_(),
    )
    page.goto(f"{service.url}/#token={service.token}")
    expect(page.locator("#plan")).to_contain_text("trying again", timeout=PATIENCE)
    page.locator("#file").set_input_files({"name": "early.pt", "mimeType": "a/b", "buffer": b"x"})
    assert page.locator(".card", has_text="early.pt").count() == 0
    expect(page.locator("#plan")).to_contain_text("Next: Compress", timeout=PATIENCE)
