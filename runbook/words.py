"""Small parts of the sentences that people read."""

from __future__ import annotations

import codecs

ASCII = {"…": "...", "“": "'", "”": "'", "→": "->", "µ": "u", "·": "-"}  # nothing that would end a string of JSON


def counted(number: int, one: str, many: str = "") -> str:
    """1 row, 2,000 rows; with `many` where more than an s is different."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def ended(text: str) -> str:
    """What a server or a library said, in one line and as a sentence: with a full stop, unless it ends by itself."""
    line = " ".join(text.split()).rstrip(".")
    return line if line.endswith(("?", "!")) else f"{line}."


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return ASCII.get(error.object[error.start], "?"), error.start + 1


codecs.register_error("runbook.plain", _in_ascii)


def plain(text: str, encoding: str) -> str:
    """The text as a database of that encoding can keep it: what it has no character for, in ASCII. SQL_ASCII keeps any bytes."""
    if encoding in ("UTF8", "SQL_ASCII"):
        return text
    try:
        codec = codecs.lookup(encoding.replace("WIN", "cp").replace("KOI8", "koi8_")).name
        return text.encode(codec, "runbook.plain").decode(codec)
    except LookupError:  # of those that Python does not know our own characters are not to be expected
        return "".join(ASCII.get(each, each) for each in text)
