"""The Hugging Face Hub: a policy there with a card of its measured results, or from there, without running anything.

What travels is safetensors and JSON. The Hub shows the card's metadata and plays `replay.mp4`; `pull` downloads the
files that `push` writes, by name, and nothing else of a repository.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from potstill import __version__
from potstill.envs import EnvConfig
from potstill.errors import InputError, causes, need, printable, reason
from potstill.export.actor import demands
from potstill.load import load
from potstill.load.pickles import MAX_BYTES as MAX_STATISTICS_BYTES
from potstill.load.statistics import NAMES as STATISTICS
from potstill.load.weights import write_import
from potstill.policies import LoadedPolicy, load_policy
from potstill.storage.checkpoints import new_folder
from potstill.storage.files import JSON_LIMIT, parse_json
from potstill.storage.runs import read_document

if TYPE_CHECKING:
    from huggingface_hub import HfApi

POLICY, RESULT, CONFIG, CARD, FILM = "policy.safetensors", "result.json", "config.json", "README.md", "replay.mp4"

#: What `pull` downloads, and the most bytes of each: a width-1 Nature-CNN takes 7 MB.
MAX_BYTES = {POLICY: 1 << 30, RESULT: 1 << 24, CONFIG: 1 << 24, CARD: 1 << 20}
MAX_ZIP_BYTES = 1 << 28  # of a Stable-Baselines3 zip
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".zip")
TIMEOUT = 30.0  # seconds for the Hub to say what a repository holds, or anything more
SLOWEST = 10_000.0  # bytes a second of a download that is still waited for
REDIRECTS = 5  # of one answer, at most
T = TypeVar("T")


def push(
    path: Path,
    repo_id: str,
    *,
    private: bool = False,
    film: Path | None = None,
    message: str = "",
    licence: str = "mit",
) -> str:
    """Uploads a policy in one commit: weights, card, and the result.json and config.json beside it where they exist.

    What an earlier push left there and this one does not write, such as another policy's film, is deleted by the same
    commit. Other files are left alone.

    Args:
        path: a run directory, an expert directory or a checkpoint.
        repo_id: USER/NAME; made where it does not exist.
        private: whether it is to be private. A public one is refused then.
        film: an .mp4, uploaded as replay.mp4.
        message: of the commit.
        licence: by the Hub's name for it.

    Returns:
        The commit's URL.

    Raises:
        InputError: no policy there, or a damaged result; no film; no token, or one without the right; the Hub refuses
            or cannot be reached. Nothing is committed then, though a new repository may stay, empty.
    """
    api = _api(repo_id, "push")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    loaded = load_policy(path)
    # Beside a checkpoint of another name, they would be of another policy.
    companions = [loaded.path.with_name(name) for name in (RESULT, CONFIG) if loaded.path.name == POLICY]
    documents = {file.name: read_document(file) for file in companions if file.exists()}
    files: dict[str, Path | bytes] = {POLICY: loaded.path}
    files |= {file.name: file for file in companions if file.name in documents}
    if film is not None:
        if film.suffix.lower() != ".mp4" or not film.is_file():
            raise InputError(f"{film} is not a film: make an .mp4 with `potstill watch {path} --out {film.stem}.mp4`")
        files[FILM] = film
    card = _card(loaded, documents.get(RESULT, {}), documents.get(CONFIG, {}), repo_id, licence, film is not None)
    files[CARD] = card.encode()
    with _one_line(api, repo_id):
        if get_token() is None:
            raise InputError("the Hub wants to know who pushes: run `hf auth login`, or set HF_TOKEN")
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id, timeout=TIMEOUT)
        if private and not info.private:
            raise InputError(f"{repo_id} exists and is public: make it private on its page, or leave out --private")
        stale = {file.rfilename for file in info.siblings or []} & {*MAX_BYTES, FILM} - set(files)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()]
            + [CommitOperationDelete(name) for name in sorted(stale)],
            commit_message=message or f"{loaded.env.id}, width {loaded.policy.config.width} (potstill {__version__})",
        )
    return str(commit.commit_url)


def pull(repo_id: str, out: Path, revision: str = "main", env: EnvConfig | None = None) -> tuple[LoadedPolicy, str]:
    """Downloads the policy of a repository into a new directory `out`, which appears when it has been checked.

    Only the files named in `MAX_BYTES` are downloaded. Pickles are not, whatever else is there; a repository that holds
    its weights in nothing else is refused. Of one of Stable-Baselines3's (sb3/ppo-CartPole-v1), its zip is imported, as
    data, with VecNormalize's statistics where they lie beside it.

    Args:
        repo_id: USER/NAME.
        revision: a branch, a tag or a commit.
        env: the task of a Stable-Baselines3 zip, which does not name it.

    Returns:
        The policy, loaded from `out`, and the commit it is of.

    Raises:
        InputError: `out` exists; no such repository or revision; no policy.safetensors; a file too large, damaged, or
            of a name that leads out of its folder; the Hub refuses or cannot be reached. Nothing is left then.
    """
    api, out = _api(repo_id, "pull"), Path(out)
    if os.path.lexists(out):
        raise InputError(f"{out} exists: choose another --out")
    place = f"api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
    with _one_line(api, repo_id, revision):
        document = parse_json(_within(TIMEOUT, lambda: b"".join(_get(api, place, JSON_LIMIT))))
        sizes, commit = {file["rfilename"]: file.get("size") for file in document["siblings"]}, document["sha"]
        if re.fullmatch("[0-9a-f]{40}", commit) is None or not all(isinstance(name, str) for name in sizes):
            raise ValueError("no commit, or a file without a name")
    zipped = _zip_of(repo_id, sizes) if POLICY not in sizes else None
    if (zipped is None) == (env is not None):
        told = "does not name its task: add --env" if zipped else "is no Stable-Baselines3 zip: leave out --env"
        raise InputError(f"{repo_id} {told}")
    names = _expected(repo_id, sizes, zipped)

    def download(name: str) -> int:
        with open(temporary / name, "xb") as file:
            return sum(map(file.write, _get(api, f"{repo_id}/resolve/{commit}/{name}", sizes[name])))

    with new_folder(out) as temporary:
        for name in names:
            with _one_line(api, repo_id, revision):
                size = _within(TIMEOUT + sizes[name] / SLOWEST, partial(download, name))
            if size != sizes[name]:
                raise InputError(f"{repo_id}: {name} came with {size:,} bytes instead of {sizes[name]:,}: try again")
        try:
            for name in {RESULT, CONFIG} & set(names):
                read_document(temporary / name)
            loaded = load(temporary / (zipped or ""), env)
            if zipped is not None:
                loaded.document["provenance"] |= {"repository": repo_id, "commit": commit}
                for name in names:
                    (temporary / name).unlink()
                write_import(loaded, temporary)
        except InputError as error:
            raise InputError(str(error).replace(str(temporary), repo_id)) from error
    loaded.path = out / POLICY
    return loaded, commit


def _get(api: "HfApi", place: str, most: int) -> Iterator[bytes]:
    """The answer to a GET at the Hub, in pieces as they come, at most `most` bytes in all.

    Redirects are followed here, for httpx2 would read their bodies, of whatever length.
    """
    from httpx2 import Response
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    client, headers = get_session(), build_hf_headers(library_name="potstill", library_version=__version__)
    headers["Accept-Encoding"] = "identity"
    request = client.build_request("GET", f"{api.endpoint}/{place}", headers=headers, timeout=TIMEOUT)
    for _ in range(REDIRECTS):
        with closing(client.send(request, stream=True, follow_redirects=False)) as answer:
            if answer.next_request is not None:
                request = answer.next_request
                continue
            if answer.status_code != 200:
                hf_raise_for_status(Response(answer.status_code, headers=answer.headers, request=answer.request))
                raise InputError(f"{api.endpoint} answers {answer.status_code}, which the Hub does not")
            for piece in answer.iter_raw():
                most -= len(piece)
                if most < 0:
                    raise InputError(f"{api.endpoint} sends more than it may: nothing of it is kept")
                yield piece
            return
    raise InputError(f"{api.endpoint} leads from place to place, more than {REDIRECTS} times")


def _within(seconds: float, do: Callable[[], T]) -> T:
    """What `do` returns or raises; InputError where it has not come to that after so many seconds, drop by drop."""
    done: Queue[tuple[T | None, BaseException | None]] = Queue()

    def attempt() -> None:
        try:
            done.put((do(), None))
        except BaseException as error:
            done.put((None, error))

    Thread(target=attempt, daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except Empty:
        raise InputError(f"the Hub has not sent all in {seconds:.0f} seconds: try again later") from None
    if error is not None:
        raise error
    return cast(T, value)


def _api(repo_id: str, command: str) -> "HfApi":
    need(command, "hub", "huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise InputError(f"{repo_id!r} is no name of a repository: write USER/NAME")
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="potstill", library_version=__version__)


def _zip_of(repo_id: str, sizes: Mapping[str, Any]) -> str | None:
    """The zip of Stable-Baselines3's policy among the files of a repository."""
    zips = [name for name in sizes if re.fullmatch(r"[\w.-]+\.zip", name) and name != "train_eval_metrics.zip"]
    named = f"{repo_id.partition('/')[2]}.zip"
    return named if named in zips else zips[0] if len(zips) == 1 else None


