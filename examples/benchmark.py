"""How fast, how big: what pipeloom costs, beside what it is to be compared with, on your machine.

    python examples/benchmark.py [--only NAME] [--json]             # the table, in under two minutes
    python examples/benchmark.py --scaling [--limit SIZE]           # how cost grows, in many minutes

A measurement is a function of a size and of a database that is not there yet; its docstring is its title.
Each runs in a fresh Python, ours and the other in turn, round after round: the table has the medians, those
of the ratios taken round by round. Then it asks the database: one that does not hold what was claimed is a
failure, and the exit code 1. To miss an aim is none. Peers are measured where they can be imported.
"""

import argparse
import json
import operator
import os
import platform
import queue
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent  # where pipeloom.py is
sys.path.insert(0, str(ROOT))

import pipeloom  # noqa: E402

WORKERS = 8
TASKS = 20_000  # where something else than their number grows
BATCH = 1_000  # rows of a task
LOOPS = 1_000_000  # of pure Python: 50 ms or so
DEADLINE, LATE_DEADLINE = 60, 3_600  # seconds that one measurement may take; with --scaling
SCHEMA = "CREATE TABLE entry(task INTEGER, number INTEGER, text TEXT)"
INSERT = "INSERT INTO entry VALUES (?, ?, ?)"

# What must be true of the database after a measurement of some size
ALL_DONE = "SELECT count(*) = :size FROM task_runs WHERE status = 'done'"
ONE_DONE = ALL_DONE.replace(":size", "1")
ALL_ROWS = "SELECT count(*) = :size AND sum(number) = :size * (:size - 1) / 2 FROM entry"
ALL_BATCHES = ALL_ROWS.replace(":size", f"(:size * {BATCH})")

MEASURES = {}  # by name


class Failed(Exception):
    """A measurement did not end, ended with an error, or did not do what it claims."""


def measure(*truths):
    """A decorator: what function(size, db) returns, or else the seconds that it takes, is the measure."""

    def register(function):
        def measured(size, db):
            began = time.perf_counter()
            value = function(size, db)
            seconds = time.perf_counter() - began
            for sql in truths:
                with closing(sqlite3.connect(db)) as conn:
                    if conn.execute(sql, {"size": size}).fetchone() != (1,):
                        raise Failed(f"with size {size} this is not true of the database: {sql}")
            return seconds if value is None else value

        measured.title = function.__doc__
        MEASURES[function.__name__] = measured
        return function

    return register


# ---- Tasks and messages --------------------------------------------------------------------------------


def run(tasks, db, work, workers=WORKERS, progress="none", **options):
    pipeloom.run_pipeline(tasks, db, worker_fn=work, workers=workers, progress=progress, **options)


def nothing(*_):
    pass


@measure(ALL_DONE)
def tasks(size, db):
    """no-op tasks, streamed and stored"""
    run(iter(range(size)), db, nothing)


@measure(ALL_DONE)
def listed(size, db):
    """no-op tasks, from a list"""
    run(range(size), db, nothing)


def originals(task, q):
    q.put(pipeloom.MsgTaskStarted(task.task_id, task.name, datetime.now(timezone.utc).isoformat()))
    q.put(pipeloom.MsgTaskFinished(task.task_id, "done", datetime.now(timezone.utc).isoformat(), "ok", "completed"))


@measure(ALL_DONE)
def original(size, db):
    """the original's worker, started and finished messages"""
    run((pipeloom.Task(id, f"task-{id}") for id in range(1, size + 1)), db, originals)


@measure()
def discarded(size, _):
    """the same worker in a bare pool, messages discarded"""
    bin = SimpleNamespace(put=nothing)
    pool(size, _, lambda id: originals(pipeloom.Task(id, f"task-{id}"), bin))


@measure()
def pool(size, _, work=nothing):
    """ThreadPoolExecutor.map"""
    with ThreadPoolExecutor(WORKERS) as executor:
        deque(executor.map(work, range(size)), 0)


