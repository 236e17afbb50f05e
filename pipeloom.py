"""pipeloom: run many tasks at once, store what they produce in one SQLite file, watch them live.

One file, standard library only, Python 3.8 or newer. A program:

    from pathlib import Path
    from pipeloom import Pipeline

    LINE = "CREATE TABLE IF NOT EXISTS line(path, n, text, PRIMARY KEY (path, n))"
    pipe = Pipeline("lines.db", schema=LINE)

    @pipe.task(each=lambda: Path(".").glob("*.py"), retries=2)
    def load(ctx, path):                                  # a task a file, each on a worker thread
        with path.open() as file:
            rows = ((str(path), n, line) for n, line in enumerate(ctx.track(file)))
            ctx.executemany("INSERT OR REPLACE INTO line VALUES (?, ?, ?)", rows)

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
   with one clear error; a task that fails affects no other task;
 - Ctrl-C once: nothing new starts and what runs finishes; twice: leave now. All that finished is stored;
 - memory does not grow with the number of tasks, and the display never harms the run.

Try `python -m pipeloom demo`. To vendor it, copy this file; to update it, copy it again. It is in the order
in which a task meets it: vocabulary and errors, messages, database, channel, writer (_Store, _Status,
SQLiteWriter, _Joined), progress (_Display, _Board, _Screen), task and context (TaskContext, _Attempt), engine
(_Graph, _Roster, _Timer, _EventLoop, _Worker, _Crew, _Signals, _Tally, _Intake, _Run), pipeline,
status, demo, sh (_Shell), command line.

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
# ruff: noqa: BLE001, RUF100, S102, UP007, UP017, UP035 -- your code may raise anything; 3.8 lacks the rest

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
import traceback  # which logging imports anyway, as dataclasses does inspect before Python 3.14
from bisect import bisect_right
from collections import deque, namedtuple
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache, partial
from importlib import import_module
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, signature
from itertools import accumulate, chain, compress, count, groupby, islice
from operator import attrgetter, index, is_, itemgetter, length_hint
from sched import scheduler
from threading import get_ident
from types import CoroutineType
from unicodedata import category, east_asian_width

if __name__ == "__main__":
    # This copy of the file would have classes of its own, which the tasks' `import pipeloom` does not know:
    # hand over to the real module. It gets this code: to import it would be to compile it again, where
    # nothing is cached.
    from importlib import machinery, util

    _spec: Any = globals().get("__spec__")
    if _spec is None or _spec.name == "__main__":  # `python pipeloom.py`, or cProfile and the like
        _file = os.path.abspath(__file__)
        sys.path.insert(0, os.path.dirname(_file))  # as it is not there with PYTHONSAFEPATH
        _name, _suffix = os.path.splitext(os.path.basename(_file))
        _name = _name if _suffix == ".py" and "." not in _name else "pipeloom"  # nobody can import others
        _spec = util.spec_from_loader(_name, machinery.SourceFileLoader(_name, _file))
    _module: Any = sys.modules.get(_spec.name)  # its package may have imported it already
    if _module is None:
        sys.modules[_spec.name] = _module = util.module_from_spec(_spec)
        if _spec.parent:
            setattr(sys.modules[_spec.parent], _spec.name.rpartition(".")[2], _module)
        exec(sys._getframe().f_code, vars(_module))
    _module._end_program(_module.main)

TYPE_CHECKING = False  # type checkers take it for true; `typing` costs 8 ms to import
if TYPE_CHECKING:
    from concurrent.futures import Executor
    from typing import Any, Literal, NoReturn, Tuple, TypedDict, TypeVar, Union, overload

    from typing_extensions import Unpack  # which type checkers bring along

    Handler = Callable[[sqlite3.Connection, Any], object]
    Msg = Union["MsgTaskStarted", "MsgTaskProgress", "MsgTaskFinished", "MsgExecute"]
    End = Tuple[str, str, Union[str, None], str]  # of an attempt: status, finished_at, result, message
    Function = TypeVar("Function", bound=Callable[..., Any])
    Handles = TypeVar("Handles", bound=Handler)
    console: Any

    class TaskOptions(TypedDict, total=False):  # STAGE_OPTIONS
        retries: int
        retry_delay: float
        timeout: float | None
        atomic: bool
        executor: Executor | None

    class RunOptions(TaskOptions, total=False):  # OPTIONS
        workers: int | None
        wal: bool
        store_task_status: bool
        fail_fast: bool
        check: bool
        progress: Literal["auto", "rich", "ansi", "log", "none"] | Any  # Any has the methods of Progress
        schema: str | None
        handlers: Mapping[type[Any], Any] | None
        busy_timeout: float
        durable: bool
        resume: bool
        redo: list[str] | tuple[str, ...] | set[str]

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
# stray      said of an exception that a signal handler of the user's raises, between any two of our lines

__version__ = "1.0.0"
__all__ = [
    "SENTINEL", "DatabaseError", "DemoTask", "Failure", "MessageRefused", "Msg", "MsgExecute",
    "MsgTaskFinish", "MsgTaskFinished", "MsgTaskProgress", "MsgTaskStart", "MsgTaskStarted",
    "Pipeline", "PipelineError", "PipeloomError", "Progress", "RunInProgress", "RunResult",
    "SQLiteWriter", "Task", "TaskCancelled", "TaskContext", "TaskDef", "UsageError", "UsageTypeError",
    "WriterFailed",
    "__version__", "connect", "console", "demo_worker", "init_schema", "logger", "main",
    "make_overall_progress", "make_task_progress", "preregister_task_bars", "read_status", "run_pipeline",
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


class _OfDatabase(PipeloomError):
    """What has happened to the database that `path` names, and what to do."""

    says = "database {!r} {}; {}"

    def __init__(self, path: str, what: str, cure: str) -> None:
        super().__init__(self.says.format(path, what, cure))
        self.path = path
        self._given = path, what, cure

    def __reduce__(self) -> Any:
        return type(self), self._given  # as it may come from another process


class DatabaseError(_OfDatabase, UsageError):
    """The database file cannot be used. `path` names it."""


class MessageRefused(PipeloomError, ValueError):
    """A message can never be stored; raised by `put()` in the worker that sent it."""


class WriterFailed(_OfDatabase):
    """The writer gave up while the run was on. What was committed stays; `path` names the database."""

    says = "the writer of database {!r} failed: {}; {}"


class RunInProgress(_OfDatabase):
    """Another run holds the database. Nothing was started or written; `path` names the database."""


class PipelineError(PipeloomError):
    """Tasks failed. Everything else has finished and is stored; `result` is the RunResult."""

    def __init__(self, result: RunResult) -> None:
        first = result.failures[0]
        more = f" (and {result.error - 1:,} more)" if result.error > 1 else ""
        super().__init__(
            f"{result.error:,} of {result.total:,} tasks failed: {first.task!r}: {first.message}{more}; "
            "fix the cause and run again; resume=True skips the tasks that are done"
        )
        self.result = result

    def __reduce__(self) -> Any:
        return type(self), (self.result,)


class TaskCancelled(BaseException):
    """Raised in a worker whose task is to stop. Not an Exception, so `except Exception` does not catch it."""


# ---- Messages: what a worker may say; frozen, and checked when they are put ----------------------------


@dataclass(frozen=True)
class Task:
    """A ready-made task class; any other object works as well."""

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
HIGHEST = 2**63 - 1  # that SQLite can store; no task has it, so that there always is a next
SENTINEL = object()  # asks a writer to commit what it has and stop; known by identity


def _now() -> str:
    """ISO 8601 text in UTC; all but its end is the same for a whole millisecond, and kept."""
    global _millisecond
    start, text = _millisecond
    micro = time.time_ns() // 1000 - start
    if not 0 <= micro < 1000:
        milli, micro = divmod(micro + start, 1000)
        second = datetime.fromtimestamp(milli // 1000, timezone.utc)
        text = second.strftime(f"%Y-%m-%dT%H:%M:%S.{milli % 1000:03}")
        _millisecond = milli * 1000, text
    return text + MICROSECONDS[micro]


MICROSECONDS = [f"{micro:03}+00:00" for micro in range(1000)]
_millisecond = (0, "")


def _words(error: BaseException) -> str:
    """The text of an exception, even of one whose own `__str__` raises."""
    try:
        text = _text(error)
    except BaseException:
        return "(no text: its __str__ raised)"
    return text if len(text) < 5_000 else f"{text[:5_000]}..."  # it may hold a whole response, or file


def _describe(error: BaseException) -> str:
    text = _words(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(value: object) -> str:
    """Any value as text that SQLite can hold: lone surrogates (undecodable file names) are escaped."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _result_text(value: object) -> str | None:
    """A task's result as it is stored: text as it is, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value if value is None else _text(value)
    if isinstance(value, (Generator, AsyncGenerator)):
        raise MessageRefused("the result is a generator, which nobody would run; return a list, or omit yield")
    import json

    return json.dumps(value, default=str)


def _time_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else _text(value)


def _task_id(value: object) -> int:
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < HIGHEST:
        raise MessageRefused(
            f"task_id {value!r} cannot be stored: expected an integer from -2**63 to 2**63 - 2; "
            "use one, or omit task_id and pipeloom assigns one"
        )
    return number


def _checked_started(m: MsgTaskStarted) -> MsgTaskStarted:
    given = m.task_id, m.name, m.started_at
    fields = _task_id(m.task_id), _text(m.name), _time_text(m.started_at)
    return m if type(m) is MsgTaskStarted and all(map(is_, given, fields)) else MsgTaskStarted(*fields)


def _checked_progress(m: MsgTaskProgress) -> MsgTaskProgress:
    """Clamp what is plain (a step beyond its total, a total that is unknown); refuse what is no number."""
    if (
        type(m) is MsgTaskProgress
        and type(m.step) is type(m.total) is type(m.task_id) is int
        and 0 <= m.step <= m.total < 2**53
        and -(2**63) <= m.task_id < HIGHEST
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
            "pass total=0 if it is unknown"
        )
    step, total = max(step, 0), max(total, 0)
    return MsgTaskProgress(_task_id(m.task_id), min(step, total) if total else step, total, _text(m.message))


def _checked_finished(m: MsgTaskFinished) -> MsgTaskFinished:
    if m.status not in FINAL:
        raise MessageRefused(f"status {m.status!r} is unknown: expected 'done', 'error' or 'cancelled'")
    given = m.task_id, m.status, m.finished_at, m.result, m.message
    fields = (
        _task_id(m.task_id), str(m.status), _time_text(m.finished_at), _result_text(m.result),
        _text(m.message),
    )  # fmt: skip
    return m if type(m) is MsgTaskFinished and all(map(is_, given, fields)) else MsgTaskFinished(*fields)


def _checked_execute(m: MsgExecute) -> MsgExecute:
    _check_sql(m.sql)
    return MsgExecute(m.sql, _rows(m.params) if m.many else _row(m.params), m.many)


TRANSACTION = r"(?is)(?:\s|--[^\n]*\n|/\*(?:(?!\*/).)*\*/)*(?:BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE)\b"
_manages_transaction = lru_cache(256)(partial(re.match, TRANSACTION))


def _check_sql(sql: object) -> None:
    if not isinstance(sql, str):
        raise MessageRefused(f"sql {sql!r} cannot be run: expected a str")
    if _manages_transaction(sql):
        raise MessageRefused(
            f"{sql!r:.80} is not allowed in a task, because the writer manages transactions; remove it"
        )


def _row(params: Any) -> Any:
    """A copy of one row of parameters: the worker may use its list or dict again."""
    if isinstance(params, (str, bytes)) or not hasattr(params, "__iter__"):
        raise MessageRefused(f"params={params!r:.80}: expected a row of values; for a single one, (value,)")
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
    "status": "TEXT NOT NULL",  # running | done | error | cancelled; queued: for a retry, or its turn
    "progress": "REAL NOT NULL DEFAULT 0.0",  # a fraction, 0..1
    "message": "TEXT",
    "started_at": "TEXT",
    "finished_at": "TEXT",
    "result": "TEXT",
    "attempts": "INTEGER",
    "run_id": "INTEGER",  # the run that has last changed it: for what is done, the one that did it
    "traceback": "TEXT",
}
RUN_COLUMNS = {
    "id": "INTEGER PRIMARY KEY", "started_at": "TEXT", "finished_at": "TEXT", "status": "TEXT",
    "host": "TEXT", "pid": "INTEGER", "version": "TEXT", "done": "INTEGER", "error": "INTEGER",
    "cancelled": "INTEGER", "skipped": "INTEGER",  # or NULL; see CUT_SHORT
    "total": "INTEGER",  # tasks, where that is known
}  # fmt: skip
TABLES = {"task_runs": COLUMNS, "pipeline_runs": RUN_COLUMNS}
_NAMES = ", ".join(COLUMNS)
# For _insert(). No REPLACE, which would fire ON DELETE CASCADE of a user's own tables. The second is for what
# nearly all rows end as: each value less is a tenth of a microsecond.
STORE_TASKS, STORE_DONE = (
    (
        f"INSERT INTO task_runs({_NAMES}) VALUES ", values,
        f" ON CONFLICT(id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS)}",
        values.count("?"),
    )
    for values in (f"({', '.join('?' * len(COLUMNS))})", "(?, ?, 'done', 1.0, '', ?, ?, ?, 1, ?, NULL)")
)  # fmt: skip
LOAD_TASK = f"SELECT {_NAMES} FROM task_runs WHERE id = ?"
INDEX_NAMES = "CREATE INDEX IF NOT EXISTS task_runs_name ON task_runs(name)"  # once there are old names
FIND_ID = "SELECT id, status, coalesce(run_id, 0) FROM task_runs WHERE id = ?"
FIND_NAME = FIND_ID[:-6] + "name = ? AND id > ? AND id <= ? ORDER BY id LIMIT 1"
NEWEST_DONE = (  # of a task and its items, those that have gone meanwhile included
    "SELECT coalesce(max(run_id), ?) FROM task_runs"
    " WHERE status = 'done' AND (name = ? OR name >= ? || '[' AND name < ? || '\\')"
)
NEWEST_OF_FAILED = (  # of any task, in a run that failed, was killed or had cancelled tasks
    "SELECT coalesce(max(run_id), ?) FROM task_runs WHERE status = 'done'"
    " AND run_id IN (SELECT id FROM pipeline_runs WHERE status <> 'done' OR cancelled)"
)
# The last run that was to do all tasks, without resume, and did not come to the last one.
CUT_SHORT = "SELECT coalesce(max(id), ?) FROM pipeline_runs WHERE skipped IS NULL"
LAST_ID = "SELECT coalesce(max(id), ?) FROM task_runs"
FIND_RESULT = "SELECT result FROM task_runs WHERE name = ? ORDER BY id LIMIT 1"
FORGET = "DELETE FROM task_runs WHERE name = ? AND status = 'cancelled'"
START_RUN = (
    "INSERT INTO pipeline_runs(started_at, status, host, pid, version, total, skipped)"
    " VALUES (?, 'running', ?, ?, ?, ?, ?)"
)
SET_TOTAL = "UPDATE pipeline_runs SET total = ? WHERE id = ?"
FINISH_RUN = (
    "UPDATE pipeline_runs SET finished_at = ?, status = ?, done = ?, error = ?, cancelled = ?, skipped = ?,"
    " total = ? WHERE id = ?"
)
# The run that has not said that it ended: it is on, or died.
HOLDER = "SELECT pid, host, started_at FROM pipeline_runs WHERE status = 'running' ORDER BY id DESC LIMIT 1"
UNFINISHED_TASKS = (  # those that nobody will finish any more
    "UPDATE task_runs SET status = 'cancelled', message = ?, finished_at = ?"
    " WHERE status IN ('queued', 'running')"
)
UNFINISHED_RUNS = "UPDATE pipeline_runs SET status = 'cancelled', finished_at = ? WHERE status = 'running'"
NEVER = -(2**63)  # as a run's number: older than all; as an id: below all
VARIABLES = 3_000 if sqlite3.sqlite_version_info >= (3, 32) else 999  # in one statement

# What an error of SQLite's is about, by the beginning of its text: Pythons before 3.11 do not tell the code.
TROUBLES = {
    "database is locked": "lock",  # while a "table" is locked by the same connection: its own fault
    "database or disk is full": "disk", "disk i/o error": "disk", "out of memory": "disk",
    "interrupted": "disk",
    "unable to open database file": "open",
    "database disk image is malformed": "corrupt", "file is not a database": "corrupt",
}  # fmt: skip
PASSING = ("lock", "disk", "open")  # by themselves, at times
CURES = {
    "lock": "close the program that holds the lock, or pass a longer busy_timeout=",
    "disk": "free some disk space, or check the disk",
    "open": "check its permissions, those of its directory, and the limit on open files (ulimit -n)",
    "corrupt": "restore it from a backup or use another file",
    "permit": "make that file writable for this user, or use another database",  # the -lock file
}


def _trouble(error: BaseException) -> str:
    """ "lock", "disk" (which any statement may meet), "open", "corrupt", or "": the statement's own."""
    text = str(error).lower() if isinstance(error, sqlite3.DatabaseError) else ""
    return next((trouble for start, trouble in TROUBLES.items() if text.startswith(start)), "")


def connect(db_path: object, *, wal: bool = True) -> sqlite3.Connection:
    """A connection of your own, for the thread that calls; it waits up to 60 s for a lock.

    A run needs none: its writer has one. For reading beside a run, `ctx.connect()` is the better choice.
    """
    path = os.fspath(db_path)  # type: ignore[call-overload]
    conn = sqlite3.connect(path, timeout=60.0)
    try:
        _set_up(conn, path, wal, logger.log)
    except BaseException:
        conn.close()
        raise
    return conn


def _set_up(
    conn: sqlite3.Connection, path: str, wal: bool, tell: Callable[..., object], level: str = "NORMAL"
) -> None:
    """Choose how it writes; `level` FULL waits for the disk."""
    wanted = "MEMORY" if path == ":memory:" else "WAL" if wal else "DELETE"
    got = conn.execute(f"PRAGMA journal_mode={wanted}").fetchone()[0]
    if got.upper() != wanted:
        tell(logging.WARNING, "database %r: journal mode is %s, as %s does not work here", path, got, wanted)
    conn.execute(f"PRAGMA synchronous={level}")
    conn.execute("PRAGMA foreign_keys=ON")


def _absolute(path: str) -> str:
    """As it is here and now: tasks may change the directory, and the parent of a link is not what it says."""
    folder, name = os.path.split(path.rstrip("/"))
    return os.path.join(os.path.realpath(folder), name)


def _connect_readonly(db_path: str, timeout: float = 5.0, idle: bool = False) -> sqlite3.Connection:
    """A connection that can neither change nor create the file. Odd characters in the path are quoted.

    `idle` says that nobody has the database open; then no side file is left behind either.
    """
    path = _absolute(db_path).replace(os.sep, "/")
    # Not by urllib, as a signal while that is imported here would be another error.
    path = re.sub(rb"[^\w/.-]", lambda odd: b"%%%02X" % ord(odd[0]), os.fsencode(path)).decode()
    uri = f"file:{path if path.startswith('/') else '/' + path}?mode=ro{'&immutable=1' if idle else ''}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, factory=_Reader)


class _Reader(sqlite3.Connection):
    """A connection whose `with` block closes it."""

    def __exit__(self, *_: object) -> Any:
        self.close()


def init_schema(conn: sqlite3.Connection, *, store_task_status: bool) -> None:
    """Create task_runs and pipeline_runs, or complete those of the original pipeloom. Idempotent.

    With `store_task_status=False` it does nothing. Raises DatabaseError where task_runs is of another shape.
    """
    if not store_task_status:
        return
    for table, columns in TABLES.items():
        definition = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        conn.execute(f"CREATE TABLE IF NOT EXISTS {table}({definition})")
        for name in _missing_columns(conn, table):
            conn.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
    if conn.in_transaction and conn.isolation_level is not None:
        conn.commit()  # the caller's connection is one that opens transactions by itself


def _missing_columns(conn: sqlite3.Connection, table: str) -> list[str]:
    """Which columns a table of ours lacks; none where there is no such table."""
    found = {row[1]: row for row in conn.execute(f"PRAGMA table_info({table})")}
    missing = [name for name in TABLES[table] if found and name not in found]
    if "id" in found and (found["id"][2].upper(), found["id"][5]) != ("INTEGER", 1):
        missing.insert(0, "id INTEGER PRIMARY KEY")
    if set(missing) - set(list(TABLES[table])[8:]):
        raise DatabaseError(
            conn.execute("PRAGMA database_list").fetchone()[2],  # main is the first
            f"has a table {table} that is not pipeloom's: it has no {', '.join(missing)}",
            "rename that table or use another file",
        )
    return missing


def wal_checkpoint(conn: sqlite3.Connection, mode: str = "TRUNCATE") -> None:
    """Move the WAL into the database file; readers in the way leave it as it is, which is harmless."""
    if mode.upper() not in ("PASSIVE", "FULL", "RESTART", "TRUNCATE"):
        raise UsageError(f"checkpoint mode {mode!r} is unknown: expected PASSIVE, FULL, RESTART or TRUNCATE")
    conn.commit()
    conn.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()


def _check_database(path: str, kept: bool) -> None:
    """Find out before anything is written whether `path` can be this run's database; `kept`: with status."""
    if sqlite3.sqlite_version_info < (3, 24):
        raise UsageError(
            f"pipeloom needs SQLite 3.24 or newer, not {sqlite3.sqlite_version}; use another Python"
        )
    if path == ":memory:":
        return
    if not path or "\0" in path:
        raise DatabaseError(path, "is not a valid file name", "pass the path of a file")
    target, exists = os.path.realpath(path), os.path.exists(path)
    folder = os.path.dirname(target)
    for is_wrong, what, cure in (
        (os.path.isdir(path), "is a directory", "pass the path of a file"),
        (os.path.islink(target), "is a broken symbolic link", "pass the path of a file"),
        (
            not os.path.isdir(folder), f"cannot be created: there is no directory {folder!r}",
            "create it first",
        ),
        (
            not os.access(folder, os.W_OK), "cannot be used, because SQLite must create files beside it",
            f"change the permissions of {folder!r} or use another directory",
        ),
        (exists and not os.path.isfile(path), "is not a regular file", "pass the path of a file"),
        (
            exists and not os.access(path, os.R_OK | os.W_OK), "is not readable and writable",
            "change its permissions or use another file",
        ),
    ):  # fmt: skip
        if is_wrong:
            raise DatabaseError(path, what, cure)
    if exists:
        _check_contents(path, kept)


def _check_contents(path: str, kept: bool) -> None:
    try:
        with _connect_readonly(path, timeout=0.25) as conn:
            conn.execute("SELECT 1 FROM sqlite_master").fetchone()
            for table in TABLES if kept else ():
                _missing_columns(conn, table)
    except sqlite3.DatabaseError as error:
        # A lock is waited out later, by the writer; and what a killed run left half-written, it rolls back.
        if _trouble(error) not in PASSING and "readonly" not in str(error):
            raise DatabaseError(path, f"cannot be read: {error}", "restore it or use another file") from error


class _RunLock:
    """One run per database: an exclusive transaction on an empty side file, for as long as the run lasts.

    That is a lock of the kernel's, on every system that SQLite knows, which ends with the process however
    that ends and which no forked child inherits. The file stays: to remove it would race with the next run.
    To be made, taken and released by the thread that runs the pipeline.
    """

    def __init__(self, db_path: str) -> None:
        # "" is a file of SQLite's own, which nobody else can lock.
        self.path = "" if db_path == ":memory:" else os.path.realpath(db_path) + "-lock"
        self._conn: sqlite3.Connection | None = None

    def take(self, db_path: str) -> dict[str, os.stat_result]:
        """Returns the file, as it is now, under its path."""
        try:
            self._conn = sqlite3.connect(self.path, timeout=0.2, isolation_level=None)
            self._conn.execute("PRAGMA journal_mode=MEMORY")  # else there is a -journal beside it
            self._conn.execute("BEGIN EXCLUSIVE")  # a mere read transaction, if the file is read-only
            self._conn.execute("PRAGMA user_version=1")  # which then raises; it is never committed
        except sqlite3.Error as error:
            self.release()
            if _trouble(error) == "lock":
                raise RunInProgress(
                    db_path, f"is in use by {_holder(db_path)}", "wait until it ends, or use another file"
                ) from None
            cure = CURES[_trouble(error) or "permit"]
            raise DatabaseError(db_path, f"cannot be locked through {self.path!r}: {error}", cure) from error
        return {self.path: os.stat(self.path)} if self.path else {}

    @staticmethod
    def is_held(db_path: str) -> bool | None:
        """Whether a run has the database; None if this user may not know. It is never in a run's way."""
        path = os.path.realpath(db_path) + "-lock"
        try:
            with _connect_readonly(path, timeout=0) as conn:
                conn.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            return True if _trouble(error) == "lock" else None if os.path.exists(path) else False
        return False

    def release(self) -> None:
        if self._conn is not None:
            self._conn.close()


def _holder(db_path: str) -> str:
    row = None
    with suppress(sqlite3.Error), _connect_readonly(db_path) as conn:  # perhaps it keeps no status
        row = conn.execute(HOLDER).fetchone()
    return f"process {row[0]} on {row[1]}, since {row[2][:19]}Z" if row else "another run"


# ---- Channel: the bounded way from the workers to the writer -------------------------------------------

SMALL = 3  # so many rows count as one message


