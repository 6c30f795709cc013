"""Small parts of the sentences that people read."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """1 row, 2,000 rows; with `many` where more than an s is different."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def ended(text: str) -> str:
    """What a server or a library said, in one line and as a sentence: with a full stop, unless it ends by itself."""
    line = " ".join(text.split()).rstrip(".")
    return line if line.endswith(("?", "!")) else f"{line}."
