"""How fast pipeloom is, beside what it is to be compared with, on your machine.

    python examples/benchmark.py [--only NAME] [--rounds N] [--limit SIZE] [--json]

Each line(...) below is a line of the table: its name and size, what is compared (ours | the other), the aim,
and the two functions that do it. They take turns, round after round, each time in a fresh Python with a new
database. The measure is the seconds that a function takes, or else what it returns; shown are the medians.
A line whose database does not hold afterwards what it should has FAILED, and the exit code is 1.
"""

import argparse
import json
import os
import queue
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, redirect_stderr
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # where pipeloom.py is

import pipeloom

SCHEMA = "CREATE TABLE entry(task INTEGER, number INTEGER, text TEXT)"
INSERT = "INSERT INTO entry VALUES (?, ?, ?)"
DONE = "SELECT count(*) = :size FROM task_runs WHERE status = 'done'"
LINES = {}


def line(name, size, what, aim, ours, other=None, truth=DONE, needs=True):
    if needs:
        LINES[name] = SimpleNamespace(size=size, what=what, aim=aim, ours=ours, other=other, truth=truth)


def nothing(*_):
    pass


def run(size, db, work=nothing, tasks=None, **options):
    options = {"workers": 8, "progress": "none", "schema": SCHEMA, **options}
    pipeloom.run_pipeline(tasks or iter(range(size)), db, worker_fn=work, **options)


def pool(size, db, work=nothing):
    with ThreadPoolExecutor(8) as executor:
        deque(executor.map(work, range(size)), 0)


def original(task, q):
    q.put(pipeloom.MsgTaskStarted(task.task_id, task.name, datetime.now(timezone.utc).isoformat()))
    q.put(pipeloom.MsgTaskFinished(task.task_id, "done", datetime.now(timezone.utc).isoformat(), "ok"))


def report(id, q, steps):
    for step in range(1, steps + 1):
        q.put(pipeloom.MsgTaskProgress(id, step, steps))
    q.put(pipeloom.MsgTaskFinished(id, "cancelled", "now"))  # "done" would make the progress 1.0 in any case


def bare_queue(size, db):
    q = queue.Queue(1024)
    with ThreadPoolExecutor(8) as executor:
        executor.map(partial(report, q=q, steps=size), range(8))
        for _ in range(8 * (size + 1)):
            q.get()


discard = SimpleNamespace(put=nothing, executemany=lambda sql, rows: deque(rows, 0))  # in place of a context
line("tasks", 50_000, "tasks that do nothing, from a generator | ThreadPoolExecutor.map",
     ">= 1 x the speed", run, pool)
line("listed", 50_000, "tasks that do nothing, from a list | ThreadPoolExecutor.map",
     ">= 1 x the speed", lambda size, db: run(size, db, tasks=list(range(size))), pool)
line("original", 50_000, "the original's worker | the same in a pool, messages discarded", ">= 1 x the speed",
     lambda size, db: run(size, db, original, (pipeloom.Task(id + 1, f"task-{id}") for id in range(size))),
     partial(pool, work=lambda id: original(pipeloom.Task(id + 1, f"task-{id}"), discard)))
line("messages", 25_000, "progress messages of each of 8 tasks, stored and shown | a bare queue.Queue(1024)",
     ">= 1 x the speed", lambda size, db: run(8, db, lambda _, ctx: report(ctx.task_id, ctx, size),
     progress=pipeloom.Progress()), bare_queue, "SELECT sum(progress) = 8 AND count(*) = 8 FROM task_runs")


def entries(task, each):
    return ((task, number, "some text") for number in range(task * each, (task + 1) * each))


def stored(each):  # whether each row of each task is there, and none twice
    all = f":size * {each}"
    return f"SELECT (count(*), count(DISTINCT number), max(number)) = ({all}, {all}, {all} - 1) FROM entry"


def one_by_one(task, ctx, each):
    for entry in entries(task, each):
        ctx.execute(INSERT, entry)


def at_once(task, ctx):
    ctx.executemany(INSERT, entries(task, 1_000))


def sqlite(size, db, batches=None):
    """One connection on one thread, one transaction, and the pragmas that pipeloom uses."""
    with closing(sqlite3.connect(db)) as conn, conn:
        conn.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + SCHEMA)
        for rows in batches or (entries(task, 1_000) for task in range(size)):
            conn.executemany(INSERT, rows)


