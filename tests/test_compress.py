import json
import math
import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from potstill import evaluation
from potstill.cli import main
from potstill.compress import outcome, search
from potstill.compress.budget import TimeUp
from potstill.compress.config import CompressConfig, ladder
from potstill.compress.confirmation import NOTHING, Sample, measure, share, share_low
from potstill.compress.search import Search, spread
from potstill.distill import DistillConfig
from potstill.envs import Episode
from potstill.errors import InputError
from potstill.evaluation import Evaluation
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.report import compression
from potstill.storage.runs import Run
from potstill.study import execute as study
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime
from potstill.training.trainer import new_distillation

RUNTIME = Runtime(device="cpu", threads=2, quiet=True)
QUICK = ["--total-timesteps", "4096", "--num-envs", "8", "--batch-size", "64", "--warmup-steps", "64"]
QUICK += ["--learning-rate", "0.02", "--updates-per-step", "2", "--precision", "float32"]
QUICK += [
    "--games",
    "4",
    "--confirm-games",
    "8",
    "--max-parameters",
    "40",
    "--device",
    "cpu",
    "--threads",
    "2",
    "--quiet",
]


@pytest.fixture(autouse=True)
def handlers():
    """A command minds SIGTERM and takes its threads; the tests after it do as before."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A CartPole expert, made by hand: pushes to the side the pole falls to, by one unit of 64 in each layer."""
    policy = Policy(NetworkConfig(), (4,), 2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        policy.trunk.linears[0].weight[0] = torch.tensor([0.05, 0.1, 1.0, 0.3])
        policy.trunk.linears[1].weight[0, 0] = 1.0
        policy.actor.weight[:, 0] = torch.tensor([-30.0, 30.0])
    folder = tmp_path_factory.mktemp("teacher") / "<b>&expert"  # a name that HTML must not take for its own
    folder.mkdir()
    probe = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    save_policy(folder / "policy.safetensors", policy, TASKS["cartpole"].env, probe, {})
    return folder


@pytest.fixture
def call(capsys):
    """Calls `potstill compress` in this process; exit code, stdout and stderr."""

    def call(*words, settings=QUICK):
        with pytest.raises(SystemExit) as stop:
            main(["compress", *map(str, words), *settings])
        return SimpleNamespace(code=stop.value.code, **capsys.readouterr()._asdict())

    return call


def games(rows, env="pong"):
    """An evaluation of games with these points won and lost, no two alike."""
    episodes = [Episode(0, won - lost, 10, won, lost, False, number) for number, (won, lost) in enumerate(rows)]
    return Evaluation(TASKS[env].env, "greedy", 1, 0, episodes)


def test_the_error_of_a_point_win_rate_is_that_of_a_ratio_of_sums():
    rate = measure(games([(21, 9), (21, 21)]), points=True)
    # 42 of 72 points; residuals 21 - 7/12 * 30 = 3.5 and 21 - 7/12 * 42 = -3.5, over 36 points a game
    assert rate == pytest.approx((42 / 72, 3.5 * math.sqrt(2) / math.sqrt(2) / 36, 1))


def test_the_error_of_a_return_is_that_of_the_games_own_interval():
    played = games([(3, 0), (5, 0), (10, 2)])
    found = measure(played, points=False)
    low, high = played.summary()["ci95"]
    assert found.value == pytest.approx((low + high) / 2)
    assert stats.t.ppf(0.975, 2) * found.error == pytest.approx((high - low) / 2)


def test_a_game_repeated_a_hundred_times_is_no_evidence():
    episode = Episode(0, 21.0, 10, 21.0, 0.0, False, 7)
    found = measure(Evaluation(TASKS["pong"].env, "greedy", 1, 0, [episode] * 100), points=True)
    assert (found.value, found.error) == (1.0, math.inf)
    assert share_low(found, Sample(0.9, 0.01, 50), NOTHING, 0.95) == -math.inf


def test_the_lower_bound_of_a_ratio_takes_both_errors_into_account():
    # With z = 2 and both errors 0.03 and 0.04 of 1: 1 - r = 2 sqrt(0.03^2 + 0.04^2 r^2), so
    # (1 - 0.0064) r^2 - 2 r + (1 - 0.0036) = 0 and r = (1 - sqrt(1 - 0.9936 * 0.9964)) / 0.9936.
    confidence = stats.norm.cdf(2.0)
    bound = share_low(Sample(1.0, 0.03, 1e12), Sample(1.0, 0.04, 1e12), NOTHING, confidence)
    assert bound == pytest.approx((1 - math.sqrt(1 - 0.9936 * 0.9964)) / 0.9936, abs=1e-6)
    assert bound == pytest.approx(0.905913, abs=1e-6)


def test_the_bound_is_students_ts_where_only_the_student_is_uncertain():
    bound = share_low(Sample(0.76, 0.02, 9), Sample(0.8, 0.0, 50), NOTHING, 0.95)
    assert bound == pytest.approx((0.76 - 1.833113 * 0.02) / 0.8, abs=1e-6)  # t(0.95, 9) = 1.833113


def test_shares_of_returns_count_from_random_play_so_neither_sign_nor_unit_matters():
    student, teacher, random = Sample(-120.0, 4.0, 30), Sample(-80.0, 3.0, 60), Sample(-500.0, 2.0, 30)
    assert share(student, teacher, random) == pytest.approx(380 / 420)
    shifted = [Sample(10 + 0.5 * x.value, 0.5 * x.error, x.df) for x in (student, teacher, random)]
    bounds = share_low(student, teacher, random, 0.9), share_low(*shifted, 0.9)
    assert bounds[0] == pytest.approx(bounds[1])
    assert bounds[0] < 380 / 420


def test_a_teacher_hardly_above_random_play_leaves_no_bound():
    assert share_low(Sample(1.0, 0.5, 9), Sample(1.0, 0.5, 9), Sample(0.9, 0.5, 9), 0.95) == -math.inf


def test_exact_scores_leave_nothing_to_doubt():
    exact = Sample(500.0, 0.0, 30)
    assert share_low(exact, exact, Sample(20.0, 3.0, 30), 0.99) == 1.0


def test_a_student_just_below_is_let_through_as_seldom_as_promised():
    rng, passed = np.random.default_rng(0), 0
    for _ in range(400):
        student = rng.normal(0.95 * 0.9, 0.12, 32)
        teacher = rng.normal(0.9, 0.08, 32)
        samples = [Sample(x.mean(), x.std(ddof=1) / math.sqrt(32), 31) for x in (student, teacher)]
        passed += share_low(*samples, NOTHING, 0.95) >= 0.95
    assert 0.02 <= passed / 400 <= 0.085  # 5 %, three standard errors about it


def test_widths_lie_half_an_octave_apart_below_the_teachers():
    policy = Policy(NetworkConfig("1/2"), (4, 84, 84), 3)
    widths = ladder(policy, None)
    assert [width for width, _ in widths][-4:] == ["1/8", "3/16", "1/4", "3/8"]
    sizes = [parameters for _, parameters in widths]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < policy.size().parameters
    assert dict(widths)["1/8"] == 27_479
    assert ladder(policy, 27_479) == [pair for pair in widths if pair[1] <= 27_479]


def test_widths_that_round_to_the_same_network_are_one():
    sizes = [parameters for _, parameters in ladder(Policy(NetworkConfig(), (4,), 2), None)]
    assert sizes[0] == 4 + 1 + 1 + 1 + 2 + 2
    assert len(set(sizes)) == len(sizes)


def test_a_bound_below_the_smallest_student_is_refused_with_its_size():
    with pytest.raises(InputError, match=r"max-parameters 0: the smallest student has 11"):
        ladder(Policy(NetworkConfig(), (4,), 2), 0)
    with pytest.raises(InputError, match="the smallest of its family already"):
        ladder(Policy(NetworkConfig("1/64"), (4,), 2), None)


def test_places_part_what_is_undecided_evenly_below_a_width_that_will_do():
    assert spread(9, 1, known=True) == [4]
    assert spread(10, 2, known=True) == [3, 6]
    assert spread(2, 8, known=True) == [0, 1]
    assert spread(0, 2, known=True) == []


def test_while_none_will_do_the_largest_is_tried_and_others_of_the_upper_two_thirds():
    assert spread(10, 1, known=False) == [9]
    assert spread(10, 2, known=False) == [6, 9]
    assert spread(10, 4, known=False) == [4, 6, 7, 9]
    assert spread(4, 4, known=False) == [0, 1, 2, 3]
    assert spread(2, 8, known=False) == [0, 1]
    assert spread(1, 1, known=False) == [0]


class Synthetic(Search):
    """A search among students whose games are made up: `rates` are the points they win of 100.

    Args:
        confirmed: the points that some win in their confirmation instead.
        failing: widths whose training fails.
        endless: whose games go on for ever, such as "screen 1/8".
        slow: widths whose training takes a hundred times what was foreseen.
    """

    def __init__(self, rates, confirmed=None, failing=(), endless=(), slow=(), budget=15.0, cores=2, seconds=60.0):
        self.config = CompressConfig(budget=budget)
        self.runtime = replace(RUNTIME, threads=cores)
        self.ladder = [(width, 100 * number) for number, width in enumerate(rates, start=1)]
        self.rates, self.surprises, self.failing, self.step = rates, confirmed or {}, failing, seconds
        self.endless, self.slow = endless, slow
        self.points, self.games, self.errors, self.confirmed = True, {}, {}, []
        self.rates, self.open, self.clock, self.tried = {"game": 0.5, "training": 1.0}, False, 0.0, []

    spent = property(lambda self: self.clock)

    def save(self):
        pass

    def foresee(self, width):
        return self.step

    def take(self, seconds, keep):
        """The clock goes on, until there would be too little left."""
        end = 60 * self.config.budget * (1 - search.FINISHING) - keep
        self.clock = min(self.clock + seconds, max(end, self.clock))
        if self.clock == end:
            raise TimeUp

    def play(self, kind, width="", keep=0.0):
        name = f"{kind} {width}".strip()
        rate = 90 if kind == "teacher" else self.rates[width]
        rate = self.surprises.get(width, rate) if kind == "confirm" else rate
        number = 64 if kind in ("teacher", "confirm") else 32
        self.take(math.inf if name in self.endless else 0.5 * number, keep)
        self.games[name] = games([(rate + i % 5 - 2, 100 - rate) for i in range(number)])
        return self.games[name]

    def train(self, widths, foreseen, keep=0.0):
        self.tried.append(list(widths))
        self.take(foreseen * (100 if set(widths) & set(self.slow) else 1), keep)
        self.errors |= {width: "its loss diverged" for width in widths if width in self.failing}


RATES = {"1/32": 30, "3/64": 50, "1/16": 70, "3/32": 80, "1/8": 88, "3/16": 89, "1/4": 90}


def test_the_search_confirms_the_smallest_width_that_keeps_enough_in_few_trainings():
    state = Synthetic(RATES)
    news = list(search.steps(state))
    assert news[-1].kind == "confirm"
    assert news[-1].width == "1/8"
    assert "width 1/8, 500 parameters: keeps 97.8%" in news[-1].words
    assert state.tried == [["3/32", "1/4"], ["1/8", "3/16"]]
    assert not state.open


def test_one_core_finds_one_that_will_do_and_then_bisects():
    state = Synthetic(RATES, cores=1)
    list(search.steps(state))
    assert state.tried == [["1/4"], ["3/32"], ["3/16"], ["1/8"]]
    assert state.confirmed == ["1/8"]


def test_where_the_largest_keeps_too_little_no_smaller_one_is_trained():
    state = Synthetic(dict.fromkeys(RATES, 60))
    list(search.steps(state))
    assert state.tried == [["3/32", "1/4"]]
    assert state.bracket() == ([], None)
    assert (state.confirmed, state.open) == ([], False)


def test_a_student_that_fails_its_confirmation_makes_the_search_go_on_above_it_at_a_stricter_level():
    state = Synthetic(RATES, confirmed={"1/8": 80})
    list(search.steps(state))
    assert state.confirmed == ["1/8", "3/16"]
    assert state.tried == [["3/32", "1/4"], ["1/8", "3/16"]]
    assert [state.verdict(width) for width in state.confirmed] == [False, True]
    assert [state.level(number) for number in range(2)] == pytest.approx([0.975, 0.9875])


def test_error_rates_of_all_confirmations_add_up_to_what_was_allowed():
    state = Synthetic(RATES)
    assert sum(1 - state.level(number) for number in range(40)) == pytest.approx(0.05)


@pytest.mark.parametrize(("failing", "found"), [("1/8", "3/16"), ("1/4", "1/8")])
def test_a_width_whose_training_fails_is_left_out_and_named(failing, found):
    state = Synthetic(RATES, failing=(failing,))
    news = list(search.steps(state))
    assert state.confirmed == [found]
    assert any(f"width {failing}, {dict(state.ladder)[failing]} parameters: failed: its loss" in n.words for n in news)


def test_nothing_is_begun_that_would_not_end_within_the_budget():
    for budget in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
        state = Synthetic(RATES, budget=budget)
        list(search.steps(state))
        assert state.clock <= 60 * budget * 0.9
        assert state.open == (len(state.tried) < 2)
        assert state.confirmed == [[], ["1/4"], ["1/8"]][len(state.tried)]
    assert len(state.tried) == 2


def test_where_time_is_short_lower_widths_are_trained():
    state = Synthetic(RATES)
    state.foresee = lambda width: {"1/4": 3_000, "3/16": 2_000}.get(width, 60)
    list(search.steps(state))
    assert state.tried[0] == ["1/16", "1/8"]
    assert (state.confirmed, state.open) == (["1/8"], False)


@pytest.mark.parametrize("what", ["a game", "a training"])
def test_what_takes_longer_than_any_before_is_cut_and_time_to_confirm_is_left(what):
    state = Synthetic(RATES, **({"endless": ("screen 1/8",)} if what == "a game" else {"slow": ("1/8",)}))
    news = list(search.steps(state))
    assert state.clock <= 60 * 15 * 0.9
    assert state.tried == [["3/32", "1/4"], ["1/8", "3/16"]]
    assert [item.kind for item in news[-2:]] == ["time", "confirm"]
    assert (state.confirmed, state.open) == (["1/4"], True)


def test_a_confirmation_that_takes_too_long_leaves_the_search_open():
    state = Synthetic(RATES, endless=("confirm 1/8",))
    list(search.steps(state))
    assert (state.confirmed, state.open) == ([], True)


def test_games_of_the_teacher_that_take_too_long_are_one_line():
    with pytest.raises(InputError, match="a budget of 15 minutes is too short: the teacher's games alone take longer"):
        list(search.steps(Synthetic(RATES, endless=("teacher",))))


def test_a_teacher_that_never_scores_has_nothing_to_keep():
    state = Synthetic(RATES)
    state.play = lambda kind: state.games.setdefault(kind, games([(0, 21), (0, 20)]))
    with pytest.raises(InputError, match="no better than random play"):
        list(search.steps(state))


@pytest.fixture(scope="module")
def found(tmp_path_factory, teacher):
    """A compression that was terminated while it trained, and then given the same command again."""
    out = tmp_path_factory.mktemp("compression") / "out"
    progress, before = study._progress, signal.getsignal(signal.SIGTERM)

    def terminating_progress(run):
        if run.metrics_path.exists() and run.metrics_path.stat().st_size:
            os.kill(os.getpid(), signal.SIGTERM)
        return progress(run)

    codes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_progress", terminating_progress)
        patch.setattr(study.time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 10))
        with pytest.raises(SystemExit) as stop:
            main(["compress", str(teacher), "--out", str(out), *QUICK])
        codes.append(stop.value.code)
    left = json.loads((out / "games.json").read_bytes())
    with pytest.raises(SystemExit) as stop:
        main(["compress", str(teacher), "--out", str(out), *QUICK])
    signal.signal(signal.SIGTERM, before)
    return SimpleNamespace(out=out, codes=[*codes, stop.value.code], left=left)


