import base64
import json
import re
import shutil
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import gymnasium
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants
from processes import Child, python
from small_runs import sharpened
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from potstill.envs import EnvConfig, Envs
from potstill.export import hub
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.storage import checkpoints
from potstill.tasks import TASKS

REPO = "stiller/cart"
RESULT = {
    "status": "done",
    "kind": "distill",
    "teacher": "runs/large",
    "score": 210.5,
    "ci95": [180.25, 240.75],
    "std": 20.5,
    "episodes": 20,
    "distinct": 19,
    "score_sampled": 150.0,
    "score_nosticky": None,
    "latency_ms": 0.125,
    "wall_seconds": 120.0,
    "command": "potstill distill runs/large --width 1/8",
    "commit": "0123456789ab",
    "machine": "a processor, 1 thread",
}
CONFIG = {"kind": "distill", "config": {"seed": 0}, "command": RESULT["command"]}
TOKEN, READER = "hf_writes", "hf_reads"


@dataclass
class Repository:
    """Commits, oldest first: name and files by path."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, files, message=""):
        self.commits.append((sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest(), files))
        self.messages.append(message)

    def at(self, revision):
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    @property
    def files(self):
        return self.commits[-1][1]


class StandIn(ThreadingHTTPServer):
    """What of the Hub's API huggingface_hub calls for these two commands, with Git LFS behind another origin."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.seen: list[str] = []
        self.tokens_at_storage = []
        self.sizes: dict[str, int] = {}  # instead of the true ones
        self.fail: dict[str, int] = {}  # a request's beginning -> status

    def handle_error(self, request, client_address):
        pass  # a client that stops reading is no fault of ours

    def commit(self, files, repo=REPO, private=False):
        self.repositories.setdefault(repo, Repository(private)).commit(files)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *arguments):
        pass

    def reply(self, status=200, body=None, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code="", message=""):
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{self.command} {path}")
        for beginning, status in self.server.fail.items():
            if f"{self.command} {path}".startswith(beginning):
                return self.refuse(status, message="out of order")
        if path.startswith("/storage/"):
            return self.store(path.removeprefix("/storage/"))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if self.command == "POST" and not path.endswith("validate-yaml") and token != TOKEN:
            return self.refuse(403 if token else 401, message="a token that may write is needed")
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            ModelCard(json.loads(self.content)["content"])
            return self.reply(body={"errors": [], "warnings": []})
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                name, *rest = match.groups()
                repository = self.server.repositories.get(name)
                if repository is None or (repository.private and token != TOKEN):
                    return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
                return answer(repository, *rest)
        return self.refuse(404)

    do_POST = do_PUT = do_HEAD = do_GET

    def create(self):
        wanted = json.loads(self.content)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not name.startswith("stiller/"):
            return self.refuse(403, message="not your namespace")
        if name in self.server.repositories:
            return self.reply(409, {"url": f"{self.server.endpoint}/{name}", "error": "You already created this model"})
        self.server.commit({".gitattributes": b"*.safetensors filter=lfs"}, name, wanted.get("visibility") == "private")
        return self.reply(body={"url": f"{self.server.endpoint}/{name}"})

    def info(self, repository, revision=None):
        found = repository.at(revision or "main")
        if found is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        sha, files = found
        siblings = [{"rfilename": name} for name in files]
        if "blobs" in self.query:
            siblings = [{"rfilename": k, "size": self.server.sizes.get(k, len(v))} for k, v in files.items()]
        return self.reply(body={"id": REPO, "sha": sha, "private": repository.private, "siblings": siblings})

    def preupload(self, repository):
        files = json.loads(self.content)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".mp4")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        return self.reply(body={"files": modes})

    def batch(self, repository):
        wanted = json.loads(self.content)
        assert "basic" in wanted["transfers"]
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.server.storage}/{o['oid']}"}}}
            for o in wanted["objects"]
        ]
        return self.reply(body={"transfer": "basic", "objects": objects})

    def store(self, oid):
        self.server.tokens_at_storage.append(self.headers.get("Authorization"))
        if self.command == "PUT":
            assert sha256(self.content).hexdigest() == oid
            self.server.large[oid] = self.content
            return self.reply(body={})
        return self.reply(body=self.server.large[oid])

    def commit(self, repository):
        files = dict(repository.files)
        for line in self.content.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repository.commit(files, message)
        url = f"{self.server.endpoint}/{REPO}/commit/{repository.commits[-1][0]}"
        return self.reply(body={"commitUrl": url, "commitOid": repository.commits[-1][0]})

    def resolve(self, repository, revision, name):
        sha, files = repository.at(revision)
        content = files[name]
        headers = {"X_Repo_Commit": sha, "ETag": f'"{sha256(content).hexdigest()}"'}
        if name.endswith(".safetensors"):
            oid = sha256(content).hexdigest()
            self.server.large[oid] = content
            headers |= {"X_Linked_Size": str(len(content)), "X_Linked_Etag": f'"{oid}"'}
            return self.reply(302, b"", Location=f"{self.server.storage}/{oid}", **headers)
        return self.reply(body=content, **headers)


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """The stand-in, where huggingface_hub would find the Hub."""
    server = StandIn()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)  # it was read from HF_ENDPOINT on import
    template = server.endpoint + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    monkeypatch.chdir(tmp_path)
    yield server
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def cart(tmp_path_factory):
    """A run directory that is done: a policy of CartPole with opinions of its own."""
    folder = tmp_path_factory.mktemp("runs") / "cart"
    folder.mkdir()
    with closing(Envs(TASKS["cartpole"].env, 8)) as envs:
        probe = envs.reset(0)
        policy = Policy(NetworkConfig("1/8"), envs.observation_shape, envs.num_actions)
    sharpened(policy, seed=3, times=100)
    save_policy(folder / "policy.safetensors", policy, TASKS["cartpole"].env, probe, {"seed": 0})
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def refused(answer, words):
    code, out, err = answer
    assert (code, out) == (2, "")
    assert words in err
    assert (err.startswith("potstill: "), err.count("\n")) == (True, 1)
    return True


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(folder=Path()):
    """What lies in the working directory, hidden files included."""
    return {path.name for path in folder.iterdir()} - {"cache"}


