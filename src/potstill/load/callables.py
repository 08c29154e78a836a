"""Policies of the user's own: a function, an object, a `torch.nn.Module` or an ONNX file that answers raw observations.

What the first answer is decides how it is read: floats (N, A) are logits, -inf of what cannot be done, or probabilities
where each row adds up to 1, whole numbers (N,) are actions of the environment's own (of K choices made at once: (N, sum
of A) and (N, K)), and (N, d) are continuous actions in the environment's units, clipped to its bounds. Every later
answer must be of the same kind. Where it has `reset`, that is called with (N,) bool, the games that begin, before the
observations that begin them: so it may have a memory, or follow a script. What has none must answer an observation
alike whatever stands beside it.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.envs import Array, EnvConfig, Envs
from potstill.errors import RAISED, InputError, first_line, need
from potstill.imports import allow, find, source_of
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy
from potstill.rollout import normalise_by_play
from potstill.storage.files import read_bytes

CERTAIN = 30.0  # logit of an action that was named; that of the others is 0
LOG_STD = -3.0  # of continuous actions that come without: a student that starts out plays near them
STATISTICS = 2_000  # observations of random play for the students' normalisation
MAX_ONNX_BYTES = 1 << 30
Answer = Callable[[Array], Any]


class Foreign(Policy):
    """Code in the place of a policy. It reads raw observations; what is not raw in it is for students to take over."""

    sees_raw = True

    def __init__(self, name: str, answer: Answer, envs: Envs) -> None:
        """Args:
            name: for messages.
            answer: raw observations (N, *shape), of the environment's dtype, to what the module's docstring says.
            envs: one environment of the task; its normalisation is looked at in random play.

        Raises:
            InputError: the first answer is none of these.
        """
        super().__init__(NetworkConfig(), **envs.spaces)
        self.remembers = True  # for all that is known
        self.requires_grad_(False)
        for parameter in self.parameters():  # nothing of this network is used but its shape, for students
            parameter.zero_()
        normalise_by_play(self, envs, STATISTICS, 0)
        if self.log_std is not None:
            self.log_std.fill_(LOG_STD)
        self.name, self.answer = name, answer
        self._own, self._shape, self._bounds = envs.choices, tuple(envs.action_space.shape or ()), envs.bounds
        self._soft: bool | None = None  # whether it tells logits; None before the first answer
        self._shares = False  # whether these are probabilities
        seen = envs.random_play(7)
        self._dtype = seen.dtype
        self.restart(np.ones(len(seen), bool))
        self.logits(torch.from_numpy(seen))
        if not self._soft:
            self.hard_objective = "greedy-cross-entropy" if self._bounds is None else "logit-mse"

    def player(self, beside: Sequence[Policy] = ()) -> Policy:
        """As a policy's; of code that has `reset` a copy, where one of `beside` is that very code.

        Raises:
            InputError: it cannot be copied.
        """
        other: Any = super().player()
        own = _code_of(self)
        if hasattr(self.answer, "reset") and any(_code_of(each) is own for each in beside):
            try:
                other.answer = deepcopy(self.answer)
            except RAISED as error:  # a user's code raises whatever it likes
                raise InputError(
                    f"teacher {self.name} is used twice and cannot be copied: {first_line(error)}"
                ) from error
            if _code_of(other) is own:  # a function
                raise InputError(f"teacher {self.name} is used twice, and has one memory: make it a class")
        return other  # type: ignore[no-any-return]

    def restart(self, begun: Array) -> None:
        if begun.any() and hasattr(self.answer, "reset"):
            self._call(self.answer.reset, begun)

    def prepare(self, observations: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Observations as they are."""
        return observations

    def heads(self, inputs: Tensor, memory: Tensor | None = None, begun: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, L), and zeros for values, which it does not tell."""
        return self.logits(inputs), torch.zeros(len(inputs), device=inputs.device)

    def logits(self, inputs: Tensor) -> Tensor:
        """Raw observations (B, *shape) to logits (B, L) float32.

        Raises:
            InputError: the code raised, or answered otherwise than at first.
        """
        own = inputs.cpu().numpy().astype(self._dtype)  # a copy: code may write into what it is given
        told = self._call(self.answer, own)
        try:
            answer = np.asarray(told.detach().cpu() if isinstance(told, Tensor) else told)
        except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, a tensor without data
            raise InputError(f"teacher {self.name} answers no array: {first_line(error)}") from error
        return self._with_deviations(torch.from_numpy(self._read(answer, len(inputs))).to(inputs.device))

    def _read(self, told: Array, count: int) -> Array:
        """An answer as logits (B, A), or means (B, d) in units of half the range; float32."""
        whole, numbers = told.dtype.kind in "iub", told.dtype.kind in "iubf"
        if self._bounds is None and told.ndim and not whole and numbers and (masked := np.isneginf(told)).any():
            told = np.where(masked, np.where(masked, np.inf, told).min(-1, keepdims=True) - CERTAIN, told)
        if numbers and not np.isfinite(told).all():
            raise InputError(f"teacher {self.name} answers numbers that are not finite")
        shape = self._shape
        if self._bounds is not None:
            wanted = f"actions {(count, *shape)} in the environment's units"
            if numbers and told.shape in ((count, self.num_actions), (count, *shape)):
                low, high = self._bounds
                means = (told.reshape(count, -1) - (low + high) / 2) / ((high - low) / 2)
                return np.asarray(np.clip(means, -1.0, 1.0), np.float32)  # as `Envs` plays them
        else:
            scores = (count, sum(map(len, self._own)))
            named = (count, *shape)
            soft, hard = f"float logits {scores}", f"int actions {named}"
            if numbers and not whole and told.shape == scores and self._soft is not False:
                if self._soft is None:
                    parts = np.split(told, np.cumsum([*map(len, self._own)])[:-1], 1)
                    self._shares = bool(
                        (told >= 0).all() and all(np.allclose(each.sum(1), 1, atol=1e-3) for each in parts)
                    )
                self._soft = True
                if self._shares and (told < 0).any():
                    raise InputError(f"teacher {self.name} answers numbers below 0; at first it told probabilities")
                told = np.log(told.astype(np.float64).clip(math.exp(-CERTAIN))) if self._shares else told
                logits = told.astype(np.float32)
                if np.isfinite(logits).all():
                    return np.asarray(logits)
                raise InputError(f"teacher {self.name} answers logits beyond float32")
            if whole and told.shape == named and not self._soft:
                self._soft = False
                return self._certain(told.reshape(count, -1))
            wanted = f"{soft} or {hard}" if self._soft is None else f"{soft if self._soft else hard}, as at first"
        raise InputError(
            f"teacher {self.name} answers {told.dtype} {told.shape} to {count} observations of shape"
            f" {self.observation_shape}; it should be {wanted}"
        )

    def _certain(self, actions: Array) -> Array:
        """Actions of the environment's own (B, K) as logits of which one of each choice stands out."""
        parts = []
        for chosen, own in zip(actions.T, self._own, strict=True):
            named = chosen[:, None] == own
            if not named.any(1).all():
                raise InputError(
                    f"teacher {self.name} chooses action {chosen[~named.any(1)][0]}, not of {own[:20].tolist()}"
                )
            parts.append(CERTAIN * named.astype(np.float32))
        return np.concatenate(parts, 1)

    def _call(self, function: Callable[..., Any], argument: Array) -> Any:
        try:
            return function(argument)
        except RAISED as error:  # a user's code raises whatever it likes
            raise InputError(f"teacher {self.name} raised {first_line(error)}") from error


