"""The report: one page that stands alone, says what was found, lets nothing be injected, and whose atlas is alive."""

import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from example_stories import images, labels, small_vae
from markupsafe import escape

from ppl_vae import History, diagnostics
from ppl_vae.report import Account, page

SECTIONS = ("evidence", "guide", "collapse", "atlas", "landscape", "traversals")


@pytest.fixture(scope="module")
def account():
    torch.manual_seed(0)
    story, x = small_vae(), images()
    diagnosis = diagnostics.diagnose(story, x, labels=labels(), sections=SECTIONS, progress=False)
    history = History("svi", [{"epoch": e, "train_elbo": -9.0 / e, "validation_elbo": -9.5 / e} for e in (1, 2, 3)])
    return Account(
        title="runs/<script>alert(1)</script>",
        story=story,
        columns=(x,),
        diagnosis=diagnosis,
        history=history,
        label_names={0: "zero", 1: "</script><b>one</b>", 2: "two"},
        data={"name": "<i>made</i>"},
        commands=["ppl-vae train --data 'a & b.npy'"],
    )


@pytest.fixture(scope="module")
def html(account):
    return page(account)


class Reader(HTMLParser):
    """Collects what a page refers to, its tags, and the sections that it has."""

    def __init__(self):
        super().__init__()
        self.addresses, self.tags, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        said = dict(attrs)
        self.ids += [said["id"]] if "id" in said else []
        self.links += [said["href"][1:]] if said.get("href", "").startswith("#") else []
        self.addresses += [said[name] for name in ("src", "href") if name in said]


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_the_page_refers_to_nothing_outside_itself(html):
    assert [address[:30] for address in read(html).addresses if not address.startswith(("data:", "#"))] == []
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", html)


def test_names_are_escaped(html):
    reader = read(html)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<i>made</i>" not in html
    assert "b" not in reader.tags  # a label's name stays inside the data of the atlas
    assert reader.tags.count("script") == 2


def test_every_link_leads_somewhere_and_every_section_is_there(html):
    reader = read(html)
    assert set(reader.links) <= set(reader.ids)
    assert {"story", "data", "training", "repeat", *SECTIONS} <= set(reader.ids)


def test_the_story_is_told_as_mathematics(html):
    assert "Bernoulli(logits = f(z))" in html
    assert "Normal(loc = 0, scale = 1)" in html


def test_each_finding_is_said_twice_above_and_in_its_section(account, html):
    said = [finding.text for finding in diagnostics.findings(account.diagnosis)]
    assert len(said) >= len(SECTIONS) - 1
    assert [text for text in said if html.count(str(escape(text))) != 2] == []


def test_what_was_not_computed_is_said_so(html):
    gaps = html.split('<section id="gaps">')[1].split("</section>")[0]
    assert "Not computed." in gaps


def test_a_section_that_does_not_apply_says_why(account):
    unavailable = diagnostics.Diagnosis({}, {"gaps": "There is no family <here>."})
    told = page(Account("title", account.story, account.columns, unavailable))
    assert "There is no family &lt;here&gt;." in told
    assert "Nothing has been diagnosed yet." in told


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install .[browser]")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, html, tmp_path):
    """The page in a browser; afterwards nothing was complained of, and nothing was asked of any network."""
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    tab, complaints, asked = browser.new_page(viewport={"width": 1200, "height": 900}), [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("#atlas-plane[data-ready=yes]")
    yield tab
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    tab.close()


def where(tab, across, down):
    """Moves the pointer to a place of the plane, in shares of its width and height, and returns what is said of it."""
    tab.locator("#atlas-plane").scroll_into_view_if_needed()
    box = tab.locator("#atlas-plane").bounding_box()
    tab.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    return tab.locator("#atlas-where").inner_text()


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text.replace("−", "-"))]


def test_moving_over_the_plane_tells_z(opened, account):
    left, right = numbers(where(opened, 0.02, 0.5)), numbers(where(opened, 0.98, 0.5))
    grid = account.diagnosis["atlas"]["z"]
    assert left[0] == pytest.approx(float(grid[0, 0, 0]), abs=0.006)
    assert right[0] == pytest.approx(float(grid[0, -1, 0]), abs=0.006)
    top, bottom = numbers(where(opened, 0.5, 0.02)), numbers(where(opened, 0.5, 0.98))
    assert top[1] > 0 > bottom[1]


def test_moving_over_the_plane_shows_what_is_decoded_there(opened, account):
    where(opened, 0.02, 0.02)
    shown = opened.evaluate(
        "() => { const c = document.getElementById('atlas-image'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; let s = 0; for (let i = 0; i < d.length; i += 4) s += d[i];"
        " return s / (d.length / 4) / 255; }"
    )
    decoded = float(account.diagnosis["atlas"]["decoded"][0, 0].mean())
    assert shown == pytest.approx(1 - decoded, abs=0.01)


def test_labels_and_their_probabilities_are_shown(opened, account):
    where(opened, 0.98, 0.98)
    bars = opened.locator("#atlas-labels .bar")
    assert bars.count() == 3
    assert "</script><b>one</b>" in bars.nth(1).inner_text()
    shares = account.diagnosis["atlas"]["probability"][-1, -1].values
    told = [float(bars.nth(number).locator("span").nth(1).inner_text().rstrip(" %")) for number in range(3)]
    assert told == pytest.approx([100 * share for share in shares], abs=0.51)


def test_the_nearest_observations_are_shown(opened, account):
    where(opened, 0.02, 0.98)
    canvases = opened.locator("#atlas-nearest canvas")
    nearest = account.diagnosis["atlas"]["nearest"][-1, 0].values
    titles = [canvases.nth(number).get_attribute("title") for number in range(canvases.count())]
    assert [title.split(",")[0] for title in titles] == [f"observation {number}" for number in nearest]


def test_arrow_keys_move_over_the_plane(opened):
    before = numbers(where(opened, 0.5, 0.5))
    opened.locator("#atlas-plane").focus()
    opened.keyboard.press("ArrowRight")
    after = numbers(opened.locator("#atlas-where").inner_text())
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_the_layer_of_labels_and_the_observations_can_be_drawn(opened):
    def drawn():
        return opened.evaluate("() => document.getElementById('atlas-plane').toDataURL()")

    decoded = drawn()
    opened.locator("input[value=labels]").check()
    by_label = drawn()
    opened.locator("#atlas-observations").check()
    assert len({decoded, by_label, drawn()}) == 3
