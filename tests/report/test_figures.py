import runpy
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from potstill.errors import InputError
from potstill.report import figures
from potstill.results import CURVES, EPISODES, TABLE

SIZES = {"1/32": 1_981, "1/16": 7_230, "1/8": 27_544, "1/4": 107_000, "1/2": 424_000, "1": 1_690_000}
ARMS = ("rl", "distill-student", "distill-teacher")


def frame(rows: list[dict[str, object]], columns: tuple[str, ...]) -> pl.DataFrame:
    defaults = dict.fromkeys(columns) | {"env": "pong"}
    return pl.DataFrame([defaults | row for row in rows], infer_schema_length=None)


def groups(seeds: int = 3) -> list[dict[str, object]]:
    """Every arm at every size, made up: scores rise to the teacher's, runs of RL are 2 points lower."""
    rng = np.random.default_rng(0)
    return [
        {
            "run": f"{arm}-{place}-{seed}",
            "arm": arm,
            "width": width,
            "parameters": parameters,
            "seed": seed,
            "score": 20.5 - 30 * 0.4**place - 2 * (arm == "rl") + rng.normal(0, 0.3),
        }
        for arm in ARMS
        for place, (width, parameters) in enumerate(SIZES.items())
        for seed in range(seeds)
    ]


def table() -> pl.DataFrame:
    taught = {"teacher": "data/experts/pong/seed-0", "teacher_score": 20.5}
    rows = [{"status": "done"} | row | (taught if row["arm"] != "rl" else {}) for row in groups()]
    rows = [row | {"agreement": 0.6 + 0.019 * row["score"] if "teacher" in row else None} for row in rows]
    return frame(rows, TABLE)


def episodes() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    games = [
        (group, game, score)
        for group in groups(1)
        for game, score in enumerate(group["score"] + rng.integers(-3, 4, 20))
    ]
    return frame([group | {"game": game, "score": score} for group, game, score in games], EPISODES)


def curves() -> pl.DataFrame:
    points = []
    for group in groups(2):
        for step in range(0, 1_000_001, 50_000):
            score = None if group["arm"] == "distill-teacher" else group["score"] * step / 1e6 - 21 * (1 - step / 1e6)
            agreement = None if group["arm"] == "rl" else 0.9 + step / 2e7
            points.append(group | {"step": step, "score": score, "agreement": agreement})
    return frame(points, CURVES)


def dots(figure: Figure, arm: str) -> list[tuple[float, float]]:
    (found,) = [dots for dots in figure.axes[0].collections if dots.get_label() == arm]
    return sorted(map(tuple, found.get_offsets().tolist()))


def words(figure: Figure) -> list[str]:
    texts = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    return [text.replace("\n", " ").strip() for text in texts if text.strip()]


DRAWN = [
    pytest.param(draw, make, id=draw.__name__)
    for draw, make in (
        (figures.learning_curves, curves),
        (figures.size_score, table),
        (figures.score_distributions, episodes),
        (figures.agreement_score, table),
    )
]


@pytest.mark.parametrize(("draw", "make"), DRAWN)
def test_nothing_written_is_cut_off_at_the_edge(draw, make):
    figure = draw(make())
    figure.draw_without_rendering()
    page = figure.bbox
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            inside = box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1
            assert inside, text.get_text()


@pytest.mark.parametrize(("draw", "make"), DRAWN)
def test_every_figure_names_its_task_in_the_title_and_words_on_its_axes(draw, make):
    figure = draw(make())
    assert figure.get_suptitle().strip().endswith(", Pong")
    assert figure.axes[-1].get_xlabel()
    assert figure.axes[0].get_ylabel()


@pytest.mark.parametrize(("draw", "make"), DRAWN)
def test_several_tasks_do_not_share_an_axis(draw, make):
    mixed = make().with_columns(env=pl.when(pl.col("seed") == 0).then(pl.lit("breakout")).otherwise("env"))
    other = make().with_columns(env=pl.lit("pong"))
    with pytest.raises(InputError, match=r"several tasks \(breakout, pong\)"):
        draw(pl.concat([mixed, other]))


@pytest.mark.parametrize(("draw", "make"), DRAWN)
def test_an_empty_table_is_refused_in_one_line(draw, make):
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        draw(make().clear())


@pytest.mark.parametrize(("draw", "make"), DRAWN)
def test_a_single_run_makes_a_figure_too(draw, make):
    one = make().filter(pl.col("arm") == "distill-student", pl.col("width") == "1/8", pl.col("seed") == 0)
    assert "distilled, student leads" in words(draw(one))


def test_size_against_score_has_a_dot_for_every_run_where_the_table_says():
    figure = figures.size_score(table())
    for arm in ARMS:
        runs = table().filter(pl.col("arm") == arm)
        assert dots(figure, arm) == sorted(zip(runs["parameters"], runs["score"], strict=True))


def test_size_against_score_joins_the_means_of_the_seeds():
    figure = figures.size_score(table())
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(SIZES)]
    runs = table().filter(pl.col("arm") == "rl")
    means = [runs.filter(pl.col("width") == width)["score"].mean() for width in SIZES]
    assert lines[0].get_xdata().tolist() == list(SIZES.values())
    assert lines[0].get_ydata().tolist() == pytest.approx(means)


def test_size_against_score_writes_teacher_arms_sizes_and_widths():
    written = words(figures.size_score(table()))
    assert {"teacher 20.5", "RL from scratch", "distilled, student leads", "28k 1/8", "1.7M 1"} <= set(written)


