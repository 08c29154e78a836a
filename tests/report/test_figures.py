"""Every figure of every committed study, and of made-up ones: whole, legible, and what the records say."""

import runpy
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import synthetic
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from potstill.errors import InputError
from potstill.report import figures, page, scaling_figures
from potstill.report.answers import Answers, answer
from potstill.report.page import read_study

ROOT = Path(__file__).parents[2]
DRAWN = ("size_score", "size_ratios", "differences", "growth", "learning_curves", "cost_fronts", "bad_starts")
DRAWN += ("budgets", "covariate_shift", "score_distributions", "agreement_score")
STUDIES = sorted({path.parent for path in (ROOT / "data" / "results").rglob("study.json")})


@pytest.fixture(scope="module")
def answers() -> Answers:
    arms = {"rl": 1.0, "distill-student": 3.0, "distill-teacher": 1.5, "rl-split": 1.2, "ppd": 2.0, "finetune": 4.0}
    return answer(synthetic.study(arms | {"self-distill": 2.5}, seeds=2), resamples=200)


def written(figure: Figure) -> list[Text]:
    """All text that is drawn: not of ticks beyond an axis, nor of panels that are not shown."""
    figure.draw_without_rendering()  # which begins with the layout: once, as where a figure is saved
    hidden: set[Text] = set()
    for ax in figure.axes:
        if not ax.get_visible():
            hidden.update(ax.findobj(Text))
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden.update(label for t in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2))
    return [each for each in set(figure.findobj(Text)) - hidden if each.get_visible() and each.get_text().strip()]


def box_of(text: Text) -> Bbox:
    """Where it is drawn, in pixels; blank lines at its end keep a place for others."""
    box, lines = text.get_window_extent(), text.get_text().split("\n")
    blank = len(lines) - len(text.get_text().rstrip("\n").split("\n"))
    return Bbox([[box.x0, box.y0 + box.height * blank / len(lines)], [box.x1, box.y1]])


def check_legible(figure: Figure) -> None:
    """Nothing written is cut off at the edge of the paper, and nothing is printed over anything else."""
    boxes = {each: box_of(each) for each in written(figure)}
    paper = figure.bbox.padded(0.5)
    for each, box in boxes.items():
        inside = paper.x0 <= box.x0 and box.x1 <= paper.x1 and paper.y0 <= box.y0 and box.y1 <= paper.y1
        assert inside, f"{each.get_text()!r} is cut off"
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) <= 2, f"{one.get_text()!r} is printed over {other.get_text()!r}"


@cache
def told_by(folder: Path) -> Answers:
    return answer(read_study(folder).records, resamples=100)


@pytest.mark.parametrize("width", [page.WIDTH, page.PHONE])
@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_nothing_is_printed_over_anything_else_in_any_figure_of_a_committed_study(folder, width):
    told, drawn = told_by(folder), 0
    for name in DRAWN:
        try:
            figure = getattr(scaling_figures, name)(told, width)
        except InputError:
            continue  # this study has nothing of it
        check_legible(figure)
        drawn += 1
    assert drawn


@pytest.mark.parametrize("width", [page.WIDTH, page.PHONE])
@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_of_seven_arms_at_six_sizes_is_legible_and_names_its_task_and_axes(answers, name, width):
    figure = getattr(scaling_figures, name)(answers, width)
    check_legible(figure)
    assert figure.get_suptitle().replace("\n", " ").strip().endswith(", Pong")
    assert figure.get_supxlabel() or any(ax.get_xlabel() for ax in figure.axes)
    assert all(label for label in [figure.axes[0].get_ylabel() or figure.axes[0].get_title()])


def test_the_check_sees_text_over_text_and_text_beyond_the_edge():
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    check_legible(figure)
    figure.text(0.5, 0.5, "other")
    with pytest.raises(AssertionError, match="is printed over"):
        check_legible(figure)
    figure = Figure()
    figure.text(0.99, 0.5, "long words")
    with pytest.raises(AssertionError, match="is cut off"):
        check_legible(figure)


def test_the_first_figure_has_a_dot_for_every_run_and_an_arrow_for_every_group_that_may_be_higher():
    records = synthetic.study({"rl": 1.0, "distill-student": 3.0}, ("1/16", "1/8", "1/4"), seeds=3, extended=False)
    answers = answer(records, resamples=200)
    figure = scaling_figures.size_score(answers)
    (ax,) = figure.axes
    dots = sorted(y for group in ax.collections for y in group.get_offsets()[:, 1].tolist())
    assert dots == sorted(run["score"] for run in answers.records)
    assert len([note for note in ax.texts if note.arrow_patch is not None]) == 3
    assert "arrow: more training" in " ".join(figure.texts[1].get_text().split())
    taught = answer([run for run in records if run["arm"] == "distill-student"], resamples=200)
    assert "arrow" not in scaling_figures.size_score(taught).texts[1].get_text()
    labels = {line.get_label(): line.get_ydata()[0] for line in ax.lines}
    assert labels["random -20.7"] == -20.7


def test_every_other_arm_has_a_panel_over_rl_and_the_student_in_grey(answers):
    figure = scaling_figures.size_score(answers)
    titles = [ax.get_title() for ax in figure.axes if ax.get_visible()]
    assert len(titles) == len(set(answers.arms)) - 1
    behind = [line for line in figure.axes[1].lines if line.get_color() == "#bbbbbb"]
    assert [list(line.get_ydata()) for line in behind] == [
        [group.score.value for group in answers.of(arm)] for arm in ("rl", "distill-student")
    ]


