"""Reinforcement-learning experts, distilled into smaller networks, and what size buys.

import potstill as ps
teacher = ps.train("cartpole", total_timesteps=60_000)
student = ps.distill(teacher, width="1/8")
print(ps.evaluate(student, episodes=100))
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.api import Compressed, Record, Run, Study, compress, distill, evaluate, resume, study, train
    from potstill.compress.config import CompressConfig
    from potstill.distill import DistillConfig
    from potstill.envs import EnvConfig
    from potstill.errors import DivergedError, InputError
    from potstill.evaluation import EvalConfig, Start
    from potstill.imports import import_modules
    from potstill.load import load
    from potstill.networks import NetworkConfig
    from potstill.policies import LoadedPolicy
    from potstill.ppo import PPOConfig
    from potstill.study.execute import StudyInterrupted
    from potstill.training.runtime import Runtime
    from potstill.training.trainer import Interrupted

__version__ = "0.1.0"

_HOMES = {
    "api": "train distill resume evaluate compress load study Run Record Compressed Study",
    "compress.config": "CompressConfig",
    "distill": "DistillConfig",
    "envs": "EnvConfig",
    "errors": "DivergedError InputError",
    "evaluation": "EvalConfig Start",
    "imports": "import_modules",
    "training.trainer": "Interrupted",
    "networks": "NetworkConfig",
    "policies": "LoadedPolicy",
    "ppo": "PPOConfig",
    "study.execute": "StudyInterrupted",
    "training.runtime": "Runtime",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = [
    "CompressConfig", "Compressed", "DistillConfig", "DivergedError", "EnvConfig", "EvalConfig", "InputError",
    "Interrupted", "LoadedPolicy", "NetworkConfig", "PPOConfig", "Record", "Run", "Runtime", "Start", "Study",
    "StudyInterrupted", "compress", "distill", "evaluate", "import_modules", "load", "resume", "study", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports what is public where it is first asked for: torch alone takes a second."""
    if name not in _HOME:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    return getattr(import_module(f"potstill.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Potstill(ModuleType):
    """Python makes each module that is imported an attribute of its package: `potstill.distill` stays the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Potstill
