"""Turn a live PostgreSQL table into a partitioned one, notebook by notebook, without losing a write."""

from importlib.metadata import PackageNotFoundError, version

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
