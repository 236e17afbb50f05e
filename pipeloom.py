"""pipeloom: run many tasks at once, store what they make in one SQLite file, watch them live.

One file, standard library only, Python 3.8 or newer. A program:

    from pathlib import Path
    from pipeloom import Pipeline

    pipe = Pipeline("lines.db", schema="CREATE TABLE IF NOT EXISTS line(path TEXT, text TEXT)")

    @pipe.task(each=lambda: Path(".").glob("*.py"), retries=2)
    def load(ctx, path):                                  # a task a file, each on a worker thread
        with path.open() as file:
            ctx.executemany("INSERT INTO line VALUES (?, ?)", ((str(path), line) for line in ctx.track(file)))

    @pipe.task(after=load)
    def count(ctx):                                       # when all that is committed
        with ctx.connect() as db:
            return db.execute("SELECT count(*) FROM line").fetchone()[0]

    pipe.main()                                           # run it again with --resume: done is done

Workers send typed messages over a channel; one thread, the writer, owns the only SQLite connection and
commits what they send; nothing is shown or acted upon before it is committed. What it promises:
 - a task's rows and its `done` are one transaction: rows if and only if done;
 - killed anywhere, the same program with resume finishes, and each row is there exactly once;
 - a dead writer, a full disk, a locked database, a bad message or a task that hangs ends the run in time,
   with one clear error, and a task's failure is nobody else's;
 - Ctrl-C once: nothing new starts and what runs finishes; twice: leave now. All that finished is stored;
 - memory does not grow with the number of tasks, and the display never harms the run.

Try `python -m pipeloom demo`. To vendor it, copy this file; to update it, copy it again. Python reads it
in the order in which a task meets it: vocabulary and errors, messages, database, channel, writer,
progress, task and context, engine, pipeline, status, demo, command line.

SPDX-License-Identifier: MIT. Copyright (c) 2026 the pipeloom authors. The whole text:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions: The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY
KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR
ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import sqlite3
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import chain, compress, count, islice
from operator import attrgetter, index
from types import CoroutineType
from unicodedata import category, east_asian_width

if __name__ == "__main__":
    # This copy of the file would have classes of its own, which the tasks' `import pipeloom` does not know:
    # hand over to the real module.
    from importlib import import_module

    if not __spec__:  # `python pipeloom.py`, perhaps with PYTHONSAFEPATH
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    _name = __spec__.name if __spec__ else os.path.splitext(os.path.basename(__file__))[0]
    _pipeloom = import_module(_name)
    _pipeloom._exit(_pipeloom.main)

TYPE_CHECKING = False  # type checkers take it for true; `typing` costs 8 ms to import
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator, List, NoReturn, Optional, Tuple, Union

    Handler = Callable[[sqlite3.Connection, Any], object]
    Item = Tuple[Optional["TaskContext"], Any]  # what travels on the channel: who sent it, the message
    Lines = Callable[[List["_Bar"], int, "_Style"], List[Tuple[str, int]]]  # of bars: each with its cells
    Msg = Union["MsgTaskStarted", "MsgTaskProgress", "MsgTaskFinished", "MsgExecute"]
    console: Any

# ---- Vocabulary and errors: the words that the code, the database and the messages to you use ----------
#
# task       what is to be done: any object; `task_id` and `name` are looked for, nothing else
# attempt    one go at a task by a worker; a task has one, or more where it is retried
# run        one call of run_pipeline, from the first task to the last commit
# stage      the tasks of a run that share one function and its options
# worker     a thread that takes ready tasks and calls the function
# message    what a worker sends; frozen, typed, applied in the writer's one place
# channel    the bounded way from the workers to the writer
# writer     the thread that owns the SQLite connection
# settled    said of a task whose final status is committed

__version__ = "1.0.0"
__all__ = [
    "SENTINEL", "DatabaseError", "DemoTask", "Failure", "MessageRefused", "Msg", "MsgExecute",
    "MsgTaskFinish", "MsgTaskFinished", "MsgTaskProgress", "MsgTaskStart", "MsgTaskStarted",
    "Pipeline", "PipelineError", "PipeloomError", "Progress", "RunInProgress", "RunResult",
    "SQLiteWriter", "Task", "TaskCancelled", "TaskContext", "TaskDef", "UsageError", "UsageTypeError",
    "WriterFailed",
    "__version__", "connect", "console", "demo_worker", "init_schema", "logger", "main",
    "make_overall_progress", "make_task_progress", "preregister_task_bars", "run_pipeline",
    "setup_logging", "wal_checkpoint",
]  # fmt: skip

QUEUED, RUNNING, DONE, ERROR, CANCELLED = "queued", "running", "done", "error", "cancelled"
FINAL = (DONE, ERROR, CANCELLED)

logger = logging.getLogger("pipeloom")


class PipeloomError(Exception):
    """Every error of this file: its text says what happened, what was expected and what to do."""


class UsageError(PipeloomError, ValueError):
    """An argument has a value that cannot be used; nothing was started or written."""


class UsageTypeError(PipeloomError, TypeError):
    """An argument is of a type that cannot be used; nothing was started or written."""


class DatabaseError(UsageError):
    """The database file cannot be used. `path` names it."""

    def __init__(self, path: str, what: str, cure: str) -> None:
        super().__init__(f"database {path!r} {what}; {cure}")
        self.path = path


class MessageRefused(PipeloomError, ValueError):
    """A message can never be stored; raised by `put()` in the worker that sent it."""


class WriterFailed(PipeloomError):
    """The writer gave up while the run was on. What was committed stays; `path` names the database."""

    def __init__(self, path: str, what: str, cure: str) -> None:
        super().__init__(f"the writer of database {path!r} gave up: {what}; {cure}")
        self.path = path


class RunInProgress(PipeloomError):
    """Another run holds the database. Nothing was started or written; `path` names the database."""

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(f"database {path!r} is held by {holder}; wait for its end, or use another file")
        self.path = path


class PipelineError(PipeloomError):
    """Tasks failed. Everything else has finished and is stored; `result` is the RunResult."""

    def __init__(self, result: RunResult) -> None:
        first = result.failures[0]
        more = f" (and {result.error - 1:,} more)" if result.error > 1 else ""
        super().__init__(
            f"{result.error:,} of {result.total:,} tasks failed: {first.task!r}: {first.message}{more}; "
            "mend the cause and run again, with resume=True for what is not done"
        )
        self.result = result


class TaskCancelled(BaseException):
    """Raised in a worker whose task is to stop. No Exception, so that `except Exception` lets it through."""


# ---- Messages: what a worker may say; frozen, and checked when they are put ----------------------------


@dataclass(frozen=True)
class Task:
    """A ready-made task for those who need no class of their own; any object will do as well."""

    task_id: int
    name: str
    steps: int = 20


@dataclass(frozen=True)
class MsgTaskStarted:
    """A task has started; `started_at` is ISO 8601 text in UTC."""

    task_id: int
    name: str
    started_at: str


@dataclass(frozen=True)
class MsgTaskProgress:
    """`step` of `total` is reached (1-based); a total of 0 means that it is not known."""

    task_id: int
    step: float
    total: float
    message: str = ""


@dataclass(frozen=True)
class MsgTaskFinished:
    """A task has ended as "done", "error" or "cancelled"; the first finish of an attempt counts."""

    task_id: int
    status: str
    finished_at: str
    result: str | None = None
    message: str = ""


@dataclass(frozen=True)
class MsgExecute:
    """One SQL statement for the writer; with `many`, `params` is a sequence of parameter rows."""

    sql: str
    params: Any = ()
    many: bool = False


TaskDef = DemoTask = Task
MsgTaskStart, MsgTaskFinish = MsgTaskStarted, MsgTaskFinished
SENTINEL = object()  # asks a writer to commit what it has and stop; known by identity


def _now() -> str:
    """ISO 8601 text in UTC; most of it is the same for a whole second, and kept."""
    global _second
    second, micro = divmod(time.time_ns() // 1000, 1_000_000)
    if second != _second[0]:
        _second = second, datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{_second[1]}.{micro:06}+00:00"


_second = (0, "")


def _describe(error: BaseException) -> str:
    """The type and text of an exception, even of one whose own `__str__` raises."""
    try:
        text = str(error)
    except BaseException:
        text = "(its text cannot be shown)"
    text = text if len(text) < 5_000 else f"{text[:5_000]}..."  # it may hold a whole response, or file
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(value: object) -> str:
    """Any value as text that SQLite can hold: lone surrogates (undecodable file names) are escaped."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _result_text(value: object) -> str | None:
    """A task's result as it is stored: text as it is, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value if value is None else _text(value)
    import json

    return json.dumps(value, default=str)


def _time_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else _text(value)


def _task_id(value: object) -> int:
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise MessageRefused(
            f"task_id {value!r} cannot be stored: expected a whole number of at most 64 bits; "
            "number the tasks, or leave task_id out and pipeloom numbers them"
        )
    return number


def _checked_started(m: MsgTaskStarted) -> MsgTaskStarted:
    return MsgTaskStarted(_task_id(m.task_id), _text(m.name), _time_text(m.started_at))


def _checked_progress(m: MsgTaskProgress) -> MsgTaskProgress:
    """Clamp what is plain (a step beyond its total, a total that is unknown); refuse what is no number."""
    if (
        type(m) is MsgTaskProgress
        and type(m.step) is type(m.total) is type(m.task_id) is int
        and 0 <= m.step <= m.total < 2**53
        and -(2**63) <= m.task_id < 2**63
        and type(m.message) is str
        and m.message.isascii()
    ):
        return m  # as nearly all are, and there may be millions
    try:
        step, total = float(m.step), float(m.total or 0)
    except (TypeError, ValueError, OverflowError):
        step = total = float("nan")
    if not (step - step == 0 == total - total):  # only finite numbers are
        raise MessageRefused(
            f"progress {m.step!r} of {m.total!r} cannot be stored: expected two finite numbers; "
            "use a total of 0 where it is not known"
        )
    step, total = max(step, 0), max(total, 0)
    return MsgTaskProgress(_task_id(m.task_id), min(step, total) if total else step, total, _text(m.message))


def _checked_finished(m: MsgTaskFinished) -> MsgTaskFinished:
    if m.status not in FINAL:
        raise MessageRefused(f"status {m.status!r} is unknown: expected 'done', 'error' or 'cancelled'")
    return MsgTaskFinished(
        _task_id(m.task_id),
        str(m.status),
        _time_text(m.finished_at),
        _result_text(m.result),
        _text(m.message),
    )


def _checked_execute(m: MsgExecute) -> MsgExecute:
    if not isinstance(m.sql, str):
        raise MessageRefused(f"sql {m.sql!r} cannot be run: expected a str")
    if m.many:
        return MsgExecute(m.sql, _rows(m.params), True)
    return MsgExecute(m.sql, _row(m.params))


def _check_own(message: Any) -> None:
    """A handler may get a message again, when the batch that it came in is replayed without a bad one."""
    for name, value in getattr(message, "__dict__", {}).items():
        if hasattr(type(value), "__next__"):
            raise MessageRefused(
                f"{type(message).__name__}.{name} is an iterator, of which a handler that runs again would "
                "find nothing left; send a list"
            )


def _row(params: Any) -> Any:
    """A copy of one row of parameters: the worker may use its list or dict again."""
    return dict(params) if isinstance(params, Mapping) else tuple(params)


def _rows(rows: Iterable[Any]) -> list[Any]:
    return [row if type(row) is tuple else _row(row) for row in rows]


CHECKS: dict[type, Callable[[Any], Any]] = {
    MsgTaskStarted: _checked_started,
    MsgTaskProgress: _checked_progress,
    MsgTaskFinished: _checked_finished,
    MsgExecute: _checked_execute,
}


# ---- Database: how the file is opened, what it holds, which errors pass by themselves ------------------

COLUMNS = {  # of task_runs; the first eight are the original pipeloom's
    "id": "INTEGER PRIMARY KEY",
    "name": "TEXT NOT NULL",
    "status": "TEXT NOT NULL",  # queued | running | done | error | cancelled
    "progress": "REAL NOT NULL DEFAULT 0.0",  # a fraction, 0..1
    "message": "TEXT",
    "started_at": "TEXT",
    "finished_at": "TEXT",
    "result": "TEXT",
    "attempts": "INTEGER",
    "run_id": "INTEGER",
    "traceback": "TEXT",
}
_NAMES = ", ".join(COLUMNS)
CREATE_TASKS = "CREATE TABLE IF NOT EXISTS task_runs({})".format(
    ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
)
CREATE_RUNS = """CREATE TABLE IF NOT EXISTS pipeline_runs(
    id INTEGER PRIMARY KEY, started_at TEXT, finished_at TEXT, status TEXT, host TEXT, pid INTEGER,
    version TEXT, done INTEGER, error INTEGER, cancelled INTEGER, skipped INTEGER)"""
INSERT_TASKS = f"INSERT INTO task_runs({_NAMES}) VALUES "
# No REPLACE, which would fire ON DELETE CASCADE of a user's own tables.
OR_UPDATE = " ON CONFLICT(id) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS)
INSERT_THEN_UPDATE = (  # for SQLites before 3.24, a row at a time
    f"INSERT OR IGNORE INTO task_runs({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))})",
    f"UPDATE task_runs SET {', '.join(f'{name} = ?{n}' for n, name in enumerate(COLUMNS, 1))} WHERE id = ?1",
)
LOAD_TASK = f"SELECT {_NAMES} FROM task_runs WHERE id = ?"
INDEX_NAMES = "CREATE INDEX IF NOT EXISTS task_runs_name ON task_runs(name)"  # once there are old names
FIND_NAME = "SELECT id, status FROM task_runs WHERE name = ? AND id > ? AND id <= ? ORDER BY id LIMIT 2"
FIND_ID = "SELECT id, status, run_id FROM task_runs WHERE id = ?"
FORGET = "DELETE FROM task_runs WHERE name = ? AND status = 'cancelled'"
START_RUN = (
    "INSERT INTO pipeline_runs(started_at, status, host, pid, version, done, error, cancelled, skipped)"
    " VALUES (?, 'running', ?, ?, ?, 0, 0, 0, 0)"
)
FINISH_RUN = (
    "UPDATE pipeline_runs SET finished_at = ?, status = ?, done = ?, error = ?, cancelled = ?, skipped = ?"
    " WHERE id = ?"
)
HOLDER = "SELECT pid, host, started_at FROM pipeline_runs WHERE status = 'running' ORDER BY id DESC LIMIT 1"
MARK_INTERRUPTED = (  # what a run that died left behind
    "UPDATE task_runs SET status = 'cancelled', message = 'interrupted', finished_at = ?"
    " WHERE status IN ('queued', 'running')",
    "UPDATE pipeline_runs SET status = 'cancelled', finished_at = ? WHERE status = 'running'",
)
CANCEL_QUEUED = (
    "UPDATE task_runs SET status = 'cancelled', message = ?, finished_at = ?"
    " WHERE run_id = ? AND status IN ('queued', 'running')"
)
UPSERTS = sqlite3.sqlite_version_info >= (3, 24)
# In one statement. SQLites before 3.32 take 999, and those before 3.8.8 no more than 500 rows.
VARIABLES = 3_000 if sqlite3.sqlite_version_info >= (3, 32) else 999 if UPSERTS else 500

# The codes of errors that may pass: BUSY LOCKED NOMEM INTERRUPT IOERR FULL CANTOPEN, and their texts for
# Pythons before 3.11, which do not tell the code.
PASSING_CODES = frozenset({5, 6, 7, 9, 10, 13, 14})
PASSING_TEXTS = (
    "database is locked", "database table is locked", "database schema is locked", "out of memory",
    "interrupted", "disk i/o error", "database or disk is full", "unable to open database file",
)  # fmt: skip


def _is_passing(error: BaseException) -> bool:
    if not isinstance(error, sqlite3.OperationalError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in PASSING_CODES
    return str(error).lower().startswith(PASSING_TEXTS)


def _is_disk(error: BaseException) -> bool:
    """Whether it may pass and can hit any statement; a lock meets only those that begin or end."""
    return _is_passing(error) and not _is_lock(error) and "unable to open" not in str(error)


def _is_lock(error: BaseException) -> bool:
    return "locked" in str(error)


def _is_corrupt(error: BaseException) -> bool:
    """Whether the file itself is damaged: nobody should write on."""
    texts = "database disk image is malformed", "file is not a database"
    return isinstance(error, sqlite3.DatabaseError) and str(error).startswith(texts)


def connect(db_path: object, *, wal: bool = True) -> sqlite3.Connection:
    """A connection of your own, for the thread that calls; it waits up to 60 s for a lock.

    A run needs none: its writer has one. For reading beside a run, `ctx.connect()` is the better choice.
    """
    return _open(db_path, wal=wal, timeout=60.0, isolation_level="")


def _open(db_path: object, *, wal: bool, timeout: float, isolation_level: str | None) -> sqlite3.Connection:
    path = os.fspath(db_path)  # type: ignore[call-overload]
    conn = sqlite3.connect(path, timeout=timeout, isolation_level=isolation_level)  # type: ignore[arg-type]
    try:
        wanted = "MEMORY" if path == ":memory:" else "WAL" if wal else "DELETE"
        got = conn.execute(f"PRAGMA journal_mode={wanted}").fetchone()[0]
        if got.upper() != wanted:
            logger.warning("database %r: journal mode is %s, as %s is not to be had here", path, got, wanted)
        conn.execute("PRAGMA synchronous=NORMAL")
        conn.execute("PRAGMA foreign_keys=ON")
    except BaseException:
        conn.close()
        raise
    return conn


def _connect_readonly(db_path: str, timeout: float = 5.0, idle: bool = False) -> sqlite3.Connection:
    """A connection that can neither change nor create the file. Odd characters in the path are quoted.

    `idle` says that nobody has the database open; then no side file is left behind either.
    """
    from urllib.parse import quote

    path = quote(os.path.abspath(db_path).replace(os.sep, "/"))
    uri = f"file:{path if path.startswith('/') else '/' + path}?mode=ro{'&immutable=1' if idle else ''}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, factory=_Reader)


class _Reader(sqlite3.Connection):
    """A connection whose `with` block closes it."""

    def __exit__(self, *_: Any) -> Any:
        self.close()


def init_schema(conn: sqlite3.Connection, *, store_task_status: bool) -> None:
    """Create task_runs and pipeline_runs, or complete those of the original pipeloom. Idempotent.

    With `store_task_status=False` it does nothing. Raises DatabaseError where task_runs is of another shape.
    """
    if not store_task_status:
        return
    conn.execute(CREATE_TASKS)
    conn.execute(CREATE_RUNS)
    for name in _missing_columns(conn):
        conn.execute(f"ALTER TABLE task_runs ADD COLUMN {name} {COLUMNS[name]}")
    if conn.in_transaction and conn.isolation_level is not None:
        conn.commit()  # the caller's connection is one that opens transactions by itself


def _missing_columns(conn: sqlite3.Connection) -> list[str]:
    """Which columns a task_runs table lacks; none where there is no such table."""
    found = {row[1]: row for row in conn.execute("PRAGMA table_info(task_runs)")}
    missing = [name for name in COLUMNS if found and name not in found]
    if "id" in found and (found["id"][2].upper(), found["id"][5]) != ("INTEGER", 1):
        missing.insert(0, "id INTEGER PRIMARY KEY")
    if set(missing) - set(list(COLUMNS)[8:]):
        path = next((row[2] for row in conn.execute("PRAGMA database_list") if row[1] == "main"), "")
        raise DatabaseError(
            path,
            f"has a table task_runs of another shape: it lacks {', '.join(missing)}",
            "rename that table or use another file",
        )
    return missing


def wal_checkpoint(conn: sqlite3.Connection, mode: str = "TRUNCATE") -> None:
    """Move the WAL into the database file; readers in the way leave it as it is, which is harmless."""
    if mode.upper() not in ("PASSIVE", "FULL", "RESTART", "TRUNCATE"):
        raise UsageError(f"checkpoint mode {mode!r} is unknown: expected PASSIVE, FULL, RESTART or TRUNCATE")
    conn.commit()
    conn.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one at a time: executescript would commit the open transaction."""
    statement = ""
    for piece in re.split("(;)", script):
        statement += piece
        if piece == ";" and sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if _has_sql(statement):
        yield statement


