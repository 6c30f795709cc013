"""Libraries, without the seconds that they spend while they are loaded on what nothing here uses."""

from __future__ import annotations

import gc
import importlib
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any


def keep() -> None:
    """What is loaded by now stays: the collector does not go over it again, nor at the process's end, which took 0.4 s a notebook."""
    gc.freeze()


def jsonschema() -> None:
    """Load it before nbformat does, without the grammar of internationalized addresses that it builds for a format of which no
    notebook's schema knows: 0.7 s of each command's start."""
    if "jsonschema" in sys.modules or "rfc3987_syntax" in sys.modules:
        return
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("jsonschema")
    finally:
        del sys.modules["rfc3987_syntax"]


def sqlacodegen() -> ModuleType:
    """Its generators, without the instructions by which inflect checks the types of its own arguments: 1.2 s of 07."""

    def unchecked(defined: Any) -> Any:
        return defined

    with suppress(ImportError):
        typeguard = importlib.import_module("typeguard")
        checked = typeguard.typechecked
        typeguard.typechecked = unchecked  # type: ignore[attr-defined]
        try:
            importlib.import_module("inflect")
        finally:
            typeguard.typechecked = checked  # type: ignore[attr-defined]
    return importlib.import_module("sqlacodegen.generators")
