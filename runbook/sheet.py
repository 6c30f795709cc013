"""Text as a reader wants it: highlighted in a notebook, plain in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from psycopg import sql


class Listing:
    """A text in a language that Pygments knows; with a title, a notebook shows it folded away under that."""

    def __init__(self, text: str, language: str, title: str = "") -> None:
        self.text, self.language, self.title = text, language, title

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import get_lexer_by_name

        plain = HtmlFormatter(noclasses=True, style="default", nobackground=True, prestyles="font-family: monospace")
        shown = str(highlight(self.text, get_lexer_by_name(self.language), plain))
        return f"<details><summary>{escape(self.title)}</summary>{shown}</details>" if self.title else shown


class Sheet(Listing):
    """The very statements that will run, in their order; prints itself as a script that psql takes."""

    def __init__(self, statements: Iterable[sql.Composable]) -> None:
        super().__init__("\n\n".join(_ended(each.as_string(None).strip()) for each in statements), "postgres")


def _ended(text: str) -> str:
    """With its semicolon; a command of psql ends with its line, and would take it for a part of its last word."""
    return text if text.startswith("\\") else f"{text.rstrip(';')};"


def nothing(of: str, state: str) -> Listing:
    """Instead of the statements of a migration that has ended."""
    return Listing(f"-- The migration of {of} was {state}: nothing is left to run.", "postgres")
