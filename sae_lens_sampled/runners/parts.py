"""A part of a list of work, for several processes or machines at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`, counted from 1: each takes every `count`-th entry of a list that is the same for all."""

    index: int = 1
    count: int = 1

    def of(self, items: Sequence[T]) -> list[T]:
        """The entries that are this part's; those of all parts together are `items`."""
        return list(items[self.index - 1 :: self.count])


def parse_part(text: str) -> Part:
    """Part 2 of 8 from "2/8".

    Raises:
        ValueError: if it is something else.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part {text}: give one like 2/8, with a number from 1 to that of the parts.")
    return Part(int(index), int(count))
