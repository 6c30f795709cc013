"""Turn a live PostgreSQL table into a partitioned one, notebook by notebook, without losing a write."""

import signal
import sys
from importlib.metadata import PackageNotFoundError, version

# The command line takes a second to load: until then Ctrl-C ends it without a word, and without a traceback.
if [name.rpartition("/")[2] for name in sys.argv[:1]] == ["runbook"] and signal.getsignal(
    signal.SIGINT
) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from runbook.draft import draft
from runbook.errors import RunbookError
from runbook.ledger import open, open_last
from runbook.notebook import settle_in

try:
    __version__ = version("partition-runbook")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["RunbookError", "__version__", "draft", "open", "open_last"]

settle_in()
