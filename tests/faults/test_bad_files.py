"""Files in a study's folder that are damaged, another run's, or no record: each is named, and the others go on."""

import json
import shutil
from types import SimpleNamespace

import pytest
from processes import Here

from potstill.report.page import read_study
from potstill.results import runs_table
from potstill.study import records
from potstill.study.planfile import read_plan
from potstill.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=1, quiet=True)
BAD, GOOD = (f"rl_width-1_32_seed-{seed}" for seed in range(2))
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0, 1]

[evaluation]
episodes = 2

[arms.rl]
total-timesteps = 1024
num-steps = 32
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of two runs that is done."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "plan.toml").write_text(PLAN)
    plan = read_plan(folder / "plan.toml")
    ended = list(records.run_study(plan, folder / "out", RUNTIME, workers=1, start=Here))
    assert [each.error for each in ended] == [None] * 2
    return SimpleNamespace(folder=folder, plan=plan, out=folder / "out")


def write(content):
    return lambda path: path.write_bytes(content)


def change(**facts):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_bytes()) | facts))


def take(path):
    """Puts the other run's file there."""
    shutil.copy(str(path).replace(BAD, GOOD), path)


def link(path):
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def begin_again(path):
    """Leaves of a run what one has that was killed while it saved."""
    for name in ("result.json", "policy.safetensors"):
        path.with_name(name).unlink()
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{torn")


RUN, RECORD = f"runs/{BAD}/", f"{BAD}.json"
TEXTS = {"empty": b"", "torn": b'{"kind": "tra', "zeros": bytes(40), "a list": b"[]", "not finite": b'{"score": NaN}'}
NEWER = (change(format=2), "has format 2, this potstill reads up to 1")
LINK = (link, "it is a symbolic link")
OTHERS = "is not the one that the run beside it wrote"
FILES = {  # what is done to one file, and what is said of it
    **{(f"{RUN}config.json", how): (write(content), "is damaged: it is not") for how, content in TEXTS.items()},
    (f"{RUN}config.json", "newer"): NEWER,
    **{(f"{RUN}result.json", how): (write(content), "is damaged: it is not") for how, content in TEXTS.items()},
    (f"{RUN}result.json", "newer"): NEWER,
    (f"{RUN}result.json", "a link"): LINK,
    (f"{RUN}result.json", "edited"): (change(score=1e6), "was changed after it was written"),
    (f"{RUN}result.json", "another's"): (take, "config.json is not the one its result.json belongs to"),
    (f"{RUN}metrics.jsonl", "no JSON"): (write(b"no\n"), OTHERS),
    (f"{RUN}metrics.jsonl", "another's"): (take, OTHERS),
    **{(RECORD, how): (write(content), "is damaged: it is not") for how, content in TEXTS.items()},
    (RECORD, "newer"): NEWER,
    (RECORD, "a link"): LINK,
    (RECORD, "a text for a score"): (change(score="high"), "is damaged: its score is 'high'"),
    (RECORD, "another's"): (take, "it does not say that it is"),
    ("notes.json", "no record"): (write(b'{"buy": "milk"}'), "is no record of a run of a study"),
    ("notes.json", "torn"): (write(TEXTS["torn"]), "is damaged: it is not JSON"),
    (f"{RUN}resume.safetensors", "torn"): (begin_again, "it begins again"),
    ("study.json", "torn"): (write(TEXTS["torn"]), ""),
}
assert len(FILES) >= 17


@pytest.mark.parametrize(("name", "how"), FILES, ids=[f"{name} {how}" for name, how in FILES])
def test_a_bad_file_is_named_and_the_other_runs_go_on(whole, tmp_path, capsys, name, how):
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    harm, words = FILES[name, how]
    harm(out / name)
    for record in [GOOD] + [BAD] * name.startswith(RUN):
        (out / f"{record}.json").unlink()  # as if the study had been killed before it wrote it
    fails, before = name.startswith((RUN, RECORD)) and harm is not begin_again, (out / name).read_bytes()
    ended = {each.spec.name: each.error for each in records.run_study(whole.plan, out, RUNTIME, workers=1, start=Here)}
    told = [*capsys.readouterr().err.splitlines(), str(ended.get(BAD))]
    assert ended[GOOD] is None
    assert (ended.get(BAD) is not None) == fails
    assert not fails or (out / name).read_bytes() == before  # as it was found
    assert any(words in line and name.rpartition("/")[2].split(".")[0] in line for line in told) or not words
    report = records.status(whole.plan, out)
    assert (report["done"], list(report["failures"])) == ((1, [BAD]) if fails else (2, []))
    done = runs_table(out).filter(status="done")["run"].to_list()
    assert done == [GOOD] if fails else [BAD, GOOD]
    assert {record["run"] for record in read_study(out).records} >= set(done)
