"""Arrays in .npy files, also of others: memory is taken for what a file holds, not for what its header says."""

import tempfile
import tokenize
from pathlib import Path
from typing import Any

import numpy as np

# numpy evaluates the header as a Python literal, and whatever goes wrong there passes through.
HEADER_ERRORS = (ValueError, EOFError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError, TypeError,
                 OverflowError)
_KINDS = "biufUS"


def map_array(path: Path | str) -> Any:
    """The array of a .npy file, memory-mapped; ValueError if it is no whole file of numbers or text."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except HEADER_ERRORS as error:
        raise ValueError(f"{path} is no whole .npy file: {first_line(error)}\nhint: copy it again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in _KINDS:
        raise ValueError(f"{path} holds {getattr(array, 'dtype', 'several arrays')}, and not numbers or text")
    return array


def load_array(path: Path | str) -> np.ndarray:
    """The array of a .npy file, in memory; ValueError if it is no whole file of numbers or text."""
    return np.array(map_array(path))


def parse_array(data: bytes, url: str) -> np.ndarray:
    """The array in the bytes of a .npy file that was read from `url`; ValueError as of `map_array`."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        file.write(data)
        file.flush()
        try:
            return load_array(file.name)
        except ValueError as error:
            raise ValueError(str(error).replace(file.name, url)) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