@measure(ALL_DONE)
def by_hand(size, db):
    """by hand: connections per thread, commits per status"""
    local = threading.local()
    with closing(sqlite3.connect(db)) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("CREATE TABLE task_runs(id INTEGER PRIMARY KEY, status TEXT)")

    def work(number):
        if not hasattr(local, "conn"):
            local.conn = sqlite3.connect(db, timeout=60)
            local.conn.execute("PRAGMA synchronous=NORMAL")
        with local.conn:
            local.conn.execute("INSERT INTO task_runs VALUES (?, 'running')", (number,))
        with local.conn:
            local.conn.execute("UPDATE task_runs SET status = 'done' WHERE id = ?", (number,))

    pool(size, db, work)


@measure("SELECT count(*) = :size FROM kv")
def huey(size, db):
    """huey: SqliteHuey and its consumer, results stored"""
    from huey import SqliteHuey

    app = SqliteHuey(filename=db)
    work = app.task()(str)  # a result of None would not be stored
    for number in range(size):
        work(number)
    consumer = app.create_consumer(workers=WORKERS, initial_delay=0.001, max_delay=0.01)
    consumer.start()
    while app.result_count() < size:
        time.sleep(0.01)
    consumer.stop(graceful=True)


class Display(pipeloom.Progress):
    """Notes which progress messages are shown, and how long after they were sent."""

    def __init__(self):
        self.sent = defaultdict(deque)  # by task: those that are on their way
        self.shown, self.lags = {}, []

    def send(self, ctx, step, total):
        self.sent[ctx.task_id].append((step, time.perf_counter()))
        ctx.progress(step, total)

    def update(self, message):
        if type(message) is pipeloom.MsgTaskProgress:
            now, sent = time.perf_counter(), self.sent[message.task_id]
            self.shown[message.task_id] = message.step
            while sent and sent[0][0] <= message.step:  # of several in one commit only the last is shown
                self.lags.append(now - sent.popleft()[1])

    def lag(self, share, expected):
        if len(self.lags) != expected:
            raise Failed(f"{len(self.lags)} messages were shown, expected {expected}")
        return sorted(self.lags)[int(share * (expected - 1))]


@measure(
    f"SELECT count(*) = {WORKERS} AND sum(progress) = {WORKERS} FROM task_runs WHERE status = 'cancelled'"
)
def messages(size, db):
    """progress messages, stored and shown"""
    display, steps = Display(), size // WORKERS + 1

    def work(_, ctx):
        for step in range(1, steps + 1):
            ctx.put(pipeloom.MsgTaskProgress(ctx.task_id, step, steps))
        # Not as done, which makes the progress that is stored 1.0 whatever was sent
        ctx.put(pipeloom.MsgTaskFinished(ctx.task_id, "cancelled", "now"))

    run(range(WORKERS), db, work, progress=display)
    if list(display.shown.values()) != [steps] * WORKERS:
        raise Failed(f"{display.shown} was shown, expected {steps} of each task")


@measure()
def pump(size, _):
    """queue.Queue(1024)"""
    pipe, steps = queue.Queue(1024), size // WORKERS + 1

    def work(task):
        for step in range(1, steps + 1):
            pipe.put(pipeloom.MsgTaskProgress(task, step, steps))

    with ThreadPoolExecutor(WORKERS) as executor:
        executor.map(work, range(WORKERS))
        for _ in range(steps * WORKERS):
            pipe.get()


# ---- Rows ----------------------------------------------------------------------------------------------


def entries(first, size):
    return ((first, number, "some text") for number in range(first, min(first + BATCH, size)))


@measure(ALL_ROWS)
def execute(size, db):
    """rows by ctx.execute(), one at a time"""

    def work(first, ctx):
        for entry in entries(first, size):
            ctx.execute(INSERT, entry)

    run(range(0, size, BATCH), db, work, schema=SCHEMA)


@measure(ALL_ROWS)
def executemany(size, db):
    """rows by ctx.executemany()"""

    def work(first, ctx):
        ctx.executemany(INSERT, entries(first, size))

    run(range(0, size, BATCH), db, work, schema=SCHEMA)


