"""What the commands share: their options, the parameters that these say, and how an error is told."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psycopg

from runbook import parameters
from runbook.errors import BadInput, RunbookError, told
from runbook.execution import EXIT_CODES, FORWARD
from runbook.redaction import known_secrets, redact

NAMES = {alias: name for name in FORWARD for alias in (name, name[:2], name[3:])}


class Sentence(click.Group):
    """Errors of ours and of the server are one sentence and exit code 1, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RunbookError as error:
            said = str(error)
        except psycopg.Error as error:
            said = told(error)
        except KeyboardInterrupt:  # click would say "Aborted!" and exit with 1
            click.echo("Interrupted.", err=True)
            sys.exit(EXIT_CODES["KeyboardInterrupt"])
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = error.filename or "A file of the record"
            said = f"{where} cannot be used: {error.strerror or error}. Mend that, or choose another folder; then give the command again."
        raise click.ClickException(redact(said, known_secrets()))


def step(context: click.Context, option: click.Parameter, value: str) -> str:
    """A step by number, name or both: 03, restore or 03_restore."""
    if value not in NAMES:
        raise click.BadParameter(
            f"{value!r} is not a step; there are {', '.join(FORWARD)} (03, restore and 03_restore are the same)."
        )
    return NAMES[value]


def offered(context: click.Context, option: click.Parameter, begun: str) -> list[str]:
    """The steps that a shell may complete `begun` to: 03_restore, and restore for who begins with the name."""
    return [name for name in FORWARD if name.startswith(begun)] or [name[3:] for name in FORWARD if name[3:].startswith(begun)]


def options(*, users: bool = False, out: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that say which database, which table and how."""
    known = [
        click.option("-f", "file", type=click.Path(path_type=Path, dir_okay=False), help="A YAML file of parameters."),
        click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="One parameter; may be repeated."),
        click.option("--database", help='"embedded", postgresql://user@host/db, service=name or "environment" (PG*).'),
    ]
    if users:
        known.append(click.option("--users", type=click.IntRange(min=0), help="The embedded example only: load so many users."))
    if out:
        place = click.Path(path_type=Path, file_okay=False)
        known.append(click.option("--out", type=place, default="runs", show_default=True, help="Where the record goes."))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(known):
            command = option(command)
        return command

    return decorate


def gather(file: Path | None, pairs: Any, database: str | None, users: int | None = None) -> dict[str, Any]:
    """The parameters of a command, checked; the clinic's only on the embedded server, and only where no table is named."""
    given = parameters.from_file(file) if file else {}
    given |= parameters.from_command_line(list(pairs))
    given |= {name: value for name, value in (("database", database), ("users", users)) if value is not None}
    checked = parameters.check(given)
    if checked.users is not None and checked.database != "embedded":
        raise BadInput(f"users loads the embedded example, and does nothing to {checked.database}: leave it out.")
    if not checked.table:
        if checked.database != "embedded":
            raise BadInput(f"No table is named for {checked.database}: use -f FILE, or -p table NAME -p key COLUMN.")
        given = {**parameters.clinic(), **given}
        parameters.check(given)
    return given
