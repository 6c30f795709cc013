"""Numbers and ends of sentences, as people write them."""

from __future__ import annotations

import pytest

from runbook.words import counted, ended, plain


@pytest.mark.parametrize(
    ("number", "many", "said"),
    [(0, "", "0 rows"), (1, "", "1 row"), (2000, "", "2,000 rows"), (1, "rows are", "1 row"), (2, "rows are", "2 rows are")],
)
def test_one_row_is_no_rows(number: int, many: str, said: str) -> None:
    assert counted(number, "row", many) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no such file", "no such file."),
        ("It failed.\n", "It failed."),
        ("it failed:\n\tIs the server running locally?\n", "it failed: Is the server running locally?"),
    ],
)
def test_a_question_keeps_its_mark_and_gets_no_full_stop(text: str, said: str) -> None:
    assert ended(text) == said


@pytest.mark.parametrize(
    ("encoding", "kept"),
    [
        ("UTF8", "Größe “Ж” …"),
        ("SQL_ASCII", "Größe “Ж” …"),
        ("LATIN1", "Größe '?' ..."),
        ("WIN1252", "Größe “?” …"),
        ("KOI8R", "Gr??e 'Ж' ..."),
        ("EUC_TW", "Größe 'Ж' ..."),
    ],
)
def test_what_an_encoding_cannot_keep_is_kept_in_ascii(encoding: str, kept: str) -> None:
    assert plain("Größe “Ж” …", encoding) == kept