@measure(ALL_ROWS)
def raw(size, db):
    """sqlite3's executemany(), one thread"""
    with closing(sqlite3.connect(db)) as conn, conn:
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=NORMAL")
        conn.execute(SCHEMA)
        for first in range(0, size, BATCH):
            conn.executemany(INSERT, entries(first, size))


@measure(ALL_DONE, ALL_ROWS)
def one_row(size, db, rows=1):
    """tasks that store one row each"""

    def work(task, ctx):
        for number in range(task * rows, (task + 1) * rows):
            ctx.execute(INSERT, (task, number, "some text"))

    run(range(size), db, work, schema=SCHEMA)


@measure(ALL_ROWS)
def pool_row(size, db, rows=1):
    """a pool that computes them, then one executemany()"""
    with ThreadPoolExecutor(WORKERS) as executor:
        work = lambda task: [(task, number, "some text") for number in range(task * rows, (task + 1) * rows)]  # noqa: E731
        made = [row for rows in executor.map(work, range(size)) for row in rows]
    with closing(sqlite3.connect(db)) as conn, conn:
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=NORMAL")
        conn.execute(SCHEMA)
        conn.executemany(INSERT, made)


@measure(ALL_DONE, ALL_ROWS.replace(":size", "(:size * 10)"))
def ten_rows(size, db):
    """tasks that store ten rows each"""
    one_row(size, db, 10)


@measure(ALL_ROWS.replace(":size", "(:size * 10)"))
def pool_ten(size, db):
    """a pool that computes them, then one executemany()"""
    pool_row(size, db, 10)


@measure("SELECT count(*) = :size FROM unnamed")
def sqlitedict(size, db):
    """sqlitedict: rows, one key at a time, one commit"""
    from sqlitedict import SqliteDict

    with SqliteDict(db) as table:
        for first in range(0, size, BATCH):
            for entry in entries(first, size):
                table[entry[1]] = entry
        table.commit()


# ---- Workers that compute: each step of SQLite gives up the GIL, and they are slow to return it ---------


