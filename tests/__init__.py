"""Promises of the runbook, kept against real PostgreSQL servers."""

import sys

# As absent: nbformat's validator would have it compile 38 grammars, for seconds in each process, and asks for none of them.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
