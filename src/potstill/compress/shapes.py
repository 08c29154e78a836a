"""What is tried: networks smaller than the teacher's, and the ways to distil one."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from potstill import evaluation
from potstill.compress.config import CompressConfig
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy, Size, parse_width
from potstill.quantisation import prune
from potstill.views import FULL, chosen, sensed

UNITS = sorted({top * 2**k for top in (2, 3) for k in range(9)} | {1})  # of a hidden layer: 1 2 3 4 6 8 12 ... 768
WIDTHS = sorted({Fraction(top, 2**k) for top in (2, 3) for k in range(8)} | {Fraction(2**k) for k in range(5)})
SPARSE = (0.75, 0.88)  # shares of the weights of a pruned network that are zero
LEAN = ("hidden=32,256",)  # of a Nature-CNN, whose linear layer holds nine tenths of its weights
LONGER = 3  # times the steps of the first way


class Shape(NamedTuple):
    """A network that is smaller than the teacher's."""

    name: str  # such as linear, mlp-16-8 (units of hidden layers), width-1_8 or sparse-75-1_4
    network: NetworkConfig
    sparsity: float  # share of its weights that are zero
    size: Size
    cost: float  # what is minimised


def shapes(policy: Policy, config: CompressConfig) -> list[Shape]:
    """Networks that cost less than a policy's, the cheapest first, about half an octave apart.

    Of an image they are widths of the policy's family, with most weights at zero where parameters are
    what counts, or with narrow linear layers where bytes are. Of numbers they are no hidden layer, one, two equal
    ones, or two of which the second is half as large.

    Raises:
        InputError: there is none.
    """
    found: dict[str, Shape] = {}  # by its layers: the smallest widths round to the same network
    view = chosen(config.base.view, policy.view)
    if sensed(view) != sensed(policy.view):
        raise InputError(
            "compress looks for students that are shown what their teacher is: leave out"
            f" --view {' '.join(sensed(view)) or FULL}"
        )
    spaces = policy.spaces | {"view": view}
    why = InputError("the teacher is the smallest of its family already")
    for name, network, sparsity in _networks(policy, config):
        student = Policy(replace(network, critic="shared"), **spaces)
        if sparsity:
            try:
                prune(student, sparsity)
            except InputError as error:  # it has nothing to prune
                why = why if found else error
                continue
        found.setdefault(str(student), Shape(name, network, sparsity, student.size(), cost_of(student, config)))
    teacher = cost_of(policy, config)
    pruned = [shape for shape in found.values() if shape.sparsity]  # at first they agree more than others of their size
    smaller = sorted(
        (s for s in pruned or found.values() if s.cost < teacher), key=lambda s: (s.cost, s.size.parameters)
    )
    if not smaller:
        raise why
    allowed = [s for s in smaller if config.max_parameters is None or s.size.parameters <= config.max_parameters]
    if not allowed:
        least = min(shape.size.parameters for shape in smaller)
        raise InputError(f"max-parameters {config.max_parameters:,}: the smallest student has {least:,}")
    return allowed


def cost_of(policy: Policy, config: CompressConfig) -> float:
    """What is minimised; of the user's own code, of which nothing is known, infinite."""
    if policy.sees_raw:
        return math.inf
    if config.minimise == "latency":
        return evaluation.latency(policy)["latency_ms"]
    saved = policy.stored * (32 - config.base.bits) / 8 if config.minimise == "bytes" else 0.0
    return float(getattr(policy.size(), config.minimise)) - saved


def _networks(policy: Policy, config: CompressConfig) -> list[tuple[str, NetworkConfig, float]]:
    asked, sparsity, largest = config.base.network, config.base.sparsity, policy.size().parameters
    if asked.family == "auto" and not asked.options and policy.layout == "flat" and ":" not in policy.family:
        known = [option for option in policy.config.options if option in ("activation=relu", "activation=tanh")]
        # A wider single layer is worse than two of its size: on MountainCar 512 kept 83 %, 64 and 32 kept 95 %.
        layers = [(n,) for n in UNITS if n <= 64] + [(n, m) for n in UNITS if n > 1 for m in (n // 2, n)]
        names = [",".join(map(str, units)) for units in layers if math.prod(units) < largest]
        plain = replace(asked, width="1", family="mlp")
        deep = [
            (f"mlp-{name.replace(',', '-')}", replace(plain, options=(f"layers={name}", *known)), sparsity)
            for name in names
        ]
        return [*([] if sparsity else [("linear", replace(plain, family="linear"), 0.0)]), *deep]
    if asked.family == "auto":
        asked = replace(asked, family=policy.family, options=asked.options or policy.config.options)
    kinds = {"width": (sparsity, asked.options)}
    if config.minimise == "parameters" and not sparsity and policy.layout != "flat":
        kinds |= {f"sparse-{share:.0%}".rstrip("%"): (share, asked.options) for share in SPARSE}
    if config.minimise == "bytes" and asked.family == "nature" and not asked.options:
        kinds["lean"] = (sparsity, LEAN)
    most = max(Fraction(1), parse_width(policy.config.width))
    return [
        (f"{name}-{str(width).replace('/', '_')}", replace(asked, width=str(width), options=options), share)
        for name, (share, options) in kinds.items()
        for width in WIDTHS
        if width <= most
    ]


def ways(base: DistillConfig) -> list[DistillConfig]:
    """How a shape is distilled, one way after another until one will do: as asked for, then longer, from other states,
    towards another target, from other seeds."""
    longer = replace(base, total_timesteps=LONGER * base.total_timesteps)
    other = replace(longer, lead="student" if base.lead == "mixed" else "mixed", noise=0.0)
    target = "forward-kl" if base.objective == "greedy-cross-entropy" else "greedy-cross-entropy"
    return [
        base,
        longer,
        other,
        replace(longer, objective=target),
        replace(other, objective=target, seed=base.seed + 1),
        replace(longer, seed=base.seed + 2),
    ]