def _has_sql(text: str) -> bool:
    return bool(re.sub(r"--[^\n]*|/\*.*?\*/", "", text, flags=re.S).strip(" \t\r\n;"))


def _check_database(path: str) -> None:
    """Find out before anything is written whether `path` can be this run's database."""
    if path == ":memory:":
        return
    if not path or "\0" in path:
        raise DatabaseError(path, "is no file name", "name a file")
    parent = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise DatabaseError(path, "is a directory", "name a file in it")
    if not os.path.isdir(parent):
        raise DatabaseError(path, f"cannot be made: there is no directory {parent!r}", "create that first")
    target = path if os.path.exists(path) else parent
    if not os.access(target, os.W_OK) or not os.access(parent, os.W_OK):
        raise DatabaseError(path, "cannot be written", f"change the permissions of {target!r} or use another")
    if os.path.exists(path) and not os.path.isfile(path):
        raise DatabaseError(path, "is no regular file", "name a file")
    if os.path.exists(path):
        if os.stat(path).st_nlink > 1:
            what = "has another name, a hard link; SQLite keeps a journal for each, and we a lock"
            raise DatabaseError(path, what, "remove that, make it a symbolic link or use a copy")
        _check_contents(path)


def _check_contents(path: str) -> None:
    conn = _connect_readonly(path, timeout=0.25)
    try:
        _missing_columns(conn)
    except sqlite3.DatabaseError as error:
        # A lock is waited out later, by the writer; and what a killed run left half-written, it rolls back.
        if not _is_passing(error) and "readonly" not in str(error):
            raise DatabaseError(path, f"cannot be read: {error}", "restore it or use another file") from error
    finally:
        conn.close()


class _RunLock:
    """One run per database: an exclusive transaction on an empty side file, for as long as the run lasts.

    That is a lock of the kernel's, on every system that SQLite knows, which ends with the process however
    that ends and which no forked child inherits. The file stays: to remove it would race with the next run.
    To be made and released by the thread that runs the pipeline.
    """

    def __init__(self, db_path: str) -> None:
        self._conn: sqlite3.Connection | None = None
        self.path = ""
        if db_path == ":memory:":
            return
        self.path = os.path.realpath(db_path) + "-lock"
        try:
            self._conn = sqlite3.connect(self.path, timeout=0.2, isolation_level=None)
            self._conn.execute("PRAGMA journal_mode=MEMORY")  # else there is a -journal beside it
            self._conn.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            self.release()
            if _is_lock(error):
                raise RunInProgress(db_path, _holder(db_path)) from None
            cure = "give its owner's rights to whoever runs this, or use a database elsewhere"
            raise DatabaseError(db_path, f"has a lock {self.path!r} that gives {error}", cure) from error

    @staticmethod
    def is_held(db_path: str) -> bool:
        """Whether a run has the database. For readers: takes nothing that a run would meet for long."""
        try:
            with _connect_readonly(os.path.realpath(db_path) + "-lock", timeout=0) as conn:
                conn.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            return _is_lock(error)
        return False

    def release(self) -> None:
        if self._conn is not None:
            self._conn.close()


def _holder(db_path: str) -> str:
    try:
        conn = _connect_readonly(db_path)
        try:
            row = conn.execute(HOLDER).fetchone()
        finally:
            conn.close()
    except sqlite3.Error:  # it is about to be made, or keeps no status
        row = None
    return "process {} on {}, since {}".format(*row) if row else "another run"


# ---- Channel: the bounded way from the workers to the writer -------------------------------------------


class Channel:
    """A bounded way to its one reader, the writer, which takes all that is there at once.

    Where all is well put() takes no lock that others want: many busy threads at one lock hand the processor
    on with every message. `_items` is a deque, whose ends are safe without one; who has put looks whether the
    reader waits, and the reader looks at `_items` once more after it has said so. The lock is for those who
    wait: producers at `_room`, which drain() and fail() announce, the writer at `_mail`, which put() and
    close() announce. fail() ends every wait for good.
    """

    def __init__(self, limit: int = 4_000) -> None:
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._mail = threading.Condition(self._lock)
        self._items: deque[Item] = deque()
        self._rows = 0  # in the messages, which count as well: what waits here stays small
        self._limit = limit
        self._reader_waits = False
        self._closed = False
        self.failure: BaseException | None = None

    def put(
        self, sender: TaskContext | None, message: Any, rows: int = 0, last: bool = False, wait: bool = True
    ) -> bool:
        """Hand over a message, waiting while the channel is full; False if the sender is closed.

        `last` closes the sender with this message, in one step: whoever comes first (the worker, or a
        second Ctrl-C) decides how the attempt ends. Raises WriterFailed once the writer has.
        """
        if wait and self._is_full():
            self._wait_for_room()
        if self.failure is not None:
            raise self.failure
        if rows:
            with self._lock:
                self._rows += rows  # too many, if the sender is closed; see _is_full
        if sender is None:
            self._items.append((None, message))
        else:
            with sender.lock:
                if sender.closed:
                    return False
                sender.closed = last
                self._items.append((sender, message))
        if self._reader_waits:
            with self._lock:
                self._reader_waits = False
                self._mail.notify()
        return True

    def _is_full(self) -> bool:
        """Never without an item: it is for these that the writer comes, and then forgets the rows."""
        items = len(self._items)
        return items > 0 and items + self._rows >= self._limit

    def _wait_for_room(self) -> None:
        with self._lock:
            while self._is_full() and self.failure is None:
                self._room.wait(0.5)

    def drain(self) -> list[Item] | None:
        """Everything there is, waiting for the first message; None at the end."""
        with self._lock:
            while not self._items or self.failure is not None:
                if self._closed or self.failure is not None:
                    return None
                self._reader_waits = True
                if not self._items:
                    self._mail.wait()  # ended by close() or fail(), which the run calls however it ends
            self._reader_waits = False
            items = [self._items.popleft() for _ in range(len(self._items))]
            self._rows = 0
            self._room.notify_all()
            return items

    def close(self) -> None:
        """Nothing more will be put; drain() gives what is there, then None."""
        with self._lock:
            self._closed = True
            self._mail.notify()

    def fail(self, error: BaseException) -> None:
        """The reader is gone: every waiting and every later put() raises `error`."""
        with self._lock:
            self.failure = self.failure or error
            self._items.clear()
            self._room.notify_all()
            self._mail.notify()


class _QueueChannel:
    """A plain queue.Queue as SQLiteWriter's user made it, read like a channel; SENTINEL ends it."""

    def __init__(self, source: Any, limit: int = 10_000) -> None:
        self._source = source
        self._limit = limit
        self._taken = 0
        self._ended = False

    def drain(self) -> list[Item] | None:
        self._settle()
        items: list[Item] = []
        while len(items) < self._limit and not self._ended:
            try:
                message = self._source.get(block=not items)
            except queue.Empty:
                break
            self._taken += hasattr(self._source, "task_done")
            if message is SENTINEL:
                self._ended = True
            else:
                items.append((None, message))
        if self._ended and not items:
            self._settle()
            return None
        return items

    def _settle(self) -> None:
        """What was drained is committed, or refused: only now is it done for queue.join()."""
        for _ in range(self._taken):
            self._source.task_done()
        self._taken = 0

    def fail(self, error: BaseException) -> None:
        """The writer is done for: take and refuse what still comes, so that no producer blocks."""
        while self.drain() is not None:
            pass


# ---- Writer: the only code that writes SQLite; what it drained is one transaction ----------------------

REFERENCES_TASKS = "SELECT 1 FROM sqlite_master WHERE sql LIKE '%references%task_runs%'"
BEGIN = "BEGIN IMMEDIATE -- pipeloom"  # the comments keep these apart from a handler's own COMMIT
COMMIT = "COMMIT -- pipeloom"
ROLLBACK = "ROLLBACK -- pipeloom"
DISK_PATIENCE = 10.0  # seconds that a full or failing disk is waited for; a lock: `busy_timeout`
_NAME = r"""(?:\w+|"[^"?]+"|`[^`?]+`|\[[^\]?]+\])"""
INSERT_VALUES = re.compile(  # the plain form only, which means the same with several rows
    rf"(?P<head>\s*(?:INSERT|REPLACE)(?:\s+OR\s+\w+)?\s+INTO\s+{_NAME}(?:\s*\.\s*{_NAME})?"
    rf"(?:\s*\(\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\))?\s*VALUES\s*)"
    r"(?P<row>\(\s*\?(?:\s*,\s*\?)*\s*\))(?P<tail>\s*;?\s*|\s*ON\s+CONFLICT\b[^?]*)$",
    re.IGNORECASE,
)
MANY = re.compile(r"\s*(?:INSERT|UPDATE|DELETE|REPLACE)\b(?!.*\bRETURNING\b)", re.IGNORECASE | re.DOTALL)


