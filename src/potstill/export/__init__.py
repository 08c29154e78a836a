"""Policies out: as ONNX, as C, as a Stable-Baselines3 zip, and on the Hub."""

import json
from pathlib import Path
from typing import Any, Literal

from potstill import evaluation
from potstill.errors import InputError, need
from potstill.export.actor import BITS
from potstill.export.actor import actor as deployed
from potstill.export.card import latencies, no_better, scores
from potstill.policies import LoadedPolicy
from potstill.storage.checkpoints import write_atomically

Format = Literal["onnx", "c", "sb3"]
_FORMATS: dict[Format, tuple[str, str]] = {
    "onnx": (".onnx", "ONNX"),
    "c": (".c", "C"),
    "sb3": (".zip", "Stable-Baselines3"),
}


def export(
    loaded: LoadedPolicy,
    out: Path,
    format: Format | None = None,
    *,
    int8: bool = False,
    int4: bool = False,
    opset: int | None = None,
    raw: bool = False,
    episodes: int = 0,
    seed: int = 1,
    threads: int = 1,
    quiet: bool = False,
    card: bool = True,
) -> dict[str, Any]:
    """Writes a policy as a file of others, after that file has computed what PyTorch does on recorded observations.

    Args:
        loaded: on the CPU.
        out: no file of it may exist. All appear when they were checked, and have played.
        format: by default, as `out` ends.
        int8: writes a version with 8-bit weights beside it (policy.int8.onnx, policy_int8.c), unless that is larger or
            slower.
        int4: the same with 4 bits, of C.
        opset: of ONNX, 11 by default; the file's runtime must know it.
        raw: of Atari in ONNX: the file prepares colour frames itself, as `raw.wrap` says, and plays a game to prove it.
        episodes: whole games of each file, greedy, and as many of each disturbance; 0 plays none.
        seed: of these games.
        threads: for the environments; the files run on one.
        card: write what is returned beside `out`, as `policy.onnx.json`.

    Returns:
        `policy`: the `parameters`, `macs` and latency of what was exported, in PyTorch, its `view`, and of how many
        numbers its `state` is, None of what has no memory; `observations` compared, the
        `max_difference` of their logits, or of their means in units of half the range, and how many were `tied`; under
        `models`, for `float32`, `int8` and `int4`, the `path`, `bytes`, the latency and, where games were played, the
        `card.scores`; of C also `constants`, `activations`, `flash` and `stack`, in bytes, None where they cannot be
        told; `left_out`, by name, why one is not written. JSON-ready.

    Raises:
        InputError: the ending says no format, or an option is another format's; a package or a compiler is missing; a
            file exists or cannot be written; the format has no place for the network; or the file computes something
            else than PyTorch. No file is left then, nor where the games are interrupted.
    """
    from potstill.export import c, onnx, sb3

    kind = format or next((name for name, (end, _) in _FORMATS.items() if end == out.suffix), None)
    if kind is None:
        raise InputError(f"{out}: the ending says the format: .onnx, .c, or .zip for Stable-Baselines3")
    end, name = _FORMATS[kind]
    if out.suffix != end:
        raise InputError(f"{out}: {name} files are written as {end}")
    if (opset is not None or raw) and kind != "onnx":
        raise InputError("--opset and --raw are ONNX's: leave them out")
    if (int8 and kind == "sb3") or (int4 and kind != "c"):
        raise InputError(f"{kind} files have no such integers: --int8 goes with onnx and c, --int4 with c")
    names = ["float32", *["int8"] * int8, *["int4"] * int4]
    mark = "_{}" if kind == "c" else ".{}"
    paths = {each: out if BITS[each] == 32 else out.with_name(out.stem + mark.format(each) + end) for each in names}
    told = out.with_name(f"{out.name}.json")
    also = [path.with_suffix(".h") for path in paths.values() if kind == "c"] + ([told] if card else [])
    for path in (*paths.values(), *also):
        if path.exists():
            raise InputError(f"{path} exists: choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: no such file or directory")
    match kind:
        case "onnx":
            need("export", "onnx", "onnx", "onnxruntime")
            onnx.check_opset(opset)
            made = onnx.versions(loaded, deployed(loaded, threads), paths, opset or onnx.OPSET, raw)
        case "c":
            made = c.versions(deployed(loaded, threads), paths)
        case "sb3":
            need("export", "sb3", "stable_baselines3")
            made = sb3.versions(deployed(loaded, threads), paths)
    models, left_out = {each: {"path": str(paths[each]), **made.facts[each]} for each in paths}, {}
    for each, measured in latencies(made.players).items():
        models[each] |= measured
    for each in [each for each in models if each != "float32"]:
        if why := no_better(models["float32"], models[each]):
            left_out[each] = why
            del models[each]
    written: dict[Path, bytes] = {}
    for each, model in models.items():
        if episodes:
            title = f"play {paths[each].name}"
            model |= scores(made.players[each], made.actor, loaded, episodes, seed, threads, title, quiet)
        files = made.files[each](model.get("score"))
        model["bytes"] = sum(map(len, files.values()))
        written |= files
    policy, size = loaded.policy, loaded.policy.size()
    record = {
        "env": loaded.env.id,
        "policy": {
            "parameters": size.parameters,
            "macs": size.macs,
            "view": list(policy.view),
            "state": policy.actor.in_features if policy.remembers else None,
            **evaluation.latency(policy),
        },
        "observations": len(made.actor.observations),
        "max_difference": made.difference,
        "tied": made.tied,
        "models": models,
        "left_out": left_out,
    }
    if card:
        written[told] = json.dumps(record, indent=2, allow_nan=False).encode() + b"\n"
    try:
        for path, content in written.items():
            write_atomically(path, content)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return record