def compute(part=1):
    total = 0
    for number in range(LOOPS // part):
        total += number * number % 7


@measure(ALL_DONE, ALL_BATCHES)
def busy(size, db):
    """tasks of 50 ms of Python and 1,000 rows"""

    def work(task, ctx):
        compute()
        ctx.executemany(INSERT, entries(task * BATCH, size * BATCH))

    run(range(size), db, work, schema=SCHEMA)


@contextmanager
def processes():
    """Two, that have begun; and a function that says how many seconds have gone since."""
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        deque(executor.map(time.sleep, [0.2] * 4), 0)
        began = time.perf_counter()
        yield executor, lambda: time.perf_counter() - began


def busy_task(task, ctx):
    compute()
    ctx.executemany(INSERT, entries(task * BATCH, sys.maxsize))


@measure(ALL_DONE, ALL_BATCHES)
def busy_processes(size, db):
    """the same, on 2 processes"""
    with processes() as (executor, seconds):
        run(range(size), db, busy_task, schema=SCHEMA, executor=executor)
        return seconds()


@measure(ALL_DONE)
def executor(size, db):
    """no-op tasks on 2 processes"""
    with processes() as (executor, seconds):
        run(range(size), db, nothing, executor=executor)
        return seconds()


@measure()
def bare_executor(size, _):
    """submit() and result(), as many in flight"""
    with processes() as (executor, seconds):
        flying = deque()
        for number in range(size):
            if len(flying) == WORKERS:
                flying.popleft().result()
            flying.append(executor.submit(nothing, number))
        deque((future.result() for future in flying), 0)
        return seconds()


def large_rows(task, ctx=None):
    """1 MiB."""
    rows = [(task, number, str(number % 10) * 1_000) for number in range(task * BATCH, (task + 1) * BATCH)]
    return ctx.executemany(INSERT, rows) if ctx else rows


@measure(ALL_DONE, ALL_BATCHES)
def returned(size, db):
    """MiB of rows from 2 processes"""
    with processes() as (executor, seconds):
        run(range(size), db, large_rows, schema=SCHEMA, executor=executor)
        return seconds()


@measure(ALL_BATCHES)
def bare_returned(size, db):
    """executor.map(), and executemany() of what comes back"""
    with processes() as (executor, seconds):
        with closing(sqlite3.connect(db)) as conn, conn:
            conn.execute("PRAGMA journal_mode=WAL")
            conn.execute("PRAGMA synchronous=NORMAL")
            conn.execute(SCHEMA)
            for rows in executor.map(large_rows, range(size)):
                conn.executemany(INSERT, rows)
        return seconds()  # with the checkpoint at its end, as ours


@measure()
def busy_pool(size, db):
    """ThreadPoolExecutor.map, storing nothing"""

    def work(task):
        compute()
        deque(entries(task * BATCH, size * BATCH), 0)

    pool(size, db, work)


@measure(ALL_DONE, ALL_BATCHES)
def lag(size, db):
    """the same: from message to commit, p99"""
    display = Display()

    def work(task, ctx):
        for step in range(1, 11):
            compute(10)
            display.send(ctx, step, 10)
        ctx.executemany(INSERT, entries(task * BATCH, size * BATCH))

    run(range(size), db, work, progress=display, schema=SCHEMA)
    return display.lag(0.99, size * 10)


# ---- Workers that wait, and the terminal ---------------------------------------------------------------


@measure(ONE_DONE)
def latency(size, db):
    """a lone message, until it is committed and shown"""
    display = Display()

    def work(_, ctx):
        for step in range(1, size + 1):
            time.sleep(0.02)
            display.send(ctx, step, size)

    run([0], db, work, progress=display)
    return display.lag(0.5, size) * 1_000


@contextmanager
def terminal(expected):
    """Let sys.stderr be a terminal, whose other end another process reads, as it is with a real one."""
    ours, theirs = os.openpty()
    before = sys.stderr
    with tempfile.TemporaryFile() as seen:
        reader = subprocess.Popen(["cat"], stdin=ours, stdout=seen, stderr=subprocess.DEVNULL)
        os.close(ours)
        try:
            with open(theirs, "w", encoding="utf-8") as sys.stderr:
                yield
        finally:
            sys.stderr = before
            reader.wait(10)
        seen.seek(0)
        if expected.encode() not in seen.read():
            raise Failed(f"the terminal never showed {expected!r}")


@measure(ALL_DONE)
def bars(size, db, progress="ansi"):
    """tasks of 1 ms on a terminal"""
    with terminal("" if progress == "none" else f"{size:,}/{size:,}"):
        run(range(size), db, lambda *_: time.sleep(0.001), progress=progress)


@measure(ALL_DONE)
def rich(size, db):
    """the same, drawn by Rich"""
    bars(size, db, "rich")


@measure(ALL_DONE)
def no_bars(size, db):
    """progress="none\""""
    bars(size, db, "none")


@measure(ONE_DONE)
def idle(size, db):
    """wake-ups a second of an idle run on a terminal"""
    counts = []

    def wake_ups():
        texts = [path.read_text() for path in Path("/proc/self/task").glob("*/status")]
        return sum(int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for text in texts)

    def work(*_):
        for seconds in (0.3, size / 1_000):  # the first until all has started
            time.sleep(seconds)
            counts.append(wake_ups())

    with terminal("1/1"):
        run([0], db, work, progress="ansi")
    return (counts[1] - counts[0] - 1) / size * 1_000 if counts[0] else None  # less this worker's own


# ---- Memory and start ----------------------------------------------------------------------------------


def peak():
    """The most memory that this process has had, in MiB; None where that is not known."""
    if not find_spec("resource"):
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


@measure(ALL_DONE)
def memory(size, db):
    """memory of 1,000,000 streamed tasks"""
    tasks(size, db)
    return peak()


def start(size, db, *arguments):
    """The median milliseconds of new Pythons; one more goes before, as it may have to compile."""
    cache = {"PYTHONPYCACHEPREFIX": f"{db}-cache", "PYTHONDONTWRITEBYTECODE": ""}
    env, seconds = {**os.environ, **cache, "PYTHONPATH": str(ROOT)}, []
    for _ in range(size + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=env)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:]) * 1_000


