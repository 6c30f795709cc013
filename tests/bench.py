"""The benchmark: the notebooks against a hand-written offline script, in turns, on copies of one clinic."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import click
import psycopg
import yaml
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runbook import embedded, postgres
from runbook.statements import folder
from tests import servers

HERE = Path(__file__).parent
OFFLINE = "offline script"
RATIO, ROW_RATIO = 0.75, 1.1  # to reach: against the script; a row of the largest against one of the smallest


# Two clients of pgbench that know nothing of the migration: most update a user, some insert, some change a role.
USER = "overlay(overlay(md5('user ' || :n) PLACING '4' FROM 13) PLACING 'a' FROM 17)::uuid"
WRITES = rf"""
\set n random(1, :users)
\set kind random(1, 100)
\if :kind <= 60
UPDATE users SET phone = :kind WHERE id = {USER};
\elif :kind <= 80
INSERT INTO appointments (user_id, doc_id, scheduled_at) SELECT {USER}, d.id, now() FROM (SELECT id FROM doctors LIMIT 1) d;
\elif :kind <= 95
INSERT INTO users (email, password, first_name, last_name) VALUES (gen_random_uuid(), '', 'New', :n);
\else
UPDATE users SET role = CASE role WHEN 'user' THEN 'doctor' ELSE 'user' END WHERE id = {USER};
\endif
"""
CALM_S = 10  # so long the writers are watched before the migration begins


@dataclass(frozen=True)
class Turn:
    """One migration: seconds a step, the peak memory of the process that ran it, in MiB, and when each step began."""

    seconds: dict[str, float]
    memory: float = 0
    begun: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def runbook_steps(url: str, unique: str) -> Turn:
    """Runs the code cells of the notebooks 00 to 06 in this process; imports come before the clock starts, also those that the
    cells would wait for later (a kernel has IPython already)."""
    parameters = yaml.safe_load((folder("notebooks") / "clinic.yaml").read_text())
    parameters |= {"database": url, "approved_by": "the benchmark", "unique": unique}
    paths = sorted(folder("notebooks").glob("0[0-6]_*.ipynb"))
    notebooks = {path.stem: list(code_cells(path)) for path in paths}
    for cells in notebooks.values():
        for _, tree in cells:
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), "imports", "exec"), {})
    for module in ("IPython", "runbook.overview"):
        importlib.import_module(module)
    seconds, begun = {}, {}
    for name, cells in notebooks.items():
        namespace: dict[str, Any] = {"__name__": "__main__", "display": lambda *shown, **options: None}
        begun[name], begin = time.time(), time.perf_counter()
        for number, (tags, tree) in enumerate(cells):
            exec(compile(tree, f"{name}, code cell {number}", "exec"), namespace)
            if "parameters" in tags:
                namespace |= {key: value for key, value in parameters.items() if key in namespace}
        seconds[name] = time.perf_counter() - begin
        namespace.clear()  # and with it the connections, as at the end of a kernel
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Turn(seconds, peak / (2**20 if sys.platform == "darwin" else 2**10), begun)


def code_cells(path: Path) -> Iterator[tuple[list[str], ast.Module]]:
    """Tags and syntax tree of each code cell."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield cell["metadata"].get("tags", []), ast.parse("".join(cell["source"]))


def runbook(conninfo: str, unique: str = "per_partition") -> Turn:
    """The notebooks in a process of their own, so that its peak memory is theirs."""
    found = conninfo_to_dict(conninfo)
    url = f"postgresql://{found['user']}@/{found['dbname']}?host={quote(str(found['host']))}&port={found['port']}"
    command = [sys.executable, "-m", "tests.bench", "--only", url, "--unique", unique]
    environment = os.environ | {"MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"The notebooks failed:\n{done.stderr[-4000:]}")
    return Turn(**json.loads(done.stdout))


def kept_unique(conninfo: str) -> Turn:
    """The same, with every unique key kept in the whole table."""
    return runbook(conninfo, "global")


def offline(conninfo: str) -> Turn:
    command = [
        postgres.binaries("psql"),
        "-Xq1d",
        conninfo,
        "-v",
        "ON_ERROR_STOP=1",
        "-f",
        HERE / "offline.sql",
    ]
    begin = time.perf_counter()
    done = subprocess.run(command, env=postgres.environment(), capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"The offline script failed:\n{done.stderr}")
    return Turn({OFFLINE: time.perf_counter() - begin})


@contextlib.contextmanager
def copied(server: str, template: str) -> Iterator[str]:
    """A copy of the template's files, written to disk, as its own changes are before the next turn."""
    names = {"copy": sql.Identifier("bench"), "template": sql.Identifier(template)}
    with psycopg.connect(server, autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {copy} TEMPLATE {template} STRATEGY file_copy")
        connection.execute(create.format(**names))
        connection.execute("CHECKPOINT")
        os.sync()
        yield make_conninfo(server, dbname="bench")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(names["copy"]))
        connection.execute("CHECKPOINT")


def load(server: str, users: int) -> str:
    """Makes the template database with so many users; returns its name."""
    template = f"clinic_{users}"
    click.echo(f"Loading {users:,} users and {2 * users:,} appointments", err=True)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(template)))
    conninfo = make_conninfo(server, dbname=template)
    embedded.load_clinic(conninfo, users)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
    return template


