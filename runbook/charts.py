"""Pictures of what was done and seen; they survive in the archive, without a server and without a script."""

from __future__ import annotations

import io
import warnings
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runbook.ledger import Evidence, Run

BLUE, SKY, ORANGE, RED = "#0072b2", "#56b4e9", "#e69f00", "#d55e00"  # Okabe and Ito: apart for the colour-blind, and in grey
INCHES, SHOWN_PX = 5.2, 624  # so narrow that its letters are legible on a telephone, where it fills the width
MOST = 40  # lines of a picture; the table beside it has them all


class Picture(Figure):
    """A figure that shows itself as PNG in any notebook, with its content in words; it needs neither pyplot nor a backend."""

    words = ""

    def draw(self, renderer: Any) -> None:
        with warnings.catch_warnings():  # a name's emoji that no font has becomes a box, not a page of warnings
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            super().draw(renderer)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=200)
        shown = {"alt": self.words, "width": SHOWN_PX}
        return {"image/png": b64encode(buffer.getvalue()).decode(), "text/plain": self.words}, {"image/png": shown}


class Bars(NamedTuple):
    """One bar a line, with the text at its end."""

    label: str
    colour: str
    lengths: Sequence[float]
    texts: Sequence[str]
    starts: Sequence[float] | None = None


def _plain(text: object, length: int = 60) -> str:
    """A name as a label: no formula, one line, not too long; a tree's indent stays."""
    line = "".join(character if character.isprintable() else " " for character in str(text))
    return (line if len(line) <= length else f"{line[: length - 1]}…").replace("$", r"\$")


def _draw(title: str, unit: str, names: Sequence[object], *sides: Bars, beside: bool = False, tree: bool = False) -> Picture:
    """Horizontal bars, `beside` each other or over each other; long names stand above their bars, and so does a `tree`."""
    lines, share = min(len(names), MOST), len(sides) if beside else 1
    over = tree or max((len(_plain(name)) for name in names), default=0) > 24
    height, top = 0.2 * share + 0.08 + 0.2 * over, 0.2 * over  # of a line, and of its name, in inches
    picture = Picture(figsize=(INCHES, 1.0 + height * max(lines, 2) + 0.2 * (len(sides) > 1)), layout="constrained")
    axes = picture.add_subplot(frameon=False)
    for number, side in enumerate(sides):
        places = [line * height + top + 0.2 * (number * beside + 0.5) for line in range(lines)]
        starts = list(side.starts)[:lines] if side.starts else 0
        edge = RED if side.colour == RED else "#1a1a1a"  # a window of milliseconds shows as a line
        bars = axes.barh(places, list(side.lengths)[:lines], 0.17, left=starts, color=side.colour, label=side.label,
                         edgecolor=edge, linewidth=[0.4 * (edge != RED or length > 0) * (3 if edge == RED else 1)
                                                    for length in list(side.lengths)[:lines]])  # fmt: skip
        axes.bar_label(bars, list(side.texts)[:lines], padding=3, fontsize=8)
    of = f", {lines} of {len(names)}" if len(names) > lines else ""
    axes.set_title(_plain(title, 60) + of, loc="left", fontsize=10)
    middle = [line * height + top + 0.1 * share for line in range(lines)]
    axes.set_yticks(middle, [""] * lines if over else [_plain(name) for name in names[:lines]], fontsize=8)
    for line, name in enumerate(names[:lines] if over else ()):
        axes.text(0, line * height + 0.17, _plain(name), fontsize=8, transform=axes.get_yaxis_transform())
    axes.set(ylim=(max(lines, 1) * height, -0.05), axisbelow=True)
    axes.set_xlabel(unit, fontsize=8)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    if unit == "rows":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e5e7eb")
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    if len(sides) > 1:
        picture.legend(loc="outside lower left", ncols=len(sides), frameon=False, fontsize=8)
    several = sum(any(side.texts) for side in sides) > 1
    said = [
        ", ".join(f"{side.label * several} {side.texts[line]}".strip() for side in sides if side.texts[line])
        for line in range(lines)
    ]
    picture.words = f"{title}, in {unit}{of}: " + "; ".join(
        f"{str(name).strip(' └')} {text}".strip() for name, text in zip(names, said, strict=False)
    )
    return picture


def rows_per_partition(frame: pd.DataFrame) -> Picture:
    """How the rows are spread; `frame` has name and rows."""
    total = max(1, int(frame["rows"].sum()))
    texts = [f"{rows:,} ({rows / total:.1%})" for rows in frame["rows"]]
    return _draw("Rows per partition", "rows", list(frame["name"]), Bars("", BLUE, list(frame["rows"]), texts))


def before_after(frame: pd.DataFrame) -> Picture:
    """Rows per partition when the plan was made and now; `frame` has name, before and rows."""
    return _beside(frame, "name", "Rows before and after", "rows", "{:,}", before="when the plan was made", rows="now")


def latency(frame: pd.DataFrame) -> Picture:
    """Median milliseconds of each look-up, retired table beside result; `frame` has look_up, retired_ms and result_ms."""
    unit, sides = "milliseconds, planning included", {"retired_ms": "retired table", "result_ms": "partitioned table"}
    return _beside(frame, "look_up", "Median latency of a look-up, in turns", unit, "{:.3g}", **sides)