def _expected(repo_id: str, sizes: Mapping[str, Any], zipped: str | None) -> list[str]:
    """The files to download of those that a repository lists; InputError where they cannot be a policy.

    Args:
        zipped: the one that is Stable-Baselines3's policy.
    """
    if odd := [name for name in sizes if name.startswith("/") or "\\" in name or ".." in name.split("/")]:
        raise InputError(
            f"{repo_id} lists {odd[0][:80]!r}, a name that leads out of its folder: nothing was downloaded"
        )
    limits = MAX_BYTES if zipped is None else {zipped: MAX_ZIP_BYTES} | dict.fromkeys(STATISTICS, MAX_STATISTICS_BYTES)
    if zipped is None and POLICY not in sizes:
        if pickled := [name for name in sizes if name.lower().endswith(PICKLES)]:
            raise InputError(
                f"{repo_id} has no {POLICY}, only {pickled[0][:80]}: a pickle runs whatever its author wants when it is"
                " read, so potstill does not download it"
            )
        raise InputError(f"{repo_id} has no {POLICY}: it was not pushed by potstill")
    for name in (names := [name for name in limits if name in sizes]):
        size = sizes[name]
        if type(size) is not int or not 0 <= size <= limits[name]:
            told = f"{size:,}" if type(size) is int else "an unknown number of"
            raise InputError(f"{repo_id}: {name} has {told} bytes; at most {limits[name]:,} are downloaded")
    return names