def pool_then_sqlite(size, db, each):
    with ThreadPoolExecutor(8) as executor:
        made = list(executor.map(lambda task: list(entries(task, each)), range(size)))
    sqlite(size, db, [[row for rows in made for row in rows]])


line("execute", 400, "tasks of 1,000 rows by ctx.execute | sqlite3's executemany on one thread",
     ">= 1 x the speed", partial(run, work=partial(one_by_one, each=1_000)), sqlite, stored(1_000))
line("executemany", 400, "tasks of 1,000 rows by ctx.executemany | sqlite3's executemany on one thread",
     ">= 1.2 x the speed", partial(run, work=at_once), sqlite, stored(1_000))
for name, each in (("one_row", 1), ("ten_rows", 10)):
    line(name, 20_000, f"tasks that store {name.replace('_', ' ')} | a pool computes them, one executemany",
         ">= 0.9 x the speed", partial(run, work=partial(one_by_one, each=each)),
         partial(pool_then_sqlite, each=each), stored(each))


def compute(part=1, total=0):
    for number in range(1_000_000 // part):  # 50 ms or so, for all
        total += number * number % 7


def busy(task, ctx):
    compute()
    at_once(task, ctx)


def delay(size, db, workers, pause):
    """The seconds from sending a message until it is committed and shown, sorted."""
    delays = []

    def work(task, ctx):
        pause()
        ctx.progress(1, 2, message=str(time.perf_counter()))
        pause()
        at_once(task, ctx)

    def update(message):
        if isinstance(message, pipeloom.MsgTaskProgress):
            delays.append(time.perf_counter() - float(message.message))

    run(size, db, work, workers=workers, progress=SimpleNamespace(start=nothing, update=update, stop=nothing))
    return sorted(delays) if len(delays) == size else sys.exit("a message was not shown")


def on_processes(size, db, work):
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        deque(executor.map(time.sleep, [0.2] * 4), 0)  # until both have begun
        began = time.perf_counter()
        work(size, db, executor=executor)
        return time.perf_counter() - began


def submit(size, db, executor):
    flying = deque()
    for number in range(size):
        flying.append(executor.submit(nothing, number))
        if len(flying) == 8:
            flying.popleft().result()


def large(task, ctx=None):  # the text is made anew for each row, as pickle sends the same object only once
    rows = [(task, number, str(number % 10) * 1_000) for _, number, _ in entries(task, 1_000)]
    return ctx.executemany(INSERT, rows) if ctx else rows


line("busy", 16, "tasks of 50 ms of Python and 1,000 rows | the same, storing nothing", "<= 1.1 x the time",
     partial(run, work=busy), partial(pool, work=partial(busy, ctx=discard)), stored(1_000))
line("lag", 100, "tasks of 50 ms of Python, p99 from a message to its commit", "<= 2 s",
     lambda size, db: delay(size, db, 8, partial(compute, 2))[int(0.99 * (size - 1))], truth=stored(1_000))
line("latency", 25, "tasks, one at a time, median from a message to its commit", "<= 0.005 s",
     lambda size, db: median(delay(size, db, 1, partial(time.sleep, 0.02))), truth=stored(1_000))
line("busy_processes", 64, "the same tasks on 2 processes | on 8 threads", ">= 1.8 x the speed",
     partial(on_processes, work=partial(run, work=busy)), partial(run, work=busy), stored(1_000))
line("executor", 20_000, "tasks that do nothing, 2 processes | submit and result, 8 in flight",
     ">= 0.9 x the speed", partial(on_processes, work=run), partial(on_processes, work=submit))
line("returned", 100, "MiB of rows that come back from 2 processes | executor.map and executemany",
     "<= 1.3 x the time", partial(on_processes, work=partial(run, work=large)), partial(on_processes,
     work=lambda size, db, executor: sqlite(size, db, executor.map(large, range(size)))), stored(1_000))


def terminal(size, db, progress):
    ours, theirs = os.openpty()
    with tempfile.TemporaryFile() as drawn:
        reader = subprocess.Popen(["cat"], stdin=ours, stdout=drawn, stderr=subprocess.DEVNULL)
        with open(theirs, "w", encoding="utf-8") as stream, redirect_stderr(stream):
            run(size, db, lambda *_: time.sleep(0.001), progress=progress)
        reader.wait()
        drawn.seek(0)
        if progress != "none" and f"{size:,}/{size:,}".encode() not in drawn.read():
            sys.exit("the bars did not reach their end")


def memory(size, db):
    import resource
    run(size, db)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def call(size, db, argv):
    items, folder = "".join(f"{item}\n" for item in range(1, size + 1)), os.path.dirname(pipeloom.__file__)
    subprocess.run(argv, check=True, cwd=folder, input=items, text=True, stdout=subprocess.DEVNULL)


python = sys.executable
for name in ("ansi", "rich"):
    line(f"bars_{name}", 10_000, f"tasks of 1 ms with bars ({name}) on a terminal | without",
         "<= 1.05 x the time", partial(terminal, progress=name), partial(terminal, progress="none"),
         needs=find_spec("termios") and (name == "ansi" or find_spec("rich")))
line("memory", 1_000_000, "tasks from a generator, memory in MiB | 1,000 tasks", "<= 10 MiB more",
     memory, lambda size, db: memory(min(size, 1_000), db), DONE.replace("= :size", "IN (:size, 1000)"),
     needs=find_spec("resource"))
line("start_import", 1, "python -c 'import pipeloom' | python -c pass", "<= 0.035 s more",
     partial(call, argv=[python, "-c", "import pipeloom"]), partial(call, argv=[python, "-c", "pass"]), None)
line("start_help", 1, "python -m pipeloom --help", "<= 0.06 s",
     partial(call, argv=[python, "-m", "pipeloom", "--help"]), truth=None)
line("sh", 2_000, "short commands by pipeloom.py sh -w 8 | by xargs -P 8", "<= 1.2 x the time",
     lambda size, db: call(size, db, [python, "pipeloom.py", "sh", "--db", db, "-w", "8", ": {}"]),
     partial(call, argv=["xargs", "-P", "8", "-I{}", "sh", "-c", ": {}"]),
     needs=os.name == "posix" and shutil.which("xargs"))

# ---- How it is measured --------------------------------------------------------------------------------


def one(name, side, size, db):
    """What the fresh Python does."""
    began, size = time.perf_counter(), int(size)
    value = getattr(LINES[name], side)(size, db)
    print(time.perf_counter() - began if value is None else value)
    truth = LINES[name].truth if side == "ours" or os.path.exists(db) else None
    if truth and sqlite3.connect(db).execute(truth, {"size": size}).fetchone() != (1,):
        sys.exit(f"not true of the database: {truth}")


def fresh(*arguments):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", *arguments, os.path.join(folder, "benchmark.db")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}")
    return float(done.stdout)