@measure()
def start_bare(size, db):
    """a bare interpreter"""
    return start(size, db, "-c", "pass")


@measure()
def start_import(size, db):
    """import pipeloom"""
    return start(size, db, "-c", "import pipeloom")


@measure()
def start_help(size, db):
    """python -m pipeloom --help"""
    return start(size, db, "-m", "pipeloom", "--help")


# ---- What only --scaling measures ----------------------------------------------------------------------


@measure(ALL_DONE.replace(":size", str(TASKS)))
def workers(size, db):
    """workers, for 20,000 tasks"""
    run(range(TASKS), db, nothing, workers=size)


@measure(ALL_DONE)
def running(size, db):
    """tasks running at once on a terminal, less the second that they sleep"""

    def work(_, ctx):
        for step in (1, 2):
            time.sleep(0.5)
            ctx.progress(step, 2)

    began = time.perf_counter()
    with terminal(f"{size:,}/{size:,}"):
        run(range(size), db, work, workers=size, progress="ansi")
    return time.perf_counter() - began - 1


@measure(ALL_DONE)
def chain(size, db):
    """tasks, each after the one before"""
    pipe = pipeloom.Pipeline(db, workers=WORKERS, progress="none")
    for number in range(size):
        pipe.task(nothing, name=f"link {number}", after=f"link {number - 1}" if number else ())
    pipe.run()


@measure(ALL_DONE.replace(":size", ":size + 2"))
def fan(size, db):
    """tasks after one task, and one after them all"""
    pipe = pipeloom.Pipeline(db, workers=WORKERS, progress="none")
    pipe.task(nothing, name="first")
    pipe.task(nothing, name="item", each=lambda: iter(range(size)), after="first")
    pipe.task(nothing, name="last", after="item")
    pipe.run()


@measure(ALL_DONE.replace(":size", ":size * :size"))
def layers(size, db):
    """layers of as many tasks, each after all of the layer before"""
    pipe = pipeloom.Pipeline(db, workers=WORKERS, progress="none")
    for number in range(size):
        after = f"layer {number - 1}" if number else ()
        pipe.task(nothing, name=f"layer {number}", each=range(size), after=after)
    pipe.run()


@measure(ALL_DONE, "SELECT done = 0 AND skipped = :size FROM pipeline_runs WHERE id = 2")
def resume(size, db):
    """done tasks that a second run skips"""
    tasks(size, db)
    began = time.perf_counter()
    run(iter(range(size)), db, nothing, resume=True)
    return time.perf_counter() - began


@measure(ALL_DONE.replace(":size", f":size + {TASKS}"))
def old_rows(size, db):
    """tasks in the database before, for 20,000 more"""
    with closing(pipeloom.connect(db)) as conn, conn:
        pipeloom.init_schema(conn, store_task_status=True)
        old = ((number, f"old {number}", "done") for number in range(1, size + 1))
        conn.executemany("INSERT INTO task_runs(id, name, status) VALUES (?, ?, ?)", old)
    began = time.perf_counter()
    run(iter(range(TASKS)), db, nothing)
    return time.perf_counter() - began


# ---- The two tables ------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A measurement, and the aim of its ratio to another, of its difference from that, or of itself."""

    ours: str
    size: int
    unit: str
    how: str
    aim: str = ""
    other: str = ""
    other_size: int = 0
    rounds: int = 1_000
    needs: str = ""  # modules; where one is missing the line is left out