def test_a_policy_comes_back_as_it_went(standin, cart, call):
    code, url, _ = call("push", cart, REPO)
    repository = standin.repositories[REPO]
    assert (code, url) == (0, f"{standin.endpoint}/{REPO}/commit/{repository.commits[-1][0]}\n")
    assert set(repository.files) == {"policy.safetensors", "result.json", "config.json", "README.md", ".gitattributes"}
    for name in ("policy.safetensors", "result.json", "config.json"):
        assert repository.files[name] == (cart / name).read_bytes()
    assert len(repository.commits) == 2  # the one that made it, and ours

    code, out, _ = call("pull", REPO, "--out", "pulled")
    assert code == 0
    assert out.splitlines()[0] == "pulled"
    assert repository.commits[-1][0] in out
    assert contents(Path("pulled")) == {k: v for k, v in repository.files.items() if k != ".gitattributes"}
    assert left() == {"pulled"}
    assert standin.tokens_at_storage == [None, None]  # up and down: the token stays with the Hub

    sent, received = load_policy(cart), load_policy(Path("pulled"))
    observations = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sent.policy(observations)[0], received.policy(observations)[0])
    assert (received.env, received.document) == (sent.env, sent.document)


def test_hf_endpoint_names_another_hub(standin, cart, tmp_path):
    surroundings = {
        "HF_ENDPOINT": standin.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    code = "import sys; from potstill.cli import main; main(sys.argv[1:])"
    for words in (["push", cart, REPO], ["pull", REPO, "--out", tmp_path / "pulled"]):
        out, errors = tmp_path / "out", tmp_path / "errors"
        child = Child(python, code, surroundings, *words, output=out, errors=errors)  # which reads them as it starts
        assert (child.wait(), errors.read_text()) == (0, "")
    assert (tmp_path / "pulled" / "policy.safetensors").read_bytes() == (cart / "policy.safetensors").read_bytes()


def test_the_cards_metadata_are_what_huggingface_hub_reads(standin, cart, call):
    assert call("push", cart, REPO, "--license", "apache-2.0")[0] == 0
    text = standin.repositories[REPO].files["README.md"].decode()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("potstill", "reinforcement-learning", "apache-2.0")
    assert data.tags == ["reinforcement-learning", "CartPole-v1"]
    (result,) = data.eval_results
    assert (data.model_name, result.task_type) == ("cart", "reinforcement-learning")
    assert (result.dataset_name, result.dataset_type) == ("CartPole-v1", "CartPole-v1")
    assert (result.metric_type, result.metric_value) == ("mean_reward", "210.50 +/- 20.50")


def test_the_card_says_what_was_measured_and_how_to_measure_it_again(standin, cart, call):
    assert call("push", cart, REPO)[0] == 0
    lines = standin.repositories[REPO].files["README.md"].decode().splitlines()
    size = load_policy(cart).policy.size()
    assert any(f"width 1/8, {size.parameters:,} parameters, {size.macs:,} multiply-adds" in line for line in lines)
    assert any(line.endswith("Distilled from `runs/large`.") for line in lines)
    assert "| greedy (20 games, 19 distinct) | **210.50** | 180.25 to 240.75 |" in lines
    assert "| sampled | 150.00 | |" in lines
    assert not any("no sticky actions" in line for line in lines)  # which CartPole does not have
    for line in (
        "- Command: `potstill distill runs/large --width 1/8`",
        "- Commit: `0123456789ab`",
        "- Machine: a processor, 1 thread",
        "- Training: 2 minutes",
        f"potstill pull {REPO} --out cart",
        "potstill evaluate cart --episodes 20 --seed 1",
    ):
        assert line in lines


def test_the_card_says_what_the_policy_sees_and_that_it_remembers(standin, call, tmp_path):
    policy = Policy(NetworkConfig("1/8", "gru"), (4,), 2, dtype="float32", view=("noise=0.1", "keep=0,2"))
    task = EnvConfig("CartPole-v1", view=policy.view)
    save_policy(tmp_path / "policy.safetensors", policy, task, np.zeros((1, 4), np.float32), {})
    assert call("push", tmp_path / "policy.safetensors", REPO)[0] == 0
    (line,) = (line for line in standin.repositories[REPO].files["README.md"].decode().splitlines() if "width" in line)
    assert line.endswith(
        "The environment shows it noise=0.1: a file reads what is so shown. Of an observation it sees keep=0,2: a file"
        " does so itself. Its state of 8 numbers goes from step to step, zero where a game begins."
    )


def test_an_atari_policys_task_goes_by_gymnasiums_name(standin, call):
    expert = Path(__file__).parents[2] / "data" / "experts" / "pong" / "seed-0"
    assert call("push", expert, "stiller/pong")[0] == 0
    text = standin.repositories["stiller/pong"].files["README.md"].decode()
    result = json.loads((expert / "result.json").read_text())
    assert ModelCard(text).data.eval_results[0].dataset_type == "ALE/Pong-v5"
    assert ModelCard(text).data.eval_results[0].metric_value == f"{result['score']:.2f} +/- {result['std']:.2f}"
    assert f"| greedy, sticky actions 0.25 (100 games, 100 distinct) | **{result['score']:.2f}** |" in text


def test_a_policy_without_a_result_claims_none(standin, cart, call):
    shutil.copy(cart / "policy.safetensors", "student.safetensors")
    Path("result.json").write_text(json.dumps(RESULT))  # of who knows what
    assert call("push", "student.safetensors", REPO)[0] == 0
    files = standin.repositories[REPO].files
    assert set(files) == {".gitattributes", "policy.safetensors", "README.md"}
    assert ModelCard(files["README.md"].decode()).data.eval_results is None
    assert b"It has not been scored." in files["README.md"]


def test_a_film_lies_where_the_hub_plays_it(standin, cart, call):
    Path("game.mp4").write_bytes(b"\0\0\0\x20ftypisom, a film")
    assert call("push", cart, REPO, "--film", "game.mp4", "--message", "The first")[0] == 0
    repository = standin.repositories[REPO]
    assert repository.files["replay.mp4"] == Path("game.mp4").read_bytes()
    assert repository.messages[-1] == "The first"
    assert b"(replay.mp4)" in repository.files["README.md"]
    assert call("pull", REPO, "--out", "pulled")[0] == 0
    assert left(Path("pulled")) == {"policy.safetensors", "result.json", "config.json", "README.md"}


def test_a_second_push_leaves_nothing_of_the_first_but_what_others_put_there(standin, cart, call):
    Path("game.mp4").write_bytes(b"a film of the first")
    assert call("push", cart, REPO, "--film", "game.mp4")[0] == 0
    repository = standin.repositories[REPO]
    repository.commit(repository.files | {"notes.txt": b"mine"})
    Path("bare").mkdir()
    shutil.copy(cart / "policy.safetensors", "bare")
    assert call("push", "bare", REPO)[0] == 0
    assert set(repository.files) == {".gitattributes", "notes.txt", "policy.safetensors", "README.md"}
    assert len(repository.commits) == 4
    assert repository.messages[-1].startswith("CartPole-v1, width 1/8 (potstill ")


def test_private_means_private(standin, cart, call):
    assert call("push", cart, REPO, "--private")[0] == 0
    assert standin.repositories[REPO].private
    standin.commit({}, "stiller/open")
    assert refused(call("push", cart, "stiller/open", "--private"), "stiller/open exists and is public")
    assert standin.repositories["stiller/open"].files == {}
    assert call("push", cart, "stiller/public")[0] == 0
    assert not standin.repositories["stiller/public"].private


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("", REPO, "the Hub wants to know who pushes: run `hf auth login`, or set HF_TOKEN"),
        ("hf_forgotten", REPO, "does not know your token: run `hf auth login`, or set HF_TOKEN"),
        (READER, REPO, f"forbids it for {REPO} (a token that may write is needed): your token may lack the right"),
        (TOKEN, "somebody/cart", "forbids it for somebody/cart (not your namespace): your token may lack the right"),
        (TOKEN, "cart", "'cart' is no name of a repository: write USER/NAME"),
        (TOKEN, "stiller/a--b", "'stiller/a--b' is no name of a repository: "),
    ],
)
def test_a_push_without_the_right_is_one_line_and_commits_nothing(standin, cart, call, monkeypatch, token, repo, words):
    monkeypatch.setenv("HF_TOKEN", token)
    assert refused(call("push", cart, repo), words)
    assert standin.repositories == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ["nowhere"], "cannot read nowhere: no such file or directory"),
        (lambda: ["bare", "--film", "nowhere.mp4"], "nowhere.mp4 is not a film: make an .mp4 with `potstill watch"),
        (lambda: ["bare", "--film", "bare/policy.safetensors"], "is not a film"),
        (lambda: Path("bare/result.json").write_text("{") and ["bare"], "bare/result.json is damaged: it is not JSON"),
        (
            lambda: Path("bare/result.json").write_text("[]") and ["bare"],
            "bare/result.json is damaged: it is not a JSON object",
        ),
        (
            lambda: Path("bare/result.json").write_text('{"score": "high"}') and ["bare"],
            "is not one that potstill wrote",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(standin, cart, call, make, words):
    Path("bare").mkdir()
    shutil.copy(cart / "policy.safetensors", "bare")
    path, *options = make()
    assert refused(call("push", path, REPO, *options), words)
    assert standin.seen == []


def test_a_hub_out_of_order_is_told_apart_from_a_mistake(standin, cart, call):
    standin.fail = {"POST /api/models": 503}
    code, out, err = call("push", cart, REPO)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"{standin.endpoint} answers 503, out of order; try again later")
    assert list(standin.repositories[REPO].files) == [".gitattributes"]
    standin.fail = {"PUT /storage": 507}
    assert "answers 507" in call("push", cart, REPO)[2].splitlines()[-1]
    standin.fail = {"GET /api/models": 418}
    assert refused(call("pull", REPO, "--out", "pulled"), "answers 418, out of order")
    assert left() == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stiller/nothing"], "has no model stiller/nothing, or it is private: look at its name, and log in with"),
        ([REPO, "--revision", "v9/x"], f"{REPO} has no revision 'v9/x'"),
        (["cart"], "'cart' is no name of a repository: write USER/NAME"),
        (["../../etc/passwd"], "'../../etc/passwd' is no name of a repository: write USER/NAME"),
        ([REPO, "--out", "there"], "there exists: choose another --out"),
        ([REPO, "--out", "file/pulled"], "cannot make file/pulled: "),
    ],
)
def test_a_bad_option_of_pull_is_one_line_and_leaves_nothing(standin, cart, call, words, said):
    standin.commit({"policy.safetensors": (cart / "policy.safetensors").read_bytes()})
    Path("there").mkdir()
    Path("file").touch()
    assert refused(call("pull", *words, *([] if "--out" in words else ["--out", "pulled"])), said)
    assert left() == {"there", "file"}
    assert left(Path("there")) == set()


