"""SQL as a reader wants it: the very statements that will run, highlighted in a notebook, plain in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import sql


class Sheet:
    """Statements in their order; shows itself as highlighted SQL, prints itself as a script that psql takes."""

    def __init__(self, statements: Iterable[sql.Composable]) -> None:
        self.text = "\n\n".join(each.as_string(None).strip().rstrip(";") + ";" for each in statements)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PostgresLexer

        plain = HtmlFormatter(noclasses=True, style="friendly", nobackground=True, prestyles="font-family: monospace")
        return str(highlight(self.text, PostgresLexer(), plain))
