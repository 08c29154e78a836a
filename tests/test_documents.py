"""README's Python runs, the checks of the documents find what they are for, and the site says what the code says."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import call, python

import potstill
from potstill.distill import DistillConfig
from potstill.menu import COMMANDS
from potstill.results import COLUMNS
from potstill.study.planfile import read_plan

ROOT = Path(__file__).parents[1]


def always_left(observations):
    return np.zeros(len(observations), np.int64)


@pytest.fixture(scope="module")
def checks():
    return runpy.run_path(str(ROOT / "scripts" / "check_docs.py"))


@pytest.fixture
def site(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield runpy.run_path(str(ROOT / "scripts" / "site.py"))
    sys.modules.pop("check_docs", None)


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    small = "total_timesteps=2_048, threads=1, episodes=4"
    code = code.replace("total_timesteps=60_000", small).replace('"1/8")', f'"1/8", {small})')
    code = code.replace("episodes=100", "episodes=4, threads=1").replace('onnx")', 'onnx", episodes=0, threads=1)')
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["student"], type(names["teacher"]))
    assert names["score"]["episodes"] == 4
    assert (tmp_path / "student.onnx").stat().st_size > 0
    teacher, student = capsys.readouterr().out.splitlines()[0].split()
    assert int(student) < int(teacher) / 8


def test_a_sentence_that_is_too_long_and_a_word_that_decorates_are_told(checks):
    hard = checks["hard_to_read"]
    limit = checks["LONGEST"]
    assert hard("word " * limit + ".\n") == []
    assert hard("word " * (limit + 1) + ".\n")[0].startswith(f"{limit + 1} words in one sentence: word word")
    assert hard(f"{'word ' * 20}. Then {'word ' * 20}.\n") == []
    assert hard(f"- {'word ' * 20}\n- {'word ' * 20}\n\n| {'word ' * 20} | {'word ' * 20} |\n") == []
    assert hard(f"# {'word ' * 40}\n\n<!-- {'word ' * 40} -->\n") == []
    assert hard("This is simply `just` so.\n") == ["the word 'simply' only decorates"]


SMALL = {
    "train": ["--total-timesteps", "256", "--num-envs", "4", "--num-steps", "16", "--minibatch-size", "32"],
    "distill": ["--total-timesteps", "256", "--num-envs", "4", "--warmup-steps", "64"],
}


def test_the_commands_for_a_task_of_ones_own_run(tmp_path):
    """A network, a loss and a teacher of one's own, too; the runs are shorter."""
    page = (ROOT / "docs" / "howto" / "task.md").read_text().replace("\\\n", " ").replace("runs/", f"{tmp_path}/")
    commands = []
    for line in re.findall(r"^potstill (.*)$", page, re.MULTILINE):
        words = line.split()
        if words[0] in SMALL:
            words += [*SMALL[words[0]], "--evaluate", "2", "--threads", "1", "--quiet"]
        commands.append([word if word != "100" else "2" for word in words])
    assert [words[0] for words in commands] == ["train", "distill", "evaluate", "distill"]
    one = (
        "import json, os, sys; from potstill.cli import main; os.chdir(sys.argv[2])\n"
        "for words in json.loads(sys.argv[1]):\n    try: main(words)\n"
        "    except SystemExit as stop: assert not stop.code"
    )
    code, said = call(python, one, {}, json.dumps(commands), ROOT, output=tmp_path / "log")
    assert code == 0, said
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("teacher", "student", "scripted")]
    assert [result["env"] for result in results] == ["Corridor-v0"] * 3
    assert [result["objective"] for result in results[1:]] == ["my_tasks:hellinger", "greedy-cross-entropy"]
    assert results[1]["parameters"] < results[0]["parameters"]


@pytest.mark.parametrize(("page", "runs"), [("examples/plan.toml", None), ("docs/howto/study.md", 20)])
def test_the_plans_of_the_documents_can_be_read(tmp_path, monkeypatch, page, runs):
    monkeypatch.setenv("POTSTILL_IMPORT", "")
    text = (ROOT / page).read_text()
    (plan,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL) or [text]
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "my_tasks.py").write_text("")
    (tmp_path / "plans" / "mine.toml").write_text(plan)
    specs = read_plan(tmp_path / "plans" / "mine.toml").specs()
    assert len(specs) == runs if runs else specs


def test_the_readme_has_no_commits_and_no_machines():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,40}\b|Xeon|EPYC", text)


def test_the_reference_has_every_command_and_every_column(site):
    shown, table = site["command_line"](), site["columns"]()
    for name in COMMANDS:
        assert f"## potstill {name}\n\n```text\nusage: potstill {name}" in shown
    assert [row.split("`")[1] for row in table.splitlines()[2:]] == list(COLUMNS)


def test_the_metrics_of_the_reference_are_those_that_trainings_write(site, tmp_path):
    with (ROOT / "data" / "experts" / "pong" / "seed-0" / "metrics.jsonl").open() as lines:
        assert list(json.loads(lines.readline())) == site["PPO"]
    config = DistillConfig(total_timesteps=2048, num_envs=4, warmup_steps=256)
    run = potstill.distill(always_left, env="cartpole", config=config, out=tmp_path / "run", threads=1, episodes=0)
    written = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(written) == {*site["DISTILLATION"]} - {"action_difference"}


def test_the_python_reference_has_everything_public():
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    told = set(re.findall(r"^::: potstill(?:\.\w+)*\.(\w+)$", page, re.MULTILINE))
    assert set(potstill.__all__) - told == set()


def test_a_page_that_loads_from_elsewhere_stops_the_build(site):
    class Page:
        class file:
            src_path = "index.md"

    own = '<script src="assets/a.js"></script><a href="https://example.org">a link</a>'
    assert site["on_post_page"](own, page=Page) == own
    with pytest.raises(SystemExit, match=r"index\.md loads https://example\.org/a\.js"):
        site["on_post_page"]('<script src="https://example.org/a.js"></script>', page=Page)


def test_a_file_of_code_is_a_link_on_github_and_stands_whole_on_the_site(site):
    pages, shown = {path: path.read_text() for path in (ROOT / "docs").rglob("*.md")}, {}
    for path, text in pages.items():
        assert "--8<--" not in text, path
        linked = re.findall(r"^\[`(.+)`\]\((.+)\)$", text, re.MULTILINE)
        made = site["on_page_markdown"](text) if linked else ""
        for name, target in linked:
            assert (path.parent / target).resolve() == ROOT / name
            assert f'\n```{name.partition(".")[2]} title="{name}"\n{(ROOT / name).read_text()}```\n' in made
            shown[name] = path.name
    files = {"examples/my_tasks.py": "task.md", "examples/plan.toml": "plan.md", "src/potstill/distill.py": "code.md"}
    assert shown == files
