"""The auditor's one page: each promise, the SQL that proved it, what was seen, who did it and who approved it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from html import escape
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from psycopg.conninfo import make_conninfo

from runbook import verify
from runbook.archive import Run as Record
from runbook.archive import write_whole
from runbook.ledger import NOTEBOOKS, Run
from runbook.pages import unlinked
from runbook.redaction import redact, redacted
from runbook.words import counted

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
 body {{ font: 16px/1.5 sans-serif; margin: 1.5em auto; padding: 0 1em; max-width: 60em;
  color: #1a1a1a; overflow-wrap: anywhere }}
 h2 {{ margin: 2em 0 .5em }} h3 {{ margin: 1.6em 0 .3em; font-size: 1em }} p {{ margin: .2em 0 }}
 table {{ border-collapse: collapse }} th, td {{ text-align: left; vertical-align: top; padding: .2em 1em .2em 0 }}
 th {{ font-weight: normal; color: #555; overflow-wrap: normal; min-width: 7em }}
 pre {{ background: #f4f4f4; padding: .6em .8em; margin: .4em 0; font-size: .8em; white-space: pre-wrap }}
 summary {{ color: #00459e; cursor: pointer }} .pass {{ color: #00602b }} .fail {{ color: #9b0019 }} .not-tried {{ color: #555 }}
 .pass, .fail, .not-tried {{ font-weight: bold }}
 @media print {{ pre {{ font-size: .6em }} summary {{ display: none }} details::details-content {{ content-visibility: visible; block-size: auto }} }}
 @media (max-width: 700px) {{ th, td {{ display: block }} td {{ margin-bottom: .5em }} }}
</style></head><body>
<nav><a href="../index.html">All runs</a></nav>
<main>
<h1>{title}</h1>
<p>{verdict}</p>
<table>{facts}</table>
<h2 id="promised">What was promised</h2>
<p>Each block below is one command: given to a shell, it asks the database again, without the runbook, and writes nothing.
 Where the plan's own values are needed, it reads them from the ledger (schema <code>runbook</code>).</p>
{promises}
<h2>What was done</h2>
<table>{actions}</table>
<h2>What was known before</h2>
<table>{findings}</table>
<h2>The files of this record</h2>
<p>The notebooks', with the sha256 of each. <code>manifest.json</code> has these, and those of the evidence, the promises and this page;
 the next run and the ledger name the manifest.</p>
<table>{files}</table>
</main>
</body></html>
"""
UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # a name may have it, XML may not
AS_READ = {
    "default_transaction_read_only": "on", "TimeZone": "UTC", "DateStyle": "ISO", "IntervalStyle": "iso_8601",
    "bytea_output": "hex", "extra_float_digits": "1",
}  # fmt: skip
VERDICT = {"pass": "pass", "fail": "fail", "not tried": "not-tried"}


