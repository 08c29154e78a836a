"""The arms of a study: how a policy comes to be, what that is called, and how it is drawn. A new one is one row here.

A run directory, a plan, the table and the report read these rows, so they lie below all of them.
"""

from typing import Any, Literal, NamedTuple

Method = str
"""rl, distill, ppd, finetune, and what other algorithms name: `training.trainer.KINDS`."""
Role = Literal["reward", "student"]


class Arm(NamedTuple):
    """One way to make a policy."""

    method: Method
    settings: dict[str, Any]  # what makes the arm what it is, by field name of its method's config or of its network
    label: str  # in prose
    short: str  # in figures, over two lines
    colour: str
    marker: str
    role: Role  # reward: learns from reward alone. student: learns from a teacher.


# Colours: Okabe & Ito 2008, told apart by colour-blind readers; finetune's and self-distill's: Tol 2021.
ARMS = {
    "rl": Arm("rl", {}, "RL from scratch", "RL\nfrom scratch", "#d55e00", "s", "reward"),
    "rl-split": Arm(
        "rl", {"critic": "split"}, "RL with a full-size critic", "RL, full-size\ncritic", "#a6761d", "D", "reward"
    ),
    "rl-split-1_4": Arm(
        "rl", {"critic": "split", "critic_width": "1/4"},
        "RL with a critic of width 1/4", "RL, critic of\nwidth 1/4", "#e6ab02", "d", "reward",
    ),
    "distill-student": Arm(
        "distill", {"lead": "student"},
        "student-led distillation", "distilled,\nstudent leads", "#0072b2", "o", "student",
    ),
    "distill-teacher": Arm(
        "distill", {"lead": "teacher"},
        "teacher-led distillation", "distilled,\nteacher leads", "#56b4e9", "^", "student",
    ),
    "distill-mixed": Arm(
        "distill", {"lead": "mixed"},
        "distillation with a mixed lead", "distilled,\nmixed lead", "#009e73", "v", "student",
    ),
    "ppd": Arm("ppd", {}, "proximal policy distillation", "distilled\nwith reward", "#cc79a7", "X", "student"),
    "finetune": Arm("finetune", {}, "distillation, then RL", "distilled,\nthen RL", "#117733", "P", "student"),
    "self-distill": Arm(
        "distill", {"lead": "student"}, "self-distillation", "self-\ndistilled", "#332288", "*", "student"
    ),
}  # fmt: skip
"""By name, which is a value of the column `arm`. A plan's arm with another name says its method, and is drawn grey."""

REWARD, STUDENTS = (tuple(name for name, arm in ARMS.items() if arm.role == role) for role in ("reward", "student"))
LONG = {f"{name}-long": name for name in REWARD}
"""The same arms at twice the budget: the evidence for convergence, compared with no arm."""


def look_of(name: str) -> Arm:
    """The row of `name`; for an arm of a plan's own, one that is drawn grey under its name."""
    return ARMS.get(name, Arm("rl", {}, name, name, "#333333", "P", "student"))


def order_of(name: str) -> tuple[int, str]:
    """Sorts arms as `ARMS` has them, others by name after them."""
    return (list(ARMS).index(name) if name in ARMS else len(ARMS), name)


def arm_of(document: dict[str, Any]) -> str:
    """How the policy of a run with this config.json comes to be: a value of the column `arm`."""
    if "arm" in document:  # a study's own name for it
        return str(document["arm"])
    config = document.get("config", {})
    values = {**config, **config.get("network", {})}
    fits = [
        name
        for name, arm in ARMS.items()
        if arm.method == method_of(document) and arm.settings.items() <= values.items()
    ]
    return max(fits, key=lambda name: len(ARMS[name].settings), default=method_of(document))


def method_of(document: dict[str, Any]) -> Method:
    """What made the policy of a run with this config.json: a value of the column `method`."""
    if (kind := document.get("kind", "train")) != "train":
        return str(kind)
    return "finetune" if "initial" in document else "ppd" if "teacher" in document else "rl"