def test_the_teachers_line_is_at_the_teachers_score_and_a_random_policys_where_it_was_measured():
    figure = figures.size_score(table().with_columns(random_score=pl.lit(-20.7)))
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [20.5, -20.7]
    assert "random -20.7" in words(figure)


def test_runs_that_are_not_done_are_counted_out_loud():
    failed = frame([groups()[0] | {"status": "failed", "score": None}], TABLE)
    figure = figures.size_score(pl.concat([table(), failed], how="vertical_relaxed"))
    assert any("1 run left out, not measured" in text for text in words(figure))
    assert len(dots(figure, "rl")) == 18


def test_agreement_against_score_has_a_dot_for_every_student_and_none_for_rl():
    figure = figures.agreement_score(table())
    runs = table().filter(pl.col("arm") == "distill-student")
    assert dots(figure, "distill-student") == sorted(zip(runs["agreement"], runs["score"], strict=True))
    assert "rl" not in [dots.get_label() for dots in figure.axes[0].collections]
    assert set(SIZES) <= set(words(figure))
    assert not any("left out" in text for text in words(figure))


def test_agreement_of_exactly_one_is_on_the_page():
    perfect = table().with_columns(agreement=pl.when(pl.col("width") == "1").then(1.0).otherwise("agreement"))
    figure = figures.agreement_score(perfect)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    assert low < 1.0 < high


def test_every_game_is_a_dot_and_the_share_below_zero_is_written_over_it():
    games = pl.concat([episodes().filter(pl.col("width") == "1/8", pl.col("arm") == "rl")] * 2)
    games = games.with_columns(score=pl.Series([-5.0] * 3 + [7.0] * 37))
    figure = figures.score_distributions(games)
    scatter = figure.axes[0].collections[-1]
    assert sorted(scatter.get_offsets()[:, 1]) == [-5.0] * 3 + [7.0] * 37
    assert {"8", "P(score < 0), %"} <= set(words(figure))  # 3 of 40


def test_a_cell_whose_games_are_all_alike_is_drawn():
    games = episodes().with_columns(score=pl.lit(500.0))
    assert len(figures.score_distributions(games).axes[0].collections) == 2 * len(ARMS) * len(SIZES)


def test_a_learning_curve_is_the_runs_own_points():
    figure = figures.learning_curves(curves())
    run = curves().filter(pl.col("run") == "rl-0-0").sort("step")
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in figure.axes[0].lines]
    assert (run["step"].to_list(), run["score"].to_list()) in drawn
    assert len(drawn) == 2 * len(SIZES)


def test_an_arm_that_plays_no_games_of_its_own_says_so_in_its_panel():
    assert words(figures.learning_curves(curves())).count("no score while learning") == 1


def test_labels_keep_their_order_and_their_distance():
    placed = figures._spread([0.5, 0.51, 0.99, 1.0], [0.1] * 4)
    assert placed == pytest.approx([0.5, 0.6, 0.85, 0.95])


@pytest.mark.parametrize(
    ("count", "text"), [(386, "386"), (1_981, "2.0k"), (27_544, "28k"), (999_700, "1.0M"), (1_690_000, "1.7M")]
)
def test_a_count_is_as_short_as_it_can_be(count, text):
    assert figures.short(count) == text


def test_a_png_is_two_readers_screens_wide_and_an_svg_is_the_same_every_time(tmp_path):
    figures.save(figures.size_score(table()), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1440, 880)
    for name in ("b.svg", "c.svg"):
        figures.save(figures.size_score(table()), tmp_path / name)
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"figures are written as \.png or \.svg"):
        figures.save(Figure(), tmp_path / "a.pdf")


SCRIPTS = Path(__file__).parents[2] / "figures"


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(("draw", "make"), DRAWN)
def test_each_script_draws_its_figure_from_a_csv_and_says_where(draw, make, tmp_path, monkeypatch, capsys):
    make().write_csv(tmp_path / "table.csv")
    run_script(draw.__name__, monkeypatch, tmp_path / "table.csv")
    out = tmp_path / f"{draw.__name__}.png"
    assert capsys.readouterr().out == f"{out}\n"
    assert out.stat().st_size > 10_000


def test_a_script_draws_the_arms_asked_for_as_if_there_were_no_others(tmp_path, monkeypatch):
    table().write_csv(tmp_path / "all.csv")
    table().filter(pl.col("arm") != "distill-teacher").write_csv(tmp_path / "two.csv")
    for name, arms in {"all": ["--arms", "rl", "distill-student"], "two": []}.items():
        run_script("size_score", monkeypatch, tmp_path / f"{name}.csv", *arms, "--out", tmp_path / f"{name}.svg")
    assert (tmp_path / "all.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_an_arm_that_has_no_run_is_refused(tmp_path, monkeypatch, capsys):
    table().write_csv(tmp_path / "all.csv")
    with pytest.raises(SystemExit) as stopped:
        run_script("size_score", monkeypatch, tmp_path / "all.csv", "--arms", "rl", "ppd")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "potstill: no run of the arm 'ppd': there are distill-student, distill-teacher, rl\n"
    )
    assert not (tmp_path / "size_score.png").exists()


def test_a_script_refuses_bad_input_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("size_score", monkeypatch, tmp_path)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"potstill: {tmp_path} holds no runs")
    assert printed.err.count("\n") == 1
