"""How things look in a notebook: tables whole, an error as one sentence with its way out, the traceback folded away."""

from __future__ import annotations

import re
import sys
import traceback
from html import escape
from types import TracebackType
from typing import Any

import psycopg

from runbook import imports
from runbook.errors import RunbookError, said_by, told
from runbook.ledger import NOTEBOOKS

GO_ON = "Run this notebook again: what is done is not done again."


def settle_in() -> None:
    """In a notebook's kernel, and only there: shows tables whole and errors as sentences."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return
    import pandas as pd

    pd.set_option("display.max_rows", 1000, "display.max_columns", None, "display.max_colwidth", None)
    shell.set_custom_exc((Exception, KeyboardInterrupt), _explain)
    imports.keep()


def _explain(shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType, tb_offset: Any = None) -> None:
    """What stands in place of a traceback, and below it: the notebooks that mend it, and the traceback for who wants it."""
    from IPython.display import HTML, display

    if isinstance(error, KeyboardInterrupt):
        sentence, way_out = "Interrupted. The statement that ran was cancelled.", GO_ON
    else:
        sentence, way_out = told(error), GO_ON if isinstance(error, psycopg.Error) else ""
    if isinstance(error, NameError):
        way_out = "Run this notebook from its first cell."
    if isinstance(error, RunbookError) and not re.search("|".join(NOTEBOOKS.values()), sentence):
        way_out = "Put that right, then run this notebook again: what is done is not done again."
    shown = f"{kind.__name__}: {sentence}" if isinstance(error, RunbookError) else sentence
    shell._showtraceback(kind, type(kind.__name__, (Exception,), {})(sentence), [shown])
    names = "|".join(NOTEBOOKS.values())
    mended = escape(way_out) or " · ".join(dict.fromkeys(re.findall(names, sentence)))
    linked = re.sub(f"({names})", r'<a href="\1.ipynb">\1</a>', mended)
    whole = "".join(traceback.format_exception(kind, error, trace.tb_next or trace))  # without IPython's own frame
    if isinstance(error, psycopg.Error):
        whole = whole.replace(str(error), said_by(error))
    display(HTML(f"<p>{linked}</p><details><summary>Traceback</summary><pre>{escape(whole)}</pre></details>"))  # type: ignore[no-untyped-call]
