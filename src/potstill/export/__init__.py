"""Policies out: as ONNX, as C, as a Stable-Baselines3 zip, and on the Hub."""

from pathlib import Path
from typing import Any, Literal

from potstill.errors import InputError
from potstill.policies import LoadedPolicy

Format = Literal["onnx", "c", "sb3"]
_ENDINGS: dict[str, Format] = {".onnx": "onnx", ".c": "c", ".zip": "sb3"}


def export(
    loaded: LoadedPolicy,
    out: Path,
    format: Format | None = None,
    *,
    int8: bool = False,
    int4: bool = False,
    opset: int | None = None,
    raw: bool = False,
    threads: int = 1,
    **games: Any,
) -> dict[str, Any]:
    """Writes a policy as a file of others: `onnx.export`, `c.export` or `sb3.export`, whose options it has.

    Args:
        format: by default, as `out` ends.

    Raises:
        InputError: the ending says no format, or an option is another format's; as those functions.
    """
    from potstill.export import c, onnx, sb3

    kind = format or _ENDINGS.get(out.suffix)
    if kind is None:
        raise InputError(f"{out}: the ending says the format: .onnx, .c, or .zip for Stable-Baselines3")
    if (opset is not None or raw) and kind != "onnx":
        raise InputError("--opset and --raw are ONNX's: leave them out")
    if (int8 and kind == "sb3") or (int4 and kind != "c"):
        raise InputError(f"{kind} files have no such integers: --int8 goes with onnx and c, --int4 with c")
    if kind == "sb3":
        return sb3.export(loaded, out, threads)
    if kind == "c":
        return c.export(loaded, out, int8=int8, int4=int4, threads=threads, **games)
    return onnx.export(
        loaded, out, int8=int8, opset=onnx.OPSET if opset is None else opset, raw=raw, threads=threads, **games
    )