def test_every_game_is_a_dot_and_the_share_lost_stands_over_it_where_games_are_lost():
    records = synthetic.study({"rl": 1.0}, ("1/8",), seeds=1, extended=False)
    records[0] |= {"returns": [-5.0] * 3 + [7.0] * 37}
    ax = scaling_figures.score_distributions(answer(records, resamples=100)).axes[0]
    assert sorted(ax.collections[-1].get_offsets()[:, 1]) == [-5.0] * 3 + [7.0] * 37
    assert [text.get_text() for text in ax.texts] == ["8"]  # 3 of 40
    other = answer([run | {"env": "CartPole-v1"} for run in records], resamples=100)
    figure = scaling_figures.score_distributions(other)
    assert not figure.axes[0].texts
    assert "lost" not in " ".join(text.get_text() for text in written(figure))


def test_agreement_against_score_has_a_dot_for_every_student_and_none_for_rl(answers):
    (ax,) = scaling_figures.agreement_score(answers).axes
    dots = sorted(tuple(point) for dots in ax.collections for point in dots.get_offsets().tolist())
    taught = [run for run in answers.records if run.get("agreement") is not None and run["status"] == "done"]
    assert dots == sorted((run["agreement"], run["score"]) for run in taught)


def test_games_that_are_all_alike_are_drawn():
    records = [run | {"returns": [500.0] * 20} for run in synthetic.study({"rl": 1.0}, seeds=2, extended=False)]
    check_legible(scaling_figures.score_distributions(answer(records, resamples=100)))


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_to_draw_is_refused_in_one_line(name):
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        getattr(scaling_figures, name)(answer([]))


@pytest.mark.parametrize(
    ("count", "text"), [(386, "386"), (1_981, "2.0k"), (27_544, "28k"), (999_700, "1.0M"), (1_690_000, "1.7M")]
)
def test_a_count_is_as_short_as_it_can_be(count, text):
    assert figures.short(count) == text


def test_a_png_has_200_dots_an_inch_and_an_svg_is_the_same_every_time(answers, tmp_path):
    figure = scaling_figures.growth(answers)
    figures.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1440
    for name in ("b.svg", "c.svg"):
        figures.save(scaling_figures.growth(answers), tmp_path / name)
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"figures are written as \.png or \.svg"):
        figures.save(Figure(), tmp_path / "a.pdf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    records = synthetic.study({"rl": 1.0, "distill-student": 3.0}, ("1/16", "1/8", "1/4"), seeds=2)
    return synthetic.write(tmp_path_factory.mktemp("results") / "made-up", records)


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "figures" / f"{name}.py"), run_name="__main__")


def test_there_is_a_script_for_every_figure():
    assert sorted(path.stem for path in (ROOT / "figures").glob("*.py")) == sorted(DRAWN)


def test_a_script_draws_its_figure_of_a_study_and_says_where(folder, tmp_path, monkeypatch, capsys):
    run_script("growth", monkeypatch, folder)
    assert capsys.readouterr().out == f"{folder / 'growth.png'}\n"
    assert (folder / "growth.png").stat().st_size > 10_000


def test_a_script_draws_the_arms_that_are_asked_for(folder, tmp_path, monkeypatch, capsys):
    run_script("size_score", monkeypatch, folder, "--arms", "rl", "--out", tmp_path / "rl.svg")
    drawn = (tmp_path / "rl.svg").read_text()
    assert "RL from scratch" in drawn
    assert "student leads" not in drawn
    with pytest.raises(SystemExit) as stopped:
        run_script("size_score", monkeypatch, folder, "--arms", "none", "--out", tmp_path / "none.svg")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "potstill: no run of the arm 'none': there are distill-student, rl, rl-long\n"
    assert not (tmp_path / "none.svg").exists()


def test_a_script_refuses_bad_input_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("size_score", monkeypatch, tmp_path)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"potstill: {tmp_path} holds no runs")


@pytest.mark.parametrize(("points", "pictures"), [(14_000, 0), (16_000, 4), (21_000, 4)])
def test_a_part_of_too_many_points_is_a_picture_and_so_is_each_of_a_figure_of_too_many(points, pictures):
    figure = Figure()
    for axes in figure.subplots(2, 2).flat:
        axes.plot([0.0] * points)
    assert figures.svg(figure).count("<image") == pictures


@pytest.mark.parametrize("width", [page.PHONE, page.WIDTH])
def test_the_least_and_the_largest_size_are_labelled_however_close_others_lie(width):
    sizes = {"1/32": 1_964, "1/16": 2_300, "1/8": 27_479, "1/4": 400_000, "1/2": 424_019}
    records = [
        run | {"parameters": sizes[run["width"]]}
        for run in synthetic.study({"rl": 1.0, "distill-student": 3.0}, tuple(sizes), seeds=1, extended=False)
    ]
    figure = scaling_figures.size_score(answer(records, resamples=100), width)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"2.0k\n1/32", "424k\n1/2", "27k\n1/8"} == set(labels)
    check_legible(figure)


def test_a_logarithmic_axis_of_costs_has_two_labels_or_more():
    records = synthetic.study({"rl": 1.0, "distill-student": 3.0}, ("1/16", "1/8", "1/4"), seeds=1, extended=False)
    for share in (1.0, 0.003):  # latencies that differ by little, too
        for run in records:
            run["latency_ms"] = 0.15 + share * run["parameters"] / 2e5
        figure = scaling_figures.cost_fronts(answer(records, resamples=100))
        check_legible(figure)
        for ax in figure.axes:
            low, high = ax.get_xlim()
            labels = [ax.xaxis.get_major_formatter()(tick) for tick in ax.get_xticks() if low <= tick <= high]
            assert len({*labels}) == len(labels) > 1, ax.get_xlabel()
