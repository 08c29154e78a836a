"""The page in a real browser. Debian's chromium will do; where there is none, POTSTILL_BROWSER=required fails here."""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import synthetic
from browser import BINARY, Browser

from potstill import watch
from potstill.policies import load_policy
from potstill.report import page

if BINARY is None and os.environ.get("POTSTILL_BROWSER") != "required":
    pytest.skip("no chromium or google-chrome: apt-get install chromium", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    assert BINARY is not None, "POTSTILL_BROWSER=required, and there is no chromium or google-chrome"
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with everything on it: arms, an ablation, a failed run, markup in a name."""
    records = synthetic.study({"rl": 1.0, "distill-student": 3.0}, widths=("1/16", "1/8", "1/4"), seeds=3)
    records[0] |= {"status": "failed", "score": None, "error": "<b>diverged</b>"}
    folder = tmp_path_factory.mktemp("study")
    out = folder / "report.html"
    page.write([synthetic.write(folder / "records", records)], out, resamples=200)
    return out


@pytest.fixture
def tab(browser, report) -> Browser:
    browser.events.clear()
    browser.resize(1280)
    browser.open(report)
    return browser


COLUMN = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[{}].textContent)"
HEADINGS = "[...document.querySelectorAll('table.sortable th')].map(heading => heading.textContent)"


def test_it_renders_without_a_complaint_and_asks_nothing_of_a_network(tab):
    assert tab.run("document.querySelectorAll('.answer .verdict').length") == 3
    assert tab.run(
        "[...document.querySelectorAll('figure .wide svg')].every(svg => svg.getBoundingClientRect().height > 200)"
    )
    assert tab.complaints() == []
    assert tab.requests() == []


def test_the_check_sees_a_request_and_an_error_where_there_is_one(tab, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><img src='http://127.0.0.1:9/pixel.png'><script>undefined.x</script>")
    tab.open(bad)
    assert tab.requests() == ["http://127.0.0.1:9/pixel.png"]
    assert any("TypeError" in line for line in tab.complaints())


def test_the_page_s_own_policy_refuses_a_request(tab):
    tab.run(
        "new Promise(done => { const image = new Image(); image.onerror = done; image.src = 'http://127.0.0.1:9/p' })"
    )
    assert any("Content Security Policy" in line for line in tab.complaints())


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_screen_and_shows_the_figure_that_fits(tab, report, width):
    tab.resize(width)
    tab.open(report)
    assert tab.run("document.documentElement.scrollWidth") <= width
    shown, hidden = (".wide", ".narrow") if width > 640 else (".narrow", ".wide")  # of a figure drawn in both sizes
    assert tab.run(f"document.querySelector('.both {shown}').getBoundingClientRect().height") > 0
    assert tab.run(f"document.querySelector('.both {hidden}').getBoundingClientRect().height") == 0


def test_on_a_phone_a_table_of_three_columns_fits_and_a_wider_one_has_a_shadow_at_its_edge(browser, tmp_path):
    records = synthetic.study({"distill-student": 1.0}, widths=("1/16", "1/8", "1/4"), seeds=1, extended=False)
    page.write([synthetic.write(tmp_path / "records", records)], tmp_path / "report.html", resamples=100)
    browser.resize(400)
    browser.open(tmp_path / "report.html")
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    table = "[...document.querySelectorAll('details')].find(e => e.textContent.includes('per doubling')).children[1]"
    assert browser.run(f"{table}.querySelectorAll('th').length") == 3
    assert browser.run(f"{table}.scrollWidth - {table}.clientWidth") == 0
    runs = "document.querySelector('#runs .scroll')"
    assert browser.run(f"{runs}.scrollWidth - {runs}.clientWidth") > 0
    assert browser.run(f"getComputedStyle({runs}).backgroundAttachment") == "local, local, scroll, scroll"


def test_a_click_on_a_heading_sorts_the_runs_by_it_and_a_second_one_the_other_way(tab):
    column = tab.run(HEADINGS).index("score")
    before = tab.run(COLUMN.format(column))
    known = sorted(float(score) for score in before if score != "-")
    click = f"document.querySelectorAll('table.sortable th button')[{column}].click()"
    tab.run(click)
    assert tab.run(COLUMN.format(column)) == [f"{score:.1f}" for score in known] + ["-"]
    tab.run(click)
    assert tab.run(COLUMN.format(column)) == [f"{score:.1f}" for score in reversed(known)] + ["-"]


def test_sizes_and_widths_sort_as_numbers(tab):
    for heading, order in (("parameters", lambda cell: int(cell.replace(",", ""))), ("width", Fraction)):
        column = tab.run(HEADINGS).index(heading)
        tab.run(f"document.querySelectorAll('table.sortable th button')[{column}].click()")
        cells = tab.run(COLUMN.format(column))
        assert cells == sorted(cells, key=order)
        assert cells[0] != cells[-1]


def test_markup_in_a_record_is_text_on_the_page(tab):
    assert "failed: <b>diverged</b>" in tab.run("document.querySelector('table.sortable').textContent")
    assert tab.run("document.querySelectorAll('table.sortable b').length") == 0


def test_it_prints_with_every_table_open(tab):
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    assert tab.run("[...document.querySelectorAll('details')].every(each => each.open)")


def test_a_search_and_a_sort_reach_the_runs_that_are_not_shown(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SHOWN", 2)
    records = synthetic.study({"rl": 1.0}, widths=("1/16",), seeds=5, extended=False)
    records = [run | {"status": "failed", "score": None, "error": f"<b>{run['seed']}</b>"} for run in records]
    page.write([synthetic.write(tmp_path / "records", records)], tmp_path / "report.html", resamples=100)
    browser.events.clear()
    browser.open(tmp_path / "report.html")

    def found(words):
        browser.run(f"find.value = {words!r}; find.dispatchEvent(new Event('input'))")
        return browser.run(COLUMN.format(5)), browser.run("document.querySelector('#found').textContent")

    assert browser.run(COLUMN.format(5)) == ["0", "1"]
    assert browser.run("document.querySelector('#found').textContent") == "2 of 5 are shown"
    assert found("SEED-3") == (["3"], "1 found")
    assert browser.run(COLUMN.format(1)) == ["failed: <b>3</b>"]
    assert found("rl 1/16 <b>4") == (["4"], "1 found")
    assert found("nothing") == ([], "0 found")
    assert found("") == (["0", "1"], "2 of 5 are shown")
    for order in (["0", "1"], ["4", "3"]):
        browser.run("document.querySelectorAll('#runs th button')[5].click()")
        assert browser.run(COLUMN.format(5)) == order
    assert browser.complaints() == []


@pytest.fixture(scope="module")
def film(tmp_path_factory, save_teacher) -> Path:
    """A page with a network that plays, some thirty pictures."""
    folder = tmp_path_factory.mktemp("film")
    save_teacher(folder / "expert")
    loaded = load_policy(folder / "expert")
    watch.film([("it", loaded)], folder / "film.html", seed=3, max_steps=30, inside=True, quiet=True)
    return folder / "film.html"


def test_a_film_of_a_network_plays_pauses_and_goes_on_picture_by_picture(browser, film):
    browser.events.clear()
    browser.resize(1200)
    browser.open(film)

    def when(what):
        return browser.run(f"new Promise(done => {{ (look = () => {what} ? done(true) : setTimeout(look, 20))() }})")

    def press(name):
        browser.run(f"[...document.querySelectorAll('button')].find(each => each.textContent == {name!r}).click()")
        assert when("!film.seeking")
        return int(30 * browser.run("film.currentTime"))

    picture = "(canvas => (canvas.getContext('2d').drawImage(film, 0, 0, 320, 180), canvas.toDataURL()))"
    picture += "(Object.assign(document.createElement('canvas'), {width: 320, height: 180}))"
    assert when("film.currentTime > 0.1")  # it plays by itself
    press("pause")
    assert browser.run("film.paused")
    browser.run("place.value = 0.5; place.dispatchEvent(new Event('input'))")
    assert when("!film.seeking")
    assert browser.run("film.currentTime / film.duration") == pytest.approx(0.5, abs=0.05)
    now, seen = press("previous picture"), browser.run(picture)
    assert [press("next picture"), press("next picture")] == [now + 1, now + 2]
    assert browser.run(picture) != seen
    assert [press("previous picture"), press("previous picture")] == [now + 1, now]
    assert browser.run(picture) == seen
    press("play")
    assert when(f"film.currentTime > {(now + 3) / 30}")
    assert not browser.run("film.paused")
    assert browser.complaints() == browser.requests() == []


@pytest.mark.parametrize("width", [1200, 400])
def test_a_film_of_a_network_is_legible_on_any_screen_and_nothing_lies_over_it(browser, film, width):
    browser.resize(width)
    browser.open(film)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("film.getBoundingClientRect().width") >= 900  # which scrolls where the screen is narrower
    assert not browser.run("film.controls")
    assert browser.run(
        "[place, play, back, on].every(each => each.getBoundingClientRect().top >= film.getBoundingClientRect().bottom)"
    )
    assert browser.run("[...document.querySelectorAll('button')].every(each => each.getBoundingClientRect().width > 0)")
    assert browser.run("Math.max(...[place, play, back, on].map(e => e.getBoundingClientRect().right))") <= width
