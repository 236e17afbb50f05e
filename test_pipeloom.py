"""The promises of pipeloom.py, in the order of its sections. A test's name is what it proves."""

import ast
import dataclasses
import faulthandler
import io
import json
import os
import queue
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeloom
from pipeloom import (
    SENTINEL,
    MsgExecute,
    MsgTaskFinished,
    MsgTaskProgress,
    MsgTaskStarted,
    SQLiteWriter,
    Task,
    run_pipeline,
)

HERE = Path(__file__).resolve().parent
FILE = HERE / "pipeloom.py"
if os.name != "nt":
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it keeps a file open
KILLS = int(os.environ.get("PIPELOOM_KILLS", "36"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script tests in its background
WAIT = 20  # seconds; nothing takes as long unless it hangs
try:
    import rich
except ImportError:
    rich = None
needs_rich = pytest.mark.skipif(rich is None, reason="Rich is not installed")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and terminals")


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Each test ends by itself, with the threads, signal handlers and open files that it began with."""
    faulthandler.dump_traceback_later(60, exit=True)
    threads, handlers, files = set(threading.enumerate()), _handlers(), _open_files()
    streams = sys.stdout, sys.stderr
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert set(threading.enumerate()) <= threads, "a thread outlived its run"
    assert _handlers() == handlers
    assert (sys.stdout, sys.stderr) == streams
    assert _open_files() <= files
    faulthandler.cancel_dump_traceback_later()


def _handlers():
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    return [signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)]


def _open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture
def db(tmp_path):
    return tmp_path / "test.db"


def rows(path, sql="SELECT id, name, status FROM task_runs ORDER BY id", *parameters):
    conn = sqlite3.connect(str(path))
    try:
        return conn.execute(sql, parameters).fetchall()
    finally:
        conn.close()


WRITERS = threading.local()  # the class that runs of this thread take, another than SQLiteWriter
SQLiteWriter.__new__ = staticmethod(
    lambda cls, *_, **__: threading.Thread.__new__(cls is SQLiteWriter and getattr(WRITERS, "kind", None) or cls)
)


def run(tasks, path, worker, writer=None, **options):
    options.setdefault("progress", "none")
    WRITERS.kind = writer
    try:
        return run_pipeline(tasks, path, worker_fn=worker, **options)
    finally:
        WRITERS.kind = None


def nothing(task, q):
    pass


class Recorder(pipeloom.Progress):
    """A display that keeps what it is told, and what the database said at that moment."""

    def __init__(self, path=None):
        self.told = []
        self.path = path
        self.stored = []

    def start(self, total):
        self.told.append(("start", total))

    def update(self, message):
        self.told.append(message)
        if self.path:
            self.stored += rows(self.path, "SELECT status FROM task_runs WHERE id = ?", message.task_id)

    def stop(self, result):
        self.told.append(("stop", result))

    def messages(self):
        return [message for message in self.told if not isinstance(message, tuple)]


def python(*arguments, cwd, code=None, env=None, **options):
    """Run this Python in a fresh process; `code` is the exit code that is expected."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=str(cwd),
        env={**os.environ, "PYTHONPATH": "", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        universal_newlines=True,
        **{"timeout": 60, **options},
    )
    if code is not None:
        assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def homes(tmp_path):
    """Makes empty directories that hold only pipeloom.py, as a new user has it."""

    def one():
        folder = Path(tempfile.mkdtemp(prefix="home", dir=str(tmp_path)))
        shutil.copy(str(FILE), str(folder))
        return folder

    return one


@pytest.fixture
def home(homes):
    return homes()


def at_once(function, cases):
    """Call it with each case's arguments, in a thread each: most of their time is spent in waiting."""
    with ThreadPoolExecutor(len(cases)) as pool:
        for future in [pool.submit(function, *case) for case in cases]:
            future.result()


# ---- The file itself -----------------------------------------------------------------------------------


def test_the_file_is_python_3_8_and_imports_only_the_standard_library():
    tree = ast.parse(FILE.read_text(encoding="utf-8"), feature_version=(3, 8))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    if hasattr(sys, "stdlib_module_names"):
        assert found - set(sys.stdlib_module_names) == {"rich"}


def test_every_public_name_is_there_and_documented():
    for name in pipeloom.__all__:
        value = getattr(pipeloom, name)
        if name != "Msg" and (isinstance(value, type) or callable(value)):
            assert value.__doc__, name


def test_importing_it_imports_nothing_slow(home):
    slow = (
        "rich argparse json typing asyncio inspect_ concurrent.futures pathlib traceback_ socket urllib.parse"
    )
    program = f"import sys, pipeloom; print([m for m in {slow.split()!r} if m in sys.modules])"
    program = "import sys; before = set(sys.modules); " + program.replace(
        "if m in", "if m not in before and m in"
    )
    assert python("-S", "-c", program, cwd=home, code=0).stdout.strip() == "[]"


def test_code_written_for_the_original_imports_unchanged():
    from pipeloom.db import connect, init_schema, wal_checkpoint  # noqa: F401
    from pipeloom.demo import DemoTask, demo_worker  # noqa: F401
    from pipeloom.engine import run_pipeline as same
    from pipeloom.messages import TaskDef
    from pipeloom.progress import make_overall_progress  # noqa: F401
    from pipeloom.rlog import console, logger, setup_logging  # noqa: F401
    from pipeloom.writer import SQLiteWriter as same_writer

    assert same is run_pipeline and same_writer is SQLiteWriter
    assert TaskDef is DemoTask is Task
    assert pipeloom.MsgTaskStart is MsgTaskStarted and pipeloom.MsgTaskFinish is MsgTaskFinished
    assert pipeloom.Msg


# ---- Errors and messages -------------------------------------------------------------------------------


def test_messages_are_frozen_and_have_the_fields_of_the_original_in_their_order():
    assert [f.name for f in dataclasses.fields(MsgTaskStarted)] == ["task_id", "name", "started_at"]
    assert [f.name for f in dataclasses.fields(MsgTaskProgress)] == ["task_id", "step", "total", "message"]
    assert [f.name for f in dataclasses.fields(MsgTaskFinished)] == [
        "task_id", "status", "finished_at", "result", "message",
    ]  # fmt: skip
    assert Task(7, "seven", 3) == Task(task_id=7, name="seven", steps=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MsgTaskProgress(1, 2, 3).step = 4


@pytest.mark.parametrize(
    "message, stored",
    [
        (MsgTaskProgress(1, 5, 10), 0.5),
        (MsgTaskProgress(1, 50, 10), 1.0),
        (MsgTaskProgress(1, -3, 10), 0.0),
        (MsgTaskProgress(1, 50, 0), 0.0),
        (MsgTaskProgress(1, 0.25, 1.0, "half\udc80"), 0.25),
        (MsgTaskProgress(True, 1, 2), 0.5),
    ],
)
def test_progress_that_is_plain_is_clamped(db, message, stored):
    def work(task, q):
        q.put(message)
        q.put_nowait(MsgTaskFinished(1, "error", "now"))

    run([Task(1, "one")], db, work)
    assert rows(db, "SELECT progress FROM task_runs") == [(stored,)]


@pytest.mark.parametrize(
    "message, said",
    [
        (MsgTaskProgress(1, float("nan"), 10), "progress nan of 10 cannot be stored"),
        (MsgTaskProgress(1, 1, float("inf")), "progress 1 of inf cannot be stored"),
        (MsgTaskProgress(1, "x", 10), "progress 'x' of 10 cannot be stored"),
        (MsgTaskProgress(1, 10**400, 10), "cannot be stored: expected two finite numbers"),
        (MsgTaskProgress(2**63, 1, 2), "task_id 9223372036854775808 cannot be stored"),
        (MsgTaskStarted("one", "name", "now"), "task_id 'one' cannot be stored"),
        (MsgTaskFinished(1, "banana", "now"), "status 'banana' is unknown"),
        (MsgExecute(3), "sql 3 cannot be run"),
        ({"a": 1}, "nobody handles messages of type dict; pass handlers={dict: function}"),
        (None, "nobody handles messages of type NoneType"),
        (SENTINEL, "SENTINEL was put by a worker"),
    ],
)
def test_a_message_that_can_never_be_stored_is_refused_at_put(db, message, said):
    refused = []

    def work(task, q):
        with pytest.raises(pipeloom.MessageRefused) as error:
            q.put(message)
        refused.append(str(error.value))

    run([Task(1, "one"), Task(2, "two")], db, work)
    assert len(refused) == 2 and all(said in text for text in refused)
    assert [status for _, _, status in rows(db)] == ["done", "done"]


class Unshowable:
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


ODD_VALUES = [
    None, True, 2**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), 1e308, 1j, "", "\ud800", "a\0b", "x" * 10_000_000,
    b"\xff", Path("a") / "b", Decimal("1.5"), datetime(2026, 1, 1), {"a": 1}, {1: {2}}, [float("nan")], (), object(), int,
    Unshowable(), SENTINEL, {Unshowable(): 1},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The default datetime adapter:DeprecationWarning")  # sqlite3's own
def test_whatever_value_is_in_whatever_field_it_is_stored_or_refused_and_the_writer_lives(db):
    def work(case, q):
        kind, field, value = case
        message = {
            MsgTaskStarted: MsgTaskStarted(q.task_id, "name", "now"),
            MsgTaskProgress: MsgTaskProgress(q.task_id, 1, 2, "text"),
            MsgTaskFinished: MsgTaskFinished(q.task_id, "done", "now", None, "text"),
            MsgExecute: MsgExecute("INSERT INTO users VALUES (?, '')", (q.name,)),
            User: User(q.name, ""),
        }[kind]
        if kind is User:
            message.name = value
        else:
            message = dataclasses.replace(message, **{field: value})
        q.execute("INSERT INTO users VALUES (?, '')", (str(q.task_id),))
        try:
            q.put(message)
        except pipeloom.MessageRefused as error:
            refused.append(str(error))

    refused = []
    kinds = (MsgTaskStarted, MsgTaskProgress, MsgTaskFinished, MsgExecute)
    cases = [
        (kind, field.name, value)
        for kind in kinds
        for field in dataclasses.fields(kind)
        for value in ODD_VALUES
    ]
    cases += [(User, "name", value) for value in ODD_VALUES]
    cases += [(MsgExecute, "params", (value,)) for value in ODD_VALUES]
    result = run(cases, db, work, schema=USERS, handlers={User: insert_user}, check=False)
    assert result.done + result.error == len(cases) and result.done > len(cases) / 2
    assert all(refused) and all(
        text for (text,) in rows(db, "SELECT message FROM task_runs WHERE status = 'error'")
    )
    assert rows(db, "SELECT status, count(*) FROM task_runs GROUP BY 1") == [
        ("done", result.done),
        ("error", result.error),
    ]
    assert (
        rows(
            db, "SELECT id FROM task_runs WHERE status = 'done' EXCEPT SELECT CAST(key AS INTEGER) FROM users"
        )
        == []
    )
    assert (
        rows(
            db,
            "SELECT id FROM task_runs WHERE status = 'error' AND CAST(id AS TEXT) IN (SELECT key FROM users)",
        )
        == []
    )


def test_values_whose_meaning_is_plain_are_stored_as_text(db):
    def work(task, q):
        q.put(MsgTaskFinished(task.task_id, "done", "now", result={"a": Path("x")}, message="\udc80\0x" * 3))

    run([Task(1, "undecodable-\udcff"), Task(2, "x" * 1_000_000)], db, work)
    found = rows(db, "SELECT name, result, message FROM task_runs ORDER BY id")
    assert found[0] == ("undecodable-\\udcff", '{"a": "x"}', "\\udc80\0x" * 3)
    assert len(found[1][0]) == 1_000_000


# ---- Database ------------------------------------------------------------------------------------------


def test_connect_sets_the_journal_and_the_pragmas(db):
    for path, wal, mode in ((str(db), True, "wal"), (db, False, "delete"), (":memory:", True, "memory")):
        conn = pipeloom.connect(path, wal=wal)
        assert conn.execute("PRAGMA journal_mode").fetchone() == (mode,)
        assert conn.execute("PRAGMA synchronous").fetchone() == (1,)
        assert conn.execute("PRAGMA foreign_keys").fetchone() == (1,)
        pipeloom.init_schema(conn, store_task_status=True)
        pipeloom.init_schema(conn, store_task_status=True)
        pipeloom.wal_checkpoint(conn)
        conn.close()


def test_a_database_of_the_original_is_opened_and_completed(db):
    conn = sqlite3.connect(str(db))
    conn.execute(
        "CREATE TABLE task_runs(id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL,"
        " progress REAL NOT NULL DEFAULT 0.0, message TEXT, started_at TEXT, finished_at TEXT, result TEXT)"
    )
    conn.execute("INSERT INTO task_runs(id, name, status) VALUES (1, 'old', 'running'), (2, 'fine', 'done')")
    conn.commit()
    conn.close()
    run([Task(3, "new")], db, nothing)
    assert rows(db) == [(1, "old", "cancelled"), (2, "fine", "done"), (3, "new", "done")]
    assert rows(db, "SELECT attempts FROM task_runs WHERE id = 3") == [(1,)]


@pytest.mark.parametrize(
    "kind",
    [
        "directory",
        "no parent",
        "not a database",
        "another shape",
        "a lock of others",
        "a device",
    ],
)
def test_an_unusable_database_is_one_clear_error_and_nothing_is_written(tmp_path, kind):
    path, said = tmp_path / "x.db", "is a directory; name a file in it"
    if kind == "directory":
        path.mkdir()
    elif kind == "no parent":
        path, said = tmp_path / "missing" / "x.db", "there is no directory"
    elif kind == "not a database":
        path.write_bytes(b"this is no database, and longer than a header of SQLite is " * 20)
        said = "cannot be read: file is not a database"
    elif kind == "another shape":
        conn = sqlite3.connect(str(path))
        conn.execute("CREATE TABLE task_runs(id, state)")
        conn.commit()
        conn.close()
        said = "it lacks id INTEGER PRIMARY KEY, name, status, progress"
    elif kind == "a lock of others":
        (tmp_path / "x.db-lock").mkdir()
        said = f"cannot be locked with the file {os.path.realpath(str(path)) + '-lock'!r}"
    else:
        path, said = Path("/dev/null"), "is not a regular file"
    before = sorted(tmp_path.iterdir()), path.read_bytes() if path.is_file() else b""
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        run([1], path, nothing)
    assert isinstance(error.value, pipeloom.DatabaseError) and "\n" not in str(error.value)
    assert before == (sorted(tmp_path.iterdir()), path.read_bytes() if path.is_file() else b"")


def test_a_script_is_split_where_sqlite_would():
    script = """CREATE TABLE a(x); -- a comment; with a semicolon
        CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE a SET x = ';'; END;
        INSERT INTO a VALUES ('x;y') /* the last one ; needs none */"""
    found = list(pipeloom._statements(script))
    assert len(found) == 3
    conn = sqlite3.connect(":memory:")
    for statement in found:
        conn.execute(statement)
    assert conn.execute("SELECT x FROM a").fetchall() == [(";",)]
    conn.close()


def test_a_schema_that_fails_is_an_error_and_leaves_nothing_behind(db):
    with pytest.raises(pipeloom.UsageError, match="schema= failed: .*, in 'CREATE TABEL b"):
        run([1], db, nothing, schema="CREATE TABLE a(x); CREATE TABEL b(y)")
    assert rows(db, "SELECT name FROM sqlite_master") == []


# ---- Channel -------------------------------------------------------------------------------------------


def test_a_full_channel_holds_its_producer_until_it_is_drained():
    channel, entered, done = pipeloom.Channel(limit=2), threading.Event(), threading.Event()

    def produce():
        channel.put(None, 1)
        channel.put(None, 2)
        entered.set()
        channel.put(None, 3)
        done.set()

    thread = threading.Thread(target=produce)
    thread.start()
    assert entered.wait(WAIT) and not done.wait(0.05)
    assert channel.drain() == [(None, 1), (None, 2)]
    assert done.wait(WAIT)
    channel.close()
    assert channel.drain() == [(None, 3)] and channel.drain() is None
    thread.join(WAIT)


@pytest.fixture
def many_switches():
    """Threads take turns after a microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_what_many_threads_put_arrives_once_and_in_the_order_of_each(many_switches):
    channel, taken = pipeloom.Channel(limit=50), []

    def produce(who):
        for number in range(1_000):
            channel.put(None, (who, number), rows=number % 3)

    def take():
        while (items := channel.drain()) is not None:
            taken.extend(message for _, message in items)

    reader = threading.Thread(target=take)
    reader.start()
    at_once(produce, [(who,) for who in range(8)])
    channel.close()
    reader.join(WAIT)
    assert not reader.is_alive() and len(taken) == 8_000
    for who in range(8):
        assert [number for sender, number in taken if sender == who] == list(range(1_000))


def test_of_two_who_end_an_attempt_at_once_one_does():
    class Sender:
        lock, ended = threading.Lock(), False

        @property
        def closed(self):
            ended = self.ended
            if threading.current_thread() is not other:  # which comes between the question and the answer
                other.start()
                other.join(0.1)
            return ended

        @closed.setter
        def closed(self, value):
            self.ended = value

    channel, sender, told = pipeloom.Channel(), Sender(), []
    other = threading.Thread(target=lambda: told.append(channel.put(sender, "other", last=True)))
    told.append(channel.put(sender, "first", last=True))
    other.join(WAIT)
    assert told == [True, False] and [message for _, message in channel.drain()] == ["first"]


def test_a_channel_that_fails_releases_every_waiting_producer():
    channel, raised = pipeloom.Channel(limit=1), []
    channel.put(None, 0)

    def produce():
        with pytest.raises(pipeloom.WriterFailed) as error:
            channel.put(None, 1)
        raised.append(error.value)

    threads = [threading.Thread(target=produce) for _ in range(4)]
    for thread in threads:
        thread.start()
    failure = pipeloom.WriterFailed("x.db", "broken", "mend it")
    channel.fail(failure)
    for thread in threads:
        thread.join(WAIT)
    assert raised == [failure] * 4
    assert channel.drain() is None


# ---- Writer --------------------------------------------------------------------------------------------


def test_the_writer_works_alone_on_a_plain_queue(db):
    q = queue.Queue(maxsize=2)
    writer = SQLiteWriter(db, q, wal=True, store_task_status=True)
    writer.start()
    q.put(MsgTaskStarted(1, "one", "t1"))
    q.put(MsgTaskProgress(1, 1, 4, "quarter"))
    q.put(MsgTaskFinished(1, "done", "t2", result="ok"))
    q.put(MsgTaskProgress(1, 2, 4, "late"))
    q.put(MsgTaskFinished(2, "error", "t3", message="never started"))
    q.put({"unknown": "message"})
    q.put(MsgTaskStarted(3, "three", "t4"))
    q.put(SENTINEL)
    writer.join(WAIT)
    q.join()
    assert rows(db, "SELECT id, name, status, progress, result, message FROM task_runs") == [
        (1, "one", "done", 1.0, "ok", ""),
        (2, "task-2", "error", 0.0, None, "never started"),
        (3, "three", "running", 0.0, None, ""),
    ]


def test_the_writer_takes_no_name_that_threads_need(db):
    thread, writer = threading.Thread(), SQLiteWriter(db, queue.Queue())
    ours = set(vars(SQLiteWriter)) | (set(vars(writer)) - set(vars(thread)))
    assert {name for name in ours & set(dir(thread)) if not name.startswith("__")} == {"run", "join"}


def test_a_writer_that_cannot_open_refuses_its_producers_and_says_why(tmp_path):
    q = queue.Queue(maxsize=1)
    writer = SQLiteWriter(tmp_path / "missing" / "x.db", q)
    writer.start()
    for number in range(20):
        q.put(MsgTaskStarted(number, "x", "now"), timeout=WAIT)
    q.put(SENTINEL, timeout=WAIT)
    with pytest.raises(pipeloom.PipeloomError, match="there is no directory"):
        writer.join(WAIT)
    assert not writer.is_alive()


@dataclasses.dataclass(frozen=True)
class User:
    key: str
    name: object


USERS = "CREATE TABLE IF NOT EXISTS users(key TEXT PRIMARY KEY, name TEXT NOT NULL)"


def insert_user(conn, user):
    conn.execute("INSERT INTO users VALUES (?, ?)", (user.key, user.name))


def commits(conn, user):
    insert_user(conn, user)
    conn.commit()


def commits_by_sql(conn, user):
    conn.execute("BEGIN")
    insert_user(conn, user)
    conn.execute("COMMIT")


def commits_by_with(conn, user):
    with conn:
        insert_user(conn, user)


def commits_by_script(conn, user):
    conn.executescript(f"INSERT INTO users VALUES ('{user.key}', {'NULL' if user.name is None else 1});")


@pytest.mark.parametrize(
    "handler", [insert_user, commits, commits_by_sql, commits_by_with, commits_by_script]
)
def test_a_bad_message_undoes_its_task_and_nobody_else_notices(db, handler):
    started = threading.Barrier(3)

    def work(task, q):
        started.wait(WAIT)  # so that their messages meet in one batch, more often than not
        q.put(User(f"{task}-1", "x"))
        q.put(User(f"{task}-2", None if task == "bad" else "x"))
        q.put(User(f"{task}-3", "x"))

    result = run(["a", "bad", "c"], db, work, workers=3, schema=USERS, handlers={User: handler}, check=False)
    assert (result.done, result.error) == (2, 1)
    assert rows(db, "SELECT key FROM users ORDER BY key") == [(f"{n}-{i}",) for n in "ac" for i in (1, 2, 3)]
    assert rows(db, "SELECT status, message FROM task_runs WHERE name = 'bad'") == [
        ("error", "IntegrityError: NOT NULL constraint failed: users.name")
    ]


@pytest.mark.parametrize("how", ["rollback()", "execute()", "with"])
def test_a_handler_that_rolls_back_fails_its_task_and_no_other(db, how):
    def handler(conn, user):
        insert_user(conn, user)
        if user.key == "bad" and how == "with":
            with conn:
                raise LookupError("for this")
        elif user.key == "bad":
            conn.rollback() if how == "rollback()" else conn.execute("ROLLBACK")

    result = run(
        ["a", "bad", "c"],
        db,
        lambda t, q: q.put(User(t, "x")),
        schema=USERS,
        handlers={User: handler},
        check=False,
    )
    said = "LookupError: for this" if how == "with" else "MessageRefused: a handler rolled back"
    assert result.failures[0].message.startswith(said)
    assert rows(db, "SELECT key FROM users ORDER BY key") == [("a",), ("c",)]
    assert [row[2] for row in rows(db)] == ["done", "error", "done"]


def test_a_constraint_that_fails_only_at_the_commit_fails_its_task_and_no_other(db):
    schema = """CREATE TABLE a(id INTEGER PRIMARY KEY);
        CREATE TABLE b(a INTEGER REFERENCES a(id) DEFERRABLE INITIALLY DEFERRED)"""

    def work(task, ctx):
        ctx.execute("INSERT INTO b VALUES (?)", (task,))
        if task != 7:
            ctx.execute("INSERT INTO a VALUES (?)", (task,))

    result = run(range(20), db, work, schema=schema, check=False, workers=4)
    assert (result.done, result.error) == (19, 1)
    assert result.failures[0].message == "IntegrityError: FOREIGN KEY constraint failed"
    assert (
        rows(db, "SELECT count(*) FROM a, b ON a.id = b.a") == rows(db, "SELECT count(*) FROM b") == [(19,)]
    )


def test_a_handle_that_raises_after_the_finish_leaves_no_done_behind(db):
    class Late(SQLiteWriter):
        def handle(self, message):
            super().handle(message)
            if type(message) is MsgTaskFinished and message.task_id == 2 and message.status == "done":
                raise LookupError("too late")

    result = run(["a", "b", "c"], db, nothing, writer=Late, check=False)
    assert result.failures[0].message == "LookupError: too late"
    assert [row[2] for row in rows(db)] == ["done", "error", "done"]


@pytest.mark.parametrize("text", ["no such table: locked", "no such column: disk_is_full"])
def test_an_error_that_only_sounds_like_a_lock_is_not_waited_for(db, text):
    def handler(conn, user):
        raise sqlite3.OperationalError(text)

    result = run(["a"], db, lambda t, q: q.put(User(t, t)), handlers={User: handler}, check=False)
    assert result.failures[0].message == f"OperationalError: {text}"


def test_a_plain_queue_is_checked_as_well(db):
    q = queue.Queue()
    writer = SQLiteWriter(db, q)
    writer.start()
    for message in (
        MsgTaskStarted(1, None, "now"),
        MsgTaskProgress(1, float("nan"), 2),
        MsgTaskStarted("x", "x", "now"),
        MsgTaskFinished(1, "banana", "now"),
        MsgTaskFinished(1, "done", "now", result={"a": 1}),
        SENTINEL,
    ):
        q.put(message)
    writer.join(WAIT)
    assert rows(db, "SELECT id, status, progress, result FROM task_runs") == [(1, "done", 1.0, '{"a": 1}')]


def test_a_subclass_that_overrides_handle_sees_every_message(db):
    seen = []

    class Mine(SQLiteWriter):
        def handle(self, message):
            seen.append(type(message))
            if isinstance(message, User):
                insert_user(self._conn, message)
            else:
                super().handle(message)

    q = queue.Queue()
    writer = Mine(db, q, schema=USERS)
    writer.start()
    for message in (MsgTaskStarted(1, "a", "now"), User("a", "x"), MsgTaskFinished(1, "done", "now"), SENTINEL):
        q.put(message)
    writer.join(WAIT)
    assert rows(db, "SELECT * FROM users") == [("a", "x")]
    assert seen == [MsgTaskStarted, User, MsgTaskFinished]


def test_a_finish_for_another_task_neither_hangs_the_run_nor_hides_that_tasks_own(db):
    class Slow:
        pass

    told = threading.Event()

    def work(task, ctx):
        if task.task_id == 3:
            return ctx.put(Slow())  # holds the writer up, so that what follows shares a batch
        threading.Event().wait(0.05)
        if task.task_id == 1:
            ctx.put(MsgTaskFinished(2, "error", "now"))
            told.set()
        else:
            assert told.wait(WAIT)

    tasks = [Task(3, "c"), Task(1, "a"), Task(2, "b")]
    slow = {Slow: lambda conn, message: threading.Event().wait(0.3)}
    assert run(tasks, db, work, workers=3, handlers=slow).done == 3
    assert [row[2] for row in rows(db)] == ["done"] * 3


@pytest.mark.parametrize(
    "sql, values",
    [
        ("INSERT INTO t VALUES (?), ('sep')", [("a",), ("b",)]),
        ("INSERT INTO t SELECT count(*) FROM (VALUES (?))", [(1,), (2,)]),
        (
            "INSERT INTO t SELECT column1 FROM (VALUES (?)) WHERE column1 NOT IN (SELECT a FROM t)",
            [(7,), (7,)],
        ),
        ("INSERT OR REPLACE INTO main.t(a) VALUES (?);", [(n,) for n in range(2_000)]),
        ('REPLACE INTO "t" ("a") VALUES(?)', [("x",), ("y",)]),
        (
            "INSERT INTO u VALUES (?, ?) ON CONFLICT(k) DO UPDATE SET n = n + excluded.n",
            [(1, 2), (1, 3), (2, 4)],
        ),
        ("INSERT INTO t VALUES (:a)", [{"a": 1}, {"a": 2}]),
        ("UPDATE t SET a = ? RETURNING a", [(1,), (2,)]),
        ("WITH w AS (SELECT ?) INSERT INTO t SELECT * FROM w", [(1,), (2,)]),
    ],
)
def test_many_rows_mean_what_they_mean_one_by_one(db, sql, values):
    if ("RETURNING" in sql and sqlite3.sqlite_version_info < (3, 35)) or sqlite3.sqlite_version_info < (
        3,
        24,
    ):
        pytest.skip("this SQLite is too old for the statement")
    schema = "CREATE TABLE IF NOT EXISTS t(a); CREATE TABLE IF NOT EXISTS u(k PRIMARY KEY, n)"
    run(["t"], db, lambda t, ctx: ctx.executemany(sql, values), schema=schema)
    conn = sqlite3.connect(":memory:")
    conn.executescript(schema)
    for row in values:
        conn.execute(sql, row).fetchall()
    for table in "tu":
        assert rows(db, f"SELECT * FROM {table}") == conn.execute(f"SELECT * FROM {table}").fetchall()
    conn.close()


def test_a_row_of_another_kind_than_the_first_is_an_error(db):
    def work(task, ctx):
        ctx.executemany("INSERT INTO users VALUES (?, ?)", [("a", "b"), {"x": 3, "y": 4}])

    assert run(["t"], db, work, schema=USERS, check=False).error == 1
    assert rows(db, "SELECT * FROM users") == []


def test_a_table_of_the_users_may_have_any_name(db):
    schema = "CREATE TABLE staged(id INTEGER PRIMARY KEY, name, status); CREATE TABLE message(x)"
    for _ in range(2):
        run(["a"], db, lambda t, ctx: ctx.execute("INSERT INTO staged(name) VALUES (?)", (t,)), schema=schema)
        schema = None
    assert rows(db, "SELECT name FROM staged") == [("a",), ("a",)]


@pytest.mark.parametrize("how", ["execute", "trigger", "handler"])
def test_a_statement_that_rolls_the_transaction_back_fails_its_task_and_no_other(db, how):
    schema = """CREATE TABLE a(x UNIQUE); INSERT INTO a VALUES ('taken');
        CREATE TRIGGER t BEFORE INSERT ON a WHEN new.x = 'by trigger' BEGIN SELECT RAISE(ROLLBACK, 'no'); END"""

    def handler(conn, user):
        with pytest.raises(sqlite3.IntegrityError):
            conn.execute("INSERT OR ROLLBACK INTO a VALUES ('taken')")

    def work(task, ctx):
        if task == 3 and how == "handler":
            ctx.put(User("x", "x"))
        elif task == 3:
            ctx.execute(
                "INSERT OR ROLLBACK INTO a VALUES (?)", ("taken" if how == "execute" else "by trigger",)
            )
        else:
            ctx.execute("INSERT INTO a VALUES (?)", (task,))

    result = run(range(6), db, work, schema=schema, handlers={User: handler}, check=False, workers=3)
    assert (result.done, result.error) == (5, 1)
    assert rows(db, "SELECT count(*) FROM a") == [(6,)]


@pytest.mark.parametrize("what", ["locked file", "no directory", "SystemExit", "locked table"])
def test_a_handlers_own_trouble_is_its_tasks_and_is_not_waited_for(db, what):
    other = db.parent / "other.db"
    sqlite3.connect(str(other)).execute("CREATE TABLE x(y)").connection.close()
    conn = sqlite3.connect(str(other), isolation_level=None)
    conn.execute("BEGIN EXCLUSIVE")

    def handler(writers, user):
        if what == "SystemExit":
            sys.exit("no")
        elif what == "locked table":
            for _ in writers.execute("SELECT * FROM users"):
                writers.execute("DROP TABLE users")
        path = str(other) if what == "locked file" else "/no/such/dir/x.db"
        mine = sqlite3.connect(path, timeout=0)
        try:
            mine.execute("INSERT INTO x VALUES (1)")
        finally:
            mine.close()

    def work(task, ctx):
        if task == "bad":
            ctx.execute("INSERT INTO users VALUES (1, 2)")
            ctx.put(User(1, 2))

    result = run(["a", "bad", "c"], db, work, schema=USERS, handlers={User: handler}, check=False)
    conn.close()
    assert (result.done, result.error) == (2, 1) and rows(db, "SELECT * FROM users") == []


def test_rows_may_reference_their_tasks_row(db):
    schema = "CREATE TABLE made(task INTEGER REFERENCES task_runs(id))"

    def work(task, ctx):
        ctx.execute("INSERT INTO made VALUES (?)", (ctx.task_id if task != "bad" else 99,))

    result = run(iter(["a", "bad", "c"]), db, work, schema=schema, check=False)
    assert (result.done, result.error) == (2, 1)
    assert rows(db, "SELECT count(*) FROM made") == [(2,)]


def test_a_killed_writer_without_wal_is_recovered_from(home):
    program = """if 1:
        import os, pipeloom, sqlite3
        def handler(conn, message):
            conn.execute("PRAGMA cache_size=5"); conn.execute("PRAGMA cache_spill=ON")
            conn.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 20_000)
            os.kill(os.getpid(), 9)
        pipeloom.run_pipeline(["a"], "k.db", worker_fn=lambda t, q: q.put(b"x"), handlers={bytes: handler},
                              schema="CREATE TABLE t(x)", progress="none", wal=False)"""
    python("-c", program, cwd=home)
    assert (home / "k.db-journal").stat().st_size > 0
    run(["b"], home / "k.db", nothing, wal=False)
    assert rows(home / "k.db", "SELECT count(*) FROM t") == [(0,)]


def test_a_handler_may_set_the_connections_row_factory(db):
    def handler(conn, user):
        conn.row_factory = lambda cursor, row: {d[0]: v for d, v in zip(cursor.description, row)}

    def work(task, ctx):
        ctx.put(User(task, "x"))
        ctx.put(MsgTaskProgress(1, 1, 2))

    for _ in range(2):
        run([Task(1, "a"), Task(2, "b")], db, work, workers=1, handlers={User: handler})
    assert rows(db) == [(1, "a", "done"), (2, "b", "done")]


def test_a_subclass_of_a_message_class_goes_to_its_handler(db):
    class Admin(User):
        pass

    run(["a"], db, lambda t, q: q.put(Admin(t, "x")), schema=USERS, handlers={User: insert_user})
    assert rows(db, "SELECT * FROM users") == [("a", "x")]


@pytest.mark.parametrize(
    "handlers, error",
    [({"x": insert_user}, TypeError), ({User: 3}, TypeError), ({MsgTaskStarted: print}, ValueError)],
)
def test_handlers_that_cannot_work_are_an_error_at_once(db, handlers, error):
    with pytest.raises(error, match="handlers="):
        run([1], db, nothing, handlers=handlers)
    assert not db.exists()


def test_task_rows_never_fire_a_cascade_of_the_users_own_tables(db):
    schema = """CREATE TABLE IF NOT EXISTS made(task INTEGER REFERENCES task_runs(id) ON DELETE CASCADE)"""
    stored = threading.Event()

    class Shown(Recorder):
        def update(self, message):
            stored.set()

    def work(task, q):
        assert stored.wait(WAIT)  # the row is committed as running, so that its finish changes it
        q.put(MsgExecute("INSERT INTO made VALUES (?)", (q.task_id,)))

    run(["a"], db, work, schema=schema, progress=Shown())
    run(["a"], db, nothing, schema=schema)
    assert rows(db, "SELECT * FROM made") == [(1,)]


def hold(path, seconds, mode="EXCLUSIVE"):
    """Another process that holds the database's lock, from when this returns, for some seconds."""
    program = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        f"c.execute('BEGIN {mode}'); print('held', flush=True); time.sleep({seconds}); c.execute('ROLLBACK')"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"held"
    return process


def end(process):
    process.kill()
    process.wait(WAIT)
    process.stdout.close()


def locked_run(path, moment, seconds, **options):
    """A run of four tasks, beside another process that holds the lock: from the start, in the middle, at the end."""
    holders = []

    def work(item, q):
        if item == moment:
            holders.append(hold(path, seconds))
        q.execute("INSERT INTO users VALUES (?, ?)", (str(item), "x"))

    run([-1], path, nothing, schema=USERS)
    if moment == 0:
        holders.append(hold(path, seconds))
    try:
        run(range(1, 5), path, work, workers=1, **options)
    finally:
        end(holders[0])


def test_a_foreign_lock_of_three_seconds_is_waited_out_with_one_warning(tmp_path, caplog):
    """From the start on, from the second task's commit, and from the end of the last task, as by row 2."""
    paths = {(wal, moment): tmp_path / f"{wal}-{moment}.db" for wal in (True, False) for moment in (0, 2, 4)}
    at_once(lambda wal, moment: locked_run(paths[wal, moment], moment, 3, wal=wal), list(paths))
    for path in paths.values():
        assert [row[2] for row in rows(path)] == ["done"] * 5
        assert rows(path, "SELECT key FROM users ORDER BY key") == [("1",), ("2",), ("3",), ("4",)]
        (warning,) = (text for text in caplog.messages if str(path) in text)
        assert "database is locked; waiting up to 300 s for that to pass" in warning


def test_a_foreign_lock_that_stays_ends_the_run_with_one_clear_error(tmp_path):
    said = "database is locked, still after .* end the program that holds it, or pass a longer busy_timeout="

    def one(moment):
        path = tmp_path / f"{moment}.db"
        with pytest.raises(pipeloom.WriterFailed, match=said):
            locked_run(path, moment, 60, busy_timeout=0.5)
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
        run(range(1, 5), path, lambda item, q: q.execute("INSERT INTO users VALUES (?, 'x')", (str(item),)),
            resume=True)  # fmt: skip
        assert rows(path, "SELECT key FROM users ORDER BY key") == [("1",), ("2",), ("3",), ("4",)]

    at_once(one, [(0,), (2,), (4,)])


FILL = """
import pipeloom, resource, sys
if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
pipeloom.run_pipeline(
    range(200), "job.db", resume=True, busy_timeout=0.3, progress="none", workers=4,
    schema="CREATE TABLE IF NOT EXISTS made(item PRIMARY KEY, text)",
    worker_fn=lambda item, q: q.execute("INSERT INTO made VALUES (?, ?)", (item, "x" * 3000)),
)
"""


@needs_posix
def test_a_file_that_may_grow_no_more_ends_the_run_and_the_next_finishes_it(home):
    (home / "fill.py").write_text(FILL)
    for limit in (20_000, 400_000):
        done = python("fill.py", limit, cwd=home, code=1)
        assert re.search(r"(disk I/O error|disk is full), still after .* make room on the disk", done.stderr)
        assert rows(home / "job.db", "PRAGMA integrity_check") == [("ok",)]
    python("fill.py", cwd=home, code=0)
    assert rows(home / "job.db", "SELECT count(*), count(DISTINCT item) FROM made") == [(200, 200)]
    assert rows(home / "job.db", "SELECT DISTINCT status FROM task_runs") == [("done",)]


def wait_for(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        threading.Event().wait(0.02)


@contextmanager
def small_disk(folder):
    """A file system of 400 kB, where this user may make one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("cannot mount a small disk: not root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_with_room_the_next_finishes_it(homes, caplog):
    def one(wal):
        folder = homes()
        db = folder / "job.db"
        with small_disk(folder):
            with pytest.raises(
                pipeloom.WriterFailed, match="full, still after .* make room on the disk or repair it"
            ):
                fill(db, wal=wal, busy_timeout=0.3)
            stored = rows(db, "SELECT item FROM made")
            assert rows(db, "SELECT id - 1 FROM task_runs WHERE status = 'done'") == stored
            assert len(stored) < 200 and rows(db, "PRAGMA integrity_check") == [("ok",)]

            grow = ["mount", "-o", "remount,size=40m", str(folder)]
            room = threading.Timer(
                1, subprocess.run, [grow], {"check": True}
            )  # in the middle of the next run
            room.start()
            result = fill(db, wal=wal)
            room.join()
            assert (result.done, result.skipped) == (200 - len(stored), len(stored))
            assert rows(db, "SELECT count(*), count(DISTINCT item) FROM made") == [(200, 200)]

    def fill(db, **options):
        return run(range(200), db, work, resume=True, workers=4,
                   schema="CREATE TABLE IF NOT EXISTS made(item PRIMARY KEY, text)", **options)  # fmt: skip

    def work(item, q):
        q.execute("INSERT INTO made VALUES (?, ?)", (item, "x" * 3000))

    at_once(one, [(True,), (False,)])
    assert caplog.text.count("full; waiting up to 10 s for that to pass") == 2


@pytest.mark.parametrize("wal", [True, False])
@pytest.mark.parametrize("how", ["deleted", "replaced", "without its lock"])
def test_a_database_file_or_lock_that_is_taken_away_ends_the_run(db, how, wal):
    def work(item, q):
        if item == 1 and how == "deleted":
            os.remove(str(db))
        elif item == 1 and how == "without its lock":
            os.remove(f"{db}-lock")
            run(["meanwhile"], db, nothing)  # which nothing could keep from it; but this run stores no more
            stored.extend(rows(db, "SELECT count(*) FROM task_runs WHERE status = 'done'"))
        elif item == 1:
            (db.parent / "other").write_text("")
            os.replace(str(db.parent / "other"), str(db))

    if os.name == "nt":
        pytest.skip("Windows keeps an open file where it is")
    stored = []
    with pytest.raises(pipeloom.WriterFailed, match="was deleted, moved or replaced during the run"):
        run(range(10_000), db, work, workers=2, wal=wal)
    if how == "without its lock":
        assert ("meanwhile", "done") in [row[1:] for row in rows(db)]
        assert stored == rows(db, "SELECT count(*) FROM task_runs WHERE status = 'done'")


def test_a_worker_may_change_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def work(task, q):
        os.chdir(str(tmp_path / "elsewhere"))
        with q.connect() as conn:
            return conn.execute("SELECT count(*) FROM pipeline_runs").fetchone()[0]

    assert run(["a"], "job.db", work).done == 1
    assert rows("../job.db", "SELECT result FROM task_runs") == [("1",)]


@pytest.mark.parametrize("table", ["users", "task_runs"])
def test_damaged_pages_end_the_run_with_one_clear_error(db, table):
    run(range(2_000), db, lambda item, q: q.execute("INSERT INTO users VALUES (?, ?)", (str(item), "x" * 80)),
        schema=USERS)  # fmt: skip
    (root,) = rows(db, "SELECT rootpage FROM sqlite_master WHERE name = ?", table)[0]
    with db.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)
    error = pipeloom.WriterFailed if table == "users" else pipeloom.DatabaseError
    with pytest.raises(error, match="malformed; restore (it|a copy of it) or use another file"):
        run(["new"] * 100, db, lambda item, q: q.execute("INSERT INTO users VALUES ('new', '')"))


def test_a_file_system_without_shared_memory_gets_another_journal_and_a_warning(db, monkeypatch, caplog):
    def connect_without(path, **options):  # SQLite's own file system for such places
        return connect(f"file:{path}?vfs=unix-dotfile", uri=True, **options)

    if os.name == "nt":
        pytest.skip("SQLite has unix-dotfile on Unix only")
    connect = sqlite3.connect
    conn = pipeloom.connect("")  # a temporary database has no WAL either
    conn.close()
    assert "journal mode is delete, as WAL does not work here" in caplog.text
    caplog.clear()
    monkeypatch.setattr(pipeloom.sqlite3, "connect", connect_without)
    run(["a", "b"], db, nothing)
    monkeypatch.undo()
    assert "journal mode is delete, as WAL does not work here" in caplog.text
    assert [row[2] for row in rows(db)] == ["done"] * 2


NO_MEMORY = """
import pipeloom, sqlite3, sys
if len(sys.argv) > 1:
    sqlite3.connect(":memory:").execute("PRAGMA hard_heap_limit=" + sys.argv[1])  # of the whole process
pipeloom.run_pipeline(
    range(3000), "job.db", resume=True, progress="none", workers=4,
    schema="CREATE TABLE IF NOT EXISTS made(item PRIMARY KEY, text)",
    worker_fn=lambda item, q: q.execute("INSERT INTO made VALUES (?, ?)", (item, "x" * 100)),
)
"""


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 31), reason="this SQLite has no limit on its memory")
def test_without_memory_the_run_ends_and_the_next_finishes_it(home):
    (home / "job.py").write_text(NO_MEMORY)
    for limit in (200_000, 500_000, 900_000):
        done = python("job.py", limit, cwd=home, code=1)
        assert "MemoryError" in done.stderr or "cannot be" in done.stderr
    python("job.py", cwd=home, code=0)
    assert rows(home / "job.db", "SELECT count(*), count(DISTINCT item) FROM made") == [(3000, 3000)]
    assert rows(home / "job.db", "SELECT DISTINCT status FROM task_runs") == [("done",)]


def test_statements_that_are_interrupted_are_taken_again(db):
    """As by a connection's interrupt(), which any thread may call."""

    class Known(SQLiteWriter):
        def _prepare(self):
            super()._prepare()
            writers.append(self)

    def interrupt():
        while not over.wait(0.0005):
            for conn in [writer.conn for writer in writers if writer.conn]:
                conn.interrupt()
                interrupted.append(True)

    writers, interrupted, over = [], [], threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        result = run(range(1000), db, lambda item, q: q.executemany("INSERT INTO users VALUES (?, '')",
                     [(f"{item}-{k}",) for k in range(20)]), schema=USERS, writer=Known, workers=2)  # fmt: skip
    finally:
        over.set()
        thread.join(WAIT)
    assert result.done == 1000 and interrupted
    assert rows(db, "SELECT count(*) FROM users") == [(20_000,)]


class Failing:
    """A connection whose Nth statement raises an error of SQLite, or each from there on."""

    def __init__(self, conn, nth, error, forever):
        self.conn, self.left, self.error, self.forever = conn, nth, error, forever

    def execute(self, *arguments):
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.forever):
            self.error.is_writers = True
            raise self.error
        return self.conn.execute(*arguments)

    def __getattr__(self, name):
        return getattr(self.conn, name)


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("disk I/O error"),
        sqlite3.OperationalError("database is locked"),
        sqlite3.OperationalError("interrupted"),
        sqlite3.OperationalError("SQL logic error"),
        sqlite3.DatabaseError("database disk image is malformed"),
        MemoryError(),
    ],
    ids=repr,
)
def test_whichever_statement_fails_the_run_ends_honestly(tmp_path, error, forever):
    """SQLite's own anomaly method: let the 1st, 2nd, 3rd... statement fail until a run gets through."""

    def one(nth):
        path = tmp_path / f"{nth}.db"
        failing = Failing(None, nth, error, forever)

        class Anomaly(SQLiteWriter):
            def run(self):
                begin = self.store.open

                def open(prepare):
                    begin(prepare)
                    failing.conn, self.store.conn = self.store.conn, failing

                self.store.open = open
                if forever:
                    self.store._hurried = lambda: True  # what stays needs no patience
                super().run()

        result = None
        try:
            result = run(list("abc"), path, lambda t, q: q.put(User(t, "x")), writer=Anomaly, schema=USERS,
                         handlers={User: insert_user}, workers=1, check=False)  # fmt: skip
        except pipeloom.WriterFailed as failure:
            assert str(error) in str(failure)
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
        done = {name for _, name, status in rows(path) if status == "done"}
        assert {key for (key,) in rows(path, "SELECT key FROM users")} == done
        if result:  # then it speaks of every task, and what it says is stored
            assert result.done == len(done) and result.done + result.error == 3
            assert {failure.task for failure in result.failures} == set("abc") - done
        if nth == 30:
            assert failing.left > 0 and result.ok, "no run got through"

    at_once(one, [(nth,) for nth in range(1, 31)])