def forecast(frame: pd.DataFrame) -> Picture | None:
    """Seconds of each step, as 00 foretold them and as they were; `frame` has what, unit, forecast and actual. Nothing where it is
    empty, as a repair's is."""
    if frame.empty:
        return None
    steps = frame[frame["unit"] == "s"].dropna(subset=["actual"] if frame["actual"].notna().any() else [])
    sides = {"forecast": "forecast", "actual": "what it took"}
    return _beside(steps, "what", "What 00 foretold, and what it took", "seconds of work", "{:.2f}", **sides)


def _beside(frame: pd.DataFrame, names: str, title: str, unit: str, form: str, **sides: str) -> Picture:
    known = [side for side in sides if frame[side].notna().any()]
    texts = {side: [form.format(each) for each in frame[side]] for side in known}
    bars = [Bars(sides[side], BLUE if side == known[-1] else SKY, list(frame[side]), texts[side]) for side in known]
    return _draw(title, unit, list(frame[names]), *bars, beside=True)


def partition_tree(frame: pd.DataFrame) -> Picture:
    """The partitions under their root, with their sizes; `frame` has name, level, table_bytes and index_bytes."""
    table, index = frame["table_bytes"] / 1e6, frame["index_bytes"] / 1e6
    names = [
        "\u00a0" * 4 * (level - 1) + "└ " * (level > 0) + name for name, level in zip(frame["name"], frame["level"], strict=True)
    ]
    sizes = Bars("indexes", SKY, list(index), [f"{size:,.2f} MB" for size in table + index], list(table))
    return _draw("Partitions and their sizes", "MB", names, Bars("table", BLUE, list(table), [""] * len(names)), sizes, tree=True)


def over_time(frame: pd.DataFrame, column: str, title: str) -> Picture:
    """A line for each partition, of the twelve with most, through the looks at it; `frame` has at, name and the column."""
    last = frame.sort_values("at").groupby("name")[column].last().nlargest(12)
    picture = Picture(figsize=(INCHES, 2.6 + 0.18 * ((len(last) + 1) // 2)), layout="constrained")
    axes = picture.add_subplot(frameon=False)
    for number, name in enumerate(last.index):
        line, dashes = frame[frame["name"] == name].sort_values("at"), ("-", "--", ":")[number // 4 % 3]
        colour, mark = (BLUE, ORANGE, RED, SKY)[number % 4], "osD^"[number % 4]
        axes.plot(line["at"], line[column], color=colour, linestyle=dashes, marker=mark, markersize=4, label=_plain(name, 28))
    axes.set_title(_plain(title, 60), loc="left", fontsize=10)
    axes.set_ylabel(column, fontsize=8)
    axes.set(ylim=(0, None), axisbelow=True)
    axes.grid(axis="y", color="#e5e7eb")
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="x", rotation=20)
    if frame["at"].nunique() == 1:  # one look: its day, and not the years around it
        axes.set_xlim(frame["at"].min() - pd.Timedelta(hours=12), frame["at"].max() + pd.Timedelta(hours=12))
    picture.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    seen = f"{title}, the last of {frame['at'].nunique()} looks: "
    picture.words = seen + "; ".join(f"{name} {value:,.6g} {column}" for name, value in last.items())
    return picture


def lock_timeline(swap: Evidence) -> Picture:
    """Each attempt of the swap on the clock, in seconds, and in the last one the time for which names were locked."""
    attempts = swap.facts.get("attempts", [])  # none is known of a script
    names = [f"attempt {n}" for n, _ in enumerate(attempts, 1)]
    locked = [*([0.0] * len(names)), swap.facts["locked_s"] or 0.0][1:] if names else []
    lengths = [length for _, length in attempts]
    waiting = Bars("waiting for locks", ORANGE, lengths, [f"{length * 1000:.0f} ms" for length in lengths])
    return _locked("The swap", "seconds since the swap began", names, [start for start, _ in attempts], waiting, locked)


def run_timeline(run: Run) -> Picture:
    """Every action of the ledger, the last time that it was done, one after the other; in red, when names were locked."""
    history = run.database.frame("ledger.history", migration=run.migration)
    done = history[history["state"] == "done"].drop_duplicates(["step", "action"], keep="last").sort_values("started_at")
    lengths = (done["finished_at"] - done["started_at"]).dt.total_seconds().tolist()
    names = (done["step"].str.replace("_", " ") + " · " + done["action"]).tolist()
    locked = done["locked_s"].fillna(0.0).where(done["action"] != "forecast", 0.0).tolist()  # that one foretells a time
    starts = [sum(lengths[:line]) for line in range(len(lengths))]
    texts = [
        f"{length:.2f} s" + f", locked {lock * 1000:.0f} ms" * (lock > 0) for length, lock in zip(lengths, locked, strict=True)
    ]
    work = Bars("at work", BLUE, lengths, texts)
    return _locked(run.plan.full_name, "seconds of work; pauses are left out", names, starts, work, locked)


def _locked(title: str, unit: str, names: list[str], starts: list[float], bars: Bars, locked: list[float]) -> Picture:
    begun = [start + length - lock for start, length, lock in zip(starts, bars.lengths, locked, strict=True)]
    label = f"names locked, {sum(locked) * 1000:.0f} ms in all"
    return _draw(title, unit, names, bars._replace(starts=starts), Bars(label, RED, locked, [""] * len(locked), begun))