def measure(server: str, users: int, runs: int) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """The turns of the offline script, of the notebooks and of those with `unique = "global"`; who goes first alternates."""
    template = load(server, users)
    turns: dict[Any, list[Turn]] = {offline: [], runbook: [], kept_unique: []}
    for number in range(runs):
        for method in list(turns)[:: 1 if number % 2 == 0 else -1]:
            with copied(server, template) as conninfo:
                turns[method].append(method(conninfo))
            click.echo(f"  {method.__name__}: {turns[method][-1].total:.2f} s", err=True)
    return turns[offline], turns[runbook], turns[kept_unique]


def under_writers(server: str, users: int) -> float:
    """One migration under two writers, printed; returns for how many seconds names were locked. One without them goes before it:
    a new server makes the WAL's files, for which everybody waits some 50 ms each; one that is at work has them."""
    template = load(server, users)
    with copied(server, template) as conninfo:
        runbook(conninfo)
    with copied(server, template) as conninfo, TemporaryDirectory() as folder:
        with writers(conninfo, users, Path(folder)) as log:
            began = time.time()
            time.sleep(CALM_S)
            calm = time.time()
            turn = runbook(conninfo)
        writes = sorted(log)
        with psycopg.connect(conninfo) as connection:
            query = "SELECT (evidence ->> 'locked_s')::float8 FROM runbook.action WHERE action = 'swap' AND state = 'done'"
            (locked,) = connection.execute(query).fetchone() or (0.0,)
    ends = {step: begin + turn.seconds[step] for step, begin in turn.begun.items()}
    before = [seconds for at, seconds in writes if began + 1 < at < calm]
    during = [seconds for at, seconds in writes if turn.begun["01_backup"] < at < ends["05_cutover"]]
    slowest = max((seconds, at) for at, seconds in writes if turn.begun["01_backup"] < at < ends["05_cutover"])
    step = next(name for name, end in ends.items() if slowest[1] < end)
    copying = [seconds for at, seconds in writes if turn.begun["03_restore"] < at < ends["03_restore"]]
    rate, slower = len(before) / (calm - began - 1), len(copying) / turn.seconds["03_restore"]
    low, high = quantiles(before, n=100)[98], quantiles(during, n=100)[98]
    click.echo(f"\n{users:,} users, {2 * users:,} appointments, two writers\n")
    lines = [
        (
            "writes a second",
            f"{rate:,.0f} before, {len(during) / (ends['05_cutover'] - turn.begun['01_backup']):,.0f} during",
            "",
        ),
        ("  while 03 copies", f"{slower:,.0f}, of those before {slower / rate:.2f}", "at least 0.5"),
        ("p50 of a write", f"{1e3 * median(before):.2f} ms before, {1e3 * median(during):.2f} ms during", ""),
        ("p99", f"{1e3 * low:.2f} ms before, {1e3 * high:.2f} ms during: {high / low:.1f} times", "at most 3"),
        (
            "slowest",
            f"{1e3 * max(before):.0f} ms before, {1e3 * slowest[0]:.0f} ms during {step}",
            f"at most {1e3 * (max(before) + locked):.0f} ms",
        ),
        ("names were locked", f"{1e3 * locked:.0f} ms", ""),
    ]
    for what, seen, goal in lines:
        click.echo(f"  {what:<20}{seen:<50}{'to reach: ' + goal if goal else ''}")
    return float(locked)


