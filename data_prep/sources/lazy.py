"""Long sequences that take little memory: a source has a million names and items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TypeVar, overload

import numpy as np

T = TypeVar("T", covariant=True)


class Lazy(Sequence[T]):
    """A sequence whose elements are made when asked for; a slice is a list."""

    def __init__(self, length: int, make: Callable[[int], T]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._length)[index]]
        return self._make(range(self._length)[index])


def packed(strings: Iterable[str]) -> Lazy[str]:
    """Many strings as one buffer and their places in it, at a third of a list's memory.

    Raises ValueError for a name that is not UTF-8.
    """
    parts = []
    for string in strings:
        try:
            parts.append(string.encode())
        except UnicodeEncodeError:
            raise ValueError(f"file name {string!r} is not UTF-8; rename the file") from None
    ends = np.fromiter(accumulate(map(len, parts), initial=0), np.int64, len(parts) + 1)
    buffer = b"".join(parts)
    return Lazy(len(parts), lambda i: buffer[ends[i] : ends[i + 1]].decode())