def test_the_writer_dies_and_no_worker_stays_blocked(db):
    class Dies(SQLiteWriter):
        def _commit(self, batch):
            raise MemoryError("no memory for the batch")

    def work(task, q):
        for step in range(100):
            q.put(MsgTaskProgress(q.task_id + 1000, step, 100))

    with pytest.raises(pipeloom.WriterFailed, match="gave up: MemoryError: no memory for the batch"):
        run(range(5_000), db, work, workers=4, writer=Dies)


def test_one_task_is_one_row_however_many_messages_it_sent(db):
    statements = []

    class Counting(SQLiteWriter):
        def _acknowledge(self):
            statements.append(len(self.status._pending))
            super()._acknowledge()

    def work(task, q):
        for step in range(1, 1001):
            q.put(MsgTaskProgress(1, step, 1000, f"step {step}"))

    run([Task(1, "one")], db, work, writer=Counting)
    assert set(statements) == {1}
    assert rows(db, "SELECT progress, message, attempts FROM task_runs") == [(1.0, "", 1)]


# ---- Progress ------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.integers(0, 50))
@settings(max_examples=300, deadline=None)
def test_any_name_fits_its_width_and_holds_no_control_character(text, width):
    line = pipeloom._fit(text, width)
    assert pipeloom._width(line) == width
    assert line.isprintable() or not line