def test_an_interrupted_compression_goes_on_with_the_same_command(found):
    assert found.codes == [143, 0]
    ended = json.loads((found.out / "games.json").read_bytes())
    assert {name: ended["games"][name] for name in ("teacher", "random")} == found.left["games"]
    assert ended["seconds"] > found.left["seconds"] > 0
    assert ended["seconds"] == pytest.approx(json.loads((found.out / "result.json").read_bytes())["seconds"], abs=5.0)


def test_a_compression_leaves_a_small_student_that_plays_as_well(found):
    record = json.loads((found.out / "result.json").read_bytes())
    student = load_policy(found.out)
    assert record["reached"]
    assert student.policy.size().parameters == record["parameters"] <= 40
    assert record["score"] > 0.9 * record["teacher_score"]
    assert record["share_low"] >= 0.95
    assert (record["episodes"], len(record["returns"])) == (8, 8)
    chosen = next(trial for trial in record["trials"] if trial["width"] == record["width"])
    assert (found.out / chosen["run"] / "policy.safetensors").read_bytes() == student.path.read_bytes()
    smaller = [trial["will_do"] for trial in record["trials"] if trial["parameters"] < record["parameters"]]
    assert not any(smaller)


def test_it_leaves_an_onnx_file_a_film_a_card_and_a_page(found):
    names = {"policy.safetensors", "policy.onnx", "card.md", "report.html", "game.mp4", "config.json", "result.json"}
    assert {path.name for path in found.out.iterdir()} == names | {"games.json", "runs"}
    record = json.loads((found.out / "result.json").read_bytes())
    card, page = ((found.out / name).read_text() for name in ("card.md", "report.html"))
    for text in (card, page):
        assert f"{record['parameters']:,} parameters" in text
        assert "With 95 % confidence" in text
    assert f"| {record['score']:.2f}" in card or f" {record['score']:.2f} " in card


