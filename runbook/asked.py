"""What the plan in force was asked for: a later command that asks for something else is told so, for the plan is what counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runbook.errors import BadInput
from runbook.parameters import Parameters

if TYPE_CHECKING:
    from runbook.ledger import Run

DIVISION = ("partitions", "every", "ahead", "modulus")  # after the cut-over 20 goes by these
DECISIVE = ("key", "partition_by", "unique", "legacy_inserts", "restore_from")
PLANNED = (*DECISIVE, *DIVISION, "null_value", "backup", "backup_method", "references")  # only 00 takes them


def remembered(given: Parameters) -> dict[str, Any]:
    """What the ledger keeps of the parameters of a plan."""
    return given.model_dump(mode="json", include=set(PLANNED))


def refuse_another(run: Run, given: Parameters, named: set[str]) -> None:
    """Raises BadInput when one of the parameters that were `named` is another than the plan was made with."""
    seen = run.finished("plan", "check")
    before: dict[str, Any] = (seen.facts.get("given") if seen else None) or {name: getattr(run.plan, name) for name in DECISIVE}
    for name, now in remembered(given).items():
        if name not in named or name not in before or (run.swapped and name in DIVISION):
            continue
        was = before[name]
        if name == "partitions" and now and was is None:  # one a value, step or remainder: their names must be right
            was, now = dict.fromkeys(sorted(each.name for each in run.plan.partitions)), dict.fromkeys(sorted(now))
        if name == "partitions" and now and was:
            was, now = _apart(was, now, given.partition_by == "list")
        if was != now:
            raise BadInput(
                f"{name} is {now!r}, but the plan {run.plan.hash[:12]} of {run.plan.full_name}, which is in force, has {was!r}: go on"
                " with that, or roll back with 90_rollback and plan again."
            )


def _apart(was: dict[str, Any], now: dict[str, Any], by_list: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those entries of both that differ; by list the order of values means nothing."""

    def plain(each: object) -> object:
        return sorted(each, key=repr) if isinstance(each, list) and by_list else each

    differing = [name for name in {**was, **now} if name not in was or name not in now or plain(was[name]) != plain(now[name])]
    return tuple({name: each[name] for name in differing if name in each} for each in (was, now))  # type: ignore[return-value]