@given(st.lists(st.tuples(st.text(max_size=50), st.floats(0, 2), st.text(max_size=50))), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_no_line_is_wider_than_the_window(bars, width):
    style = pipeloom._Style(io.StringIO())
    style.colour = False
    shown = [pipeloom._Bar(name, total, 1, text) for name, total, text in bars]
    for line, cells in pipeloom._lines(shown, width, style):
        assert pipeloom._width(line) == cells <= max(width - 1, 0)


def test_the_overall_bar_and_as_many_running_ones_as_fit_are_shown():
    board = pipeloom._Board(io.StringIO())
    board.total = 10_000
    for id in range(10_000):
        board.update(MsgTaskStarted(id, f"task-{id}", "now"))
    board.update(MsgTaskFinished(0, "error", "now"))
    for room in range(2, 12):
        bars = board.bars(room)
        assert len(bars) == room and bars[0].name == "All tasks" and "1 failed" in bars[0].text
    assert bars[-1].name == "+9,990 more"
    assert len(board.bars(1)) == 1 and len(board.bars(20_000)) == 10_000


def test_nothing_is_shown_before_it_is_committed(db):
    display = Recorder(db)
    run(["a", "b"], db, lambda t, q: q.progress(1, 2, "half"), progress=display)
    assert display.told[0] == ("start", 2) and display.told[-1][0] == "stop" and display.told[-1][1].done == 2
    kinds = {MsgTaskStarted: "running", MsgTaskProgress: "running", MsgTaskFinished: "done"}
    assert len(display.stored) == len(display.messages()) >= 4
    for message, (status,) in zip(display.messages(), display.stored):
        assert status in (kinds[type(message)], "done")


@pytest.mark.parametrize("method", ["start", "update", "stop"])
def test_a_display_that_raises_harms_nothing(db, method, caplog):
    display = Recorder()
    setattr(display, method, lambda *_: 1 / 0)
    assert run(["a", "b"], db, nothing, progress=display).done == 2
    assert "the progress display failed" in caplog.text


@pytest.mark.parametrize("method", ["start", "update", "stop"])
def test_a_display_that_hangs_harms_nothing(db, method, caplog, monkeypatch):
    display, over = Recorder(), threading.Event()
    setattr(display, method, lambda *_: over.wait(2 * WAIT))
    monkeypatch.setattr(pipeloom._Aside, "PATIENCE", 0.1)
    monkeypatch.setattr(pipeloom._Aside, "BACKLOG", 1000)
    try:
        assert run(range(2000), db, nothing, progress=display).done == 2000
        assert [row[2] for row in rows(db)] == ["done"] * 2000
    finally:
        over.set()
    assert (
        "the progress display failed at its end: TimeoutError: it hangs, 0.1 s after the end" in caplog.text
    )
    assert method == "stop" or "and is off: TimeoutError: it is 1,000 messages behind" in caplog.text


@pytest.mark.parametrize("progress, error", [("blink", ValueError), (object(), TypeError)])
def test_an_unknown_progress_is_an_error(db, progress, error):
    with pytest.raises(error, match="progress="):
        run([1], db, nothing, progress=progress)


THREE_TASKS = """
import pipeloom
pipe = pipeloom.Pipeline("t.db")
@pipe.task(each=[1, 2, 3])
def work(ctx, item): ctx.sleep(0.1)
if __name__ == "__main__": pipe.main()
"""


def test_without_a_terminal_a_run_writes_one_plain_line_at_its_end(home):
    (home / "t.py").write_text(THREE_TASKS)
    done = python("t.py", cwd=home, code=0)
    assert done.stdout == "" and "\x1b" not in done.stderr
    assert done.stderr.startswith("pipeloom: 3/3  0:00:0") and "3 done in" in done.stderr


TERMINAL_PROGRAM = """
import sys, time, pipeloom
pipeloom.setup_logging(1)
def work(task, q):
    for _ in q.track(range(4)):
        time.sleep(0.06)
    print("printed", task)
    pipeloom.logger.info("logged [/%s]", task)
names = ["a", "[/b]", "\\u65e5\\u672c", "e\\u0301\\x1b[2J\\n"] + [f"n{i}" for i in range(8)]
pipeloom.run_pipeline(names, "t.db", workers=int(sys.argv[2]), worker_fn=work, progress=sys.argv[1])
"""


def on_terminal(program, arguments, cwd, size=(24, 80), env=None, act=None):
    """Run a program on a pty of its own; returns its exit code and all that it wrote there."""
    import fcntl
    import pty
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    before = termios.tcgetattr(side)
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=side, stdout=side, stderr=side, cwd=str(cwd),
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8", **(env or {})},
    )  # fmt: skip
    written = b""
    try:
        if act:
            act(process)
        os.set_blocking(main, False)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            over = process.poll() is not None
            try:
                written += os.read(main, 65536)
            except OSError:
                if over:
                    break
                threading.Event().wait(0.01)
        assert termios.tcgetattr(side) == before
    finally:
        process.kill()
        process.wait(WAIT)
        os.close(main)
        os.close(side)
    return process.returncode, written.decode("utf-8", "replace")


def screen(text):
    """What a terminal shows in the end: the lines, after the cursor has gone up and cleared."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            number = int(re.sub(r"\D", "", part) or 1)
            if part[-1] == "A":
                row = max(row - number, 0)
            elif part[-1] == "J":
                lines[row:] = [lines[row][:column]]
            elif part[-1] == "K":
                lines[row] = "" if number == 2 else lines[row][:column]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


@needs_posix
@pytest.mark.parametrize("progress", ["ansi", pytest.param("rich", marks=needs_rich)])
def test_bars_and_log_lines_share_a_terminal_and_only_the_overall_bar_stays(home, progress):
    (home / "t.py").write_text(TERMINAL_PROGRAM)
    code, written = on_terminal(["t.py"], [progress, "3"], home)
    assert code == 0, written
    shown = screen(written)
    assert "100%" in shown[-1] and "12/12" in shown[-1]
    assert sum("%" in line for line in shown) == 1, shown
    assert sum(line.startswith("printed") for line in shown) == 12
    assert sum("logged [/" in line for line in shown) == 12
    assert "25%" in written or "50%" in written  # the running tasks had bars meanwhile
    assert "\x1b[?25l" not in written or written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


@needs_posix
def test_a_tiny_window_harms_nothing(homes):
    def one(size):
        home = homes()
        (home / "t.py").write_text(TERMINAL_PROGRAM)
        code, _ = on_terminal(["t.py"], ["ansi", "8"], home, size=size)
        assert code == 0 and [row[2] for row in rows(home / "t.db")] == ["done"] * 12

    at_once(one, [((5, 20),), ((1, 1),)])


@needs_posix
def test_an_ascii_terminal_without_colour_gets_ascii_bars_without_colour(home):
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "NO_COLOR": "1"}
    (home / "t.py").write_text(THREE_TASKS)
    code, written = on_terminal(["t.py"], [], home, env=env)
    assert code == 0 and written.isascii() and "###" in written and "\x1b[32m" not in written


@needs_posix
def test_a_dumb_terminal_gets_lines(home):
    (home / "t.py").write_text(THREE_TASKS)
    code, written = on_terminal(["t.py"], [], home, env={"TERM": "dumb"})
    assert code == 0 and "\x1b" not in written and "3/3" in written


@needs_posix
def test_what_a_forked_child_prints_under_bars_is_written(home):
    (home / "t.py").write_text(
        "import os, sys, pipeloom\n"
        "def work(task, ctx):\n"
        "    if os.fork() == 0: print('from the child'); sys.exit()\n"
        "    assert os.wait()[1] == 0; ctx.sleep(0.2)\n"
        "pipeloom.run_pipeline([1], 't.db', worker_fn=work, progress='ansi')"
    )
    code, written = on_terminal(["-W", "ignore", "t.py"], [], home)
    assert code == 0 and "from the child\r\n" in written


@needs_posix
def test_a_window_that_shrinks_in_mid_run_gets_narrower_lines(home):
    import fcntl
    import struct
    import termios

    def shrink(process):
        wait_for(lambda: (home / "t.db-wal").exists())
        threading.Event().wait(0.3)
        size = struct.pack("HHHH", 4, 20, 0, 0)
        with open(f"/proc/{process.pid}/fd/2", "wb", buffering=0) as terminal:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    (home / "t.py").write_text(TERMINAL_PROGRAM)
    code, written = on_terminal(["t.py"], ["ansi", "8"], home, act=shrink)
    assert code == 0 and [row[2] for row in rows(home / "t.db")] == ["done"] * 12
    (last,) = [line for line in screen(written) if line.startswith("All")]
    assert len(re.sub("\x1b[^m]*m", "", last)) <= 20


LOGGING_PROGRAM = """
import logging, sys, threading, pipeloom
logging.basicConfig(level=logging.INFO)
up = threading.Event()
def work(task, ctx):
    up.set()
    logging.info("logged %s", task)
    print("half", end=" "); print("printed", task)
    print("more", end="")
    ctx.sleep(0.1)
handlers = [handler.stream for handler in logging.getLogger().handlers]
threads = [threading.Thread(target=pipeloom.run_pipeline, args=(range(n, n + 8), f"{n}.db"),
           kwargs={"worker_fn": work, "workers": 4, "progress": sys.argv[1]}) for n in (0, 100)[:int(sys.argv[2])]]
for thread in threads:
    thread.start()
    up.wait()  # what is printed in the moment in which bars come up may be half a line