def test_the_page_loads_nothing_and_takes_no_name_for_html(found):
    page = (found.out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page.replace('xlink:href="#', 'href="#'))
    assert "data:video/mp4;base64," in page
    assert "<svg" in page
    assert "&lt;b&gt;&amp;expert" in page
    assert "<b>" not in page


def test_the_student_carries_its_score_into_its_onnx_file(found):
    import onnx

    record = json.loads((found.out / "result.json").read_bytes())
    metadata = {entry.key: entry.value for entry in onnx.load(found.out / "policy.onnx").metadata_props}
    assert json.loads(metadata["score"])["mean"] == record["score"]


def test_a_finished_compression_answers_at_once_and_changes_nothing(found, teacher, call, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in found.out.rglob("*") if path.is_file()}
    monkeypatch.setattr(search, "execute", None)
    monkeypatch.setattr(evaluation, "play", None)
    again = call(teacher, "--out", found.out, "--budget", 20)
    assert again.code == 0
    assert again.out.splitlines()[-1] == str(found.out / "report.html")
    assert {path: path.stat().st_mtime_ns for path in found.out.rglob("*") if path.is_file()} == before


def test_a_page_that_was_not_written_is_written_by_the_next_call(found, teacher, call, monkeypatch):
    (found.out / "report.html").unlink()
    (found.out / "policy.onnx").write_bytes(b"half a file")
    monkeypatch.setattr(search, "execute", None)
    assert call(teacher, "--out", found.out).code == 0
    assert (found.out / "report.html").exists()
    assert len((found.out / "policy.onnx").read_bytes()) > 500