LINES = [
    Line("tasks", 50_000, "/s", "ratio", ">= 1", "pool", 50_000),
    Line("listed", 50_000, "/s", "ratio", ">= 1", "pool", 50_000),
    Line("original", 50_000, "/s", "ratio", ">= 1", "discarded", 50_000),
    Line("by_hand", 4_000, "/s", "ratio", "", "pool", 50_000),
    Line("huey", 300, "/s", "ratio", "", "pool", 50_000, needs="huey"),
    Line("messages", 200_000, "/s", "ratio", ">= 1", "pump", 200_000),
    Line("execute", 400_000, "/s", "ratio", ">= 1", "raw", 400_000),
    Line("executemany", 400_000, "/s", "ratio", ">= 1.2", "raw", 400_000),
    Line("sqlitedict", 20_000, "/s", "ratio", "", "raw", 400_000, needs="sqlitedict"),
    Line("one_row", 20_000, "/s", "ratio", ">= 0.9", "pool_row", 20_000),
    Line("ten_rows", 20_000, "/s", "ratio", ">= 0.9", "pool_ten", 20_000),
    Line("busy", 16, " s", "ratio", "<= 1.10", "busy_pool", 16),
    Line("busy_processes", 64, "/s", "ratio", ">= 1.8", "busy", 64),
    Line("executor", 20_000, "/s", "ratio", ">= 0.9", "bare_executor", 20_000),
    Line("returned", 100, " s", "ratio", "<= 1.3", "bare_returned", 100),
    Line("lag", 40, " s", "itself", "< 2"),
    Line("latency", 25, " ms", "itself", "<= 5"),
    Line("idle", 1_000, "", "itself", "<= 20", needs="termios"),
    Line("bars", 10_000, " s", "ratio", "<= 1.05", "no_bars", 10_000, needs="termios"),
    Line("rich", 10_000, " s", "ratio", "<= 1.05", "no_bars", 10_000, needs="termios rich"),
    Line("memory", 1_000_000, " MiB", "difference", "<= 10", "memory", 1_000, rounds=1, needs="resource"),
    Line("start_import", 3, " ms", "difference", "<= 35", "start_bare", 3),
    Line("start_help", 3, " ms", "itself", "<= 60"),
]
GROWTHS = {  # by measurement: its sizes, and of how many things each is the cost
    "tasks": ([1_000, 10_000, 100_000, 1_000_000], lambda size: size),
    "executemany": ([10_000, 100_000, 1_000_000, 10_000_000], lambda size: size),
    "workers": ([1, 4, 16, 64, 256], lambda _: TASKS),
    "running": ([8, 100, 1_000, 10_000] if find_spec("termios") else [], lambda size: size),
    "chain": ([1_000, 10_000, 100_000], lambda size: size),
    "fan": ([10_000, 100_000, 1_000_000], lambda size: size),
    "layers": ([10, 100, 1_000], lambda size: size * size),
    "resume": ([10_000, 100_000, 1_000_000], lambda size: size),
    "old_rows": ([10_000, 100_000, 1_000_000, 10_000_000], lambda _: TASKS),
}
COMPARE = {"ratio": operator.truediv, "difference": operator.sub, "itself": lambda ours, _: ours}
SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}


def fresh(name, size, deadline):
    """Measure in a new Python; the folder of its temporary files goes, however it ended."""
    tell(f"{name} {size:,}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", name, str(size)]
        env = {**os.environ, "TMPDIR": folder, "TEMP": folder, "TMP": folder}
        try:
            ended = subprocess.run(command, capture_output=True, timeout=deadline, env=env, text=True)
        except subprocess.TimeoutExpired:
            raise Failed(f"{name}: no end after {deadline} s") from None
    if ended.returncode:
        reason = ended.stderr.strip() or f"exit code {ended.returncode}"
        raise Failed(f"{name}: {reason.splitlines()[-1]}")
    return json.loads(ended.stdout)


def one(name, size):
    """What that new Python does."""
    with tempfile.TemporaryDirectory() as folder:
        value = MEASURES[name](size, os.path.join(folder, "benchmark.db"))
    return {"value": value, "peak": peak()}