def test_a_private_repository_opens_with_its_token_only(standin, cart, call, monkeypatch):
    standin.commit({"policy.safetensors": (cart / "policy.safetensors").read_bytes()}, private=True)
    for token in ("", READER):
        monkeypatch.setenv("HF_TOKEN", token)
        assert refused(call("pull", REPO, "--out", "pulled"), f"has no model {REPO}, or it is private")
    assert left() == set()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert call("pull", REPO, "--out", "pulled")[0] == 0


def test_an_older_revision_is_pulled_by_its_commit(standin, cart, call):
    content = (cart / "policy.safetensors").read_bytes()
    standin.commit({"policy.safetensors": content})
    standin.commit({"policy.safetensors": b"a later one"})
    first = standin.repositories[REPO].commits[0][0]
    assert call("pull", REPO, "--out", "pulled", "--revision", first)[0] == 0
    assert contents(Path("pulled")) == {"policy.safetensors": content}


@pytest.mark.parametrize("name", ["model.pt", "weights/policy.PTH", "pytorch_model.bin", "agent.pkl", "ppo.zip"])
def test_pickles_are_never_downloaded(standin, cart, call, name):
    standin.commit({name: b"a pickle", "README.md": b"# read me"})
    words = f"{REPO} has no policy.safetensors, only {name}: a pickle"
    if name == "ppo.zip":  # of which --env would read the tensors
        words = f"{REPO} does not name its task: add --env"
    assert refused(call("pull", REPO, "--out", "pulled"), words)
    assert left() == set()
    standin.commit({name: b"a pickle", "policy.safetensors": (cart / "policy.safetensors").read_bytes(), "run.py": b""})
    assert call("pull", REPO, "--out", "pulled")[0] == 0
    assert left(Path("pulled")) == {"policy.safetensors"}
    assert not any(name in request or "run.py" in request for request in standin.seen)