def _code_of(policy: Policy) -> Any:
    """What has the memory: of a module that was handed over twice, the one that both have."""
    answer = getattr(policy, "answer", None)
    return answer.module if isinstance(answer, Network) else answer


class LoadedForeign(LoadedPolicy):
    """A policy of the user's own; `path` is the name `module:name`, or the ONNX file."""

    policy: Foreign

    @property
    def hash(self) -> str:
        """Of the file that holds the code, and of a module's weights; what was handed over is of this process alone."""
        if not is_reference(self.path):
            return super().hash
        digest = sha256(source_of(str(self.path)))
        if isinstance(self.policy.answer, Network):
            for key, tensor in self.policy.answer.module.state_dict().items():
                digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def is_reference(path: Path) -> bool:
    """Whether this is `module:name`, and no file."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w-]*", str(path)) is not None and not path.exists()


def reference(thing: Callable[..., Any]) -> Path:
    """The name of code that was handed over in Python, as `imports.allow` gives it."""
    if not callable(thing):
        raise InputError(f"{type(thing).__name__} is neither the place of a policy nor code that answers observations")
    return Path(allow(thing))


def load_foreign(path: Path, env: EnvConfig, device: str = "cpu") -> LoadedForeign:
    """The code called `module:name`, of a module that the user imported, or an ONNX file, as a policy for `env`.

    Raises:
        InputError: it is not there, or does not answer observations of that task as it should.
    """
    if path.suffix == ".onnx" and not is_reference(path):
        answer: Any = _onnx(path)
    else:
        answer = find(str(path), "teacher")
        if inspect.isclass(answer):
            try:
                answer = answer()
            except RAISED as error:  # a user's code raises whatever it likes
                raise InputError(f"teacher {path} raised {first_line(error)}") from error
        if isinstance(answer, nn.Module):
            answer = Network(answer)
        if not callable(answer):
            raise InputError(f"teacher {path} makes {type(answer).__name__}, which cannot be called with observations")
    with closing(Envs(env, 1)) as envs:
        policy = Foreign(str(path), answer, envs).to(device)
    return LoadedForeign(policy, env, {"kind": "policy"}, path)


class Network:
    """A `torch.nn.Module` as a function of arrays, with its `reset` where it has one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if hasattr(module, "reset"):
            self.reset = module.reset

    @torch.no_grad()
    def __call__(self, observations: Array) -> Any:
        at = next(self.module.parameters(), torch.empty(0)).device
        learning = [each for each in self.module.modules() if each.training]  # its owner may go on with that
        try:
            self.module.eval()
            return self.module(torch.from_numpy(observations).to(at))
        finally:
            for each in learning:
                each.training = True


