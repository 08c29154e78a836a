"""The page, made of made-up studies (synthetic.py)."""

import json
import re
import time
from html import unescape
from pathlib import Path

import pytest
import synthetic
from markupsafe import Markup

from potstill.cli import main
from potstill.errors import InputError
from potstill.report import conclusions, page, tables
from potstill.report.answers import answer

FEW = {"rl": 1.0, "distill-student": 3.0}
SECTIONS = ("Every arm and size", "Size and score in numbers", "Learning", "Cost of deployment", "Bad starts")
SECTIONS += ("Covariate shift", "Scores of single games", "All runs", "Methods")


def few(**options):
    return synthetic.study(FEW, widths=("1/16", "1/8", "1/4"), seeds=3, **options)


def rendered(records, document=None, films=()) -> str:
    return page.render([page.Study("synthetic", records, document or {}, list(films))], resamples=200)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """What is drawn is looked at once, in `html`; elsewhere a blank stands for it, which takes a tenth of the time."""
    monkeypatch.setattr(page, "svg", lambda figure: Markup("<svg></svg>"))


def whole() -> str:
    """A page with everything on it."""
    records = few()
    records[0] |= {"status": "failed", "score": None, "error": "the loss is not a finite number"}
    ablation = [run | {"arm": "acting-before", "run": f"before-{run['run']}"} for run in records[-3:]]
    return rendered(records + ablation, {"planned": 40, "plan": 'widths = ["1/8"]'})


@pytest.fixture(scope="module")
def html() -> str:
    return whole()


def text(html: str) -> str:
    shown = re.sub(r"<svg.*?</svg>|<style.*?</style>|<script.*?</script>|<[^>]+>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(shown).split())


def test_the_page_opens_with_the_headline_then_each_question_with_its_answer_and_a_figure(html):
    words = text(html)
    opening = words[: words.index("What is not known")]
    assert re.search(r"A student of [\d,]+ parameters.* keeps \d+ % of the teacher's points: ", opening)
    places = [opening.index(start) for start in ("Does learning from reward", "Can a distilled", "How do both scale")]
    assert places == sorted(places)
    assert "95 % interval" in opening[places[0] : places[1]]
    assert "Cannot be said" not in opening
    cards = re.findall(r'<div class="answer">.*?</details>', html, flags=re.DOTALL)
    assert [card.count("<figure") for card in cards] == [1, 1, 1]


def test_what_cannot_be_said_is_told_below_what_is_known_and_why():
    records = [run for run in few(extended=False) if run["width"] != "1/4"]  # two sizes: no growth from end to end
    words = text(rendered(records))
    opening, rest = words.split("What is not known", 1)
    assert "How do both scale with size?" not in opening
    assert "How do both scale with size? It takes three sizes or more" in rest


def test_the_teacher_s_size_stands_where_the_student_s_does():
    records = [run | ({"teacher_parameters": 1_690_000} if run["teacher"] else {}) for run in few()]
    words = text(rendered(records))
    assert re.search(r"A student of [\d,]+ parameters, \d+ times smaller than its teacher of 1,690,000, keeps", words)
    assert tables.sizes(answer(records, resamples=200)).headings.index("teacher's parameters") > 0


def test_a_measure_that_a_task_does_not_have_has_no_column():
    records = [run | {"env": "CartPole-v1", "score_nosticky": None} for run in few(extended=False)]
    for table in (tables.sizes(answer(records, resamples=200)), tables.runs(records, [])):
        assert not {"not sticky", "P(score < 0)"} & set(table.headings)
    pong = few(extended=False)
    for table in (tables.sizes(answer(pong, resamples=200)), tables.runs(pong, [])):
        assert {"not sticky", "P(score < 0)"} <= set(table.headings)


def test_every_section_is_there_and_failed_runs_are_in_the_table_with_their_reason(html):
    assert all(f"<h3>{title}</h3>" in html for title in (*SECTIONS, "Ablations", "Plan"))
    assert "failed: the loss is not a finite number" in html
    assert "1 failed" in text(html)


def test_no_section_is_empty(html):
    for section in re.findall(r'<section id="s.*?</section>', html, flags=re.DOTALL):
        assert "<figure" in section or "<table" in section


def test_an_ablation_stands_below_the_protocols_arm_of_its_method_and_size():
    records = [run | {"method": "rl" if run["arm"].startswith("rl") else "distill"} for run in few()]
    changed = [
        run | {"arm": "reverse-kl", "run": f"changed-{run['run']}"}
        for run in records
        if run["arm"] == "distill-student" and run["width"] == "1/8"
    ]
    table = tables.ablations(answer(records + changed, resamples=200))
    assert [(row[0], row[1].text) for row in table.rows] == [("distill-student", "1/8"), ("reverse-kl", "1/8")]
    assert table.rows[0][2:4] == table.rows[1][2:4]  # the same games, so the same scores
    assert table.rows[1][5] == "+0.0 (+0.0 to +0.0)"


def test_nothing_is_asked_of_a_network_and_names_are_used_once(html):
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", html)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(http" not in html
    assert "@import" not in html
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))