def test_other_settings_in_the_same_folder_are_refused(found, teacher, call):
    other = call(teacher, "--out", found.out, "--keep", "0.5")
    assert other.code == 2
    assert other.err == (
        f"potstill: {found.out} is a compression with other settings or another teacher: choose another --out\n"
    )


def test_not_reached_is_said_with_exit_code_1_and_leaves_no_student(teacher, call, tmp_path):
    out = tmp_path / "out"
    unlearned = [*QUICK, "--learning-rate", "1e-9", "--max-parameters", "20", "--total-timesteps", "128"]
    done = call(teacher, "--out", out, settings=unlearned)
    assert done.code == 1
    assert done.out.startswith("Not reached: no student of at most 20 parameters was shown to keep 95 % of")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "games.json", "result.json", "card.md", "report.html", "runs")
    }
    assert "Not reached" in (out / "report.html").read_text()
    record = json.loads((out / "result.json").read_bytes())
    assert (record["reached"], record["stopped"]) == (False, "decided")


def test_a_search_that_the_budget_ended_goes_on_with_a_larger_one(teacher, call, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "training_seconds", lambda *_: 14 * 60.0)
        patch.setattr(search, "training_seconds", lambda *_: 14 * 60.0)
        ended = call(teacher, "--out", out)
    assert ended.code == 1
    assert "The budget of 15 minutes ended the search; the same command with more goes on." in ended.out
    assert not (out / "runs").exists()
    assert call(teacher, "--out", out).out == ended.out
    assert (out / "report.html").exists()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "execute", stopped)
    assert call(teacher, "--out", out, "--budget", 30).code == 130  # so it was about to train
    assert not (out / "report.html").exists()
    assert json.loads((out / "games.json").read_bytes())["games"].keys() == {"teacher", "random"}