def write(record: Record, run: Run) -> None:
    """Puts the ledger's evidence into the record's folder, and, where 06 looked, the certificate, JUnit XML and Markdown.

    To be called before the record is sealed, which makes the files part of it.
    """
    with run.database.session("certificate") as session, session.qualified():
        whole = redacted(session.value("ledger.whole", migration=run.migration), record.secrets)
        there = session.connection.info
    # By PG* variables an auditor, who has others, would ask another server.
    address = run.database.conninfo or make_conninfo(host=there.host, port=there.port, dbname=there.dbname, user=there.user)
    write_whole(record.folder / "evidence.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    record.manifest["approved_by"] = _accepted(record.manifest, whole)
    if not any(step["notebook"] == "06_verify.ipynb" for step in record.manifest["steps"]):
        return
    promises = [verify.Promise(**redacted(vars(each), record.secrets)) for each in verify.seen(run)]
    counts = Counter(each.verdict for each in promises)
    verdict = f"{counted(counts['pass'], 'promise holds', 'promises hold')}, {counted(counts['fail'], 'is', 'are')} broken, {counts['not tried']} could not be tried."
    write_whole(record.folder / "certificate.html", _page(record, run, whole, promises, verdict, address))
    write_whole(record.folder / "promises.xml", _junit(run, promises, counts))
    write_whole(record.folder / "promises.md", _markdown(run, promises, verdict))


def _page(record: Record, run: Run, whole: dict[str, Any], promises: list[verify.Promise], verdict: str, address: str) -> str:
    said, plan, database = record.manifest, whole["migration"]["plan"], redact(run.database.name, record.secrets)
    git = said["git"]["runbook"]
    where = f"{git['revision']} ({'unchanged' if git['clean'] else 'changed'})" if git["revision"] else "an installed package"
    facts = {
        "Database": f"{': '.join(filter(None, [database, said.get('target')]))} ({said['server']})", "Table": f"{run.plan.full_name} by {run.plan.key}",
        "Plan": whole["migration"]["plan_hash"], "Migration": f"{run.migration} ({run.state})",
        "Operator": f"{said['operator']} on {said['host']}, as {said['database_user']}",
        "Approved by": _approver(whole, "cutover") or "nobody", "Run": f"{said['run']}, begun {said['begun']}",
        "Runbook": f"{said['versions']['partition-runbook'] or 'unknown'}, {where}, sha256 of its SQL {said['sql'][:12]}, Python {said['versions']['python']}",
    }  # fmt: skip
    quoted = shlex.quote(redact(address, record.secrets))
    pages = unlinked(record.folder, "certificate.html")  # as they will be when the record is sealed
    files = said["files"] | {page.name: hashlib.sha256(text.encode()).hexdigest() for page, text in pages.items()}
    return PAGE.format(
        title=escape(f"Certificate of {run.plan.full_name}, partitioned by {run.plan.key}"),
        verdict=escape(verdict),
        facts=_rows(facts.items()),
        promises="\n".join(_section(number, each, quoted) for number, each in enumerate(promises, 1)),
        actions=_rows((f"{each['step']}, {each['action']}", _told(each)) for each in whole["actions"]),
        findings=_rows((f"{each['level']}: {each['object']}", each["sentence"]) for each in plan["findings"]),
        files="\n".join(f'<tr><th scope="row">{_linked(name)}</th><td>{files[name]}</td></tr>' for name in sorted(files)),
    )


def _approver(whole: dict[str, Any], *steps: str) -> str:
    """Who approved last: of these steps, or of any."""
    done = [each for each in whole["actions"] if (each["action"].split()[0], each["state"]) == ("approval", "done")]
    return next((each["evidence"]["approved_by"] for each in reversed(done) if not steps or each["step"] in steps), "")


def _accepted(said: dict[str, Any], whole: dict[str, Any]) -> str:
    """Who approved what this record did, or else the plan: a name is nobody's approval before a gate has taken it."""
    gates = {f"{NOTEBOOKS[step]}.ipynb": step for step in ("cutover", "add", "finish")}
    found = [(each["state"], _approver(whole, gates[each["notebook"]])) for each in said["steps"] if each["notebook"] in gates]
    asked = str(said["parameters"].get("approved_by", "")).strip()
    if not found:
        return _approver(whole, "cutover")
    return next((who for state, who in reversed(found) if who and (state == "completed" or who == asked)), "")


def _section(number: int, promise: verify.Promise, address: str) -> str:
    head = f'<h3>{number}. {escape(promise.promise)}: <span class="{VERDICT[promise.verdict]}">{promise.verdict}</span></h3>'
    head += f"<p>{escape(promise.seen)}</p>"
    if not promise.sql:
        return head
    asked = promise.sql.strip()
    if promise.tried:  # on a row that was chosen then
        summary = "Could not be tried" if promise.verdict == verify.NOT_TRIED else "Tried, and rolled back"
        return f"{head}<details><summary>{summary}</summary><pre>{escape(asked)}</pre></details>"
    settings = AS_READ | ({"search_path": "pg_catalog"} if "runbook.migration" in asked else {})  # names are as the plan has them
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    end = "" if "\n\\" in f"\n{asked}" else ";"
    command = f"PGOPTIONS='{options}' psql -X -v ON_ERROR_STOP=1 {address} <<'SQL'\n{asked.rstrip(';')}{end}\nSQL"
    return f"{head}<details><summary>Ask again</summary><pre>{escape(command)}</pre></details>"


def _told(action: dict[str, Any]) -> str:
    at = action["started_at"][:19].replace("T", " ")
    return f"{at} UTC, {action['operator']}: {action['sentence'] or ''} ({action['state']})"


def _linked(name: str) -> str:
    """The name of a file; a page's leads to it."""
    return f'<a href="{quote(name)}">{escape(name)}</a>' if name.endswith(".html") else escape(name)


def _rows(pairs: Any) -> str:
    return "\n".join(f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>' for name, value in pairs)


def _junit(run: Run, promises: list[verify.Promise], counts: Counter[str]) -> str:
    sums = {"tests": len(promises), "failures": counts["fail"], "errors": 0, "skipped": counts["not tried"]}
    suite = ElementTree.Element("testsuite", {"name": run.plan.full_name, **{name: str(value) for name, value in sums.items()}})
    for each in promises:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "06_verify", "name": each.promise})
        if each.verdict != "pass":
            found = ElementTree.SubElement(case, "failure" if each.verdict == "fail" else "skipped", {"message": each.seen})
            found.text = each.sql
        ElementTree.SubElement(case, "system-out").text = each.seen
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, "unicode", xml_declaration=True) + "\n"
    return UNSPEAKABLE.sub("\ufffd", text)


def _markdown(run: Run, promises: list[verify.Promise], verdict: str) -> str:
    signs = {"pass": "✅", "fail": "❌", "not tried": "➖"}
    cells = [[each.promise, each.seen, f"{signs[each.verdict]} {each.verdict}"] for each in promises]
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in cells]
    return "\n".join([f"## {run.plan.full_name}", "", verdict, "", "| promise | seen | verdict |", "|---|---|---|", *lines, ""])