@contextlib.contextmanager
def writers(conninfo: str, users: int, folder: Path) -> Iterator[list[tuple[float, float]]]:
    """Two writers at work; afterwards the list holds every write: when it ended, and its seconds, retries included."""
    (folder / "writes.sql").write_text(WRITES)
    command = [postgres.binaries("pgbench"), "-n", "-c2", "-T86400", "-Mprepared", "--max-tries=100", f"-Dusers={users}"]
    command += ["-f", folder / "writes.sql", "-l", f"--log-prefix={folder}/log", conninfo]
    found: list[tuple[float, float]] = []
    process = subprocess.Popen(command, env=postgres.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield found
        if process.poll() is not None:
            raise click.ClickException(f"The writers stopped: {process.communicate()[1]}")
        with psycopg.connect(conninfo, autocommit=True) as connection:  # an end in which pgbench still writes its log
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench'")
        process.communicate(timeout=30)
    finally:
        process.kill()
    for path in folder.glob("log*"):
        for line in path.read_text().splitlines():
            _, _, micros, _, seconds, fraction, *_ = line.split()
            if micros.isdecimal():  # not "failed" or "skipped"
                found.append((int(seconds) + int(fraction) / 1e6, int(micros) / 1e6))


def report(users: int, by_hand: list[Turn], notebooks: list[Turn], unique: list[Turn]) -> float:
    """Prints one table; returns the notebooks' median seconds."""
    ours = median(turn.total for turn in notebooks)
    theirs = median(turn.total for turn in by_hand)
    click.echo(f"\n{users:,} users, {2 * users:,} appointments; medians of {len(notebooks)} runs in turn\n")
    for step in notebooks[0].seconds:
        click.echo(f"  {step:<24}{median(turn.seconds[step] for turn in notebooks):>9.2f} s")
    click.echo(f"  {'all notebooks':<24}{ours:>9.2f} s")
    click.echo(f"  {'  unique: global':<24}{median(turn.total for turn in unique):>9.2f} s")
    click.echo(f"  {OFFLINE:<24}{theirs:>9.2f} s")
    click.echo(f"  {'ratio':<24}{ours / theirs:>9.2f}     to reach: at most {RATIO}")
    click.echo(f"  {'peak memory of Python':<24}{max(turn.memory for turn in notebooks):>9.0f} MiB")
    return ours


@click.command()
@click.option("--users", default=1_000_000, show_default=True, help="Users of the clinic; twice the appointments.")
@click.option("--sizes", help="Several numbers of users, such as 100000,1000000: adds the time per row.")
@click.option("--runs", default=3, show_default=True, help="How often each of the two migrates.")
@click.option("--writers", "under", is_flag=True, help="Under two writers instead, without the offline script.")
@click.option("--only", hidden=True, metavar="URL", help="Run the notebooks once against this database.")
@click.option("--unique", hidden=True, default="per_partition")
def main(users: int, sizes: str | None, runs: int, under: bool, only: str | None, unique: str) -> None:
    """Time the notebooks against the hand-written offline script, on an embedded server of their own."""
    if only:
        with contextlib.redirect_stdout(io.StringIO()):
            turn = runbook_steps(only, unique)
        click.echo(json.dumps(asdict(turn)))
        return
    chosen = sorted(int(size) for size in sizes.split(",")) if sizes else [users]
    with servers.own_home():
        server = make_conninfo(embedded.start(users=0), dbname="postgres")
        if under:
            locked = {size: under_writers(server, size) for size in chosen}
            if len(chosen) > 1:
                times = locked[chosen[-1]] / locked[chosen[0]]
                click.echo(
                    f"\n  names locked, {chosen[-1]:,} users against {chosen[0]:,}: {times:.1f} times     to reach: at most 2"
                )
            return
        taken = {size: report(size, *measure(server, size, runs)) for size in chosen}
    if len(chosen) > 1:
        first, last = (taken[size] / size * 1e6 for size in (chosen[0], chosen[-1]))
        click.echo(f"\n  time per row: {first:.2f} µs of {chosen[0]:,}, {last:.2f} µs of {chosen[-1]:,}:")
        click.echo(f"  {'ratio':<24}{last / first:>9.2f}     to reach: at most {ROW_RATIO}")


if __name__ == "__main__":
    main()
