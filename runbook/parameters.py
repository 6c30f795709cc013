"""What a notebook may be told: names, types and what is refused."""

from __future__ import annotations

import ast
import json
import sys
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from runbook.errors import BadInput
from runbook.statements import folder

PartitionValue = str | int | float | bool | None


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping; JSON and YAML would silently take the last of two that have one name."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} stands there twice")
    return dict(pairs)


class _Yaml(yaml.SafeLoader):
    """YAML whose mappings have each name once."""


_Yaml.add_constructor("tag:yaml.org,2002:map", lambda loader, node: _once(loader.construct_pairs(node, deep=True)))


def _parse(value: object) -> object:
    """Papermill's -p hands a mapping over as text."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON from character {error.pos + 1} on") from None
        except ValueError as error:
            raise ValueError(f"is not valid JSON ({error})") from None
    return value


Parsed = BeforeValidator(_parse)
Count = Annotated[int, Field(ge=1)]


class Parameters(BaseModel):
    """Every parameter of every notebook; strict: "false", 7 and YAML's `no` are not taken for what they are not."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    database: str = "embedded"
    table: str = ""
    plan: Annotated[str, Field(pattern="^([0-9a-f]{12,64})?$")] = ""
    # 00: frozen into the plan
    key: str = ""
    partition_by: Literal["list", "range", "hash"] = "list"
    partitions: Annotated[dict[str, list[PartitionValue] | str] | None, Parsed] = None
    every: str | int = ""
    ahead: Annotated[int, Field(ge=0)] = 3
    modulus: Annotated[int, Field(ge=0)] = 0
    add: Annotated[dict[str, list[PartitionValue]] | None, Parsed] = None
    unique: Literal["global", "per_partition"] = "global"
    null_value: str | int | None = None
    legacy_inserts: Literal["fill", "strict"] = "fill"
    backup: str = ""
    backup_method: Literal["table", "dump"] = "table"
    restore_from: Literal["source", "backup"] = "source"
    references: Annotated[dict[str, list[str]] | None, Parsed] = None
    fail_on: Literal["blocker", "warning"] = "blocker"
    users: Annotated[int | None, Field(ge=0)] = None
    # how a step goes about it
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    range_mib: Count = 32
    batch_rows: Count = 2000
    max_replica_lag_s: Annotated[int, Field(ge=0)] = 0
    max_active_sessions: Annotated[int, Field(ge=0)] = 0
    lock_timeout_ms: Annotated[int, Field(ge=1, le=10_000)] = 300
    budget_s: Count = 120
    approved_by: str = ""
    keep_backup: bool = False
    unneeded_for_h: Annotated[int, Field(ge=0)] = 24
    force_strict: bool = False
    keep_fill: bool = False
    drop_backup: bool = False
    # 07 and 08: the application's statements, and what fails a look
    queries: str = ""
    max_default_rows: Annotated[int, Field(ge=0)] = 0
    max_new_values: Annotated[int, Field(ge=0)] = 0
    max_dead_percent: Annotated[int, Field(ge=0, le=100)] = 50
    min_pruning_percent: Annotated[int, Field(ge=0, le=100)] = 0
    max_filled_rows: Annotated[int | None, Field(ge=0)] = None
    max_log_mib: Annotated[int, Field(ge=0)] = 1024
    min_ahead: Annotated[int, Field(ge=0)] = 1


def check(given: dict[str, Any]) -> Parameters:
    """The parameters, validated; raises BadInput with a sentence for each that is unknown or has a wrong type."""
    if void := [name for name, value in given.items() if "\0" in str(value)]:
        raise BadInput(f"{void[0]} has a NUL character, which no name or value in PostgreSQL can have: take it out.")
    try:
        return Parameters.model_validate(given)
    except ValidationError as error:
        raise BadInput(" ".join(_sentences(error))) from None


KINDS = {"str": "text", "bool": "yes/no", "int": "number", "float": "number", "dict": "mapping", "datetime": "time"}
# What is meant where something else stands, by Pydantic's name for the fault.
MEANT = {
    "string_type": "must be text: put it in quotes",
    "int_type": "must be a whole number: write it in digits, without quotes",
    "bool_type": "must be true or false: write one of these, without quotes",
    "greater_than_equal": "must be at least {ge}: choose a larger one",
    "less_than_equal": "must be at most {le}: choose a smaller one",
    "literal_error": "must be {expected}: choose one of these",
    "dict_type": 'must be a mapping: write names with their values, as {{"name": ["value"]}}',
    "list_type": 'must be a list of values: write it in brackets, as ["value"]',
    "string_pattern_mismatch": "must be the first 12 digits of a plan's hash, or all 64: copy them from 00_plan",
}