class _Bell:
    """Wakes its one sleeper: the lock is free after a ring. Any thread, and a signal handler, may ring."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        if self._lock.locked():  # else it has rung already, and nobody has heard it yet
            try:
                self._lock.release()
            except RuntimeError:  # another thread was faster
                return

    def wait(self, seconds: float) -> None:
        self._lock.acquire(timeout=seconds)


class Channel:
    """The bounded way to the writer, which takes all that is there at once; SENTINEL is its end.

    The queue below is C and wakes its reader itself: where all is well put() takes no lock that others want.
    `_room` is for producers that wait while it is full; batches() and fail() announce it. fail() ends every
    wait for good. A lone SQLiteWriter's user has a queue.Queue instead, whose items are bare messages.
    """

    def __init__(self, source: Any = None, limit: int = 1_400) -> None:
        self._queue: Any = queue.SimpleQueue() if source is None else source
        self._bare = source is not None
        self._limit = limit  # 700 to 2,000 are about as fast
        self._rows = 0.0  # what the rows in them count as, in messages; no lock, a guess
        self._begun: list[_Attempt] = []  # those that have started since the writer came last
        self._room = threading.Condition()
        self._reader, self._pid = 0, os.getpid()  # the thread that drains it, and its process
        self._ended = False
        self.failure: BaseException | None = None

    def put(
        self, sender: _Attempt, message: Any, rows: int = 0, last: bool = False, wait: bool = True
    ) -> bool:
        """Hand over a message, waiting while the channel is full; False if the sender is closed.

        `last` closes the sender with this message, in one step: whoever comes first (the worker, a deadline
        or a second Ctrl-C) decides how the attempt ends. Raises WriterFailed once the writer has.
        """
        if wait and self._queue.qsize() + self._rows >= self._limit:
            self._wait_for_room(sender)
        if self.failure is not None:
            raise self.failure
        if rows > 1:
            self._rows += rows / SMALL  # before they come; too many, if it is closed: see _wait_for_room
        with sender.lock:
            if sender.closed:
                return False
            sender.closed = last
            self._queue.put((sender, message))
        return True

    def push(self, sender: _Attempt | None, message: Any) -> None:
        """The same for the run's own messages, and where the sender's lock is held: it does not wait, and is
        for one message an attempt, or a stage.
        """
        if self.failure is not None:
            raise self.failure
        self._queue.put((sender, message))

    def begin(self, sender: _Attempt) -> None:
        """Say that the sender has started: the writer asks for begun() when it comes for the next message."""
        self._begun.append(sender)  # first: the writer looks here after it has looked at the queue
        if not self._queue.qsize() or self.failure is not None:
            self.push(sender, STARTED)  # which wakes the writer, or raises what made it fail

    def begun(self) -> list[_Attempt]:
        """Who has started since it was asked last: the senders of all that batches() has given, at least."""
        begun = self._begun[:]  # more may come meanwhile
        del self._begun[: len(begun)]
        return begun

    def has_room(self) -> bool:
        return bool(self._queue.qsize() + self._rows < self._limit)

    def _wait_for_room(self, sender: _Attempt) -> None:
        """Not for what is refused, nor where nobody would make room: the garbage collector may call an old
        task's finalizer in any thread, and a child that a task has forked has no writer.
        """
        if get_ident() == self._reader or os.getpid() != self._pid or sender.closed:
            return
        with self._room:
            # Not where there is no item: it is for these that the writer comes, and then forgets the rows.
            while self._queue.qsize() >= max(1, self._limit - self._rows) and self.failure is None:
                self._room.wait(0.5)

    def batches(self) -> Generator[list[tuple[_Attempt | None, Any]], None, None]:
        """Everything there is, waiting for the first message; who asks for more has stored what it got."""
        while not self._ended:
            self._rows, self._reader = 0.0, get_ident()
            items = [self._queue.get() for _ in range(min(self._queue.qsize(), 10_000) or 1)]
            taken = len(items)
            with self._room:
                self._room.notify_all()
            end = next(compress(count(), map(partial(is_, SENTINEL), items)), None)
            if end is not None:
                self._ended = True
                del items[end:]
            try:
                yield [(None, message) for message in items] if self._bare else items
            finally:  # for a plain queue's join(), which ends also where what was taken could not be stored
                for _ in range(taken if hasattr(self._queue, "task_done") else 0):
                    self._queue.task_done()

    def close(self) -> None:
        """Nothing more will be put; batches() gives what is there, and ends."""
        self._queue.put(SENTINEL)

    def fail(self, error: BaseException) -> None:
        """The reader is gone: every waiting and every later put() raises `error`."""
        self.failure = self.failure or error
        with self._room:
            self._room.notify_all()
        for _ in self.batches() if self._bare else ():  # so that no producer of a plain queue blocks
            pass


# ---- Writer: the only code that writes SQLite; what it drained is one transaction ----------------------

REFERENCES_TASKS = "SELECT 1 FROM sqlite_master WHERE sql LIKE '%references%task_runs%'"
GATHER = 0.001  # seconds between commits that are quicker than that
DISK_PATIENCE = 10.0  # seconds that a full or failing disk is waited for; a lock: `busy_timeout`
_NAME = r"""(?:\w+|"[^"?]+"|`[^`?]+`|\[[^\]?]+\])"""
# Patterns are compiled when they are first used, as the import of this file is to be quick.
INSERT_VALUES = (  # the plain form only, which means the same with several rows
    rf"(?i)(?P<head>\s*(?:INSERT|REPLACE)(?:\s+OR\s+\w+)?\s+INTO\s+{_NAME}(?:\s*\.\s*{_NAME})?"
    rf"(?:\s*\(\s*{_NAME}(?:\s*,\s*{_NAME})*\s*\))?\s*VALUES\s*)"
    r"(?P<row>\(\s*\?(?:\s*,\s*\?)*\s*\))"
    r"(?P<tail>\s*;?\s*|\s*ON\s+CONFLICT\b(?:(?!\b(?:SELECT|IN)\b)[^?])*)$"  # a subquery runs only once
)
TO_SEMICOLON = (  # past those in strings, names and comments
    r"""(?s)(?:[^-/'"`[;]+|--[^\n]*|/\*.*?(?:\*/|$)|'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|[^;])*;?"""
)
MANY = r"(?is)\s*(?:INSERT|UPDATE|DELETE|REPLACE)\b(?!.*\bRETURNING\b)"
ROLLED_BACK = "a statement rolled back the transaction; do not catch the exception that it raised"
STATUS = (MsgTaskStarted, MsgTaskProgress, MsgTaskFinished)  # these touch no table of the user's
STARTED = object()  # an attempt's word that it has started, at its started_at
PUT_BACK = object()  # that it has not, after all
PROGRESS = object()  # and that it has news: only the newest counts, and the context keeps it


class _BadMessage(Exception):
    """A message cannot be applied, for the reason that is its argument; the batch is taken without it."""


def _inside(method: Callable[..., Any]) -> Any:
    """A method that runs SQL: while the writer's transaction is on, nothing runs outside of it.

    OR ROLLBACK, ON CONFLICT ROLLBACK and RAISE(ROLLBACK) end a transaction, and a handler may catch their
    error. What it writes then would be stored at once, for a task that fails.
    """

    def inside(self: Any, *arguments: Any) -> Any:
        conn = self.connection
        if conn.is_on and not conn.in_transaction:
            raise sqlite3.OperationalError(ROLLED_BACK)
        return method(self, *arguments)

    return inside


class _GuardedCursor(sqlite3.Cursor):
    """Of the writer's connection."""

    execute = _inside(sqlite3.Cursor.execute)
    executemany = _inside(sqlite3.Cursor.executemany)
    executescript = _inside(sqlite3.Cursor.executescript)


class _Guarded(sqlite3.Connection):
    """The writer's connection."""

    is_on = False  # the writer has begun a transaction, and is not about to end it
    was_refused = False  # a rollback in it; a handler may catch the error of that
    connection = property(lambda self: self)
    execute = _inside(sqlite3.Connection.execute)
    executemany = _inside(sqlite3.Connection.executemany)
    executescript = _inside(sqlite3.Connection.executescript)

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or _GuardedCursor)