def test_a_budget_that_trains_nothing_is_refused_before_anything_is_made(teacher, call, tmp_path):
    done = call(teacher, "--out", tmp_path / "out", "--budget", "0.00001")
    assert done.code == 2
    assert re.match(r"potstill: a budget of 1e-05 minutes is too short: the smallest student alone takes", done.err)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(teacher, call, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert call(teacher, "--out", tmp_path).code == 2
    run = new_distillation(DistillConfig(total_timesteps=1_024), teacher, tmp_path / "run", RUNTIME)
    done = call(teacher, "--out", run.path)
    assert (done.code, done.err) == (2, f"potstill: {run.path} exists and is no compression: choose another --out\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "notes.txt", "run"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keep", "0"), "keep is a share above 0 and at most 1"),
        (("--keep", "1.5"), "keep is a share above 0 and at most 1"),
        (("--keep", "nan"), "keep is a share above 0 and at most 1"),
        (("--confidence", "1"), "confidence lies between 0.5 and 1"),
        (("--budget", "0"), "budget is a positive number of minutes"),
        (("--budget", "inf"), "budget is a positive number of minutes"),
        (("--games", "1"), "games must be at least 2, not 1"),
        (("--confirm-games", "0"), "confirm-games must be at least 2, not 0"),
        (("--max-parameters", "10"), "max-parameters 10: the smallest student has 11"),
        (("--width", "1/8"), "bound it with --max-parameters"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line_and_exit_code_2(words, said, teacher, call, tmp_path):
    done = call(teacher, "--out", tmp_path / "out", settings=[*QUICK, *words])
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_a_missing_teacher_is_one_line(call, tmp_path):
    done = call(tmp_path / "nobody", "--out", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "nobody" in done.err
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_command_says_so_before_it_trains(teacher, call, tmp_path, monkeypatch):
    monkeypatch.setattr(outcome, "find_spec", lambda name: None)
    done = call(teacher, "--out", tmp_path / "out")
    assert (done.code, done.err) == (2, "potstill: compress needs onnx: pip install 'potstill[onnx]'\n")


def test_damaged_games_are_one_line(teacher, call, tmp_path):
    run = outcome.open_compression(teacher, CompressConfig(), tmp_path / "out", RUNTIME)
    (run.path / "games.json").write_text('{"seconds": 1')
    with pytest.raises(InputError, match=r"games.json is damaged: choose another --out"), run.lock():
        list(outcome.search(run, CompressConfig(), RUNTIME))


@pytest.mark.parametrize("kind", ["teacher", "random"])
def test_games_are_cut_at_the_step_at_which_time_is_up(teacher, tmp_path, monkeypatch, kind):
    run = outcome.open_compression(teacher, CompressConfig(), tmp_path / "out", RUNTIME)
    state = Search(run, CompressConfig(budget=1 / 60), RUNTIME)  # 0.9 seconds: the teacher balances for 500 steps
    state.teacher.policy.trunk.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    monkeypatch.setattr(search, "load_policy", lambda *_: state.teacher)
    with run.lock(), pytest.raises(TimeUp):
        state.play(kind)
    assert state.spent < 5.0
    assert state.games == {}


def test_training_stops_when_time_is_up_and_a_larger_budget_goes_on_with_it(teacher, tmp_path):
    base = DistillConfig(network=NetworkConfig("1/64"), total_timesteps=10_000_000, num_envs=8, batch_size=64)
    config = CompressConfig(base=replace(base, precision="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "training_seconds", lambda *_: 1.0)
        run = outcome.open_compression(teacher, config, tmp_path / "out", RUNTIME)
    state = Search(run, config, RUNTIME)
    with run.lock(), pytest.raises(TimeUp):
        state.train(["1/64"], 1.0, keep=60 * 15 * 0.9 - 3.0)
    assert state.spent < 60.0
    assert Run.open(run.path / "runs" / state.run_name("1/64")).status in ("new", "interrupted")
    assert not state.trained("1/64")
    assert (state.errors, state.rates["training"]) == ({}, 1.0)


def test_a_stable_baselines3_zip_is_imported_into_the_folder(tmp_path):
    from stable_baselines3 import PPO

    from potstill.load import Origin
    from potstill.load.sb3 import as_sb3

    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).save(tmp_path / "model.zip")
    env = as_sb3(TASKS["cartpole"].env)
    for _ in range(2):  # the second call opens what the first made
        run = outcome.open_compression(Origin(tmp_path / "model.zip", env), CompressConfig(), tmp_path / "out", RUNTIME)
    assert Search(run, CompressConfig(), RUNTIME).teacher.policy.size().parameters == 4_610
    assert Run.open(run.path).config["teacher"].endswith("model.zip")


def test_labels_of_sizes_that_lie_close_together_are_left_out():
    sizes = [parameters for _, parameters in ladder(Policy(NetworkConfig("1/2"), (4, 84, 84), 3), None)]
    assert [sizes[place] for place in compression._apart(sizes)] == [
        *(239_487, 107_307, 60_849, 27_479, 15_702, 7_197, 4_324, 1_964, 711)
    ]
    assert compression._apart([500]) == [0]


def test_bounds_are_rounded_down():
    assert compression._floor(0.94999) == "94.9"
