"""Make one HTML page of the newest run in a database: what ran when, what failed and why, what was slow.

    python examples/report.py sales.db                # writes sales.db.html
    python examples/report.py sales.db page.html      # it only reads, and may do so during a run
"""

import sys
import time
from heapq import heappop, heappush, nlargest
from html import escape
from itertools import groupby
from operator import attrgetter as by
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is
import pipeloom

TASKS, TOP, LANES, MARKS = 100_000, 20, 120, 3_000  # the most that are read, listed and drawn
STATUSES = ["error", "unfinished", "cancelled", "running", "queued", "done"]  # the worst first
UNITS = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (0.001, "ms")]
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; --bg: #fbfaf8; --ink: #22262c; --soft: #646a73; --line: #e5e2dc }
@media (prefers-color-scheme: dark) { :root { --bg: #17191d; --ink: #ddd; --soft: #9aa; --line: #333 } }
.error { color: #d3503b } .unfinished, .queued { color: #8a70b8 } .cancelled { color: #95825f }
.running { color: #3f82d0 } .done { color: #5f958c } rect, i { fill: currentColor; background: currentColor }
body { max-width: 70rem; margin: auto; padding: clamp(1.8rem, 6vw, 5rem) clamp(1.1rem, 4vw, 3rem);
  background: var(--bg); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2 { font-weight: 600; line-height: 1.2; margin: 3rem 0 .7rem; font-size: 1.3rem }
h1 { font-size: clamp(1.8rem, 5vw, 2.5rem); margin: 0 } small { display: block } pre { overflow-x: auto }
p, small, aside, text { font-size: .875rem; color: var(--soft); fill: var(--soft) } b { font-weight: 400 }
big { display: inline-block; margin: .4rem 3rem 0 0; font-size: 1.7rem }
i { display: inline-block; width: .6rem; height: .6rem; border-radius: 2px } text { text-anchor: end }
article { display: flex; align-items: baseline; gap: .7rem; padding: .5rem 0; border-top: 1px solid }
article, line { border-color: var(--line); stroke: var(--line) } div { flex: 1; min-width: 0 }
</style><title>%(name)s</title></head><body><main><h1>%(name)s</h1>%(body)s</main></body></html>"""
ROW = "<article><i class=%s></i><div>%s<aside>%s</aside></div><b>%s</b></article>\n"


def main(database="", target=""):
    page = Path(target or f"{database}.html")
    try:
        if page.exists() and page.samefile(database):
            raise pipeloom.UsageError(f"{str(page)!r} is the database; name another file for the page")
        text = html(pipeloom.read_status(database, limit=TASKS))
        with TemporaryDirectory(dir=str(page.parent)) as folder:  # so that nobody sees half a page
            Path(folder, page.name).write_text(text, encoding="utf-8")
            Path(folder, page.name).replace(page)
    except (OSError, pipeloom.PipeloomError) as error:
        print(f"report: {error}", file=sys.stderr)
        sys.exit(2)
    print(str(page).encode("utf-8", "backslashreplace").decode("utf-8"))


def html(status):
    tasks, now = newest_run(status)
    ran = [task for task in tasks if task.took is not None]
    rest = [task for task in tasks if task.status in ("running", "queued", "unfinished")][:TOP]
    slow = nlargest(TOP, ran, key=by("took"))
    body = {"What ran when": drawing(ran) if ran else [], "What failed and why": failures(tasks)}
    body["Not ended"] = (ROW % (t.status, shown(t.name), shown(t.message), f"{t.progress:.0%}") for t in rest)
    body["Slowest"] = (ROW % (t.status, shown(t.name), "", clock(t.took)) for t in slow)
    body = "".join(f"<h2>{title}</h2>{''.join(part) or '<p>nothing</p>'}" for title, part in body.items())
    return PAGE % {"name": shown(status["database"]), "body": summary(status, tasks, now) + body}


def newest_run(status):
    """The tasks of the newest run that ran something; and the time, the last one known if nothing runs."""
    tasks = [SimpleNamespace(**{"run_id": None, "traceback": None, **row}) for row in status["tasks"]]
    newest = max(((task.began is not None, task.run_id or 0) for task in tasks), default=(0, 0))[1]
    tasks = [task for task in tasks if (task.run_id or 0) == newest]
    is_on = status["run"] and status["run"]["alive"] is not False and status["run"]["id"] == newest
    now = time.time() if is_on else max((task.ended or task.began or 0 for task in tasks), default=0)
    for task in tasks:
        task.name, task.message, task.began = str(task.name), str(task.message or ""), max(task.began or 0, 0)
        end = task.ended or (task.began if task.status in ("done", "error", "cancelled") else now)
        task.ended = max(end, task.began)
        task.took = task.ended - task.began if task.began and task.status != "queued" else None
        if task.status not in STATUSES or (task.status in ("running", "queued") and not is_on):
            task.status = "unfinished"  # its process is gone
    return sorted(tasks, key=by("began")), now


def summary(status, tasks, now):
    run, others = status["run"], sum(status["counts"].values()) - len(tasks)
    began = min((task.began for task in tasks if task.began), default=now)
    said = time.strftime("Began %Y-%m-%d %H:%M:%S UTC. ", time.gmtime(began)) if tasks else ""
    if run and tasks:
        said += f"Run {tasks[0].run_id} is the newest that ran something. Run {run['id']}: {run['status']}. "
    said += f"{others:,} earlier tasks are not shown." * bool(others)
    counts = {name: sum(task.status == name for task in tasks) for name in STATUSES[::-1]}
    rate = (counts["done"] + counts["error"]) / max(now - began, 0.001)
    facts = [(f"{n:,}", f"<i class={name}></i> {name}") for name, n in counts.items() if n]
    facts += [(clock(now - began), "in all"), (f"{rate:,.1f}", "tasks a second")]
    return f"<p>{said}</p>" + "".join(f"<big>{n}<small>{what}</small></big>" for n, what in facts)


def drawing(tasks):
    """Each task as a rectangle, in as few lanes as there were tasks at once; tiny neighbours share one."""
    ends, start = [], tasks[0].began
    for task in tasks:
        task.lane = heappop(ends)[1] if ends and ends[0][0] <= task.began else len(ends)
        heappush(ends, (task.ended, task.lane))
    lanes, span = min(len(ends), LANES), max(max(ends)[0] - start, 0.001)
    pitch, cell = min(24, 480 // lanes), span * lanes / MARKS if len(tasks) > MARKS else span / 1000
    yield f'<p>{len(ends):,} at once at most</p><svg width="100%" height="{lanes * pitch + 24}" role="img">'
    for x in (20, 40, 60, 80, 100):  # percent
        yield f'<line x1="{x}%" x2="{x}%" y2="100%"></line>'
        yield f'<text x="{x}%" y="100%" dx="-6" dy="-6">{clock(span * x / 100)}</text>'
    for task in tasks:  # those of one place are drawn as one
        task.place = task.lane * lanes // len(ends), (task.began - start) // cell
    for (lane, _), group in groupby(sorted(tasks, key=by("place")), by("place")):
        group = list(group)
        longest = max(group, key=by("took"))
        left = 100 * (group[0].began - start) / span
        width = 100 * (max(task.ended for task in group) - start) / span - left - 0.1  # and a gap
        yield f'<rect class={min((task.status for task in group), key=STATUSES.index)} rx="2"'
        yield f' x="{min(left, 99.9):.2f}%" width="{max(width, 0.1):.2f}%" y="{lane * pitch}"'
        yield f' height="{pitch * 5 // 6}"><title>{shown(longest.name, 40)}, {clock(longest.took)}'
        yield f", {longest.status}{f', the longest of {len(group)}' * (len(group) > 1)}</title></rect>\n"
    yield "</svg>"


def failures(tasks):
    failed = sorted((t for t in tasks if t.status in ("error", "cancelled")), key=by("status", "message"))
    groups = [list(group) for _, group in groupby(failed, by("status", "message"))]
    groups.sort(key=lambda group: (group[0].status == "cancelled", -len(group)))
    for one, *others in groups[:TOP]:
        more = ", ".join(shown(task.name, 60) for task in [one, *others][:4]) + ", ..." * (len(others) > 3)
        if one.traceback:
            more += f"<details><summary>traceback</summary><pre>{shown(one.traceback, 4000)}</pre></details>"
        yield ROW % (one.status, shown(one.message), more, f"{len(others) + 1:,} ×")


def clock(seconds):
    size, unit = next((unit for unit in UNITS if unit[0] <= seconds), UNITS[-1])
    return f"{round(seconds / size, seconds < 10 * size):g} {unit}"


def shown(text, room=200):
    """Any text as HTML: no longer than that, and what cannot be seen is escaped as in Python."""
    text = text if len(text) <= room else f"{text[: room // 2]}\N{HORIZONTAL ELLIPSIS}{text[-room // 2 :]}"
    return escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


if __name__ == "__main__":
    main(*sys.argv[1:])
