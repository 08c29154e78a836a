"""Pickles read as data: the records that one holds, and numpy's arrays among them. Nothing that one names is called.

A pickle is a program for a stack machine. Python's own unpickler imports what the program names and calls it. The
machine here knows no calls: a name stays a name, and what would be called becomes an `Inert` record of the name, its
arguments and its state. Every instruction takes time and memory in proportion to its bytes, and nothing recurses.
"""

import math
import pickletools
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from potstill.errors import InputError

MAX_BYTES = 1 << 26  # statistics of 84 x 84 x 4 pixels take half a megabyte
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bytes, type(None))  # hashing a nested tuple may take for ever


@dataclass(eq=False)
class Inert:
    """What a pickle would have made by calling `name`, and did not."""

    name: str
    arguments: Any = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)  # of a dictionary of its own kind, such as OrderedDict


def read_pickle(content: bytes) -> Any:
    """The object of a pickle, of any protocol, made of numbers, text, bytes, tuples, lists, dicts and `Inert` records.

    Raises:
        InputError: no pickle, a damaged one, or one of more than 64 MiB.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"it has {len(content):,} bytes; {MAX_BYTES:,} are read at most")
    try:
        with warnings.catch_warnings():  # Python's of an odd escape in text, which SB3 does not write
            warnings.simplefilter("error")
            return _run(content)
    except (Warning, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise InputError("it is no pickle, or not a whole one") from error


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        at = marks.pop()
        values = stack[at:]
        del stack[at:]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _IGNORED:
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            at = len(stack) - _TUPLES[name]
            stack[at:] = [tuple(stack[at:])]
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            stack.append(tuple(above_mark()) if name == "TUPLE" else above_mark())
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            pairs = [stack.pop(-2), stack.pop()] if name == "SETITEM" else above_mark()
            if name == "DICT":
                stack.append({})
            target = stack[-1].items if isinstance(stack[-1], Inert) else stack[-1]
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                if isinstance(key, _KEYS):
                    target[key] = value
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else above_mark()
            if isinstance(stack[-1], list):  # of an Inert record, a deque say, they are not kept
                stack[-1].extend(values)
        elif name == "GLOBAL":
            stack.append(Inert(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Inert(f"{module}.{attribute}" if type(module) is type(attribute) is str else "?"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, made = stack.pop(), stack.pop()
            stack.append(Inert(made.name, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, made = stack.pop(), stack.pop(), stack.pop()
            stack.append(Inert(made.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif argument is not None and not name.startswith(("INST", "PERSID", "EXT")):
            stack.append(argument)  # numbers, text, bytes
        else:  # persistent ids, extension codes, DUP and POP: what SB3 saves has none
            raise ValueError(f"the instruction {name} is not read")
    raise ValueError("it ends in the middle")


def array(value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An array or number of a pickle, of 32 or 64 bits of floating point, as float64.

    numpy writes an array as `_reconstruct` with its bytes as state, as `_frombuffer` since protocol 5, and a number of
    its own as `scalar`. All three hold a description of their type and as many bytes as their shape has.

    Raises:
        InputError: it is something else, or its bytes are not as many.
    """
    shape: Any = ()
    order: Any = "C"
    content: Any = None
    if type(value) in (int, float):
        return np.array(value, np.float64)
    if isinstance(value, Inert) and value.name.startswith("numpy."):
        match value.name.rpartition(".")[2], value.arguments, value.state:
            case "_reconstruct", _, (_, shape, Inert() as dtype, fortran, content):
                order = "F" if fortran else "C"
            case "scalar", (Inert() as dtype, content), _:
                pass
            case "_frombuffer", (content, Inert() as dtype, shape, order), _:
                pass
    if isinstance(content, bytes | bytearray) and isinstance(shape, tuple) and order in ("C", "F"):
        match dtype.name, dtype.arguments, dtype.state:
            case "numpy.dtype", (("f4" | "f8") as kind, *_), (_, ("<" | ">") as endian, *_):
                whole = all(type(n) is int and 0 <= n <= len(content) for n in shape) and len(shape) <= 8
                if whole and int(kind[1]) * math.prod(shape) == len(content):
                    flat = np.frombuffer(content, f"{endian}{kind}").astype(np.float64)
                    return flat.reshape(shape, order=order)
    raise InputError("it holds something else where an array of floating-point numbers belongs")