def onnx_session(content: bytes) -> Any:
    """A model that runs on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _onnx(path: Path) -> Answer:
    """An ONNX model of one input, on one thread: its output `logits`, or `action` of a continuous one, or its first
    that is no value."""
    need("an ONNX teacher", "onnx", "onnxruntime")
    content = read_bytes(path, MAX_ONNX_BYTES, follow=True)
    try:
        session = onnx_session(content)
    except Exception as error:  # onnxruntime has a dozen kinds
        why = first_line(error)
        if b"\n\x08location" in content:  # the format's word for it
            why = (
                f"its weights lie in a file beside it: onnx.save(onnx.load({path.name!r}), 'whole.onnx') joins the two"
            )
        raise InputError(f"{path} cannot be read as ONNX: {why}") from error
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise InputError(f"{path} has {len(inputs)} inputs; a teacher reads one, the observations")
    actors = [name for name in outputs if not re.search("(?<!q)(?<!q_)value|critic", name, re.IGNORECASE)]
    output = next((name for name in ("logits", "action") if name in outputs), (actors or outputs)[0])
    kinds = {"float": np.float32, "double": np.float64, "float16": np.float16, "uint8": np.uint8}
    dtype = kinds.get(inputs[0].type[7:-1])  # of tensor(float); another is the observations' own
    single = inputs[0].shape[:1] == [1]

    def answer(observations: Array) -> Array:
        with np.errstate(over="ignore"):  # which is told below
            given = observations if dtype is None else observations.astype(dtype, casting="same_kind")
        if given.itemsize < observations.itemsize and not np.allclose(given, observations, 1e-3, 1e-6, equal_nan=True):
            raise ValueError(f"its input of {given.dtype} does not hold the observations")
        batches = np.split(given, len(given)) if single else [given]
        return np.concatenate([session.run([output], {inputs[0].name: batch})[0] for batch in batches])

    return answer
