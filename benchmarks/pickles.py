"""Pickles of strangers: CIFAR's batches, read so that no byte of them is ever obeyed.

A pickle may name any callable and have it called. Here it may name what an array of Python 2's NumPy consists of,
and even those names lead to the stand-ins below, which only keep what they are given. Everything else is refused
(the documented way: https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

import io
import math
import pickle
from typing import Any

import numpy as np

# What a damaged or hostile pickle makes the unpickler and the stand-ins raise.
_DAMAGED = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip


class PickleError(ValueError):
    """Not a pickle, or one that asks for more than arrays and plain values."""


class _Dtype:
    """Stands in for `numpy.dtype`: its code, nothing of its state."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands in for `numpy.ndarray` and for what makes an empty one of it."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Bytes and whole numbers of one byte are all that CIFAR's batches hold."""
        _version, shape, dtype, columns_first, content = self.state
        if not isinstance(dtype, _Dtype) or dtype.code.lstrip("|") != "u1" or columns_first:
            raise PickleError("it holds an array of another kind than uint8 in rows")
        if not isinstance(content, bytes) or len(content) != math.prod(shape):
            raise PickleError("it holds an array of another length than its shape says")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Encoded:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes into old protocols."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]  # a function in the guise of a class
        if encoding != "latin1":
            raise PickleError(f"it holds text encoded as {encoding!r}")
        return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise PickleError(f"it asks for {module}.{name}; only arrays and plain values are read")
        return _STAND_INS[module, name]


def load(content: bytes) -> dict[str, Any]:
    """The dictionary that a pickle holds, its keys as text, its arrays as arrays of `uint8`.

    Raises:
        PickleError: the message follows the file's name.

    """
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        items = {} if not isinstance(found, dict) else {_text(key): _plain(value) for key, value in found.items()}
    except PickleError:
        raise
    except _DAMAGED as error:
        raise PickleError(f"it is damaged or no pickle ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise PickleError(f"it holds a {type(found).__name__}, not a dictionary")
    return items


def _text(key: bytes | str) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _plain(value: Any) -> Any:
    return value.array() if isinstance(value, _Array) else value