def test_a_repository_of_something_else_is_refused(standin, call):
    standin.commit({"README.md": b"# read me", "model.safetensors": b"of another family"})
    assert refused(call("pull", REPO, "--out", "pulled"), f"{REPO} has no policy.safetensors: it was not pushed by")
    assert left() == set()


@pytest.mark.parametrize("name", ["../policy.safetensors", "a/../../b", "/etc/passwd", "a\\..\\b", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(standin, cart, call, name):
    standin.commit({"policy.safetensors": (cart / "policy.safetensors").read_bytes(), name: b"a trap"})
    assert refused(call("pull", REPO, "--out", "pulled"), "a name that leads out of its folder")
    assert left() == set()
    assert not any("resolve" in request for request in standin.seen)


@pytest.mark.parametrize("name", hub.MAX_BYTES)
def test_a_file_too_large_is_refused_before_it_is_downloaded(standin, cart, call, name):
    standin.commit({"policy.safetensors": (cart / "policy.safetensors").read_bytes(), name: b"{}"})
    standin.sizes = {name: hub.MAX_BYTES[name] + 1}
    assert refused(call("pull", REPO, "--out", "pulled"), f"{name} has {hub.MAX_BYTES[name] + 1:,} bytes; at most")
    assert not any("resolve" in request for request in standin.seen)
    standin.sizes = {name: None}
    assert refused(call("pull", REPO, "--out", "pulled"), f"{name} has an unknown number of bytes")
    assert left() == set()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("policy.safetensors", lambda whole: whole[:-8], f"{REPO}/policy.safetensors is truncated"),
        (
            "policy.safetensors",
            lambda whole: whole[:-1] + b"\x7f",
            f"{REPO}/policy.safetensors is damaged: it does not hold what was saved",
        ),
        ("policy.safetensors", lambda whole: b"\x80\x04not tensors", f"{REPO}/policy.safetensors is not a safetensors"),
        ("result.json", lambda whole: b"{", f"{REPO}/result.json is damaged: it is not JSON"),
        ("config.json", lambda whole: b"[" * 100_000, f"{REPO}/config.json is damaged: it is not JSON"),
        ("config.json", lambda whole: b"[]", f"{REPO}/config.json is damaged: it is not a JSON object"),
    ],
)
def test_what_is_damaged_does_not_stay(standin, cart, call, name, content, words):
    files = contents(cart)
    standin.commit(files | {name: content(files[name])})
    assert refused(call("pull", REPO, "--out", "deep/pulled"), words)
    assert left() == set()