def table(only, limit, rounds):
    """The rows of the table."""
    lines = [line for line in LINES if only in line.ours and all(map(find_spec, line.needs.split()))]
    pairs, failed = defaultdict(list), {}
    for turn in range(rounds):
        known = {}  # in this round, as several lines may be compared with the same

        def measured(name, size, unit, known=known):
            size = min(size, limit)
            if (name, size) not in known:
                known[name, size] = fresh(name, size, DEADLINE)["value"]
            value = known[name, size]
            return value if unit != "/s" else size / value

        for line in lines:
            if line not in failed and turn < line.rounds:
                try:
                    other = measured(line.other, line.other_size, line.unit) if line.other else None
                    pairs[line].append((measured(line.ours, line.size, line.unit), other))
                except Failed as error:
                    failed[line] = str(error)
    for line in lines:
        row = {"name": line.ours, "what": MEASURES[line.ours].title, "unit": line.unit, "how": line.how}
        if line in failed:
            yield {**row, "verdict": "FAILED", "reason": failed[line]}
        elif pairs[line][0][0] is None:
            yield {**row, "verdict": "n/a"}
        else:
            yield {**row, **judged(line, pairs[line])}


def judged(line, pairs):
    """The medians of the rounds, and whether the aim is met."""
    values = [COMPARE[line.how](*pair) for pair in pairs]
    row = {"measured": median(ours for ours, _ in pairs), "value": median(values), "values": values}
    if line.other:
        title = MEASURES[line.other].title if line.other != line.ours else f"of {line.other_size:,}"
        row.update(other=title, compared=median(other for _, other in pairs))
    sign, _, aim = line.aim.partition(" ")
    met = SIGNS[sign](row["value"], float(aim)) if sign else None
    return {**row, "aim": line.aim, "verdict": {True: "met", False: "missed", None: ""}[met]}


def line_text(row):
    if "value" not in row:
        return f"{row['what']:<54} {row['verdict']} {row.get('reason', '')}"
    unit = row["unit"]
    value = number(row["value"]) + (" x" if row["how"] == "ratio" else unit)
    text = f"{row['what']:<54}{number(row['measured']) + unit:>11}{value:>10} {row['aim']:<7}"
    other = f"{number(row['compared']) + unit:>11} {row['other']}" if "other" in row else ""
    return f"{text} {row['verdict']:<6} {other}".rstrip()


def scaling(only, limit, _):
    """The rows of --scaling, each as soon as it is known."""
    for name, (sizes, things) in GROWTHS.items():
        before = None  # what one thing cost at the size before
        for size in sorted({min(size, limit) for size in sizes}) if only in name else ():
            row = {"name": name, "what": MEASURES[name].title, "size": size}
            try:
                found = fresh(name, size, LATE_DEADLINE)
            except Failed as error:
                yield {**row, "verdict": "FAILED", "reason": str(error)}
                break
            each = found["value"] / things(size) * 1e6
            times = each / before if before else None
            yield {**row, "seconds": found["value"], "us_each": each, "times": times, "mib": found["peak"]}
            before = each


def growth_text(row):
    text = f"{row['size']:>10,} {row['what']:<71}"
    if "verdict" in row:
        return f"{text} {row['verdict']} {row['reason']}"
    times, mib = f"x {row['times']:.2f}" if row["times"] else "", f"{row['mib'] or 0:,.0f} MiB"
    return f"{text} {row['seconds']:>8.2f} s {number(row['us_each']):>8} us each {times:>7} {mib:>9}"


def number(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def tell(text):
    """Say on one line of a terminal what is being measured now."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)


def machine():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{cores} cores, {platform.system()} {platform.machine()}"
    return f"pipeloom {pipeloom.__version__}, {python}, SQLite {sqlite3.sqlite_version}, {system}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scaling", action="store_true", help="how cost grows with size")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the table (default: 5)")
    parser.add_argument("--limit", type=int, default=10**9, metavar="SIZE", help="measure no larger size")
    parser.add_argument("--only", default="", metavar="NAME", help="measurements with this in their name")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIZE"), help="one measurement, in this process")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]))))
        return 0
    if not args.json:
        print(machine(), flush=True)
    rows = []
    for row in (scaling if args.scaling else table)(args.only, max(args.limit, 1), max(args.rounds, 1)):
        rows.append(row)
        if not args.json:
            tell("")
            print((growth_text if args.scaling else line_text)(row), flush=True)
    if not rows:
        parser.error(f"--only {args.only}: no measurement of this table has that in its name")
    if args.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    return int(any(row.get("verdict") == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
