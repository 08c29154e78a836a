"""Code that the user named: tasks, networks, objectives and teachers of his own. No file ever causes an import.

He names a module by `--import`, in his plan's `imports`, in POTSTILL_IMPORT, or from Python by `import_modules`. What a
checkpoint, a config or a record names as `module:name` is looked up among these modules, and refused where it is not.
"""

import importlib.util
import os
import re
import secrets
import sys
import sysconfig
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from potstill.errors import RAISED, InputError, first_line, printable

VARIABLE = "POTSTILL_IMPORT"
"""Modules and files to import, separated as in PATH."""
HANDED = "python:"
"""Begins the name of what was handed over in Python and no other process could import."""

_PROCESS = secrets.token_bytes(8)
_named: dict[str, str] = {}  # by the module's name, how to name it from any folder
_handed: dict[str, Any] = {}  # by a name that begins with HANDED
_makers: dict[str, tuple[str, ...]] = {}  # by the id of a task, the modules that a run or a policy of it was made with


def import_modules(names: str | Iterable[str], option: str = "--import", folder: Path | None = None) -> None:
    """Imports modules on the path, or files such as `./my_tasks.py`, and allows what they define to be looked up.

    Args:
        option: where the names come from, for the message.
        folder: what a file's path is relative to; the working directory if None.

    Raises:
        InputError: one cannot be imported; with the first line of its own error.
    """
    for name in [names] if isinstance(names, str) else names:
        place = Path(folder or "", name).absolute() if name.endswith(".py") else None
        module = place.stem if place is not None else name
        if module in _named:
            continue
        try:
            _import(module, place, folder)
        except RAISED as error:  # a user's module raises whatever it likes
            raise InputError(f"{option} {name} cannot be imported: {first_line(error)}") from error
        _named[module] = str(place or module)


def environment() -> dict[str, str]:
    """What lets another process import the same: the modules that the user named, and where Python looks for them.

    Python's own folders stay out: another machine has its own.
    """
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = dict.fromkeys(Path(folder).absolute() for folder in sys.path)
    named = (str(folder) for folder in folders if not any(map(folder.is_relative_to, installed)))
    return {VARIABLE: os.pathsep.join(_named.values()), "PYTHONPATH": os.pathsep.join(named)}


def imported() -> tuple[str, ...]:
    """The modules the user named, in the order in which they were imported: what a run records."""
    return tuple(_named)


def remember_makers(task: str, modules: Any) -> None:
    """Keeps what a file says its task was made with, for `makers_of`. It is not imported."""
    if isinstance(modules, list) and modules:
        _makers[task] = tuple(printable(module, 120) for module in modules)


def makers_of(task: str) -> str:
    """': it was made with --import my_tasks', where a file said so; what to do, in any case."""
    missing = [module for module in _makers.get(task, ()) if module not in _named]
    if not missing:
        return ": a task of your own needs --import MODULE"
    return f": it was made with {' '.join(f'--import {module}' for module in missing)}"


def allow(thing: Callable[..., Any]) -> str:
    """The name of a function or class that the user handed over in Python; it may be looked up then.

    That is `module:name` where other processes can import it. What is defined in the running script or within another
    function, and a lambda, get a name for this process alone, `python:name`.
    """
    module = getattr(thing, "__module__", "")
    name = getattr(thing, "__qualname__", type(thing).__name__)
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is thing:
        _named.setdefault(module, module)
        return f"{module}:{name}"
    stem = known = HANDED + re.sub(r"\W", "", name.rpartition(".")[2])
    number = 1
    while _handed.setdefault(known, thing) is not thing:
        known = f"{stem}-{(number := number + 1)}"
    return known


def source_of(reference: str) -> bytes:
    """The file in which `module:name` is; what was handed over in Python is known in this process alone."""
    file = getattr(sys.modules.get(reference.partition(":")[0]), "__file__", None)
    return _PROCESS + reference.encode() if file is None or reference.startswith(HANDED) else Path(file).read_bytes()


def check_shared(*references: str) -> None:
    """Raises InputError where one of these names means nothing to another process."""
    for reference in references:
        if reference.startswith(HANDED):
            raise InputError(
                f"{reference} was handed over in Python, and workers cannot import it: define it at the top of a module"
            )


def find(reference: str, option: str) -> Any:
    """What `module:name` refers to, of the modules that the user named.

    Args:
        option: of the command line, for the message.

    Raises:
        InputError: the user did not name that module, or it defines no such thing.
    """
    if reference.startswith(HANDED):
        if reference not in _handed:
            raise InputError(
                f"{option} {printable(reference, 120)} was handed over in Python, where no other process finds it:"
                " hand it over again, or define it at the top of a module"
            )
        return _handed[reference]
    module, _, name = reference.partition(":")
    if module not in _named:
        raise InputError(
            f"{option} {printable(reference, 120)} is code of module {module}: allow it with --import {module}"
        )
    found = getattr(sys.modules[module], name, None)
    elsewhere = hasattr(found, "__qualname__") and found.__module__.partition(".")[0] != module.partition(".")[0]
    if not callable(found) or elsewhere:
        raise InputError(f"{option} {reference}: {module} defines no function or class {name!r}")
    return found


def _import(module: str, place: Path | None, folder: Path | None) -> ModuleType:
    if place is None:
        where = str(folder.absolute() if folder is not None else Path.cwd())
        if where not in sys.path:  # as `python -m` has it
            sys.path.append(where)
        return import_module(module)
    if not place.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    known = sys.modules.get(module)
    if known is not None and getattr(known, "__file__", None) != str(place):
        raise ImportError(f"another module is called {module} already: rename the file")
    spec = importlib.util.spec_from_file_location(module, place)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made
