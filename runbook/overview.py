"""Where one is in the whole: the strip of the steps, what comes next, and what undo costs now; all from the ledger."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from runbook import changes, ledger
from runbook.plan import Plan
from runbook.statements import spelled
from runbook.words import counted

if TYPE_CHECKING:
    from runbook.ledger import Run


class Words(str):
    """Markdown, which a notebook shows with its links and a terminal without them."""

    def __repr__(self) -> str:
        return re.sub(r"\*\*|\[(.*?)\]\(.*?\)", r"\1", self)

    def _repr_markdown_(self) -> str:
        return str(self)


def statements(run: Run) -> pd.DataFrame:
    """What ran so far, as a notebook shows it."""
    columns = ["at", "name", "seconds", "rows", "waited_for"]
    frame = pd.DataFrame([vars(each) for each in run.database.statements], columns=columns)
    return frame.assign(
        at=[f"{at:%H:%M:%S.%f}"[:-3] for at in frame["at"]],
        seconds=frame.seconds.round(4),
        rows=frame.rows.map(lambda rows: "" if rows < 0 else rows),  # of what has no rows
        waited_for=frame.waited_for.map("; ".join),
    )


def strip(plan: Plan, run: Run | None = None) -> Any:
    """The steps with what the ledger says of each, as links; the notebook that is open is marked. Without a run: before it."""
    order = ledger.REPAIR if plan.restore_from == "backup" else ledger.STEPS
    frame = pd.DataFrame({"step": [*order, "monitor"], "state": "", "when": "", "by": ""})
    title = f"{plan.full_name} by {plan.key} · no plan is frozen yet"
    if run:
        frame = run.frame("ledger.steps", steps=list(frame["step"]))
        title = f"{plan.full_name} by {plan.key} · migration {run.migration} ({run.state}) · plan {plan.hash[:12]}"
    here = Path(os.environ.get("JPY_SESSION_NAME", "")).stem

    def link(step: object) -> str:
        name = ledger.NOTEBOOKS[str(step)]
        return f'{"▸&nbsp;" * (name == here)}<a href="{name}.ipynb">{name}</a>'

    return frame.style.hide(axis="index").format(escape="html").format(link, subset=["step"]).set_caption(escape(title))


def ahead(run: Run) -> Words:
    """Which notebook comes next, and what the way back costs at this moment."""
    order = ledger.REPAIR if run.plan.restore_from == "backup" else ledger.STEPS
    with run.database.session("next") as session:
        now = session.row(
            "ledger.now", **run.names, steps=list(order), staging_text=run.staging, backup_text=spelled(run.names["backup"])
        )
        logged = bool(session.value("catalog.there", name=spelled(run.names["back"])))
        waiting = changes.length(run, session, changes.BACK) if now["state"] == "open" and now["swapped"] and logged else 0
    left, megabytes = now["left"] or [], f"{(now['staging'] + now['backup']) / 1e6:,.1f} MB"
    if now["state"] == "rolled back":
        return Words(
            "**Next:** the migration can be started again with [00_plan](00_plan.ipynb). **Undo now:** nothing is left to undo."
        )
    if now["state"] == "finished":
        backup = f"the backup {run.plan.backup} is what is left" if now["backup"] else "there is no way back any more"
        return Words(f"**Next:** [08_monitor](08_monitor.ipynb), every day. **Undo now:** {backup}.")
    if order is ledger.REPAIR:
        cost = "the columns and keys that the repair made go; the rows that it put back stay"
    elif now["swapped"] and not logged:
        cost = "closed, for the log of the changes since the cut-over is there no more"
    elif now["swapped"]:
        cost = f"{counted(waiting, 'row')} that changed since the cut-over {'is' if waiting == 1 else 'are'} replayed into the original, and one short swap locks the names"
        cost += f" (for {now['locked_s'] * 1000:,.0f} ms the last time)" if now["locked_s"] else ""
        cost += "; no write is lost"
    elif now["staging"]:
        added = ", and the columns that 04 added," if now["columns_added"] else ""
        cost = f"{megabytes} of shadow, logs and backup{added} are dropped under locks of some milliseconds"
        cost += "; no row of the original was touched"
    else:
        cost = f"the backup, {megabytes}, is dropped" if now["backup"] else "nothing; only the ledger was written"
    following = ledger.NOTEBOOKS[left[0]] if left else "08_monitor"
    after = "" if left else ", every day; [91_finish](91_finish.ipynb) when the way back is no longer needed"
    return Words(f"**Next:** [{following}]({following}.ipynb){after}. **Undo now** ([90_rollback](90_rollback.ipynb)): {cost}.")