class _BadMessage(Exception):
    """A message cannot be applied, for the reason that it holds; the batch is to be taken without it."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


STARTED = object()  # the engine's: the attempt that sends it has started, at its started_at


class _TaskRow:
    """A row of task_runs as the next commit will write it."""

    __slots__ = tuple(COLUMNS)

    def __init__(
        self,
        id: int,
        name: str,
        status: str,
        progress: float = 0.0,
        message: str = "",
        started_at: str | None = None,
        finished_at: str | None = None,
        result: str | None = None,
        attempts: int | None = 0,
        run_id: int | None = None,
        traceback: str | None = None,
    ) -> None:
        self.id, self.name, self.status, self.progress, self.message = id, name, status, progress, message
        self.started_at, self.finished_at, self.result = started_at, finished_at, result
        self.attempts, self.run_id, self.traceback = attempts, run_id, traceback


_row_values = attrgetter(*COLUMNS)


class SQLiteWriter(threading.Thread):
    """The thread that owns the SQLite connection: it applies the messages of `msg_q` and commits them.

    A run makes its own. It also works alone on a plain queue.Queue: start(), put messages, put SENTINEL,
    join(), which raises what made the writer fail, if anything did. Override `handle(message)` in a
    subclass to apply messages of your own to `self.conn`; call super().handle() for the others. `handle`
    runs in this thread, inside a transaction, and again for the same message where that is replayed.
    """

    def __init__(
        self,
        db_path: object,
        msg_q: Any,
        *,
        wal: bool = True,
        store_task_status: bool = True,
        task_progress: Any = None,
        task_bar_map: Mapping[int, Any] | None = None,
        schema: str | None = None,
        handlers: Mapping[type, Handler] | None = None,
        busy_timeout: float = 300.0,
        durable: bool = False,
    ) -> None:
        super().__init__(name="pipeloom-writer", daemon=True)
        self.db_path = os.fspath(db_path)  # type: ignore[call-overload]
        self.path = self.db_path  # the same for whoever changes the directory
        if self.db_path != ":memory:":
            self.path = os.path.abspath(self.db_path)
        self.msg_q = msg_q
        self.wal = wal
        self.store = store_task_status
        self.schema = schema or ""
        self.durable = durable
        self.busy_timeout = busy_timeout
        self.display: Any = _TaskBars(task_progress, task_bar_map or {}) if task_progress else None
        self.run_of: _Run | None = None  # the engine whose writer this is
        self.run_id: int | None = None
        self.index_names = False  # where tasks are known by their names
        self.last_id = -(2**63)  # the highest id that is committed in task_runs: what is above it is new
        self.conn: sqlite3.Connection = None  # type: ignore[assignment]
        self.error: BaseException | None = None
        self.opened = threading.Event()  # set once the database is open, or `error` says why not
        self.hurried = False  # set, by a signal handler too, to end the wait for a lock or a disk
        self._channel = msg_q if isinstance(msg_q, Channel) else _QueueChannel(msg_q)
        self.files: dict[str, os.stat_result] = {}  # the database and its lock, as they were opened
        self._handles_all = type(self).handle is SQLiteWriter.handle  # no subclass wants to see messages
        self._defers = False  # somebody references task_runs, whose rows are written last
        self._ours = False  # a transaction statement is the writer's own; see _authorize
        self._rows: dict[int, _TaskRow] = {}  # committed rows of tasks that run
        self._forget_transaction()
        self._sender: TaskContext | None = None  # of the message being handled
        self._apply_by_type: dict[type, Callable[[Any], object]] = {
            MsgTaskStarted: self._on_started,
            MsgTaskProgress: self._on_progress,
            MsgTaskFinished: self._on_finished,
            MsgExecute: self._on_execute,
        }
        self._add_handlers(handlers or {})

    def _add_handlers(self, handlers: Mapping[type, Handler]) -> None:
        if not isinstance(handlers, Mapping):
            raise UsageTypeError(f"handlers={handlers!r}: expected a mapping of message classes to functions")
        for kind, handler in handlers.items():
            self._add_handler(kind, handler)

    def _add_handler(self, kind: type, handler: Handler) -> None:
        if not isinstance(kind, type) or not callable(handler):
            raise UsageTypeError(f"handlers= maps message classes to functions, not {kind!r} to {handler!r}")
        if kind in self._apply_by_type:
            raise UsageError(
                f"handlers= names {kind.__name__}, which the writer handles itself; "
                "subclass SQLiteWriter and override handle() to see those messages too"
            )
        self._apply_by_type[kind] = lambda message: handler(self.conn, message)

    def handles(self, kind: type) -> bool:
        """Whether there is a handler for this very class."""
        return kind in self._apply_by_type

    def accepts(self, kind: type) -> bool:
        """Whether messages of this class have somebody who applies them. Any thread may ask."""
        return not self._handles_all or any(base in self._apply_by_type for base in kind.__mro__)

    # The thread. Whatever goes wrong in it ends in `error`, and the channel then refuses its producers.

    def run(self) -> None:
        """The thread's life: open, commit batch after batch, close."""
        try:
            if self.run_of is None:  # a run has done so
                _check_database(self.db_path)
            self._patiently(self._open)
            self.opened.set()
            while True:
                batch = self._channel.drain()
                if batch is None:
                    break
                if batch:
                    self._store(batch)
            self.check_files()
            self._checkpoint()
        except BaseException as error:
            self.error = self._failure(error)
            logger.debug("the writer failed", exc_info=True)
        finally:
            self._close()
            self.opened.set()
            if self.error is not None:
                if self.run_of is None:
                    logger.error("%s", self.error)
                self._channel.fail(self.error)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, `timeout` seconds at most; raises what made the writer fail."""
        super().join(timeout)
        if self.error is not None and not self.is_alive():
            raise self.error

    def _failure(self, error: BaseException) -> BaseException:
        opening = not self.opened.is_set()
        if isinstance(error, _BadMessage):
            error = _reason(error.reason)
        try:
            self.check_files()
        except WriterFailed as moved:
            error = moved
        if isinstance(error, WriterFailed) or (opening and isinstance(error, PipeloomError)):
            return error
        if opening and isinstance(error, sqlite3.Error):
            return DatabaseError(self.db_path, f"cannot be used: {error}", "restore it or use another file")
        cure = "restore a copy of it or use another file" if _is_corrupt(error) else "mend the cause"
        failure = WriterFailed(self.db_path, _describe(error), f"{cure}, then run again")
        failure.__cause__ = error
        return failure

    def check_files(self) -> None:
        """The names must still be those of the open files: SQLite would not notice, and write on."""
        for path, opened in self.files.items():
            try:
                if os.path.samestat(opened, os.stat(path)):
                    continue
            except OSError:
                pass
            raise WriterFailed(
                self.db_path,
                f"{path!r} was deleted, moved or replaced during the run",
                "let nobody touch the database and its lock, then run again",
            )

    def _close(self) -> None:
        conn, self.conn = self.conn, None  # type: ignore[assignment]
        if conn is not None:
            conn.close()

    def _checkpoint(self) -> None:
        try:
            wal_checkpoint(self.conn)  # without WAL it does nothing
        except sqlite3.Error:  # the next opening reads the WAL as well
            logger.debug("the last checkpoint failed", exc_info=True)

    # Opening, in one transaction: a script that fails leaves nothing behind.

    def _open(self) -> None:
        self._close()
        self.conn = _open(self.path, wal=self.wal, timeout=0.25, isolation_level=None)
        if self.durable:
            self.conn.execute("PRAGMA synchronous=FULL")
        self.conn.set_authorizer(self._authorize)
        self._own(BEGIN)
        init_schema(self.conn, store_task_status=self.store)
        self._run_schema()
        self._defers = self.conn.execute(REFERENCES_TASKS).fetchone() is not None
        if self.store:
            last_id = self.conn.execute("SELECT max(id) FROM task_runs").fetchone()[0]
            if last_id is not None:
                self.last_id = last_id
                if self.index_names:
                    self.conn.execute(INDEX_NAMES)
            if self.run_of is not None:
                self._start_run()
        self._own(COMMIT)
        # Only now, as the index of millions of old names is not to be made in memory.
        self.conn.execute("PRAGMA cache_spill=OFF")  # so that a reader's lock is met at COMMIT only
        if self.path != ":memory:":
            self.files[self.path] = os.stat(self.path)

    def _run_schema(self) -> None:
        for statement in _statements(self.schema):
            try:
                self.conn.execute(statement)
            except sqlite3.Error as error:
                if _is_passing(error):
                    raise
                raise UsageError(f"schema= failed: {error}, in {statement.strip()!r}; mend it") from error

    def _start_run(self) -> None:
        import socket

        if self.conn.execute("SELECT 1 FROM pipeline_runs WHERE status = 'running'").fetchone() or (
            not self.conn.execute("SELECT 1 FROM pipeline_runs").fetchone()  # the original's, perhaps
        ):
            for statement in MARK_INTERRUPTED:
                self.conn.execute(statement, (_now(),))
        row = (_now(), socket.gethostname(), os.getpid(), __version__)
        self.run_id = self.conn.execute(START_RUN, row).lastrowid

    def _authorize(self, action: int, what: str | None, *_: object) -> int:
        """A handler's own BEGIN, COMMIT and `with conn:` do nothing: the transaction is the writer's."""
        if action != sqlite3.SQLITE_TRANSACTION or self._ours:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY if what == "ROLLBACK" else sqlite3.SQLITE_IGNORE

    def _own(self, statement: str) -> None:
        self._ours = True
        try:
            self.conn.execute(statement)
        finally:
            self._ours = False

    # One batch, one transaction

    def _store(self, batch: list[Item]) -> None:
        """Commit a batch; one with a bad message in it in halves, until that message is alone."""
        bad: BaseException | None = None
        try:
            self._patiently(self._transaction, batch)
        except Exception as error:
            if isinstance(error, WriterFailed) or _is_corrupt(error):
                raise
            bad = error.reason if isinstance(error, _BadMessage) else error
        if bad is None:
            self._acknowledge()
        elif len(batch) > 1:
            self._store(batch[: len(batch) // 2])
            self._store(batch[len(batch) // 2 :])
        else:
            self._reject(*batch[0], _reason(bad))

    def _reject(self, sender: TaskContext | None, message: Any, error: BaseException) -> None:
        """A message cannot be stored: its task ends as `error`, and nobody else notices."""
        if type(message) is partial:
            raise error
        if sender is None:
            logger.error("message refused: %s, in %.200r", _describe(error), message)
            return
        sender.record(error)
        finish = MsgTaskFinished(sender.task_id, ERROR, _now(), None, _text(_describe(error)))
        self._patiently(self._transaction, [(sender, finish)])
        sender.rejected = sender.closed = True
        sender.cancel(f"refused: {_describe(error)}")
        self._acknowledge()

    def _patiently(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step until it works: a lock or a full disk that passes costs time and nothing else."""
        began = time.monotonic()
        warned = False
        while True:
            try:
                return step(*args)
            except Exception as error:
                if self.conn is not None and self.conn.in_transaction:
                    self._own(ROLLBACK)
                if not _is_passing(error):
                    raise
                waited = time.monotonic() - began
                patience = self.busy_timeout if _is_lock(error) else min(DISK_PATIENCE, self.busy_timeout)
                if waited >= patience or self.hurried:
                    raise self.out_of_patience(error, waited) from error
                if not warned and waited > 0.5:
                    warned = True
                    logger.warning(
                        "database %r: %s; waiting up to %g s for that to pass", self.db_path, error, patience
                    )
            time.sleep(0.05)

    def out_of_patience(self, error: BaseException, waited: float) -> WriterFailed:
        cure = (
            "end the program that holds it, or pass a longer busy_timeout="
            if _is_lock(error)
            else "make room on the disk or mend it"
        )
        return WriterFailed(self.db_path, f"{error}, still after {waited:.1f} s", f"{cure}, then run again")

    def _transaction(self, batch: list[Item]) -> None:
        # 1. Forget what an earlier try meant to do.
        self._forget_transaction()
        # 2. Apply every message: rows of the user's own now, task rows in memory.
        self._own(BEGIN)
        if self._defers:
            self.conn.execute("PRAGMA defer_foreign_keys=ON")
        for sender, message in batch:
            try:
                self._apply(sender, message)
            except BaseException as error:  # a handler's SystemExit too
                if isinstance(error, WriterFailed) or _is_disk(error) or _is_corrupt(error):
                    raise
                raise _BadMessage(error) from None
        # 3. Write each task's row once, however many messages it had, and commit.
        if self.store and self._pending:
            self._write_task_rows()
        self.check_files()
        self._own(COMMIT)

    def _forget_transaction(self) -> None:
        self._pending: dict[int, _TaskRow] = {}  # task rows that this transaction writes
        self._news: dict[tuple[int, type], Any] = {}  # what the display is told after the commit
        self._settled: list[tuple[TaskContext, str, str]] = []  # and the engine: context, status, message

    def _apply(self, sender: TaskContext | None, message: Any) -> None:
        self._sender = sender
        kind = type(message)
        if sender is not None:
            if sender.rejected:
                return  # a message of this attempt was bad, and that has ended it
            if message is None:  # progress: only the newest counts, and the context has it
                sender.has_news = False
                message = sender.news
            elif message is STARTED:
                if self._handles_all and self.display is None:  # nobody needs a message
                    id, at, attempt = sender.task_id, sender.started_at, sender.attempt
                    self._pending[id] = _TaskRow(
                        id, sender.name, RUNNING, started_at=at, attempts=attempt, run_id=self.run_id
                    )
                    return
                message = MsgTaskStarted(sender.task_id, sender.name, sender.started_at)
            elif kind is MsgTaskFinished and message.task_id == sender.task_id:
                if message.status == DONE:
                    for held in sender.held:
                        self._hand_over(held)
                if self._handles_all:
                    self._finish(message, sender)
                    return
                self._hand_over(message)
                self._check_settled(sender)
                return
        elif kind is partial and self.run_of is not None:  # one of the engine's orders
            message()
            return
        elif kind in CHECKS:  # from a plain queue, whose put() checks nothing
            message = CHECKS[kind](message)
        self._hand_over(message)

    def _hand_over(self, message: Any) -> None:
        self.handle(message)
        if not self.conn.in_transaction:  # OR ROLLBACK, and a handler that caught the error of it
            raise MessageRefused(
                "the transaction was rolled back under the handler; let its exception through"
            )

    def _check_settled(self, sender: TaskContext) -> None:
        """Its finish was applied: the run would wait for ever for one that a subclass keeps to itself."""
        if not self._settled or self._settled[-1][0] is not sender:
            what = f"{type(self).__name__}.handle() ignores that a task has ended"
            cure = "call super().handle(message) for every message that is not your own"
            raise WriterFailed(self.db_path, what, cure)

    def _acknowledge(self) -> None:
        """The batch is committed: only now may anybody see it or act upon it."""
        for id, row in self._pending.items():
            if row.status == RUNNING or (row.status == QUEUED and row.attempts):  # that waits for its retry
                self._rows[id] = row
            else:
                self._rows.pop(id, None)
        self.last_id = max(self.last_id, max(self._pending, default=self.last_id))
        if self.display is not None:
            self._show()
        if self.run_of is not None and self._settled:
            self.run_of.settle(self._settled)
        self._forget_transaction()

    def _show(self) -> None:
        try:
            for message in self._news.values():
                self.display.update(message)
        except BaseException as error:  # a display never harms the run
            self.display = None
            logger.warning("the progress display failed and is off: %s", _describe(error))

    # Messages

    def handle(self, message: Any) -> None:
        """Apply one message to `self.conn`. To override; an exception fails the message's task only."""
        try:
            apply = self._apply_by_type[type(message)]
        except KeyError:
            apply = self._inherited(type(message))
        apply(message)

    def _inherited(self, kind: type) -> Callable[[Any], object]:
        for base in kind.__mro__:
            if base in self._apply_by_type:
                self._apply_by_type[kind] = self._apply_by_type[base]
                return self._apply_by_type[kind]
        raise _unknown(kind)

    def _row(self, message: Any) -> _TaskRow | None:
        """The row of a message's task, as this transaction has it or as a commit left it."""
        id = message.task_id
        row = self._pending.get(id)
        if row is None:
            known = self._rows.get(id)
            found = None if known is None else _row_values(known)
            if found is None and id <= self.last_id and self.store and self._own_sender(message) is None:
                cursor = self.conn.cursor()
                cursor.row_factory = None  # a handler may have set the connection's
                found = cursor.execute(LOAD_TASK, (id,)).fetchone()
            if found is not None:
                row = self._pending[id] = _TaskRow(*found)
        return row

    def _row_or_new(self, message: Any) -> _TaskRow:
        """The same; one that was never started gets a row all the same."""
        row, id = self._row(message), message.task_id
        if row is None:
            sender = self._own_sender(message)
            name, attempts = (sender.name, sender.attempt - 1) if sender else (f"task-{id}", 0)
            row = self._pending[id] = _TaskRow(id, name, QUEUED, attempts=attempts, run_id=self.run_id)
        return row

    def _own_sender(self, message: Any) -> TaskContext | None:
        """The attempt that a message is about, if its own worker sent it."""
        return self._sender if self._sender and self._sender.owns(message) else None

    def _on_started(self, m: MsgTaskStarted) -> None:
        sender, row = self._own_sender(m), self._row(m)
        if row is not None and sender is not None and row.status == RUNNING:
            row.name, row.started_at = m.name, m.started_at  # the worker repeats what the engine has said
        else:
            attempts = sender.attempt if sender else (row.attempts or 0) + 1 if row else 1
            self._pending[m.task_id] = _TaskRow(
                m.task_id, m.name, RUNNING, 0.0, "", m.started_at, None, None, attempts, self.run_id
            )
        self._news[m.task_id, MsgTaskStarted] = m

    def _on_progress(self, m: MsgTaskProgress) -> None:
        row = self._row_or_new(m)
        if row.status in FINAL:
            return  # late: the task's finish counts
        row.status = RUNNING
        if m.total:
            row.progress = m.step / m.total
        row.message = m.message
        self._news[m.task_id, MsgTaskProgress] = m

    def _on_finished(self, m: MsgTaskFinished) -> None:
        self._finish(m, self._own_sender(m))

    def _finish(self, m: MsgTaskFinished, sender: TaskContext | None) -> None:
        row = self._pending.get(m.task_id) or self._row_or_new(m)
        if sender is None and row.status in FINAL:
            return  # the first finish counts; a worker's own is the first, as its context sees to that
        if m.status == ERROR and sender is not None and sender.may_retry():
            m = MsgTaskFinished(m.task_id, QUEUED, "", None, f"attempt {sender.attempt} failed: {m.message}")
        row.status, row.result, row.message, row.run_id = m.status, m.result, m.message, self.run_id
        row.finished_at = m.finished_at or None
        if m.status == DONE:
            row.progress = 1.0
        if self.display is not None:
            self._news[m.task_id, MsgTaskFinished] = m
        if sender is not None:
            row.traceback = sender.traceback if m.status != DONE else None
            self._settled.append((sender, m.status, m.message))

    def _on_execute(self, m: MsgExecute) -> None:
        if not m.many:
            self.conn.execute(m.sql, m.params)
        else:
            self._execute_many(m.sql, m.params)

    def _execute_many(self, sql: str, rows: list[Any]) -> None:
        """Many rows in few statements: each step gives up the GIL, and busy workers are slow to return it."""
        match = INSERT_VALUES.match(sql)
        width = sql.count("?")
        if match and set(map(type, rows)) == {tuple} and set(map(len, rows)) == {width}:
            self._insert(match["head"], match["row"], match["tail"], width, rows)
        elif MANY.match(sql):
            self.conn.executemany(sql, rows)
        else:
            for row in rows:
                self.conn.execute(sql, row)

    def _insert(self, head: str, row: str, tail: str, width: int, rows: list[Any]) -> None:
        size = max(1, VARIABLES // width)
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            sql = f"{head}{', '.join([row] * len(chunk))}{tail}"
            self.conn.execute(sql, list(chain.from_iterable(chunk)))

    def _write_task_rows(self) -> None:
        rows = [_row_values(row) for row in self._pending.values()]
        if UPSERTS:
            marks = f"({', '.join('?' * len(COLUMNS))})"
            self._insert(INSERT_TASKS, marks, OR_UPDATE, len(COLUMNS), rows)
        else:
            for statement in INSERT_THEN_UPDATE:
                self.conn.executemany(statement, rows)

    # The engine's orders, which it sends as partial(writer.enqueue, tasks) and so on

    def enqueue(self, tasks: Sequence[tuple[int, str]]) -> None:
        """These tasks (id, name) are known, and wait."""
        for id, name in tasks:
            self._pending[id] = _TaskRow(id, name, QUEUED, run_id=self.run_id)

    def forget(self, name: str) -> None:
        """A stage has tasks of its own now, and not the row that stood for them all."""
        self.conn.execute(FORGET, (name,))

    def end_run(self, status: str, reason: str, counts: Iterable[int]) -> None:
        """The last order: how the run ended, and why what was never started will not be."""
        if not self.store:
            return
        if reason or self._rows:  # rows of its own that a worker began and left
            self._write_task_rows()  # what is queued in this very batch, too
            self._pending.clear()
            self.conn.execute(CANCEL_QUEUED, (reason or "never finished", _now(), self.run_id))
        self.conn.execute(FINISH_RUN, (_now(), status, *counts, self.run_id))


def _reason(error: BaseException) -> BaseException:
    """What a task failed for: where a handler rolled back, the exception for which it did."""
    if str(error) != "not authorized":
        return error
    if isinstance(error.__context__, Exception):
        return error.__context__
    return MessageRefused("a handler rolled back; raise an exception instead, which fails its task only")


def _unknown(kind: type) -> MessageRefused:
    return MessageRefused(
        f"nobody handles messages of type {kind.__name__}; pass handlers={{{kind.__name__}: function}}"
    )


# ---- Progress: what is shown; the writer reports, a ticker thread draws, neither waits for the other ----

NAME_WIDTH = 40  # cells of a task's name at the most
LOG_EVERY = 10.0  # seconds between two log lines
FRAME = 0.1  # seconds between two frames of the bars
BACKLOG = 10_000  # printed lines that wait for a slow terminal before who prints waits as well


class Progress:
    """The protocol of a display: these three methods, and nothing else is called.

    They are called in one thread that does nothing else, update() with every message that has been
    committed (of several progress messages of a task in one commit, the last). A finish whose status is
    "queued" is that of an attempt which failed and will be repeated. The run waits for none of them, but
    five seconds for the last; a display that raises, or is 100,000 messages behind, is switched off.
    """

    def start(self, total: int | None) -> None:
        """The run begins; `total` tasks where that is known."""

    def update(self, message: Any) -> None:
        """A message has been committed."""

    def stop(self, result: Any) -> None:
        """The run has ended; `result` is its RunResult."""


class _Aside(Progress):
    """A display of the user's, in a thread of its own: whatever it does there, the run goes on."""

    PATIENCE = 5.0  # seconds, for its stop()
    BACKLOG = 100_000  # messages

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._calls: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pipeloom-display", daemon=True)

    def start(self, total: int | None) -> None:
        self._thread.start()
        self._calls.put(("start", total))

    def update(self, message: Any) -> None:
        if self._calls.qsize() >= self.BACKLOG:
            raise TimeoutError(f"it is {self.BACKLOG:,} messages behind")
        if self._thread.is_alive():
            self._calls.put(("update", message))

    def stop(self, result: Any) -> None:
        self._calls.put(("stop", result))
        self._thread.join(self.PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError(f"it hangs, {self.PATIENCE:g} s after the end")

    def _work(self) -> None:
        method = ""
        try:
            while method != "stop":
                method, argument = self._calls.get()  # stop(), the last, comes however the run ends
                getattr(self._display, method)(argument)
        except BaseException as error:  # even its SystemExit is not the run's
            logger.warning("the progress display failed and is off: %s", _describe(error))


@dataclass
class _Bar:
    """One running task, or one bar of somebody's own."""

    name: str
    total: float | None = None
    completed: float = 0
    text: str = ""

    def fraction(self) -> float | None:
        """0..1, or None where the total is not known."""
        return min(max(self.completed / self.total, 0.0), 1.0) if self.total else None


class _Board(Progress):
    """What a display of ours knows. Subclasses draw it, in a thread of their own.

    The writer's thread changes the fields and the other only reads: a frame may be a message behind.
    """

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream or sys.stderr
        self.total: int | None = None
        self.counts = dict.fromkeys((*FINAL, "skipped"), 0)
        self.running: dict[int, _Bar] = {}
        self.began = time.monotonic()

    def start(self, total: int | None) -> None:
        self.total = total
        self.began = time.monotonic()

    def update(self, message: Any) -> None:
        kind = type(message)
        if kind is MsgTaskStarted:
            self.running[message.task_id] = _Bar(message.name)
        elif kind is MsgTaskProgress:
            bar = self.running.get(message.task_id)
            if bar is not None:
                bar.completed, bar.total, bar.text = message.step, message.total, message.message
        elif kind is MsgTaskFinished:
            self.running.pop(message.task_id, None)
            if message.status in self.counts:  # "queued" is an attempt that failed and will be repeated
                self.counts[message.status] += 1

    def overall(self) -> _Bar:
        """The bar for all tasks."""
        settled = sum(self.counts[status] for status in FINAL)
        elapsed = time.monotonic() - self.began
        parts = [f"{settled:,}/{self.total:,}" if self.total is not None else f"{settled:,} done"]
        parts.append(_clock(elapsed))
        if self.total and 0 < settled < self.total and elapsed > 1:
            parts.append(f"eta {_clock(elapsed / settled * (self.total - settled))}")
        for status, word in ((ERROR, "failed"), (CANCELLED, "cancelled"), ("skipped", "skipped")):
            if self.counts[status]:
                parts.append(f"{self.counts[status]:,} {word}")
        total, settled = (1, 1) if self.total == 0 else (self.total, settled)  # nothing to do is all done
        return _Bar("All tasks", total, settled, "  ".join(parts))

    def bars(self, room: int) -> list[_Bar]:
        """The overall bar, then as many running tasks as have room, then how many more there are."""
        running = self.running.copy()
        shown = list(islice(running.values(), room if len(running) < room else max(room - 2, 0)))
        rest = len(running) - len(shown)
        more = [_Bar(f"+{rest:,} more")] if rest else []
        return [self.overall(), *shown, *more][:room]


class _LogLines(_Board):
    """For what is no terminal: a line every ten seconds at most, and one at the end."""

    def start(self, total: int | None) -> None:
        super().start(total)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="pipeloom-display", daemon=True)
        self._thread.start()

    def stop(self, result: Any) -> None:
        self._over.set()
        self._thread.join(2)  # a pipe that nobody reads is left behind

    def _tick(self) -> None:
        try:
            over = False
            while not over:
                over = self._over.wait(LOG_EVERY)
                tail = "" if over else f"  {len(self.running):,} running"
                self.stream.write(f"pipeloom: {self.overall().text}{tail}\n")
                self.stream.flush()
        except (OSError, ValueError) as error:  # a closed pipe: the run goes on without
            logger.debug("the log lines are off: %s", _describe(error))


class _TerminalBars(_Board):
    """The bars on a terminal; `lines` makes the lines of them."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def start(self, total: int | None) -> None:
        super().start(total)
        self._screen = _Screen(self.stream, self.bars, self._lines)

    def stop(self, result: Any) -> None:
        self.running.clear()
        self._screen.close()


def _rich_lines(bars: list[_Bar], width: int, style: _Style) -> list[tuple[str, int]]:
    """What _lines() gives, made by Rich.

    Not by its Live: two of them at once fail before Rich 14.1, and in all versions bars that come and go
    are torn where several threads print.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if width < 30:
        return _lines(bars, width, style)
    table = Table.grid(padding=(0, 1))
    for bar in bars:
        name = Text(_cut(bar.name, min(NAME_WIDTH, width // 3)), no_wrap=True)
        text = Text(_cut(bar.text, width // 2), no_wrap=True)
        fraction = bar.fraction()
        if fraction is None:
            table.add_row(name, "", "", text)
        else:
            table.add_row(name, ProgressBar(1, fraction, width=width // 4), Text(f"{fraction:4.0%}"), text)
    console = _rich_console()
    with console.capture() as capture:
        console.print(table, width=width - 1)
    return [(line, width - 1) for line in capture.get().splitlines()]


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _cells(char: str) -> int:
    """How many terminal cells a character takes."""
    if east_asian_width(char) in "WF":
        return 2
    return 0 if category(char) in ("Mn", "Me", "Cf") else 1


def _width(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_cells, text))


def _fit(text: str, width: int) -> str:
    """One line of exactly `width` cells: control characters shown as ?, the rest cut or padded."""
    if text.isascii() and text.isprintable():
        return text[:width].ljust(width)
    line, used = [], 0
    for char in text:
        if char in "\u200d\ufe0e\ufe0f" or "\U0001f3fb" <= char <= "\U0001f3ff":
            continue  # they join or tint what stands before them, and terminals disagree how wide that is
        char = char if char.isprintable() else " " if char.isspace() else "?"
        if used + _cells(char) > width:
            break
        used += _cells(char)
        line.append(char)
    return "".join(line) + " " * (width - used)


def _cut(text: str, width: int) -> str:
    """One line of at most `width` cells."""
    return _fit(text, width).rstrip()


class _Style:
    """What a stream can show: colours or none, bars of box-drawing characters or of ASCII."""

    def __init__(self, stream: Any) -> None:
        self.colour = not os.environ.get("NO_COLOR")
        self.encoding = getattr(stream, "encoding", None) or "ascii"
        try:
            "━".encode(self.encoding)
            self.full, self.empty = "━", " " if not self.colour else "━"
        except (UnicodeError, LookupError):
            self.full, self.empty = "#", "."

    def bar(self, fraction: float, width: int) -> str:
        filled = int(fraction * width)
        left, right = self.full * filled, self.empty * (width - filled)
        return f"\x1b[32m{left}\x1b[90m{right}\x1b[0m" if self.colour else left + right


def _lines(bars: list[_Bar], width: int, style: _Style) -> list[tuple[str, int]]:
    """The lines of some bars, each with the number of cells that it fills (never the last column)."""
    room = width - 1
    names = min(max((_width(bar.name) for bar in bars), default=0), NAME_WIDTH, room // 3)
    length = min(40, (room - names) // 3)
    rest = room - names - length - len("  100% ")
    lines = []
    for bar in bars:
        fraction = bar.fraction()
        percent = f"{fraction:4.0%}" if fraction is not None else ""
        if rest < 0:
            line = _fit(f"{bar.name} {percent.strip()} {bar.text}", room)
        else:
            drawn = style.bar(fraction, length) if fraction is not None else " " * length
            line = f"{_fit(bar.name, names)} {drawn} {percent:4} {_fit(bar.text, rest)}"
        lines.append((line, room))
    return lines


class _Screen:
    """A block of lines at the bottom of a terminal, drawn by a thread of its own.

    Whole lines that are printed or logged meanwhile wait in `_backlog` for that thread, which writes them
    above the block: nobody else ever waits for the terminal. Wrapping is off only inside a frame and the
    cursor is never hidden, so that a process killed at any moment leaves a whole terminal behind.
    """

    PATIENCE = 2.0  # seconds, with a terminal that blocks
    terminal = threading.Lock()  # held by the one screen that is open; a second run shows no bars

    def __init__(self, stream: Any, bars: Callable[[int], list[_Bar]], lines: Lines) -> None:
        self.stream = stream
        self.style = _Style(stream)
        self._bars, self._lines = bars, lines
        self._drawn: list[int] = []  # the cells of each line that stands there now
        self._lock = threading.Lock()  # guards the backlog; never held while writing
        self._backlog: list[tuple[Any, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeloom-display", daemon=True)
        self._stand_ins: list[_Above] = []
        self._draws = self.terminal.acquire(blocking=False)  # else who has lines writes them; under the lock
        if self._draws:
            for name in ("stdout", "stderr"):
                if _is_terminal(getattr(sys, name)):
                    self._stand_ins.append(_Above(name, self))
            try:
                self._thread.start()
            except RuntimeError as error:  # the system has no thread left
                self._end(error)
                self.terminal.release()

    def close(self) -> None:
        """Draw a last time; a terminal that blocks (Ctrl-S) is left behind."""
        if self._thread.ident is None:  # it never began
            return
        self._over.set()
        self._thread.join(self.PATIENCE)
        for stand_in in self._stand_ins:
            stand_in.leave()
        self.terminal.release()

    def above(self, stream: Any, text: str) -> None:
        """Have whole lines written to `stream`, above the block. Any thread may call it."""
        patient = threading.current_thread() is not threading.main_thread()  # that one heeds signals
        while patient and len(self._backlog) >= BACKLOG and self._draws and self._thread.is_alive():
            time.sleep(FRAME)
        with self._lock:
            self._backlog.append((stream, text))
            draws = self._draws
        if not draws:
            self._write_backlog()

    def _run(self) -> None:
        error = None
        try:
            self._draw()
            while not self._over.wait(FRAME):
                self._draw()
            self._draw()
        except Exception as failure:  # a closed pipe, a terminal gone: the run goes on without bars
            error = failure
        self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        """Nothing is drawn any more: lines go where they always went."""
        with self._lock:
            self._draws = (
                False  # first: who waits in above() may hold the lock of a handler that is given back
            )
        for stand_in in self._stand_ins:
            stand_in.leave()
        self._write_backlog()
        if error is not None:
            logger.debug("the bars are off: %s", _describe(error))

    def _draw(self) -> None:
        width, height = _terminal_size(self.stream)
        lines = self._lines(self._bars(height - 1), width, self.style)
        rows = sum(max(1, -(-cells // width)) for cells in self._drawn)  # a narrower window folds them
        self._write(self.stream, "\r" + "\x1b[A\x1b[2K" * rows)  # line by line: \x1b[J fills tmux's history
        self._write_backlog()
        self._drawn = [cells for _, cells in lines]
        self._write(self.stream, "\x1b[?7l" + "".join(f"{line}\x1b[K\r\n" for line, _ in lines) + "\x1b[?7h")

    def _write_backlog(self) -> None:
        with self._lock:
            backlog, self._backlog = self._backlog, []
        for stream, text in backlog:
            self._write(stream, text)

    def _write(self, stream: Any, text: str) -> None:
        stream.write(text.encode(self.style.encoding, "replace").decode(self.style.encoding))
        stream.flush()


class _Above:
    """Stands in for sys.stdout or sys.stderr while bars are up, so that a print or a log tears nothing."""

    def __init__(self, name: str, screen: _Screen) -> None:
        self._name, self._screen = name, screen
        self._stream = getattr(sys, name)
        self._halves: dict[int, str] = {}  # half lines, by thread: print() writes in pieces
        self._pid = os.getpid()
        self._replace(self._stream, self)

    def _replace(self, old: Any, new: Any) -> None:
        """In sys, and in the handlers that were made before, as by logging.basicConfig()."""
        if getattr(sys, self._name) is old:
            setattr(sys, self._name, new)
        for log in [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]:
            for handler in getattr(log, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                    handler.setStream(new)

    def write(self, text: str) -> int:
        if os.getpid() != self._pid:  # a forked child has the bars' lines, but not their thread
            return int(self._stream.write(text))
        me = threading.get_ident()
        lines, newline, half = (self._halves.pop(me, "") + text).rpartition("\n")
        if half:
            self._halves[me] = half
        if newline:
            self._screen.above(self._stream, lines + newline)
        return len(text)

    def flush(self) -> None:
        """Half a line waits for its end."""

    def leave(self) -> None:
        """Give the stream back; who has kept this object writes on as before. Idempotent."""
        self._replace(self, self._stream)
        halves, self._halves = self._halves, {}
        for half in halves.values():
            self._screen.above(self._stream, half + "\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # None under `2>&-`, or closed
        return False


def _terminal_size(stream: Any) -> tuple[int, int]:
    try:
        width, height = os.get_terminal_size(stream.fileno())
    except (AttributeError, OSError, ValueError):
        width = height = 0
    return width or 80, height or 24


@lru_cache(None)
def _rich_console() -> Any:
    """The one Rich console, on stderr; None where Rich is not importable."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=True)


class _PlainConsole:
    """What `console` is without Rich."""

    def print(self, *objects: object, **_: object) -> None:
        """Print to stderr, above the bars."""
        shown = [_without_markup(o) if isinstance(o, str) else o for o in objects]
        _say(" ".join(map(str, shown)))

    log = print


def _display_of(progress: Any) -> Any:
    """The display that `progress=` asks for."""
    if progress == "auto":
        progress = _best_display()
    if progress == "rich" and _rich_console() is None:
        raise UsageError("progress='rich' needs Rich, which cannot be imported; install it or use 'auto'")
    kinds: dict[str, Callable[[], Progress]] = {
        "rich": lambda: _TerminalBars(_rich_lines),
        "ansi": lambda: _TerminalBars(_lines),
        "log": _LogLines,
        "none": Progress,
    }
    if isinstance(progress, str):
        if progress not in kinds:
            known = ", ".join(kinds)
            raise UsageError(f"progress={progress!r} is unknown: expected auto, {known} or an object")
        return kinds[progress]() if sys.stderr is not None else Progress()
    missing = [name for name in ("start", "update", "stop") if not callable(getattr(progress, name, None))]
    if missing:
        raise UsageTypeError(f"progress={progress!r} has no method {missing[0]}(); see pipeloom.Progress")
    return _Aside(progress)


def _best_display() -> str:
    if not _is_terminal(sys.stderr):
        return "log"
    if os.name == "nt":
        os.system("")  # makes the Windows console understand escape sequences
    boxes = _Style(sys.stderr).full == "━"  # without them Rich raises where our bars use ASCII
    return "rich" if boxes and _rich_console() is not None else "ansi"


# The two progress managers of the original, for those who draw bars of their own.


class _AnsiProgress:
    """Rich's Progress where that is missing; all started ones share a block. Any thread may call it."""

    _shown: list[_AnsiProgress] = []
    _screen: _Screen | None = None
    _show_lock = threading.Lock()  # guards these two

    def __init__(self, transient: bool = False) -> None:
        self.tasks: dict[int, _Bar] = {}
        self._transient = transient
        self._ids = count()
        self._lock = threading.Lock()  # guards a bar's change: two threads may advance it

    def add_task(self, description: str, total: float | None = 100, completed: float = 0, **_: Any) -> int:
        """Add a bar; returns its id, which may be 0."""
        id = next(self._ids)
        self.tasks[id] = _Bar(_without_markup(description), total, completed)
        return id

    def update(self, task_id: int, *, advance: float = 0, **changes: Any) -> None:
        """Change a bar's total, completed or description; one that was removed is let be."""
        given = {name: value for name, value in changes.items() if value is not None}
        with self._lock:
            bar = self.tasks.get(task_id)
            if bar is None:
                return
            bar.total = given.get("total", bar.total)
            bar.completed = given.get("completed", bar.completed) + advance
            if "description" in given:
                bar.name = _without_markup(given["description"])

    def advance(self, task_id: int, advance: float = 1) -> None:
        self.update(task_id, advance=advance)

    def remove_task(self, task_id: int) -> None:
        self.tasks.pop(task_id, None)

    def refresh(self) -> None:
        """For Rich's users; the bars are drawn ten times a second anyway."""

    def start(self) -> None:
        """Show the bars until stop()."""
        with self._show_lock:
            if self not in self._shown:
                self._shown.append(self)
            if self._screen is None and _is_terminal(sys.stderr):
                _AnsiProgress._screen = _Screen(sys.stderr, self._bars, _lines)

    def stop(self) -> None:
        """Leave the bars on the screen as they are, or clear them if they are transient."""
        with self._show_lock:
            screen = self._screen
            if self not in self._shown:
                return
            self._shown.remove(self)
            if screen is not None and not self._transient:
                lines = _lines(list(self.tasks.values()), _terminal_size(screen.stream)[0], screen.style)
                screen.above(screen.stream, "".join(f"{line.rstrip()}\n" for line, _ in lines))
            if screen is not None and not self._shown:
                _AnsiProgress._screen = None
                screen.close()

    @classmethod
    def _bars(cls, room: int) -> list[_Bar]:
        return [bar for progress in cls._shown.copy() for bar in progress.tasks.copy().values()][:room]

    def __enter__(self) -> _AnsiProgress:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _without_markup(text: str) -> str:
    """What Rich's users write as "[cyan]All tasks" is shown without the tags."""
    return re.sub(r"\[/?[a-z#@][^\[\]]*\]|\[/\]", "", str(text))


def make_overall_progress() -> Any:
    """A progress manager whose bars stay: Rich's Progress, or one like it where Rich is missing."""
    return _make_progress(transient=False)


def make_task_progress() -> Any:
    """A progress manager whose bars clear at the end; see make_overall_progress()."""
    return _make_progress(transient=True)


def _make_progress(transient: bool) -> Any:
    console = _rich_console()
    if not hasattr(console, "_live_stack"):  # no Rich, or one from before 14.1, which cannot show two at once
        return _AnsiProgress(transient)
    from rich.progress import Progress as RichProgress

    return RichProgress(console=console, transient=transient)


def preregister_task_bars(progress: Any, num_tasks: int) -> dict[int, Any]:
    """Add a bar for each of the tasks 1..num_tasks; returns {task id: bar id}. A bar id may be 0."""
    return {id: progress.add_task(f"task-{id}", total=100) for id in range(1, num_tasks + 1)}


class _TaskBars(Progress):
    """Drives the `task_progress` that a SQLiteWriter was given, as the original did."""

    def __init__(self, progress: Any, bars: Mapping[int, Any]) -> None:
        self._progress = progress
        self._bars = dict(bars)

    def update(self, message: Any) -> None:
        bar = self._bars.get(message.task_id)
        if bar is None:  # and not `if not bar`: 0 is an id
            return
        if type(message) is MsgTaskProgress and message.total:
            self._progress.update(bar, completed=int(100 * message.step / message.total))
        elif type(message) is MsgTaskFinished:
            del self._bars[message.task_id]
            self._progress.update(bar, completed=100)
            self._progress.remove_task(bar)
            self._progress.refresh()


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at that moment: while bars are up, that puts lines above them."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _LogFile(logging.FileHandler):
    def handleError(self, _: logging.LogRecord) -> None:
        """A full disk, most likely: said once."""
        root = logging.getLogger()
        if self in root.handlers:
            root.removeHandler(self)
            logger.warning("the log file %r gets no more lines: %s", self.baseFilename, sys.exc_info()[1])
            with suppress(OSError):
                self.close()


def _remove_handlers() -> None:
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "_pipeloom", False)]:
        root.removeHandler(handler)
        handler.close()


def setup_logging(verbose: int, log_file: Any = None) -> None:
    """Show log lines of level WARNING (0), INFO (1) or DEBUG (2 and more) on stderr, above the bars.

    `log_file` gets them too, as plain lines with a time. Call it again to change either.
    """
    level = logging.WARNING if verbose <= 0 else logging.INFO if verbose == 1 else logging.DEBUG
    root = logging.getLogger()
    _remove_handlers()
    handlers: list[logging.Handler] = [_LogHandler()]
    handlers[0].setFormatter(logging.Formatter("%(levelname)-8s %(message)s"))
    if log_file:
        handlers.append(_LogFile(log_file, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(name)s] %(message)s"))
    for handler in handlers:
        handler._pipeloom = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(level)
    logger.setLevel(level)


# ---- Task and context: what a worker may do ------------------------------------------------------------

MANY_ROWS = 1_000_000  # held by one task before it is told of atomic=False
STREAM_ROWS = 1_000  # that an atomic=False task sends at once


class TaskContext:
    """What a worker gets as its queue: its task's way to the writer. For the thread that runs the task.

    Rows that it sends are kept here and travel with the finish, so that they are stored if and only if
    the task is done; with atomic=False they are sent on as they come. Everything that sends raises
    TaskCancelled once the task is to stop, and WriterFailed once nothing can be stored any more.
    """

    __slots__ = (
        "_group", "_group_sql", "_held_rows", "_limit", "_run", "abandoned", "attempt", "closed",
        "coroutine", "error", "has_news", "held", "lock", "name", "news", "on_cancel", "reason", "rejected",
        "stage", "started_at", "task", "task_id", "thread", "traceback",
    )  # fmt: skip

    def __init__(
        self, run: _Run, stage: _Stage, task: Any, task_id: int, name: str, attempt: int = 1
    ) -> None:
        self._run = run
        self.stage = stage
        self.task = task  #: the task as it was given
        self.task_id = task_id
        self.name = name
        self.attempt = attempt  #: 1 for the first go, 2 for the first retry
        self.lock = threading.Lock()
        self.closed = False  # nothing is accepted any more; guarded by the lock
        self.rejected = False  # a message of this attempt was bad
        self.abandoned = False  # the run was left: its thread ends when the function returns, if ever
        self.reason: str | None = None  # why the task is to stop
        self.started_at = ""
        self.held: list[Any] = []  # messages that wait for the finish
        self.news: Any = None  # the newest progress
        self.has_news = False  # and it is on its way to the writer
        self.error: BaseException | None = None
        self.traceback: str | None = None
        self.thread: threading.Thread | None = None  # that runs it, where there is a deadline
        self.coroutine: Any = None  # what it runs, if that is one
        self.on_cancel: Callable[[], object] | None = None
        self._held_rows = 0
        self._limit = MANY_ROWS if stage.atomic else STREAM_ROWS
        self._group: list[Any] = []  # rows of consecutive statements with the same SQL
        self._group_sql: str | None = None

    # What a worker calls

    def put(self, message: Any, block: bool = True, timeout: float | None = None) -> None:
        """Send any typed message, waiting while the writer is behind; `block` and `timeout` change nothing.

        Raises MessageRefused for a message that can never be stored. After the task's finish, further
        status messages are dropped, as only the first finish counts, and anything else is refused.
        """
        kind = type(message)
        check = CHECKS.get(kind)
        if check is None and not self._run.writer.handles(kind):  # a subclass of ours, perhaps
            kind = next((base for base in kind.__mro__ if base in CHECKS), kind)
            check = CHECKS.get(kind)
        if check is not None:
            message = check(message)
        elif message is SENTINEL:
            raise MessageRefused("SENTINEL was put by a worker; it is the engine's, to return is enough")
        elif not self._run.writer.accepts(kind):
            raise _unknown(kind)
        else:
            _check_own(message)
        self.check()
        if kind is MsgTaskProgress and self.owns(message):
            self._tell(message)
        elif kind is MsgTaskFinished and self.owns(message):
            self.finish(message)
        elif kind in (MsgTaskStarted, MsgTaskProgress, MsgTaskFinished):
            self._run.channel.put(self, message)
        else:
            self._send(message, len(message.params) if kind is MsgExecute and message.many else 0)

    def put_nowait(self, message: Any) -> None:
        """The same, for code that treats the context as a queue."""
        self.put(message)

    def progress(self, step: float, total: float | None = None, message: str = "") -> None:
        """Say how far the task is; cheap enough for every step, as only the newest is stored and shown."""
        self.check()
        self._tell(_checked_progress(MsgTaskProgress(self.task_id, step, total or 0, message)))

    def track(self, iterable: Iterable[Any], total: float | None = None) -> Iterator[Any]:
        """Pass items on and say how far they are, ten times a second at most."""
        if total is None:
            total = len(iterable) if hasattr(iterable, "__len__") else 0  # type: ignore[arg-type]
        clock = time.monotonic
        due = clock() + FRAME
        step = 0
        for step, item in enumerate(iterable, 1):
            yield item
            if self.reason is not None:
                self.check()
            if clock() >= due:
                self.progress(step, total)
                due = clock() + FRAME
        self.progress(step, total)

    def execute(self, sql: str, params: Any = ()) -> None:
        """One SQL statement for the writer; consecutive ones with the same SQL are run as one."""
        if sql != self._group_sql or self.closed or self.reason is not None:
            self._new_group(sql)
        self._group.append(params if type(params) is tuple else _row(params))
        if len(self._group) >= self._limit:
            self._send_group()

    def executemany(self, sql: str, rows: Iterable[Any]) -> None:
        """One SQL statement for many rows, from any iterable."""
        self._new_group(sql)
        rows = iter(rows)
        while True:
            try:
                self._group.extend(_rows(islice(rows, self._limit)))
            except BaseException:
                self._group.clear()  # a worker may catch it, and half a batch is not what it wants stored
                raise
            if len(self._group) < self._limit:
                break
            self._send_group()
            self._group_sql = sql

    def upsert(self, table: str, rows: Iterable[Mapping[str, Any]], key: Any) -> None:
        """Insert mappings of column to value; where `key` (a column or several) is there, update the rest.

        The key needs a UNIQUE or PRIMARY KEY in the table, and SQLite 3.24 or newer.
        """
        if not UPSERTS:
            raise UsageError(
                f"upsert needs SQLite 3.24 and this is {sqlite3.sqlite_version}; "
                "use execute() with INSERT OR REPLACE instead"
            )
        keys = [key] if isinstance(key, str) else list(key)
        if isinstance(rows, Mapping):
            raise MessageRefused(f"upsert into {table!r}: rows is one mapping; expected a list of them")
        columns: list[str] = []
        sql = ""
        for row in rows:
            if not sql or list(row) != columns:
                columns = list(row)
                sql = _upsert_sql(table, columns, keys)
            self.execute(sql, tuple(row.values()))

    def connect(self) -> sqlite3.Connection:
        """A read-only connection to the database as it is committed; its `with` block closes it."""
        path = self._run.writer.path
        if path == ":memory:":
            raise UsageError("a :memory: database cannot be read beside its writer; use a file")
        return _connect_readonly(path)

    @property
    def cancelled(self) -> bool:
        """Whether the task is to stop: its time is up, or the run is being left."""
        return self.reason is not None

    def check(self) -> None:
        """Raise TaskCancelled if the task is to stop."""
        if self.reason is not None:
            raise TaskCancelled(self.reason)

    def sleep(self, seconds: float) -> None:
        """Sleep, and wake up with TaskCancelled if the task is to stop."""
        self._run.sleep(self, seconds)
        self.check()

    # What the engine and the writer call

    def owns(self, message: Any) -> bool:
        return bool(message.task_id == self.task_id)

    def may_retry(self) -> bool:
        return self.attempt <= self.stage.retries and self._run.stopping is None

    def finish(self, message: MsgTaskFinished, wait: bool = True) -> bool:
        """End the attempt with this message; False if something else has ended it before.

        The worker calls it, and so do a deadline and the second Ctrl-C, which do not wait and leave its
        rows alone: the writer applies those of a done task only.
        """
        keeps = message.status == DONE or not self.stage.atomic
        if wait and keeps and not self.closed and self.reason is None:
            self._send_group()
        return self._run.channel.put(self, message, self._held_rows, last=True, wait=wait)

    def cancel(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._run.wake_sleepers()
        stop = self.on_cancel
        if stop is not None:
            try:
                stop()
            except RuntimeError:  # its event loop has just ended
                return

    def record(self, error: BaseException) -> None:
        """Keep an exception and its traceback for the finish."""
        from traceback import format_exception

        self.error = error
        try:
            text = "".join(format_exception(type(error), error, error.__traceback__))
        except BaseException:  # an exception may be so broken that it cannot be shown
            text = _describe(error)
        self.traceback = _text(text if len(text) < 20_000 else f"{text[:10_000]}\n...\n{text[-10_000:]}")

    def _tell(self, message: MsgTaskProgress) -> None:
        self.news = message
        if not self.has_news:  # the writer clears this before it reads `news`, so nothing newer is missed
            self.has_news = True
            self._run.channel.put(self, None)

    def _new_group(self, sql: str) -> None:
        self._send_group()
        self._refuse_if_closed("execute()")
        if not isinstance(sql, str):
            raise MessageRefused(f"sql {sql!r} cannot be run: expected a str")
        self._group_sql = sql

    def _send_group(self) -> None:
        if self._group:
            group, self._group = self._group, []
            self._send(MsgExecute(self._group_sql or "", group, True), len(group))
        self._group_sql = None

    def _send(self, message: Any, rows: int = 0) -> None:
        if self._group:
            self._send_group()  # in the order in which they came
        self._refuse_if_closed(type(message).__name__)
        if not self.stage.atomic:
            self._run.channel.put(self, message, rows)
            return
        self.held.append(message)
        before, self._held_rows = self._held_rows, self._held_rows + (rows or 1)
        if before < MANY_ROWS <= self._held_rows:
            logger.warning(
                "task %r holds %d rows in memory until it is done; atomic=False streams them instead",
                self.name, self._held_rows,
            )  # fmt: skip

    def _refuse_if_closed(self, what: str) -> None:
        self.check()
        if self.closed:
            raise MessageRefused(f"task {self.name!r} has finished: {what} came too late to be stored")


def _upsert_sql(table: str, columns: list[str], keys: list[str]) -> str:
    def quoted(names: Iterable[str]) -> list[str]:
        return ['"' + name.replace('"', '""') + '"' for name in names]

    missing = [key for key in keys if key not in columns]
    if missing or not keys:
        raise MessageRefused(
            f"upsert into {table!r}: key {missing or keys!r} is not among the columns {columns!r}"
        )
    others = quoted(name for name in columns if name not in keys)
    action = f"UPDATE SET {', '.join(f'{c}=excluded.{c}' for c in others)}" if others else "NOTHING"
    return (
        f"INSERT INTO {quoted([table])[0]}({', '.join(quoted(columns))})"
        f" VALUES ({', '.join('?' * len(columns))})"
        f" ON CONFLICT({', '.join(quoted(keys))}) DO {action}"
    )


# ---- Engine: one run; every wait in it has somebody who ends it ----------------------------------------

FAILURES_KEPT = 100  # in a RunResult, and as many causes
GRACE = 5.0  # seconds from SIGTERM to leaving, and for workers to notice that they are to stop
POLL = 0.2  # seconds; the longest that a signal goes unnoticed
LIVE = 6_000  # tasks that are submitted and not settled; beyond that none is pulled
TROUBLES = {ERROR: "failed", CANCELLED: "was cancelled"}
LONGEST_DELAY = 3600.0  # seconds before a retry, however often it has doubled


@dataclass(frozen=True)
class Failure:
    """A task that failed: its name, the message, the traceback if there was one, and what groups it."""

    task: str
    message: str
    traceback: str | None = None
    cause: str = ""  #: the type of the exception and the user's innermost line, or else the message


@dataclass(frozen=True)
class RunResult:
    """How a run ended. The counts are of tasks.

    `causes` says how many failed of each cause; `failures` holds the first hundred, and one of each cause.
    """

    run_id: int | None
    done: int
    error: int
    cancelled: int
    skipped: int
    elapsed: float
    failures: list[Failure] = field(default_factory=list)
    causes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All tasks that the run knew of."""
        return self.done + self.error + self.cancelled + self.skipped

    @property
    def ok(self) -> bool:
        """Whether every task is done, now or before."""
        return not self.error and not self.cancelled


@dataclass(frozen=True)
class _Settings:
    """The options of a run; those of a stage are in _Stage."""

    workers: int | None = None
    wal: bool = True
    store_task_status: bool = True
    fail_fast: bool = False
    check: bool = True
    progress: Any = "auto"
    schema: str | None = None
    handlers: Mapping[type, Handler] | None = None
    busy_timeout: float = 300.0
    durable: bool = False
    resume: bool = False
    retries: int = 0
    retry_delay: float = 1.0
    timeout: float | None = None
    atomic: bool = True
    writer: type[SQLiteWriter] = SQLiteWriter

    def __post_init__(self) -> None:
        _check_stage_options({name: getattr(self, name) for name in STAGE_OPTIONS})
        if self.resume and not self.store_task_status:
            raise UsageError(
                "resume=True needs to know what is done, and store_task_status=False keeps no record of it; "
                "leave one of them out"
            )
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise UsageError(f"workers={self.workers!r}: expected a whole number from 1; None is one per CPU")
        _check_seconds("busy_timeout", self.busy_timeout)
        if not (isinstance(self.writer, type) and issubclass(self.writer, SQLiteWriter)):
            raise UsageTypeError(f"writer={self.writer!r}: expected a subclass of SQLiteWriter")
        if self.schema is not None and not isinstance(self.schema, str):
            raise UsageTypeError(f"schema={self.schema!r}: expected a str of SQL statements")


STAGE_OPTIONS = ("retries", "retry_delay", "timeout", "atomic")  # a stage may have its own


def _check_stage_options(options: Mapping[str, Any]) -> None:
    retries, timeout = options.get("retries", 0), options.get("timeout")
    if not isinstance(retries, int) or retries < 0:
        raise UsageError(f"retries={retries!r}: expected a whole number from 0")
    _check_seconds("retry_delay", options.get("retry_delay", 0))
    if timeout is not None and not timeout:
        raise UsageError(f"timeout={timeout!r}: expected a number of seconds above 0, or None for no limit")
    _check_seconds("timeout", timeout or 0)


def _check_seconds(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1e9:
        raise UsageError(f"{name}={value!r}: expected a number of seconds from 0 to 1e9")


class _Stage:
    """The tasks of a run that share one function and its options, and how far the run is with them.

    `call` takes the context of an attempt. `source` is an iterable of items, or a function that makes one;
    `identify` takes an item and its position, from 1, and says (task_id, name), either of them perhaps
    None. A stage ends when its source is exhausted and all that it submitted is settled; then those of its
    `followers` start that wait for nothing else.
    """

    retries: int
    retry_delay: float
    timeout: float | None
    atomic: bool

    def __init__(
        self,
        call: Callable[[TaskContext], object],
        source: Any,
        identify: Callable[[Any, int], tuple[Any, str | None]],
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        lone: bool = False,
    ) -> None:
        self.call, self.source, self.identify, self.name = call, source, identify, name
        self.options = options or {}
        self.lone = lone  # one task, which is known at the start
        self.followers: list[_Stage] = []
        self.awaits: list[str] = []  # names of single tasks that it comes after
        self.waits = 0  # how many stages and single tasks before it have not ended yet
        self.doomed = ""  # why its tasks are cancelled instead of started
        self.spoiled = ""  # which of its tasks did not succeed, for its followers
        self.upcoming: Iterator[tuple[Any, int, str, str | None]] | None = None  # once it is open
        self.submitted = 0  # changed by the one thread that pulls it
        self.settled = 0  # changed by the writer's
        self.exhausted = False
        self.registered: int | None = None  # tasks that were `queued` rows before they are submitted
        self.by_name = True  # some of its tasks are known by their names only
        self.highest = 0  # of the ids that known tasks have themselves: the others' are above it


def _same_name(name: str) -> UsageError:
    return UsageError(f"two tasks are named {name!r}; give each its own, as with name=")


class _Interrupted(KeyboardInterrupt):
    """Raised by the signal handler inside the user's iterator, to end a pull that blocks."""


async def _awaited(ctx: TaskContext, coroutine: Any) -> object:
    """Run a coroutine so that what cancels its task cancels it, too."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    ctx.on_cancel = lambda: loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]
    try:
        ctx.check()
        return await coroutine
    except asyncio.CancelledError:
        ctx.check()
        raise
    finally:
        ctx.on_cancel = None


def _stack_of(ctx: TaskContext) -> str:
    """Where a task's thread, or its coroutine, is just now."""
    from traceback import format_stack

    frames: list[str] = []
    awaited, ident = ctx.coroutine, ctx.thread.ident if ctx.thread else None
    try:
        while awaited is not None and not getattr(awaited, "cr_running", False):
            frame = getattr(awaited, "cr_frame", None)
            frames += format_stack(frame, 1) if frame else []
            awaited = getattr(awaited, "cr_await", None)
        frames = frames or format_stack(sys._current_frames()[ident or 0])
    except Exception as error:  # its source cannot be read, or the thread has just ended
        frames = [_describe(error)]
    return _text("its thread was here:\n" + "".join(frames))


def _cause(error: BaseException | None, message: str) -> str:
    """What failures of one cause have in common: the type, and the innermost line that is the user's."""
    lines: list[str] = []
    step = error.__traceback__ if error is not None else None
    while step is not None:
        frame, path = step.tb_frame, step.tb_frame.f_code.co_filename
        ours = frame.f_globals is globals() or path.startswith(_LIBRARY) or "-packages" + os.sep in path
        if not ours:
            lines.append(f"{os.path.basename(path)}:{step.tb_lineno}, in {frame.f_code.co_name}")
        step = step.tb_next
    return f"{type(error).__name__} at {lines[-1]}" if lines else message


_LIBRARY = os.path.dirname(os.__file__) + os.sep


_running: set[_Run] = set()  # the runs of this process, or of the one that it was forked from


def _refuse_in_child() -> None:
    """After a fork: the threads of the runs are not here, and the locks that they held are held for good."""
    for run in _running:
        run.channel = Channel()
        run.channel.fail(
            MessageRefused("this is a forked process; only its parent can send messages to the run")
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_in_child)


def _end_child() -> NoReturn:
    """A process that a task forked has come back from the task's function: it is no worker, and ends."""
    import traceback

    error = sys.exc_info()[1]
    code = getattr(error, "code", 1) if error else 0
    if error and not isinstance(error, SystemExit):
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


class _Run:
    """One run, from the first task to the last commit.

    The calling thread pulls tasks and waits; workers take them from `_ready`; the writer calls settle(); a
    timer starts what waits for a retry and ends what is beyond its deadline. `_lock` guards the counts, the
    stages' ends, `_later`, `_timed` and the three conditions: workers wait on `_work` for a task (announced
    by _hand_out and _dismiss), the calling thread on `_wake` for room or settled tasks (announced by _take
    and settle; it polls besides, for signals), the timer on `_time` for the next moment (announced by
    whoever brings that forward, and by _dismiss). `_ready` is a deque, whose ends are safe without a lock,
    and of `_live` only single operations are used. The channel's lock may be taken inside `_lock`.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)  # of retries and deadlines

    def __init__(self, stages: list[_Stage], db_path: str, settings: _Settings) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.channel = Channel()
        self.display = _display_of(settings.progress)
        self.writer = self._make_writer(db_path)
        self.stopping: str | None = None  # why nothing new starts
        self.began = time.monotonic()
        self.failures: list[Failure] = []
        self.causes: dict[str, int] = {}
        self.first_error: BaseException | None = None
        self.unreported = 0  # failures that the workers did not report themselves
        self._stages = stages
        self._take_stages()
        self._workers = settings.workers or os.cpu_count() or 1
        if not self._unknown:
            self._workers = max(1, min(self._workers, self._known))  # no more than tasks
        self._threads: list[threading.Thread] = []
        self._timer = threading.Thread(target=self._keep_time, name="pipeloom-timer", daemon=True)
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._wake = threading.Condition(self._lock)
        self._time = threading.Condition(self._lock)
        self._sleepers = threading.Condition()  # tasks in ctx.sleep(); cancel() wakes them
        self._ready: deque[TaskContext] = deque()
        self._most_live = max(LIVE, 2 * self._workers)
        self._room = max(64, 4 * self._workers)  # how many tasks are pulled ahead
        self._idle = 0  # workers that wait
        self._dismissed = False
        self._stirred = False  # something happened since the calling thread last looked
        self._live: dict[int, TaskContext] = {}  # submitted and not settled
        self._later: list[tuple[float, int, TaskContext, str]] = []  # a heap of what waits for a retry
        self._timed: dict[TaskContext, float] = {}  # the deadlines of what runs
        self._counts = dict.fromkeys((*FINAL, "skipped"), 0)
        self._next_id = 1
        self._old = -(2**63)  # the highest id of earlier runs
        self._taken: dict[int, int] = {}  # which of those are some task's in this run: 1,024 bits an entry
        self._twins: dict[str, int] = {}  # names that several tasks have: the last of their old ids
        self._reader: sqlite3.Connection | None = None  # the calling thread's
        self._names: sqlite3.Connection | None = None  # and its list of the names in this run
        self._recent: set[str] = set()  # those that are not in there yet
        self._signals: list[int] = []
        self._heeded = 0
        self._leave_at: float | None = None
        self._left = False  # what ran was cancelled
        self._shown = False  # the display was started
        self._pulling = False  # the calling thread is inside the user's iterator
        self._fault: BaseException | None = None  # for the calling thread to raise

    def _take_stages(self) -> None:
        self._sources: deque[_Stage] = deque()  # stages whose tasks may be pulled
        self._stages_left = len(self._stages)
        self._waiters: dict[str, list[_Stage]] = {}  # by the name of the task that they wait for
        self._known = self._unknown = 0  # tasks, and stages of which nobody can say how many they have
        for stage in self._stages:
            for option in STAGE_OPTIONS:
                setattr(stage, option, stage.options.get(option, getattr(self.settings, option)))
            for name in stage.awaits:
                self._waiters.setdefault(name, []).append(stage)
            if isinstance(stage.source, Sequence):
                self._known += len(stage.source)
            else:
                self._unknown += 1

    def _total(self) -> int | None:
        return None if self._unknown else self._known

    def _make_writer(self, db_path: str) -> SQLiteWriter:
        s = self.settings
        writer = s.writer(
            db_path, self.channel, wal=s.wal, store_task_status=s.store_task_status, schema=s.schema,
            handlers=s.handlers, busy_timeout=s.busy_timeout, durable=s.durable,
        )  # fmt: skip
        writer.display = None if type(self.display) is Progress else self.display
        writer.run_of = self
        return writer

    # The calling thread

    def execute(self) -> RunResult:
        """Run all tasks. However it ends, what was accepted is stored and the process is as it was.

        1. lock and open the database, show the display, start the workers; 2. pull tasks until there are
        none or something stops the run; 3. dismiss the workers; 4. tell the writer how it ended, wait for
        its last commit; 5. stop the display; 6. release the lock, restore the signal handlers; 7. return,
        or raise what stopped it.
        """
        if any(run.pid != self.pid for run in tuple(_running)):
            raise UsageError(
                "a process that was forked in the middle of a run can start none: threads that are not in it"
                " may have held locks; use subprocess, or multiprocessing's get_context('spawn')"
            )
        _check_database(self.writer.db_path)
        lock = _RunLock(self.writer.db_path)
        previous: dict[int, Any] = {}
        failure: BaseException | None = None
        try:
            try:
                previous = self._take_signals()
                _running.add(self)
                if lock.path:
                    self.writer.files[lock.path] = os.stat(lock.path)
                self._start()
                self._pull_all()
            except BaseException as error:
                failure = error
                self.stopping = self.stopping or f"the run ended: {_describe(error)}"
            failure = self._wind_up(failure)
        finally:
            _running.discard(self)
            lock.release()
            for number, handler in previous.items():
                signal.signal(number, handler)
        result = self.result()
        if self._signals:
            if isinstance(failure, PipeloomError):
                logger.error("%s", failure)
            self._deliver(result)
        if failure is not None:
            raise failure
        if self.settings.check and self.unreported:
            raise PipelineError(result) from self.first_error
        return result

    def _start(self) -> None:
        self.writer.index_names = any(stage.by_name for stage in self._stages)
        self.writer.start()
        while not self.writer.opened.wait(POLL):  # it opens, or fails, within busy_timeout
            self.writer.hurried = bool(self._signals)
            self._check_faults()
        self._check_faults()
        if self.writer.db_path == ":memory:":
            logger.warning("the database is :memory:, so that nothing is left of it after the run")
        logger.info("database %r is open; %d workers start", self.writer.db_path, self._workers)
        self._old = self.writer.last_id
        self._next_id = max(1, self._old + 1, *(stage.highest + 1 for stage in self._stages))
        if self._next_id > 2**62 and self.writer.index_names:
            cure = "use another file, or give each task its own task_id"
            raise DatabaseError(
                self.writer.db_path, f"has a task of id {self._next_id - 1}, beyond which few are left", cure
            )
        first = [stage for stage in self._stages if not stage.waits]
        for stage in self._stages:
            if isinstance(stage.source, Sequence):
                self._forget_stand_in(stage)
                self._register(stage, stage.source)
        self._show()
        with self._lock:
            for stage in first:
                if self._begin(stage):
                    self._end(stage)
        self._start_threads()

    def _show(self) -> None:
        try:
            self.display.start(self._total())
            self._shown = True
        except BaseException as error:  # even its SystemExit is not the run's
            self.writer.display = None
            logger.warning("the progress display failed and is off: %s", _describe(error))

    def _show_counts(self) -> None:
        """Tell our displays what becomes known while the run is on."""
        if isinstance(self.display, _Board):
            self.display.total, self.display.counts["skipped"] = self._total(), self._counts["skipped"]

    def _start_threads(self) -> None:
        for number in range(self._workers):
            if not self._start_worker():
                logger.warning("only %d of %d workers start", number, self._workers)
                break
        self._check_faults()
        if any(stage.retries or stage.timeout for stage in self._stages):
            self._timer.start()

    def _start_worker(self) -> bool:
        thread = threading.Thread(target=self._work_on, name="pipeloom-worker", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            if not self._threads:
                self._fault = error
            return False
        self._threads.append(thread)
        return True

    def _check_faults(self, ended: bool = False) -> None:
        writer = self.writer
        if not ended and not writer.is_alive() and writer.error is None:  # a subclass whose run() has ended
            what = f"{type(writer).__name__}.run() has ended before the run"
            writer.error = WriterFailed(writer.db_path, what, "override handle() instead")
            self.channel.fail(writer.error)
        fault = writer.error or self._fault
        if fault is not None:
            raise fault

    # Which id a task has: its own, that of its name in earlier runs, or the next one

    def _register(self, stage: _Stage, items: Sequence[Any]) -> None:
        """Tasks that are known are `queued` rows at once; which of them are to run, and as what, is kept."""
        ids, chosen = array("q"), bytearray()
        queued: list[tuple[int, str]] = []
        for _, id, name, status in self._identified(stage, items):
            if self.stopping:
                break
            chosen.append(status != DONE)
            if status == DONE:
                self._skip(name)
                self._known -= 1
                continue
            ids.append(id)
            queued.append((id, name))
            if len(queued) >= 10_000:
                self.channel.put(None, partial(self.writer.enqueue, queued), len(queued))
                queued = []
        if queued:
            self.channel.put(None, partial(self.writer.enqueue, queued), len(queued))
        stage.registered = len(ids)
        stage.upcoming = (
            (item, id, self._named(stage, item, position)[1], None)
            for id, (position, item) in zip(ids, compress(enumerate(items, 1), chosen))
        )

    def _identified(self, stage: _Stage, items: Iterable[Any]) -> Iterator[tuple[Any, int, str, str | None]]:
        """Each item with its id, its name and, where that matters, its status in earlier runs."""
        iterator = self._interruptibly(iter, items)
        for position in count(1):
            self._pulling = True  # as in _interruptibly, without a call for each item
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._pulling = False
            given, name = self._named(stage, item, position)
            if stage.name:
                self._check_name(name)
            id, status = self._of_name(name) if given is None else self._of_id(_task_id(given), name)
            yield item, id, name, status

    def _check_name(self, name: str) -> None:
        """No two tasks of a pipeline have the same name: of the last thousand at once, of all in a while."""
        if name in self._recent:
            raise _same_name(name)
        self._recent.add(name)
        if len(self._recent) == 500:  # as many as every SQLite takes in one statement
            self._compare_names()

    def _compare_names(self) -> None:
        """Compare the recent names with all before them. There may be millions, which no set should hold."""
        if not self._recent:
            return
        names, self._recent = sorted(self._recent), set()
        marks = ", ".join("?" * len(names))
        try:
            if self._names is None:
                self._names = sqlite3.connect("", isolation_level=None)  # on disk, once it is large
                self._names.execute("PRAGMA journal_mode=OFF")
                self._names.execute("CREATE TABLE names(name TEXT PRIMARY KEY) WITHOUT ROWID")
            known = self._names.execute(f"SELECT name FROM names WHERE name IN ({marks})", names).fetchall()
            if not known:
                self._names.execute(f"INSERT INTO names VALUES {marks.replace('?', '(?)')}", names)
        except (sqlite3.OperationalError, MemoryError) as error:  # a full temporary directory ends no run
            logger.debug("some names of tasks are not compared: %s", error)
            return
        if known:
            raise _same_name(known[0][0])

    def _interruptibly(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call what is the user's code: a signal may end it."""
        try:
            self._pulling = True
            return call(*args)
        finally:
            self._pulling = False

    def _named(self, stage: _Stage, item: Any, position: int) -> tuple[Any, str]:
        given, name = stage.identify(item, position)
        return given, _text(name) if name else f"task-{position if given is None else given}"

    def _of_name(self, name: str) -> tuple[int, str | None]:
        if self._old > -(2**63):
            after = self._twins.get(name, -(2**63))
            for id, status in self._read(FIND_NAME, (name, after, self._old)):
                if self._take_old(id):
                    return id, status if self.settings.resume else None
                self._twins[name] = id
        self._next_id += 1
        return self._next_id - 1, None

    def _of_id(self, id: int, name: str) -> tuple[int, str | None]:
        old = id <= self._old
        if (
            id in self._live
            or (old and not self._take_old(id))
            or (not old and id < self._next_id and self._has_run(id))
        ):
            raise UsageError(
                f"task_id {id} of task {name!r} is another task's in this run; give each its own"
            )
        self._next_id = max(self._next_id, id + 1)
        found = self._read(FIND_ID, (id,)) if old and self.settings.resume else ()
        return id, found[0][1] if found else None

    def _take_old(self, id: int) -> bool:
        """Whether an id of earlier runs is still free in this one; it then is not any more."""
        page, bit = id >> 10, 1 << (id & 1023)
        bits = self._taken.get(page, 0)
        self._taken[page] = bits | bit
        return not bits & bit

    def _has_run(self, id: int) -> bool:
        """Whether a task of this run has had this id; asked only where ids do not rise."""
        return any(run_id == self.writer.run_id for _, _, run_id in self._read(FIND_ID, (id,)))

    def _read(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        """Ask what is committed. In slices, as a lock that is waited for in C holds up signals."""
        if not self.writer.store or self.writer.db_path == ":memory:":
            return []
        if self._reader is None:
            self._reader = _connect_readonly(self.writer.path, timeout=POLL)
        began = time.monotonic()
        while True:
            try:
                return self._reader.execute(sql, parameters).fetchall()
            except sqlite3.DatabaseError as error:
                waited = time.monotonic() - began
                if not _is_lock(error):
                    cure = "restore it or use another file"
                    raise DatabaseError(self.writer.db_path, f"cannot be read: {error}", cure) from error
                if self._signals or waited > self.settings.busy_timeout:
                    raise self.writer.out_of_patience(error, waited) from error

    # Pulling

    def _pull_all(self) -> None:
        missing: UsageError | None = None
        filled = False
        while True:
            self._heed_signals()
            self._check_faults()
            if self.stopping:
                self._cancel_ready()
            elif self._sources and len(self._ready) < self._room and len(self._live) < self._most_live:
                if filled and not self._ready:  # tasks so short that a larger stock saves much waking up
                    self._room = min(2 * self._room, 1_024)
                self._pull_some()
                filled = len(self._ready) >= self._room
                continue
            with self._lock:
                if not self._live and (self.stopping or not self._stages_left):
                    break
                if not self._live and not self._sources:
                    missing = self._give_up_waiting() or missing
                elif not self._stirred:
                    self._wake.wait(POLL)
                self._stirred = False
        if missing and not self.stopping:
            raise missing

    def _pull_some(self) -> None:
        """Fill `_ready` from the next stage; without more tasks, that may have ended."""
        stage = self._sources[0]
        try:
            upcoming = stage.upcoming or self._open(stage)
            while len(self._ready) < self._room and len(self._live) < self._most_live and not self.stopping:
                pulled = next(upcoming, None)
                if pulled is None:
                    return self._exhaust(stage)
                item, id, name, status = pulled
                if status == DONE:
                    self._skip(name)
                else:
                    self._submit(stage, item, id, name)
            if stage.registered is None:
                self._sources.rotate(-1)  # each in its turn
        except _Interrupted:
            return None
        except Exception as error:
            if stage.name:
                self.stopping = f"the run ended: each= of {stage.name!r} gave {_describe(error)}"
            raise

    def _open(self, stage: _Stage) -> Iterator[tuple[Any, int, str, str | None]]:
        """Get at the items of a stage that is not registered yet."""
        items = stage.source
        if stage.doomed:  # nobody can say what they would have been; one row stands for them all
            items = [None]
            stage.identify = lambda _, __: (None, stage.name)
        else:
            self._forget_stand_in(stage)
            if callable(items):
                items = self._interruptibly(items)
        if not hasattr(items, "__iter__") or _is_path(items):
            raise UsageTypeError(
                f"each= of task {stage.name!r} gives {items!r}; expected an iterable of items"
            )
        if isinstance(items, Sequence):
            self._unknown -= 1
            self._known += len(items)
            self._register(stage, items)
            self._show_counts()
        else:
            stage.upcoming = self._identified(stage, items)
        assert stage.upcoming is not None
        return stage.upcoming

    def _forget_stand_in(self, stage: _Stage) -> None:
        """An earlier run may have stored one row for all the tasks of a stage that it could not open."""
        if self._old > -(2**63) and stage.name and not stage.lone:
            self.channel.put(None, partial(self.writer.forget, stage.name))

    def _skip(self, name: str) -> None:
        """A task that an earlier run has done."""
        self._counts["skipped"] += 1
        self._show_counts()
        if name in self._waiters:
            with self._lock:
                self._resolve(name)

    def _submit(self, stage: _Stage, item: Any, id: int, name: str) -> None:
        ctx = TaskContext(self, stage, item, id, name)
        stage.submitted += 1
        self._live[id] = ctx
        if stage.doomed:
            self._cancel(ctx, stage.doomed)
        else:
            self._hand_out(ctx)

    def _hand_out(self, ctx: TaskContext) -> None:
        self._ready.append(ctx)
        if self._idle:  # a worker counts itself in before it looks, so that none is missed
            with self._lock:
                self._work.notify()

    def _exhaust(self, stage: _Stage) -> None:
        self._sources.remove(stage)
        self._compare_names()  # before what comes after it may start
        if stage.registered is None:
            self._unknown -= 1
            self._known += stage.submitted
            self._show_counts()
        with self._lock:
            stage.exhausted = True
            if stage.submitted == stage.settled:
                self._end(stage)

    # What comes after what. All of it with the lock held, by the calling thread or the writer's

    def _begin(self, stage: _Stage) -> bool:
        """Nothing is before this stage any more; returns whether it has ended at once."""
        if not stage.lone or stage.upcoming is None:
            if stage.upcoming is None:
                self._sources.append(stage)
            else:
                self._sources.appendleft(stage)  # what is known cannot block, so it comes first
            self._stir()
            return False
        for item, id, name, _ in stage.upcoming:
            if self.stopping:
                return False
            self._submit(stage, item, id, name)
        stage.exhausted = True
        return not stage.submitted

    def _end(self, stage: _Stage) -> None:
        """All tasks of this stage are settled: let go what waited for that, and so on."""
        ended = [stage]
        for stage in ended:
            self._stages_left -= 1
            ended += [f for f in stage.followers if self._let_go(f, stage.spoiled)]

    def _let_go(self, stage: _Stage, reason: str) -> bool:
        """One of the things that this stage waits for has ended, badly if there is a reason."""
        if reason and not stage.doomed:
            stage.doomed, stage.spoiled = (
                f"not started: {reason}",
                reason,
            )  # the first cause, all the way down
        stage.waits -= 1
        return not stage.waits and self._begin(stage)

    def _resolve(self, name: str, reason: str = "") -> None:
        """The task of this name is settled, badly if there is a reason."""
        for stage in self._waiters.pop(name, ()):
            if self._let_go(stage, reason):
                self._end(stage)

    def _give_up_waiting(self) -> UsageError | None:
        """Nothing is left that could run, but some stages wait for tasks that have not come in this run."""
        stages = {stage.name: stage for stage in self._stages}
        doomed = any(stage.doomed for stage in self._stages)
        missing = None
        makers = {name: stages.get(name.partition("[")[0]) for name in sorted(self._waiters)}
        ended = [name for name, maker in makers.items() if maker is not None and not maker.waits]
        for name in ended or makers:  # what waits for these may make the others', or be why they never come
            waiting, maker = self._waiters.get(name), makers[name]
            if not waiting:
                continue
            if self.settings.resume and DONE in [
                row[1] for row in self._read(FIND_NAME, (name, -(2**63), self._old))
            ]:
                self._resolve(name)  # its item is gone, and was done before
            elif maker.doomed if maker else doomed:
                self._resolve(name, maker.spoiled if maker else f"there was no task {name!r}")
            else:
                missing = missing or UsageError(
                    f"after={name!r} of task {waiting[0].name!r}: no task of that name has come; "
                    "mend the name, or name the function whose tasks it comes after"
                )
                self._resolve(name, f"there was no task {name!r}")
        return missing

    def _cancel_ready(self) -> None:
        """Cancel what waits for a worker or for its retry."""
        while self._ready:
            try:
                ctx = self._ready.popleft()
            except IndexError:  # a worker was faster; it will cancel it
                return
            self._cancel(ctx, self.stopping or "")
        with self._lock:
            later, self._later = self._later, []
        for _, _, ctx, message in later:
            self._cancel(ctx, f"{self.stopping}; {message}")

    def _cancel(self, ctx: TaskContext, reason: str) -> None:
        ctx.finish(MsgTaskFinished(ctx.task_id, CANCELLED, _now(), None, reason), wait=False)

    # Workers

    def _work_on(self) -> None:
        while True:
            ctx = self._take()
            if ctx is None:
                return
            try:
                self._attempt(ctx)
            except WriterFailed:
                return
            if ctx.abandoned:
                return

    def _take(self) -> TaskContext | None:
        """The next ready task, waiting for one; None when there will be none."""
        try:
            ctx = self._ready.popleft()
        except IndexError:
            with self._lock:
                self._idle += 1
                self._stir()
                try:
                    return self._wait_for_work()
                finally:
                    self._idle -= 1
        if len(self._ready) == self._room // 2:
            with self._lock:
                self._stir()
        return ctx

    def _wait_for_work(self) -> TaskContext | None:
        while True:
            try:
                return self._ready.popleft()
            except IndexError:  # another worker, which takes without the lock, may have been faster
                if self._dismissed:
                    return None
                self._work.wait()  # ended by _hand_out or, however the run ends, by _dismiss

    def _stir(self) -> None:
        """Wake the calling thread. With the lock held."""
        self._stirred = True
        self._wake.notify()

    def _attempt(self, ctx: TaskContext) -> None:
        if self.stopping:
            return self._cancel(ctx, self.stopping)
        ctx.started_at = _now()
        self.channel.put(ctx, STARTED)
        try:
            value = self._call(ctx) if ctx.stage.timeout is None else self._call_in_time(ctx)
            finish = MsgTaskFinished(ctx.task_id, DONE, _now(), _result_text(value))
            accepted = ctx.closed or ctx.finish(finish)
        except TaskCancelled as stop:
            ctx.finish(MsgTaskFinished(ctx.task_id, CANCELLED, _now(), None, _text(stop)))
        except WriterFailed:
            raise
        except BaseException as error:  # SystemExit too: a task's end is not the program's
            self._fail(ctx, error)
        else:
            if not accepted and not ctx.cancelled:
                logger.debug("task %r was finished twice; the first counts", ctx.name)
        return None

    def _call(self, ctx: TaskContext) -> object:
        try:
            value = ctx.stage.call(ctx)
            if type(value) is CoroutineType:
                import asyncio

                ctx.coroutine = value
                value = asyncio.run(_awaited(ctx, value))
            return value
        finally:
            if os.getpid() != self.pid:
                _end_child()

    def _call_in_time(self, ctx: TaskContext) -> object:
        ctx.thread = threading.current_thread()
        with self._lock:
            self._timed[ctx] = self.clock() + (ctx.stage.timeout or 0)
            self._time.notify()
        try:
            return self._call(ctx)
        finally:
            with self._lock:
                self._timed.pop(ctx, None)  # the timer may have been first

    def _fail(self, ctx: TaskContext, error: BaseException) -> None:
        if ctx.closed:
            level = logging.DEBUG if ctx.cancelled else logging.WARNING  # who was cut off may well complain
            logger.log(level, "task %r raised after its finish, which counts: %s", ctx.name, _describe(error))
            return
        ctx.record(error)
        ctx.finish(MsgTaskFinished(ctx.task_id, ERROR, _now(), None, _text(_describe(error))))

    def sleep(self, ctx: TaskContext, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._sleepers:
            while ctx.reason is None and (left := end - time.monotonic()) > 0:
                self._sleepers.wait(min(left, threading.TIMEOUT_MAX))

    def wake_sleepers(self) -> None:
        with self._sleepers:
            self._sleepers.notify_all()

    # The timer

    def _keep_time(self) -> None:
        try:
            with self._lock:
                while not self._dismissed:
                    now = self.clock()
                    due = self._tick(now)
                    self._time.wait(None if due is None else min(due - now, threading.TIMEOUT_MAX))
        except BaseException as error:  # for the calling thread, which would wait for ever
            self._fault = error

    def _tick(self, now: float) -> float | None:
        """Do what is due; returns when the next thing is. With the lock held."""
        while self._later and self._later[0][0] <= now:
            self._hand_out(heappop(self._later)[2])
        for ctx in [ctx for ctx, deadline in self._timed.items() if deadline <= now]:
            self._time_out(ctx)
        moments = [*self._timed.values(), *(later[0] for later in self._later[:1])]
        return min(moments, default=None)

    def _time_out(self, ctx: TaskContext) -> None:
        """End an attempt whose thread cannot be ended: it is cut off, and another takes its place."""
        del self._timed[ctx]
        text = f"timed out after {ctx.stage.timeout:g} s"
        if ctx.closed:  # it has told its end, or its rows were refused, and goes on all the same
            logger.warning("task %r has ended, but its function goes on: it %s", ctx.name, text)
        else:
            ctx.error, ctx.traceback = TimeoutError(text), _stack_of(ctx)
            ctx.finish(MsgTaskFinished(ctx.task_id, ERROR, _now(), None, text), wait=False)
        ctx.abandoned = True
        ctx.cancel(text)
        self._threads = [
            thread for thread in self._threads if thread is not ctx.thread
        ]  # nobody waits for it
        if not self._start_worker():
            left = len(self._threads)
            logger.warning(
                "no thread starts in place of the one of task %r; %d workers are left", ctx.name, left
            )

    # The writer

    def settle(self, settled: list[tuple[TaskContext, str, str]]) -> None:
        """These attempts are committed. Called by the writer after each commit."""
        with self._lock:
            for ctx, status, message in settled:
                if status == QUEUED:
                    self._retry(ctx, message)
                    continue
                self._live.pop(ctx.task_id, None)
                self._counts[status] += 1
                stage = ctx.stage
                stage.settled += 1
                if status == ERROR:
                    self._note_failure(ctx, message)
                trouble = "" if status == DONE else f"{ctx.name!r} {TROUBLES[status]}"
                stage.spoiled = stage.spoiled or trouble
                if ctx.name in self._waiters:
                    self._resolve(ctx.name, trouble)
                if stage.exhausted and stage.submitted == stage.settled:
                    self._end(stage)
            self._stir()

    def _retry(self, ctx: TaskContext, message: str) -> None:
        from random import uniform

        again = TaskContext(self, ctx.stage, ctx.task, ctx.task_id, ctx.name, ctx.attempt + 1)
        again.traceback = ctx.traceback
        self._live[ctx.task_id] = again
        first = ctx.stage.retry_delay
        delay = min(first * 2.0 ** min(ctx.attempt - 1, 100), max(first, LONGEST_DELAY)) * uniform(1, 1.25)
        logger.info("task %r: %s; again in %.1f s", ctx.name, message, delay)
        heappush(self._later, (self.clock() + delay, id(again), again, message))
        self._time.notify()

    def _note_failure(self, ctx: TaskContext, message: str) -> None:
        cause = _cause(ctx.error, message)
        if cause not in self.causes and len(self.causes) >= FAILURES_KEPT:
            cause = "other causes"
        if len(self.failures) < FAILURES_KEPT or cause not in self.causes:
            self.failures.append(Failure(ctx.name, message, ctx.traceback, cause))
        self.causes[cause] = self.causes.get(cause, 0) + 1
        if ctx.error is not None:
            self.unreported += 1
            self.first_error = self.first_error or ctx.error
        if self.settings.fail_fast and not self.stopping:
            self.stopping = f"not started: fail_fast, and {ctx.name!r} failed"

    # The end

    def _wind_up(self, failure: BaseException | None) -> BaseException | None:
        """Steps 3 to 5 of execute(), whatever happened before; returns what the run ends with."""
        try:
            if failure is not None and self.writer.error is None and self.writer.opened.is_set():
                self._drain()
        except BaseException as error:  # the writer has failed meanwhile, most likely
            failure = failure or error
        try:
            self._dismiss()
            for conn in (self._reader, self._names):
                if conn is not None:
                    conn.close()  # before the writer's last checkpoint, which then leaves no side files
            if self.writer.ident is not None:
                self._end_writer(failure)
        except BaseException as error:
            failure = failure or error
        finally:
            self.channel.close()
            try:
                if self._shown:
                    self.display.stop(self.result())
            except BaseException as error:
                logger.warning("the progress display failed at its end: %s", _describe(error))
        return failure

    def _drain(self) -> None:
        """After a failure of the iterator, or of the caller: let what runs finish, all of it stored."""
        while self._live and self.writer.error is None:
            self._cancel_ready()
            self._heed_signals()
            with self._lock:
                self._wake.wait(POLL)

    def _dismiss(self) -> None:
        with self._lock:
            self._dismissed = True
            self._work.notify_all()
            self._time.notify()
        if self.writer.error is not None:
            for ctx in list(self._live.values()):
                ctx.cancel("the writer failed")
        until = time.monotonic() + (0.5 if self._left else GRACE)
        for thread in [*self._threads, *[self._timer] * (self._timer.ident is not None)]:
            thread.join(max(until - time.monotonic(), 0))

    def _end_writer(self, failure: BaseException | None) -> None:
        counts = self._counts
        clean = failure is None and not self.stopping and not counts[ERROR]
        status = DONE if clean else CANCELLED if self._signals else ERROR
        unsubmitted = sum((stage.registered or stage.submitted) - stage.submitted for stage in self._stages)
        counts[CANCELLED] += unsubmitted
        reason = (self.stopping or "never started") if unsubmitted or failure else ""
        if self.writer.error is None:
            ended = partial(self.writer.end_run, status, reason, tuple(counts.values()))
            self.channel.put(None, ended, wait=False)
        self.channel.close()
        while self.writer.is_alive():
            threading.Thread.join(self.writer, POLL)  # bounded: it waits for no lock longer than busy_timeout
            self._heed_signals()
        self._check_faults(ended=True)

    def result(self) -> RunResult:
        elapsed = time.monotonic() - self.began
        done, error, cancelled, skipped = self._counts.values()
        failures, causes = list(self.failures), dict(self.causes)
        return RunResult(self.writer.run_id, done, error, cancelled, skipped, elapsed, failures, causes)

    # Signals. The handler only sets attributes; the calling thread polls them.

    def _take_signals(self) -> dict[int, Any]:
        """Install the handler where this thread may; returns the handlers before."""
        previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return previous
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks SIGHUP
            if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, self._on_signal)  # not what nohup, or C code, set
        return previous

    def _on_signal(self, number: int, _: Any) -> None:
        self._signals.append(number)
        self.stopping = self.stopping or "interrupted"
        self.writer.hurried = len(self._signals) > 2
        if len(self._signals) > 2:
            signal.signal(number, signal.SIG_DFL)  # should all that be in vain, the next one ends the process
        if self._pulling:
            raise _Interrupted

    def _heed_signals(self) -> None:
        now = time.monotonic()
        if len(self._signals) > self._heeded:
            self._heeded = len(self._signals)
            name = signal.Signals(self._signals[-1]).name
            if self._heeded == 1:
                running = len(self._threads) - self._idle
                logger.warning(
                    "%s: nothing new starts; %d running tasks finish (again: leave now)", name, running
                )
                self._leave_at = now + GRACE if name != "SIGINT" else None
            else:
                self._leave_at = now
        if self._leave_at is not None and now >= self._leave_at:
            self._leave_at = now + 2
            self.writer.hurried |= self._left  # it has had two seconds to store what finished
            self._leave()

    def _leave(self) -> None:
        """Cancel what runs; whoever sends something from now on is told."""
        self._left = True
        with self._lock:
            live = list(self._live.values())
        for ctx in live:
            ctx.cancel("interrupted")
            ctx.abandoned = True
            self._cancel(ctx, "interrupted")

    def _deliver(self, result: RunResult) -> None:
        """Hand the signal to those who handled it before; a caller never sees a normal return."""
        try:
            signal.raise_signal(self._signals[0])
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            interrupt.result = result  # type: ignore[attr-defined]
            raise


def run_pipeline(
    tasks: Any, db_path: Any = "./pipeloom.db", *, worker_fn: Any = None, **options: Any
) -> RunResult:
    """Run `worker_fn(task, context)` for every task, on threads, and store all of it in one SQLite file.

    Blocks until everything is committed. `tasks` is any iterable of any objects, pulled in this thread as
    workers become free; (db_path, tasks) is understood as well. The options, and what they are if left out:

    workers=None             how many tasks run at once; None is one per CPU, and no more than tasks
    schema=None              an SQL script, run when the database is opened
    handlers=None            {message class: function(connection, message)}, run in the writer
    progress="auto"          or "rich", "ansi", "log", "none", or an object with the methods of Progress
    check=True               raise PipelineError if a worker raised; False returns the result instead
    fail_fast=False          the first failure cancels what has not started
    store_task_status=True   keep the tables task_runs and pipeline_runs
    wal=True                 False for file systems where WAL does not work
    resume=False             True skips what an earlier run has done, known by its task_id or else its name
    retries=0                how often a task that failed is tried again
    retry_delay=1.0          seconds before the first retry, then twice as long each time, up to an hour
    timeout=None             seconds that one attempt may take
    busy_timeout=300.0       seconds to wait for another process's lock on the database
    durable=False            True makes each commit survive a power loss too
    atomic=True              False stores rows as they come, done or not, for loads too big to be held
    writer=SQLiteWriter      a subclass of it

    Raises UsageError or UsageTypeError before anything is written, WriterFailed if the database fails
    during the run, PipelineError, and whatever the iterable raises, after the running tasks have finished.
    After Ctrl-C it raises KeyboardInterrupt, never returns.
    """
    if _is_path(tasks) and not _is_path(db_path):
        tasks, db_path = db_path, tasks
    if not _is_path(db_path):
        raise UsageTypeError(f"db_path={db_path!r}: expected a path, as in run_pipeline(tasks, 'jobs.db')")
    if _is_path(tasks) or not hasattr(tasks, "__iter__"):
        raise UsageTypeError(
            f"tasks={tasks!r}: expected an iterable of tasks, as in run_pipeline([1, 2], 'jobs.db')"
        )
    if not callable(worker_fn):
        raise UsageTypeError(
            f"worker_fn={worker_fn!r}: expected a function(task, context) that does one task"
        )
    _check_options("run_pipeline", options, _Settings.__dataclass_fields__)
    _check_function("worker_fn", worker_fn, "task", "context")
    stage = _Stage(lambda ctx: worker_fn(ctx.task, ctx), tasks, _identify)
    _check_tasks(stage)
    return _run([stage], os.fsdecode(db_path), options)


def _run(stages: list[_Stage], path: str, options: dict[str, Any]) -> RunResult:
    if _Session.current is not None:  # the command line's, whose options win
        return _Session.current.run(stages, path, options)
    return _Run(stages, path, _Settings(**options)).execute()


def _check_function(what: str, function: Any, *arguments: str) -> None:
    """Find out before anything is started that a function can be called so."""
    from inspect import isasyncgenfunction, isgeneratorfunction, signature

    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise UsageTypeError(
            f"{what} is a generator, whose body would never run; use ctx.progress(), not yield"
        )
    try:
        signature(function).bind(*arguments)
    except TypeError as error:
        raise UsageTypeError(f"{what} cannot be called with ({', '.join(arguments)}): {error}") from None
    except ValueError:  # a builtin that does not tell its parameters
        return


def _is_path(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def _check_options(what: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageTypeError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(known)}")


def _identify(task: Any, _: int) -> tuple[Any, str | None]:
    """The id and the name that a task has of itself, if any."""
    if isinstance(task, (str, int, float, os.PathLike)):
        return None, os.fspath(task) if isinstance(task, os.PathLike) else str(task)
    if isinstance(task, Mapping):
        return task.get("task_id"), task.get("name")
    return getattr(task, "task_id", None), getattr(task, "name", None)


def _check_tasks(stage: _Stage) -> None:
    """Find bad and double ids of known tasks before anything is written."""
    if not isinstance(stage.source, Sequence):
        return
    stage.by_name = False
    seen: dict[int, Any] = {}
    for task in stage.source if not isinstance(stage.source, range) else ():
        given, _ = _identify(task, 0)
        if given is None:
            stage.by_name = True
            continue
        id = _task_id(given)
        if id in seen:
            raise UsageError(f"task_id {id} is that of {seen[id]!r} and of {task!r}; give each its own")
        seen[id] = task
    stage.by_name |= isinstance(stage.source, range)
    stage.highest = max(seen, default=0)


# ---- Pipeline: tasks declared as functions, and what comes after what ----------------------------------


class Pipeline:
    """Tasks declared as functions, and what comes after what.

        pipe = Pipeline("sales.db", schema="CREATE TABLE IF NOT EXISTS sale(day TEXT, amount INTEGER)")

        @pipe.task(each=lambda: sorted(Path("incoming").glob("*.csv")), retries=2)
        def load(ctx, path): ...

        @pipe.task(after=load)
        def report(ctx): ...

        pipe.main()

    `options` are those of run_pipeline; those of run() win over them, and a task's own (retries,
    retry_delay, timeout, atomic) over both.
    """

    def __init__(self, db_path: Any = "./pipeloom.db", **options: Any) -> None:
        if not _is_path(db_path):
            raise UsageTypeError(f"db_path={db_path!r}: expected a path, as in Pipeline('jobs.db')")
        self.db_path = os.fsdecode(db_path)
        self._options = self._checked(options)
        self._declared: dict[str, _Declared] = {}
        self._handlers: dict[type, Handler] = {}

    @staticmethod
    def _checked(options: dict[str, Any]) -> dict[str, Any]:
        _check_options("Pipeline", options, _Settings.__dataclass_fields__)
        _Settings(**options)
        return options

    def task(
        self, function: Any = None, *, each: Any = None, name: Any = None, after: Any = (), **options: Any
    ) -> Any:
        """Declare a function as a task, or as one for each item; a decorator, which returns the function.

        each     an iterable of items, or a function that makes one when the task's turn comes; it is pulled
                 as workers become free, in the thread that runs the pipeline. The function is then called
                 as function(ctx, item), without `each` as function(ctx).
        name     a function of the item that makes the task's name, instead of "load[item]"; or a str
                 instead of the function's name. It is by their names that tasks are known in later runs.
        after    a function of this pipeline, a name of a function or of one of its tasks, or several of
                 these: it starts when they all are committed as done, and is cancelled if one is not.

        The options are retries, retry_delay, timeout and atomic. What the function returns is the result.
        """
        if function is None:
            return lambda function: self.task(function, each=each, name=name, after=after, **options)
        declared = _declare(function, each, name, after, options)
        if declared.name in self._declared:
            raise UsageError(
                f"two tasks are named {declared.name!r}; give one of them another name, as with name="
            )
        self._declared[declared.name] = declared
        return function

    def handles(self, kind: type) -> Callable[[Handler], Handler]:
        """Declare a function(connection, message) as the handler of a message class; a decorator."""

        if not isinstance(kind, type):
            raise UsageTypeError(f"handles({kind!r}): expected a message class, as in @pipe.handles(Message)")

        def declare(handler: Handler) -> Handler:
            self._handlers[kind] = handler
            return handler

        return declare

    def run(self, **options: Any) -> RunResult:
        """Run all tasks; blocks, takes the options of run_pipeline and raises what that raises."""
        options = {**self._options, **self._checked(options)}
        options["handlers"] = {**(options.get("handlers") or {}), **self._handlers}
        return _run(self._stages(), self.db_path, options)

    def main(self, argv: list[str] | None = None) -> NoReturn:
        """Run with the options of the command line's `run`, print a summary and exit with its code."""
        if _Session.importing:
            raise UsageError(
                "the pipeline runs when its file is imported; put that under `if __name__ == '__main__':`"
            )
        if _Session.current is not None:  # `pipeloom run` has called the function that called this
            self.run()
            sys.exit()  # with the code of that session
        _exit(lambda: _execute(_pipeline_parser(self), argv))

    def _stages(self) -> list[_Stage]:
        if not self._declared:
            raise UsageError("the pipeline has no task; declare one with @pipe.task")
        stages = {name: declared.stage() for name, declared in self._declared.items()}
        names: dict[Any, list[str]] = {}  # of each function, which may be declared under several
        for name, declared in self._declared.items():
            names.setdefault(declared.function, []).append(name)
        before: dict[str, dict[str, None]] = {}
        for name, declared in self._declared.items():
            stage, before[name] = stages[name], {}
            for what in declared.after:
                before[name].update(dict.fromkeys(self._upstreams(stage, what, names)))
            for upstream in before[name]:
                stages[upstream].followers.append(stage)
            stage.waits = len(before[name]) + len(stage.awaits)
            makers = (task.partition("[")[0] for task in stage.awaits)
            before[name].update(dict.fromkeys(maker for maker in makers if maker in stages))
        _check_cycles(before)
        return list(stages.values())

    def _upstreams(self, stage: _Stage, what: Any, names: Mapping[Any, list[str]]) -> list[str]:
        """The declared tasks that one entry of after= means; none if it means a single item's."""
        if isinstance(what, str) and what in self._declared:
            return [what]
        if isinstance(what, str) and self._may_make(what):
            stage.awaits += [what] if what not in stage.awaits else []
            return []
        if not isinstance(what, str) and callable(what) and what in names:
            return names[what]
        shown = what if isinstance(what, str) else getattr(what, "__name__", what)
        raise UsageError(
            f"after={shown!r} of task {stage.name!r}: expected a task of this pipeline, which has "
            f"{_some(self._declared)}; declare it, or mend the name"
        )

    def _may_make(self, name: str) -> bool:
        """Whether some each= may give a task of this name; not known before its items are."""
        named = self._declared.get(name.partition("[")[0])
        if named is not None and named.each is not None and named.naming is None and name.endswith("]"):
            return True
        return any(declared.naming is not None for declared in self._declared.values())


@dataclass(frozen=True)
class _Declared:
    """A function with what @pipe.task said of it."""

    name: str
    function: Callable[..., object]
    each: Any
    naming: Callable[[Any], Any] | None
    after: list[Any]
    options: Mapping[str, Any]

    def stage(self) -> _Stage:
        """Its part in one run."""
        function = self.function
        if self.each is None:
            return _Stage(function, (None,), lambda *_: (None, self.name), self.name, self.options, lone=True)
        return _Stage(lambda ctx: function(ctx, ctx.task), self.each, self._identify, self.name, self.options)

    def _identify(self, item: Any, position: int) -> tuple[None, str]:
        if self.naming is not None:
            return None, str(self.naming(item) or f"{self.name}[{position}]")
        name = _identify(item, position)[1]
        if not isinstance(name, str):
            name = str(item)
            if re.search(" at 0x[0-9a-fA-F]{5}", name):  # an address names nothing in later runs
                name = str(position)
        return None, f"{self.name}[{name}]"


def _declare(function: Any, each: Any, name: Any, after: Any, options: dict[str, Any]) -> _Declared:
    """Check what @pipe.task was given, before anything is started."""
    if not callable(function):
        raise UsageTypeError(f"task({function!r}): expected a function; options are named, as in each=")
    own = name if isinstance(name, str) else getattr(function, "__name__", type(function).__name__)
    if not (name is None or (isinstance(name, str) and name) or (callable(name) and each is not None)):
        raise UsageTypeError(
            f"name={name!r} of task {own!r}: expected a str, or a function of its each= item"
        )
    if each is not None and (_is_path(each) or not (callable(each) or hasattr(each, "__iter__"))):
        raise UsageTypeError(
            f"each={each!r} of task {own!r}: expected an iterable, or a function that makes one"
        )
    _check_function(f"the function of task {own!r}", function, *["ctx", "item"][: 1 + (each is not None)])
    _check_options("a task", options, STAGE_OPTIONS)
    _check_stage_options(options)
    naming = name if callable(name) else None
    several = after if isinstance(after, (list, tuple, set, frozenset)) else [after]
    upstreams = [_text(what) if isinstance(what, str) else what for what in several]
    return _Declared(_text(own), function, each, naming, upstreams, options)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _check_cycles(before: Mapping[str, Iterable[str]]) -> None:
    """Raise UsageError if some task would wait for itself."""
    after: dict[str, list[str]] = {name: [] for name in before}
    missing = dict.fromkeys(before, 0)
    for name, upstreams in before.items():
        for upstream in upstreams:
            after[upstream].append(name)
            missing[name] += 1
    free = [name for name in before if not missing[name]]
    for name in free:  # which grows
        for follower in after[name]:
            missing[follower] -= 1
            if not missing[follower]:
                free.append(follower)
    waiting = set(before).difference(free)
    if waiting:
        walk = [min(waiting)]
        while walk[-1] not in walk[:-1]:
            walk.append(min(waiting.intersection(before[walk[-1]])))
        cycle = walk[walk.index(walk[-1]) :]
        raise UsageError(f"a task comes after itself: {' after '.join(cycle)}; remove one of these after=")


# ---- Status: reading a finished or a live database; never writes, never blocks a run -------------------


def read_status(db_path: str, limit: int = 20, failed: bool = False) -> dict[str, Any]:
    """The counts, the last run and the latest tasks of a database, as plain values. Any thread may call it.

    Raises DatabaseError if there is no such database, and does not create it.
    """
    if not os.path.isfile(db_path):
        raise DatabaseError(db_path, "does not exist", "name the file that a run has made, with --db")
    side_files = [db_path + end for end in ("-wal", "-journal")]
    idle = not any(map(os.path.exists, side_files))
    try:
        with _connect_readonly(db_path, idle=idle) as conn:
            conn.row_factory = sqlite3.Row
            counts = dict(conn.execute("SELECT status, count(*) FROM task_runs GROUP BY status").fetchall())
            where = "WHERE status IN ('error', 'cancelled')" if failed else ""
            latest = "ORDER BY coalesce(finished_at, started_at, '') DESC, id DESC LIMIT ?"
            tasks = [dict(row) for row in conn.execute(f"SELECT * FROM task_runs {where} {latest}", (limit,))]
            run = None
            if conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'pipeline_runs'").fetchone():
                run = next(
                    map(dict, conn.execute("SELECT * FROM pipeline_runs ORDER BY id DESC LIMIT 1")), None
                )
    except sqlite3.Error as error:
        if _is_lock(error):
            raise DatabaseError(db_path, f"cannot be read now: {error}", "try again later") from error
        if "readonly" in str(error):
            raise DatabaseError(db_path, "was left half-written", "run again; that rolls it back") from error
        if "no such table" in str(error) and _RunLock.is_held(db_path):  # a run is about to make it
            return {"database": db_path, "counts": {}, "run": None, "tasks": []}
        raise DatabaseError(db_path, f"has no status: {error}", "name a database of pipeloom") from error
    if idle and any(map(os.path.exists, side_files)):  # a run has begun meanwhile: read what it commits
        return read_status(db_path, limit, failed)
    if run and run["status"] == RUNNING and not _RunLock.is_held(db_path):
        run["status"] = "interrupted"  # its process is gone; the next run will say so in the database
    return {"database": db_path, "counts": counts, "run": run, "tasks": tasks}


def _status_text(status: dict[str, Any]) -> str:
    lines = []
    if status["tasks"]:
        lines.append(f"{'id':>6} {'status':<10} {'progress':>8}  {'name':<28} message")
    for task in status["tasks"]:
        start = f"{task['id']:>6} {task['status']:<10} {task['progress'] or 0:>8.0%}"
        message = (task["message"] or "").split("\n")[0]
        lines.append(f"{start}  {_fit(task['name'], 28)} {_fit(message, 100)}".rstrip())
    counts = status["counts"]
    known = [f"{counts[s]:,} {s}" for s in (QUEUED, RUNNING, *FINAL) if counts.get(s)]
    lines.append(", ".join(known) or "no tasks")
    run = status["run"]
    if run:
        end = ", ended {finished_at}" if run["finished_at"] else " as process {pid} on {host}"
        lines.append(("last run: {status}, started {started_at}" + end).format(**run))
    return "\n".join(lines)


# ---- Demo: tasks that only sleep, to see the bars and the database -------------------------------------


def demo_worker(task: Task, q: Any) -> None:
    """Take `task.steps` short steps, in the message style. A task whose name ends in "!" fails half-way."""
    q.put(MsgTaskStarted(task.task_id, task.name, _now()))
    for step in range(1, task.steps + 1):
        time.sleep(0.02 + 0.003 * (task.task_id * step % 7))
        q.put(MsgTaskProgress(task.task_id, step, task.steps, f"step {step}/{task.steps}"))
        if task.name.endswith("!") and step * 2 >= task.steps:
            raise RuntimeError("this task was asked to fail")
    q.put(MsgTaskFinished(task.task_id, DONE, _now(), result=f"ok:{task.name}", message="completed"))


# ---- Command line: data to stdout, everything else to stderr -------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed tasks, 2 wrong use, 75 in use, 130 Ctrl-C."""
    return _execute(_parser(), argv)


def _execute(parser: Any, argv: list[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    with _signals_taken():
        try:
            _setup_logging_of(args)
            return int(args.command(args))
        except PipeloomError as error:
            _say(f"pipeloom: {error}")
            return 75 if isinstance(error, RunInProgress) else 2
        except KeyboardInterrupt:
            return 130


def _exit(command: Callable[[], int]) -> NoReturn:
    """End the program with the code of a command."""
    code: Any = 0
    before = threading.enumerate()
    try:
        code = command()
    except SystemExit as error:
        code = error.code
    if all(thread.name != "pipeloom-worker" or thread in before for thread in threading.enumerate()):
        sys.exit(code)
    # A task was left behind. Python waits at its end for the threads of every ThreadPoolExecutor and
    # asyncio.to_thread, perhaps for ever; a task's should not hold up the exit code.
    if not isinstance(code, (int, type(None))):
        _say(str(code))
    with suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _say(text: str) -> None:
    """A line to stderr, if there is one: it may be closed, full, or a pipe that nobody reads."""
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        logger.debug("stderr is gone")


def _print(text: str) -> None:
    """A line of data to stdout."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # flushing stdout at exit would say it again
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            raise UsageError(f"stdout cannot be written: {error.strerror}; send it elsewhere") from error


def _setup_logging_of(args: Any) -> None:
    log_file = getattr(args, "log_file", None)
    try:
        setup_logging(getattr(args, "verbose", 0), log_file)
    except OSError as error:
        what = f"--log-file {log_file!r} cannot be written"
        raise UsageError(f"{what}: {error.strerror}; name another") from error


@contextmanager
def _signals_taken() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program by an exception, so that the summary is still printed, and
    `kill -USR1 PID` print every thread's stack, above the bars; but none that the program uses itself.

    A thread of its own prints, under the GIL. faulthandler.register would also show a main thread that hangs
    in C, but it reads the stacks of threads that run on meanwhile, and takes the process with it at times.
    """
    from traceback import format_stack

    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whose put() a signal handler may call

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    def show_stacks() -> None:
        while requests.get():
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != threading.get_ident():
                    _say(f"Thread {names.get(ident, ident)}:\n{''.join(format_stack(frame)).rstrip()}")

    wanted = {"SIGTERM": end, "SIGHUP": end, "SIGUSR1": lambda *_: requests.put(True)}
    handlers = {getattr(signal, name): do for name, do in wanted.items() if hasattr(signal, name)}  # Windows
    if threading.current_thread() is not threading.main_thread():  # which alone may take them
        handlers.clear()
    taken = [number for number in handlers if signal.getsignal(number) == signal.SIG_DFL]
    threading.Thread(target=show_stacks, name="pipeloom-stacks", daemon=True).start()
    for number in taken:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        requests.put(False)


def _new_parser(prog: str, description: str) -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _say(f"pipeloom: {message}; see {self.prog} --help")
            self.exit(2)

    return Parser(prog=prog, description=description)


def _parser() -> Any:
    text = "Run many tasks at once, store what they make in one SQLite file, watch them live."
    parser = _new_parser(f"python -m {__name__}", text)
    parser.add_argument("--version", action="version", version=f"pipeloom {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Callable[[Any], int], text: str, db: Any = "./pipeloom.db") -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        default = db or "the one that the program names"
        sub.add_argument("--db", default=db, metavar="FILE", help=f"the database (default: {default})")
        return sub.add_argument

    add = command("demo", _cmd_demo, "Run tasks that only sleep, to see it work.", "./wal_demo.db")
    add("-n", "--num-tasks", type=_number_from(1), default=20, metavar="N", help="how many (default: 20)")
    add("--no-wal", action="store_true", help="use SQLite's rollback journal")
    add("--fail", type=_number_from(0), default=0, metavar="N", help="let N tasks fail")
    _add_common_options(add)
    add = command("run", _cmd_run, "Run a pipeline or a function of yours, or a file of yours.", None)
    target = "package.module:name, file.py:name, or file.py (its main, or its Pipeline)"
    add("target", metavar="TARGET", help=target)
    add("--arg", action="append", default=[], metavar="KEY=VALUE", help="pass to the function")
    _add_run_options(add)
    add = command("status", _cmd_status, "Show how the tasks of a database fare, also while they run.")
    add("-n", "--limit", type=_number_from(1), default=20, metavar="N", help="how many tasks (default: 20)")
    add("--failed", action="store_true", help="only tasks that failed or were cancelled")
    add("--watch", action="store_true", help="again every second, until the run has ended")
    add("--json", action="store_true", help="as JSON")
    command("init-db", _cmd_init_db, "Create the tables, or complete those of an older pipeloom.")
    return parser


def _pipeline_parser(pipe: Pipeline) -> Any:
    parser = _new_parser(os.path.basename(sys.argv[0]) or "pipeline", "Run the tasks of this pipeline.")
    parser.add_argument("--db", metavar="FILE", help=f"the database (default: {pipe.db_path})")
    parser.set_defaults(command=lambda args: _Session(args).call(pipe.run))
    _add_run_options(parser.add_argument)
    return parser


def _add_run_options(add: Callable[..., Any]) -> None:
    add("--retries", type=_number_from(0), metavar="N", help="try a failed task N times again")
    add("--timeout", type=float, metavar="SECONDS", help="how long an attempt may take")
    add("--fail-fast", action="store_true", default=None, help="stop starting at the first failure")
    add("--durable", action="store_true", default=None, help="let each commit survive a power loss too")
    add("--progress", metavar="HOW", help="auto, rich, ansi, log or none")
    add("--dry-run", action="store_true", help="print the names of the tasks and run none")
    _add_common_options(add)


def _add_common_options(add: Callable[..., Any]) -> None:
    add("--resume", action="store_true", default=None, help="skip the tasks that are done")
    add("-w", "--workers", type=_number_from(1), metavar="N", help="how many tasks run at once")
    add("-v", "--verbose", action="count", default=0, help="log more; -vv logs all")
    add("-l", "--log-file", metavar="FILE", help="log to this file, too")


def _number_from(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        import argparse

        if not text.isdigit() or not low <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low}")
        return int(text)

    return number


def _cmd_demo(args: Any) -> int:
    names = [f"task-{id}{'!' if id <= args.fail else ''}" for id in range(1, args.num_tasks + 1)]
    tasks = [Task(id, name, steps=10 + 7 * id % 21) for id, name in enumerate(names, 1)]
    workers = args.workers or min(args.num_tasks, 8)  # they sleep: more of them than CPUs is right
    options = {"workers": workers, "wal": not args.no_wal, "worker_fn": demo_worker}
    return _Session(args).call(lambda: run_pipeline(tasks, args.db, **options))


def _cmd_run(args: Any) -> int:
    from inspect import signature

    arguments = dict(_argument(text) for text in args.arg)
    function = _load_target(args.target)
    if isinstance(function, Pipeline):
        if arguments:
            raise UsageError(f"--arg: {args.target} is a Pipeline, which takes none; name a function instead")
        function = function.run
    try:
        with suppress(ValueError):  # of a builtin that does not tell its parameters
            signature(function).bind(**arguments)
    except TypeError as error:
        name = getattr(function, "__name__", function)
        raise UsageError(f"--arg: the call of {name} fails: {error}; see its parameters") from error
    return _Session(args).call(lambda: function(**arguments))


def _argument(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where a value that reads as a number, true or false is one."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--arg {text!r}: expected KEY=VALUE, as in --arg folder=incoming")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return key, kind(value)
    return key, value


def _load_target(target: str) -> Any:
    """The function that TARGET names."""
    place, _, name = target.rpartition(":") if not target.endswith(".py") else (target, "", "")
    what, is_file = f"target {target!r}", place.endswith(".py")
    if not place or not (name or is_file):
        raise UsageError(f"{what}: expected package.module:name, file.py:name or file.py")
    if is_file and not os.path.isfile(place):
        raise UsageError(f"{what}: there is no file {place!r}; name an existing one")
    try:
        _Session.importing = True
        found = _import_target(place)
    except UsageError:
        raise
    except Exception as error:
        logger.debug("importing %r failed", place, exc_info=True)
        why = _describe(error)
        raise UsageError(f"{what} cannot be imported: {why}; check it, -vv shows where") from error
    finally:
        _Session.importing = False
    pipelines = [value for value in vars(found).values() if isinstance(value, Pipeline)]
    if not name and getattr(found, "main", main) is main and pipelines:  # which `import *` brings
        if len(pipelines) > 1:
            raise UsageError(f"{what} has {len(pipelines)} pipelines; name one, as {place}:name")
        return pipelines[0]
    for part in (name or "main").split("."):
        if not hasattr(found, part):
            raise UsageError(f"{what}: {place!r} has no {part!r}; name a function of it, as {place}:name")
        found = getattr(found, part)
    if not callable(found) and not isinstance(found, Pipeline):
        raise UsageError(f"{what} is {found!r}, which cannot be called; name a function or Pipeline")
    return found


def _import_target(place: str) -> Any:
    """Import a module by its name, or a file from where it is, whatever else has its name."""
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location

    if not place.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return import_module(place)
    sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
    name = os.path.basename(place)[:-3]
    if name in sys.modules:
        name = f"{name} of pipeloom run"
    spec = spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Session:
    """What the command line adds to the runs that a program starts: options that win, and a summary."""

    current: _Session | None = None
    importing = False  # the target is being imported, and should not run yet

    def __init__(self, args: Any) -> None:
        names = ("workers", "resume", "retries", "timeout", "fail_fast", "durable", "progress")
        given = {name: getattr(args, name, None) for name in names}
        self.options = {name: value for name, value in given.items() if value is not None}
        self.args = args
        self.runs: list[tuple[str, RunResult]] = []

    def call(self, function: Callable[[], object]) -> int:
        """Call what starts the runs; returns the exit code."""
        value: object = None  # where the function ends by sys.exit()
        _Session.current = self
        try:
            value = function()
            if type(value) is CoroutineType:  # an async def main()
                import asyncio

                value = asyncio.run(value)
        except BaseException as error:
            leaves = isinstance(error, SystemExit) and not error.code
            if not (leaves or isinstance(error, PipelineError)):  # of these the summary says it better
                self.report(ended=isinstance(error, UsageError))
                raise
        finally:
            _Session.current = None
        code = self.report()
        return code if code or type(value) is not int else value

    def run(self, stages: list[_Stage], path: str, options: dict[str, Any]) -> RunResult:
        """What run_pipeline and Pipeline.run do in this session."""
        path = path if self.args.db is None else self.args.db
        run = _Run(stages, path, _Settings(**{**options, **self.options}))
        if getattr(self.args, "dry_run", False):
            for stage in stages:
                for name in _names_of(stage):
                    _print(_cut(name, _width(name)))
            return RunResult(None, 0, 0, 0, 0, 0.0)
        try:
            return run.execute()
        finally:
            if run.result().total or run.writer.run_id is not None:  # else it never began
                self.runs.append((path, run.result()))

    def report(self, ended: bool = True) -> int:
        """Print the summary of each run to stderr; returns the exit code."""
        for path, result in self.runs:
            _say(_summary(path, result))
        ok = all(result.ok for _, result in self.runs)
        resumable = any(result.run_id is not None and path != ":memory:" for path, result in self.runs)
        if resumable and not (ok and ended) and sys.argv[0] not in ("-c", "-"):
            _say(f"to go on where this ended: {_command_to_resume(self.args.argv)}")
        return 0 if ok else 1


def _command_to_resume(argv: list[str]) -> str:
    from shlex import join
    from shutil import which

    program, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    python = os.path.basename(sys.executable)
    command = [python if which(python) == sys.executable else sys.executable, program]
    if spec is not None and spec.name != "__main__":
        command[1:] = ["-m", spec.name]
    elif os.access(program, os.X_OK) and not program.endswith(".py") and not os.path.isdir(program):
        del command[0]  # a script that finds its Python by itself
    at = 1 if argv[:1] in (["run"], ["demo"]) else 0
    return join([*command, *argv[:at], *(["--resume"] if "--resume" not in argv else []), *argv[at:]])


def _names_of(stage: _Stage) -> Iterator[str]:
    """The names of its tasks; what comes after others may need them to have run before it can say."""
    if callable(stage.source) and stage.waits:
        yield f"{stage.name}[...]"
        return
    for position, item in enumerate(stage.source() if callable(stage.source) else stage.source, 1):
        given, name = stage.identify(item, position)
        yield _text(name or f"task-{position if given is None else given}")


def _summary(path: str, result: RunResult) -> str:
    rest = {"skipped": result.skipped, "failed": result.error, "cancelled": result.cancelled}
    parts = [f"{result.done:,} done", *(f"{number:,} {word}" for word, number in rest.items() if number)]
    lines = [f"{', '.join(parts)} in {result.elapsed:.1f} s; database {path}"]
    if result.error:
        plural = "s" if len(result.causes) != 1 else ""
        lines.append(f"{result.error:,} failed, {len(result.causes):,} cause{plural}:")
    for cause, number in sorted(result.causes.items(), key=lambda item: -item[1])[:10]:
        failure = next(failure for failure in result.failures if failure.cause == cause)
        name, message = _cut(failure.task, NAME_WIDTH), _cut(failure.message, 200)
        more = f" and {number - 1:,} more" if number > 1 else ""
        where = f" ({cause.partition(' at ')[2]})" if cause != failure.message else ""
        lines.append(f"  {name}{more}: {message}{where}")
    return "\n".join(lines)


def _cmd_status(args: Any) -> int:
    import json

    while True:
        live = _RunLock.is_held(args.db)
        status = read_status(args.db, args.limit, args.failed)
        if args.watch and not args.json and _is_terminal(sys.stdout):
            _print("\x1b[H\x1b[2J")
        _print(json.dumps(status) if args.json else _status_text(status))
        if not args.watch or not live:
            return 0
        time.sleep(1)


def _cmd_init_db(args: Any) -> int:
    if args.db == ":memory:":
        raise UsageError("--db ':memory:' would be gone at once; name a file")
    _check_database(args.db)
    try:
        with closing(connect(args.db)) as conn:
            init_schema(conn, store_task_status=True)
    except sqlite3.Error as error:
        raise DatabaseError(args.db, f"cannot be used: {error}", "try again later, or use another") from error
    _say(f"database {args.db} has the tables task_runs and pipeline_runs")
    return 0


# ---- The other names by which this file is known -------------------------------------------------------

_PLACES = ("messages", "engine", "writer", "progress", "db", "rlog", "demo")  # modules of the original
for _place in _PLACES:
    sys.modules.setdefault(f"{__name__}.{_place}", sys.modules[__name__])


def __getattr__(name: str) -> Any:
    if name == "console":
        return _rich_console() or _PlainConsole()
    if name == "Msg":
        from typing import Union

        return Union[MsgTaskStarted, MsgTaskProgress, MsgTaskFinished, MsgExecute]
    if name in _PLACES:
        return sys.modules[__name__]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
