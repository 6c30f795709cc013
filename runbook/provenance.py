"""Where a record comes from: who ran it, with which versions of which libraries, from which revision."""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runbook.statements import folder

LIBRARIES = ("ipykernel", "matplotlib", "nbclient", "nbconvert", "numpy", "pandas", "papermill", "psycopg", "pydantic",
             "sqlalchemy")  # fmt: skip


def os_user() -> str:
    """The operating system's name of who runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())


def operator() -> str:
    """Who runs this: OS user and host."""
    return f"{os_user()}@{socket.gethostname()}"


def library(name: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def statements() -> str:
    """The sha256 of the SQL that is shipped: by it a record's names of statements are known to be those of a revision."""
    files = sorted(folder("sql").glob("*.sql"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def checkout(path: Path) -> dict[str, Any]:
    """The revision that `path` is at, and whether its tracked files are unchanged; empty outside a checkout."""

    def git(*words: str) -> str:
        folder = path if path.is_dir() else path.parent
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            ["git", "-C", folder, *words], env=environment, capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        if path.is_file():  # an installed package may lie in someone else's checkout
            git("ls-files", "--error-unmatch", path.name)
        revision = git("rev-parse", "HEAD").strip()
        return {"revision": revision, "clean": not git("status", "--porcelain", "--untracked-files=no")}
    except (OSError, subprocess.SubprocessError):
        return {"revision": "", "clean": None}