def _card(
    loaded: LoadedPolicy, result: dict[str, Any], config: dict[str, Any], repo_id: str, licence: str, film: bool
) -> str:
    """The model card: metadata the Hub reads, then what people do. Scores are those of `result`, none are made here.

    Raises:
        InputError: the result, or the config, is of another making.
    """
    from ale_py.registration import rom_id_to_name
    from huggingface_hub import EvalResult, ModelCardData

    env, name, learning = loaded.env, repo_id.partition("/")[2], "reinforcement-learning"
    task = f"ALE/{rom_id_to_name(env.id)}-v5" if env.atari else env.id
    try:
        facts = loaded.document.get("provenance", {}) | config | result
        facts = {key: printable(value) if isinstance(value, str) else value for key, value in facts.items()}
        results = None
        if "score" in result:
            spread = f" +/- {result['std']:.2f}" if result.get("std") is not None else ""
            score: Any = {"metric_type": "mean_reward", "metric_value": f"{result['score']:.2f}{spread}"}
            kind: Any = {"task_type": learning, "dataset_type": task, "dataset_name": task, "task_name": learning}
            results = [EvalResult(**kind, **score, metric_name="mean_reward", verified=False)]
        data = ModelCardData(
            model_name=name, library_name="potstill", pipeline_tag=learning, tags=[learning, task], license=licence,
            eval_results=results,
        )  # fmt: skip
        made = {"train": "Trained with PPO.", "distill": f"Distilled from `{facts.get('teacher')}`."}
        origin = made.get(facts.get("kind", ""))
        if facts.get("source") == "stable-baselines3":
            origin = f"Imported from Stable-Baselines3 ({facts.get('algorithm')})."
        beside = FileSystemLoader(Path(__file__).parent)
        environment = Environment(loader=beside, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return environment.get_template("hub.md").render(
            metadata=data.to_yaml().strip(), name=name, repo_id=repo_id, task=task, made=origin, facts=facts,
            width=loaded.policy.config.width, size=loaded.policy.size(), sticky=env.sticky, result=result,
            film=FILM if film else None, told=demands(loaded.policy),
        ) + "\n"  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, TemplateError) as error:
        raise InputError(f"the {RESULT} beside {loaded.path} is not one that potstill wrote: {error!r}") from error


@contextmanager
def _one_line(api: "HfApi", repo_id: str, revision: str = "main") -> Iterator[None]:
    """Around calls of huggingface_hub alone: whatever goes wrong in there is an InputError that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # it raises its own, httpx2's, hf_xet's and plain ones, and what a wrong server provokes
        raise InputError(_explain(causes(error), api.endpoint, repo_id, revision)) from error


def _explain(chain: list[BaseException], endpoint: str, repo_id: str, revision: str) -> str:
    from httpx2 import TransportError
    from huggingface_hub import errors

    for error in chain:
        match error:
            case errors.HFValidationError():
                return f"{repo_id!r} is no name of a repository: {error}"
            case errors.RevisionNotFoundError():
                return f"{repo_id} has no revision {revision!r}"
            case errors.GatedRepoError():
                return f"{repo_id} is gated: ask for access on its page, {endpoint}/{repo_id}"
            case errors.RepositoryNotFoundError():
                return (
                    f"{endpoint} has no model {repo_id}, or it is private: look at its name, and log in with"
                    " `hf auth login`"
                )
            case errors.HfHubHTTPError(response=response):
                status, said = response.status_code, " ".join((error.server_message or response.reason_phrase).split())
                advice = {
                    401: f"{endpoint} does not know your token: run `hf auth login`, or set HF_TOKEN",
                    403: f"{endpoint} forbids it for {repo_id} ({said}): your token may lack the right",
                }
                later = "; try again later" if status == 429 or status >= 500 else ""
                return advice.get(status, f"{endpoint} answers {status}, {said}{later}")
            case errors.OfflineModeIsEnabled():
                return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
            case TransportError():
                return (
                    f"cannot reach {endpoint}: {re.sub(r'^.Errno -?[0-9]+. ', '', str(error)) or type(error).__name__}"
                )
            case OSError(errno=int()):
                return reason(error) + (f": {error.filename}" if error.filename else "")
    root = chain[-1]
    return f"{endpoint} did not answer as the Hub does ({type(root).__name__}: {' '.join(str(root).split())[:200]})"