def test_the_same_study_makes_the_same_page(html, monkeypatch):
    monkeypatch.undo()
    assert whole() == html
    assert re.search(r"<text[^>]*>score of a game</text>", html)
    assert "#DejaVu" not in html


def test_several_studies_stand_on_one_page_each_task_answering_for_itself():
    others = [run | {"env": "breakout"} for run in few(extended=False)]
    studies = [page.Study(name, records, {"plan": f'env = "{name}"', "planned": 30}, []) for name, records in
               (("pong", few(extended=False)), ("breakout", others))]  # fmt: skip
    html = page.render(studies, resamples=200)
    words = text(html)
    assert html.count("<h3>Does learning from reward") == 2
    assert html.count("<h3>Plan</h3>") == 2
    assert "60 runs" in words
    contents = text(re.findall(r"<nav.*?</nav>", html, flags=re.DOTALL)[0])
    assert contents.count("Every arm and size") == 2 == contents.count("Pong") + contents.count("Breakout")
    first = re.findall(r'<section class="across".*?</section>', html, flags=re.DOTALL)[0]
    assert re.search(r"Pong Open\. To reach \d+ points, RL from scratch needs .* Not shown\. .* gains RL", text(first))
    assert "So few runs cannot show a difference." in text(first)  # three against three
    assert "Open. To reach" in text(first)
    assert "RL may still have been learning, so more steps may change this." in text(first)
    assert re.search(r"\d+ % of the points, with [\d,]+ parameters", text(first))
    assert "18 of 30 Each task" in text(first)
    headings = set(re.findall(r'data-heading="([^"]+)"', first))  # what a card on a phone says
    assert {*conclusions.SHORT, "runs so far"} <= headings
    assert "whether it holds for other tasks is not known" not in words
    assert "whether it holds for other tasks is not known" in text(page.render(studies[:1], resamples=200))
    with pytest.raises(InputError, match="two of the studies are of pong"):
        page.render([studies[0], studies[0]])


def test_an_empty_study_says_what_it_lacks():
    html = rendered([])
    assert "no finished run of RL from scratch or of a distilled network" in text(html)
    assert "<figure" not in html
    assert not re.search(r'<section id="s\d', html)


@pytest.mark.parametrize(("arm", "words"), [("rl", "a distilled network"), ("distill-student", "RL from scratch")])
def test_a_study_of_one_run_or_one_arm_makes_a_page(arm, words):
    html = rendered([run for run in few(extended=False) if run["arm"] == arm][:1])
    assert f"no finished run of {words}" in text(html)
    assert "<figure" in html


def test_runs_that_know_little_make_a_page():
    bare = [
        {"run": "a", "status": "done", "arm": "rl", "score": 3.0, "parameters": 1_000},
        {"run": "b", "status": "new"},
    ]
    assert "no finished run of" in rendered(bare)


