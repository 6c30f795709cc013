"""What is spared while libraries are loaded is spared, and missed by nobody afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from runbook import imports
imports.jsonschema()
import nbformat
assert "lark" not in sys.modules and "rfc3987_syntax" not in sys.modules
import rfc3987_syntax, typeguard
checked = typeguard.typechecked
assert imports.sqlacodegen().DeclarativeGenerator
import inflect
assert typeguard.typechecked is checked
assert inflect.engine().plural("appointment") == "appointments"
assert "typeguard" not in inflect.engine.plural.__code__.co_names
"""


@pytest.mark.long
def test_what_nobody_here_uses_is_not_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