for thread in threads: thread.join()
assert handlers == [handler.stream for handler in logging.getLogger().handlers]
assert type(sys.stdout).__name__ == type(sys.stderr).__name__ == "TextIOWrapper"
"""


@needs_posix
@pytest.mark.parametrize("progress", ["ansi", "auto"])
@pytest.mark.parametrize("runs", [1, 2])  # at once: the second shows no bars
def test_no_line_that_is_printed_or_logged_in_any_way_is_lost_or_torn(home, progress, runs):
    (home / "t.py").write_text(LOGGING_PROGRAM)
    code, written = on_terminal(["t.py"], [progress, str(runs)], home)
    assert code == 0, written
    shown = screen(written)
    for number in [*range(8), *range(100, 108)][: 8 * runs]:
        assert shown.count(f"INFO:root:logged {number}") == 1, shown
        assert sum(line.endswith(f"half printed {number}") for line in shown) == 1, shown
    assert sum(line.startswith("All tasks") for line in shown) == 1, shown


@needs_posix
def test_a_terminal_that_stands_still_keeps_no_signal_from_ending_the_run(home):
    import termios

    (home / "t.py").write_text(
        SLEEPER.replace('progress="none"', 'progress="ansi"')
        .replace("print(", "str(")
        .replace("try:", "pipeloom._Screen.PATIENCE = 0.3\ntry:")
    )

    def act(process):
        deadline = time.monotonic() + WAIT
        while not (home / "s.db").exists() and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        threading.Event().wait(0.3)
        termios.tcflow(sides[0], termios.TCOOFF)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)  # two of the same kind may arrive as one
        try:
            process.wait(WAIT)
        finally:
            termios.tcflow(sides[0], termios.TCOON)

    import pty

    sides = []
    opened = pty.openpty

    def remember():
        pair = opened()
        sides.append(pair[1])
        return pair

    pty.openpty = remember
    try:
        code, _ = on_terminal(["t.py"], ["hangs"], home, act=act)
    finally:
        pty.openpty = opened
    assert code in (-signal.SIGTERM, -signal.SIGHUP)


CLOSED_STREAMS = """
(python -m pipeloom demo -n 3 --db 1.db 2>&-; echo $? >1) &
((python -m pipeloom demo -n 2 --db 2.db; echo $? >2) 2>&1 | head -c 1 >out) &
((python -m pipeloom demo -n 3 --fail 1 --db 3.db; echo $? >3) 2>&1 | true) &
(python -m pipeloom status --db nothing.db 2>&- >nothing; echo $? >4) &
(python -m pipeloom init-db --db 5.db && python -m pipeloom status --db 5.db >/dev/full 2>said; echo $? >5) &
(python -m pipeloom demo -n 2 --db 6.db 2>/dev/full; echo $? >6) &
(python -m pipeloom demo -n 2 --db 7.db >&- 2>&- <&-; echo $? >7) &
wait
"""


@needs_posix
def test_closed_full_and_broken_streams_harm_nothing(home):
    script = CLOSED_STREAMS.replace("python", f"'{sys.executable}'")
    subprocess.run(script, shell=True, cwd=str(home), timeout=60)
    assert [(home / str(n)).read_text() for n in range(1, 8)] == [f"{c}\n" for c in (0, 0, 1, 2, 2, 0, 0)]
    assert (home / "nothing").read_text() == ""
    assert (home / "said").read_text().startswith("pipeloom: stdout cannot be written")


@pytest.mark.parametrize("with_rich", [False, pytest.param(True, marks=needs_rich)])
def test_the_progress_managers_of_the_original_drive_bars(db, monkeypatch, with_rich):
    if not with_rich:
        monkeypatch.setattr(pipeloom, "_rich_console", lambda: None)
    overall, tasks = pipeloom.make_overall_progress(), pipeloom.make_task_progress()
    assert isinstance(overall, pipeloom._AnsiProgress) is not with_rich
    bars = pipeloom.preregister_task_bars(tasks, 3)
    assert list(bars) == [1, 2, 3] and bars[1] == 0
    q = queue.Queue()
    writer = SQLiteWriter(db, q, task_progress=tasks, task_bar_map=bars)
    with overall:
        bar = overall.add_task("[cyan]All tasks", total=3)
        writer.start()
        q.put(MsgTaskStarted(1, "one", "now"))
        q.put(MsgTaskProgress(1, 1, 2))
        q.put(MsgTaskFinished(1, "done", "now"))
        q.put(MsgTaskProgress(2, 1, 2))
        q.put(SENTINEL)
        writer.join(WAIT)
        overall.advance(bar)
        overall.refresh()
    left = tasks.tasks
    assert len(left) == 2
    completed = [task.completed for task in (left.values() if isinstance(left, dict) else left)]
    assert completed == [50, 0]


def test_the_log_file_gets_plain_lines(tmp_path, capsys):
    pipeloom.setup_logging(1, tmp_path / "log")
    pipeloom.setup_logging(1, tmp_path / "log")
    try:
        pipeloom.logger.info("loading [/tmp/x] \x1b")
        assert capsys.readouterr().err == "INFO     loading [/tmp/x] \x1b\n"
        assert (tmp_path / "log").read_text().endswith("INFO [pipeloom] loading [/tmp/x] \x1b\n")
    finally:
        pipeloom.setup_logging(0)
        pipeloom._remove_handlers()


# ---- Task and context ----------------------------------------------------------------------------------


def test_rows_are_stored_if_and_only_if_the_task_is_done(db):
    def work(task, ctx):
        ctx.execute("INSERT INTO users VALUES (?, ?)", (f"{task}-1", "x"))
        ctx.put(User(f"{task}-2", "x"))
        ctx.executemany("INSERT INTO users VALUES (?, ?)", ([f"{task}-{i}", "x"] for i in range(3, 6)))
        ctx.upsert("users", [{"key": f"{task}-5", "name": "y"}], key="key")
        if task == "raises":
            raise RuntimeError("no")
        if task == "cancels":
            raise pipeloom.TaskCancelled("not needed")
        if task in ("error", "cancelled"):
            ctx.put(MsgTaskFinished(ctx.task_id, task, "now"))

    names = ["raises", "fine", "error", "cancelled", "cancels"]
    result = run(names, db, work, workers=2, schema=USERS, handlers={User: insert_user}, check=False)
    assert (result.done, result.error, result.cancelled) == (1, 2, 2)
    found = rows(db, "SELECT key, name FROM users ORDER BY key")
    assert found == [(f"fine-{i}", "y" if i == 5 else "x") for i in range(1, 6)]


def test_the_first_finish_counts_and_what_comes_after_it_is_dropped_or_refused(db, caplog):
    def work(task, ctx):
        ctx.put(MsgTaskFinished(1, "done", "t1", result="first"))
        ctx.put(MsgTaskFinished(1, "error", "t2", result="second"))
        ctx.put(MsgTaskProgress(1, 1, 5))
        with pytest.raises(pipeloom.MessageRefused, match="task 'one' has finished: User came too late"):
            ctx.put(User("late", "x"))
        with pytest.raises(pipeloom.MessageRefused, match="came too late"):
            ctx.execute("INSERT INTO users VALUES (1, 2)")
        raise RuntimeError("after all")

    run([Task(1, "one")], db, work, schema=USERS, handlers={User: insert_user})
    assert rows(db, "SELECT status, result, progress FROM task_runs") == [("done", "first", 1.0)]
    assert rows(db, "SELECT * FROM users") == []
    assert "raised after its finish, which counts: RuntimeError: after all" in caplog.text


def test_a_worker_keeps_its_own_list_and_may_use_it_again(db):
    def work(task, ctx):
        row = ["", "x"]
        for key in "abc":
            row[0] = key
            ctx.execute("INSERT INTO users VALUES (?, ?)", row)
        ctx.execute("INSERT INTO users VALUES (:key, :name)", {"key": "d", "name": "y"})
        ctx.execute("UPDATE users SET name = 'z' WHERE key = 'a'")

    run(["t"], db, work, schema=USERS)
    assert rows(db, "SELECT * FROM users ORDER BY key") == [("a", "z"), ("b", "x"), ("c", "x"), ("d", "y")]


@pytest.mark.parametrize("late", ["finish", "deadline"])
def test_what_a_task_with_many_rows_says_too_late_holds_nobody_up(db, clock, late):
    def work(task, ctx):
        if task == 1:
            ctx.executemany("INSERT INTO users VALUES (?, 'x')", ((f"{n}",) for n in range(5_000)))
            ctx.executemany("INSERT INTO users VALUES (?, 'y')", [("last",)])
            if late == "deadline":
                clock.advance(ctx, 61)
                ctx.sleep(WAIT)
            ctx.put(MsgTaskFinished(ctx.task_id, "done", "now"))
            threading.Event().wait(0.2)
            ctx.put(MsgTaskFinished(ctx.task_id, "done", "later"))

    result = run(range(100), db, work, workers=1, schema=USERS, timeout=60, check=False)
    assert result.done == (100 if late == "finish" else 99)
    assert rows(db, "SELECT count(*) FROM users") == [(5_001 if late == "finish" else 0,)]


def test_a_stream_that_is_told_to_stop_ends_without_a_traceback(db, monkeypatch):
    class Dies(SQLiteWriter):
        def _apply_all(self, batch):
            if streaming.is_set():
                raise pipeloom.WriterFailed("x.db", "broken", "mend it")
            super()._apply_all(batch)

    def work(task, ctx):
        ctx.execute("INSERT INTO users VALUES ('a', 'b')")
        streaming.set()
        ctx.put(MsgTaskProgress(ctx.task_id, 1, 2))
        ctx.sleep(WAIT)

    streaming, escaped = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", escaped.append)
    with pytest.raises(pipeloom.WriterFailed, match="broken"):
        run([1], db, work, schema=USERS, atomic=False, writer=Dies)
    assert not escaped


def test_rows_of_differing_lengths_are_an_error_and_not_shifted(db):
    def work(task, ctx):
        ctx.executemany("INSERT INTO users VALUES (?, ?)", [("a",), ("b", "x", "c")])

    result = run(["t"], db, work, schema=USERS, check=False)
    assert "Incorrect number of bindings" in result.failures[0].message
    assert rows(db, "SELECT * FROM users") == []


def test_with_atomic_false_rows_are_stored_as_they_come(db):
    def work(task, ctx):
        ctx.executemany("INSERT INTO users VALUES (?, ?)", ((f"{task}-{i}", i) for i in range(2_500)))
        if task == "bad":
            raise RuntimeError("late")

    result = run(["bad", "good"], db, work, schema=USERS, atomic=False, check=False)
    assert (result.done, result.error) == (1, 1)
    counts = dict(rows(db, "SELECT substr(key, 1, 3), count(*) FROM users GROUP BY 1"))
    assert counts == {"goo": 2_500, "bad": 2_500}


def test_with_atomic_false_a_bad_row_ends_the_task_and_tells_its_worker(db):
    told = []

    def work(task, ctx):
        try:
            while True:
                ctx.executemany("INSERT INTO users VALUES (?, ?)", [("same", 1)] * 1_000)
                ctx.sleep(0.01)
        except pipeloom.TaskCancelled as stop:
            told.append(str(stop))
            raise

    result = run(["a"], db, work, schema=USERS, atomic=False, check=False)
    assert result.error == 1 and "UNIQUE constraint failed" in result.failures[0].message
    assert told == ["refused: IntegrityError: UNIQUE constraint failed: users.key"]


def test_many_rows_of_many_shapes_arrive_whole(db):
    def work(task, ctx):
        ctx.executemany(
            "INSERT OR IGNORE INTO users VALUES (?, ?)", ((str(i % 5000), i) for i in range(10_000))
        )
        ctx.executemany("INSERT INTO wide VALUES (?,?,?)", [(i, None, b"x") for i in range(1000)])
        ctx.executemany("DELETE FROM wide WHERE a = ?", [(i,) for i in range(500)])

    run(["t"], db, work, schema=USERS + "; CREATE TABLE wide(a, b, c)")
    assert rows(db, "SELECT count(*), sum(key = name) FROM users") == [(5000, 5000)]
    assert rows(db, "SELECT count(*), min(a), max(a) FROM wide") == [(500, 500, 999)]


def test_a_worker_reads_what_is_committed_and_can_change_nothing(db):
    def work(task, ctx):
        with ctx.connect() as conn:
            assert conn.execute("SELECT count(*) FROM users").fetchone() == (0,)
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                conn.execute("INSERT INTO users VALUES (1, 2)")

    odd = db.parent / "a ?#%41é.db"
    run(["t"], odd, work, schema=USERS)
    assert sorted(path.name for path in db.parent.iterdir()) == [odd.name, odd.name + "-lock"]


def test_track_passes_items_on_and_says_how_far_they_are(db):
    display = Recorder()
    run(["t"], db, lambda t, ctx: [*ctx.track("abc")] == [*"abc"] or 1 / 0, progress=display)
    assert MsgTaskProgress(1, 3, 3) in display.told
    run(["t"], db, lambda t, ctx: [*ctx.track(iter("abc"))] == [*"abc"] or 1 / 0)


def test_the_result_is_text_as_it_is_and_anything_else_as_json(db):
    values = ["text", {"a": [1, None]}, None, 7, Path("x")]
    run(range(5), db, lambda t, ctx: values[t])
    assert rows(db, "SELECT result FROM task_runs ORDER BY id") == [
        ("text",), ('{"a": [1, null]}',), (None,), ("7",), ('"x"',),
    ]  # fmt: skip


# ---- Engine --------------------------------------------------------------------------------------------


def original_worker(task, q):
    q.put(MsgTaskStarted(task.task_id, task.name, "2026-01-01T00:00:00+00:00"))
    try:
        for step in range(1, task.steps + 1):
            q.put(MsgTaskProgress(task.task_id, step, task.steps, f"step {step}"))
        if task.name == "bad":
            raise ValueError("no good")
        q.put(MsgTaskFinished(task.task_id, "done", "2026-01-01T00:00:01+00:00", result="ok"))
    except Exception as e:
        q.put(MsgTaskFinished(task.task_id, "error", "2026-01-01T00:00:02+00:00", message=str(e)))


@pytest.mark.parametrize("order", ["tasks first", "database first", "keywords"])
def test_a_program_written_for_the_original_runs_unchanged(db, order):
    tasks = [Task(i, "bad" if i == 2 else f"etl-{i}", steps=3) for i in (0, 1, 2)]
    options = {"workers": 4, "wal": True, "store_task_status": True, "worker_fn": original_worker}
    if order == "tasks first":
        result = run_pipeline(tasks, db, **options)
    elif order == "database first":
        result = run_pipeline(db, tasks, **options)
    else:
        result = run_pipeline(db_path=db, tasks=tasks, **options)
    assert (result.done, result.error, result.failures[0].message) == (2, 1, "no good")
    assert rows(
        db, "SELECT id, name, status, progress, message, started_at, finished_at, result FROM task_runs"
    ) == [
        (0, "etl-0", "done", 1.0, "", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01+00:00", "ok"),
        (1, "etl-1", "done", 1.0, "", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01+00:00", "ok"),
        (2, "bad", "error", 1.0, "no good", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:02+00:00", None),
    ]


def test_any_object_is_a_task(db):
    class Odd:
        name = "odd"

    run([{"task_id": 9, "name": "given"}, {"x": 1}, Odd(), "text", Path("a") / "b", 3.5, (1, 2)], db, nothing)
    assert [row[:2] for row in rows(db)] == [
        (9, "given"), (10, "task-2"), (11, "odd"), (12, "text"), (13, str(Path("a") / "b")), (14, "3.5"), (15, "task-7"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("boom"),
        SystemExit(7),
        KeyboardInterrupt(),
        MemoryError(),
        BaseException("base"),
        RecursionError(),
    ],
)
def test_whatever_a_worker_raises_ends_its_task_only(db, error):
    def work(task, q):
        if task == "bad":
            raise error

    with pytest.raises(
        pipeloom.PipelineError, match="1 of 3 tasks failed: 'bad': " + type(error).__name__
    ) as caught:
        run(["a", "bad", "c"], db, work)
    assert caught.value.result.done == 2 and caught.value.__cause__ is error
    assert [row[2] for row in rows(db)] == ["done", "error", "done"]
    assert type(error).__name__ in rows(db, "SELECT traceback FROM task_runs WHERE id = 2")[0][0]


@pytest.mark.parametrize(
    "error", [SyntaxError("bad", ("f", "1", "1", "text")), SyntaxError("bad", ("f", 1, 1, 5))]
)
def test_an_exception_that_cannot_be_shown_ends_its_task(db, error):
    def work(task, ctx):
        raise error

    assert run([1, 2], db, work, check=False).error == 2


def test_a_subclass_of_a_status_message_is_one(db):
    class Mine(MsgTaskFinished):
        pass

    def work(task, ctx):
        ctx.execute("INSERT INTO users VALUES (?, 1)", (task,))
        if task == "bogus":
            with pytest.raises(pipeloom.MessageRefused, match="status 'bogus' is unknown"):
                ctx.put(Mine(ctx.task_id, task, "now"))
        else:
            ctx.put(Mine(ctx.task_id, task, "now"))

    result = run(["error", "done", "bogus"], db, work, schema=USERS, check=False)
    assert (result.done, result.error) == (2, 1)
    assert rows(db, "SELECT key FROM users ORDER BY key") == [("bogus",), ("done",)]


def test_an_exception_whose_text_raises_is_told_all_the_same(db):
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def work(task, q):
        raise Mute

    assert run([1], db, work, check=False).failures[0].message == "Mute: (its text cannot be shown)"


def test_all_failures_are_counted_and_the_first_hundred_kept(db):
    result = run(range(300), db, lambda t, q: 1 / 0, check=False)
    assert result.error == 300 and len(result.failures) == 100 and not result.ok and result.total == 300


def test_failures_have_one_cause_if_their_type_and_the_users_innermost_line_are_the_same(db):
    def work(task, q):
        if task < 150:
            json.loads(f"{{{task}")  # the innermost lines are the library's
        elif task < 200:
            q.execute("INSERT INTO users VALUES ('a', NULL)")
        elif task < 210:
            q.put(MsgTaskFinished(q.task_id, "error", "", message="no file"))
        else:
            raise type("Own", (Exception,), {"__str__": lambda _: 1 / 0})

    result = run(range(220), db, work, check=False, schema=USERS)
    line = work.__code__.co_firstlineno
    assert result.causes == {
        f"JSONDecodeError at test_pipeloom.py:{line + 2}, in work": 150,
        "IntegrityError: NOT NULL constraint failed: users.name": 50,
        "no file": 10,
        f"Own at test_pipeloom.py:{line + 8}, in work": 10,
    }
    assert {failure.cause for failure in result.failures} == set(result.causes)
    result = run(range(300), db, lambda t, q: exec(f"class E{t}(Exception): pass\nraise E{t}"), check=False)
    assert len(result.causes) == 101 and result.causes["other causes"] == 200
    assert len(result.failures) == 101


def test_fail_fast_cancels_what_has_not_started(db):
    def work(task, q):
        if task == 0:
            raise RuntimeError("first")
        started.append(task)

    started = []
    result = run(range(20_000), db, work, workers=1, fail_fast=True, check=False)
    assert result.error == 1 and result.cancelled == 20_000 - 1 - result.done > 9_000
    counts = dict(rows(db, "SELECT status, count(*) FROM task_runs GROUP BY status"))
    assert counts.pop("cancelled", 0) < result.cancelled  # what never started has no row
    assert counts == {k: v for k, v in [("done", result.done), ("error", 1)] if v}
    assert rows(db, "SELECT total FROM pipeline_runs") == [(20_000,)]


def test_tasks_are_pulled_lazily_in_the_calling_thread(db):
    pulled, ahead = [], []

    def tasks():
        for number in range(2_000):
            assert threading.current_thread() is threading.main_thread()
            pulled.append(number)
            yield number

    run(tasks(), db, lambda t, q: ahead.append(len(pulled) - t), workers=2)
    assert len(ahead) == 2_000 and ahead[0] <= 65 and max(ahead) <= 1_024  # as short as they are


def test_an_iterator_that_raises_ends_the_run_after_what_runs_has_finished(db):
    def tasks():
        yield from "ab"
        raise LookupError("no more files")

    with pytest.raises(LookupError, match="no more files"):
        run(tasks(), db, nothing)
    assert {row[2] for row in rows(db)} <= {"done", "cancelled"} and len(rows(db)) == 2
    assert rows(db, "SELECT status FROM pipeline_runs") == [("error",)]


def test_memory_does_not_grow_with_the_number_of_tasks(home):
    program = """if 1:
        import pipeloom, resource, sys
        n = int(sys.argv[1])
        pipeloom.run_pipeline(iter(range(n)), f"{n}.db", worker_fn=lambda t, q: None, progress="none", workers=4)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    peaks = {}
    at_once(
        lambda n: peaks.update({n: int(python("-c", program, n, cwd=home, code=0).stdout)}),
        [(1_000,), (40_000,)],
    )
    assert rows(home / "40000.db", "SELECT count(*) FROM task_runs WHERE status = 'done'") == [(40_000,)]
    assert peaks[40_000] < peaks[1_000] + 10 * 1024  # KiB


@pytest.mark.parametrize(
    "arguments, options, error, said",
    [
        (
            ([1], "x.db"),
            {"workers": 0, "worker_fn": nothing},
            ValueError,
            "workers=0: expected a whole number from 1",
        ),
        (([1], "x.db"), {"workers": 1.5, "worker_fn": nothing}, ValueError, "workers=1.5"),
        (([1], "x.db"), {"worker_fn": 3}, TypeError, "worker_fn=3: expected a function"),
        (([1], "x.db"), {}, TypeError, "worker_fn=None: expected a function"),
        (("x.db",), {"worker_fn": nothing}, TypeError, "expected"),
        ((3, "x.db"), {"worker_fn": nothing}, TypeError, "tasks=3: expected an iterable"),
        (([1], 3), {"worker_fn": nothing}, TypeError, "db_path=3: expected a path"),
        (
            ([1], "x.db"),
            {"worker_fn": nothing, "wrokers": 2},
            TypeError,
            "no option wrokers; it has workers, wal",
        ),
        (([1], "x.db"), {"worker_fn": nothing, "busy_timeout": -1}, ValueError, "busy_timeout=-1"),
        (([1], "x.db"), {"worker_fn": nothing, "schema": 3}, TypeError, "schema=3"),
        (
            ([Task(1, "a"), Task(1, "b")], "x.db"),
            {"worker_fn": nothing},
            ValueError,
            "task_id 1 is that of tasks",
        ),
        (([Task("x", "a")], "x.db"), {"worker_fn": nothing}, ValueError, "task_id 'x' cannot be stored"),
        (([Task(2**63, "a")], "x.db"), {"worker_fn": nothing}, ValueError, "task_id 9223372036854775808"),
    ],
)
def test_wrong_use_is_one_clear_error_and_nothing_is_written(
    tmp_path, monkeypatch, arguments, options, error, said
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(said)) as caught:
        run_pipeline(*arguments, **options)
    assert isinstance(caught.value, pipeloom.PipeloomError) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_double_id_from_a_generator_is_an_error_and_the_rest_is_stored(db):
    release = threading.Event()

    def tasks():
        yield Task(1, "a")
        yield Task(1, "b")

    def work(task, q):
        assert release.wait(WAIT)

    timer = threading.Timer(0.1, release.set)
    timer.start()
    with pytest.raises(ValueError, match="task_id 1 of task 'b' is another task's"):
        run(tasks(), db, work, workers=1)
    timer.join()
    assert len(rows(db)) == 1


