"""Parts of a list of work, for several processes or machines at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `index` (from 1) of `count`: every `count`-th entry of a shared list, from the `index`-th on."""

    index: int = 1
    count: int = 1

    def of(self, items: Sequence[T]) -> list[T]:
        """The entries of this part; each entry of `items` is in exactly one part."""
        return list(items[self.index - 1 :: self.count])


def parse_part(text: str) -> Part:
    """Parse "2/8" as part 2 of 8.

    Raises:
        ValueError: if `text` is not of this form, or there is no such part.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(
            f"--part {text}: must be of the form 2/8, for part 2 of 8; parts are counted from 1 to their number."
        )
    return Part(int(index), int(count))