def test_a_checkpoint_that_is_no_policy_does_not_stay(standin, tmp_path, call):
    checkpoints.save(tmp_path / "resume.safetensors", {"x": torch.zeros(1)}, {"kind": "resume"})
    standin.commit({"policy.safetensors": (tmp_path / "resume.safetensors").read_bytes()})
    assert refused(call("pull", REPO, "--out", "pulled"), "is a potstill checkpoint but not a policy")
    assert left() == {"resume.safetensors"}


def test_without_a_network_nothing_is_left(standin, cart, call, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    said = "cannot reach http://127.0.0.1:9: Connection refused"
    assert refused(call("pull", REPO, "--out", "pulled"), said)
    assert refused(call("push", cart, REPO), said)
    monkeypatch.setattr(constants, "ENDPOINT", "127.0.0.1:9")
    assert refused(call("pull", REPO, "--out", "pulled"), "cannot reach 127.0.0.1:9: ")
    assert left() == set()


def test_a_download_that_is_cut_off_leaves_nothing(standin, cart, call, monkeypatch):
    standin.commit(contents(cart))
    standin.fail = {"GET /storage": 500}
    assert "answers 500" in call("pull", REPO, "--out", "pulled")[2].splitlines()[-1]
    assert left() == set()

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    standin.fail = {}
    monkeypatch.setattr(hub, "load", stop)
    assert call("pull", REPO, "--out", "pulled")[0] == 130
    assert left() == set()


@pytest.mark.parametrize("words", [["push", "anything", REPO], ["pull", REPO, "--out", "pulled"]])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, call, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = f"{words[0]} needs huggingface_hub: pip install 'potstill[hub]'"
    assert refused(call(*words), said)
    assert left() == set()


def test_a_stable_baselines3_repository_is_imported_and_no_pickle_of_it_is_run(standin, call, tmp_path):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=0, device="cpu")
    model.save(tmp_path / "model.zip")
    statistics = VecNormalize(DummyVecEnv([lambda: gymnasium.make("CartPole-v1")]), clip_obs=5.0)
    statistics.save(str(tmp_path / "vec_normalize.pkl"))
    files = {"ppo-CartPole-v1.zip": (tmp_path / "model.zip").read_bytes(), "train_eval_metrics.zip": b"no policy"}
    files |= {"vec_normalize.pkl": (tmp_path / "vec_normalize.pkl").read_bytes(), "results.json": b"{}"}
    standin.commit(files, "sb3/ppo-CartPole-v1")
    assert refused(call("pull", "sb3/ppo-CartPole-v1", "--out", "new"), "does not name its task: add --env")
    code, _, err = call("pull", "sb3/ppo-CartPole-v1", "--out", "new", "--env", "cartpole")
    assert code == 0, err
    loaded = load_policy(Path("new"))
    assert loaded.policy.clip == 5.0
    assert loaded.document["provenance"]["repository"] == "sb3/ppo-CartPole-v1"
    seen = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    expected, _ = model.predict(np.clip(seen / np.sqrt(1 + 1e-8), -5, 5), deterministic=True)
    assert np.array_equal(loaded.policy(torch.from_numpy(seen))[0].argmax(1), expected)
    assert not any("train_eval" in line for line in standin.seen)
    assert left() == {"new", "model.zip", "vec_normalize.pkl"}

    files["vec_normalize.pkl"] = b"cos\nsystem\n(S'touch owned'\ntR."
    standin.commit(files, "sb3/ppo-CartPole-v1")
    assert refused(call("pull", "sb3/ppo-CartPole-v1", "--out", "evil", "--env", "cartpole"), "no VecNormalize of")
    assert left() == {"new", "model.zip", "vec_normalize.pkl"}