def test_an_id_that_a_settled_task_has_had_is_an_error(db):
    def tasks():
        yield Task(5, "first")
        yield Task(1, "lower, and new")
        while len(done) < 2:
            threading.Event().wait(0.01)
        yield Task(5, "again")

    class Counting(pipeloom.Progress):
        def update(self, message):
            if type(message) is MsgTaskFinished:
                done.append(message.task_id)

    done = []
    with pytest.raises(ValueError, match="task_id 5 of task 'again' is another task's in this run"):
        run(tasks(), db, nothing, progress=Counting())
    assert rows(db) == [(1, "lower, and new", "done"), (5, "first", "done")]


def test_tasks_without_an_id_are_numbered_above_those_with_one_and_never_share_a_row(db):
    run(["numbered", Task(1, "a"), Task(7, "b")], db, nothing)
    assert rows(db) == [(1, "a", "done"), (7, "b", "done"), (8, "numbered", "done")]
    with pytest.raises(ValueError, match="task_id 8 of task 'c' is another task's in this run"):
        run(["numbered", Task(8, "c")], db, nothing)
    run(["new", Task(9, "d")], db, nothing)
    assert rows(db)[3:] == [(9, "d", "done"), (10, "new", "done")]


def test_any_iterable_is_pulled(db):
    from collections import deque

    for number, tasks in enumerate(
        [deque("ab"), {"a", "b"}, {"a": 1, "b": 2}, (c for c in "ab"), ("a", "b")]
    ):
        assert run(tasks, db.parent / f"{number}.db", nothing).done == 2


def test_what_a_worker_said_of_other_ids_is_not_left_running(db):
    def work(task, ctx):
        ctx.put(MsgTaskStarted(70, "its own", "now"))
        ctx.put(MsgTaskProgress(77, 1, 2))

    run(["a"], db, work)
    assert rows(db) == [(1, "a", "done"), (70, "its own", "cancelled"), (77, "task-77", "cancelled")]


def test_runs_follow_each_other_nest_and_work_in_any_thread(tmp_path):
    def work(task, q):
        run([f"{task}-{i}" for i in range(3)], tmp_path / f"{task}.db", nothing)

    thread = threading.Thread(target=lambda: run(["x", "y"], tmp_path / "outer.db", work, workers=2))
    thread.start()
    thread.join(WAIT)
    run(["x", "y"], tmp_path / "outer.db", nothing)
    assert rows(tmp_path / "outer.db", "SELECT status, done FROM pipeline_runs") == [("done", 2)] * 2
    assert len(rows(tmp_path / "x.db")) == len(rows(tmp_path / "y.db")) == 3


def test_threads_that_a_worker_has_started_may_send_until_its_end_and_are_told_so_after_it(db):
    def late(ctx):
        assert over.wait(WAIT)
        ctx.put(MsgTaskProgress(ctx.task_id, 1, 2))  # which nobody needs any more
        ctx.put(MsgTaskFinished(ctx.task_id, "error", "now"))
        with pytest.raises(pipeloom.MessageRefused, match="came too late to be stored"):
            ctx.execute("INSERT INTO users VALUES ('late', '')")
        with ctx.connect() as conn:
            told.append(conn.execute("SELECT count(*) FROM users").fetchone())

    def work(task, ctx):
        helper = threading.Thread(target=ctx.execute, args=("INSERT INTO users VALUES (?, '')", (str(task),)))
        helper.start()
        helper.join(WAIT)
        threads.append(threading.Thread(target=late, args=(ctx,)))
        threads[-1].start()

    over, told, threads = threading.Event(), [], []
    assert run([1, 2], db, work, schema=USERS).done == 2
    over.set()
    for thread in threads:
        thread.join(WAIT)
    assert told == [(2,)] * 2 and [row[2] for row in rows(db)] == ["done"] * 2


FORKS = """
import os, sys, pipeloom
def end(): pass
def raises(): raise ValueError("in the child")
def exits(): sys.exit(7)
def work(how, ctx):
    child = os.fork()
    if child == 0:
        return {"ends": end, "raises": raises, "exits": exits}[how]()
    return os.waitpid(child, 0)[1] >> 8
def main():
    pipeloom.run_pipeline(["ends", "raises", "exits"], "f.db", worker_fn=work, workers=2)
if os.fork() == 0:  # a child of a process without a run is like any other
    main()
    os._exit(0)
assert os.wait()[1] == 0
main()
"""


@needs_posix
def test_a_forked_child_is_no_worker(home):
    (home / "f.py").write_text(FORKS)
    done = python("-W", "ignore", "f.py", cwd=home, code=0)
    assert rows(home / "f.db", "SELECT name, status, result FROM task_runs ORDER BY id") == [
        ("ends", "done", "0"), ("raises", "done", "1"), ("exits", "done", "7"),
    ]  # fmt: skip
    assert done.stderr.count("ValueError: in the child") == 2


def test_it_works_in_an_interactive_session(home):
    typed = """import pipeloom
def work(task, ctx): return task

pipeloom.run_pipeline([1, 2], "i.db", worker_fn=work).done
pipe = pipeloom.Pipeline("i.db")
@pipe.task(each=["a"], retries=1)
def again(ctx, item): 1 / (ctx.attempt - 1)

pipe.run(retry_delay=0).done
"""
    done = subprocess.run(
        [sys.executable, "-i", "-q"], cwd=str(home), input=typed, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "2\n1\n" and "Error" not in done.stderr


def test_async_functions_are_run(db):
    async def work(task, ctx):
        import asyncio

        await asyncio.sleep(0)
        return f"async {task}"

    run(["a"], db, work)
    assert rows(db, "SELECT result FROM task_runs") == [("async a",)]


def test_a_second_run_on_the_same_database_is_refused_and_names_the_first(home):
    def work(task, ctx):
        with ctx.connect() as conn:
            while not conn.execute("SELECT 1 FROM task_runs WHERE status = 'running'").fetchone():
                ctx.sleep(0.01)
        with pytest.raises(pipeloom.RunInProgress, match=f"is in use by process {os.getpid()} on .*, since 20"):
            run(["other"], home / "wal_demo.db", nothing)
        said.append(python("-m", "pipeloom", "demo", cwd=home, code=75).stderr)
        said.append(python("-m", "pipeloom", "status", "--db", "wal_demo.db", cwd=home, code=0).stdout)

    said = []
    run(["first"], home / "wal_demo.db", work)
    assert f"process {os.getpid()}" in said[0] and said[0].count("\n") == 1
    assert "1 running" in said[1]
    run(["second"], home / "wal_demo.db", nothing)


@needs_posix
def test_the_lock_of_a_run_ends_with_its_process_and_no_forked_child_has_it(home):
    program = """if 1:
        import os, signal, time, pipeloom
        def work(task, ctx):
            if os.fork() == 0:
                os.dup2(os.open("/dev/null", os.O_RDWR), 1)
                time.sleep(60)
                os._exit(0)
            print("ready", flush=True)
            time.sleep(60)
        pipeloom.run_pipeline(["t"], "f.db", worker_fn=work, progress="none")"""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=str(home),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(pipeloom.RunInProgress, match=f"is in use by process {process.pid}"):
            run(["next"], home / "f.db", nothing)
        process.kill()
        process.wait(WAIT)
        run(["next"], home / "f.db", nothing)  # while the child lives on
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    assert [row[1:] for row in rows(home / "f.db")] == [("t", "cancelled"), ("next", "done")]


def test_a_foreign_writer_is_waited_for_and_is_no_run(db):
    run(["a"], db, nothing)
    conn = sqlite3.connect(str(db), isolation_level=None)
    conn.execute("CREATE TABLE own(x)")
    run(["b"], db, lambda task, ctx: conn_in(db, "INSERT INTO own VALUES (1)"))
    assert conn.execute("SELECT count(*) FROM own").fetchone() == (1,)
    conn.close()


def conn_in(path, sql):
    conn = sqlite3.connect(str(path))
    conn.execute(sql)
    conn.commit()
    conn.close()


def test_a_run_where_all_is_well_says_nothing(db, caplog):
    assert run(range(3), db, lambda task, ctx: ctx.progress(1, 2)).done == 3
    assert caplog.messages == []


def test_the_number_of_tasks_is_stored_as_soon_as_it_is_known(db):
    def total(ctx, item=None):
        with ctx.connect() as conn:
            ctx.sleep(0.05)
            return conn.execute("SELECT total FROM pipeline_runs").fetchone()[0]

    pipe = pipeloom.Pipeline(db, progress="none", workers=1)
    pipe.task(total, name="first")
    pipe.task(total, name="some", each=lambda: iter("ab"), after="first")
    pipe.task(total, name="last", after="some")
    pipe.run()
    assert rows(db, "SELECT name, result FROM task_runs WHERE name IN ('first', 'last')") == [("first", None), ("last", "4")]
    assert rows(db, "SELECT total FROM pipeline_runs") == [(4,)]


def test_an_empty_run_is_done(db):
    assert run([], db, nothing).ok
    assert run(iter(()), db, nothing).ok


def test_without_task_status_there_are_only_the_users_tables(db):
    result = run(
        ["a"],
        db,
        lambda t, q: q.put(User(t, "x")),
        schema=USERS,
        handlers={User: insert_user},
        store_task_status=False,
    )
    assert result.done == 1
    assert rows(db, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("users",)]


def test_each_signal_is_more_urgent_and_so_is_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pipeloom.time, "monotonic", lambda: now[0])
    for number, signals, moments in (
        (signal.SIGINT, 1, [(0, 1), (1000, 1)]),
        (signal.SIGTERM, 1, [(0, 1), (4.9, 1), (5.1, 2), (7.2, 3)]),
        (signal.SIGINT, 2, [(0, 2), (1.9, 2), (2.1, 3)]),
        (signal.SIGINT, 3, [(0, 3)]),
    ):
        now[0], stopped = 0.0, []
        these = pipeloom._Signals(stopped.append)
        assert these.urgency() == 0
        try:
            for _ in range(signals):
                these._on_signal(number, None)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the third makes it the system's
        assert stopped == ["interrupted"] * signals
        for moment, urgency in moments:
            now[0] = moment
            assert these.urgency() == urgency, (number, signals, moment)


STUBBORN = """
import os, signal, sys, time, pipeloom
def tasks():
    yield 1
    print("ready", flush=True)
    while True:
        try: time.sleep(60)
        except BaseException: print("swallowed", flush=True)
pipeloom.run_pipeline(tasks(), "s.db", worker_fn=lambda t, c: None, progress="none")
"""