def measured(name, rounds, limit):
    line, found = LINES[name], []
    row = {"name": name, "size": min(line.size, limit), "what": line.what, "aim": line.aim}
    sign, aim, unit = line.aim.split(" ", 2)
    try:
        for _ in range(1 if name == "memory" else rounds):  # which takes long, and hardly varies
            ours = fresh(name, "ours", str(row["size"]))
            other = fresh(name, "other", str(row["size"])) if line.other else 0
            value = {"x the speed": other / ours, "x the time": ours / (other or 1)}.get(unit, ours - other)
            found.append((ours, other, value))  # of one round, in which the machine is as fast for both
    except (ChildProcessError, subprocess.TimeoutExpired) as error:
        return {**row, "verdict": "FAILED", "reason": str(error)}
    ours, other, value = map(median, zip(*found))
    met = value >= float(aim) if sign == ">=" else value <= float(aim)
    return {**row, "ours": ours, "other": other, "value": value, "verdict": "met" if met else "missed"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="the lines with this in their name")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured (5)")
    parser.add_argument("--limit", type=int, default=10**9, metavar="SIZE", help="measure no larger size")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    cache = tempfile.TemporaryDirectory()  # so that no start that is measured has to compile
    os.environ.update(PYTHONPYCACHEPREFIX=cache.name, PYTHONDONTWRITEBYTECODE="")
    versions = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores"
    print(f"pipeloom {pipeloom.__version__}, {versions}; seconds: ours | the other", file=sys.stderr)
    rows = []
    for name in [name for name in LINES if args.only in name] or parser.error("--only: no such line"):
        rows.append(measured(name, max(args.rounds, 1), max(args.limit, 1)))
        if not args.json:
            text = "{name:<14}{ours:>8.3g} |{other:>8.3g}{value:>9.3g} {aim:<18} {verdict:<7}{size:,} {what}"
            print((text if "value" in rows[-1] else "{name} FAILED {reason}").format(**rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["verdict"] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(one(*sys.argv[2:]) if sys.argv[1:2] == ["--one"] else main())