def test_html_in_names_errors_and_plans_is_text():
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>&\"'"
    records = few(extended=False)
    records[0] |= {"run": attack}
    records[1] |= {"status": "failed", "score": None, "error": attack}
    records[2] |= {"arm": attack}
    for run in records:
        run |= {"env": attack, "machine": attack}
        run |= {"teacher": attack} if run["teacher"] else {}
    html = page.render([page.Study(attack, records, {"plan": attack}, [(attack, b"")])], resamples=200)
    assert "<img" not in html
    assert html.count("<script>") == 1  # its own
    assert "&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;" in html


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("results") / "made-up", few())


def test_the_command_writes_the_page_and_says_where(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    (folder / "small.mp4").write_bytes(b"film")
    (folder / "large.mp4").write_bytes(bytes(page.FILM_LIMIT))
    main(["report", str(folder), "--out", str(out), "--resamples", "200"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("A student of ")
    assert all(map(str.startswith, said[1:4], conclusions.SHORT))
    assert said[4:] == [str(out)]
    html = out.read_text()
    assert html.count("<video") == 1
    assert "data:video/mp4;base64,ZmlsbQ==" in html
    assert "27 runs, all done" in text(html)


def test_run_directories_with_their_metrics_make_a_page_too():
    study = page.read_study(Path(__file__).parents[2] / "data" / "results" / "quick")
    assert all(run["curve"] for run in study.records)
    assert "The study has no finished run of RL from scratch." in rendered(study.records)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "holds no runs"),
        (lambda folder: synthetic.write(folder, few()[:1]) / "study.json", "is damaged: it is not JSON"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(make, words, tmp_path, capsys):
    damaged = make(tmp_path / "study")
    if damaged is not None:
        damaged.write_text("{")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "study"), "--out", str(tmp_path / "page.html")])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_another_kind_of_file_and_too_few_resamples_are_refused(folder, tmp_path, capsys):
    with pytest.raises(InputError, match=r"a report is written as \.html"):
        page.write([folder], tmp_path / "page.pdf")
    with pytest.raises(SystemExit):
        main(["report", str(folder), "--resamples", "10"])
    assert "resamples must be 100 or more" in capsys.readouterr().err


@pytest.mark.timeout(600)
def test_200_runs_of_100_games_make_their_report_within_two_minutes_of_processor_time(record_property, monkeypatch):
    monkeypatch.undo()
    records = synthetic.study(synthetic.ARMS | {"ppd": 2.0, "finetune": 3.0, "rl-split": 1.2}, games=100)
    assert len(records) >= 200
    began = time.process_time()
    html = page.render([page.Study("large", records, {}, [])], resamples=10_000)
    spent = time.process_time() - began
    assert len(html) < 3_000_000
    record_property("seconds", spent)
    print(f"{len(records)} runs: {spent:.1f} s, {len(html) / 1e6:.1f} MB")
    assert spent < 120


def test_a_record_s_files_are_json(folder):
    assert json.loads((folder / "study.json").read_text())["planned"] == 27


@pytest.mark.parametrize(
    ("statuses", "planned", "told"),
    [
        (["done"] * 3, 3, "3 runs, all done"),
        (["done"] * 2 + ["failed"], 3, "3 runs: 2 done, 1 failed"),
        (["done"] * 53, 177, "177 runs planned: 53 done, 124 not begun yet"),
        (["new", "done", "failed"], 40, "40 runs planned: 1 done, 1 failed, 1 new, 37 not begun yet"),
        ([], 0, "0 runs"),
    ],
)
def test_the_first_line_tells_runs_that_have_not_begun_from_those_that_failed(statuses, planned, told):
    records = [run | {"status": status} for run, status in zip(few() * 3, statuses, strict=False)]
    assert f"{told} · potstill" in text(rendered(records, {"planned": planned}))


def test_words_of_a_section_s_tables_are_explained_one_by_one(html):
    section = re.findall(r"<h3>Size and score in numbers</h3>.*?</section>", html, flags=re.DOTALL)[0]
    told = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", section))
    assert set(told) == {"Ratio", "Difference", "p (Holm)", "Equivalent", "Probability", "Per doubling"}
    assert all(len(meaning.split()) <= 22 for meaning in told.values())
    assert "within 0.5 of no difference" in told["Equivalent"]
    assert '<p class="note">' not in section