@needs_posix
def test_an_iterator_that_swallows_every_signal_is_ended_by_the_fourth(home):
    (home / "s.py").write_text(STUBBORN)
    process = subprocess.Popen([sys.executable, "s.py"], cwd=str(home), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    for _ in range(3):
        threading.Event().wait(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"swallowed\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == -signal.SIGINT
    process.stdout.close()


SLEEPER = """
import sys, time, threading, pipeloom
def tasks():
    yield from range(6)
    if sys.argv[1] == "blocks":
        print("ready", flush=True)
        time.sleep(60)
def work(task, ctx):
    ctx.execute("INSERT INTO t VALUES (?)", (task,))
    if task == 1 and sys.argv[1] != "blocks":
        print("ready", flush=True)
    if sys.argv[1] == "hangs":
        time.sleep(60)
    ctx.sleep(0.4)
try:
    pipeloom.run_pipeline(tasks(), "s.db", workers=2, worker_fn=work, schema="CREATE TABLE t(x)", progress="none")
finally:
    print("restored", flush=True)
"""


@needs_posix
def test_a_signal_lets_what_runs_finish_and_a_second_one_leaves_at_once(homes):
    def one(number, times, mode):
        home = homes()
        (home / "s.py").write_text(SLEEPER)
        process = subprocess.Popen(
            [sys.executable, "s.py", mode], cwd=str(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(
            0.2
        )  # in Python, a signal just before a system call that blocks goes unnoticed
        process.send_signal(number)
        for _ in range(times - 1):
            assert "nothing new starts" in process.stderr.readline()
            process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == -number, errors
        stored = {row[0]: row[2] for row in rows(home / "s.db")}
        assert set(stored.values()) <= {"done", "cancelled"}
        done = sorted(int(name) for _, name, status in rows(home / "s.db") if status == "done")
        assert [x for (x,) in rows(home / "s.db", "SELECT x FROM t ORDER BY x")] == done
        assert mode != "hangs" or not done
        assert rows(home / "s.db", "SELECT status FROM pipeline_runs") == [("cancelled",)]

    at_once(
        one,
        [
            (signal.SIGINT, 1, "finishes"),
            (signal.SIGINT, 1, "blocks"),
            (signal.SIGINT, 2, "hangs"),
            (signal.SIGTERM, 1, "finishes"),
            (signal.SIGHUP, 2, "hangs"),
        ],
    )


@needs_posix
def test_a_locked_database_keeps_no_signal_from_ending_the_run(homes):
    """The first lets it wait for the lock; the third does not wait."""

    def one(signals):
        home = homes()
        (home / "s.py").write_text(SLEEPER)
        process = subprocess.Popen(
            [sys.executable, "s.py", "finishes"], cwd=str(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        holder = hold(home / "s.db", 0.8 if signals == 1 else 60)
        try:
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                threading.Event().wait(0.3)
            _, errors = process.communicate(timeout=30)
        finally:
            end(holder)
        assert process.returncode == -signal.SIGINT, errors
        assert signals == 1 or "database is locked, still after" in errors
        done = sorted(int(name) for _, name, status in rows(home / "s.db") if status == "done")
        assert [x for (x,) in rows(home / "s.db", "SELECT x FROM t ORDER BY x")] == done

    at_once(one, [(1,), (3,)])


@needs_posix
def test_under_nohup_the_run_outlives_its_terminal(home):
    (home / "s.py").write_text(SLEEPER.replace("0.4", "0.1"))
    process = subprocess.Popen(
        ["nohup", sys.executable, "s.py", "finishes"], cwd=str(home), stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=WAIT)[0] == b"restored\n" and process.returncode == 0
    assert [row[2] for row in rows(home / "s.db")] == ["done"] * 6


@needs_posix
def test_ctrl_c_is_a_keyboard_interrupt_and_the_handlers_are_back(db):
    import _thread

    def work(task, q):
        if task == 3:
            os.kill(os.getpid(), signal.SIGINT)
        q.sleep(0.01)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(range(1000), db, work, workers=2)
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.result.done >= 3 and caught.value.result.cancelled > 900
    assert _thread and {row[2] for row in rows(db)} == {"done", "cancelled"}


def test_what_a_killed_run_left_behind_is_marked_by_the_next(home):
    program = """if 1:
        import os, pipeloom
        def work(task, ctx):
            while task == 1:
                with ctx.connect() as conn:
                    if conn.execute("SELECT count(*) FROM task_runs WHERE status = 'done'").fetchone()[0] == 1:
                        os.kill(os.getpid(), 9)
        pipeloom.run_pipeline(range(3), "k.db", workers=1, worker_fn=work, progress="none")"""
    python("-c", program, cwd=home)
    assert [row[2] for row in rows(home / "k.db")] == ["done", "running"]
    run([Task(4, "next")], home / "k.db", nothing)
    assert [row[2] for row in rows(home / "k.db")] == ["done", "cancelled", "done"]
    assert rows(home / "k.db", "SELECT message FROM task_runs WHERE id = 2") == [("interrupted",)]
    assert rows(home / "k.db", "SELECT status FROM pipeline_runs ORDER BY id") == [("cancelled",), ("done",)]


def test_resume_skips_what_is_done_by_the_id_that_was_given_or_else_by_name(db):
    def work(task, ctx):
        ran.append(ctx.name)
        if ctx.name in failing:
            raise RuntimeError("no")

    tasks = [Task(7, "x"), "a", "b", Path("c"), {"k": 1}]
    ran, failing = [], {"b"}
    assert run(tasks, db, work, check=False, workers=1).done == 4
    ran, failing = [], set()
    result = run([Task(7, "another name"), *tasks[1:], "new"], db, work, resume=True)
    assert ran == ["b", "new"] or ran == ["new", "b"]
    assert (result.done, result.skipped, result.total, result.ok) == (2, 4, 6, True)
    assert [row[2] for row in rows(db)] == ["done"] * 6
    assert run(iter(tasks), db, work, resume=True).skipped == 5
    assert rows(db, "SELECT done, skipped FROM pipeline_runs ORDER BY id") == [(4, 0), (2, 4), (0, 5)]


@pytest.mark.parametrize("kind", [list, iter])
def test_names_keep_their_ids_across_runs_and_files_that_are_gone_are_left_alone(db, kind):
    run(kind(["a", "b", "c", "b"]), db, nothing)
    assert rows(db) == [(1, "a", "done"), (2, "b", "done"), (3, "c", "done"), (4, "b", "done")]
    order = []
    run(kind(["b", "new", "c", "b", "b"]), db, lambda t, c: order.append((c.task_id, c.name)), workers=1)
    assert order == [(2, "b"), (5, "new"), (3, "c"), (4, "b"), (6, "b")]
    assert rows(db, "SELECT id, run_id FROM task_runs") == [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 2)]
    assert run(kind(["b", "b", "b", "b", "zoo"]), db, nothing, resume=True).done == 2
    assert rows(db)[-2:] == [(7, "b", "done"), (8, "zoo", "done")]


def test_resume_without_a_record_of_what_is_done_is_a_clear_error(db):
    with pytest.raises(
        ValueError, match="resume=True needs to know what is done, and store_task_status=False"
    ):
        run([1], db, nothing, resume=True, store_task_status=False)
    assert not db.exists()


def test_a_database_of_the_original_is_resumed_by_its_ids(db):
    conn = sqlite3.connect(str(db))
    conn.execute(
        "CREATE TABLE task_runs(id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL,"
        " progress REAL NOT NULL DEFAULT 0.0, message TEXT, started_at TEXT, finished_at TEXT, result TEXT)"
    )
    conn.execute("INSERT INTO task_runs(id, name, status) VALUES (1, 'a', 'running'), (2, 'b', 'done')")
    conn.commit()
    conn.close()
    assert run([Task(1, "a"), Task(2, "b")], db, nothing, resume=True).skipped == 1
    assert rows(db) == [(1, "a", "done"), (2, "b", "done")]


class Clock:
    """The clock of retries and deadlines, which stands still until a task moves it."""

    now = 0.0

    def __call__(self):
        return self.now

    def advance(self, ctx, seconds):
        self.now += seconds
        ctx.run.crew.timer.look()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pipeloom._Timer, "clock", clock)
    return clock


def test_an_attempt_that_failed_leaves_nothing_and_the_next_starts_clean(db):
    def work(task, ctx):
        seen.append((ctx.attempt, ctx.cancelled))
        ctx.execute("INSERT INTO t VALUES (?)", (ctx.attempt,))
        ctx.progress(1, 2)
        if ctx.attempt < 3:
            raise RuntimeError("not yet")

    seen, display = [], Recorder()
    run(["a"], db, work, retries=5, retry_delay=0, schema="CREATE TABLE t(x)", progress=display)
    assert seen == [(1, False), (2, False), (3, False)]
    assert rows(db, "SELECT x FROM t") == [(3,)]
    assert rows(db, "SELECT status, attempts, message, traceback FROM task_runs") == [("done", 3, "", None)]
    finishes = [(m.status, m.message) for m in display.messages() if type(m) is MsgTaskFinished]
    assert finishes == [
        ("queued", "attempt 1 failed: RuntimeError: not yet"),
        ("queued", "attempt 2 failed: RuntimeError: not yet"),
        ("done", ""),
    ]


@pytest.mark.parametrize("how", ["raises", "reports", "constraint", "constraint, streamed"])
def test_every_kind_of_failure_is_tried_again_and_the_last_one_counts(db, how):
    def work(task, ctx):
        attempts.append(ctx.attempt)
        if how == "raises":
            raise RuntimeError("no")
        if how == "reports":
            return ctx.put(MsgTaskFinished(ctx.task_id, "error", "now", message="RuntimeError: no"))
        ctx.put(MsgExecute("INSERT INTO t VALUES (NULL)"))
        ctx.sleep(WAIT if "streamed" in how else 0)

    attempts = []
    options = {"schema": "CREATE TABLE t(x NOT NULL)", "atomic": "streamed" not in how, "check": False}
    result = run(["a"], db, work, retries=2, retry_delay=0, **options)
    assert attempts == [1, 2, 3] and (result.error, len(result.failures)) == (1, 1)
    found = rows(db, "SELECT status, attempts, message FROM task_runs")
    assert found[0][:2] == ("error", 3) and found[0][2].startswith(
        ("RuntimeError: no", "IntegrityError: NOT NULL")
    )


def test_a_task_that_waits_for_its_retry_holds_no_worker(db, clock):
    def work(task, ctx):
        order.append((task, ctx.attempt))
        if task == "fails" and ctx.attempt == 1:
            raise RuntimeError("once")
        if task == "last":
            while not len(ctx.run.crew.timer):  # until that failure is committed
                ctx.sleep(0.01)
            with ctx.connect() as conn:
                found.extend(
                    conn.execute("SELECT status, attempts, message FROM task_runs WHERE name = 'fails'")
                )
            clock.advance(ctx, 10_000)

    order, found = [], []
    run(["fails", "b", "last"], db, work, workers=1, retries=1, retry_delay=1000)
    assert order == [("fails", 1), ("b", 1), ("last", 1), ("fails", 2)]
    assert found == [("queued", 1, "attempt 1 failed: RuntimeError: once")]


def test_the_delay_before_a_retry_doubles_up_to_an_hour_and_is_a_little_random():
    for first, attempt, low in ((2, 1, 2), (2, 2, 4), (2, 3, 8), (2, 5000, 3600), (7200, 1, 7200), (7200, 2, 7200)):
        assert low <= pipeloom._delay(first, attempt) <= low * 1.25


def test_a_run_that_stops_cancels_what_waits_for_its_retry(db):
    def work(task, ctx):
        raise RuntimeError(f"attempt {ctx.attempt} of {task}")

    pipe = pipeloom.Pipeline(db, progress="none", workers=1, fail_fast=True, check=False)
    pipe.task(lambda ctx: work("waits", ctx), name="waits", retries=1, retry_delay=1000)
    pipe.task(lambda ctx: work("fails", ctx), name="fails")
    pipe.task(lambda ctx: None, name="never", after="fails")
    result = pipe.run()
    assert (result.error, result.cancelled) == (1, 2)
    reason = "not started: fail_fast, and 'fails' failed"
    told = f"{reason}; attempt 1 failed: RuntimeError: attempt 1 of waits"
    found = rows(db, "SELECT name, status, message, attempts FROM task_runs ORDER BY id")
    assert found == [
        ("waits", "cancelled", told, 1),
        ("fails", "error", "RuntimeError: attempt 1 of fails", 1),
    ]


@needs_posix
def test_ctrl_c_cancels_what_waits_for_its_retry(db, clock):
    def work(task, ctx):
        if task == "signals":
            while not len(ctx.run.crew.timer):
                ctx.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            return
        raise RuntimeError("no")

    with pytest.raises(KeyboardInterrupt):
        run(["waits", "signals"], db, work, workers=1, retries=1)
    found = rows(
        db,
        "SELECT name, status, message, attempts, started_at > '2', traceback > '' FROM task_runs ORDER BY id",
    )
    assert found == [
        ("waits", "cancelled", "interrupted; attempt 1 failed: RuntimeError: no", 1, 1, 1),
        ("signals", "done", "", 1, 1, None),
    ]


def test_at_its_deadline_a_task_is_an_error_and_a_fresh_worker_takes_its_place(db, clock):
    def work(task, ctx):
        ctx.execute("INSERT INTO t VALUES (?)", (task,))
        if task != "hangs":
            return
        clock.advance(ctx, 61)
        assert over.wait(WAIT)
        for send in (
            lambda: ctx.execute("INSERT INTO t VALUES ('late')"),
            lambda: ctx.progress(1, 2),
            ctx.check,
        ):
            with pytest.raises(pipeloom.TaskCancelled, match="timed out after 60 s"):
                send()
        told.append(ctx.cancelled)
        ctx.put(MsgTaskFinished(ctx.task_id, "done", "now"))

    over, told = threading.Event(), []
    result = run(
        ["hangs", "b", "c"], db, work, workers=1, timeout=60, check=False, schema="CREATE TABLE t(x)"
    )
    assert (result.done, result.error) == (2, 1)
    assert result.failures[0].message == "timed out after 60 s" and "in work" in result.failures[0].traceback
    over.set()
    while not told:
        threading.Event().wait(0.01)
    assert [row[1:] for row in rows(db)] == [("hangs", "error"), ("b", "done"), ("c", "done")]
    assert rows(db, "SELECT x FROM t ORDER BY x") == [("b",), ("c",)]


@pytest.mark.parametrize("how", ["finished", "refused"])
def test_a_task_that_has_ended_and_goes_on_past_its_deadline_holds_no_worker(db, clock, how, caplog):
    def work(task, ctx):
        if task == "b":
            return
        if how == "finished":
            ctx.put(MsgTaskFinished(ctx.task_id, "done", "now"))
        else:
            ctx.put(MsgExecute("INSERT INTO nowhere VALUES (1)"))
            while not ctx.closed:
                threading.Event().wait(0.01)
        clock.advance(ctx, 61)
        over.wait(WAIT)

    over = threading.Event()
    run(["a", "b"], db, work, workers=1, timeout=60, atomic=False, check=False)
    over.set()
    assert [row[2] for row in rows(db)] == ["done" if how == "finished" else "error", "done"]
    assert "task 'a' has ended, but its function goes on: it timed out after 60 s" in caplog.text


def test_a_deadline_whose_place_cannot_be_read_is_one_all_the_same(db, clock):
    class Loader:
        def get_source(self, name):
            raise ValueError("no source")

    code = compile("def hang(clock, ctx):\n clock.advance(ctx, 61)\n ctx.sleep(20)", "<made>.py", "exec")
    made = {"__name__": "made", "__loader__": Loader()}
    exec(code, made)
    result = run(
        ["a", "b"], db, lambda task, ctx: made["hang"](clock, ctx), workers=1, timeout=60, check=False
    )
    assert result.error == 2 and "no source" in result.failures[0].traceback


def test_a_timer_that_fails_ends_the_run(db, clock, monkeypatch):
    monkeypatch.setattr(pipeloom._Crew, "_time_out", lambda self, ctx: 1 / 0)
    over = threading.Event()

    def work(task, ctx):
        clock.advance(ctx, 61)
        over.wait(WAIT)

    threading.Timer(0.5, over.set).start()
    with pytest.raises(ZeroDivisionError):
        run(["a"], db, work, timeout=60)


def test_a_coroutine_is_cancelled_at_its_deadline_and_its_place_is_stored(db, clock):
    import asyncio

    async def inner(ctx):
        asyncio.get_running_loop().call_later(0.01, clock.advance, ctx, 61)  # while it waits below
        try:
            await asyncio.sleep(WAIT)
        finally:
            ended.set()

    async def work(task, ctx):
        await inner(ctx)

    ended = threading.Event()
    result = run(["a"], db, work, timeout=60, check=False)
    assert ended.wait(WAIT) and result.failures[0].message == "timed out after 60 s"


def test_what_comes_after_the_deadline_of_a_stream_is_told_so(db, clock):
    def work(task, ctx):
        def late():
            for number in range(3_000):
                if number == 1_500:
                    clock.advance(ctx, 61)
                    while not ctx.cancelled:
                        threading.Event().wait(0.01)
                yield number, None

        try:
            ctx.executemany("INSERT INTO users VALUES (?, ?)", late())
        except BaseException as error:
            told.append(type(error))
            raise

    told = []
    run(["a"], db, work, schema=USERS.replace("NOT NULL", ""), atomic=False, timeout=60, check=False)
    while not told:
        threading.Event().wait(0.01)
    assert told == [pipeloom.TaskCancelled]
    assert rows(db, "SELECT count(*) FROM users") == [(1_000,)]


def test_a_worker_that_was_too_late_is_an_exception_of_the_run(db, clock):
    def work(task, q):
        q.put(MsgTaskStarted(q.task_id, "a", "now"))
        clock.advance(q, 61)
        q.sleep(WAIT)

    with pytest.raises(pipeloom.PipelineError, match="timed out after 0.5 s") as error:
        run(["a"], db, work, timeout=0.5)
    assert isinstance(error.value.__cause__, TimeoutError)


def test_an_attempt_that_is_too_late_is_tried_again(db, clock):
    def work(task, ctx):
        if ctx.attempt == 1:
            clock.advance(ctx, 61)
            ctx.sleep(WAIT)
        return ctx.attempt

    run(["a"], db, work, timeout=60, retries=1, retry_delay=0)
    assert rows(db, "SELECT status, attempts, result FROM task_runs") == [("done", 2, "2")]


def test_a_task_that_hangs_does_not_hold_the_process_at_its_end(home):
    program = """if 1:
        import time, pipeloom
        def work(task, ctx): time.sleep(3600)
        pipeloom.run_pipeline(["a", "b", "c"], "h.db", worker_fn=work, timeout=0.05, progress="none")"""
    done = python("-c", program, cwd=home, code=1)
    assert "PipelineError: 3 of 3 tasks failed: 'a': timed out after 0.05 s (and 2 more)" in done.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        ({"retries": -1}, "retries=-1: expected a whole number from 0"),
        ({"retries": 1.5}, "retries=1.5: expected a whole number from 0"),
        ({"retry_delay": -1}, "retry_delay=-1: expected a number of seconds from 0"),
        ({"retry_delay": float("nan")}, "retry_delay=nan: expected"),
        ({"timeout": 0}, "timeout=0: expected a number of seconds above 0, or None"),
        ({"timeout": float("nan")}, "timeout=nan: expected"),
        ({"timeout": "60"}, "timeout='60': expected"),
        ({"timeout": 10**400}, "expected a number of seconds above 0"),
        ({"retry_delay": 10**400}, "expected a number of seconds from 0 to 1e9"),
    ],
)
def test_an_option_of_no_use_is_one_clear_error(db, options, said):
    for call in (
        lambda: run([1], db, nothing, **options),
        lambda: pipeloom.Pipeline(db, **options),
        lambda: pipeloom.Pipeline(db).task(lambda ctx: None, **options),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()
    assert not db.exists()


# ---- Pipeline ------------------------------------------------------------------------------------------


def test_declared_functions_stay_callable_and_their_values_are_the_results(db):
    pipe = pipeloom.Pipeline(db, progress="none")

    @pipe.task
    def text(ctx):
        return "as it is"

    @pipe.task(each=["a", 3, Path("x") / "y", ("t", 1), {"name": "given"}, None])
    def double(ctx, item):
        return {"item": str(item)}

    @pipe.task(each=(n for n in (1, 2)), name=lambda n: f"number {n}")
    async def later(ctx, n):
        return [n, ctx.task]

    assert text(None) == "as it is" and double(None, 1) == {"item": "1"}
    assert pipe.run().done == 9
    found = dict(rows(db, "SELECT name, result FROM task_runs"))
    assert found == {
        "text": "as it is",
        "double[a]": '{"item": "a"}',
        "double[3]": '{"item": "3"}',
        f"double[{Path('x') / 'y'}]": json.dumps({"item": str(Path("x") / "y")}),
        "double[('t', 1)]": '{"item": "(\'t\', 1)"}',
        "double[given]": "{\"item\": \"{'name': 'given'}\"}",
        "double[None]": '{"item": "None"}',
        "number 1": "[1, 1]",
        "number 2": "[2, 2]",
    }


def test_an_item_whose_text_is_its_address_is_named_by_its_place(db):
    for _ in range(2):
        pipe = pipeloom.Pipeline(db, progress="none", resume=True)
        pipe.task(nothing, name="n", each=[object(), nothing, object()])
        result = pipe.run()
    assert result.skipped == 3
    assert [row[1] for row in rows(db)] == ["n[1]", "n[2]", "n[3]"]


def test_a_dependent_reads_what_those_before_it_have_committed(db):
    pipe = pipeloom.Pipeline(db, progress="none", workers=4, schema="CREATE TABLE t(x)")

    @pipe.task(each=range(50))
    def load(ctx, n):
        ctx.execute("INSERT INTO t VALUES (?)", (n,))

    @pipe.task(after=load)
    def total(ctx):
        with ctx.connect() as conn:
            return conn.execute("SELECT sum(x) FROM t").fetchone()[0]

    def read():
        opened.append(threading.current_thread() is threading.main_thread())
        return [row[0] for row in rows(db, "SELECT result FROM task_runs WHERE name = 'total'")]

    @pipe.task(after="total", each=read)
    def show(ctx, text):
        return text

    opened = []
    pipe.run()
    assert rows(db, "SELECT name, result FROM task_runs WHERE name LIKE 'show%'") == [("show[1225]", "1225")]
    assert opened == [True]


@pytest.mark.parametrize(
    "declare, said",
    [
        ([("a", "a")], "a task comes after itself: a after a"),
        ([("a", "c"), ("b", "a"), ("c", "b")], "a task comes after itself: a after c after b after a"),
        ([("a", "load")], "after='load' of task 'a': expected a task of this pipeline, which has a"),
        ([("a", nothing)], "after='nothing' of task 'a': expected a task of this pipeline"),
        ([("a", 3)], "after=3 of task 'a': expected a task"),
        ([("a", [["b"]])], "after=['b'] of task 'a': expected a task"),
        ([("a", ()), ("b", "a[1]")], "after='a[1]' of task 'b': expected a task"),
        ([("a", ()), ("a", ())], "two tasks are named 'a'; give one of them another name"),
        ([], "the pipeline has no task"),
    ],
)
def test_a_graph_that_cannot_be_is_an_error_that_shows_the_names(db, declare, said):
    pipe = pipeloom.Pipeline(db, progress="none")
    with pytest.raises(ValueError, match=re.escape(said)):
        for name, after in declare:
            pipe.task(lambda ctx: None, name=name, after=after)
        pipe.run()
    assert not db.exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"each": 3}, "each=3 of task 'a': expected an iterable, or a function that makes one"),
        ({"each": "abc"}, "each='abc' of task 'a': expected an iterable"),
        ({"name": 3}, "name=3 of task '<lambda>': expected a str, or a function of its each= item"),
        ({"name": len}, "expected a str, or a function of its each= item"),
        ({"name": ""}, "name='' of task '': expected a str"),
        ({"workers": 3}, "a task has no option workers; it has retries, retry_delay, timeout, atomic"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_an_error_at_once(db, options, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        pipeloom.Pipeline(db).task(lambda *arguments: None, **{"name": "a", **options})
    for call in (
        lambda: pipeloom.Pipeline(3),
        lambda: pipeloom.Pipeline(db, speed=1),
        lambda: pipeloom.Pipeline().task(3),
    ):
        with pytest.raises(TypeError):
            call()


def two_of(first, second):
    def declare(pipe):
        for number, (each, name) in enumerate((first, second)):
            function = (lambda ctx: None) if each is None else lambda ctx, item: None
            function.__name__ = f"t{number}"
            pipe.task(function, name=name, each=each)

    return declare


def test_a_row_that_stood_for_tasks_nobody_knew_is_gone_once_they_are_known(db):
    for fails in (True, False):
        pipe = pipeloom.Pipeline(db, progress="none", resume=True, check=False)
        pipe.task(lambda ctx: 1 / (not fails), name="before")
        pipe.task(nothing_each, name="load", each=iter("ab") if fails else ["a", "b"], after="before")
        pipe.run()
    assert sorted(row[1:] for row in rows(db)) == [
        ("before", "done"),
        ("load[a]", "done"),
        ("load[b]", "done"),
    ]


def test_an_each_that_waits_for_the_tasks_of_another_is_no_deadlock(db):
    def results():
        for _ in range(300):
            yield made.get(timeout=WAIT)

    made = queue.Queue()
    pipe = pipeloom.Pipeline(db, progress="none", workers=2)
    pipe.task(nothing_each, name="takes", each=results)
    pipe.task(lambda ctx, n: made.put(n), name="makes", each=range(300))
    assert pipe.run().done == 600


def generates(*arguments):
    yield 1


async def generates_too(*arguments):
    yield 1


@pytest.mark.parametrize(
    "function, said",
    [
        (generates, "is a generator, whose body would never run"),
        (generates_too, "is a generator, whose body would never run"),
        (lambda: None, "cannot be called with"),
        (lambda a, b, c: None, "cannot be called with"),
    ],
)
def test_a_function_that_cannot_be_a_worker_is_an_error_at_once(db, function, said):
    for call in (
        lambda: run([1], db, function),
        lambda: pipeloom.Pipeline(db).task(function),
        lambda: pipeloom.Pipeline(db).task(function, each=[1]),
    ):
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(TypeError, match="expected a message class, as in @pipe.handles"):
        pipeloom.Pipeline(db).handles(nothing)


def test_what_cannot_start_is_cancelled_with_the_reason_and_so_is_all_that_follows(db):
    def extract(ctx, n):
        if n == 1:
            raise RuntimeError("broken")

    def items():
        opened.append(1)
        return ["x", "y"]

    opened = []
    for fails in (True, False):
        pipe = pipeloom.Pipeline(db, progress="none", check=False, resume=True)
        pipe.task(extract, name="extract", each=[0, 1, 2] if fails else [0, 2])
        pipe.task(lambda ctx, item: None, name="load", each=items, after="extract")
        pipe.task(lambda ctx, item: None, name="known", each=["k"], after="extract")
        pipe.task(lambda ctx: None, name="report", after=["load", "known"])
        pipe.task(lambda ctx: None, name="free")
        result = pipe.run()
        if fails:
            assert (result.done, result.error, result.cancelled) == (3, 1, 3) and not opened
            assert dict(rows(db, "SELECT name, message FROM task_runs WHERE status = 'cancelled'")) == {
                "load": "not started: 'extract[1]' failed",
                "known": "not started: 'extract[1]' failed",
                "report": "not started: 'extract[1]' failed",
            }
    names = {row[1] for row in rows(db) if row[2] == "done"}
    assert result.ok and opened == [1] and {"load[x]", "load[y]", "known[k]", "report", "free"} < names
    assert "load" not in {row[1] for row in rows(db)}  # that stood for what nobody knew


def test_an_each_that_gives_nothing_is_done_at_once(db):
    pipe = pipeloom.Pipeline(db, progress="none")
    for number, each in enumerate(([], iter(()), lambda: [], lambda: iter(()), {}, range(0))):
        pipe.task(nothing, name=f"t{number}", each=each, after=f"t{number - 1}" if number else ())
    pipe.task(lambda ctx: None, name="last", after="t5")
    assert pipe.run().done == 1


@pytest.mark.parametrize("each", [lambda: 3, lambda: "abc", lambda: 1 / 0, iter([1, 2])])
def test_an_each_that_fails_ends_the_run_with_its_error_and_the_rest_is_stored(db, each):
    def name(item):
        if item == 2:
            raise ZeroDivisionError("two")
        return f"n{item}"

    pipe = pipeloom.Pipeline(db, progress="none")
    pipe.task(lambda ctx: None, name="first")
    pipe.task(lambda ctx, item: None, name=name, each=each, after="first")
    pipe.task(lambda ctx: None, name="last", after="<lambda>")
    with pytest.raises((TypeError, ZeroDivisionError)):
        pipe.run()
    found = {row[1]: row[2] for row in rows(db)}
    assert found.pop("n1", "done") in ("done", "cancelled") and found == {"first": "done"}
    assert rows(db, "SELECT status FROM pipeline_runs") == [("error",)]


def test_a_generator_that_blocks_holds_up_neither_followers_nor_retries_nor_deadlines(db):
    def slow():
        yield 1
        assert all(event.wait(WAIT) for event in events)
        yield 2

    def again(ctx):
        if ctx.attempt == 1:
            raise RuntimeError("once")
        events[0].set()

    events = [threading.Event() for _ in range(3)]
    pipe = pipeloom.Pipeline(db, progress="none", workers=3, check=False)
    pipe.task(lambda ctx, item: None, name="slow", each=slow)
    pipe.task(again, retries=1, retry_delay=0.01)
    pipe.task(lambda ctx: events[1].set(), name="follows", after=again)
    pipe.task(lambda ctx: ctx.sleep(WAIT), name="hangs", timeout=0.05)
    pipe.task(lambda ctx: None, name="before")
    pipe.task(lambda ctx: events[2].set(), name="follows, too", after=["before"])
    result = pipe.run()
    assert (result.done, result.error) == (6, 1)


def test_chains_layers_and_large_fans_are_no_effort(db):
    pipe = pipeloom.Pipeline(db, progress="none", workers=2, resume=True)
    for number in range(1_500):
        pipe.task(lambda ctx: None, name=f"c{number}", after=f"c{number - 1}" if number else ())
    for layer in range(5):
        pipe.task(
            nothing_each,
            name=f"layer {layer}",
            each=range(200),
            after=f"layer {layer - 1}" if layer else "c1499",
        )
    pipe.task(lambda ctx: None, name="end", after=[f"layer {layer}" for layer in range(5)])
    assert pipe.run().done == 2_501
    assert pipe.run().skipped == 2_501


def nothing_each(ctx, item):
    pass


def test_the_nearer_option_wins(db):
    def work(ctx):
        tried.append(ctx.name)
        raise RuntimeError("no")

    tried = []
    pipe = pipeloom.Pipeline(db, progress="none", retries=1, retry_delay=0, check=False)
    pipe.task(work, name="own", retries=0)
    pipe.task(work, name="other")
    pipe.run()
    assert sorted(tried) == ["other", "other", "own"]
    pipe.run(retries=2)
    assert sorted(tried[3:]) == ["other", "other", "other", "own"]


def test_a_pipeline_has_handlers_and_streams_where_it_is_asked_to(db):
    pipe = pipeloom.Pipeline(
        db, progress="none", schema="CREATE TABLE users(key PRIMARY KEY, name NOT NULL)", check=False
    )
    handler = pipe.handles(User)(insert_user)

    @pipe.task(atomic=False)
    def streams(ctx):
        ctx.put(User("a", "ada"))
        raise RuntimeError("after it")

    @pipe.task
    def keeps(ctx):
        ctx.put(User("b", "bob"))
        raise RuntimeError("after it")

    assert handler is insert_user and pipe.run().error == 2
    assert rows(db, "SELECT key FROM users") == [("a",)]


OUTCOMES = (
    "done",
    "done",
    "raises",
    "exits",
    "reports",
    "constraint",
    "cancels",
    "hangs",
    "second time",
    "third",
)


RUNS = 3


@st.composite
def graphs(draw):
    """Tasks as (name, items of each run or None, how they are given, what they come after, whether even if that
    failed, retries, outcomes by run and item)."""
    graph = []
    for number in range(draw(st.integers(1, 6))):
        count = draw(st.none() | st.integers(0, 3))
        items = None
        if count is not None:  # in later runs there are more, as files in a folder
            more = draw(st.lists(st.integers(0, 1), min_size=RUNS - 1, max_size=RUNS - 1))
            items = [list(range(count + sum(more[:run]))) for run in range(RUNS)]
        after = {draw(st.sampled_from([None, other])) for other, *_ in graph}
        outcomes = [[draw(st.sampled_from(OUTCOMES)) for _ in (items[run] if items else [0])] for run in range(RUNS)]
        for outcome in outcomes:
            if "hangs" in outcome:  # the clock is everybody's: who has a deadline beside one that hangs, hangs
                outcome[:] = ["hangs"] * len(outcome)
        given = draw(st.sampled_from([list, iter, lambda items: lambda: items, lambda items: lambda: iter(items)]))
        graph.append((f"t{number}", items, given, after - {None}, draw(st.booleans()), draw(st.integers(0, 2)), outcomes))
    return graph


def modelled(graph, run, before):
    """What the database must say after this run: {name: [status, attempts, the run that did it]}, and who ran."""
    said, ran, newest, spoiled = dict(before), {}, {}, set()
    for name, items, given, after, even, retries, outcomes in graph:
        older = max([newest[upstream] for upstream in after], default=-1)
        if not even and spoiled & after:
            said[name] = ["cancelled", 0, run]
            newest[name] = run
            spoiled.add(name)
            ran[name] = "cancelled"
            continue
        if items is not None and said.get(name, ["done"])[0] == "cancelled":
            del said[name]  # which stood for all
        newest[name] = -1
        names = [name] if items is None else [f"{name}[{item}]" for item in items[run]]
        for task, outcome in zip(names, outcomes[run]):
            if said.get(task, [""])[0] != "done" or said[task][2] < older:
                said[task] = [*settled(outcome, retries), run]
                ran[task] = said[task][0]
            newest[name] = max(newest[name], said[task][2])
            if said[task][0] != "done":
                spoiled.add(name)
    return said, ran


def settled(outcome, retries):
    fails = {"done": 0, "second time": 1, "third": 2, "cancels": 0}.get(outcome, 9)
    attempts = min(fails, retries) + 1
    if outcome == "cancels":
        return "cancelled", 1
    return ("done", attempts) if fails <= retries else ("error", attempts)


def declared(graph, run, db, clock):
    pipe = pipeloom.Pipeline(
        db, workers=4, check=False, progress="none", retry_delay=0, resume=True,
        schema="CREATE TABLE IF NOT EXISTS made(task TEXT, run INT, n INTEGER CHECK (n < 2), UNIQUE (task, run, n))",
    )  # fmt: skip
    for name, items, given, after, even, retries, outcomes in graph:

        def work(ctx, item=0, outcomes=outcomes[run]):
            outcome = outcomes[item]
            ctx.executemany("INSERT INTO made VALUES (?, ?, ?)", ((ctx.name, run, n) for n in range(2)))
            if outcome == "hangs":
                clock.advance(ctx, 1000)
                ctx.sleep(WAIT)
            elif outcome == "raises" or ctx.attempt <= {"second time": 1, "third": 2}.get(outcome, 0):
                raise RuntimeError(outcome)
            elif outcome == "exits":
                sys.exit(3)
            elif outcome == "reports":
                ctx.put(MsgTaskFinished(ctx.task_id, "error", "now"))
            elif outcome == "constraint":
                ctx.execute("INSERT INTO made VALUES ('bad', 0, 2)")
            elif outcome == "cancels":
                raise pipeloom.TaskCancelled("enough")

        timeout = 60 if "hangs" in outcomes[run] else None
        each = None if items is None else given(items[run])
        pipe.task(work, name=name, each=each, after=after, even_if_failed=even, retries=retries, timeout=timeout)
    return pipe


@given(graphs())
@settings(max_examples=int(os.environ.get("PIPELOOM_GRAPHS", "60")), deadline=None)
def test_whatever_the_graph_the_database_says_what_the_model_says(tmp_path_factory, graph):
    db, clock, said, made = tmp_path_factory.mktemp("graph") / "test.db", Clock(), {}, set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeloom._Timer, "clock", clock)
        for run in range(RUNS):
            result = declared(graph, run, db, clock).run()
            said, ran = modelled(graph, run, said)
            found = rows(db, "SELECT name, status, attempts, run_id - 1 FROM task_runs")
            assert {name: row for name, *row in found} == said and len(found) == len(said)
            made |= {(name, run) for name, status in ran.items() if status == "done"}
            assert sorted(rows(db, "SELECT task, run FROM made")) == sorted([*made, *made])
            counts = [list(ran.values()).count(status) for status in ("done", "error", "cancelled")]
            assert [result.done, result.error, result.cancelled] == counts
            assert rows(db, "PRAGMA integrity_check") == [("ok",)]


def folder_pipeline(db, files, **options):
    pipe = pipeloom.Pipeline(db, progress="none", resume=True, **options)
    pipe.task(lambda ctx, file: None, name="load", each=files)
    pipe.task(lambda ctx: " ".join(sorted(files)), name="report", after="load")
    pipe.task(lambda ctx: None, name="mail", after="report")
    return pipe


def test_what_comes_after_something_new_is_made_again(db):
    assert folder_pipeline(db, ["a"]).run().done == 3
    assert folder_pipeline(db, ["a"]).run().skipped == 3
    result = folder_pipeline(db, ["a", "b"]).run()
    assert (result.done, result.skipped) == (3, 1)
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'report'") == [("a b",)]
    assert folder_pipeline(db, ["b"]).run().skipped == 3


def test_what_comes_after_something_new_is_made_again_although_the_run_ended_between_the_two(db):
    folder_pipeline(db, ["a"]).run()
    pipe = pipeloom.Pipeline(db, progress="none", resume=True)
    pipe.task(lambda ctx, file: None, name="load", each=["a", "b"])  # and dies here
    assert pipe.run().done == 1
    assert folder_pipeline(db, ["a", "b"]).run().done == 2
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'report'") == [("a b",)]


def test_a_task_that_says_so_starts_even_if_what_it_comes_after_failed(db):
    def fails(ctx):
        raise RuntimeError("no")

    pipe = pipeloom.Pipeline(db, progress="none", check=False)
    pipe.task(fails)
    pipe.task(lambda ctx: None, name="never", after=fails)

    @pipe.task(after=["never", fails], even_if_failed=True)
    def clean_up(ctx):
        with ctx.connect() as conn:
            return conn.execute("SELECT status FROM task_runs WHERE id < 3 ORDER BY id").fetchall()

    result = pipe.run()
    assert (result.done, result.error, result.cancelled) == (1, 1, 1)
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'clean_up'") == [('[["error"], ["cancelled"]]',)]


def test_async_tasks_share_one_loop_and_each_of_them_holds_a_worker(db):
    import asyncio

    shared = {}

    async def work(task, ctx):
        loop = asyncio.get_running_loop()
        shared.setdefault(loop, asyncio.Semaphore(1))
        async with shared[loop]:
            await asyncio.sleep(0)
        if task == 3:
            sys.exit(7)
        return len(shared)

    result = run(range(20), db, work, workers=4, check=False)
    assert (result.done, result.error, len(shared)) == (19, 1, 1)
    assert result.failures[0].message == "SystemExit: 7"


@dataclasses.dataclass(frozen=True)
class Squared:
    number: int


class Awkward(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def in_a_process(ctx, number):
    ctx.executemany("INSERT INTO made VALUES (?, ?)", [(number, os.getpid())] * 2)
    ctx.put(Squared(number**2))
    for _ in ctx.track(range(3)):
        pass
    if number == 2:
        raise Awkward("two", 2)
    if number == 3:
        ctx.put(MsgTaskFinished(ctx.task_id, "error", "now", message="told"))
    if number == 4:
        raise pipeloom.TaskCancelled("enough")
    if number == 5 and ctx.attempt == 1:
        sys.exit("once")
    if number == 6:
        with pytest.raises(pipeloom.MessageRefused):
            ctx.put(object())
        with ctx.connect() as conn:
            return conn.execute("SELECT 1").fetchone()[0]
    return {"number": number}


def in_a_process_for_long(ctx, seconds):
    time.sleep(2)


async def awaited_in_a_process(ctx):
    return os.getpid()


def test_functions_run_in_processes_and_all_promises_stay(db):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    schema = "CREATE TABLE made(number, pid); CREATE TABLE square(number)"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        executor.submit(int).result()
        pipe = pipeloom.Pipeline(db, schema=schema, progress="none", workers=4, check=False, executor=executor)
        pipe.task(in_a_process, each=range(8), retries=1, retry_delay=0)
        pipe.task(awaited_in_a_process)
        pipe.handles(Squared)(lambda conn, m: conn.execute("INSERT INTO square VALUES (?)", (m.number,)))
        result = pipe.run()
        late = pipeloom.Pipeline(db, progress="none", workers=1, check=False, executor=executor, timeout=0.2)
        late.task(in_a_process_for_long, each=[7])
        assert late.run().failures[0].message == "timed out after 0.2 s"
    assert (result.done, result.error, result.cancelled) == (6, 2, 1)
    told = {failure.task: failure for failure in result.failures}
    assert told["in_a_process[2]"].message == "Awkward: two" and "raise Awkward" in told["in_a_process[2]"].traceback
    assert told["in_a_process[2]"].cause.startswith("Awkward at test_pipeloom.py:")
    assert told["in_a_process[3]"].message == "told"
    assert [n for (n,) in rows(db, "SELECT number FROM made ORDER BY 1")] == [0, 0, 1, 1, 5, 5, 6, 6, 7, 7]
    assert rows(db, "SELECT number FROM square ORDER BY 1") == [(0,), (1,), (25,), (36,), (49,)]
    assert rows(db, "SELECT count(*) FROM made WHERE pid = ?", os.getpid()) == [(0,)]
    assert rows(db, "SELECT attempts, result FROM task_runs WHERE name = 'in_a_process[5]'") == [(2, '{"number": 5}')]
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'in_a_process[6]'") == [("1",)]


KILLED = """
import os, random, signal, sys, time
import pipeloom

random.seed(int(sys.argv[2]))
def tasks():
    for number in range(150):
        yield number

def pipeline():
    pipe = pipeloom.Pipeline(
        "killed.db", workers=4, retries=3, retry_delay=0, progress="none", wal=random.random() < 0.7,
        schema="CREATE TABLE IF NOT EXISTS made(task TEXT, n INTEGER); CREATE TABLE IF NOT EXISTS twice(n INTEGER)")
    @pipe.task(each=tasks)
    def load(ctx, number):
        ctx.executemany("INSERT INTO made VALUES (?, ?)", ((ctx.name, n) for n in range(5)))
        time.sleep(0.002)
        if ctx.attempt == 1 and number % 10 == 0:
            raise RuntimeError("once")
    @pipe.task(after=load, each=lambda: list(range(100)))
    def double(ctx, number):
        with ctx.connect() as db:
            (n,) = db.execute("SELECT sum(n) FROM made WHERE task = ?", (f"load[{number}]",)).fetchone()
        ctx.execute("INSERT INTO twice VALUES (?)", (2 * n,))
    @pipe.task(after=double)
    def report(ctx):
        with ctx.connect() as db:
            return db.execute("SELECT sum(n) FROM twice").fetchone()[0]
    return pipe

def one_run():  # in a process of its own, killed at a random moment; whether it finished
    child = os.fork()
    if not child:
        code = 70
        try:
            code = pipeloom._execute(pipeloom._pipeline_parser(pipeline()), ["--resume"])
        except KeyboardInterrupt:  # before the run, or after
            code = 130
        except SystemExit as exit:
            code = exit.code
        finally:
            os._exit(code)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    numbers = [signal.SIGKILL] if sys.argv[3] == "SIGKILL" else random.choices(numbers, k=random.randint(1, 3))
    for number in numbers:
        time.sleep(random.random() ** 2 * 0.25)
        os.kill(child, number)  # which is not gone, as nobody has waited for it
    status = os.waitpid(child, 0)[1]
    assert status == 0 or status in numbers or (status >> 8) - 128 in numbers, (status, numbers)
    return status == 0

def check():
    import sqlite3
    db = sqlite3.connect("killed.db")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("SELECT status, count(*) FROM task_runs GROUP BY 1").fetchall() == [("done", 251)]
    assert db.execute("SELECT count(*), count(DISTINCT task || ' ' || n) FROM made").fetchone() == (750, 750)
    assert db.execute("SELECT count(*), sum(n) FROM twice").fetchone() == (100, 2000)
    assert db.execute("SELECT result FROM task_runs WHERE name = 'report'").fetchone() == ("2000",)
    db.close()
    for end in ("", "-wal", "-shm", "-journal"):
        if os.path.exists("killed.db" + end):
            os.remove("killed.db" + end)

kills = finished = 0
while kills < int(sys.argv[1]):
    while not one_run():
        kills += 1
    finished += 1
    check()
print(kills, "kills", finished, "databases")
"""


@pytest.fixture(scope="session", autouse=True)
def killed(request, tmp_path_factory):
    """What kills and resumes has begun when the first test runs: the last of them only waits for its end."""
    if all(item.name != test_killed_at_random_moments_and_resumed_every_row_is_there_exactly_once.__name__
           for item in request.session.items):  # fmt: skip
        yield []
        return
    processes = []
    for number, how in enumerate(("SIGKILL", "SIGKILL", "signals")):
        home = tmp_path_factory.mktemp("killed")
        shutil.copy(str(FILE), str(home))
        (home / "killed.py").write_text(KILLED)
        output = (home / "output").open("w")
        command = [sys.executable, "killed.py", str(KILLS // 2), str(os.getpid() + number), how]
        processes.append((home, subprocess.Popen(command, cwd=str(home), stdout=output, stderr=output)))
        output.close()
    yield processes
    for _, process in processes:
        process.kill()
        process.wait(WAIT)


@needs_posix
def test_killed_at_random_moments_and_resumed_every_row_is_there_exactly_once(killed):
    """By SIGKILL, and by one to three of the signals that end a run. PIPELOOM_KILLS=1000 makes it a long one."""
    faulthandler.dump_traceback_later(60 + KILLS, exit=True)
    for home, process in killed:
        code = process.wait(60 + KILLS)
        assert code == 0, (process.args, (home / "output").read_text()[-3000:])
        print((home / "output").read_text())


# ---- Status and the command line -----------------------------------------------------------------------


def cli(*arguments):
    return pipeloom.main([str(argument) for argument in arguments])


@pytest.fixture
def quiet_root():
    yield
    pipeloom._remove_handlers()


def test_the_demo_works_at_once_in_an_empty_directory(homes):
    def one(how):
        home, start = homes(), how.split()
        if how == "-m repo.vendor.pipeloom":
            (home / "repo" / "vendor").mkdir(parents=True)
            shutil.move(str(home / "pipeloom.py"), str(home / "repo" / "vendor"))
        elif how == "from a zip":
            with zipfile.ZipFile(str(home / "app.zip"), "w") as file:
                file.write(str(home / "pipeloom.py"), "pipeloom.py")
                file.writestr("__main__.py", "import sys, pipeloom; sys.exit(pipeloom.main())")
            (home / "pipeloom.py").unlink()
            start = ["app.zip"]
        done = python(*start, "demo", "--fail", "2", "-n", "4", cwd=home, code=1)
        assert "2 done, 2 failed" in done.stderr
        assert "RuntimeError: this task was asked to fail" in done.stderr
        assert sorted(row[2] for row in rows(home / "wal_demo.db")) == ["done"] * 2 + ["error"] * 2

    at_once(one, [("-m pipeloom",), ("pipeloom.py",), ("-m repo.vendor.pipeloom",), ("from a zip",)])


EVERYTHING = """
import asyncio, sys, time, pipeloom
pipe = pipeloom.Pipeline("e.db", schema="CREATE TABLE IF NOT EXISTS t(x)", workers=4, retry_delay=0.01)
@pipe.task(each=["a", "\\u00fc", "\\u65e5[/x]"])
def load(ctx, item):
    ctx.executemany("INSERT INTO t VALUES (?)", ctx.track([(item,)] * 10))
@pipe.task(each=range(2), retries=1)
def again(ctx, item):
    if ctx.attempt == 1: raise ValueError(item)
@pipe.task(timeout=0.1)
async def hangs(ctx): await asyncio.sleep(60)
@pipe.task(after=[load, again])
async def report(ctx):
    with ctx.connect() as db: return db.execute("SELECT count(*) FROM t").fetchone()[0]
@pipe.task(after=hangs)
def never(ctx): pass
if __name__ == "__main__": pipe.main()
"""


def test_it_works_in_every_mode_of_the_interpreter_without_a_warning(homes):
    def one(how, progress):
        home = homes()
        (home / "e.py").write_text(EVERYTHING)
        env = {"LC_ALL": "C", "PYTHONUTF8": "0"}
        start = [*how.split(), "pipeloom.py", "run", "e.py", "--progress", progress]
        done = python(*start, cwd=home, code=1, env=env)
        said = done.stderr[done.stderr.index("6 done, 1 failed, 1 cancelled in ") :].splitlines()
        assert len(said) == 4 and said[2] == "  hangs: timed out after 0.1 s"
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr
        assert rows(home / "e.db", "SELECT count(*) FROM t") == [(30,)]
        done = python(*start, "--resume", cwd=home, code=1, env=env)
        assert "0 done, 6 skipped, 1 failed, 1 cancelled in " in done.stderr

    modes = [("-I", "log"), ("-OO", "ansi"), ("-X dev -W error", "ansi"), ("-S -X utf8=0", "log")]
    at_once(one, modes + [("-X dev", "rich")] * bool(rich))


def test_the_line_that_the_world_knows_works(home):
    done = python(
        "-m", "pipeloom", "demo", "--db", "./wal_demo.db", "--num-tasks", "10", "-vv", cwd=home, code=0
    )
    assert "10 done" in done.stderr and "INFO" in done.stderr
    assert [row[2] for row in rows(home / "wal_demo.db")] == ["done"] * 10


USER_FILE = """
import {module} as pipeloom
class Row:
    def __init__(self, x): self.x = x
def store(conn, row): conn.execute("INSERT INTO t VALUES (?)", (row.x,))
def work(task, q):
    if task == "bad": raise ValueError("bad task")
    q.put(Row(task)); q.put(pipeloom.MsgTaskProgress(q.task_id, 1, 1))
def main(count=2, bad=False, name="x"):
    tasks = [f"{{name}}-{{i}}" for i in range(count)] + ["bad"] * bad
    pipeloom.run_pipeline(tasks, "own.db", worker_fn=work, schema="CREATE TABLE IF NOT EXISTS t(x)", handlers={{Row: store}})
def broken(): import no_such_module
class Group: inner = staticmethod(main)
number = 3
"""


@pytest.mark.parametrize("module", ["pipeloom", "repo.vendor.pipeloom"])
@pytest.mark.parametrize("target", ["job.py", "job.py:main", "job:main", "job:Group.inner"])
def test_run_calls_a_function_of_the_users_with_the_users_classes(home, module, target):
    start = ["-m", "pipeloom"]
    if module != "pipeloom":
        (home / "repo" / "vendor").mkdir(parents=True)
        shutil.move(str(home / "pipeloom.py"), str(home / "repo" / "vendor"))
        start = ["-m", module]
    elif target == "job.py":
        start = ["pipeloom.py"]
    (home / "job.py").write_text(USER_FILE.format(module=module))
    arguments = ["--arg", "count=3", "--arg", "name=y", "--db", "mine.db", "-w", "2"]
    done = python(*start, "run", target, *arguments, cwd=home, code=0)
    assert "3 done in" in done.stderr and "mine.db" in done.stderr
    assert sorted(rows(home / "mine.db", "SELECT x FROM t")) == [("y-0",), ("y-1",), ("y-2",)]
    assert not (home / "own.db").exists()


@pytest.mark.parametrize("name", ["site.py", "types.py", "2024.01.py"])
def test_run_takes_a_file_from_where_it_is_whatever_its_name(home, name):
    (home / "jobs").mkdir()
    (home / "jobs" / name).write_text(USER_FILE.format(module="pipeloom"))
    done = python("-m", "pipeloom", "run", f"jobs/{name}", cwd=home, code=0)
    assert "2 done" in done.stderr


def test_run_tells_in_one_line_why_a_file_cannot_be_imported(home):
    (home / "bad.py").write_text("def main(:\n")
    done = python("-m", "pipeloom", "run", "bad.py", cwd=home, code=2)
    assert "SyntaxError" in done.stderr and done.stderr.count("\n") == 1


PIPELINE = """
import sys, pipeloom
pipe = pipeloom.Pipeline("p.db", progress="none", check={check}, retry_delay=0.01)
@pipe.task(each=["a", "b"])
def load(ctx, item):
    if item == "b" and not sys.flags.optimize and not __import__("os").path.exists("mended"):
        raise ValueError("bad")
@pipe.task(after=load)
def report(ctx): return "r"
{main}
if __name__ == "__main__": pipe.main()
"""


@pytest.mark.parametrize(
    "command, main, check",
    [
        ("job.py", "", True),
        ("job.py", "", False),
        ("-m job", "", True),
        ("-m pipeloom run job.py", "", True),
        ("-m pipeloom run job.py", "def main(): pipe.main()", True),
        ("-m pipeloom run -- job.py", "def main(): pipe.run()", False),
    ],
)
def test_a_pipeline_is_run_from_the_command_line_and_the_command_to_resume_works(home, main, check, command):
    import shlex

    (home / "job.py").write_text(PIPELINE.format(main=main, check=check))
    done = python(*command.split(), cwd=home, code=1)
    assert "1 done, 1 failed, 1 cancelled" in done.stderr and "load[b]: ValueError: bad" in done.stderr
    resume = shlex.split(done.stderr.split("to go on where this ended: ")[1])
    (home / "mended").touch()
    done = subprocess.run(resume, cwd=str(home), stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert done.returncode == 0 and "2 done, 1 skipped" in done.stderr and "to go on" not in done.stderr
    assert sorted(row[1:] for row in rows(home / "p.db")) == [
        ("load[a]", "done"),
        ("load[b]", "done"),
        ("report", "done"),
    ]


def test_the_options_of_the_command_line_are_those_of_a_pipeline(home):
    (home / "job.py").write_text(PIPELINE.format(main="", check=True))
    (home / "two.py").write_text("from pipeloom import *\na, b = Pipeline('a'), Pipeline('b')")
    (home / "now.py").write_text("from pipeloom import *\nPipeline('a').main()")
    done = python("job.py", "--dry-run", cwd=home, code=0)
    assert done.stdout.split() == ["load[a]", "load[b]", "report"] and not (home / "p.db").exists()

    def retried(options, code):
        python("-m", "pipeloom", "run", "job.py:pipe", *options.split(), cwd=home, code=code)
        assert rows(home / "q.db", "SELECT attempts FROM task_runs WHERE name = 'load[b]'") == [(2,)]

    def refused(arguments, said):
        done = python(*arguments.split(), cwd=home, code=2)
        assert said in done.stderr and done.stderr.count("\n") == 1

    def in_memory(options, code):
        done = python("-m", "pipeloom", "demo", *options.split(), "--db", ":memory:", cwd=home, code=code)
        assert "to go on" not in done.stderr

    at_once(
        lambda check, *case: check(*case),
        [
            (retried, "--retries 1 --timeout 9 --db q.db", 1),
            (in_memory, "-n 2 --fail 1", 1),
            (refused, "job.py --retries x", "--retries: 'x': expected a whole number from 0"),
            (refused, "job.py --timeout 0", "timeout=0.0: expected a number of seconds above 0"),
            (refused, "-m pipeloom run job.py --arg a=1", "--arg: job.py is a Pipeline, which takes none"),
            (refused, "-m pipeloom run two.py", "has 2 pipelines; name one, as two.py:name"),
            (refused, "-m pipeloom run now.py", "put that under `if __name__ == '__main__':`"),
        ],
    )


def test_the_demo_resumes(home):
    python("-m", "pipeloom", "demo", "-n", "2", "--fail", "1", cwd=home, code=1)
    assert (
        "1 done, 1 skipped"
        in python("-m", "pipeloom", "demo", "-n", "2", "--resume", cwd=home, code=0).stderr
    )


LEFT_BEHIND = """
import asyncio, pipeloom, time
from concurrent.futures import ThreadPoolExecutor
pipe = pipeloom.Pipeline("l.db")
@pipe.task(timeout=0.3)
def pool(ctx):
    with ThreadPoolExecutor(2) as pool: list(pool.map(time.sleep, [600, 600]))
if hasattr(asyncio, "to_thread"):
    @pipe.task(timeout=0.3)
    async def thread(ctx): await asyncio.to_thread(time.sleep, 600)
if __name__ == "__main__": pipe.main()
"""


def test_pools_of_tasks_that_were_left_behind_do_not_hold_up_the_exit_code(homes):
    def one(arguments):
        home = homes()
        (home / "left.py").write_text(LEFT_BEHIND)
        done = python(*arguments.split(), cwd=home, code=1)
        assert re.search(r"  pool( and 1 more)?: timed out after 0.3 s\n", done.stderr)

    at_once(one, [("left.py",), ("-m pipeloom run left.py",), ("pipeloom.py run left.py",)])


def test_run_awaits_a_coroutine_and_an_empty_database_name_is_none(home):
    (home / "job.py").write_text("async def main(): print('ran')")
    assert python("-m", "pipeloom", "run", "job.py", cwd=home, code=0).stdout == "ran\n"
    (home / "p.py").write_text(PIPELINE.format(main="", check=True))
    assert "database '' is no file name" in python("p.py", "--db", "", cwd=home, code=2).stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_file_on_a_full_disk_is_one_warning(home):
    done = python("-m", "pipeloom", "demo", "-n", "2", "-vv", "-l", "/dev/full", cwd=home, code=0)
    assert done.stderr.count("the log file '/dev/full' gets no more lines") == 1
    assert "2 done" in done.stderr and "Traceback" not in done.stderr and "Logging error" not in done.stderr


def test_run_tells_failures_by_their_cause(home):
    (home / "job.py").write_text(USER_FILE.format(module="pipeloom"))
    done = python("-m", "pipeloom", "run", "job.py", "--arg", "bad=true", cwd=home, code=1)
    assert "2 done, 1 failed" in done.stderr and "1 failed, 1 cause:\n" in done.stderr
    assert re.search(r"^  bad: ValueError: bad task \(job.py:\d+, in \w+\)$", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    (home / "many.py").write_text(MANY_FAILURES)
    done = python("many.py", cwd=home, code=1)
    assert (
        "1,204 failed, 2 causes:\n"
        "  bad[0] and 1,202 more: ValueError: 0 (many.py:4, in bad)\n"
        "  worse: ZeroDivisionError: division by zero (many.py:6, in worse)\n"
    ) in done.stderr


MANY_FAILURES = """import pipeloom
pipe = pipeloom.Pipeline("m.db", workers=1)
@pipe.task(each=range(1203))
def bad(ctx, n): raise ValueError(n)
@pipe.task
def worse(ctx): 1 / 0
pipe.main()
"""

STUCK = """
import pipeloom, threading, time
pipe = pipeloom.Pipeline("s.db", workers=3)
gone = threading.Event()
def hangs_here():
    open("hangs", "w").close()
    time.sleep(0.6)
    gone.set()
@pipe.task(each=["a", "b"])
def work(ctx, item):
    hangs_here()
def blocks():
    yield 1
    assert gone.wait(20)
    time.sleep(0.2)  # for the dump to be drawn
@pipe.task(each=blocks)
def more(ctx, item): pass
if __name__ == "__main__": pipe.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_sigusr1_prints_the_stack_of_every_thread_above_the_bars_and_the_run_goes_on(home):
    (home / "s.py").write_text(STUCK)

    def act(process):
        deadline = time.monotonic() + WAIT
        while not (home / "hangs").exists() and time.monotonic() < deadline:
            threading.Event().wait(0.02)
        threading.Event().wait(0.2)
        process.send_signal(signal.SIGUSR1)

    code, written = on_terminal(["s.py"], [], home, act=act, size=(60, 100))
    shown = screen(written)
    assert code == 0, written
    stacks = "\n".join(shown[: [line.startswith("All tasks") for line in shown].index(True)])
    assert stacks.count("in hangs_here\n") == 2 and "in blocks\n" in stacks
    assert "Thread MainThread:" in stacks and "Thread pipeloom-writer:" in stacks
    assert sum(line.startswith("All tasks") for line in shown) == 1


def test_a_dry_run_names_the_tasks_and_writes_nothing(home):
    (home / "job.py").write_text(USER_FILE.format(module="pipeloom"))
    done = python("-m", "pipeloom", "run", "job.py", "--dry-run", cwd=home, code=0)
    assert done.stdout == "x-0\nx-1\n" and not (home / "own.db").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["run", "nowhere.py"], "there is no file 'nowhere.py'"),
        (["run", "no_such_module_x:main"], "cannot be imported: ModuleNotFoundError: No module named"),
        (["run", "json:nothing"], "'json' has no 'nothing'"),
        (["run", "json"], "target 'json': expected package.module:name, file.py:name or file.py"),
        (["run", "math:pi"], "which cannot be called; name a function"),
        (["run", "json:dumps", "--arg", "novalue"], "--arg 'novalue': expected KEY=VALUE"),
        (["status", "--db", "missing.db"], "database 'missing.db' does not exist"),
        (["demo", "-n", "0"], "'0': expected a whole number from 1"),
        (["demo", "-n", "-3"], "'-3': expected a whole number from 1"),
        (["demo", "-w", "0"], "'0': expected a whole number from 1"),
        (["demo", "--db", "no/such/dir.db"], "there is no directory"),
        (["demo", "--db", "."], "is a directory"),
        (["init-db", "--db", "no/such/dir.db"], "there is no directory"),
        (["status", "--limit", "x"], "'x': expected a whole number from 1"),
        (["status", "--limit", "9" * 20], "expected a whole number from 1"),
        (["demo", "--db", ""], "database '' is no file name"),
        (["init-db", "--db", ":memory:"], "would be gone at once"),
        (["demo", "--log-file", "no/such/x.log"], "--log-file 'no/such/x.log' cannot be written"),
        (["run", "json:dumps", "--arg", "nosuch=1"], "missing a required argument: 'obj'"),
        (["run", "j:main"], "cannot be imported: ModuleNotFoundError"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, quiet_root, arguments, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        code = cli(*arguments)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and said in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_status_shows_counts_the_last_run_and_the_latest_tasks(db, capsys, quiet_root):
    run(["a", "bad", "c"], db, lambda t, q: 1 / (t != "bad"), check=False)
    assert cli("status", "--db", db) == 0
    out = capsys.readouterr().out
    assert "2 done, 1 error" in out and "last run: error" in out and "ZeroDivisionError" in out
    assert cli("status", "--db", db, "--failed", "--json", "-n", 5) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"done": 2, "error": 1} and status["run"]["done"] == 2
    assert [task["name"] for task in status["tasks"]] == ["bad"]
    assert cli("status", "--db", db, "--watch") == 0  # the run has ended, so this does too


def test_status_reads_a_live_run_without_holding_it_up(db, capsys, quiet_root):
    seen = []

    def work(task, ctx):
        with ctx.connect() as conn:
            while not conn.execute("SELECT 1 FROM task_runs WHERE status = 'running'").fetchone():
                ctx.sleep(0.01)
        seen.append(pipeloom.read_status(str(db)))

    run(["a"], db, work)
    assert seen[0]["run"]["status"] == "running" and seen[0]["tasks"][0]["status"] == "running"


def test_status_refuses_what_is_no_database_of_pipeloom(tmp_path, capsys, quiet_root):
    sqlite3.connect(str(tmp_path / "empty.db")).execute("CREATE TABLE x(y)").connection.close()
    (tmp_path / "text.db").write_text("no database" * 100)
    for name in ("empty.db", "text.db"):
        assert cli("status", "--db", tmp_path / name) == 2
        assert "has no status" in capsys.readouterr().err


def test_status_leaves_nothing_behind_and_knows_a_dead_run(home):
    program = """if 1:
        import os, pipeloom
        def work(task, ctx):
            if task: os.kill(os.getpid(), 9)
        pipeloom.run_pipeline(range(2), "k.db", workers=1, worker_fn=work, progress="none")"""
    run(["a"], home / "fine.db", nothing)
    before = sorted(home.iterdir())
    python("-m", "pipeloom", "status", "--db", "fine.db", cwd=home, code=0)
    assert [p for p in sorted(home.iterdir()) if p.name != "__pycache__"] == before
    python("-c", program, cwd=home)
    out = python("-m", "pipeloom", "status", "--db", "k.db", "--watch", cwd=home, code=0).stdout
    assert "last run: interrupted" in out


def test_an_ascii_stdout_shows_any_name(home):
    run(["\u65e5\u672c\n"], home / "n.db", nothing)
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = python("-m", "pipeloom", "status", "--db", "n.db", cwd=home, code=0, env=env)
    assert "\\u65e5" in done.stdout


def test_init_db_makes_the_tables(db, quiet_root):
    assert cli("init-db", "--db", db) == 0
    assert cli("status", "--db", db) == 0


@needs_posix
def test_the_exit_code_of_the_command_line_names_the_signal(homes):
    def one(number):
        home = homes()
        (home / "s.py").write_text(
            SLEEPER.replace("try:", "def main():").replace("finally:", "if 0:").replace("sys.argv[1]", "'x'")
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeloom", "run", "s.py"], cwd=str(home), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, universal_newlines=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number, errors
        assert "done, " in errors and "Traceback" not in errors

    at_once(one, [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,)])


# ---- README and examples -------------------------------------------------------------------------------


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)


def test_the_first_program_of_the_readme_runs(home):
    (home / "program.py").write_text(readme_blocks("python")[0])
    python("program.py", cwd=home, code=0)
    (database,) = home.glob("*.db")  # and its lock beside it
    assert {row[2] for row in rows(database)} == {"done"}


def test_every_program_of_the_readme_compiles():
    for block in readme_blocks("python"):
        compile(block, "README.md", "exec")


def example(name, *arguments, cwd, code=0):
    env = {"PYTHONPATH": str(HERE)}
    return python(HERE / "examples" / name, *arguments, cwd=cwd, code=code, env=env)


def test_the_tests_that_the_readme_names_for_each_promise_exist():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    promises = dict(re.findall(r"^\| (G\d) \|.*\| (.*) \|$", text, re.M))
    assert sorted(promises) == [f"G{n}" for n in range(1, 10)]
    for names in promises.values():
        assert names and all(callable(globals().get(name[1:-1])) for name in names.split(", ")), names


def test_every_example_is_tested():
    assert {path.name for path in (HERE / "examples").glob("*.py")} == {"load_csv.py", "benchmark.py"}


def test_the_benchmark_measures_what_it_says_and_notices_what_was_not_stored(home):
    (home / "examples").mkdir()
    shutil.copy(str(HERE / "examples" / "benchmark.py"), str(home / "examples"))
    broken = Path(tempfile.mkdtemp(dir=str(home)))
    shutil.copytree(str(home / "examples"), str(broken / "examples"))
    source = FILE.read_text(encoding="utf-8")
    lossy = source.replace(
        "conn.execute(f\"{head}{', '.join([row]", "chunk = chunk[1:] or chunk; conn.execute(f\"{head}{', '.join([row]"
    )
    assert lossy != source
    (broken / "pipeloom.py").write_text(lossy, encoding="utf-8")

    def one(folder, arguments, code, said):
        done = python("examples/benchmark.py", *arguments.split(), cwd=folder, code=code)
        assert re.search(said, done.stdout), done.stdout

    at_once(
        one,
        [
            (home, "--only execute --limit 3000 --rounds 1", 0, r"executemany\(\) .*/s .* x >= 1.2"),
            (home, "--only memory --limit 50 --json", 0, '"verdict": "met"'),
            (home, "--scaling --only fan --limit 50", 0, "50 tasks after one task"),
            (broken, "--only executemany --limit 3000 --rounds 1", 1, "FAILED .*not true of the database"),
        ],
    )


def test_load_csv_stores_every_line_of_the_installed_packages_once(tmp_path):
    for _ in range(2):
        done = example("load_csv.py", cwd=tmp_path)
        files, lines = map(int, re.search(r"(\d+) files.* hold (\d+) lines", done.stdout).groups())
        assert rows(tmp_path / "load_csv.db", "SELECT count(DISTINCT file), count(*) FROM line") == [
            (files, lines)
        ]
        assert files >= 1 and lines > 100


def test_load_csv_loads_a_folder_and_a_second_run_changes_nothing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("x,1\ny,2\n", encoding="utf-8")
    (folder / "b.csv").write_text('"multi\nline",3\n', encoding="utf-8")
    (folder / "empty.csv").write_text("", encoding="utf-8")
    (folder / "note.txt").write_text("no csv", encoding="utf-8")
    found = []
    for _ in range(2):
        example("load_csv.py", folder, cwd=tmp_path)
        found.append(rows(tmp_path / "load_csv.db", "SELECT * FROM line ORDER BY file, number"))
    assert found[0] == found[1] and len(found[0]) == 3
    example("load_csv.py", tmp_path / "missing", cwd=tmp_path, code=2)


def test_the_version_in_pyproject_is_read_from_the_module():
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text and "pipeloom.__version__" in text