class _Store:
    """The one connection that writes: how it is opened, waited for, guarded and closed.

    It knows no message and no task. For the writer's thread alone; no lock.
    """

    def __init__(
        self, db_path: str, wal: bool, durable: bool, patience: float, hurried: Callable[[], bool],
        tell: Callable[..., object],
    ) -> None:  # fmt: skip
        self.shown = db_path  # as the user named it
        self.path = db_path if db_path == ":memory:" else _absolute(db_path)
        self.conn: _Guarded = None  # type: ignore[assignment]
        self.files: dict[str, os.stat_result] = {}  # the database and its lock, as they were opened
        self._wal, self._level, self._patience = wal, "FULL" if durable else "NORMAL", patience
        self._hurried = hurried  # whether there is no time to wait for a lock or a disk
        self._tell = tell  # logs a line, without waiting
        self._defers = False  # somebody references task_runs, whose rows are written last

    def open(self, prepare: Callable[[], object]) -> None:
        """Open the database and prepare it in one transaction: what fails leaves nothing behind."""
        self.close()
        self.conn = sqlite3.connect(self.path, timeout=0.25, isolation_level=None, factory=_Guarded)
        _set_up(self.conn, self.path, self._wal, self._tell, self._level)
        self.conn.set_authorizer(self._authorize)
        self._own("BEGIN IMMEDIATE /* first */")  # as a cached BEGIN knows nothing of what is attached now
        prepare()
        if self.conn.execute("PRAGMA locking_mode").fetchone()[0] != "normal":
            raise UsageError(
                "schema= failed: PRAGMA locking_mode=EXCLUSIVE lets nobody else read the database, "
                "not even this run; remove it"
            )
        self._defers = self.conn.execute(REFERENCES_TASKS).fetchone() is not None
        self._own("COMMIT")
        # Only now, as the index of millions of old names is not to be made in memory.
        self.conn.execute("PRAGMA cache_spill=OFF")  # so that a reader's lock is met at COMMIT only
        if self.path != ":memory:":
            self.files[self.path] = os.stat(self.path)

    def commit(self, apply: Callable[..., None], *args: Any) -> None:
        """Commit what `apply` does; patiently() calls it again where that had to be rolled back."""
        if self.conn.in_transaction:  # there was no memory to end the last one
            self._own("ROLLBACK")
        self._own("BEGIN IMMEDIATE")
        if self._defers:
            self.conn.execute("PRAGMA defer_foreign_keys=ON")
        apply(*args)
        self.check_files()
        self._own("COMMIT")

    def patiently(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step, open() or commit(), until it works: a lock or a full disk that passes costs time and
        nothing else.
        """
        began = time.monotonic()
        warned = False
        while True:
            try:
                return step(*args)
            except Exception as error:
                if self.conn is not None and self.conn.in_transaction:
                    self._own("ROLLBACK")
                self.check_files()  # what is wrong with them says more
                trouble = _trouble(error)
                if trouble not in PASSING:
                    raise
                waited = time.monotonic() - began
                patience = self._patience if trouble == "lock" else min(DISK_PATIENCE, self._patience)
                if waited >= patience or self._hurried():
                    raise self.out_of_patience(error, waited) from _reason(error)
                if not warned and waited > 0.5:
                    warned = True
                    self._tell(
                        logging.WARNING, "database %r: %s; trying again for up to %g s",
                        self.shown, str(error), patience,
                    )  # fmt: skip
            time.sleep(0.05)

    def out_of_patience(self, error: BaseException, waited: float) -> WriterFailed:
        return WriterFailed(
            self.shown, f"{error}, still after {waited:.1f} s", f"{CURES[_trouble(error)]}, then run again"
        )

    def failure(self, error: BaseException, opening: bool) -> BaseException:
        """What the caller is told of an error that the writer cannot go on after."""
        if isinstance(error, WriterFailed) or (opening and isinstance(error, PipeloomError)):
            return error
        if opening and isinstance(error, sqlite3.Error):
            return DatabaseError(self.shown, f"cannot be used: {error}", "restore it or use another file")
        cure = CURES.get(_trouble(error), "fix the cause")
        failure = WriterFailed(self.shown, _describe(error), f"{cure}, then run again")
        failure.__cause__ = error
        return failure

    def check_files(self) -> None:
        """The names must still be those of the open files: SQLite would not notice, and write on."""
        for path, opened in self.files.items():
            with suppress(OSError):
                if os.path.samestat(opened, os.stat(path)):
                    continue
            raise WriterFailed(
                self.shown,
                f"{path!r} was deleted, moved or replaced during the run",
                "leave the database and its -lock file alone during a run, then run again",
            )

    def close(self) -> None:
        conn, self.conn = self.conn, None  # type: ignore[assignment]
        if conn is not None:
            conn.close()

    def _authorize(self, action: int, what: Any, *_: object) -> int:
        """A handler's own BEGIN, COMMIT and `with conn:` do nothing: the transaction is the writer's."""
        if action != sqlite3.SQLITE_TRANSACTION or not self.conn.is_on:  # then it is from _own()
            return sqlite3.SQLITE_OK
        if ord(what[0]) != ord("R"):  # no ROLLBACK; PyPy gives a char *
            return sqlite3.SQLITE_IGNORE
        self.conn.was_refused = True
        return sqlite3.SQLITE_DENY

    def _own(self, statement: str) -> None:
        self.conn.is_on = False
        # sqlite3 caches statements by their text and authorizes each only once: a handler's differs.
        self.conn.execute(f"{statement} -- pipeloom")
        self.conn.is_on, self.conn.was_refused = statement.startswith("BEGIN"), False


_TaskRow = namedtuple(  # of task_runs, as the next commit will write it; in the order of COLUMNS
    "_TaskRow", "id name status progress message started_at finished_at result attempts run_id traceback",
    defaults=(0.0, "", None, None, None, 0, None, None),
)  # fmt: skip
_row_of = partial(tuple.__new__, _TaskRow)  # from a tuple, in half the time that the namedtuple takes itself
_said = attrgetter("status", "finished_at", "result", "message")  # in a MsgTaskFinished


class _Status:
    """What the tables task_runs and pipeline_runs say, now and after the next commit.

    A task's row is written once in a transaction, however many messages it had. For the writer's thread
    alone; no lock.
    """

    def __init__(self, store: _Store, kept: bool, shows: bool) -> None:
        self._store = store
        self.kept = kept  # else there are no such tables, and all this says is what has settled
        self.shows = shows  # somebody wants the news; a run sets it before its first task
        self.run_id: int | None = None
        self.sender: _Attempt | None = None  # of the message that is being applied
        self.last_id = NEVER  # the highest id that is committed: what is above it is new
        self._pending: dict[int, _TaskRow] = {}  # rows that this transaction writes
        self._done: dict[int, tuple[Any, ...]] = {}  # and what STORE_DONE takes, of tasks that are all in it
        self.begun: list[_Attempt] = []  # attempts of which the next commit tells that they have started
        self._unfinished: dict[int, _TaskRow] = {}  # committed rows of tasks that have not ended
        self.news: dict[tuple[int, type], Any] = {}  # messages of this transaction, for the display
        self.ended: list[tuple[_Attempt, str, str]] = []  # and for the engine: attempt, status, message

    def open(self, run: _Run | None) -> None:
        """Make the tables, or complete them, and note that a run begins."""
        init_schema(self._store.conn, store_task_status=self.kept)
        if not self.kept:
            return
        execute = self._store.conn.execute
        self.last_id = execute(LAST_ID, (NEVER,)).fetchone()[0]
        if run is None:
            return
        if self.last_id > NEVER and any(stage.declared.by_name for stage in run.graph.stages):
            execute(INDEX_NAMES)
        if execute(HOLDER).fetchone() or not execute("SELECT 1 FROM pipeline_runs").fetchone():
            execute(UNFINISHED_TASKS, ("interrupted", _now()))  # by the death of that run
            execute(UNFINISHED_RUNS, (_now(),))
        # socket.gethostname() is the same, but socket takes long to import.
        host = os.environ.get("COMPUTERNAME", "") if sys.platform == "win32" else os.uname().nodename
        skipped = 0 if run.options["resume"] else None
        row = (_now(), host, os.getpid(), __version__, run.graph.total(), skipped)
        self.run_id = execute(START_RUN, row).lastrowid

    def end(self, status: str, reason: str, counts: Sequence[int], cut_short: bool) -> None:
        """Note how the run ended, and that nothing more will."""
        if self.kept:
            if self._unfinished:
                self._store.conn.execute(UNFINISHED_TASKS, (reason or "never finished", _now()))
            *ran, skipped = counts
            row = (_now(), status, *ran, None if cut_short else skipped, sum(counts), self.run_id)
            self._store.conn.execute(FINISH_RUN, row)

    def start_over(self) -> None:
        """Forget what an earlier try at this transaction meant to do; who has begun is still to be told."""
        self._pending, self._done, self.news, self.ended = {}, {}, {}, []
        for sender in self.begun:
            if not sender.closed:  # else its end is mostly in this batch; see write()
                self.begin(sender)

    def begin(self, sender: _Attempt) -> None:
        """The same as started(), for the engine's own word; nothing where its row says so already."""
        id, at, number = sender.task_id, sender.started_at, sender.attempt
        row = self._pending.get(id) or self._unfinished.get(id)
        if not sender.started_at or (row is not None and (row.attempts or 0) >= number):
            return
        self._pending[id] = _row_of(
            (id, sender.name, RUNNING, 0.0, "", at, None, None, number, self.run_id, None)
        )
        if self.shows:
            self.news.pop((id, MsgTaskFinished), None)  # of one that was put back
            self.news[id, MsgTaskStarted] = MsgTaskStarted(id, sender.name, at or "")

    def put_back(self, sender: _Attempt) -> None:
        """It has not started after all; it may have meanwhile, once more."""
        id = sender.task_id
        self._pending[id] = _TaskRow(id, sender.name, QUEUED, attempts=sender.attempt - 1, run_id=self.run_id)
        if self.shows:
            self.news[id, MsgTaskFinished] = MsgTaskFinished(id, QUEUED, "", None, "")
        self.begin(sender)

    def started(self, m: MsgTaskStarted) -> None:
        row = self._row(m)
        if self._own_sender(m) is None:  # else the worker repeats what the engine has said
            row = _TaskRow(
                m.task_id, m.name, RUNNING, attempts=(row.attempts or 0) + 1, run_id=self.run_id
            )
        self._pending[m.task_id] = row._replace(name=m.name, started_at=m.started_at)
        if self.shows:
            self.news[m.task_id, MsgTaskStarted] = m

    def progressed(self, m: MsgTaskProgress) -> None:
        row = self._row(m)
        if row.status in FINAL:
            return  # late: the task's finish counts
        part = m.step / m.total if m.total else row.progress
        self._pending[m.task_id] = row._replace(status=RUNNING, progress=part, message=m.message)
        if self.shows:
            self.news[m.task_id, MsgTaskProgress] = m

    def finished(self, m: MsgTaskFinished) -> None:
        """What somebody else says of a task's end; the first counts, and the task's own."""
        row = self._row(m)
        if row.status not in FINAL:
            self._end_row(row, *_said(m), None if m.status == DONE else row.traceback)

    def attempt_ended(
        self, sender: _Attempt, status: str, at: str, result: str | None, message: str
    ) -> None:
        """How an attempt has ended, which is said once."""
        id, name, began = sender.task_id, sender.name, sender.started_at
        is_new = id not in self._pending and id not in self._unfinished and sender.attempt == 1
        if is_new and status == DONE and not message:  # since the last commit, as with nearly all short ones
            self._done[id] = id, name, began, at or None, result, self.run_id
            if self.shows:
                self.news[id, MsgTaskStarted] = MsgTaskStarted(id, name, began or "")
                self.news[id, MsgTaskFinished] = MsgTaskFinished(id, status, at, result, message)
        else:
            if status == ERROR and sender.may_retry():
                status, at, result, message = QUEUED, "", None, f"attempt {sender.attempt} failed: {message}"
            trace = None if status == DONE else sender.trouble.traceback
            self._end_row(self._row(sender), status, at, result, message, trace)
        self.ended.append((sender, status, message))

    def _end_row(
        self, row: _TaskRow, status: str, at: str, result: str | None, message: str, trace: str | None
    ) -> None:
        part = 1.0 if status == DONE else row.progress
        self._pending[row.id] = _row_of((
            row.id, row.name, status, part, message, row.started_at, at or None, result, row.attempts,
            self.run_id, trace,
        ))  # fmt: skip
        if self.shows:
            self.news[row.id, MsgTaskFinished] = MsgTaskFinished(row.id, status, at, result, message)

    def _own_sender(self, m: Any) -> _Attempt | None:
        """The attempt that a message is about, if its own worker sent it."""
        return self.sender if self.sender and self.sender.owns(m) else None

    def _row(self, m: Any) -> _TaskRow:
        """The row of a message's task, or of an attempt's, as it is now; each has one, started or not."""
        id, sender = m.task_id, self._own_sender(m)
        if sender is not None:
            self.begin(sender)
        row = self._pending.get(id) or self._unfinished.get(id)
        if row is not None or id in self._done:
            return row or _TaskRow(id, "", DONE)
        if id <= self.last_id and self.kept and sender is None:
            cursor = self._store.conn.cursor()
            cursor.row_factory = None  # a handler may have set the connection's
            found = cursor.execute(LOAD_TASK, (id,)).fetchone()
            if found is not None:
                return _TaskRow(*found)
        name, attempts = (sender.name, sender.attempt - 1) if sender else (f"task-{id}", 0)
        return _TaskRow(id, name, QUEUED, attempts=attempts, run_id=self.run_id)

    def write(self) -> None:
        for sender in self.begun:
            if sender.task_id not in self._done:
                self.begin(sender)
        if self.kept:
            _insert(self._store.conn, STORE_DONE, list(self._done.values()))
            _insert(self._store.conn, STORE_TASKS, list(self._pending.values()))

    def committed(self) -> None:
        for id, row in self._pending.items():
            if row.status in FINAL:
                self._unfinished.pop(id, None)
            else:
                self._unfinished[id] = row
        self.last_id = max(chain([self.last_id], self._pending, self._done))
        self.begun.clear()


class SQLiteWriter(threading.Thread):
    """The thread that owns the SQLite connection: it applies the messages of `msg_q` and commits them.

    A run makes its own. It also works alone on a plain queue.Queue: start(), put messages, put SENTINEL,
    join(), which raises what made it fail. Override `handle(message)` in a subclass to apply messages of your
    own to `self.conn`, inside the transaction, perhaps twice; call super().handle() for the others.
    """

    def __init__(
        self, db_path: Any, msg_q: Any, *, wal: bool = True, store_task_status: bool = True,
        task_progress: Any = None, task_bar_map: Mapping[int, Any] | None = None, schema: str | None = None,
        handlers: Mapping[type, Handler] | None = None, busy_timeout: float = 300.0, durable: bool = False,
        run: _Run | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name="pipeloom-writer", daemon=True)
        self._engine = run  # whose writer this is
        bars = _TaskBars(task_progress, task_bar_map or {}) if task_progress else "none"
        self._display = run.display if run else _Display(bars)
        self._ring = run.wake.ring if run else int
        self.store = _Store(
            os.fspath(db_path), wal, durable, busy_timeout, self._is_hurried, self._display.tell
        )
        self.status = _Status(self.store, store_task_status, shows=run is None and task_progress is not None)
        self.error: BaseException | None = None
        self.opened = False  # and how it failed, `error` says
        self._schema = schema or ""
        self._channel = msg_q if isinstance(msg_q, Channel) else Channel(msg_q)
        theirs = {MsgExecute: _run_statement, **_checked_handlers(handlers or {})}
        self._apply_by_type: dict[type, Callable[[Any], object]] = {
            MsgTaskStarted: self.status.started,
            MsgTaskProgress: self.status.progressed,
            MsgTaskFinished: self.status.finished,
            **{kind: partial(self._call, handler) for kind, handler in theirs.items()},
        }
        self.kinds = tuple(self._apply_by_type)  # the classes of messages that it applies

    @property
    def conn(self) -> sqlite3.Connection:
        """The connection, for handle(); of no use in other threads."""
        return self.store.conn

    _conn = conn  # the original's name

    def _is_hurried(self) -> bool:
        return self._engine is not None and self._engine.signals.urgency() >= (1, 3)[self.opened]

    def run(self) -> None:
        """Whatever goes wrong here ends in `error`, and the channel then refuses its producers."""
        try:
            if self._engine is None:  # a run has done so
                _start(self._display.thread)
                _check_database(self.store.shown, self.status.kept)
            self.store.patiently(self.store.open, self._prepare)
            self.opened = True
            self._ring()
            with closing(self._channel.batches()) as batches:  # on PyPy nothing else would, for long
                for batch in filter(None, batches):
                    began = time.monotonic()
                    self.status.begun += self._channel.begun()
                    self._commit(batch)
                    if time.monotonic() - began < GATHER and self._channel.has_room():
                        time.sleep(GATHER)  # it was so little that messages should gather for the next
            if self._engine is not None:
                self.store.patiently(self.store.commit, self.status.end, *self._engine.ending())
            with suppress(sqlite3.Error):  # the next opening reads the WAL as well
                wal_checkpoint(self.conn)
        except BaseException as error:
            self.error = error  # before any call, for which there may be no memory
            self._explain(error)
        finally:
            self._leave()

    def _explain(self, error: BaseException) -> None:
        with suppress(Exception):  # of no memory: then as it is
            self.error = self.store.failure(_reason(error), opening=not self.opened)
        if self._engine is None:
            self._display.tell(logging.ERROR, "%s", self.error)
        else:
            self._engine.stop("the writer failed")

    def _leave(self) -> None:
        try:
            self.store.close()
        finally:
            if self.error is not None:
                self._channel.fail(self.error)
            self._ring()
            if self._engine is None:
                self._display.stop(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, `timeout` seconds at most; raises what made the writer fail."""
        super().join(timeout)
        if self.error is not None and not self.is_alive():
            raise self.error

    def _prepare(self) -> None:
        self.status.open(self._engine)
        _run_schema(self.conn, self._schema)

    def _commit(self, batch: list[tuple[_Attempt | None, Any]], joins: bool = True) -> None:
        """Commit a batch; one with a bad message in halves, until it is alone, then its rows one by one."""
        try:
            self.store.patiently(self.store.commit, self._apply_all, batch, joins)
        except Exception as error:
            if isinstance(error, WriterFailed) or _trouble(error) == "corrupt":
                raise
            bad = _reason(error)
            batch = [*((sender, STARTED) for sender in self.status.begun), *batch]  # one of these, perhaps
            self.status.begun.clear()
        else:
            return self._acknowledge()
        if len(batch) > 1:
            self._commit(batch[: len(batch) // 2])
            self._commit(batch[len(batch) // 2 :])
        elif joins:
            self._commit(batch, joins=False)
        else:
            self._reject(*batch[0], bad)
        return None

    def _reject(self, sender: _Attempt | None, message: Any, error: BaseException) -> None:
        """A message cannot be stored: its task ends as `error`, and nobody else notices."""
        if sender is None:
            self._display.tell(logging.ERROR, "message refused: %s, in %.200r", _describe(error), message)
            return
        what = sender.record(error)
        self.store.patiently(self.store.commit, self._apply_all, [(sender, (ERROR, _now(), None, what))])
        sender.rejected = sender.closed = True
        sender.cancel(f"refused: {what}")
        self._acknowledge()

    def _apply_all(self, batch: list[tuple[_Attempt | None, Any]], joins: bool = False) -> None:
        self.status.start_over()
        joined = _Joined(self.conn, joins, self._hand_over)
        try:
            for sender, message in batch:  # the users' own rows now, task rows in memory
                self._apply(sender, message, joined)
            joined.insert()
        except BaseException as error:  # a handler's SystemExit too
            if isinstance(error, WriterFailed) or _trouble(error) in ("disk", "corrupt"):
                raise
            raise _BadMessage(error) from None
        self.status.write()

    def _apply(self, sender: _Attempt | None, message: Any, joined: _Joined) -> None:
        self.status.sender = sender
        if sender is None:
            check = CHECKS.get(type(message))  # a plain queue has checked nothing
            joined.store(None, message if check is None else check(message))
        elif sender.rejected:
            return  # a message of this attempt was bad, and that has ended it
        elif message is STARTED:
            self.status.begin(sender)
        elif message is PUT_BACK:
            self.status.put_back(sender)
        elif message is PROGRESS:
            sender.has_news = False
            self.status.progressed(sender.news)
        elif type(message) is tuple or (type(message) is MsgTaskFinished and sender.owns(message)):
            end = message if type(message) is tuple else _said(message)
            for held in sender.held if end[0] == DONE else ():
                joined.store(sender, held)
            self.status.attempt_ended(sender, *end)
        else:
            joined.store(sender, message)

    def _hand_over(self, message: Any) -> None:
        try:
            if type(message) is _Statement:
                _run_statement(self.conn, message)
            else:
                self.handle(message.message if type(message) is _Sent else message)
        except Exception as error:
            if type(message) in (_Statement, _Sent):
                error.sent = message.place, getattr(error, "row", "")  # type: ignore[attr-defined]
            raise
        if self.store.conn.was_refused or not self.conn.in_transaction:  # and the error was caught
            raise MessageRefused(ROLLED_BACK)

    def _acknowledge(self) -> None:
        """The batch is committed: only now may anybody see it or act upon it."""
        self.status.committed()
        for message in self.status.news.values():
            self._display.update(message)
        if self._engine is not None and self.status.ended:
            self._engine.settle(self.status.ended)
        self.status.start_over()  # so that nothing of it is kept while there is nothing to do

    def handle(self, message: Any) -> None:
        """Apply one message to `self.conn`. To override; an exception fails the message's task only."""
        kind: type | None = type(message)
        if kind not in self._apply_by_type:  # a subclass, perhaps
            kind = next((base for base in type(message).__mro__ if base in self._apply_by_type), None)
        if kind is None:
            raise _unknown(type(message))
        self._apply_by_type[kind](message)

    def _call(self, handler: Handler, message: Any) -> None:
        handler(self.conn, message)


def _run_schema(conn: sqlite3.Connection, script: str) -> None:
    """One statement at a time: executescript would commit the open transaction."""
    statement = ""
    for piece in re.findall(TO_SEMICOLON, script):  # the last one is empty
        statement += piece
        try:
            conn.execute(statement).close()  # which may be a comment, or nothing: SQLite does not mind
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # the latter two of odd characters
            if piece and str(error) == "incomplete input":  # of a trigger
                continue
            if _trouble(error) in PASSING:
                raise
            raise UsageError(f"schema= failed: {error}, in {statement.strip()!r}; fix it") from error
        statement = ""


def _run_statement(conn: sqlite3.Connection, m: MsgExecute | _Statement) -> None:
    """What is not joined, row by row; for a writer alone, whose user is told of no row, many at once."""
    if m.many and type(m) is MsgExecute and _are_plain(m.params, _insert_parts(m.sql)[3]):
        return _insert(conn, _insert_parts(m.sql), m.params)
    rows = m.params if m.many else [m.params]
    left = iter(rows)
    try:
        if m.many and re.match(MANY, m.sql):
            conn.executemany(m.sql, left)
        else:
            for row in left:
                conn.execute(m.sql, row).close()  # on PyPy one with RETURNING stays open, and no COMMIT works
    except Exception as error:
        if not _trouble(error):
            number = len(rows) - length_hint(left)
            error.row = _row_in_words(m.sql, rows, number)  # type: ignore[attr-defined]
        raise


def _are_plain(rows: list[Any], width: int) -> bool:
    """Whether rows may be the VALUES of one statement."""
    if len(rows) == 1:
        return type(rows[0]) is tuple and len(rows[0]) == width > 0
    return width > 0 and set(map(type, rows)) == {tuple} and set(map(len, rows)) == {width}


class _Joined:
    """The rows that the tasks of a batch send with the same statements, many in one: each step of SQLite's
    gives up the GIL, and busy workers are slow to return it.

    A task's own rows stay in their order, and so does all else that is stored: only plain INSERTs of
    different tasks change places. One that fails is found when its message is alone, and nothing is joined.
    """

    def __init__(self, conn: sqlite3.Connection, joins: bool, hand_over: Callable[[Any], None]) -> None:
        self._conn = conn
        self._joins = joins
        self._hand_over = hand_over
        self._groups: list[tuple[str, list[Any]]] = []  # statements in their order, and all rows of each
        self._newest: dict[str, tuple[int, int]] = {}  # the last group of each statement, and its columns
        self._last: dict[_Attempt | None, int] = {}  # the last group of each task

    def store(self, sender: _Attempt | None, m: Any) -> None:
        """Take the rows of a message for a group that is not before the task's last; anything else is handed
        over at once, and before it what is here: what that does may depend on it.
        """
        if self._joins and type(m) is _Statement:
            sql, rows, many, _ = m
            at, width = self._newest.get(sql) or (-1, _insert_parts(sql)[3])
            if many and _are_plain(rows, width):
                if at < self._last.get(sender, 0):
                    at = len(self._groups)
                    self._newest[sql] = at, width
                    self._groups.append((sql, []))
                if at:  # 0 is what it is otherwise, and mostly
                    self._last[sender] = at
                self._groups[at][1].extend(rows)
                return
        if type(m) not in STATUS:
            self.insert()
        self._hand_over(m)

    def insert(self) -> None:
        for sql, rows in self._groups:
            _insert(self._conn, _insert_parts(sql), rows)
        self._groups, self._newest, self._last = [], {}, {}


def _row_in_words(sql: str, rows: list[Any], number: int) -> str:
    """What an error of SQLite's does not say."""
    from reprlib import repr as shortened

    which = f"row {number:,} of {len(rows):,}" if len(rows) > 1 else "the row"
    row = rows[number - 1] if number or len(rows) == 1 else ()
    sql = " ".join(sql.split())
    return f"; {f'{which} is {shortened(row)}, ' * bool(row)}in {sql if len(sql) <= 80 else f'{sql[:79]}…'!r}"


@lru_cache(256)
def _insert_parts(sql: str) -> tuple[str, str, str, int]:
    """What stands before, in and after the parentheses of VALUES, and how many values they take, or 0."""
    match = re.match(INSERT_VALUES, sql)
    return (match["head"], match["row"], match["tail"], sql.count("?")) if match else ("", "", "", 0)


def _insert(conn: sqlite3.Connection, parts: tuple[str, str, str, int], rows: list[Any]) -> None:
    """Insert plain rows, as many in a statement as it may have variables."""
    head, row, tail, width = parts
    size = max(1, VARIABLES // width)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        conn.execute(f"{head}{', '.join([row] * len(chunk))}{tail}", list(chain.from_iterable(chunk)))


def _checked_handlers(handlers: Any) -> Mapping[type, Handler]:
    if not isinstance(handlers, Mapping):
        raise UsageTypeError(f"handlers={handlers!r}: expected a mapping of message classes to functions")
    for kind, handler in handlers.items():
        if not isinstance(kind, type) or not callable(handler):
            raise UsageTypeError(f"handlers= maps message classes to functions, not {kind!r} to {handler!r}")
        if kind in CHECKS:
            raise UsageError(
                f"handlers= names {kind.__name__}, which the writer handles itself; "
                "remove it, or define a message class of your own"
            )
    return handlers


def _reason(error: BaseException) -> BaseException:
    """What a task failed for: where a handler rolled back, the exception for which it did.

    Whoever keeps it must not keep what it has seen: the cursors in its frames hold the file open.
    """
    error = error.args[0] if isinstance(error, _BadMessage) else error
    if isinstance(error, sqlite3.DatabaseError) and str(error) == "not authorized":
        what = "a handler rolled back the transaction; raise an exception instead, which fails its task only"
        error = error.__context__ if isinstance(error.__context__, Exception) else MessageRefused(what)
    traceback.clear_frames(error.__traceback__)
    return error


def _unknown(kind: type) -> MessageRefused:
    return MessageRefused(
        f"no handler for messages of type {kind.__name__}; pass handlers={{{kind.__name__}: function}}"
    )


# ---- Progress: what is shown and logged; no run and no lock waits for a terminal, a pipe or a handler ----

NAME_WIDTH = 40  # cells of a task's name at the most
LOG_EVERY = 10.0  # seconds between two log lines; in a notebook a fifth of that
FRAME = 0.1  # seconds between two frames of the bars
HOLE = 0.5  # seconds that the row of a task stays empty after its end, for another task to take it
BACKLOG = 10_000  # printed lines that wait for a slow terminal before who prints waits as well
FAILURES_TOLD = 10  # of one cause; more are only counted
READER_PATIENCE = 20.0  # seconds that a line of the command line waits for who reads stderr, perhaps a pager


class Progress:
    """The protocol of a display: these three methods, and nothing else is called.

    They are called in one thread that does little else, update() with every message that has been
    committed (of several progress messages of a task in one commit, the last). A finish whose status is
    "queued" is that of an attempt which failed and will be repeated, or has not begun after all. The run
    waits for none of them, but five seconds for the last; a display that raises, or is 100,000 messages
    behind, is switched off.
    """

    def start(self, total: int | None) -> None:
        """The run begins; `total` tasks where that is known."""

    def update(self, message: Any) -> None:
        """A message has been committed."""

    def stop(self, result: Any) -> None:
        """The run has ended; `result` is its RunResult."""


class _Display:
    """What a run shows and logs, done by a thread of its own: what comes in wakes it, for our own displays
    ten times a second at most.

    From the start of `thread` on log records are emitted. start() and stop() are for the calling thread.
    update(), tell(), failed() and know() are for every thread, also with a lock held: they append to a deque,
    which needs no lock, and wait for nobody.
    """

    PATIENCE = 5.0  # seconds, at the end; half of them for a pipe that nobody reads
    BACKLOG = 100_000  # messages, and log records, that may wait; of the records the last

    def __init__(self, progress: Any) -> None:
        self._shown = _display_of(progress)
        self._board = self._shown if isinstance(self._shown, _Board) else None
        self._messages: deque[Any] = deque()
        self._records: deque[tuple[Any, ...]] = deque(maxlen=self.BACKLOG)  # level, event, text, arguments
        self._calls_user = False  # else, if the thread hangs, it does so in a handler, perhaps with its lock
        self._wake, self._pause = _Bell(), _Bell()
        self._is_over = False
        self.thread = threading.Thread(target=self._work, name="pipeloom-display", daemon=True)

    def start(self, total: int | None) -> bool:
        """The run begins; returns whether update() should be called."""
        if self._board is None:
            self.update(("start", total))
        else:  # at once: what tasks print goes above the bars from the first line on
            with suppress(Exception):  # an odd stream, no thread left: the run goes on without bars
                self._board.start(total)
        return type(self._shown) is not Progress

    def update(self, message: Any) -> None:
        """Have a committed message shown."""
        if len(self._messages) < self.BACKLOG:
            self._messages.append(message)
            self._wake.ring()
        elif type(self._shown) is not Progress:
            self._switch_off(f"it is {self.BACKLOG:,} messages behind")

    def know(self, total: int | None, skipped: int) -> None:
        """Take in what becomes known while the run is on."""
        if self._board is not None:
            self._board.total, self._board.counts["skipped"] = total and total - skipped, skipped

    def tell(self, level: int, text: str, *args: object, event: str = "") -> None:
        """Have this logged by the display thread, soon; `text` and `args` as for logger.log()."""
        self._records.append((level, event, text, args))
        self._wake.ring()

    def failed(self, name: str, message: str, place: str, number: int) -> None:
        """Say that a task has failed, at that line of the user's; it is the `number`th of its cause."""
        more = " [more failures like this one will only be counted]" * (number == FAILURES_TOLD)
        where = f" ({place}){more}" if place else more
        if number <= FAILURES_TOLD:
            self.tell(
                logging.ERROR, "%s failed: %s%s", _clean(name), _cut(message, 300), where, event="failed"
            )

    def stop(self, result: Any) -> None:
        """Show the end, and emit what is left; after PATIENCE the rest is left behind."""
        if self.thread.ident is None:
            return
        if not self._is_over:
            self._messages.append(("stop", result))
        if result is not None and not self._is_over:
            self.tell(
                logging.INFO, "run %s: %s in %.1f s", result.run_id, _in_words(result), result.elapsed,
                event="" if self._board is None and _Session.current is None else "summary",
            )  # fmt: skip
        self._is_over = True
        self._wake.ring()
        self._pause.ring()
        self.thread.join(self.PATIENCE)
        if self.thread.is_alive():
            if not self._calls_user:
                return
            self.tell(
                logging.WARNING,
                "the progress display did not stop within %g s and was abandoned",
                self.PATIENCE,
            )
        self._log()

    # The display thread

    def _work(self) -> None:
        while not self._is_over:
            self._wake.wait(FRAME if self._records else 1.0)  # what has no room in the pipe is tried again
            self._step()
            if self._board is not None:
                self._pause.wait(FRAME)
        self._step()
        self._log(self.PATIENCE / 2)

    def _step(self) -> None:
        self._log()
        self._calls_user = self._board is None
        try:
            for _ in range(len(self._messages)):
                message = self._messages.popleft()
                if type(message) is tuple:
                    getattr(self._shown, message[0])(message[1])
                else:
                    self._shown.update(message)
            if type(self._shown) is _LogLines:
                self._shown.tick()
        except BaseException as error:  # even its SystemExit is not the run's
            self._switch_off(_describe(error))
        self._calls_user = False

    def _log(self, patience: float = 0.0) -> None:
        """Emit the records, unless that would block: a thread that hangs in a handler keeps its lock, for
        which logging.shutdown() then waits for ever. `patience` is for a pipe that is full.
        """
        with suppress(BaseException):  # of a handler; or there is none left, as stop() emits them as well
            while self._records and (_Screen.current is not None or _takes(sys.stderr, patience)):
                level, event, text, args = self._records.popleft()
                if logger.isEnabledFor(level):
                    record = logger.makeRecord(
                        logger.name, level, __file__, 0, text, args, None, extra={"event": event}
                    )
                    (logger if logger.hasHandlers() else _LogHandler()).handle(record)

    def _switch_off(self, why: str) -> None:
        level = logging.WARNING if self._board is None else logging.DEBUG  # of ours, stderr is a closed pipe
        self._shown = Progress()
        self.tell(level, "the progress display failed and was turned off: %s", why)


def _in_words(result: RunResult) -> str:
    """The counts of a run; "done" are those that did not fail."""
    told = {
        "done": result.done,
        "skipped": result.skipped,
        "failed": result.error,
        "cancelled": result.cancelled,
    }
    return ", ".join(f"{number:,} {word}" for word, number in told.items() if number or word == "done")


# Our own displays


@dataclass
class _Bar:
    """One running task, or one bar of somebody's own."""

    name: str
    total: float | None = None
    completed: float = 0
    text: str = ""
    began: float = 0.0  # by time.monotonic(); 0 shows no time

    def fraction(self) -> float | None:
        """0..1, or None where the total is not known."""
        return min(max(self.completed / self.total, 0.0), 1.0) if self.total else None


class _Board(Progress):
    """What a display of ours knows. The display thread changes it; the screen's reads it meanwhile, without a
    lock, from copies that a dict makes in one step: a frame may be a message behind.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.counts = dict.fromkeys((*FINAL, "skipped"), 0)
        self.running: dict[int, _Bar] = {}
        self.waiting: set[int] = set()  # failed, and will be tried again
        self.began = time.monotonic()

    def start(self, total: int | None) -> None:
        self.total = total
        self.began = time.monotonic()

    def update(self, message: Any) -> None:
        kind, id = type(message), message.task_id
        self.waiting.discard(id)
        if kind is MsgTaskStarted:
            self.running[id] = _Bar(message.name, began=time.monotonic())
        elif kind is MsgTaskProgress and id in self.running:
            bar = self.running[id]
            bar.completed, bar.total, bar.text = message.step, message.total, message.message
        elif kind is MsgTaskFinished:
            self.running.pop(id, None)
            if message.status != QUEUED:
                self.counts[message.status] += 1
            elif message.message:  # else it has not been called yet
                self.waiting.add(id)

    def stop(self, result: Any) -> None:
        self.running, self.waiting = {}, set()
        self.counts = {status: getattr(result, status) for status in self.counts}

    def work(self) -> float:
        """How many tasks' work is behind us, parts of running ones included."""
        ran = self.counts[DONE] + self.counts[ERROR]
        return ran + sum(bar.fraction() or 0.0 for bar in self.running.copy().values())

    def eta(self, elapsed: float) -> float | None:
        """Seconds to the end, or None where that would be a guess."""
        bars, ended = list(self.running.copy().values()), sum(self.counts[status] for status in FINAL)
        rest = (self.total or 0) - ended
        if self.waiting and not bars:
            return None
        if rest > len(bars) + len(self.waiting) and elapsed >= 1:  # some have not begun: by the rate so far
            return elapsed / ended * rest if ended else None
        if rest <= 0 or elapsed < 1 or self.waiting or not all(bar.fraction() for bar in bars):
            return None
        now = time.monotonic()  # the last ones run, and the slowest of them ends last
        return max(((now - bar.began) * (1 / (bar.fraction() or 1) - 1) for bar in bars), default=None)

    def facts(self) -> dict[str, str]:
        """The words of the line on all tasks, in their order; "" where there is nothing to say."""
        elapsed, done, counts = time.monotonic() - self.began, f"{self.counts[DONE]:,}", self.counts
        eta, ran = self.eta(elapsed), counts[DONE] + counts[ERROR]
        if self.total is not None:
            total = f"{self.total:,}"
            done = f"{done:>{len(total)}}/{total}"
        return {
            "done": f"{done} done",
            "failed": f"{counts[ERROR]:,} failed" * bool(counts[ERROR]),
            "rate": _rate(ran / elapsed) if ran and elapsed >= 1 else "",
            "time": _clock(elapsed),
            "eta": "" if eta is None else f"eta {_clock(max(eta, 1))}",
            "waiting": f"{len(self.waiting):,} to retry" * bool(self.waiting),
            "cancelled": f"{counts[CANCELLED]:,} cancelled" * bool(counts[CANCELLED]),
            "skipped": f"{counts['skipped']:,} skipped" * bool(counts["skipped"]),
        }


class _LogLines(_Board):
    """For what is no terminal: a line every ten seconds, in a notebook every two, and one at the end. For the
    display thread alone.
    """

    _told = 0.0  # when, by time.monotonic()

    def tick(self) -> None:  # once a second, or more often
        every = LOG_EVERY / 5 if type(sys.stderr).__module__.startswith("ipykernel") else LOG_EVERY
        if time.monotonic() >= max(self._told, self.began) + every and _takes(sys.stderr):
            self._told = time.monotonic()
            self._write(f"{len(self.running):,} running")

    def stop(self, result: Any) -> None:
        super().stop(result)
        if _Session.current is None and _takes(sys.stderr, 2.0):  # else its summary says the same
            self._write()

    def _write(self, *more: str) -> None:
        facts = "  ".join(filter(None, (*self.facts().values(), *more)))
        _say(f"{time.strftime('%H:%M:%S')} pipeloom: {facts}")


GIVES_WAY = ("skipped", "cancelled", "waiting", "rate", "eta", "time", "failed")  # in a narrow window


class _TerminalBars(_Board):
    """The bars on a terminal: a line on all tasks, and a row for each that has run for a moment. The calling
    thread starts it, the screen's asks for the lines.
    """

    def __init__(self, style: _Style) -> None:
        super().__init__()
        self._style = style
        self._rows: list[tuple[int, float]] = []  # whose each row is, and since when it is free, or 0
        self._names = 0  # cells of the longest name so far: its column never shrinks

    def start(self, total: int | None) -> None:
        super().start(total)
        _Screen.show(self)

    def stop(self, result: Any) -> None:
        super().stop(result)
        _Screen.hide(self)

    def lines(self, width: int, room: int) -> list[str]:
        """For the block: the line on all tasks, the running ones, and how many more there are."""
        running, facts = self.running.copy(), self.facts()
        facts["rate"] = facts["rate"].rjust(8)  # so that what comes after it stays where it is
        if self.total is not None:
            facts["eta"] = facts["eta"] or "eta -:--:--"
        crowded = len(running) > room - 1
        self._seat(running, max(room - 1 - crowded, 0))
        bars = [_Bar("") if free else running[id] for id, free in self._rows]
        more = len(running) - sum(1 for _, free in self._rows if not free)
        bars += [_Bar(f"+{more:,} more")] * crowded
        self._names = max([self._names, *(_width(_clean(bar.name)) for bar in bars)])
        return [self._total_line(facts, width), *_lines(bars, width, self._style, self._names)][:room]

    def kept(self, width: int) -> list[str]:
        """What stays on the screen at the end; the summary of the command line says the same."""
        return [self._total_line(self.facts(), width)] if _Session.current is None else []

    def _seat(self, running: dict[int, _Bar], room: int) -> None:
        """Say who is on which row: nobody moves, but up into a row that was free for a moment."""
        now = time.monotonic()
        rows = [(id, free if id in running else free or now) for id, free in self._rows]
        rows = [(id, free) for id, free in rows if not free or now - free < HOLE][:room]
        seated = {id for id, free in rows if not free}
        new = deque(id for id, bar in running.items() if id not in seated and now - bar.began >= FRAME)
        self._rows = [(new.popleft(), 0.0) if free and new else (id, free) for id, free in rows]
        self._rows += [(id, 0.0) for id in islice(new, room - len(rows))]

    def _total_line(self, facts: dict[str, str], width: int) -> str:
        """The line on all tasks, of `width` - 1 cells: as many facts as fit, and of the bar what is left."""
        room, style, bar = max(width - 1, 0), self._style, ""
        for name in GIVES_WAY:
            if len("  ".join(filter(None, facts.values()))) > room:
                facts = {**facts, name: ""}
        text = _head("  ".join(filter(None, facts.values())), room)
        label = "All tasks " * (len("All tasks " + text) <= room)
        left = room - len(label + text)
        length = min(40, max(room - 69, 10), left - len(" 100%  "))  # so that it seldom changes
        if self.total is not None and length >= 5:
            part = min(self.work() / self.total, 1.0) if self.total else 1.0
            bar = f"{style.bar(part, length)} {int(100 * part):3}%  "
            left -= length + len(" 100%  ")
        red = facts["failed"]
        return label + bar + text.replace(red, style.paint("31", red), bool(red)) + " " * left


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _rate(per_second: float) -> str:
    size, unit = (1, "s") if per_second >= 1 else (60, "min") if per_second >= 1 / 60 else (3600, "h")
    return f"{per_second * size:,.{1 if per_second < 100 else 0}f}/{unit}"


@lru_cache(4_096)
def _cells(char: str) -> int:
    """How many terminal cells a character takes."""
    if east_asian_width(char) in "WF":
        return 2
    return 0 if category(char) in ("Mn", "Me", "Cf") else 1


def _width(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_cells, text))


def _clean(text: str) -> str:
    """Without control characters, and those that join or tint others: terminals disagree how wide that is."""
    if text.isascii() and text.isprintable():
        return text
    text = re.sub("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]", "", text)
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def _head(text: str, width: int) -> str:
    """What of a clean text fits into so many cells."""
    if len(text) * (1 if text.isascii() else 2) <= width:
        return text
    return text[: bisect_right(list(accumulate(map(_cells, text))), width)]


def _cut(text: str, width: int, dots: str = "", part: float = 0.5) -> str:
    """A line of at most `width` cells; `dots` stand for the middle of a long one; `part` of it is its end."""
    text = _clean(text)
    if dots and _width(text) > width > 2 * len(dots):
        tail = _head(text[::-1], int((width - len(dots)) * part))[::-1]
        text = _head(text, width - len(dots) - _width(tail)) + dots + tail
    return _head(text, width).rstrip()


def _fit(text: str, width: int, dots: str = "") -> str:
    """The same, filled up with spaces."""
    text = _cut(text, width, dots)
    return text + " " * (width - _width(text))


class _Style:
    """What a stream can show: colours or none, bars of box-drawing characters, Rich's, or of ASCII."""

    def __init__(self, stream: Any, rich: bool = False) -> None:
        self.colour, self._rich = not os.environ.get("NO_COLOR"), rich
        self.full, self.half, self.dots, self._signs = "━", "╸", "…", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
        try:
            "━╸…⠋".encode(getattr(stream, "encoding", None) or "ascii")
        except Exception:  # of an odd stream, too
            self.full, self.half, self.dots, self._signs = "#", "", "..", "|/-\\"

    def bar(self, fraction: float, width: int) -> str:
        """A bar of exactly `width` cells."""
        halves = int(fraction * width * 2)
        if self._rich and self.half:  # where the stream is of ASCII Rich raises
            return _rich_bar(halves, width)
        left = self.full * (halves // 2) + self.half * (halves % 2)
        empty = "." if not self.half else self.full if self.colour else " "
        return self.paint("32", left) + self.paint("90", empty * (width - len(left)))

    def sign(self) -> str:
        """For what runs and cannot say how far it is: it moves."""
        return self._signs[int(time.monotonic() / FRAME) % len(self._signs)]

    def paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and text else text


@lru_cache(4_096)
def _rich_bar(halves: int, width: int) -> str:
    """A bar made by Rich; slow, and there are few different ones.

    Rich's Live is not used: two of them at once fail before Rich 14.1, and in all versions bars that come
    and go are torn where several threads print.
    """
    bar = import_module("rich.progress_bar").ProgressBar(2 * width, halves, width=width)
    return _made_by_rich(bar, width)[0]


def _made_by_rich(what: Any, width: int) -> list[str]:
    with _rich_console().capture() as capture:
        _rich_console().print(what, width=width)
    return str(capture.get()).rstrip("\n").split("\n")


def _lines(bars: list[_Bar], width: int, style: _Style, names: int = 0) -> Iterator[str]:
    """A line of `width` - 1 cells for each bar: name, bar, percent or a sign that it runs, time, text."""
    room, now = max(width - 1, 0), time.monotonic()
    names = min(max([names, *(_width(_clean(bar.name)) for bar in bars)]), NAME_WIDTH, room // 2 - 4)
    length = min(30, room // 5)
    for bar in bars:
        fraction = bar.fraction()
        sign = f"{int(100 * fraction)}%" if fraction is not None else style.sign() if bar.began else ""
        if width < 40:
            yield _fit(f"{sign:>4} {_fit(bar.name, room - 5, style.dots)}", room)
        else:
            drawn = style.bar(fraction, length) if fraction is not None else " " * length
            text = f"{_clock(now - bar.began) if bar.began else '':>9}  {bar.text}"
            rest = _fit(text, room - names - length - 6)
            yield f"{_fit(bar.name, names, style.dots)} {drawn} {sign:>4}{rest}"


class _Screen:
    """The block of lines at the bottom of the terminal, one for all runs and progress managers of a process.

    A thread of its own draws it. Whole lines that any thread prints or logs meanwhile wait in `_backlog` for
    that thread, which writes them above the block: nobody else waits for the terminal. Wrapping is off only
    inside a frame and the cursor is never hidden, so that a process killed at any moment leaves a whole
    terminal. `_lock` guards the sources and the backlog, and is never held while writing.
    """

    PATIENCE = 2.0  # seconds, with a terminal that blocks
    current: _Screen | None = None
    _door = threading.Lock()  # guards `current`; held while the old screen ends, as two must not draw

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.sources: list[Any] = []  # each has lines(width, room), and kept(width) for its end
        self._drawn = (0, 0)  # how many lines stand there now, and how wide they are
        self._lock = threading.RLock()  # a finalizer that prints may come where it is held
        self._backlog: list[tuple[Any, str]] = []
        self._draws = True  # else who has lines writes them; under the lock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pipeloom-screen", daemon=True)
        self._thread.start()
        self._taken = [_Above(stream, self) for stream in (sys.stdout, sys.stderr) if _is_terminal(stream)]

    @classmethod
    def show(cls, source: Any) -> None:
        with cls._door:
            cls.current = cls.current or cls()
            if source not in cls.current.sources:
                cls.current.sources.append(source)

    @classmethod
    def hide(cls, source: Any) -> None:
        """What stays of a source becomes ordinary lines; a terminal that blocks (Ctrl-S) is left behind."""
        with cls._door:
            screen = cls.current
            if screen is None or source not in screen.sources:
                return
            lines = source.kept(_terminal_size(screen.stream)[0])
            screen.above(screen.stream, "".join(f"{line.rstrip()}\n" for line in lines), source)
            if not screen.sources:
                cls.current = None
                screen._over.set()
                screen._thread.join(cls.PATIENCE)
                for above in screen._taken:
                    above.leave()

    def above(self, stream: Any, text: str, leaves: Any = None) -> None:
        """Have whole lines written to `stream`, above the block. Any thread may call it, and one of a task
        waits where the terminal is 10,000 lines behind.
        """
        patient = threading.current_thread().name not in ("MainThread", "pipeloom-display")
        while patient and len(self._backlog) >= BACKLOG and self._draws and self._thread.is_alive():
            time.sleep(FRAME)
        with self._lock:
            self._backlog.append((stream, text))
            self.sources = [source for source in self.sources if source is not leaves]
        if not self._draws:  # else the screen's thread does, even if it ends just now
            self._write_backlog()

    def _work(self) -> None:
        try:
            while not (self._over.wait(FRAME) and _takes(self.stream, FRAME)):
                if _takes(self.stream):
                    self._draw()
            self._draw()
        except Exception as error:  # a closed pipe, a terminal gone: the run goes on without bars
            logger.debug("the bars are off: %s", _describe(error))
        with self._lock:  # first: who waits in above() may hold the lock of a handler
            self._draws = False
        self._write_backlog()

    def _draw(self) -> None:
        width, height = _terminal_size(self.stream)
        with self._lock:  # the lines that a source leaves, and that it is gone, are seen together
            sources, backlog, self._backlog = self.sources, self._backlog, []
        lines: list[str] = []
        for left, source in zip(range(len(sources), 0, -1), sources):
            lines += source.lines(width, (height - 1 - len(lines)) // left)
        erase = self.erased(width)
        self._drawn = len(lines), width - 1
        frame = "\x1b[?7l" + "".join(f"{line}\x1b[K\r\n" for line in lines) + "\x1b[?7h"
        self._write([(self.stream, erase), *backlog, (self.stream, frame)])

    def erased(self, width: int) -> str:
        """What erases the block, for who writes to the terminal himself."""
        (number, cells), self._drawn = self._drawn, (0, 0)
        rows = number * max(1, -(-cells // width))  # a narrower window folds them
        return "\r" + "\x1b[A\x1b[2K" * rows  # line by line: \x1b[J fills tmux's history

    def _write_backlog(self) -> None:
        with self._lock:
            backlog, self._backlog = self._backlog, []
        with suppress(OSError, ValueError):  # the terminal is gone
            self._write(backlog)

    def _write(self, pieces: list[tuple[Any, str]]) -> None:
        """In as few writes as possible: a frame is never seen half."""
        for stream, group in groupby(pieces, itemgetter(0)):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            text = "".join(piece for _, piece in group).encode(encoding, "replace").decode(encoding)
            type(stream).write(stream, text)  # past _Above
            type(stream).flush(stream)


class _Above:
    """Takes the place of write() of a terminal's stream while bars are up, so that a print tears nothing.

    In the stream itself: logging handlers, and whoever else has kept it, write above the bars as well. Any
    thread enters it; each has a half line of its own, so that there is nothing to guard.
    """

    def __init__(self, stream: Any, screen: _Screen) -> None:
        self._stream, self._screen = stream, screen
        self._halves: dict[int, str] = {}  # half lines, by thread: print() writes in pieces
        self._pid = os.getpid()
        stream.write, stream.flush = self._take, lambda: None  # to flush is to wait for the screen's thread

    def _take(self, text: str) -> int:
        if os.getpid() != self._pid:  # a forked child has the bars' lines, but not their thread
            self._halves.clear()
            self.leave()
            return int(self._stream.write(text))
        me = threading.get_ident()
        lines, newline, half = (self._halves.pop(me, "") + text).rpartition("\n")
        if half:  # of one that is written over and over, as by tqdm, the last
            self._halves[me] = re.sub(r"[^\r]*\r(?=[^\r])", "", half)
        if newline:
            self._screen.above(self._stream, lines + newline)
        return len(text)

    def leave(self) -> None:
        """Give the stream back. Idempotent."""
        for name in ("write", "flush"):
            vars(self._stream).pop(name, None)
        halves, self._halves = self._halves, {}
        for half in halves.values():
            self._screen.above(self._stream, half + "\n")


def _takes(stream: Any, seconds: float = 0.0) -> bool:
    """Whether a short write would not block, as far as the system can tell: Windows cannot.

    It would if nobody reads the pipe, or after Ctrl-S. Who is stuck in a write holds the stream's lock, and
    perhaps a logging handler's, and the process waits for both at its exit.
    """
    from select import select

    try:
        return bool(select([], [stream.fileno()], [], seconds)[1])
    except (AttributeError, OSError, ValueError):
        return True


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
        return import_module("rich.console").Console(stderr=True)  # so that type checkers do not ask for it
    except ImportError:
        return None


class _PlainConsole:
    """What `console` is without Rich."""

    def print(self, *objects: object, **_: object) -> None:
        """Print to stderr, above the bars."""
        _say(" ".join(_without_markup(o) if isinstance(o, str) else str(o) for o in objects))

    log = print


def _display_of(progress: Any) -> Progress:
    if not isinstance(progress, str):
        for name in ("start", "update", "stop"):
            if not callable(getattr(progress, name, None)):
                raise UsageTypeError(f"progress={progress!r} has no method {name}(); see pipeloom.Progress")
        return progress  # type: ignore[no-any-return]
    displays: dict[str, Callable[[], Progress]] = {
        "rich": lambda: _TerminalBars(_Style(sys.stderr, rich=True)),
        "ansi": lambda: _TerminalBars(_Style(sys.stderr)),
        "log": _LogLines,
        "none": Progress,
    }
    kind = _best_display() if progress == "auto" else progress
    if kind not in displays:
        raise UsageError(
            f"progress={progress!r} is unknown: expected auto, {', '.join(displays)} or an object"
        )
    if kind == "rich" and _rich_console() is None:
        raise UsageError("progress='rich' needs Rich, which cannot be imported; install it or use 'auto'")
    return displays[kind]() if sys.stderr is not None else Progress()


def _best_display() -> str:
    if not _is_terminal(sys.stderr):
        return "log"
    if os.name == "nt":
        os.system("")  # makes the Windows console understand escape sequences
    return "rich" if _rich_console() is not None else "ansi"


# The two progress managers of the original, for those who draw bars of their own.


class _AnsiProgress:
    """Rich's Progress where that is missing; what is started shares the block with all others. Any thread may
    call it; its lock guards a bar's change, as two may advance it.
    """

    transient = False  # its bars clear at the end

    def __init__(self) -> None:
        self.tasks: dict[int, _Bar] = {}
        self._ids = count()
        self._lock = threading.Lock()

    def add_task(self, description: str, total: float | None = 100, completed: float = 0, **_: Any) -> int:
        """Add a bar; returns its id, which may be 0."""
        id = next(self._ids)
        self.tasks[id] = _Bar(_without_markup(description), total, completed)
        return id

    def update(
        self, task_id: int, *, total: float | None = None, completed: float | None = None,
        advance: float = 0, description: str | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Change a bar; None leaves as it is, and one that was removed is let be."""
        bar = self.tasks.get(task_id, _Bar(""))
        with self._lock:
            bar.total = bar.total if total is None else total
            bar.completed = (bar.completed if completed is None else completed) + advance
            bar.name = bar.name if description is None else _without_markup(description)

    def advance(self, task_id: int, advance: float = 1) -> None:
        self.update(task_id, advance=advance)

    def remove_task(self, task_id: int) -> None:
        self.tasks.pop(task_id, None)

    def lines(self, width: int, room: int) -> list[str]:
        return list(islice(_lines(list(self.tasks.copy().values()), width, _Style(sys.stderr)), room))

    def start(self) -> Any:
        """Show the bars until stop(), as a `with` block does."""
        if _is_terminal(sys.stderr):
            _Screen.show(self)
        return self

    def stop(self, *_: object) -> None:
        """Leave the bars on the screen as they are, or clear them if they are transient."""
        _Screen.hide(self)

    __enter__, __exit__ = start, stop

    def refresh(self) -> None:
        """For Rich's users; the bars are drawn ten times a second anyway."""

    def kept(self, width: int) -> list[str]:
        return [] if self.transient else self.lines(width, BACKLOG)


def _without_markup(text: str) -> str:
    """What Rich's users write as "[cyan]All tasks" is shown without the tags."""
    return re.sub(r"\[/?[a-z#@][^\[\]]*\]|\[/\]", "", str(text))


def make_overall_progress() -> Any:
    """A progress manager whose bars stay: Rich's Progress, or one like it where Rich is missing."""
    if _rich_console() is None:
        return _AnsiProgress()

    class OnScreen(import_module("rich.progress").Progress):  # type: ignore[misc]
        """Rich's Progress, drawn by our screen and not by a Live of its own."""

        transient, start, stop, refresh, kept = map(
            partial(getattr, _AnsiProgress), ("transient", "start", "stop", "refresh", "kept")
        )

        def lines(self, width: int, room: int) -> list[str]:
            return _made_by_rich(self.get_renderable(), max(width - 1, 1))[:room]

    return OnScreen(console=_rich_console())


def make_task_progress() -> Any:
    """A progress manager whose bars clear at the end; see make_overall_progress()."""
    progress = make_overall_progress()
    progress.transient = True
    return progress


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

    stream = property(lambda _: sys.stderr)

    def __init__(self, level: int = logging.WARNING) -> None:
        logging.Handler.__init__(self, level)  # past what sets `stream`
        self.addFilter(lambda record: getattr(record, "event", "") != "summary")  # said on stderr already
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", "%H:%M:%S"))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if getattr(record, "event", "") != "failed" or not _is_terminal(self.stream):
            return text
        style, (name, message, _) = _Style(self.stream), map(str, record.args or ())
        room = _terminal_size(self.stream)[0] - 1 - _width(text) + _width(name) + _width(message)
        short = _cut(name, max(room - _width(message), 18), style.dots)  # which gives way first
        said = _cut(message, max(room - _width(short), 24), style.dots, part=0.0)
        return style.paint("31", text.replace(f"{name} failed: {message}", f"{short} failed: {said}"))


class _LogFile(logging.FileHandler):
    """Known by its class, so that another call of setup_logging() removes it."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:  # once, and not for each record, as the disk is full, say
            self._told = True
            _say(f"pipeloom: log file {self.baseFilename!r} cannot be written: {error.strerror}")


def setup_logging(verbose: int, log_file: Any = None) -> None:
    """Show log lines of level WARNING (0), INFO (1) or DEBUG (2 and more) on stderr, above the bars.

    `log_file` gets them too, as plain lines with a date, and our INFO lines in any case: retries, and how
    a run ended. A program whose root logger has handlers keeps its logging: then this concerns only the
    logger "pipeloom". Call it again to change either.
    """
    level = logging.WARNING if verbose <= 0 else logging.INFO if verbose == 1 else logging.DEBUG
    for log in (logging.getLogger(), logger):
        for handler in [h for h in log.handlers if isinstance(h, (_LogHandler, _LogFile))]:
            log.removeHandler(handler)
            handler.close()
    theirs = logging.getLogger().handlers
    home = logger if theirs else logging.getLogger()
    if not any(hasattr(h, "console") or getattr(h, "stream", 0) in (sys.stdout, sys.stderr) for h in theirs):
        home.addHandler(_LogHandler(level))
    if log_file:
        file = _LogFile(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(name)s] %(message)s"))
        home.addHandler(file)
    home.setLevel(level)
    logger.setLevel(min(level, logging.INFO) if log_file else level)


# ---- Task and context: what a worker may do ------------------------------------------------------------

MANY_ROWS = 1_000_000  # held by one task before it is told of atomic=False
STREAM_ROWS = 1_000  # that an atomic=False task sends at once
_Terms = namedtuple("_Terms", "path kinds limit packs groups retries retry_delay timeout atomic executor")
_Sent = namedtuple("_Sent", "message place")  # what a task stores, and the line that sent it
# A MsgExecute, in the same way; or rows that are gathered: `many` is then how many it takes at most.
_Statement = namedtuple("_Statement", "sql params many place")
_Trouble = namedtuple("_Trouble", "error traceback cause")  # why an attempt failed; the cause groups failures
RLock: Any = type(threading.RLock())  # threading's own is a function around it
_NO_TROUBLE = _Trouble(None, None, "")
_statement_of = partial(tuple.__new__, _Statement)  # as with _row_of
_NO_GROUP = _Statement(object(), [], 0, None)


class TaskContext:
    """What a worker gets as its queue: what its task may do, in its thread and those that this starts.

    Rows and messages that it sends are kept here and stored together with the finish, if and only if the
    task is done; with atomic=False they are sent on as they come. Everything that sends raises TaskCancelled
    once the task is to stop, and WriterFailed once nothing can be stored. This class only gathers, as in a
    process of executor=; an _Attempt sends. `lock` guards its end; the group is one thread's.
    """

    __slots__ = (
        "_group", "_held_rows", "_terms", "_thread", "attempt", "closed", "held", "name", "news", "reason",
        "task", "task_id",
    )  # fmt: skip
    lock: Any = nullcontext()  # nobody else is there, in another process

    def __init__(self, terms: _Terms, task: Any, task_id: int, name: str, attempt: int = 1) -> None:
        self._terms, self.task_id, self.name = terms, task_id, name
        self.task = task  #: the task as it was given
        self.attempt = attempt  #: 1 for the first go, 2 for the first retry
        self.closed = False  # its end is on its way, and nothing is accepted any more
        self.reason: str | None = None  # why the task is to stop
        self.news: Any = None  # the newest progress
        self.held: list[Any] = []  # messages that wait for the finish
        self._held_rows = self._thread = 0  # how many rows; which thread runs the function
        self._group = _NO_GROUP  # consecutive statements with the same SQL

    def put(self, message: Any, block: bool = True, timeout: float | None = None) -> None:
        """Send any typed message, waiting while the writer is behind; `block` and `timeout` change nothing.

        Raises MessageRefused for a message that can never be stored. After the task's finish, status messages
        are dropped and all else is refused. A handler may get a message twice, and later: send a list, not an
        iterator, and do not change it any more.
        """
        kind = type(message)
        check = CHECKS.get(kind)
        if check is None and kind not in self._terms.kinds:  # a subclass of ours, perhaps
            kind = next((base for base in kind.__mro__ if base in CHECKS), kind)
            check = CHECKS.get(kind)
        if check is not None:
            message = check(message)
        elif message is SENTINEL:
            raise MessageRefused("a worker must not send SENTINEL; return from the function instead")
        elif not isinstance(message, self._terms.kinds):
            raise _unknown(kind)
        self.check()
        if kind is MsgTaskProgress and self.owns(message):
            self.note(message)
        elif kind is MsgTaskFinished and self.owns(message):
            self.finish(message)
        elif kind in STATUS:
            self.pass_on(message)
        elif kind is MsgExecute:
            self.deliver(_Statement(message.sql, message.params, message.many, _place(1)))
        else:
            self.deliver(_Sent(message, _place(1)))

    put_nowait = put  # for code that treats the context as a queue

    def progress(self, step: float, total: float | None = None, message: str = "") -> None:
        """Say how far the task is; cheap enough for every step, as only the newest is stored and shown."""
        self.check()
        self.note(_checked_progress(MsgTaskProgress(self.task_id, step, total or 0, message)))

    def track(self, iterable: Iterable[Any], total: float | None = None) -> Iterator[Any]:
        """Pass items on and say how far they are, ten times a second at most."""
        total = length_hint(iterable) if total is None and hasattr(iterable, "__len__") else total
        step, due = 0, time.monotonic() + FRAME
        for step, item in enumerate(iterable, 1):
            yield item
            if self.reason is not None:
                self.check()
            if time.monotonic() >= due:
                self.progress(step, total)
                due = time.monotonic() + FRAME
        self.progress(step, total)

    def execute(self, sql: str, params: Any = ()) -> None:
        """One SQL statement for the writer; consecutive ones with the same SQL are run as one.

        It is run later: a bytearray, or a memoryview of one, must not change until then; pass bytes.
        """
        row, group = params if type(params) is tuple else _row(params), self._group
        if sql != group[0] or get_ident() != self._thread or self.closed or self.reason is not None:
            if get_ident() != self._thread:
                return self._send_rows(sql, [row])
            group = self._new_group(sql)
        group[1].append(row)
        if len(group[1]) >= group[2]:
            self.flush()
        return None

    def executemany(self, sql: str, rows: Iterable[Any]) -> None:
        """One SQL statement for many rows, from any iterable."""
        _check_sql(sql)
        rest, limit = iter(rows), self._terms.limit
        for batch in iter(lambda: _rows(islice(rest, limit)), []):
            self._send_rows(sql, batch)

    def upsert(self, table: str, rows: Iterable[Mapping[str, Any]], key: Any) -> None:
        """Insert mappings of column to value; where `key` (a column or several) is there, update the rest.

        The key needs a UNIQUE or PRIMARY KEY in the table.
        """
        keys = [key] if isinstance(key, str) else list(key)
        if isinstance(rows, Mapping) or hasattr(rows, "to_dict"):
            raise MessageRefused(
                f"upsert into {table!r}: rows is one {type(rows).__name__}"
                "; expected a list of mappings, as in [row] or df.to_dict('records')"
            )
        for columns, alike in groupby(rows, list):
            sql = _upsert_sql(table, columns, keys)
            for row in alike:
                self.execute(sql, tuple(row.values()))

    def connect(self) -> sqlite3.Connection:
        """A read-only connection to the database as it is committed; its `with` block closes it."""
        if not os.path.exists(self._terms.path):  # in memory, or not on the machine of the executor
            raise UsageError(
                f"ctx.connect(): the database {self._terms.path!r} cannot be read here, but only by its"
                " writer; use a file, and threads or processes of this machine"
            )
        return _connect_readonly(self._terms.path)

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
        time.sleep(max(seconds, 0))

    # For the engine: what becomes of it. An _Attempt does some of these otherwise.

    def enter(self) -> None:
        self._thread = get_ident()  # of whoever calls this: the thread that runs the function

    def owns(self, message: Any) -> bool:
        return bool(message.task_id == self.task_id)

    def note(self, message: MsgTaskProgress) -> None:
        self.news = message

    def pass_on(self, message: Any) -> None:
        self.held.append(message)  # a status message that is not this task's end

    def finish(self, message: MsgTaskFinished | End) -> None:
        """The task's own word on how it ended; the first counts."""
        self.closed = True
        self.held.append(message)

    def flush(self) -> None:
        """End the open group, and send it on where rows are streamed."""
        if self._terms.atomic:
            rows, self._group = self._group[1], _NO_GROUP
            return self._count(len(rows))
        with self.lock:  # a thread of the task's may have ended it, and be here as well
            statement, self._group = self._group, _NO_GROUP
        return self.deliver(statement) if statement.params else None

    def deliver(self, sent: _Sent | _Statement) -> None:
        """Keep what is to be stored if the task is done."""
        with self.lock:
            self._refuse_if_closed(sent)
            rows, self._group = self._group[1], _NO_GROUP  # what comes later is run later
            self.held.append(sent)
        self._count(len(rows) + _rows_in(sent))

    def _count(self, rows: int) -> None:
        self._held_rows += rows

    def _send_rows(self, sql: str, rows: list[Any]) -> None:
        _check_sql(sql)
        self.deliver(_Statement(sql, rows, True, _place(2)))

    def _new_group(self, sql: str) -> _Statement:
        if self._group is not _NO_GROUP:
            self.flush()
        _check_sql(sql)
        if self.closed or self.reason is not None:
            self._refuse_if_closed()
        terms = self._terms
        self._group = group = _statement_of((sql, [], terms.limit, _place(2)))
        if terms.atomic:
            self.held.append(group)  # now, with the rows that come later
        return group

    def _refuse_if_closed(self, sent: Any = None) -> None:
        self.check()
        if self.closed:
            what = type(sent.message).__name__ if type(sent) is _Sent else "execute()"
            raise MessageRefused(f"task {self.name!r} has already finished; {what} was not stored")


def _rows_in(sent: _Sent | _Statement) -> int:
    return len(sent.params) if type(sent) is _Statement and sent.many else 1


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


class _Attempt(TaskContext):
    """One go at a task, in the process of the run: the context that sends, and what the engine knows of it.

    The worker's thread runs it; the calling thread, the timer's and the writer's may end it. `lock` guards
    the beginning and the end as well: who comes first decides, see Channel.put().

    It waits until it has `started_at`, is `closed` when its end is on its way, and has settled when that is
    committed. What is closed may still run: `reason` says so to whatever it calls, `abandoned` to its worker.
    """

    __slots__ = (
        "abandoned", "has_news", "lock", "lost", "rejected", "run", "stage", "started_at", "thread",
        "trouble", "wakes",
    )  # fmt: skip

    def __init__(
        self, run: _Run, stage: _Stage, task: Any, task_id: int, name: str, attempt: int = 1
    ) -> None:
        TaskContext.__init__(self, stage.terms, task, task_id, name, attempt)
        self.run, self.stage = run, stage
        self.lock = RLock()  # as a finalizer may come where it is held
        self.started_at: str | None = ""  # until it starts; None if it is to start again
        self.has_news = False  # and that is on its way to the writer
        self.rejected = False  # a message of this attempt was bad
        self.abandoned = False  # its thread is left to itself, and ends when the function returns, if ever
        self.lost = False  # how it ended could not be said, for lack of memory most likely
        self.thread: threading.Thread | None = None  # that runs it, while a deadline may end it
        self.wakes: list[Callable[[], object]] = []  # what it waits for, in several threads perhaps
        self.trouble = _NO_TROUBLE  # of this attempt; before it starts, of the one before

    def sleep(self, seconds: float) -> None:
        woken = threading.Event()
        self.wakes.append(woken.set)
        try:
            self.check()
            woken.wait(min(max(seconds, 0), threading.TIMEOUT_MAX))
        finally:
            self.wakes.remove(woken.set)
        self.check()

    def note(self, message: MsgTaskProgress) -> None:
        super().note(message)
        if not self.has_news:  # the writer clears this before it reads `news`, so nothing newer is missed
            self.has_news = True
            self.run.channel.put(self, PROGRESS)

    def pass_on(self, message: Any) -> None:
        self.run.channel.put(self, message)

    def deliver(self, sent: _Sent | _Statement) -> None:
        if self._terms.atomic:
            return super().deliver(sent)
        if get_ident() == self._thread:
            self.flush()  # in the order in which they came
        self.check()
        if not self.run.channel.put(self, sent, _rows_in(sent)):
            self._refuse_if_closed(sent)
        return None

    def _count(self, rows: int) -> None:
        super()._count(rows)
        if self._held_rows - rows < MANY_ROWS <= self._held_rows and self._terms.executor is None:
            self.run.display.tell(
                logging.WARNING,
                "task %r holds %d rows in memory until it is done; atomic=False streams them instead",
                self.name, self._held_rows,
            )  # fmt: skip

    def begin(self) -> bool:
        """Start, in the thread that calls this; False if it is cancelled, or has started before."""
        if self.run.stopping:
            self.cancel_unstarted(self.run.stopping)
        with self.lock:
            if self.started_at or self.closed:
                return False
            self.started_at = _now()
            self.run.channel.begin(self)
        self.enter()
        return True

    def put_back(self) -> None:
        """It has not been called after all: it may begin again, or be cancelled."""
        with self.lock:
            if not self.closed:  # else its end is on its way
                self.started_at = None
                self.run.channel.push(self, PUT_BACK)

    def cancel_unstarted(self, reason: str) -> None:
        """Cancel it unless it runs, or ran."""
        with self.lock:  # held until it is cut off, so that it cannot begin between the two
            if not (self.started_at or self.closed):
                self.cut_off(CANCELLED, f"{reason}; {self.trouble.cause}" if self.trouble.cause else reason)

    def finish(self, message: MsgTaskFinished | End) -> None:
        if not (self._terms.atomic or self.closed or self.cancelled):
            self.flush()
        rows = self._held_rows + len(self._group[1])
        self.run.channel.put(self, message, rows, last=True)

    def cut_off(self, status: str, reason: str) -> None:
        """Anybody else's end of it, who does not wait: only a done task's rows are stored."""
        with suppress(WriterFailed):  # which ends the run
            self.run.channel.put(self, (status, _now(), None, reason), last=True, wait=False)

    def cancel(self, reason: str) -> None:
        """Have whatever it does from now on raise TaskCancelled."""
        self.reason = self.reason or reason
        for wake in self.wakes[:]:
            wake()

    def disarm(self) -> None:
        """No deadline ends it any more, unless one was first."""
        with self.lock:
            self.thread = None

    def may_retry(self) -> bool:
        return self.attempt <= self._terms.retries and self.run.stopping is None

    def record(self, error: BaseException) -> str:
        """Keep an exception, its traceback and its cause for the finish; returns its text."""
        what, traceback, cause = error.args if isinstance(error, _ToldError) else _told(error)
        self.trouble = _Trouble(error, traceback, cause)
        return str(what)


def _told(error: BaseException) -> tuple[str, str, str]:
    """An exception in words: what it is, its traceback, its cause.

    The cause is what failures have in common: the type, and the innermost line that is the user's.
    """
    root, kind, what = error, type(error).__name__, _describe(error)
    for _ in range(20):  # a library's exception hides what happened in the one that it was raised from
        root = root.__cause__ or root
    sent, row = getattr(error, "sent", (None, ""))
    try:
        report = traceback.TracebackException(type(error), error, error.__traceback__)
        report.stack[:] = [frame for frame in report.stack if not frame.filename.startswith(ENGINE)]
        if sent:  # the line that sent what cannot be stored; ours are of no interest
            kind, report.stack[:] = what, [*report.stack, traceback.FrameSummary(*sent)]
        place, text = _place_in(report.stack), _text("".join(report.format()))
    except BaseException:  # an exception may be so broken that it cannot be shown
        place, text = "", what
    text = text if len(text) < 20_000 else f"{text[:10_000]}\n...\n{text[-10_000:]}"
    what += row + (f" (from {_describe(root)})" if root is not error else "")
    return what, text, f"{kind} at {place}" if place else what


def _place_in(stack: Sequence[Any]) -> str:
    """The innermost line that is the user's."""
    frame = next((frame for frame in reversed(stack) if _is_users(frame.filename)), None)
    return f"{os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name}" if frame else ""


def _place(depth: int) -> tuple[str, int, str] | None:
    """The user's line (file, number, function) that has called this file: the method so many calls above, or
    what called that.
    """
    frame: Any = sys._getframe(depth).f_back
    while frame is not None:
        code = frame.f_code
        if _is_users(code.co_filename):
            return code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back
    return None


@lru_cache(10_000)
def _is_users(path: str) -> bool:
    """Whether a file of code is no library, and can be read."""
    return not (
        path.startswith((*ENGINE, LIBRARY, "<frozen"))
        or path.endswith((".pyx", ".pxd", ".pxi", ".c", ".cpp", ".so"))  # compiled from another language
        or PACKAGES in path
    )


LIBRARY, PACKAGES = os.path.dirname(os.__file__) + os.sep, "-packages" + os.sep
ENGINE = (_place.__code__.co_filename, threading.__file__, LIBRARY + "asyncio", LIBRARY + "concurrent")


# ---- Engine: one run; every wait in it has somebody who ends it ----------------------------------------
#
# threads   C the calling one, which pulls tasks; K the workers; W the writer; T the timer
# locks     graph.lock (stages and tally; C W), attempt.lock (its beginning and end; C K T W), channel's and
#           the timer's; taken in this order only, and nothing is logged or called of the user's with one
#
# A stray exception may come in C between any two lines. What C takes is therefore given back by `with` or
# again by _Run.end(), and C waits for a _Bell, as an Event or a Condition may be left locked by it.

FAILURES_KEPT = 100  # in a RunResult, and as many causes
GRACE = 5.0  # seconds from SIGTERM to leaving, and for workers to notice that they are to stop
POLL = 0.2  # seconds; the longest that a signal goes unnoticed
TOGETHER = 8  # so many tasks share the way to a process at most,
QUICK = 0.005  # as long as they take no more seconds than that
LIVE = 6_000  # tasks that are submitted and not settled; beyond that none is pulled
LONGEST_DELAY = 3600.0  # seconds before a retry, however often it has doubled


@dataclass(frozen=True)
class Failure:
    """A task that failed: its name, the message, the traceback if there was one, and what groups it."""

    task: str
    message: str
    traceback: str | None = None
    cause: str = ""  #: the type of the exception and the user's innermost line, or else the message


@dataclass(frozen=True, repr=False)
class RunResult:
    """How a run ended. The counts are of tasks.

    `causes` says how many failed of each cause; `failures` holds the first hundred, and one of each cause.
    `result["report"]` is what the task of that name has stored as its result, in this run or an earlier one.
    """

    run_id: int | None
    done: int
    error: int
    cancelled: int
    skipped: int
    elapsed: float
    failures: list[Failure] = field(default_factory=list)
    causes: dict[str, int] = field(default_factory=dict)
    database: str = ""

    def __repr__(self) -> str:
        return f"<RunResult {self.run_id}: {_in_words(self)} in {self.elapsed:.1f} s; {self.database}>"

    def __getitem__(self, name: str) -> str | None:
        """A task's stored result, by its name; of several tasks of this name, the first one's."""
        try:
            with _connect_readonly(self.database) as conn:
                row = conn.execute(FIND_RESULT, (name,)).fetchone()
        except sqlite3.Error as error:
            raise DatabaseError(
                self.database, f"has no results: {error}", "use a file, and keep the task status"
            ) from error
        if row is None:
            raise KeyError(name)
        return row[0]  # type: ignore[no-any-return]

    @property
    def total(self) -> int:
        """All tasks that the run knew of."""
        return self.done + self.error + self.cancelled + self.skipped

    @property
    def ok(self) -> bool:
        """Whether every task is done, now or before."""
        return not self.error and not self.cancelled


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1e9


SECONDS = "a number of seconds from 0 to 1e9"
OPTIONS: dict[str, tuple[Any, Callable[[Any], Any] | None, str]] = {  # default, test, what is expected
    "workers": (
        None,
        lambda n: n is None or (isinstance(n, int) and n > 0),
        "a whole number from 1; None is one per CPU",
    ),
    "wal": (True, None, ""),
    "store_task_status": (True, None, ""),
    "fail_fast": (False, None, ""),
    "check": (True, None, ""),
    "progress": ("auto", None, ""),
    "schema": (None, lambda s: s is None or isinstance(s, str), "a str of SQL statements"),
    "handlers": (None, None, ""),
    "busy_timeout": (300.0, _is_seconds, SECONDS),
    "durable": (False, None, ""),
    "resume": (False, None, ""),
    "redo": ((), lambda names: isinstance(names, (list, tuple, set)), "a list of names of tasks"),
    "executor": (None, lambda e: e is None or hasattr(type(e), "submit"), "a concurrent.futures.Executor"),
    "retries": (0, lambda n: isinstance(n, int) and n >= 0, "a whole number from 0"),
    "retry_delay": (1.0, _is_seconds, SECONDS),
    "timeout": (
        None,
        lambda s: s is None or (_is_seconds(s) and s),
        "a number of seconds above 0, or None for no limit",
    ),
    "atomic": (True, None, ""),
}
WRITER_OPTIONS = ("wal", "store_task_status", "schema", "handlers", "busy_timeout", "durable")
STAGE_OPTIONS = _Terms._fields[5:]  # a stage may have its own


def _check_options(what: str, options: Mapping[str, Any], known: Iterable[str] = OPTIONS) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageTypeError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    for name, value in options.items():
        _, test, expected = OPTIONS[name]
        if test is not None and not test(value):
            kind = UsageTypeError if name in ("schema", "executor", "redo") else UsageError
            raise kind(f"{name}={value!r}: expected {expected}")
    again = next((name for name in ("resume", "redo") if options.get(name)), None)
    if again and not options.get("store_task_status", True):
        raise UsageError(
            f"{again}= needs the task status, which store_task_status=False does not keep; remove one of them"
        )


def _call_with_task(function: Any, ctx: TaskContext) -> object:
    return function(ctx.task, ctx)  # as run_pipeline's worker_fn


def _call_with_item(function: Any, ctx: TaskContext) -> object:
    return function(ctx, ctx.task)  # as a Pipeline's, for each item


def _call_alone(function: Any, ctx: TaskContext) -> object:
    return function(ctx)  # as a Pipeline's, without each=


class _Declared:
    """The tasks that share one function and its options, as they were declared."""

    after: Sequence[Any] = ()  # functions and names
    even_if_failed = False
    options: Mapping[str, Any] = {}
    by_name = True  # some tasks have no id of their own
    counted = False  # some have no name either, and are known by their position
    ids: Mapping[int, str] = {}  # of the others, with their names, where they are known; or the highest

    def __init__(self, name: str, function: Any, call: Any, source: Any, naming: Any = None) -> None:
        self.name, self.function, self.call = name, function, call
        self.source = source  # of the items: an iterable, or a function that makes one
        self.naming = naming  # makes a name of an item

    def identify(self, item: Any, position: int) -> tuple[Any, str]:
        """The id that an item has of itself, perhaps None, and its name; `position` counts from 1."""
        if self.call is _call_alone:
            return None, self.name
        given, name = _identify(item)
        if self.call is _call_with_task:
            if given is None and not name:
                self.counted = True
            return given, _text(name) if name else f"task-{position if given is None else given}"
        if self.naming is not None:
            name = self.naming(item)
            if name not in (None, ""):
                return None, _text(name)
        elif not isinstance(name, str):
            name = str(item)
            if re.search(" at 0x[0-9a-fA-F]{5}", name):  # an address names nothing in later runs
                name = None
        if not name:
            self.counted = True
        return None, _text(f"{self.name}[{name or position}]")

    def items(self) -> Any:
        """What its tasks are made of; calls the user's code."""
        items = self.source() if callable(self.source) else self.source
        if not hasattr(items, "__iter__") or _is_path(items):
            raise UsageTypeError(
                f"each= of task {self.name!r} gives {items!r}; expected an iterable of items"
            )
        return items


def _identify(task: Any) -> tuple[Any, str | None]:
    """The id and the name that a task has of itself, if any."""
    if isinstance(task, (str, int, float)):
        return None, str(task)
    if isinstance(task, os.PathLike):
        return None, os.fspath(task)
    if isinstance(task, Mapping):
        return task.get("task_id"), task.get("name")
    return getattr(task, "task_id", None), getattr(task, "name", None)


def _way_to(executor: Any, timeout: float | None) -> tuple[bool, bool]:
    """Whether what goes to an executor is pickled here, as for the library's pool; and whether short tasks
    may go in groups. Not with a deadline each, nor where a process counts tasks or may not be the pool's.
    """
    if executor is None:
        return False, False
    from concurrent.futures import ProcessPoolExecutor  # slow, and needed by few

    alone = timeout is not None or getattr(executor, "_max_tasks_per_child", None)
    whole = type(executor) is ProcessPoolExecutor  # as ours is not, where a process that dies ends no other
    return isinstance(executor, ProcessPoolExecutor), whole and not alone


class _Stage:
    """How far a run is with the tasks of one declaration. _Intake and the graph's lock guard it.

    It has ended when it is exhausted and all that it submitted is settled.
    """

    def __init__(self, declared: _Declared, options: Mapping[str, Any], writer: SQLiteWriter) -> None:
        self.declared, self.name = declared, declared.name
        chosen = {**options, **declared.options}
        limit = MANY_ROWS if chosen["atomic"] else STREAM_ROWS
        way = _way_to(chosen["executor"], chosen["timeout"])
        self.terms = _Terms(
            writer.store.path, writer.kinds, limit, *way, *(chosen[name] for name in STAGE_OPTIONS)
        )
        self.known: tuple[int, int | None] | None = None  # its id, and the run that has done it
        self.items: Iterator[Any] | None = None  # once it is open
        self.size = len(declared.source) if isinstance(declared.source, Sequence) else None
        self.pulled = self.submitted = self.settled = 0
        self.exhausted = False
        self.standing = _Standing()

    def has_ended(self) -> bool:
        return self.exhausted and self.submitted <= self.settled


class _Standing:
    """Where a stage stands in the graph. The graph's lock guards it."""

    def __init__(self) -> None:
        self.followers: list[_Stage] = []
        self.waits = 0  # how many stages that it comes after have not ended
        self.doomed = ""  # why its tasks are cancelled instead of started
        self.spoiled = ""  # which of its tasks did not succeed, for what comes after it
        self.newest = NEVER  # the last run that did a task of it
        self.older = NEVER  # and a task of those that it comes after


class _Graph:
    """What comes after what: which stages may start, and which are doomed.

    `lock` guards it, the stages and the tally, for the calling thread and the writer's. It can be taken again
    by who has it, as the end of one stage starts others. `begin` starts a stage, with the lock held.
    """

    begin: Callable[[_Stage], None]

    def __init__(
        self, stages: Mapping[_Declared, _Stage], after: Mapping[_Declared, list[_Declared]]
    ) -> None:
        self.lock = threading.RLock()
        self.stages = list(stages.values())
        for declared, stage in stages.items():
            stage.standing.waits = len(after[declared])
            for before in after[declared]:
                stages[before].standing.followers.append(stage)

    def total(self) -> int | None:
        """How many tasks there are, once that is known; a doomed stage counts as one."""
        sizes = [stage.size for stage in self.stages]
        return None if None in sizes else sum(sizes)  # type: ignore[arg-type]

    def known(self) -> int:
        """How many tasks there are at least."""
        return sum(max(stage.size or 0, stage.pulled) for stage in self.stages)

    def is_cut_short(self) -> bool:
        """Whether some tasks have been submitted, and not all have been pulled."""
        return any(stage.submitted for stage in self.stages) and not all(s.exhausted for s in self.stages)

    def start(self) -> None:
        for stage in [each for each in self.stages if not each.standing.waits]:  # first: some soon have none
            self.begin(stage)
            self.stirred(stage)

    def stirred(self, stage: _Stage) -> None:
        """A task of this stage has ended, or its items have: perhaps it has ended itself."""
        stirred = [stage]
        for ended in stirred:  # which grows: a follower may have nothing to do
            if not ended.has_ended():
                continue
            before = ended.standing
            for follower in before.followers:
                standing = follower.standing
                standing.waits -= 1
                standing.older = max(standing.older, sys.maxsize if ended.submitted else before.newest)
                if before.spoiled and not follower.declared.even_if_failed and not standing.doomed:
                    standing.spoiled = before.spoiled  # the first cause, all the way down
                    standing.doomed = f"not started: {before.spoiled}"
                if not standing.waits:
                    self.begin(follower)
                    stirred.append(follower)


class _Roster:
    """Who is who: which id a task of this run has, and which run has done it before.

    For the calling thread; no lock. It asks what earlier runs have committed over a read-only connection,
    whose temporary table holds the ids that this run has given out: SQLite keeps it on disk once it is large.
    """

    def __init__(self, run: _Run) -> None:
        self._run, self._store = run, run.writer.store
        # What a run from this one on has done is skipped; None is without resume.
        self._since: int | None = NEVER if run.options["resume"] else None
        # That tasks of this run have, with their names.
        self._ids = {id: name for stage in run.graph.stages for id, name in stage.declared.ids.items()}
        self.old = run.writer.status.last_id  # the highest id of earlier runs
        self._next_id = max(1, self.old + 1, max(self._ids, default=0) + 1)
        self._from = self._until = self._end = 0  # consecutive ids that were taken; what must not be reached
        self._told = False  # that a run was cut short
        self._twins: dict[str, int] = {}  # names that several tasks have: the last of their old ids
        path, empty = self._store.path, self.old == NEVER
        try:
            self._conn = sqlite3.connect("", isolation_level=None) if empty else _connect_readonly(path, POLL)
        except sqlite3.Error as error:
            raise self._cannot_read(error) from error
        self._ask("CREATE TEMP TABLE taken(low INTEGER PRIMARY KEY, until INTEGER)")
        if self._since is not None and self.old > NEVER and self._ask(HAS_RUNS):
            self._since = self._ask(CUT_SHORT, NEVER)[0][0]

    def close(self) -> None:
        self._conn.close()

    def find(self, given: Any, name: str) -> tuple[int, int | None]:
        """The id of a task, and the run that has done it, if one has. What is `given` has an id of its own.

        Others have that of their name in earlier runs; of the same name, in the order of their coming.
        """
        if given is not None:
            return self._find_id(_task_id(given), name)
        while self.old > NEVER:
            found = self._ask(FIND_NAME, name, self._twins.get(name, NEVER), self.old)
            if not found:
                break
            id, status, run_id = found[0]
            if self._ids.get(id) != name and self._take(id):
                return id, self._done_in(status, run_id)
            self._twins[name] = id
        id = self._next_id
        if id >= HIGHEST:
            raise UsageError(
                f"no task_id is left for {name!r}: another task has {id - 1}; give that one a lower id"
            )
        self._next_id = id + 1
        self._take(id)
        return id, None

    def newest(self, declared: _Declared) -> int:
        """The last run that has done a task of this name, or one of its items; or that may have."""
        if self._since is None or self.old == NEVER or not self._ask(HAS_RUNS):
            return NEVER
        asked: tuple[Any, ...] = NEWEST_DONE, NEVER, *[declared.name] * 3
        if declared.naming is not None:  # which may have given names that it gives no more
            asked = NEWEST_OF_FAILED, NEVER
        return int(self._ask(*asked)[0][0])

    def _find_id(self, id: int, name: str) -> tuple[int, int | None]:
        if not self._take(id):
            raise UsageError(
                f"task_id {id} of task {name!r} is another task's in this run; give each its own"
            )
        self._next_id = max(self._next_id, id + 1)
        found = self._ask(FIND_ID, id) if self._since is not None and id <= self.old else []
        return id, self._done_in(*found[0][1:]) if found else None

    def _done_in(self, status: str, run_id: int) -> int | None:
        """The run that has done a task, where it need not be done again."""
        if self._since is None or status != DONE:
            return None
        if run_id < self._since and not self._told:
            self._told = True
            self._run.display.tell(
                logging.WARNING,
                "run %d was started without resume and cut short: what was done before it is done again",
                self._since,
            )
        return run_id if run_id >= self._since else None

    def _take(self, id: int) -> bool:
        """Whether an id is free in this run; it then is not any more. Kept as intervals, low to until."""
        if id == self._until < self._end:
            self._until += 1  # as nearly all do, which costs no SQL
            return True
        if self._from <= id < self._until:
            return False
        self._ask("INSERT OR REPLACE INTO taken VALUES (?, ?)", self._from, self._until)
        below = self._ask("SELECT until FROM taken WHERE low <= ? ORDER BY low DESC LIMIT 1", id)
        if below and id < below[0][0]:
            return False
        above = self._ask("SELECT min(low) FROM taken WHERE low > ?", id)[0][0]
        self._from, self._until, self._end = id, id + 1, 2**63 if above is None else above
        return True

    def _ask(self, sql: str, *parameters: Any) -> list[Any]:
        """In slices, as a lock that is waited for in C holds up signals."""
        began = time.monotonic()
        while True:
            try:
                return self._conn.execute(sql, parameters).fetchall()
            except sqlite3.DatabaseError as error:
                waited = time.monotonic() - began
                if _trouble(error) != "lock":
                    raise self._cannot_read(error) from error
                if self._run.signals.urgency() or waited > self._run.options["busy_timeout"]:
                    raise self._store.out_of_patience(error, waited) from error

    def _cannot_read(self, error: sqlite3.Error) -> DatabaseError:
        cure = CURES.get(_trouble(error), "restore it or use another file")
        return DatabaseError(self._store.shown, f"cannot be read: {error}", cure)


class _Timer(threading.Thread):
    """What is to happen later: retries and deadlines. Any thread may add to it.

    What an action raises ends it, and is kept in `fault` for the calling thread, which polls.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self) -> None:
        super().__init__(name="pipeloom-timer", daemon=True)
        self._schedule = scheduler(self.clock)  # which has a lock of its own
        self._numbers = count()  # as priorities: before 3.10 cancel() takes events of one time for the same
        self._wakes_at = 0.0
        self.bell = _Bell()  # has it look at the clock, and whether it is over
        self.is_over = False
        self.fault: BaseException | None = None

    def after(self, delay: float, action: Callable[[], object]) -> Any:
        """Have an action called in this thread; returns what call_off() takes."""
        event = self._schedule.enter(delay, next(self._numbers), action)
        if event.time < self._wakes_at:
            self.bell.ring()
        return event

    def call_off(self, event: Any) -> None:
        with suppress(ValueError):  # it is happening
            self._schedule.cancel(event)

    def step(self) -> float:
        """Do what is due; returns the seconds until the next."""
        self._wakes_at = float("inf")  # first: what is added from here on rings
        left = min(self._schedule.run(blocking=False) or threading.TIMEOUT_MAX, threading.TIMEOUT_MAX)
        self._wakes_at = self.clock() + left
        return left

    def run(self) -> None:
        try:
            while not self.is_over:
                self.bell.wait(self.step())
        except BaseException as error:  # nobody else would say why tasks never end
            self.fault = error


class _TaskThread(threading.Thread):
    """One in which functions of tasks run: a task that hangs may leave it behind."""


class _EventLoop(_TaskThread):
    """The event loop that all `async def` tasks of a run share, in this thread of its own.

    submit() is for the workers; `_lock` is for two who come first at once. close() is the calling thread's.
    """

    def __init__(self) -> None:
        super().__init__(name="pipeloom-loop", daemon=True)
        self._lock, self._ready = threading.Lock(), threading.Event()
        self._is_over = False

    def begin(self) -> None:
        with self._lock:
            if self.ident is None:
                _start(self)
                self._ready.wait(GRACE)

    def submit(self, ctx: _Attempt, coroutine: Any) -> Any:
        """Run a coroutine; returns a concurrent.futures.Future."""
        import asyncio

        self.begin()  # what was not declared as `async def` may return a coroutine, too
        return asyncio.run_coroutine_threadsafe(_guarded(ctx, coroutine), self._loop)

    def run(self) -> None:
        import asyncio

        self._loop = asyncio.new_event_loop()
        self._ready.set()
        with closing(self._loop):
            while not self._is_over:
                with suppress(SystemExit, KeyboardInterrupt, MemoryError):  # of what coroutines start
                    self._loop.run_forever()  # until stop(), which these may call, too

    async def _end(self) -> None:
        import asyncio

        try:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)
            await self._loop.shutdown_asyncgens()
            if sys.version_info >= (3, 9):
                await self._loop.shutdown_default_executor()
        finally:
            self._is_over = True
            self._loop.stop()

    def close(self) -> None:
        """Have it end. A task that blocks it is left behind."""
        if self._ready.is_set():
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end()))


async def _guarded(ctx: _Attempt, coroutine: Any) -> tuple[object, BaseException | None]:
    """A SystemExit would end the loop, which is not this task's alone; asyncio logs what nobody waits for."""
    from asyncio import CancelledError

    ctx.enter()
    try:
        return await coroutine, None
    except CancelledError:
        raise
    except BaseException as error:
        return None, error


class _ToldError(Exception):
    """A task failed elsewhere, as in a process of executor=; its arguments are what _told() said there."""

    def __str__(self) -> str:
        return str(self.args[0])


def _call_there(call: Any, function: Any, *made_of: Any) -> tuple[list[Any], str | None, Any]:
    """In a process of executor=: call a task's function with a context that only gathers.

    Returns the messages that it sent, its result, and what it raised, in words: not each exception travels.
    """
    pid, ctx = os.getpid(), TaskContext(*made_of)
    try:
        with suppress(ValueError):  # it is no main thread, which alone may do so
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the run, which lets this task finish
        ctx.enter()
        try:
            value = call(function, ctx)
        finally:
            if os.getpid() != pid:
                _end_child()
        return ctx.held, _result_text(value), None
    except BaseException as error:
        stops = isinstance(error, TaskCancelled)
        raised = TaskCancelled(_words(error)) if stops else _ToldError(*_told(error))
        return ctx.held if ctx.closed else [], None, raised  # closed by its own word, which counts


def _call_of(ctx: _Attempt) -> tuple[Any, ...]:
    """What is called there for an attempt, by _call_there()."""
    declared, terms = ctx.stage.declared, ctx.stage.terms._replace(executor=None)
    return declared.call, declared.function, terms, ctx.task, ctx.task_id, ctx.name, ctx.attempt


def _raise(error: BaseException, *_: object) -> NoReturn:
    raise error


def _received(done: Any, ctx: _Attempt) -> object:
    """What the function has returned there, or raised; its rows are with `ctx` then."""
    from pickle import loads

    messages, value, raised = loads(done) if ctx.stage.terms.packs else done
    for message in messages:
        ctx.deliver(message) if type(message) in (_Sent, _Statement) else ctx.put(message)
    if raised is not None:
        raise raised
    return value


def _packed(call: tuple[Any, ...]) -> bytes:
    """A call in bytes. One that cannot be sent fails there, in its turn, as others may travel with it."""
    from pickle import dumps

    try:
        return dumps((_call_there, *call))
    except BaseException as error:
        refused = UsageError(f"its item cannot be sent to another process: {_describe(error)}")
        return dumps((_raise, refused))


def _call_packed(packed: bytes) -> bytes:
    """Call what _packed() has made. The library's pool breaks if a process gets what it cannot unpickle."""
    from pickle import dumps, loads

    try:
        function, *arguments = loads(packed)
        done = function(*arguments)
    except BaseException as error:
        done = [], None, _ToldError(*_told(error))
    try:
        return dumps(done)
    except BaseException as error:
        refused = MessageRefused(f"a row or message cannot be sent to another process: {_describe(error)}")
        return dumps(([], None, _ToldError(*_told(refused))))


def _call_in_turn(calls: list[bytes]) -> tuple[list[bytes], bool]:
    """Call what _packed() has made, until QUICK seconds are over: of those behind a long one none waits for
    another. Returns the results of those called, and whether that was all of them and in time.
    """
    results: list[bytes] = []
    until = time.monotonic() + QUICK
    for call in calls:
        results.append(_call_packed(call))
        if time.monotonic() >= until:
            return results, False
    return results, True


class _Worker(_TaskThread):
    """A worker: takes ready attempts, calls their functions and tells how that ended.

    It has the name of the task that it runs.
    """

    def __init__(self, run: _Run, crew: _Crew) -> None:
        super().__init__(name="pipeloom-worker", daemon=True)
        self._run, self._crew = run, crew
        self._together = 1  # so many tasks it may send to a process at once now
        self._next: _Attempt | None = None  # it has taken this one already

    def run(self) -> None:
        run, crew = self._run, self._crew
        mine: list[Any] = []  # attempts that it has taken together
        while True:
            ctx = None
            try:
                mine.clear()
                if crew.ready.qsize() in (0, crew.half):
                    run.wake.ring()
                    self.name = "pipeloom-worker"
                # get() is ended by whoever submits or, however the run ends, by dismiss()
                ctx, self._next = self._next or crew.ready.get(), None
                if ctx is None:
                    return crew.ready.put(None)  # for the next one
                self.name = ctx.name
                if ctx.stage.terms.groups:
                    mine += [ctx] * self._together  # places: what is then taken needs no memory to be kept
                    self._take_more(mine)
                    self._attempt_together([ctx for ctx in mine if ctx.begin()])  # which each does once
                elif ctx.begin():
                    self._attempt(ctx, self._call if ctx.stage.terms.timeout is None else self._call_in_time)
            except WriterFailed:
                return None
            except BaseException:  # no memory, most likely, and this takes none: the calling thread says so
                while mine:
                    mine.pop().lost = True
                if ctx is not None:
                    ctx.lost = crew.has_lost = True  # the last, as who looks for them forgets this first
            if ctx is not None and ctx.abandoned:
                return None

    def _take_more(self, mine: list[Any]) -> None:
        """Put what else is ready in the places after the first: this worker's share of it. Not where that has
        come back, as it may take long, nor while another stage has tasks, which would be taken as well.
        """
        ready, stage = self._crew.ready, mine[0].stage
        alone = mine[0].started_at is None or len(self._crew.live) > stage.submitted - stage.settled
        for place in range(1, 1 if alone else min(len(mine), ready.qsize() // self._crew.size)):
            try:
                other = ready.get_nowait()
            except queue.Empty:
                break
            if other is None:
                ready.put(None)
                break
            if other.started_at is None or other.stage is not stage:
                self._next = other
                break
            mine[place] = other
        self._run.wake.ring()

    def _attempt_together(self, begun: list[_Attempt]) -> None:
        """Send them to a process at once. What fails for all is the failure of each."""
        if not begun:
            return
        try:
            packed = [_packed(_call_of(ctx)) for ctx in begun]
            results, quick = self._send(begun[0], _call_in_turn, packed)
            calls: list[Any] = [partial(_received, result) for result in results]
        except BaseException as error:
            calls, quick = [partial(_raise, error)] * len(begun), False
        self._together = min(2 * self._together, TOGETHER) if quick else 1
        for ctx, call in zip(begun, calls):
            self._attempt(ctx, call)
        for ctx in begun[len(calls) :]:  # not called
            ctx.put_back()
            self._crew.ready.put(ctx)

    def _attempt(self, ctx: _Attempt, call: Callable[[_Attempt], object]) -> None:
        ctx.trouble = _NO_TROUBLE  # it may have that of the attempt before
        try:
            value = call(ctx)
            end = DONE, _now(), _result_text(value), ""
            if not ctx.closed:  # by the worker's own word
                ctx.finish(end)
        except TaskCancelled as stop:
            ctx.finish((CANCELLED, _now(), None, _words(stop)))
        except BaseException as error:  # SystemExit too: a task's end is not the program's
            if error is self._run.channel.failure:  # and not that of another run, which this task has made
                raise
            self._fail(ctx, error)

    def _call(self, ctx: _Attempt) -> object:
        declared, terms = ctx.stage.declared, ctx.stage.terms
        if terms.executor is not None:
            call = _call_of(ctx)
            sent = (_call_packed, _packed(call)) if terms.packs else (_call_there, *call)
            return _received(self._send(ctx, *sent), ctx)
        try:
            value = declared.call(declared.function, ctx)
        finally:
            if threading.main_thread() is self:  # since a fork; getpid() is a system call
                _end_child()
        if type(value) is CoroutineType:
            value, error = _awaited(ctx, self._crew.loop.submit(ctx, value))
            if error is not None:
                raise error
        return value

    def _send(self, ctx: _Attempt, *call: Any) -> Any:
        """Have the executor call something; returns what that returns."""
        try:
            future = ctx.stage.terms.executor.submit(*call)
        except RuntimeError as error:  # it is shut down, or broken for good
            told = f"the executor takes no more tasks: {error}"
            self._run.stop(f"not started: {told}")
            raise _ToldError(told, None, told) from None
        return _awaited(ctx, future)

    def _call_in_time(self, ctx: _Attempt) -> object:
        ctx.thread, timer = self, self._crew.timer
        deadline = timer.after(ctx.stage.terms.timeout, partial(self._crew.time_out, ctx))
        try:
            return self._call(ctx)
        finally:
            timer.call_off(deadline)
            ctx.disarm()

    def _fail(self, ctx: _Attempt, error: BaseException) -> None:
        if ctx.closed:
            self._run.display.tell(
                logging.DEBUG if ctx.cancelled else logging.WARNING,  # who was cut off may well complain
                "task %r raised an exception after it had finished, which is ignored: %s",
                ctx.name, str(error) if isinstance(error, _ToldError) else _describe(error),
            )  # fmt: skip
            return
        if isinstance(error, MemoryError):
            error.__traceback__ = None  # whose frames hold what took the memory
        ctx.finish((ERROR, _now(), None, ctx.record(error)))


class _Crew:
    """The workers, and the attempts that are theirs: submitted, and not settled.

    `ready` and `live` need no lock: of both only single operations are used. None dismisses a worker. The
    calling thread submits, the writer's settles, the timer's replaces a worker.
    """

    def __init__(self, run: _Run, size: int) -> None:
        self._run = run
        self.size = size
        self.half = max(32, 2 * size)  # of how many are pulled ahead
        self.ready: queue.SimpleQueue[_Attempt | None] = queue.SimpleQueue()
        self.live: dict[int, _Attempt] = {}  # by task_id
        self.timer = _Timer()
        self.has_lost = False  # an attempt is marked as lost
        self._threads: set[threading.Thread] = set()
        self.loop = _EventLoop()

    def start(self) -> None:
        stages = self._run.graph.stages
        if any(stage.terms.retries or stage.terms.timeout for stage in stages):
            _start(self.timer)
        if any(iscoroutinefunction(stage.declared.function) for stage in stages):
            self.loop.begin()  # while there is a thread left for it
        for number in range(self.size):
            try:
                self._start_one()
            except PipeloomError:
                if not number:
                    raise
                told = "only %d of %d workers started: the system allows no more threads (ulimit -u)"
                self._run.display.tell(logging.WARNING, told, number, self.size)
                break

    def _start_one(self) -> None:
        thread = _Worker(self._run, self)
        self._threads.add(thread)  # first: a stray exception may come
        _start(thread)  # else it is one that does not live, as any that has ended

    def free(self) -> int:
        """How many more may be submitted now; none, or less, if it is full."""
        return min(2 * self.half - self.ready.qsize(), max(LIVE, 2 * self.size) - len(self.live))

    def submit(self, ctx: _Attempt, doomed: str) -> None:
        self.live[ctx.task_id] = ctx  # first: from here on somebody ends it
        if doomed:
            ctx.cancel_unstarted(doomed)
        else:
            self.ready.put(ctx)

    def retry(self, ctx: _Attempt, message: str) -> None:
        """Have a task that failed tried again."""
        again = _Attempt(self._run, ctx.stage, ctx.task, ctx.task_id, ctx.name, ctx.attempt + 1)
        again.trouble = ctx.trouble._replace(cause=message)
        self.live[ctx.task_id] = again
        delay = _delay(ctx.stage.terms.retry_delay, ctx.attempt)
        self.timer.after(delay, partial(self.ready.put, again))
        self._run.display.tell(logging.INFO, "task %r: %s; retrying in %.1f s", ctx.name, message, delay)

    def leave(self, reason: str) -> None:
        """Cut off what runs, and tell it so: its threads are left to themselves."""
        for ctx in list(self.live.values()):
            ctx.cancel(reason)
            ctx.abandoned = True
            ctx.cut_off(CANCELLED, reason)

    def check(self) -> None:
        """What the workers and the timer could not say themselves; raises if nobody is left."""
        if self.timer.fault is not None:
            raise self.timer.fault
        if self.has_lost:
            self.has_lost = False
            for ctx in list(self.live.values()):
                if ctx.lost:
                    ctx.cut_off(ERROR, "out of memory; the exception could not be recorded")
        if self.live and not self._run.stopping and not any(map(_Worker.is_alive, tuple(self._threads))):
            raise PipeloomError("no worker is left, and the system allows no new threads; use fewer workers")

    def dismiss(self) -> None:
        """All end. Where the run did not get to its end, what still runs has GRACE to notice that; a task
        that hangs is left behind.
        """
        reason = self._run.stopping or "the run ended"
        for ctx in list(self.live.values()):
            ctx.cancel_unstarted(reason)
            ctx.cancel(reason)
        self.timer.is_over = True
        self.timer.bell.ring()
        self.ready.put(None)
        began = time.monotonic()
        for thread in (*self._threads, self.timer, self.loop):
            if thread is self.loop:
                self.loop.close()  # as no worker cancels a coroutine any more
            while thread.is_alive() and time.monotonic() - began < self._patience():
                thread.join(POLL)
        self.leave(reason)

    def _patience(self) -> float:
        return 0.5 if self._run.signals.urgency() > 1 else GRACE

    def time_out(self, ctx: _Attempt) -> None:
        """End an attempt whose thread cannot be ended: another takes its place. For the timer's thread."""
        text = f"timed out after {ctx.stage.terms.timeout:g} s"
        with ctx.lock:
            thread = ctx.thread
            if thread is None:
                return  # the function has just returned
            ctx.abandoned = True
        if ctx.closed:  # it has told its end, or its rows were refused, and goes on all the same
            self._run.display.tell(
                logging.WARNING, "task %r has ended, but its function is still running: it %s", ctx.name, text
            )
        else:
            stack, place = _stack_of(thread)
            ctx.trouble = _Trouble(TimeoutError(text), stack, f"{text} at {place}" if place else text)
        try:
            self._start_one()
        except PipeloomError:
            told = "cannot start a worker to replace the one that task %r blocks; %d workers are left"
            left = sum(map(_Worker.is_alive, tuple(self._threads))) - 1
            self._run.display.tell(logging.WARNING, told, ctx.name, left)
        self._threads.discard(thread)  # nobody waits for it; not sooner, as then none might seem to be left
        ctx.cut_off(ERROR, text)
        ctx.cancel(text)


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        if error.__context__ is not None:  # a stray exception's doing
            raise
        raise PipeloomError(
            f"cannot start a thread for the {thread.name.partition('-')[2]}: {error}"
            "; raise the limit (ulimit -u) or close other programs"
        ) from error


def _awaited(ctx: _Attempt, future: Any) -> Any:
    """The result of a future; what cancels the task cancels that, too, unless it runs already."""
    bell = _Bell()
    ctx.wakes.append(bell.ring)
    future.add_done_callback(lambda _: bell.ring())
    if not ctx.cancelled:
        bell.wait(threading.TIMEOUT_MAX)
    if not future.done():
        if not future.cancel():
            LEFT_BEHIND[future] = ctx.stage.terms.executor
            future.add_done_callback(LEFT_BEHIND.pop)
        ctx.check()
    return future.result()


LEFT_BEHIND: dict[Any, Any] = {}  # futures of tasks that were cut off and still run, and their executors


def _stack_of(thread: threading.Thread) -> tuple[str, str]:
    """Where a task's thread is just now, and the innermost line there that is the user's."""
    try:
        stack = traceback.extract_stack(sys._current_frames()[thread.ident])  # type: ignore[index]
        lines = traceback.format_list([frame for frame in stack if not frame.filename.startswith(ENGINE)])
        told = "its thread was here:\n" if lines else "it waited for a coroutine, or for an executor\n"
        return _text(told + "".join(lines)), _place_in(stack)
    except Exception as error:  # its source cannot be read, or the thread has just ended
        return f"its thread cannot be shown: {_describe(error)}", ""


def _end_child() -> NoReturn:
    """A process that a task forked has come back from the task's function: it is no worker, and ends."""
    error = sys.exc_info()[1]
    code = getattr(error, "code", 1) if error else 0
    if error and not isinstance(error, SystemExit):
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # one on Windows


class _Interrupted(KeyboardInterrupt):
    """Raised by the signal handler inside the user's iterator, to end a pull that blocks."""


class _Signals:
    """SIGINT, SIGTERM and SIGHUP, which urge a run to its end.

    The handler runs inside the calling thread and only notes what came and when; that thread polls urgency(),
    and so does the writer while it waits for a lock or a disk.
    """

    def __init__(self, stop: Callable[[str], None]) -> None:
        self._stop = stop
        self._came: list[tuple[int, float]] = []
        self._previous: dict[int, Any] = {}
        self.pulling = False  # the calling thread is inside the user's iterator, which a signal ends
        self._nudged = False  # by another thread, and not by the user
        self._lock = threading.Lock()  # held while it is, so that no nudge comes once the handlers are back
        self._pid = os.getpid()

    def install(self) -> None:
        """Take the signals, where this thread may: not what nohup, or C code, has set."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, *ENDING):
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN):
                self._previous[number] = previous  # first: a stray exception may come
                with suppress(ValueError):  # in a subinterpreter, as mod_wsgi's
                    signal.signal(number, self._on_signal)
        if self._previous and hasattr(os, "register_at_fork"):
            _follow_forks()

    def restore(self) -> None:
        with self._lock:
            for number, handler in self._previous.items():
                with suppress(ValueError):
                    signal.signal(number, handler)

    def urgency(self) -> int:
        """0 none; 1 nothing new starts; 2 leave what runs; 3 wait for no lock and no disk, either."""
        if not self._came:
            return 0
        now, (number, first) = time.monotonic(), self._came[0]
        leave = first + GRACE if number != signal.SIGINT else now + 1
        if len(self._came) > 1:
            leave = self._came[1][1]
        if now < leave:
            return 1
        return 3 if len(self._came) > 2 or now > leave + 2 else 2

    def name(self) -> str:
        return signal.Signals(self._came[-1][0]).name

    def deliver(self) -> NoReturn:
        """Hand the signal to those who handled it before; a caller never sees a normal return."""
        signal.raise_signal(self._came[0][0])
        raise KeyboardInterrupt

    def nudge(self) -> None:
        """End a pull that blocks: for other threads than the calling one, where the system has a way."""
        takes = signal.SIGINT in self._previous and hasattr(signal, "pthread_kill")
        if self.pulling and takes and threading.current_thread() is not threading.main_thread():
            with suppress(RuntimeError):  # there is no thread left
                threading.Thread(target=self._nudge, name="pipeloom-nudge", daemon=True).start()

    def _nudge(self) -> None:
        while self.pulling:  # again and again: a signal just before a system call that blocks goes unnoticed
            with self._lock:
                self._nudged = self.pulling
                if self._nudged:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(POLL)

    def _on_signal(self, number: int, _: Any) -> None:
        if os.getpid() != self._pid:  # a forked child, of a pool perhaps: Ctrl-C is its parent's business
            return
        if self._nudged:
            self._nudged = False
            if self.pulling:
                raise _Interrupted
            return
        self._came.append((number, time.monotonic()))
        self._stop("interrupted")
        if len(self._came) > 2:
            signal.signal(number, signal.SIG_DFL)  # should all that be in vain, the next one ends the process
        if self.pulling:
            raise _Interrupted


@lru_cache(None)
def _follow_forks() -> None:
    """Have forked children end by SIGTERM and SIGHUP as if these had no handlers.

    Meanwhile signals wait: what comes before the child can heed it, from a pool that breaks perhaps, is lost.
    """
    held: dict[int, Any] = {}  # the masks of the threads that are forking

    def hold() -> None:
        held[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def release() -> None:
        if get_ident() in held:  # else this was registered while it forked
            signal.pthread_sigmask(signal.SIG_SETMASK, held.pop(get_ident()))

    def release_child() -> None:
        for number in ENDING:
            if isinstance(getattr(signal.getsignal(number), "__self__", None), _Signals):
                signal.signal(number, signal.SIG_DFL)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_child)


class _Tally:
    """What the RunResult will say. The graph's lock guards it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.counts = dict.fromkeys((*FINAL, "skipped"), 0)
        self.failures: list[Failure] = []
        self.causes: dict[str, int] = {}
        self._kinds: dict[str, list[Any]] = {}  # of messages, by their cause
        self.first_error: BaseException | None = None  # that a worker let escape
        self.failure: BaseException | None = None  # that ended the run

    def failed(self, ctx: _Attempt, message: str) -> int:
        """Count a failure; returns how many of its cause there are.

        What a line raises may have several causes: their messages differ in more than names and numbers.
        """
        cause = ctx.trouble.cause or message
        kind = re.findall(r"(?<!\S)[A-Za-z]+(?=[,;:.]?(?!\S))", message)
        kinds = self._kinds.setdefault(cause, [])
        if kind not in kinds and len(kinds) < 3:  # more are rather one message with odd names
            kinds.append(kind)
        if kind in kinds[1:]:
            cause = f"{cause}: {_cut(message, 100)}"
        if cause not in self.causes and len(self.causes) >= FAILURES_KEPT:
            cause = "other causes"
        if len(self.failures) < FAILURES_KEPT or cause not in self.causes:
            self.failures.append(Failure(ctx.name, message, ctx.trouble.traceback, cause))
        self.causes[cause] = self.causes.get(cause, 0) + 1
        self.first_error = self.first_error or ctx.trouble.error
        return self.causes[cause]


class _Intake:
    """Where tasks come from: pulls them from the users' iterables, and says which of them run.

    For the calling thread; _begin(), with the graph's lock held, is for the writer's, too.
    """

    def __init__(self, run: _Run, roster: _Roster) -> None:
        self._run, self._crew, self._graph, self._roster = run, run.crew, run.graph, roster
        self.sources: deque[_Stage] = deque()  # stages whose items may be pulled
        self._filled = False  # there was no more room when pulling ended last
        self._unseen = set(run.options["redo"])  # of its names, those of no task so far
        for stage in self._graph.stages:
            if stage.declared.call is _call_alone:  # one task, of the stage's own name
                stage.known = roster.find(None, stage.name)
            if stage.standing.followers:
                stage.standing.newest = roster.newest(stage.declared)
        self._graph.begin = self._begin

    def pull(self) -> None:
        """Submit tasks of the next stage while there is room."""
        if self._filled and not self._crew.ready.qsize():  # so short that a larger stock saves much waking up
            self._crew.half = min(2 * self._crew.half, 512)
        with self._graph.lock:
            stage = min(self.sources, key=lambda stage: stage.size is None)  # what is known cannot block
        try:
            self._pull_from(stage)
        except _Interrupted:
            return
        except (UsageError, UsageTypeError, MessageRefused, WriterFailed) as error:  # of ours, about a task
            self._run.fail(error)
        except BaseException as error:
            what = f"each= of {stage.name!r} raised " if stage.name else "the iterable of tasks raised "
            self._run.display.tell(logging.ERROR, "%s%s; no new tasks will start", what, _describe(error))
            self._run.fail(error, what)
        self._filled = self._crew.free() <= 0

    def _pull_from(self, stage: _Stage) -> None:
        declared, items, signals = stage.declared, stage.items, self._run.signals
        for _ in range(self._crew.free()):
            signals.pulling = True  # what a signal then raises ends _open() or next() only
            try:
                if self._run.stopping:  # now, as stop() looks at `pulling` after it has said so
                    return None
                if items is None:  # and not `if not items`: an iterator may have a length, 0 at its end
                    items = self._open(stage)
                item = next(items, _END)
            finally:
                signals.pulling = False
            if item is _END:
                return self._exhaust(stage)
            stage.pulled += 1
            named = (None, stage.name) if stage.standing.doomed else declared.identify(item, stage.pulled)
            self._admit(stage, item, named[1], *self._roster.find(*named))
        self.sources.remove(stage)
        self.sources.append(stage)  # each in its turn
        return None

    def _open(self, stage: _Stage) -> Iterator[Any]:
        if stage.standing.doomed:  # nobody can say what its items would have been: one row is for them all
            stage.size, stage.items = 1, iter([None])
            return stage.items
        if self._roster.old > NEVER and stage.name:  # an earlier run may have stored that row
            self._run.channel.push(None, MsgExecute(FORGET, (stage.name,)))
        items = stage.declared.items()
        stage.size = len(items) if isinstance(items, Sequence) else None
        stage.items = iter(items)
        self._run.note_total()
        return stage.items

    def _exhaust(self, stage: _Stage) -> None:
        self.sources.remove(stage)
        stage.size = stage.pulled
        self._run.note_total()
        if not stage.pulled and stage.name:
            self._run.display.tell(
                logging.WARNING,
                "each= of task %r gave no item, so it has nothing to do; check it, if that is a surprise",
                stage.name,
            )
        if stage.declared.counted and self._run.options["resume"]:
            self._run.display.tell(
                logging.WARNING,
                "%s have no names and are known by their position: with resume, a new one may be taken for "
                "one that is done; give them names",
                f"items of task {stage.name!r}" if stage.name else "tasks",
            )
        with self._graph.lock:
            stage.exhausted = True
            self._graph.stirred(stage)

    def _begin(self, stage: _Stage) -> None:
        """Nothing is before this stage any more. With the lock held."""
        if self._run.stopping:
            return
        if stage.known is None:
            self.sources.append(stage)
        else:  # at once, as the calling thread may be held up by an iterator
            stage.pulled, stage.exhausted = 1, True
            self._admit(stage, None, stage.name, *stage.known)
        self._run.wake.ring()

    def tell_unseen(self) -> None:
        """Say which of what is to be redone has not come; not of a run that was stopped."""
        for name in self._unseen if not self._run.stopping else ():
            told = "redo=%r: no task of this run has this name"
            self._run.display.tell(logging.WARNING, told, name)

    def _admit(self, stage: _Stage, item: Any, name: str, id: int, done_in: int | None) -> None:
        """A task has come: it runs, unless it is done and nothing that it comes after has run since."""
        here, redo = stage.standing, self._run.options["redo"]
        if self._unseen:
            self._unseen -= {name, stage.name}
        if done_in is None or done_in < here.older or here.doomed or name in redo or stage.name in redo:
            stage.submitted += 1
            self._crew.submit(_Attempt(self._run, stage, item, id, name), here.doomed)
            return
        here.newest = max(here.newest, done_in)
        with self._graph.lock:
            self._run.tally.counts["skipped"] += 1
        self._run.display.know(self._graph.total(), self._run.tally.counts["skipped"])


_END = object()


class _Run:
    """One run, from the first task to the last commit: makes the rooms, pulls tasks, and ends all in order.

    For the calling thread, which waits for `wake`, POLL seconds at most, as it polls for signals besides.
    settle() and ending() are the writer's; stop() may be called in any thread, and by a signal handler.
    """

    intake: _Intake | None = None  # until the database is open

    def __init__(
        self, after: Mapping[_Declared, list[_Declared]], db_path: str, options: Mapping[str, Any]
    ) -> None:
        _check_options("a run", options)
        self.options = o = {**{name: option[0] for name, option in OPTIONS.items()}, **options}
        o["redo"] = list(map(_text, o["redo"]))
        o["resume"] = o["resume"] or bool(o["redo"])
        self.stopping: str | None = None  # why nothing new starts
        self.wake = _Bell()
        self.ends: list[Callable[[], object]] = []  # of what has begun; they may come twice, or find nothing
        self.channel, self.tally = Channel(), _Tally()
        self.signals = _Signals(self.stop)
        self.display = _Display(o["progress"])
        self.writer = SQLiteWriter(db_path, self.channel, run=self, **{key: o[key] for key in WRITER_OPTIONS})
        self.graph = _Graph({declared: _Stage(declared, o, self.writer) for declared in after}, after)
        total, size = self.graph.total(), o["workers"] or os.cpu_count() or 1
        self.crew = _Crew(self, size if total is None else max(1, min(size, total)))  # no more than tasks

    def stop(self, reason: str) -> None:
        self.stopping = self.stopping or reason  # why nothing new starts
        self.wake.ring()
        self.signals.nudge()

    def fail(self, error: BaseException, what: str = "") -> None:
        """This ends the run; the first counts."""
        self.tally.failure = self.tally.failure or error
        self.stop(f"the run ended: {what}{_describe(error)}")

    def execute(self) -> RunResult:
        """Run all tasks. However it ends, what was accepted is stored and the process is as it was."""
        try:
            try:
                self._work()
            except BaseException as error:
                self.fail(error)
            finally:
                self._end()
        finally:  # again, as a stray exception may have come between the two; mostly there is nothing left
            self._end()
        failure, result = self.tally.failure or self.writer.error, self.result()
        if self.signals.urgency():
            if isinstance(failure, PipeloomError):
                logger.error("%s", failure)
            self.signals.deliver()
        if failure is not None:
            raise failure
        if self.options["check"] and self.tally.first_error is not None:
            raise PipelineError(result) from self.tally.first_error
        return result

    def note_total(self) -> None:
        """Perhaps it is known now how many tasks there are."""
        total, run_id = self.graph.total(), self.writer.status.run_id
        self.display.know(total, self.tally.counts["skipped"])
        if run_id is not None:
            self.channel.push(None, MsgExecute(SET_TOTAL, (total, run_id)))

    def result(self) -> RunResult:
        tally, counts = self.tally, dict(self.tally.counts)
        if self.intake is not None:  # what nobody has asked for, and what had no time to settle
            counts[CANCELLED] += max(self.graph.known() - sum(counts.values()), 0)
        return RunResult(
            self.writer.status.run_id, **counts, elapsed=time.monotonic() - tally.began,
            failures=list(tally.failures), causes=dict(tally.causes), database=self.writer.store.path,
        )  # fmt: skip

    def _work(self) -> None:  # each step says first how it will be ended
        shown = self.writer.store.shown
        _check_database(shown, self.options["store_task_status"])
        _check_stages(self.graph.stages, shown, self.options["redo"])
        lock = _RunLock(shown)
        self.ends.append(lock.release)
        self.writer.store.files.update(lock.take(shown))
        self.ends.append(self.signals.restore)
        self.signals.install()
        self.ends.append(lambda: self.display.stop(self.result()))
        _start(self.display.thread)
        self.ends.append(self._end_writer)
        _start(self.writer)
        while not self.writer.opened:  # it opens, or fails, within busy_timeout
            self._check()
            self.wake.wait(POLL)
        if shown == ":memory:":
            self.display.tell(logging.WARNING, "the database is :memory:; nothing will be kept after the run")
        self.display.tell(logging.INFO, "database %r is open; starting %d workers", shown, self.crew.size)
        roster = _Roster(self)
        self.ends.append(roster.close)  # before the writer's last checkpoint, which then leaves no side files
        intake = self.intake = _Intake(self, roster)
        self.writer.status.shows = self.display.start(self.graph.total())
        self.ends.append(self.crew.dismiss)
        with self.graph.lock:
            self.graph.start()
        self.crew.start()
        self._pull_all(intake)
        intake.tell_unseen()

    def _check(self) -> None:
        if self.writer.error is not None and not self.writer.is_alive():  # before, it may not be explained
            raise self.writer.error
        self.crew.check()

    def _pull_all(self, intake: _Intake) -> None:
        """Until all has ended, or something has stopped the run and what was running has ended."""
        heeded = 0
        while True:
            heeded = self._heed(heeded)
            self._check()
            if self.stopping:
                for ctx in list(self.crew.live.values()):
                    ctx.cancel_unstarted(self.stopping)
            elif intake.sources and self.crew.free() > 0:
                intake.pull()
                continue
            with self.graph.lock:  # so that settle() is not half through
                if not self.crew.live and (self.stopping or not intake.sources):
                    return
            self.wake.wait(POLL)

    # The writer's thread

    def settle(self, ended: list[tuple[_Attempt, str, str]]) -> None:
        """These attempts have ended, and that is committed."""
        counts, live = self.tally.counts, self.crew.live
        with self.graph.lock:
            for ctx, status, message in ended:
                if status == QUEUED:
                    self.crew.retry(ctx, message)
                    continue
                stage = ctx.stage
                live.pop(ctx.task_id, None)
                counts[status] += 1
                stage.settled += 1
                if status != DONE:
                    self._note_trouble(ctx, status, message)
            for stage in {ctx.stage: None for ctx, _, _ in ended}:
                if stage.has_ended():
                    self.graph.stirred(stage)
        if self.stopping or not self.crew.ready.qsize():  # else a worker rings in time for more to be pulled
            self.wake.ring()

    def _note_trouble(self, ctx: _Attempt, status: str, message: str) -> None:
        how = "failed" if status == ERROR else "was cancelled"
        standing = ctx.stage.standing
        standing.spoiled = standing.spoiled or f"{ctx.name!r} {how}"
        if status == ERROR:
            number = self.tally.failed(ctx, message)
            line = re.search(r" at (\S+:\d+), in \S+$", ctx.trouble.cause)
            self.display.failed(ctx.name, message, line[1] if line else "", number)
            if self.options["fail_fast"]:
                self.stop(f"not started: fail_fast, and {ctx.name!r} failed")

    def ending(self) -> tuple[str, str, Sequence[int], bool]:
        """What the writer notes last: the run's status, why tasks may have no end, the counts, CUT_SHORT."""
        result, is_fine = self.result(), not self.stopping and not self.tally.counts[ERROR]
        status = CANCELLED if self.signals.urgency() else DONE if is_fine else ERROR
        counts = result.done, result.error, result.cancelled, result.skipped
        return status, self.stopping or "", counts, self.graph.is_cut_short() and not self.options["resume"]

    # The end

    def _end(self) -> None:
        """End what has begun, the last first. A step that a stray exception has cut short is taken again."""
        failure, tries = None, 0
        while self.ends and tries < 100:  # no more, if they never cease
            try:
                while self.ends:
                    self.ends[-1]()
                    self.ends.pop()
            except BaseException as error:  # of no memory, perhaps
                failure, tries = error, tries + 1
        if failure is not None:
            self.fail(failure)

    def _heed(self, heeded: int) -> int:
        """Do what has become urgent since; returns how urgent it is."""
        urgency = self.signals.urgency()
        if urgency > heeded == 0:
            running = sum(bool(ctx.started_at) and not ctx.closed for ctx in list(self.crew.live.values()))
            what = f"; {running} running task{'s' * (running != 1)} will finish first" * (running > 0)
            self.display.tell(
                logging.WARNING, "%s: no new tasks will start%s (again: leave now)", self.signals.name(), what
            )
        if urgency > 1:
            self.crew.leave("interrupted")
        return urgency

    def _end_writer(self) -> None:
        self.channel.close()
        while self.writer.is_alive():
            threading.Thread.join(self.writer, POLL)  # bounded: it waits for no lock longer than busy_timeout
            self._heed(1)


def _check_stages(stages: Sequence[_Stage], path: str, redo: Iterable[str]) -> None:
    """Find out before anything is started whether these names are tasks', and whether functions travel."""
    _check_redo(path, redo, [stage.name for stage in stages])
    for stage in stages:
        if stage.terms.executor is None:
            continue
        from pickle import dumps

        function, why = stage.declared.function, ""
        if iscoroutinefunction(function):
            why = "is an async def, which needs the event loop of this process;"
        elif not stage.terms.atomic:
            why = "has atomic=False, which streams rows in this process;"
        elif stage.terms.packs:  # others may have their own ways
            try:
                dumps(function)
            except Exception as error:
                why = (
                    f"cannot be sent to another process: {_describe(error)}"
                    "; define it with def at the top of a module, or"
                )
        if why:
            what = f"task {stage.name!r}" if stage.name else "worker_fn"
            raise UsageError(f"{what} {why} run it on threads, as with @pipe.task(executor=None)")


def _check_redo(path: str, redo: Iterable[str], known: list[str]) -> None:
    if not redo:
        return
    stored: list[str] = []
    with suppress(sqlite3.Error), _connect_readonly(path) as conn:  # where no run has been, there is none
        stored = [name for (name,) in conn.execute("SELECT name FROM task_runs LIMIT 10")]
        known = [*known, *(name for name in redo if conn.execute(FIND_RESULT, (name,)).fetchone())]
    for name in redo:
        if name not in known:
            there = ", ".join(map(_clean, filter(None, dict.fromkeys([*known, *stored]))))
            there = f"there are {there}, perhaps among others" if there else "none has run yet"
            raise UsageError(f"redo={name!r}: no task has this name; {there}")


def _delay(first: float, attempt: int) -> float:
    """Seconds before the next attempt: twice as long each time, up to an hour, and a little random."""
    from random import uniform

    return min(first * 2.0 ** min(attempt - 1, 100), max(first, LONGEST_DELAY)) * uniform(1, 1.25)


def run_pipeline(
    tasks: Any, db_path: Any = "./pipeloom.db", *, worker_fn: Any = None, **options: Unpack[RunOptions]
) -> RunResult:
    """Run `worker_fn(task, context)` for every task, on threads, and store all of it in one SQLite file.

    Blocks until everything is committed. `tasks` is any iterable of any objects, pulled in this thread as
    workers become free; (db_path, tasks) is understood as well. The options, and what they are if left out:

    workers=None             how many tasks run at once; None is one per CPU, and no more than tasks
    executor=None            where the functions run: a ProcessPoolExecutor, or any other Executor
    schema=None              an SQL script, run when the database is opened
    handlers=None            {message class: function(connection, message)}, run in the writer
    progress="auto"          or "rich", "ansi", "log", "none", or an object with the methods of Progress
    check=True               raise PipelineError if a worker raised; False returns the result instead
    fail_fast=False          the first failure cancels what has not started
    store_task_status=True   keep the tables task_runs and pipeline_runs
    wal=True                 False for file systems where WAL does not work
    redo=()                  names of tasks that run again although they are done, as with resume=True
    resume=False             True skips what an earlier run has done, known by its task_id or else its name
    retries=0                how many times a failed task is retried
    retry_delay=1.0          seconds before the first retry, then twice as long each time, up to an hour
    timeout=None             seconds that one attempt may take
    busy_timeout=300.0       seconds to wait for another process's lock on the database
    durable=False            True makes each commit survive a power loss too
    atomic=True              False stores rows as they come, done or not, for loads that do not fit in memory

    Raises UsageError or UsageTypeError before anything is written, WriterFailed if the database fails
    during the run, PipelineError, and whatever the iterable raises, after the running tasks have finished.
    After Ctrl-C it raises KeyboardInterrupt, never returns.
    """
    if _is_path(tasks) and not _is_path(db_path):
        tasks, db_path = db_path, tasks
    if _is_path(tasks) or not hasattr(tasks, "__iter__"):
        raise UsageTypeError(
            f"tasks={tasks!r}: expected an iterable of tasks, as in run_pipeline([1, 2], 'jobs.db')"
        )
    if not callable(worker_fn):
        raise UsageTypeError(
            f"worker_fn={worker_fn!r}: expected a function(task, context) that does one task"
        )
    _check_function("worker_fn", worker_fn, "task", "context")
    declared = _Declared("", worker_fn, _call_with_task, tasks)
    _check_ids(declared)
    return _run({declared: []}, _path_of(db_path, "run_pipeline(tasks, 'jobs.db')"), options)


def _run(after: dict[_Declared, list[_Declared]], path: str, options: Mapping[str, Any]) -> RunResult:
    inner = isinstance(threading.current_thread(), _TaskThread)  # of a task, which chooses for itself
    if _Session.current is not None and not inner:  # the command line's, whose options win
        return _Session.current.run(after, path, options)
    return _Run(after, path, options).execute()


def _check_function(what: str, function: Any, /, *arguments: str, **named: Any) -> None:
    """Find out before anything is started that a function can be called so."""
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise UsageTypeError(
            f"{what} is a generator function, so its body would never run; remove its yield"
        )
    try:
        signature(function).bind(*arguments, **named)
    except TypeError as error:
        given, hint = ", ".join([*arguments, *named]), "" if arguments else "; pass --arg KEY=VALUE"
        raise UsageTypeError(f"{what} cannot be called with ({given}): {error}{hint}") from None
    except ValueError:  # a builtin that does not tell its parameters
        return


def _is_path(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def _path_of(value: Any, example: str) -> str:
    if not _is_path(value):
        raise UsageTypeError(f"db_path={value!r}: expected a path, as in {example}")
    return os.fsdecode(value)


def _check_ids(declared: _Declared) -> None:
    """Find bad and double ids of known tasks before anything is written; the others' ids are above them."""
    seen: dict[int, Any] = {}
    known = isinstance(declared.source, Sequence) and not isinstance(declared.source, range)
    for given, name in map(_identify, declared.source if known else ()):
        if given is None:
            continue
        id = _task_id(given)
        if id in seen:
            raise UsageError(f"task_id {id} is that of tasks {seen[id]!r} and {name!r}; give each its own")
        seen[id] = name
    declared.by_name = not known or len(seen) < len(declared.source)
    if not declared.by_name:  # no name is looked for
        seen = {max(seen): None} if seen else {}
    declared.ids = seen


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
    retry_delay, timeout, atomic, executor) over both.
    """

    def __init__(self, db_path: Any = "./pipeloom.db", **options: Unpack[RunOptions]) -> None:
        _check_options("Pipeline", options)
        self.db_path = _path_of(db_path, "Pipeline('jobs.db')")
        self._options = options
        self._declared: dict[str, _Declared] = {}
        self._handlers: dict[type, Handler] = {}

    if TYPE_CHECKING:

        @overload
        def task(
            self, function: Function, *, each: Any = None, name: Any = None, after: Any = (),
            even_if_failed: bool = False, **options: Unpack[TaskOptions],
        ) -> Function: ...  # fmt: skip

        @overload
        def task(
            self, *, each: Any = None, name: Any = None, after: Any = (),
            even_if_failed: bool = False, **options: Unpack[TaskOptions],
        ) -> Callable[[Function], Function]: ...  # fmt: skip

    def task(
        self, function: Any = None, *, each: Any = None, name: Any = None, after: Any = (),
        even_if_failed: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """Declare a function as a task, or as one for each item; a decorator, which returns the function.

        each     an iterable of items, or a function that makes one when the task's turn comes; it is pulled
                 as workers become free, in the thread that runs the pipeline. The function is then called
                 as function(ctx, item), without `each` as function(ctx).
        name     a function of the item that makes the task's name, instead of "load[item]"; or a str
                 instead of the function's name. It is by their names that tasks are known in later runs.
        after    a function of this pipeline or its name, or several: it starts when all their tasks are
                 committed as done, and is cancelled if one is not. With resume, what is done is done again if
                 something that it comes after has run since.
        even_if_failed    it starts when all that it comes after has ended, however that ended.

        The options are retries, retry_delay, timeout, atomic and executor. What the function returns is
        the result.
        """
        if function is None:
            return partial(
                self.task, each=each, name=name, after=after, even_if_failed=even_if_failed, **options
            )
        declared = _declared(function, each, name)
        before = self._declared.get(declared.name)
        if before is not None and not _is_again(before.function, function):
            raise UsageError(
                f"two tasks are named {declared.name!r}"
                "; give one of them another name, as with name="
            )
        _check_options("a task", options, STAGE_OPTIONS)
        declared.options, declared.even_if_failed = options, even_if_failed
        declared.after = list(after) if isinstance(after, (list, tuple, set, frozenset)) else [after]
        self._declared[declared.name] = declared
        return function

    def handles(self, kind: type) -> Callable[[Handles], Handles]:
        """Declare a function(connection, message) as the handler of a message class; a decorator."""
        if not isinstance(kind, type):
            raise UsageTypeError(f"handles({kind!r}): expected a message class, as in @pipe.handles(Message)")

        def declare(handler: Handles) -> Handles:
            self._handlers[kind] = handler
            return handler

        return declare

    def run(self, db_path: Any = None, **options: Unpack[RunOptions]) -> RunResult:
        """Run all tasks; blocks, takes the options of run_pipeline and raises what that raises.

        `db_path` is another database for this run.
        """
        options = {**self._options, **options}
        options["handlers"] = {**(options.get("handlers") or {}), **self._handlers}
        return _run(
            self._graph(),
            _path_of(self.db_path if db_path is None else db_path, "pipe.run('jobs.db')"),
            options,
        )

    def main(self, argv: list[str] | None = None) -> NoReturn:
        """Run with the options of the command line's `run`, print a summary and exit with its code."""
        if sys._getframe(1).f_globals.get("__name__") == "__mp_main__":  # a process of --processes imports it
            return  # type: ignore[misc]
        if _Session.importing:
            raise UsageError(
                "pipe.main() was called while the file was being imported; "
                "put it under `if __name__ == '__main__':`"
            )
        if _Session.current is not None:  # `pipeloom run` has called the function that called this
            self.run()
            sys.exit()  # with the code of that session
        _end_program(lambda: _execute(_pipeline_parser(self), argv))

    def _graph(self) -> dict[_Declared, list[_Declared]]:
        """What each declaration comes after."""
        if not self._declared:
            raise UsageError("the pipeline has no task; declare one with @pipe.task")
        after: dict[_Declared, list[_Declared]] = {}
        for declared in self._declared.values():
            after[declared] = []
            for what in declared.after:  # a function may be there twice, under two names
                meant = [other for other in self._declared.values() if what in (other.name, other.function)]
                if not meant:
                    shown = what if isinstance(what, str) else getattr(what, "__name__", what)
                    known = ", ".join(list(self._declared)[:10]) + " and more" * (len(self._declared) > 10)
                    raise UsageError(
                        f"after={shown!r} of task {declared.name!r}: expected a task of this pipeline, which"
                        f" has {known}; declare it, or correct the name"
                    )
                after[declared] += meant
        _check_cycles(after)
        return after


def _is_again(old: Any, new: Any) -> bool:
    """Whether a function is declared once more, as where the cell of a notebook is run again."""
    one, other = getattr(old, "__code__", None), getattr(new, "__code__", None)
    if one is other or one is None or other is None or "<lambda>" in new.__qualname__:
        return False  # such as a function that is made in a loop
    is_same = (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
    return is_same and (one.co_filename != other.co_filename or one.co_firstlineno == other.co_firstlineno)


def _declared(function: Any, each: Any, name: Any) -> _Declared:
    """Check what @pipe.task was given, before anything is started."""
    if not callable(function):
        raise UsageTypeError(f"task({function!r}): expected a function; options are named, as in each=")
    own = name if isinstance(name, str) else getattr(function, "__name__", type(function).__name__)
    if not (name is None or (isinstance(name, str) and name) or (callable(name) and each is not None)):
        raise UsageTypeError(
            f"name={name!r} of task {own!r}"
            ": expected a str, or a function of its each= item"
        )
    if each is not None and (_is_path(each) or not (callable(each) or hasattr(each, "__iter__"))):
        raise UsageTypeError(
            f"each={each!r} of task {own!r}"
            ": expected an iterable, or a function that makes one"
        )
    _check_function(f"the function of task {own!r}", function, *["ctx", "item"][: 1 + (each is not None)])
    call, source = (_call_alone, (None,)) if each is None else (_call_with_item, each)
    return _Declared(_text(own), function, call, source, name if callable(name) else None)


def _check_cycles(after: Mapping[_Declared, list[_Declared]]) -> list[_Declared]:
    """Raise UsageError if some task would wait for itself; returns all in an order in which they can run."""
    ordered: dict[_Declared, None] = {}
    for first in after:
        walk = [first]  # mostly no further: who comes after others is declared after them
        while walk:
            before = next((before for before in after[walk[-1]] if before not in ordered), None)
            if before is None:
                ordered[walk.pop()] = None
            elif before in walk:
                cycle = " after ".join(each.name for each in [*walk[walk.index(before) :], before])
                raise UsageError(f"circular after=: {cycle}; remove one of them")
            else:
                walk.append(before)
    return list(ordered)


# ---- Status: reading a finished or a live database; never writes, never blocks a run -------------------

KINDS = {RUNNING: "running", ERROR: "failed", CANCELLED: "cancelled", QUEUED: "queued", DONE: "done"}
COUNTS = "SELECT status, count(*) FROM task_runs GROUP BY status"
COUNTS_OF_RUN = "SELECT status, count(*) FROM task_runs WHERE run_id = ? GROUP BY status"
HAS_RUNS = "SELECT 1 FROM sqlite_master WHERE name = 'pipeline_runs'"
ROWS = (  # with their times in seconds since 1970; NULL for text of a worker's that is no time
    "SELECT *, round((julianday(started_at) - 2440587.5) * 86400, 3) AS began,"
    " round((julianday(finished_at) - 2440587.5) * 86400, 3) AS ended FROM "
)
LAST_RUN = ROWS + "pipeline_runs ORDER BY id DESC LIMIT 1"
CHOSEN = (  # two steps, as to compute the times of all rows before most are dropped would take long
    ROWS + "task_runs WHERE id IN (SELECT id FROM task_runs WHERE {0} ORDER BY {1} LIMIT ?) ORDER BY {1}"
)
NEWEST = CHOSEN.format("status = ?", "coalesce(finished_at, started_at, '') DESC, id DESC")
LONGEST = CHOSEN.format("status = ?", "coalesce(started_at, ''), id")
REASONS = (
    "SELECT message, count(*) AS number, min(name) AS name FROM task_runs WHERE status = ?"
    " GROUP BY message ORDER BY number DESC, message LIMIT ?"
)
SELECTIONS = {RUNNING: LONGEST, ERROR: NEWEST, CANCELLED: REASONS, QUEUED: LONGEST, DONE: NEWEST}
LATEST = NEWEST.replace("status = ?", "NOT ? OR status IN ('error', 'cancelled')")
TASKS_NAMED = ROWS + (
    "task_runs WHERE name = ? OR id = ? AND NOT EXISTS (SELECT 1 FROM task_runs WHERE name = ?)"
    " ORDER BY id"
)
SIMILAR_NAMES = (  # those that contain it first; to compare a million names would take minutes
    "SELECT name FROM task_runs GROUP BY name ORDER BY instr(name, ?) = 0, max(id) DESC LIMIT 10000"
)


def read_status(
    db_path: Any, limit: int = 20, failed: bool = False, *, names: Sequence[str] = ()
) -> dict[str, Any]:
    """What `status --json` prints: dicts, lists, text and numbers. Any thread may call it.

    database, counts          the path; how many tasks have each status
    run, run_counts           the last run, or None, with `alive` (None: unknown); the counts of its tasks
    tasks                     the latest `limit` ones; with `failed` those that failed or were cancelled;
                              with `names` all that have one of these
    running, queued           those that began first; queued ones wait for a retry, or their turn
    failed, done, cancelled   the newest ones; the cancelled by reason, {message, number, name of one}

    Raises DatabaseError if there is no such database, and does not create it.
    """
    path = os.fsdecode(db_path)
    if not os.path.isfile(path):
        raise DatabaseError(path, "does not exist", "pass the database of a run with --db")
    side_files = [os.path.realpath(path) + end for end in ("-wal", "-journal")]
    held = _RunLock.is_held(path)
    idle = not (held or any(map(os.path.exists, side_files)))
    try:
        with _connect_readonly(path, idle=idle) as conn:
            status = {"database": path, **_query_status(conn, limit, failed, names)}
    except sqlite3.Error as error:
        if "no such table" in str(error) and _RunLock.is_held(path):  # a run is about to make it
            return {
                "database": path, "counts": {}, "run": None, "run_counts": {},
                **{key: [] for key in ("tasks", *KINDS.values())},
            }  # fmt: skip
        raise _unreadable(path, error) from error
    if _RunLock.is_held(path) is not held or (idle and any(map(os.path.exists, side_files))):
        return read_status(path, limit, failed, names=names)  # a run has begun or ended meanwhile
    run = status["run"]
    if run:
        run["alive"] = held if run["status"] == RUNNING else False
        if run["status"] == RUNNING and held is False:
            run["status"] = "interrupted"  # the next run will say so in the database
    return status


def _unreadable(path: str, error: sqlite3.Error) -> DatabaseError:
    what, cure = f"has no task status: {error}", "pass a database that pipeloom has written"
    if _trouble(error) == "lock":
        what, cure = f"cannot be read now: {error}", "try again later"
    elif "readonly" in str(error):
        what, cure = "was left half-written by a killed run", "start the next run, which rolls that back"
    return DatabaseError(path, what, cure)


def _query_status(
    conn: sqlite3.Connection, limit: int, failed: bool, names: Sequence[str]
) -> dict[str, Any]:
    def ask(sql: str, *parameters: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in conn.execute(sql, parameters)]

    conn.row_factory = sqlite3.Row
    conn.execute("BEGIN")  # all of it as of one commit
    run = next(iter(ask(LAST_RUN) if ask(HAS_RUNS) else []), None)
    named = [ask(TASKS_NAMED, name, name, name) or _unknown_task(ask, name) for name in names]
    return {
        "counts": dict(conn.execute(COUNTS).fetchall()), "run": run,
        "run_counts": dict(conn.execute(COUNTS_OF_RUN, (run["id"],)).fetchall()) if run else {},
        "tasks": list(chain(*named)) if names else ask(LATEST, failed, limit),
        **{KINDS[kind]: ask(sql, kind, limit) for kind, sql in SELECTIONS.items()},
    }  # fmt: skip


def _unknown_task(ask: Callable[..., list[dict[str, Any]]], name: str) -> NoReturn:
    from difflib import get_close_matches

    names = [row["name"] for row in ask(SIMILAR_NAMES, name)]
    near = [other for other in names if name in other][:3] or get_close_matches(name, names)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`status` without a name lists them"
    raise UsageError(f"the database has no task {name!r}; {hint}")


def _elapsed(row: dict[str, Any], runs: bool) -> float | None:
    """Seconds that a task or run took, or has taken so far if it `runs`; None where nobody knows."""
    begin, end = row["began"], time.time() if runs else row["ended"]
    return None if begin is None or end is None else max(end - begin, 0.0)


def _local(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "an unknown time"


def _word(status: dict[str, Any], kind: str) -> str:
    """What people call it; nothing runs where the run's process is gone."""
    gone = kind == RUNNING and status["run"] and status["run"]["status"] == "interrupted"
    return "interrupted" if gone else KINDS.get(kind, kind)


def _run_lines(status: dict[str, Any]) -> list[str]:
    """The run: alive or not, since when; how many of how many, the rate, the time left."""
    run = status["run"] or {"status": "", "alive": False, "ended": None, "began": None}
    counts = run if run["ended"] else status["run_counts"] if status["run"] else status["counts"]
    done, failed, cancelled = (counts.get(kind) or 0 for kind in (DONE, ERROR, CANCELLED))
    earlier = status["counts"].get(DONE, 0) - done if run["alive"] is not False else 0  # perhaps skipped now
    elapsed, total, ended = _elapsed(run, run["alive"] is not False), run.get("total"), done + failed
    rest, begun = (total or 0) - ended - cancelled, counts.get(RUNNING, 0) + counts.get(QUEUED, 0)
    is_known = run["alive"] and ended and (elapsed or 0) >= 1 and rest > begun and not earlier  # else a guess
    facts = [
        f"{done:,} of {total:,} done" if total is not None else f"{done:,} done",
        *(f"{counts[k]:,} {_word(status, k)}" for k in (*KINDS, "skipped") if k != DONE and counts.get(k)),
        f"{earlier:,} done in earlier runs" if earlier else "",
        _rate(ended / elapsed) if ended and elapsed and elapsed >= 1 else "",
        f"about {_clock((elapsed or 0) / ended * rest)} left" if is_known else "",
    ]
    return [f"{status['database']}: {_state(run, _clock(elapsed or 0))}", ", ".join(filter(None, facts))]


def _state(run: dict[str, Any], took: str) -> str:
    if not run["status"]:
        return "no run is recorded"
    process, began = f"process {run['pid']} on {run['host']}", _local(run["began"])
    if run["alive"] is not False:
        return f"{'' if run['alive'] else 'probably '}running for {took}, since {began} ({process})"
    if run["status"] == "interrupted":
        return f"interrupted: {process} is gone; it started {began}"
    how = "finished" if run["status"] == DONE else KINDS.get(run["status"])
    return f"{how} after {took}, at {_local(run['ended'])}"


def _report(status: dict[str, Any], failed: bool, width: int, height: int) -> list[str]:
    """The run, then its tasks by kind. It fits a window of that size; 0 is one without a limit."""
    style, lines = _Style(sys.stdout), [_line(text, width) for text in _run_lines(status)]
    kinds = [kind for kind in KINDS if status[KINDS[kind]] and (not failed or kind in (ERROR, CANCELLED))]
    for at, kind in enumerate(kinds, 1):
        later = sum(min(len(status[KINDS[other]]) + 1, 4) for other in kinds[at:])
        room = max(height - 1 - len(lines) - later, 3) if height else sys.maxsize
        section = [_line(text, width) for text in _section(status, kind, room, width)]
        lines += [style.paint("31", line) for line in section] if width and kind == ERROR else section
    return lines[: height - 1] if height else lines


def _line(text: str, width: int) -> str:
    """One line for a window of that width, 0 for the whole; dots stand for the end that does not fit."""
    return _cut(text, width - 1 if width else sys.maxsize, _Style(sys.stdout).dots, part=0.0)


def _section(status: dict[str, Any], kind: str, room: int, width: int) -> Iterator[str]:
    """A title, as many tasks of this kind as there is room for, and how many more there are."""
    rows, number, run = status[KINDS[kind]], status["counts"][kind], status["run"]
    earlier = number - status["run_counts"].get(kind, 0) if run else 0
    yield f"{number:,} {_word(status, kind)}{f', {earlier:,} of them in earlier runs' * bool(earlier)}:"
    is_whole = len(rows) < room and number == sum(row.get("number", 1) for row in rows)
    rows = rows[: room - 1 - (not is_whole)]
    others = [row.get("number", 1) - 1 for row in rows]
    names = [_clean(row["name"]) + f" +{n:,} more" * bool(n) for row, n in zip(rows, others)]
    column = min(max(map(_width, names)), width * 2 // 5 or NAME_WIDTH)
    for row, name in zip(rows, names):
        elapsed = None if kind in (CANCELLED, QUEUED) else _elapsed(row, _word(status, kind) == RUNNING)
        took = f"  {_clock(elapsed):>7}" if elapsed is not None else ""
        part = f"{int(100 * (row['progress'] or 0)):4}%" if kind == RUNNING else ""
        name = _fit(name, column, _Style(sys.stdout).dots) if width or _width(name) < column else name
        text = (row["message"] or row.get("result") or "").strip().partition("\n")[0]
        yield f"  {name}{took}{part}  {text}"
    if number > len(rows) + sum(others):
        yield f"  +{number - len(rows) - sum(others):,} more"


def _details(status: dict[str, Any]) -> Iterator[str]:
    """All about the tasks that were asked for."""
    for task in status["tasks"]:
        word = _word(status, task["status"])
        elapsed = _elapsed(task, word == RUNNING)
        facts = {
            "attempts": task.get("attempts"),
            "started": task["started_at"] and _local(task["began"]),
            "ended": task["finished_at"] and _local(task["ended"]),
            "time": None if elapsed is None else _clock(elapsed),
            "progress": f"{int(100 * (task['progress'] or 0))}%",
            "run": task.get("run_id"),
            **{name: task.get(name) for name in ("message", "result", "traceback")},
        }
        yield _clean(f"{task['name']} (task {task['id']}): {word}")
        for fact, value in facts.items():
            text = str(value or "").strip().replace("\n", f"\n{'':12}")
            yield from map(_clean, f"  {fact:<10}{text}".split("\n") if text else [])


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


# ---- sh: shell commands as tasks; none of their processes outlives the run -----------------------------

BLOCK = 2**16  # bytes: the most of a line that is read at once, and of the output that is stored
KILL_AFTER = 2.0  # seconds from SIGTERM to SIGKILL

# What a shell does first: say who it is, to a pipe that it has as stdin. So the keeper knows of each command
# before that begins, whatever becomes of us. And open its output as its own; see _Scratch.
HERALD = "echo begun $$ >&0; exec </dev/null{}; "
REOPEN = " >/proc/self/fd/1 2>>/proc/self/fd/2"  # some seek in their stdout

_Command = namedtuple("_Command", "name item")  # the whole text of one, which is its task's name


def _commands(template: str | None, items: Iterable[str]) -> Iterator[_Command]:
    """A command for each item, which is quoted; without a template the items are commands."""
    from shlex import quote
    from subprocess import list2cmdline

    parts = re.split(r"({{}}|{})", template or "")
    if "{}" not in parts:
        parts += [" ", "{}"]
    for item in items:
        holes = {"{}": quote(item) if os.name == "posix" else list2cmdline([item]), "{{}}": "{}"}
        text = item if template is None else "".join(holes.get(part, part) for part in parts)
        yield _Command(text, item)


def _stdin_items(end: bytes) -> Iterator[str]:
    """What stdin holds, as it comes; each item ends with a newline, or with NUL."""
    if sys.stdin.isatty():
        _say("pipeloom: reading from the terminal, one item a line; end with Ctrl-D")
    stdin: Any = sys.stdin.buffer
    rest = b""
    for block in chain(iter(partial(stdin.read1, BLOCK), b""), [end]):  # the last item may lack its end
        *items, rest = (rest + block).split(end)
        yield from map(os.fsdecode, filter(None, items))


class _Scratch:
    """Files without a name for what a command writes. Workers' threads enter it; no lock.

    To make one may take long, as on some file systems where many were deleted of late. So where a command
    `reopens` them as its own, they are used again once nobody has them open any more.
    """

    def __init__(self) -> None:
        self._spare: deque[int] = deque()
        self.reopens = False
        with suppress(OSError), self.file() as file:
            os.close(os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_TRUNC))
            self.reopens = sys.platform == "linux"

    @contextmanager
    def file(self) -> Iterator[int]:
        """An empty one, as a descriptor."""
        file = self._take()
        try:
            yield file
        finally:
            if self.reopens:
                os.ftruncate(file, 0)
                os.lseek(file, 0, os.SEEK_SET)  # for a shell that does not come to open it anew
                self._spare.append(file)
            else:
                os.close(file)

    def _take(self) -> int:
        with suppress(IndexError):
            file = self._spare.popleft()
            if _is_free(file):
                return file
            os.close(file)
        from tempfile import TemporaryFile

        with TemporaryFile() as new:  # which has no name from the start, or once it is closed, everywhere
            return os.dup(new.fileno())

    def close(self) -> None:
        while self._spare:
            os.close(self._spare.popleft())


def _is_free(file: int) -> bool:
    """Whether nobody else has opened a file and not closed it: Linux grants a lease then, and only then.

    Who has inherited our descriptor is not seen.
    """
    from fcntl import F_SETLEASE, F_SETSIG, F_UNLCK, F_WRLCK, fcntl

    with suppress(OSError):
        fcntl(file, F_SETSIG, signal.SIGURG)  # what comes if somebody opens it just now; SIGIO would end us
        fcntl(file, F_SETLEASE, F_WRLCK)
        fcntl(file, F_SETLEASE, F_UNLCK)
        return True
    return False


class _Shell:
    """Runs the commands of `sh`, each in a process group of its own. Workers' threads enter it.

    A process of ours, the keeper, is told which groups have begun and ended. It ends those that are cut off,
    what a command leaves in the background, and all of them if this process is gone, even by SIGKILL.
    """

    def __init__(self, quiet: bool, tag: bool) -> None:
        self._sinks: list[Any] = [None, None] if quiet else [sys.stdout, sys.stderr]
        self._tag = tag
        self._printing = threading.Lock()  # held while the output of one command is copied
        self._busy: dict[int, threading.Thread] = {}  # by task_id; some may be of attempts that were cut off
        self._scratch = _Scratch()

    def __enter__(self) -> Any:
        from linecache import getlines
        from subprocess import DEVNULL, PIPE, Popen

        # Not by inspect.getsource(), whose tokenizer takes a tenth of the start.
        first, end = (function.__code__.co_firstlineno - 1 for function in (_members, main))
        lines = getlines(_members.__code__.co_filename, globals())[first:end]
        if not lines or not lines[0].startswith("def _members"):
            raise PipeloomError(f"sh needs the source of {__file__!r}, which cannot be read; restore it")
        program = "".join([KEEPER, *lines, f"_keep({KILL_AFTER})"])
        try:
            self._keeper: Any = Popen(
                [sys.executable, "-IS", "-c", program], stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL,
                start_new_session=True,  # out of reach of Ctrl-C
            )  # fmt: skip
        except OSError as error:
            raise PipeloomError(f"cannot start a process: {error.strerror}; close other programs") from error
        # Its wait() with a time-out would take ever longer naps.
        self._keeper_thread = threading.Thread(
            target=self._keeper.wait, name="pipeloom-keeper", daemon=True
        )
        _start(self._keeper_thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("over", 0)  # it ends what is left, and then itself, unless somebody has stopped it
        until = time.monotonic() + GRACE
        for thread in [self._keeper_thread, *self._busy.values()]:  # which print what their commands wrote
            thread.join(max(until - time.monotonic(), 0.0))
        self._scratch.close()

    def run(self, command: _Command, ctx: _Attempt) -> str:
        """The function of the tasks: run a command; returns the last of what that wrote to stdout."""
        me, before = threading.current_thread(), self._busy.get(ctx.task_id)
        self._busy[ctx.task_id] = me
        try:
            if before is not None:  # the attempt before timed out, and is not gone yet
                before.join(KILL_AFTER)
                ctx.check()
            with self._scratch.file() as out, self._scratch.file() as err:
                return self._run(command, ctx, out, err)
        except (OSError, ValueError) as error:
            raise _told_error(f"cannot be started: {getattr(error, 'strerror', None) or error}") from None
        finally:
            if self._busy.get(ctx.task_id) is me:
                del self._busy[ctx.task_id]

    def _run(self, command: _Command, ctx: _Attempt, out: int, err: int) -> str:
        code = self._wait(command, ctx, out, err)
        if any(os.lseek(file, 0, os.SEEK_END) for file in (out, err)):
            self._print(command, out if code == 0 or not ctx.may_retry() else None, err)
        if code == 0:
            return _end_of(out)
        ctx.check()  # if that has ended it, it is cancelled, and not an error
        last = _end_of(err).strip().rpartition("\n")[2]
        raise _told_error(f"{self._how(code)}: {last}" if last else self._how(code), self._how(code))

    def _wait(self, command: _Command, ctx: _Attempt, out: int, err: int) -> int:
        from subprocess import Popen

        herald = HERALD.format(REOPEN if self._scratch.reopens else "") if os.name == "posix" else ""
        with Popen(
            herald + command.name, stdin=self._keeper.stdin, stdout=out, stderr=err, shell=True,
            start_new_session=True, close_fds=False,  # which saves a tenth
        ) as process:  # fmt: skip
            if os.name != "posix":
                self._tell("begun", process.pid)
            ctx.wakes.append(partial(self._tell, "cut", process.pid))
            if ctx.cancelled:
                self._tell("cut", process.pid)
            process.wait()  # until the keeper ends it, at the latest
            self._tell("ended", process.pid)
        ctx.disarm()  # who reads the output may be slow
        return int(process.returncode)

    def _how(self, code: int) -> str:
        """How a command failed."""
        if code > 0:
            return f"exit {code}"
        if self._keeper.poll() is not None:
            return "not run to its end: somebody has killed the process that watches the commands"
        return {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")

    def _tell(self, event: str, pid: int) -> None:
        with suppress(OSError):  # it is gone: the run is over, or somebody has killed it
            os.write(self._keeper.stdin.fileno(), f"{event} {pid}\n".encode())

    def _print(self, command: _Command, *files: int | None) -> None:
        tag = os.fsencode(f"{command.item}\t") if self._tag else b""
        with self._printing:
            for at, file in enumerate(files):
                try:
                    if file is not None and self._sinks[at]:
                        _copy(file, self._sinks[at], tag)
                except OSError as error:
                    if at == 0 and not isinstance(error, BrokenPipeError):
                        raise _told_error(f"cannot write its output to stdout: {error.strerror}") from None
                    self._sinks[at] = None  # `| head` has seen enough


def _told_error(text: str, cause: str = "") -> _ToldError:
    return _ToldError(text, None, cause or text)


def _copy(file: int, stream: Any, tag: bytes) -> None:
    """Write what a file holds to a stream of ours, each line with its tag."""

    def lines() -> Iterator[bytes]:
        begins = True
        for piece in iter(partial(source.readline, BLOCK), b""):
            yield tag + piece if begins else piece
            begins = piece.endswith(b"\n")
        if tag and not begins:
            yield b"\n"

    os.lseek(file, 0, os.SEEK_SET)
    with open(file, "rb", closefd=False) as source:
        if _is_terminal(stream):
            for line in lines():  # whole ones, which come above the bars
                stream.write(line.decode(errors="backslashreplace").rstrip("\n") + "\n")
        else:
            with open(os.dup(stream.fileno()), "wb") as sink:  # as they are: they may be no text
                if os.name == "posix":
                    os.set_blocking(sink.fileno(), True)  # what has started us may want it otherwise
                sink.writelines(lines())


def _end_of(file: int) -> str:
    """The last of what a file holds."""
    size = os.lseek(file, 0, os.SEEK_END)
    os.lseek(file, max(size - BLOCK, 0), os.SEEK_SET)
    return os.read(file, BLOCK).decode(errors="backslashreplace").rstrip("\n")


# The keeper's program is the functions from here to main(), and nothing else of this file. It knows a command
# by the id of its process, which is that of its group and of its session, too.

KEEPER = """
from __future__ import annotations
import os, threading, time
from contextlib import suppress
"""


def _members(session: int) -> list[int]:
    """Its processes, where /proc tells: some make a group of their own (timeout does). Else its group."""

    def belongs(pid: str) -> bool:
        try:
            return os.getsid(int(pid)) == session
        except OSError:  # it has just ended
            return False

    pids = filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else ())
    return [int(pid) for pid in pids if belongs(pid)] or [-session]


def _send(session: int, number: int) -> bool:
    """Send them a signal; False if none is left."""
    sent = False
    if os.name != "posix" and number == 15:
        from subprocess import call

        call(["taskkill", "/F", "/T", "/PID", str(session)])
    for pid in _members(session) if os.name == "posix" else ():
        with suppress(OSError):
            os.kill(pid, number)
            sent = True
    return sent


def _end(sessions: set[int], patience: float) -> None:
    """SIGTERM, and SIGKILL for what is left after some seconds."""
    sessions = {session for session in sessions if _send(session, 15)}
    until = time.monotonic() + patience
    while sessions and time.monotonic() < until:
        time.sleep(0.05)
        sessions = {session for session in sessions if _send(session, 0)}
    for session in sessions:
        _send(session, 9)


def _keep(patience: float) -> None:
    """Read which commands have begun, are cut off and have ended, until nobody is left who could say so."""
    live: set[int] = set()
    cut: set[int] = set()  # which may be said before the command itself has said that it begins
    rest, block = b"", b"-"
    while block:
        block = os.read(0, 2**16)
        *lines, rest = (rest + block).split(b"\n")
        for event, id in map(bytes.split, lines):
            pid = int(id)
            if event == b"begun":
                live.add(pid)
            elif event == b"cut":
                cut.add(pid)
            elif event == b"over":
                block = b""
            elif pid in live:
                live.discard(pid)
                with suppress(AttributeError, OSError):
                    os.killpg(pid, 0)  # it has left something in the background
                    threading.Thread(target=_end, args=({pid}, patience)).start()
        if live & cut:
            threading.Thread(target=_end, args=(live & cut, patience)).start()
        live, cut = live - cut, cut - live
        if live and block:
            time.sleep(0.02)  # while many begin and end: to be woken for each line would cost much
    _end(live, patience)


# ---- Command line: data to stdout, everything else to stderr -------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed tasks, 2 wrong use, 75 in use, 130 Ctrl-C."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.error(f"expected a command; to see it work: {parser.prog} demo")
    return _execute(parser, argv)


SAME_COMMAND = "the same command with --resume"
STARTED_IN = ""
with suppress(OSError):  # it was deleted
    STARTED_IN = os.getcwd()  # now, as programs may leave it


def _number(text: str, low: int = 1) -> int:
    import argparse

    if not text.isdecimal() or not low <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low}")
    return int(text)


def _flag(help: str, **more: Any) -> dict[str, Any]:
    return {"action": "store_true", "help": help, **more}


def _value(metavar: str, help: str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": help, **more}


# What argparse is told of each argument, by its names. What becomes an option of a run has None by default:
# then it is as the program says.
_from_0 = partial(_number, low=0)
DATABASE = _value("FILE", "the database (default: %(default)s)", default="./pipeloom.db")
ANY_RUN = {  # of the demo's, too
    "--resume": _flag("skip the tasks that are done", default=None),
    "--redo": _value("NAME", "skip what is done, but not this; may be repeated", action="append"),
    "-q --quiet": _flag("say nothing when all goes well"),
    "-w --workers": _value("N", "how many tasks run at once", type=_number),
    "-v --verbose": {"action": "count", "default": 0, "help": "log more; -vv logs everything"},
    "-l --log-file": _value("FILE", "also log to FILE"),
}
OWN_RUN = {
    "--retries": _value("N", "retry a failed task up to N times", type=_from_0),
    "--timeout": _value("SECONDS", "time limit for one attempt", type=float),
    "--fail-fast": _flag("start no more tasks after the first failure", default=None),
    "--durable": _flag("make each commit survive a power loss", default=None),
    "--progress": _value("HOW", "auto, rich, ansi, log or none"),
    "--dry-run": _flag("print the names of the tasks and run none"),
    **ANY_RUN,
}
FUNCTION_RUN = {  # not of sh, whose commands are processes anyway
    **OWN_RUN,
    "--processes": _value("N", "run N tasks at once, each in a process", type=_number),
}
COMMANDS: dict[str, tuple[Any, ...]] = {  # arguments, what comes after the name, what it does, examples
    "demo": (
        {
            "--db": {**DATABASE, "default": "./wal_demo.db"},
            "-n --num-tasks": _value("N", "how many (default: 20)", type=_number, default=20),
            "--no-wal": _flag("use SQLite's rollback journal"),
            "--fail": _value("N", "make N tasks fail", type=_from_0, default=0),
            **ANY_RUN,
        },
        "[options]", "Run tasks that only sleep, to see it work.", "-n 50 -w 10", "--fail 2",
    ),
    "run": (
        {
            "--db": _value("FILE", "the database (default: the one in the program)"),
            "target": {"metavar": "TARGET"},
            "--arg": _value("KEY=VALUE", "for the function; may be repeated", action="append", default=[]),
            **FUNCTION_RUN,
        },
        "[options] TARGET",
        (
            "Run your pipeline, function or file.\n"
            "TARGET is package.module:name, file.py:name, or file.py (its main or Pipeline)."
        ),
        "job.py --resume", "job.py:load --arg folder=incoming",
    ),
    "sh": (
        {
            "--db": DATABASE,
            "words": {"nargs": "..."},  # all that is left, options of the command included
            "-0 --null": _flag("items on stdin end with NUL: find -print0"),
            "--tag": _flag("print the item before each line of output"),
            "--quiet-output": _flag("print no output of the commands"),
            **OWN_RUN,
        },
        "[options] [COMMAND [ITEM...]]",
        (
            "Run a shell command for each item: xargs with a memory.\n"
            "{} is the item, quoted; without it the item comes last. Without ITEM, each line\n"
            "of stdin is one. Without COMMAND, each line of stdin is a whole command."
        ),
        "-w 8 --resume 'gzip -k {}' *.log", "--retries 2 --timeout 60 < commands.txt",
    ),
    "status": (
        {
            "--db": _value("FILE", f"the database (default: {DATABASE['default']})"),
            "names": _value("NAME", "all about this task; FILE is the database", nargs="*"),
            "-n --limit": _value("N", "how many of each kind (default: what fits)", type=_number),
            "--failed": _flag("only tasks that failed or were cancelled"),
            "--watch": _flag("keep it up to date until the run ends"),
            "--json": _flag("as JSON"),
        },
        "[options] [FILE] [NAME...]", "Show what runs, what failed and what is done, also during a run.",
        "sales.db --watch", "report --db sales.db",
    ),
    "init-db": (
        {"--db": DATABASE},
        "[--db FILE]", "Create the tables, or complete those of an older pipeloom.", "", "--db sales.db",
    ),
}  # fmt: skip


def _execute(parser: Any, argv: list[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show
    args = parser.parse_args(argv)
    with _signals_taken():
        try:
            if not hasattr(args, "target"):
                _setup_logging_of(args)
            return int(args.command(args))
        except PipeloomError as error:
            _say(f"pipeloom: {error}")
            logger.debug("where that came from:", exc_info=True)
            return 75 if isinstance(error, RunInProgress) else 2
        except KeyboardInterrupt:
            return 130


def _end_program(command: Callable[[], int]) -> NoReturn:
    """End the program with the code of a command."""
    before = threading.enumerate()
    try:
        code: Any = command()
    except SystemExit as error:
        code = error.code
    left = [thread for thread in threading.enumerate() if isinstance(thread, _TaskThread)]
    if all(thread in before for thread in left) and not LEFT_BEHIND:
        sys.exit(code)
    # A task was left behind. Python waits at its end for the threads and processes of every executor and for
    # asyncio.to_thread, perhaps for ever; a task's should not hold up the exit code.
    if not isinstance(code, (int, type(None))):
        _say(str(code))
    for executor in tuple(LEFT_BEHIND.values()):
        for pid in tuple(getattr(executor, "_processes", None) or ()):  # which else would stay for ever
            with suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    with suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _say(text: str) -> None:
    """A line to stderr, if there is one: it may be closed, full, or a pipe that nobody reads."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None and _takes(sys.stderr, READER_PATIENCE):
            print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece, as threads print too


def _print(text: str) -> None:
    """A line of data to stdout."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
            raise UsageError(f"cannot write to stdout: {error.strerror}; redirect it") from error


def _setup_logging_of(args: Any) -> None:
    try:
        setup_logging(getattr(args, "verbose", 0), getattr(args, "log_file", None))
    except OSError as error:
        raise UsageError(
            f"--log-file {args.log_file!r} cannot be written"
            f": {error.strerror}; name another"
        ) from error


@contextmanager
def _signals_taken() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program by an exception, so that the summary is still printed, and
    `kill -USR1 PID` print every thread's stack; but none that the program uses itself.
    """
    wanted = {"SIGTERM": _end_by_signal, "SIGHUP": _end_by_signal, "SIGUSR1": _show_stacks}
    may_take = threading.current_thread() is threading.main_thread()
    with ExitStack() as ends:
        for name, handler in wanted.items():
            number: Any = getattr(signal, name, None)  # Windows lacks some
            if may_take and number and signal.getsignal(number) == signal.SIG_DFL:
                ends.callback(signal.signal, number, signal.SIG_DFL)
                signal.signal(number, handler)
        yield


def _end_by_signal(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _show_stacks(*_: Any) -> None:
    """To fd 2, as a lock of a stream may be held by what this has interrupted.

    faulthandler.register would also show a main thread that hangs in C, but it reads the stacks of threads
    that run on meanwhile, and takes the process with it at times.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text = ""
    for ident, frame in sys._current_frames().items():
        text += f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
    if _Screen.current:  # last: to read the sources takes as long as some frames
        text = _Screen.current.erased(_terminal_size(sys.stderr)[0]) + text
    with suppress(OSError):
        os.write(2, text.encode("utf-8", "backslashreplace"))


def _new_parser(
    prog: str, arguments: Mapping[str, Any], usage: str, text: str, *examples: str, of: Any = None,
    **more: Any,
) -> Any:  # fmt: skip
    """A parser, or one `of` a parser's commands. Its help fits a screen and ends with examples."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _say(f"pipeloom: {message}; see {self.prog} --help")
            self.exit(2)

        def format_help(self) -> str:
            head, _, examples = super().format_help().partition("\n\nexample: ")
            return head.replace("\n\n", "\n") + f"\n\nexample: {examples}"

    parser = (of.add_parser if of else Parser)(
        prog=prog,
        add_help=False,  # it has a line of its own in every help
        usage=f"{prog} {usage}".replace("%", "%%"),
        description=text,
        epilog="\n".join(f"example: {prog} {example}".rstrip() for example in examples),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
        **more,
    )
    for names, how in {"-h --help": {"action": "help"}, **arguments}.items():
        parser.add_argument(*names.split(), **{"help": argparse.SUPPRESS, **how})
    return parser


def _parser() -> Any:
    me = " ".join(_this_program())
    about = "Run many tasks at once, store what they produce in SQLite, watch them live."
    parser = _new_parser(me, {}, "COMMAND ...", about, "demo", "status wal_demo.db")
    parser.add_argument("--version", action="version", version=f"pipeloom {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    functions = {
        "demo": _cmd_demo, "run": _cmd_run, "sh": _cmd_sh, "status": _cmd_status, "init-db": _cmd_init_db
    }  # fmt: skip
    for name, function in functions.items():
        summary = COMMANDS[name][2].partition("\n")[0]
        command = _new_parser(f"{me} {name}", *COMMANDS[name], of=commands, name=name, help=summary)
        command.set_defaults(command=function)
    return parser


def _pipeline_parser(pipe: Pipeline) -> Any:
    me, text = " ".join(_this_program()), "Run the tasks of this pipeline."
    database = _value("FILE", f"the database (default: {pipe.db_path})".replace("%", "%%"))
    parser = _new_parser(me, {"--db": database, **FUNCTION_RUN}, "[options]", text, "--resume", "--dry-run")
    parser.set_defaults(command=lambda args: _Session(args).call(pipe.run))
    return parser


def _cmd_demo(args: Any) -> int:
    ids = range(1, args.num_tasks + 1)
    tasks = [Task(id, f"task-{id}" + "!" * (id <= args.fail), steps=10 + 7 * id % 21) for id in ids]
    return _Session(args).call(
        lambda: run_pipeline(
            tasks,
            args.db,
            worker_fn=demo_worker,
            workers=min(args.num_tasks, 8),  # they sleep: more of them than CPUs is right
            wal=not args.no_wal,
        )
    )


def _cmd_run(args: Any) -> int:
    arguments = dict(_argument(text) for text in args.arg)
    try:
        function = _load_target(args.target)
    finally:
        _setup_logging_of(args)  # after the program's own, which may configure it
    if arguments and isinstance(getattr(function, "__self__", None), Pipeline):
        raise UsageError(
            f"--arg: {args.target} is a Pipeline, which takes no arguments; pass a function instead"
        )
    _check_function(args.target, function, **arguments)
    return _Session(args).call(partial(function, **arguments))


def _argument(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where a value that reads as a number, true or false is one."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--arg {text!r}: expected KEY=VALUE, as in --arg folder=incoming")
    for kind in (int, float):
        with suppress(ValueError):
            return key, kind(value)
    return key, {"true": True, "false": False}.get(value.lower(), value)


def _load_target(target: str) -> Any:
    """The function that TARGET names; of a Pipeline, its run()."""
    place, _, name = target.rpartition(":") if not target.endswith(".py") else (target, "", "")
    what, is_file = f"target {target!r}", place.endswith(".py")
    if not place or not (name or is_file):
        raise UsageError(f"{what}: expected package.module:name, file.py:name or file.py")
    if is_file and not os.path.isfile(place):
        raise UsageError(f"{what}: there is no file {place!r}; check the path")
    try:
        _Session.importing = True
        found = _import_target(place)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{what} cannot be imported: {_describe(error)}; -vv shows the traceback"
        ) from error
    finally:
        _Session.importing = False
    pipelines = {known: value for known, value in vars(found).items() if isinstance(value, Pipeline)}
    meant = getattr(found, name or "main", main)
    if meant is main and not name and len(pipelines) == 1:  # none of its own: `import *` brings ours
        (meant,) = pipelines.values()
    if isinstance(meant, Pipeline):
        meant = meant.run
    if meant is main or not callable(meant):
        known = " or ".join(f"{place}:{known}" for known in list(pipelines)[:3] or ["name"])
        raise UsageError(
            f"{what}: {place!r} has no function or pipeline {name or 'main'!r}; name one that it has"
            f", as {known}"
        )
    return meant


def _import_target(place: str) -> Any:
    """Import a module by its name, or a file from where it is, whatever else has its name."""
    from importlib.util import module_from_spec, spec_from_file_location

    sys.path.insert(0, os.path.dirname(os.path.abspath(place)))  # of a module's name: where we are
    if not place.endswith(".py"):
        return import_module(place)
    name = os.path.basename(place)[:-3]
    if name in sys.modules:
        name = f"{name} of pipeloom run"
    spec: Any = spec_from_file_location(name, place)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Session:
    """What the command line adds to the runs that a program starts: options that win, and a summary."""

    current: _Session | None = None
    importing = False  # the target is being imported, and should not run yet

    def __init__(self, args: Any) -> None:
        self.options = {
            name: value for name, value in vars(args).items() if name in OPTIONS and value is not None
        }
        if args.quiet:
            self.options.setdefault("progress", "none")
        self.args = args
        self.runs: list[tuple[str, RunResult, bool]] = []  # the database; whether it was cut short

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

    def run(self, after: dict[_Declared, list[_Declared]], path: str, options: Any) -> RunResult:
        """What run_pipeline and Pipeline.run do in this session."""
        path = path if self.args.db is None else self.args.db
        number, main = getattr(self.args, "processes", None), sys.modules["__main__"]
        if number and self.args.workers:
            raise UsageError("--processes N runs N tasks at once; omit -w")
        if number and not (getattr(main, "__spec__", None) or os.path.isfile(getattr(main, "__file__", ""))):
            raise UsageError("--processes: other processes cannot import this program; put it into a file")
        if number and not os.path.basename(__file__).startswith(f"{__name__.rpartition('.')[2]}.py"):
            raise UsageError(f"--processes: other processes cannot import {__file__!r}; name it pipeloom.py")
        with _processes() if number else nullcontext() as pool:
            of_processes = {"workers": number, "executor": pool} if number else {}
            run = _Run(after, path, {**options, **of_processes, **self.options})
            if getattr(self.args, "dry_run", False):
                _check_stages(run.graph.stages, path, run.options["redo"])
                for name in _planned(run, after, path):
                    _print(_cut(name, _width(name)))
                return RunResult(None, 0, 0, 0, 0, 0.0)
            try:
                return run.execute()
            finally:
                if run.intake is not None:  # else it never began
                    self.runs.append((path, run.result(), run.graph.is_cut_short()))

    def report(self, ended: bool = True) -> int:
        """Print the summary of each run to stderr; returns the exit code."""
        for path, result, _ in self.runs:
            if not (self.args.quiet and result.ok):
                _say("\n".join(_summary(path, result)))
        ok = all(result.ok for _, result, _ in self.runs)
        resumable = any(result.run_id is not None and path != ":memory:" for path, result, _ in self.runs)
        if resumable and not (ok and ended) and sys.argv[0] not in ("-c", "-"):
            words, redo_again = getattr(self.args, "words", ()), any(cut for *_, cut in self.runs)
            reads = len(words) < 2 and words != ()  # its items on stdin
            again = _command_to_resume(redo_again, len(words))
            _say(f"to go on: {SAME_COMMAND if reads else again}")
        return 0 if ok else 1


def _processes() -> Executor:
    """An executor with a process for each worker, that ends them all: one whose task hangs, too."""
    import multiprocessing
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

    spawn, mine = multiprocessing.get_context("spawn"), threading.local()
    pools: list[ProcessPoolExecutor] = []
    processes: list[Any] = []
    lock = threading.Lock()  # held while a pool starts its process, so that it is known which one that is

    class Processes(ProcessPoolExecutor):
        """A pool for each thread: a process that dies, or is killed at a deadline, takes nothing with it."""

        def submit(self, *arguments: Any) -> Any:  # type: ignore[override]
            mask = _mask_of_signals("SIG_BLOCK", {signal.SIGINT})  # is not for a process that starts now
            try:
                future = mine.pool.submit(*arguments)
            except (AttributeError, BrokenExecutor):  # it has none yet, or that one has died
                with lock:
                    others = set(multiprocessing.active_children())
                    mine.pool = ProcessPoolExecutor(1, spawn, _begin_process)
                    pools.append(mine.pool)
                    future = mine.pool.submit(*arguments)
                    started = set(multiprocessing.active_children()) - others
                processes.extend(started)
                mine.kill = next((process.kill for process in started), int)  # none, if it has died already
            finally:
                _mask_of_signals("SIG_SETMASK", mask)
            future.cancel = mine.kill  # also if it has just ended: a worker whose task was cut off ends
            return future

        def shutdown(self, *_: Any, **__: Any) -> None:
            ends = [
                threading.Thread(target=pool.shutdown, name="pipeloom-pool", daemon=True) for pool in pools
            ]
            for end in ends:
                end.start()
            for may_live in (True, False):
                until = time.monotonic() + 1.0
                for end in ends:
                    end.join(max(until - time.monotonic(), 0.0))
                for process in processes if may_live else ():
                    process.kill()  # and wait again, as else the pools complain at the interpreter's exit

    return Processes(1, spawn)


def _mask_of_signals(how: str, signals: Any) -> Any:
    """Of this thread, and of what it starts; returns the one before. Windows has none."""
    return signal.pthread_sigmask(getattr(signal, how), signals) if hasattr(signal, how) else ()


def _begin_process() -> None:
    """In a process of such a pool, which otherwise waits for ever for tasks of a parent that was killed."""
    from multiprocessing import parent_process

    def follow() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _mask_of_signals("SIG_UNBLOCK", {signal.SIGINT})
    threading.Thread(target=follow, name="pipeloom-parent", daemon=True).start()


def _this_program() -> list[str]:
    """The words that call it."""
    from shutil import which

    program, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    name = os.path.basename(sys.executable)
    python = name if which(name) == sys.executable else sys.executable
    if spec is not None and spec.name != "__main__":
        return [python, "-m", spec.name]
    if os.access(program, os.X_OK) and not program.endswith(".py") and not os.path.isdir(program):
        return [program]  # a script that finds its Python by itself
    return [python, program]


def _command_to_resume(redo_again: bool, words: int) -> str:
    """The command line again; its first words may be the program's own, and not for pipe.main(argv), and its
    last `words` are what sh runs.
    """
    from shlex import join

    options = sys.argv[: len(sys.argv) - words]
    redo = [n for n, word in enumerate(options) if word.partition("=")[0] == "--redo" and not redo_again]
    redo += [n + 1 for n in redo if options[n] == "--redo"]
    argv = [word for n, word in enumerate(sys.argv) if n > 0 and n not in redo]
    at = 1 if argv[:1] in (["run"], ["demo"], ["sh"]) else len(argv)
    argv[at:at] = ["--resume"] * ("--resume" not in options)
    command = join([*_this_program(), *argv])
    if STARTED_IN and not _is_terminal(sys.stderr):  # in cron's mail, say
        command = f"cd {join([STARTED_IN])} && {command}"
    return command if len(command) < 1_000 and command.isprintable() else SAME_COMMAND


def _planned(run: _Run, after: Mapping[_Declared, list[_Declared]], path: str) -> Iterator[str]:
    """The names of the tasks that a run would start."""
    if run.options["resume"]:
        try:
            with _connect_readonly(path) as conn:
                run.writer.status.last_id = conn.execute(LAST_ID, (NEVER,)).fetchone()[0]
        except sqlite3.Error as error:
            if os.path.exists(path) and "no such table" not in str(error):  # else no run has been there
                raise _unreadable(path, error) from error
    newest: dict[_Declared, int] = {}  # the last run that did a task of it
    redo = set(run.options["redo"])
    with closing(_Roster(run)) as roster:
        for declared in _check_cycles(after):
            older = max((newest[before] for before in after[declared]), default=NEVER)
            newest[declared] = roster.newest(declared)
            if callable(declared.source) and older == sys.maxsize:  # it may need those that will run before
                named = [(None, f"{declared.name}[...]")]
            else:
                named = [declared.identify(item, at) for at, item in enumerate(declared.items(), 1)]
            if not named:
                _say(f"pipeloom: each= of task {declared.name!r} gives no item")
            for id, name in named:
                _, done_in = roster.find(id, name)
                if done_in is None or done_in < older or redo & {name, declared.name}:
                    yield name
                    done_in = sys.maxsize
                newest[declared] = max(newest[declared], done_in)


def _summary(path: str, result: RunResult) -> Iterator[str]:
    yield f"{_in_words(result)} in {result.elapsed:.1f} s; database {path}"
    causes = sorted(result.causes.items(), key=lambda item: -item[1])
    if causes:
        yield f"{result.error:,} failed, {len(causes):,} cause{'s' * (len(causes) != 1)}:"
    for cause, number in causes[:10]:
        failure = next(failure for failure in result.failures if failure.cause == cause)
        name, message = _clean(failure.task), _cut(failure.message, 300)
        more = f" and {number - 1:,} more" if number > 1 else ""
        place = re.search(r" at (\S+:\d+, in \S+?)(?:: .*)?$", cause, re.DOTALL)
        yield f"  {name}{more}: {message}{f' ({place[1]})' if place else ''}"
    if causes[10:]:
        yield f"  and {len(causes) - 10:,} more causes"


def _cmd_sh(args: Any) -> int:
    template, *items = args.words[args.words[:1] == ["--"] :] or [None]
    if not items and sys.stdin is None:
        raise UsageError("stdin is closed; pass items as arguments, or one a line on stdin")
    commands = _commands(template, items or _stdin_items(b"\0" if args.null else b"\n"))
    with _Shell(args.quiet_output, args.tag) as shell:
        return _Session(args).call(
            lambda: run_pipeline(
                list(commands) if items else commands,  # of a list the number is known
                args.db,
                worker_fn=shell.run,
                retry_delay=KILL_AFTER + 0.5,  # when the attempt before is gone
            )
        )


def _cmd_status(args: Any) -> int:
    import json

    names, shown = [_text(name) for name in args.names], None
    window = not args.json and _is_terminal(sys.stdout)
    if args.db is None:
        args.db = DATABASE["default"]
        if names and (os.path.isfile(names[0]) or not os.path.isfile(args.db)):
            args.db = names.pop(0)
    while True:
        live = _RunLock.is_held(args.db)
        width, height = _terminal_size(sys.stdout) if window else (0, 0)
        status = read_status(args.db, args.limit or height or 20, args.failed, names=names)
        if window or status != shown:  # but for the times, which change all the time
            fits = height if args.watch or not args.limit else 0
            lines = list(_details(status)) if names else _report(status, args.failed, width, fits)
            if window and args.watch:  # this changes no mode of the terminal, so that Ctrl-C leaves it whole
                lines = [_line(line, width) for line in lines[: height - 1]] if names else lines
                lines = ["\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[J"]
            _print(json.dumps(status) if args.json else "\n".join(lines))
        shown, unsure = status, live is None and status["run"] and status["run"]["status"] == RUNNING
        if not (args.watch and (live or unsure)):
            return 0
        time.sleep(1)


def _cmd_init_db(args: Any) -> int:
    _check_database(args.db, kept=True)
    try:
        with closing(connect(args.db)) as conn:
            init_schema(conn, store_task_status=True)
    except sqlite3.Error as error:
        raise DatabaseError(args.db, f"cannot be used: {error}", "try again later, or use another") from error
    _say(f"database {args.db} has the tables task_runs and pipeline_runs")
    return 0


# ---- The other names by which this file is known -------------------------------------------------------

for _module in ("messages", "engine", "writer", "progress", "db", "rlog", "demo", "cli"):  # of the original
    sys.modules.setdefault(f"{__name__}.{_module}", sys.modules[__name__])
    globals()[_module] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name == "console":
        return _rich_console() or _PlainConsole()
    if name == "Msg":
        from typing import Union

        return Union[MsgTaskStarted, MsgTaskProgress, MsgTaskFinished, MsgExecute]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