def _sentences(error: ValidationError) -> list[str]:
    said: dict[str, str] = {}
    for problem in error.errors():
        name, *inner = map(str, problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(name, Parameters.model_fields, 1)
            also = f": did you mean {near[0]}?" if near else f"; there are: {', '.join(Parameters.model_fields)}."
            said[name] = f"{name} is not a parameter of any notebook{also}"
            continue
        given, meant = problem["input"], MEANT.get(problem["type"], "").format(**problem.get("ctx", {}))
        if name == "every":
            meant = "must be hour, day, week, month, quarter, year or a whole number: write one of these"
        meant = meant or f'{problem["msg"].removeprefix("Value error, ")}: write it as {{"name": ["value"]}}'
        kind = KINDS.get(type(given).__name__, type(given).__name__)
        what, shown = name, "empty" if given is None else f"{_shown(given)} ({kind})"
        if isinstance(given, list) and problem["type"] == "string_type":
            meant = "must be text: write it without brackets"
        elif given is None:
            meant = f"{meant.partition(':')[0]}: give it one, or leave it out"
        if inner[-1:] == ["[key]"]:
            what, meant = f"A name in {name}", "must be text: put it in quotes"
        elif any(isinstance(each, int) for each in problem["loc"][2:]):
            what, meant = (
                f"A value of {inner[0]} in {name}",
                meant.replace("text:", "text:" if name == "references" else "text or a number:"),
            )
        elif inner and name in ("partitions", "add", "references"):
            what = f"{inner[0]} in {name}"
        said.setdefault(name, f"{what} is {shown}, but {meant}.")
    return list(said.values())


def _shown(value: object) -> str:
    """A value as its file has it, or nearly so."""
    match value:
        case date():
            return str(value)
        case list():
            return f"[{', '.join(map(_shown, value))}]"
        case dict():
            return f"{{{', '.join(f'{_shown(name)}: {_shown(each)}' for name, each in value.items())}}}"
    return repr(value)


def from_file(path: Path) -> dict[str, Any]:
    """A YAML file of parameters, as Papermill's -f takes it; raises BadInput when it holds anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: name a YAML file of parameters.") from None
    except (OSError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        said = error.strerror or "" if isinstance(error, OSError) else " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            said = f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        raise BadInput(f"{path} cannot be read as a YAML file of parameters ({said}): correct it, or name another.") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise BadInput(f"{path} must hold parameters, a line each, as `table: users`.")
    return content


def from_command_line(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """`-p name value`: text stays text where the parameter is text, anything else is read as JSON."""
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name in given:
            raise BadInput(f"{name} is given twice: say it once.")
        given[name] = value
        field = Parameters.model_fields.get(name)
        if field is not None and str not in (field.annotation, *getattr(field.annotation, "__args__", ())):
            try:
                given[name] = json.loads(value, object_pairs_hook=_once)
            except ValueError:
                given[name] = value
    return given


def clinic() -> dict[str, Any]:
    """The example's own parameters."""
    return from_file(folder("notebooks") / "clinic.yaml")


def resolve(**given: Any) -> Parameters:
    """What a notebook calls: its parameters, checked together with whatever Papermill injected.

    An empty `table` means the clinic, and only on the embedded server: with any other database the clinic's
    file is never a silent default.
    """
    told = injected()
    checked = check({**told, **given})
    if checked.table:
        return checked
    if checked.database != "embedded":
        raise BadInput(
            f"table is not named: on {checked.database} say which one to partition, with -p table … -p key …, or with -f FILE."
        )
    defaults = Parameters()
    said = {name: value for name, value in given.items() if name in told or value != getattr(defaults, name)}
    return check({**clinic(), **said})


def forget() -> None:
    """In a notebook's kernel: what was opened before is none any more, should it be refused now; no later cell works on with it."""
    defined = _shown_names()
    for name in ("run", "draft"):
        if type(defined.get(name)).__module__.startswith("runbook."):  # somebody's console may have its own
            del defined[name]


def _shown_names() -> dict[str, Any]:
    """What a notebook's cells have defined; nothing where there is no notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "user_ns", {})


def injected() -> dict[str, Any]:
    """What Papermill's injected cell assigned in this kernel: it refuses no name by itself.

    Papermill opens that cell with the comment "# Parameters"; elsewhere there is none, and nothing to check. The cell's
    own text counts: `backup` may name the module by now. Of one that was corrected and run again, the last text counts.
    """
    defined = _shown_names()
    cells = defined.get("In", [])
    last = next((cell for cell in reversed(cells) if cell.startswith("# Parameters\n")), "")
    given: dict[str, Any] = {}
    for node in ast.parse(last).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            try:
                given[name] = ast.literal_eval(node.value)
            except ValueError:  # float("nan") and the like
                given[name] = defined[name]
    return given
