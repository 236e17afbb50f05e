"""The tests of pipeloom.py. The name of a test is the promise that it proves.

    Helpers                  fixtures, workers and programs that tests share, and the model of a graph
    G1 to G9                 the nine promises, each with all the tests that prove it
    4.1 to 4.9               the interface: names, messages, context, own tables, pipelines, running,
                             progress, what is stored, command line and status
    Room: ...                single parts of the file, without threads: channel, roster, graph, signals and
                             delays, timer, renderer functions
    The file itself, README and examples

A program that only one test runs stands directly above that test. What is inside pipeloom.py is known to the
rooms only, and to two helpers: Clock (the timer of a run) and impatient (the seconds that a display gets).

    PIPELOOM_EXAMPLES=3000   how many random graphs are compared with the model (25)
    PIPELOOM_KILLS=1000      how often a run is killed and resumed (24)
"""

import _thread
import ast
import compileall
import copy
import dataclasses
import faulthandler
import gc
import io
import json
import logging
import os
import pickle
import platform
import py_compile
import queue
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from datetime import datetime
from decimal import Decimal
from functools import partial
from html.parser import HTMLParser
from importlib.util import cache_from_source, find_spec
from itertools import count, groupby
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

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
    Pipeline,
    SQLiteWriter,
    Task,
    run_pipeline,
)

HERE = Path(__file__).resolve().parent
FILE = HERE / "pipeloom.py"
EXAMPLES = int(os.environ.get("PIPELOOM_EXAMPLES", "25"))
KILLS = int(os.environ.get("PIPELOOM_KILLS", "24"))
WAIT = 20  # seconds; nothing takes as long unless it hangs
try:
    import rich
except ImportError:
    rich = None
needs_rich = pytest.mark.skipif(rich is None, reason="Rich is not installed")
once = pytest.mark.skipif(
    rich is None or os.environ.get("PIPELOOM_ONCE") == "0", reason="depends on neither Rich nor Python, and takes long"
)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and terminals")
if os.name != "nt":
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it keeps a file open
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script tests in its background


# ---- Helpers -------------------------------------------------------------------------------------------


PYPY = sys.implementation.name == "pypy"
NOT_ON_PYPY = {
    "its pools of processes fail, or hang, at least those of 7.3.11": """
        test_functions_run_in_processes_and_all_promises_stay
        test_a_task_that_hangs_in_a_pool_of_the_users_does_not_hold_up_the_exit_code
        test_short_tasks_share_the_way_to_a_process_and_each_has_an_end_of_its_own
        test_of_short_tasks_whose_process_dies_each_has_the_error_and_a_resume_does_them_once
        test_what_could_not_be_sent_has_the_error_and_takes_no_other_tasks_result
        test_what_does_not_travel_to_an_executor_is_one_error_at_once
        test_on_every_engine_a_process_is_killed_and_a_resume_finishes_exactly_once
        test_with_processes_the_functions_run_in_processes_that_end_with_the_run
        test_a_process_that_died_while_idle_is_replaced_and_one_that_is_killed_is_its_threads_own
        test_what_cannot_be_pickled_fails_its_task_only
        test_ctrl_c_at_a_terminal_lets_the_tasks_in_a_process_pool_finish
        test_a_pool_of_forked_processes_that_breaks_can_end_its_children
        test_no_forked_child_loses_the_signal_that_is_to_end_it""",
    "it closes what nobody has any more at some time": """
        test_sh_uses_files_again_but_keeps_none_of_their_text_and_none_at_its_end""",
    "it does not know which signals are ignored": "test_under_nohup_the_run_outlives_its_terminal",
    "an exception may come within its sqlite3, which makes another one of it": """
        test_whenever_an_exception_comes_in_the_calling_thread_the_run_ends[all]""",
    "its first calls are not short": """
        test_of_short_tasks_what_has_to_wait_for_a_long_one_is_queued_and_called_once
        test_ctrl_c_cancels_what_shares_the_way_with_a_long_task_and_has_not_been_called
        test_a_second_ctrl_c_cancels_what_has_begun_with_a_long_task_once""",
    "it says so in other words, or has no such thing": """
        test_a_bad_message_undoes_its_task_and_nobody_else_notices[commits_by_script]
        test_too_few_open_files_are_not_mistaken_for_a_full_disk
        test_it_works_in_an_interactive_session
        test_it_runs_in_a_subinterpreter
        test_a_stored_traceback_begins_at_the_users_first_frame_and_an_error_shows_its_root
        test_where_nothing_is_cached_the_file_is_compiled_once""",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """Each test ends by itself, with the threads, signal handlers and open files that it began with."""
    for reason, names in NOT_ON_PYPY.items() if PYPY else ():
        if {request.node.name, request.node.originalname} & set(names.split()):
            pytest.skip(f"on PyPy: {reason}")
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
    if PYPY:
        gc.collect()  # which closes them there
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


EARLY = {}  # by the name of the test that waits for it: what it starts in a home of its own


@pytest.fixture(scope="session", autouse=True)
def early(request, tmp_path_factory):
    """Programs that take long, and mostly wait. They start before the first test, and the tests that wait
    for their ends come last. {name of the test: [(home, process), ...]}"""
    items, processes = request.session.items, {}
    for name in {item.name for item in items} & set(EARLY):
        processes[name] = []
        for arguments, files in EARLY[name]:
            home = tmp_path_factory.mktemp("early")
            shutil.copy(str(FILE), str(home))
            for file, text in files.items():
                (home / file).write_text(text)
            with (home / "output").open("w") as output:
                options = {"cwd": str(home), "stdout": output, "stderr": output, "stdin": subprocess.DEVNULL}
                process = subprocess.Popen([sys.executable, *map(str, arguments)], **options)
            processes[name].append((home, process))
    if not hasattr(request.config, "workerinput"):  # pytest-xdist's workers run what they are told
        items[:] = sorted(items, key=lambda item: item is not items[0] and item.name in processes)
    yield processes
    for _, process in sum(processes.values(), []):
        process.kill()
        process.wait(WAIT)


@pytest.fixture
def db(tmp_path):
    return tmp_path / "test.db"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return py_compile.compile(str(FILE), str(tmp_path_factory.mktemp("compiled") / "pipeloom.pyc"))


@pytest.fixture
def homes(tmp_path, compiled):
    """Makes empty directories that hold only pipeloom.py, as a new user has it.

    And its byte code, as after the first import: each program in each home would take a tenth of a second longer.
    """

    def one():
        folder = Path(tempfile.mkdtemp(prefix="home", dir=str(tmp_path)))
        copy = shutil.copy2(str(FILE), str(folder))
        (folder / "__pycache__").mkdir()
        shutil.copy(compiled, cache_from_source(copy))
        return folder

    return one


@pytest.fixture
def home(homes):
    return homes()


@pytest.fixture
def many_switches():
    """Threads take turns after a microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def watch(monkeypatch):
    """watch(path, function): before each statement on the connection of this database's writer,
    function(connection) is called. What it raises, the statement raises."""
    connect, watched = sqlite3.connect, {}

    def connect_watched(path, *arguments, factory=sqlite3.Connection, **options):
        class Watched(factory):
            def execute(self, *arguments):
                watched.get(path, id)(self)
                return super().execute(*arguments)

        writes = path in watched and isinstance(threading.current_thread(), SQLiteWriter)
        return connect(path, *arguments, factory=Watched if writes else factory, **options)

    monkeypatch.setattr(sqlite3, "connect", connect_watched)
    return lambda path, function: watched.update({str(path): function})


@pytest.fixture
def impatient(monkeypatch):
    """A display is given up after 0.1 s, or when it is 1,000 messages behind."""
    monkeypatch.setattr(pipeloom._Display, "PATIENCE", 0.1)
    monkeypatch.setattr(pipeloom._Display, "BACKLOG", 1000)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pipeloom._Timer, "clock", clock)
    return clock


class Clock:
    """The clock of retries and deadlines: it stands still until a task moves it."""

    now = 0.0
    step = 0.0
    lock = threading.Lock()  # so that of two who move it none is lost

    def __call__(self):
        self.now += self.step
        return self.now

    def advance(self, ctx, seconds):
        with self.lock:
            self.now += seconds
        ctx.run.crew.timer.bell.ring()

    def fly(self, ctx):
        """From now on each look at the clock finds it a day later: whatever waits is due."""
        self.step = 86_400.0
        self.advance(ctx, 0)


@pytest.fixture
def same_logging():
    """The logging of the test process is afterwards as it was before."""
    root = logging.getLogger()
    before, levels = list(root.handlers), (root.level, pipeloom.logger.level)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(levels[0])
    pipeloom.logger.setLevel(levels[1])


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def bad_folder(tmp_path, monkeypatch):
    """The current folder is one of files that are no good, which a test must leave as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_bytes(b"this is no database, and longer than a header of SQLite is " * 20)
    execute(tmp_path / "other.db", "CREATE TABLE task_runs(id, state)")
    (tmp_path / "no.db-lock").mkdir()
    (tmp_path / "bad.py").write_text("def main(:\n")
    (tmp_path / "two.py").write_text("from pipeloom import *\na = Pipeline('a')\nb = Pipeline('b')")
    (tmp_path / "none.py").write_text("from pipeloom import *")
    (tmp_path / "now.py").write_text("from pipeloom import *\nPipeline('a').main()")
    (tmp_path / "pipe.py").write_text(
        "from pipeloom import *\npipe = Pipeline('a')\npipe.task(print, name='a')"
    )
    before, modules = contents(tmp_path), set(sys.modules)
    yield tmp_path
    assert contents(tmp_path) == before
    for name in {"bad", "two", "none", "now", "pipe"} - modules:
        sys.modules.pop(name, None)


def rows(path, sql="SELECT id, name, status FROM task_runs ORDER BY id", *parameters):
    conn = sqlite3.connect(str(path))
    try:
        return conn.execute(sql, parameters).fetchall()
    finally:
        conn.close()


def execute(path, script):
    """Run an SQL script on a database, as a program beside pipeloom would."""
    with closing(sqlite3.connect(str(path))) as conn:
        conn.executescript(script)


def nothing(task, q):
    pass


def nothing_each(ctx, item):
    pass


def generates(*arguments):
    yield 1


async def generates_too(*arguments):
    yield 1


def run(tasks, path, worker, **options):
    options.setdefault("progress", "none")
    return run_pipeline(tasks, path, worker_fn=worker, **options)


def run_one(tasks=(1,), path="x.db", worker=nothing, **options):
    run(tasks, path, worker, **options)


def run_alone(db, *messages, kind=SQLiteWriter, limit=0, **options):
    """Have a SQLiteWriter that is alone on a plain queue store these messages."""
    q = queue.Queue(maxsize=limit)
    writer = kind(db, q, **options)
    writer.start()
    for message in (*messages, SENTINEL):
        q.put(message, timeout=WAIT)
    try:
        writer.join(WAIT)
        assert not writer.is_alive()
    finally:
        q.join()  # also where the writer has failed


def declare_one(function=lambda *arguments: None, **options):
    pipe = Pipeline("x.db")
    pipe.task(function, **{"name": "a", **options})
    return pipe


def run_graph(*tasks):
    """Run a pipeline of tasks that are given as (name, what they come after)."""
    pipe = Pipeline("x.db", progress="none")
    for name, after in tasks:
        pipe.task(lambda ctx: None, name=name, after=after)
    pipe.run()


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


class Unshowable:
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


ODD_VALUES = [
    None, True, 2**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), 1e308, 1j, "", "\ud800", "a\0b", "x" * 10_000_000,
    b"\xff", Path("a") / "b", Decimal("1.5"), datetime(2026, 1, 1), {"a": 1}, {1: {2}}, [float("nan")], (), object(), int,
    Unshowable(), SENTINEL, {Unshowable(): 1},
]  # fmt: skip


def unshowable_error(text):
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    return Mute() if text is None else SyntaxError("bad", ("f", 1, 1, text))


ORIGINAL = (
    "CREATE TABLE task_runs(id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL,"
    " progress REAL NOT NULL DEFAULT 0.0, message TEXT, started_at TEXT, finished_at TEXT, result TEXT);"
)  # what the original pipeloom made


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


def at_once(function, cases):
    """Call it with each case's arguments, in a thread each: most of their time is spent in waiting."""
    with ThreadPoolExecutor(len(cases)) as pool:
        for future in [pool.submit(function, *case) for case in cases]:
            future.result()


def wait_for(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        threading.Event().wait(0.01)


def wait_until_stored(ctx, condition):
    """Wait in a task until a row of task_runs is committed of which this SQL is true."""
    with ctx.connect() as conn:
        while not conn.execute(f"SELECT 1 FROM task_runs WHERE {condition}").fetchone():
            ctx.sleep(0.01)


@contextmanager
def locked(path, seconds, mode="EXCLUSIVE"):
    """Another process holds the database's lock, for some seconds or until the end of the block."""
    program = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        f"c.execute('BEGIN {mode}'); print('ready', flush=True); time.sleep({seconds}); c.execute('ROLLBACK')"
    )
    with begun("-c", program, path, cwd=path.parent):
        yield


def run_beside_a_lock(path, moment, seconds, **options):
    """A run of four tasks beside another process that holds the lock: from before the start (moment 0), or
    from the task of that number on."""
    def work(item, q):
        if item == moment:
            holder.enter_context(locked(path, seconds))
        q.execute("INSERT INTO users VALUES (?, ?)", (str(item), "x"))

    run([-1], path, nothing, schema=USERS)
    with ExitStack() as holder:
        if moment == 0:
            holder.enter_context(locked(path, seconds))
        run(range(1, 5), path, work, workers=1, **options)


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


OLD_ROWS = {1: ("a", "done"), 2: ("b", "error"), 5: ("a", "done"), 9: ("c", "cancelled"), 10: ("b", "done")}


@pytest.fixture(scope="module")
def old_database(tmp_path_factory):
    """A database with what run 7 has stored: OLD_ROWS."""
    path = tmp_path_factory.mktemp("old") / "test.db"
    with closing(pipeloom.connect(path)) as conn:
        pipeloom.init_schema(conn, store_task_status=True)
        for id, (name, status) in OLD_ROWS.items():
            conn.execute(
                "INSERT INTO task_runs(id, name, status, run_id) VALUES (?, ?, ?, 7)", (id, name, status)
            )
        conn.commit()
    return str(path)


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


@contextmanager
def begun(*arguments, cwd, start=(sys.executable,), **options):
    """A child process that has just printed "ready"; it is killed at the end, if it still runs."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "universal_newlines": True, **options}
    process = subprocess.Popen([*start, *map(str, arguments)], cwd=str(cwd), **options)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WAIT)


def cli(*arguments):
    """Call the command line in this process; returns its exit code."""
    try:
        return pipeloom.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code


def vendored(home):
    """Move pipeloom.py to where a repository has copies of others' files."""
    (home / "repo" / "vendor").mkdir(parents=True)
    shutil.move(str(home / "pipeloom.py"), str(home / "repo" / "vendor"))


def in_a_child(function):
    """Call a function in a forked child, which may be killed in it; the child ends there."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(WAIT)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)


def example(name, *arguments, cwd, code=0):
    env = {"PYTHONPATH": str(HERE)}
    return python(HERE / "examples" / name, *arguments, cwd=cwd, code=code, env=env)


def folder_pipeline(db, files, **options):
    pipe = pipeloom.Pipeline(db, progress="none", resume=True, **options)
    pipe.task(lambda ctx, file: None, name="load", each=files)
    pipe.task(lambda ctx: " ".join(sorted(files)), name="report", after="load")
    pipe.task(lambda ctx: None, name="mail", after="report")
    return pipe


def on_terminal(program, arguments, cwd, size=(24, 80), env=None, act=None):
    """Run a program on a terminal of its own; returns its exit code and all that it wrote there.

    `act` is called with the process and the terminal's file descriptor, once it runs.
    """
    import pty
    import termios

    main, side = pty.openpty()
    resize(side, *size)
    before = termios.tcgetattr(side)
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=side, stdout=side, stderr=side, cwd=str(cwd),
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8", **(env or {})},
    )  # fmt: skip
    written = b""
    try:
        if act:
            act(process, side)
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


def resize(terminal, lines, columns):
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


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


THREE_TASKS = """
import pipeloom
pipe = pipeloom.Pipeline("t.db")
@pipe.task(each=[1, 2, 3])
def work(ctx, item): ctx.sleep(0.1)
if __name__ == "__main__": pipe.main()
"""


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


def check_stored_by_sleeper(home):
    """What SLEEPER has stored: a row of each task that is done, and no other."""
    done = sorted(int(name) for _, name, status in rows(home / "s.db") if status == "done")
    assert [x for (x,) in rows(home / "s.db", "SELECT x FROM t ORDER BY x")] == done
    return done


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
number = 3
"""


PIPELINE = """
import sys, pipeloom
pipe = pipeloom.Pipeline("p.db", progress="none", check={check}, retry_delay=0.01)
@pipe.task(each=["a", "b"])
def load(ctx, item):
    if item == "b" and not sys.flags.optimize and not __import__("os").path.exists("repaired"):
        raise ValueError("bad")
@pipe.task(after=load)
def report(ctx): return "r"
{main}
if __name__ == "__main__": pipe.main()
"""


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
    time.sleep(0.6)


def short_in_a_process(ctx, item):
    number, marker, _ = item
    ctx.execute("INSERT INTO made VALUES (?, ?)", (number, ctx.attempt))
    kind = number % 20
    if kind == 5:
        time.sleep(4 * pipeloom.QUICK)
    if kind == 6:
        raise ValueError(number)
    if kind == 7:
        ctx.put(MsgTaskFinished(ctx.task_id, "error", "now", message="told"))
    if kind == 8 and ctx.attempt == 1:
        raise ValueError("once")
    if kind == 9:
        ctx.put(Squared(lambda: None))
    if marker and number == 150:
        kill_once(marker)
    return number


def kill_once(marker):
    with suppress(FileExistsError):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        os.kill(os.getpid(), signal.SIGKILL)


async def awaited(ctx):
    pass


def reads_the_database(ctx):
    with ctx.connect() as conn:
        conn.execute("SELECT 1")


OUTCOMES = (
    "done", "done", "raises", "exits", "reports", "constraint", "cancels", "hangs", "second time", "third",
)  # fmt: skip


RUNS = 3


@st.composite
def graphs(draw):
    """Tasks as (name, items of each run or None, how these are given, what they come after, whether they
    start even if that failed, retries, outcomes by run and item)."""
    graph = []
    for number in range(draw(st.integers(1, 6))):
        count = draw(st.none() | st.integers(0, 3))
        items = None
        if count is not None:  # in later runs there are more, as files in a folder
            more = draw(st.lists(st.integers(0, 1), min_size=RUNS - 1, max_size=RUNS - 1))
            items = [list(range(count + sum(more[:run]))) for run in range(RUNS)]
        after = {draw(st.sampled_from([None, other])) for other, *_ in graph} - {None}
        outcomes = [
            [draw(st.sampled_from(OUTCOMES)) for _ in (items[run] if items else [0])] for run in range(RUNS)
        ]
        for outcome in outcomes:
            if "hangs" in outcome:  # they share the clock: where one hangs, all with its deadline do
                outcome[:] = ["hangs"] * len(outcome)
        how = draw(
            st.sampled_from([list, iter, lambda items: lambda: items, lambda items: lambda: iter(items)])
        )
        even = draw(st.booleans())
        graph.append((f"t{number}", items, how, after, even, draw(st.integers(0, 2)), outcomes))
    return graph


@st.composite
def kills(draw):
    """For each run None, or the call of a function at which an earlier try at this run is killed, and where:
    in the worker before or after its rows, or in the writer in the middle of its transaction."""
    where = [None] if os.name == "nt" else [None, None, "before", "after", "writer"]
    drawn = [(draw(st.sampled_from(where)), draw(st.integers(1, 6))) for _ in range(RUNS)]
    return [(place, number) if place else None for place, number in drawn]


class Killed:
    """A message at which the process is killed in its writer."""


def modelled(graph, run, run_id, before):
    """What the database must say after this run, {name: [status, attempts, the run that did it]}, and the
    status of each task that ran."""
    said, ran, newest, spoiled = dict(before), {}, {}, set()
    for name, items, how, after, even, retries, outcomes in graph:
        older = max([newest[upstream] for upstream in after], default=-1)
        if not even and spoiled & after:
            said[name] = ["cancelled", 0, run_id]
            newest[name] = run_id
            spoiled.add(name)
            ran[name] = "cancelled"
            continue
        if items is not None and said.get(name, ["done"])[0] == "cancelled":
            del said[name]  # the row of the whole stage
        newest[name] = -1
        names = [name] if items is None else [f"{name}[{item}]" for item in items[run]]
        for task, outcome in zip(names, outcomes[run]):
            if said.get(task, [""])[0] != "done" or said[task][2] < older:
                said[task] = [*settled(outcome, retries), run_id]
                ran[task] = said[task][0]
            newest[name] = max(newest[name], said[task][2])
            if said[task][0] != "done":
                spoiled.add(name)
    return said, ran


def settled(outcome, retries):
    """The status and the attempts of a task with this outcome."""
    fails = {"done": 0, "second time": 1, "third": 2, "cancels": 0}.get(outcome, 9)
    attempts = min(fails, retries) + 1
    if outcome == "cancels":
        return "cancelled", 1
    return ("done", attempts) if fails <= retries else ("error", attempts)


def declared(graph, run, run_id, db, clock, kill=None):
    """The pipeline of a graph in a run; `kill` is one of kills()."""
    place, at = kill or ("", 0)
    calls = count(1)
    pipe = Pipeline(
        db, workers=4, check=False, progress="none", retry_delay=0, resume=True, handlers={Killed: die},
        schema="CREATE TABLE IF NOT EXISTS made(task TEXT, run INT, n INTEGER CHECK (n < 2), UNIQUE (task, run, n))",
    )  # fmt: skip
    for name, items, how, after, even, retries, outcomes in graph:

        def work(ctx, item=0, outcomes=outcomes[run]):
            outcome, dies = outcomes[item], next(calls) == at
            if dies and place == "before":
                die()
            ctx.executemany("INSERT INTO made VALUES (?, ?, ?)", ((ctx.name, run_id, n) for n in range(2)))
            if dies and place == "after":
                die()
            elif dies and place == "writer":
                ctx.put(Killed())
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

        options = {
            "even_if_failed": even,
            "retries": retries,
            "timeout": 60 if "hangs" in outcomes[run] else None,
        }
        each = None if items is None else how(items[run])
        pipe.task(work, name=name, each=each, after=after, **options)
    return pipe


HANG = 15  # seconds; what takes as long in a process of its own hangs


def as_an_ordinary_user():
    """For preexec_fn: the permissions of files count for root's child, too (this Python may be in /root)."""
    if os.geteuid() == 0:
        import ctypes

        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; gone from the exec on
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


needs_permissions = pytest.mark.skipif(
    os.name == "nt" or (os.geteuid() == 0 and not sys.platform.startswith("linux")),
    reason="permissions of files do not count here",
)


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


# ---- G1 Rows if and only if done -----------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # its other thread is faulthandler's
@given(graphs(), kills())
@settings(max_examples=EXAMPLES, deadline=None)
def test_whatever_the_graph_the_database_says_what_the_model_says(tmp_path_factory, graph, kills):
    """Each run is resumed, some after one that was killed; the rows are there if and only if the task is done."""
    faulthandler.dump_traceback_later(60, exit=True)  # of one example
    db, clock, said, made, run_id = tmp_path_factory.mktemp("graph") / "test.db", Clock(), {}, set(), 0

    def look():
        assert rows(db, "PRAGMA integrity_check") == [("ok",)]
        stored = {
            name: row for name, *row in rows(db, "SELECT name, status, attempts, run_id FROM task_runs")
        }
        made.update((name, id) for name, (status, _, id) in stored.items() if status == "done")
        assert sorted(rows(db, "SELECT task, run FROM made")) == sorted([*made, *made])
        return stored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeloom._Timer, "clock", clock)
        for run, kill in enumerate(kills):
            if kill:
                run_id += 1
                in_a_child(declared(graph, run, run_id, db, clock, kill).run)
                expected, ran = modelled(graph, run, run_id, said)
                found = look()
                for name, (status, attempts, id) in found.items():
                    if id < run_id:
                        assert said[name] == [status, attempts, id]
                    elif status in ("queued", "running"):
                        assert name in ran
                    else:
                        assert expected[name] == [status, attempts, id]
                said = found
            run_id += 1
            result = declared(graph, run, run_id, db, clock).run()
            said, ran = modelled(graph, run, run_id, said)
            assert look() == said
            counts = [list(ran.values()).count(status) for status in ("done", "error", "cancelled")]
            assert [result.done, result.error, result.cancelled] == counts


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


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_first_finish_counts_and_what_comes_after_it_is_dropped_or_refused(db, caplog, elsewhere):
    def work(task, ctx):
        ctx.put(User("early", "x"))
        ctx.put(MsgTaskFinished(1, "done", "t1", result="first"))
        ctx.put(MsgTaskFinished(1, "error", "t2", result="second"))
        ctx.put(MsgTaskProgress(1, 1, 5))
        with pytest.raises(pipeloom.MessageRefused, match="task 'one' has already finished; User was not stored"):
            ctx.put(User("late", "x"))
        with pytest.raises(pipeloom.MessageRefused, match=r"execute\(\) was not stored"):
            ctx.execute("INSERT INTO users VALUES (1, 2)")
        raise RuntimeError("after all")

    with ThreadPoolExecutor(1) if elsewhere else nullcontext() as executor:
        run([Task(1, "one")], db, work, schema=USERS, handlers={User: insert_user}, executor=executor)
    assert rows(db, "SELECT status, result, progress FROM task_runs") == [("done", "first", 1.0)]
    assert rows(db, "SELECT * FROM users") == [("early", "x")]
    assert "raised an exception after it had finished, which is ignored: RuntimeError: after all" in caplog.text


@pytest.mark.parametrize("atomic", [True, False])
def test_a_thread_of_a_task_may_finish_it_with_the_rows_so_far(db, atomic):
    def work(task, ctx):
        ctx.execute("INSERT INTO users VALUES (?, ?)", ("before", "x"))
        other = threading.Thread(target=ctx.put, args=(MsgTaskFinished(1, "done", "t1"),))
        other.start()
        other.join(WAIT)
        with pytest.raises(pipeloom.MessageRefused, match=r"execute\(\) was not stored"):
            ctx.execute("INSERT INTO users VALUES (?, ?)", ("after", "x"))

    run([Task(1, "one")], db, work, schema=USERS, atomic=atomic)
    assert rows(db, "SELECT key FROM users") == [("before",)]
    assert rows(db, "SELECT status FROM task_runs") == [("done",)]


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


def test_a_message_that_fails_after_the_finish_was_applied_leaves_no_done_behind(db):
    class Late(SQLiteWriter):
        def handle(self, message):
            super().handle(message)
            if type(message) is MsgTaskFinished and message.task_id == 2:
                raise LookupError("too late")

    starts = [MsgTaskStarted(id, f"task {id}", "now") for id in (1, 2, 3)]
    finishes = [MsgTaskFinished(id, "done", "now") for id in (1, 2, 3)]
    run_alone(db, *starts, *finishes, kind=Late)
    assert [row[2] for row in rows(db)] == ["done", "running", "done"]


@pytest.mark.parametrize(
    "given, said",
    [
        ([("a",), ("b", "x", "c")], "Incorrect number of bindings"),
        ([("a", "x"), {"k": 3, "n": 4}], ""),
        ([("a", "x"), 3], ""),
    ],
)
def test_rows_that_do_not_fit_their_statement_are_an_error_and_none_is_stored(db, given, said):
    def work(task, ctx):
        ctx.executemany("INSERT INTO users VALUES (?, ?)", given)

    result = run(["t"], db, work, schema=USERS, check=False)
    assert result.error == 1 and said in result.failures[0].message
    assert rows(db, "SELECT * FROM users") == []


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


@pytest.mark.parametrize("how", ["rollback()", "execute()", "with", "suppressed"])
def test_a_handler_that_rolls_back_fails_its_task_and_no_other(db, how):
    def handler(conn, user):
        insert_user(conn, user)
        if user.key == "bad" and how == "with":
            with conn:
                raise LookupError("for this")
        elif user.key == "bad":
            with suppress(sqlite3.DatabaseError) if how == "suppressed" else nullcontext():
                conn.rollback() if how == "rollback()" else conn.execute("ROLLBACK")
            conn.execute("INSERT INTO users VALUES ('goes on', 'x')")

    result = run(
        ["a", "bad", "c"],
        db,
        lambda t, q: q.put(User(t, "x")),
        schema=USERS,
        handlers={User: handler},
        check=False,
    )
    said = {"with": "LookupError: for this", "suppressed": "MessageRefused: a statement rolled back"}
    assert result.failures[0].message.startswith(said.get(how, "MessageRefused: a handler rolled back"))
    assert rows(db, "SELECT key FROM users ORDER BY key") == [("a",), ("c",)]
    assert [row[2] for row in rows(db)] == ["done", "error", "done"]


@pytest.mark.parametrize(
    "what",
    [
        "locked file",
        "no directory",
        "SystemExit",
        "locked table",
        "no such table: locked",
        "no such column: disk_is_full",
    ],
)
def test_a_handlers_own_trouble_is_its_tasks_and_is_not_waited_for(db, what):
    other = db.parent / "other.db"
    execute(other, "CREATE TABLE x(y)")
    conn = sqlite3.connect(str(other), isolation_level=None)
    conn.execute("BEGIN EXCLUSIVE")

    def handler(writers, user):
        if what == "SystemExit":
            sys.exit("no")
        elif what == "locked table":
            for _ in writers.execute("SELECT * FROM users"):
                writers.execute("DROP TABLE users")
        elif what.startswith("no such"):
            raise sqlite3.OperationalError(what)  # which only sounds like trouble that passes
        path = str(other) if what == "locked file" else "/no/such/dir/x.db"
        with closing(sqlite3.connect(path, timeout=0)) as mine:
            mine.execute("INSERT INTO x VALUES (1)")

    def work(task, ctx):
        if task == "bad":
            ctx.execute("INSERT INTO users VALUES (1, 2)")
            ctx.put(User(1, 2))

    result = run(["a", "bad", "c"], db, work, schema=USERS, handlers={User: handler}, check=False)
    conn.close()
    assert (result.done, result.error) == (2, 1) and rows(db, "SELECT * FROM users") == []
    assert not what.startswith("no such") or result.failures[0].message == f"OperationalError: {what}"


def test_with_atomic_false_rows_are_stored_as_they_come(db):
    def work(task, ctx):
        ctx.executemany("INSERT INTO users VALUES (?, ?)", ((f"{task}-{i}", i) for i in range(2_500)))
        if task == "bad":
            raise RuntimeError("late")

    result = run(["bad", "good"], db, work, schema=USERS, atomic=False, check=False)
    assert (result.done, result.error) == (1, 1)
    counts = dict(rows(db, "SELECT substr(key, 1, 3), count(*) FROM users GROUP BY 1"))
    assert counts == {"goo": 2_500, "bad": 2_500}


def test_with_atomic_false_the_rows_of_a_thread_and_its_messages_keep_their_order(db):
    def handler(conn, user):
        seen.append(conn.execute("SELECT count(*) FROM users").fetchone()[0])

    def work(task, ctx):
        for number in range(3):
            ctx.execute("INSERT INTO users VALUES (?, 'x')", (number,))
            ctx.put(User("x", "x"))

    seen = []
    run([1], db, work, schema=USERS, atomic=False, handlers={User: handler})
    assert seen == [1, 2, 3]


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
    assert told[0].startswith("refused: IntegrityError: UNIQUE constraint failed: users.key; row 2 of 1,000 is")


def test_a_stream_past_its_deadline_is_refused_and_stores_no_more(db, clock):
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


ROLLS_BACK = {
    "OR ROLLBACK": "INSERT OR ROLLBACK INTO users VALUES ('there', 'x')",
    "ON CONFLICT ROLLBACK": "INSERT INTO strict VALUES (1)",
    "RAISE(ROLLBACK)": "INSERT INTO guarded VALUES (1)",
}


GUARDED = f"""{USERS}; CREATE TABLE stored(key); CREATE TABLE guarded(x);
    CREATE TABLE strict(x UNIQUE ON CONFLICT ROLLBACK); INSERT INTO strict VALUES (1);
    INSERT INTO users VALUES ('there', 'x');
    CREATE TRIGGER no BEFORE INSERT ON guarded BEGIN SELECT RAISE(ROLLBACK, 'no'); END"""


WAYS = ("execute", "executemany", "executescript", "cursor, execute", "cursor, executemany", "cursor, executescript")


@pytest.mark.parametrize("then", [*WAYS, "opens a savepoint and writes", "begins and writes"])
@pytest.mark.parametrize("how", ROLLS_BACK)
def test_a_handler_that_goes_on_after_a_rollback_fails_its_task_and_stores_nothing(db, how, then):
    """Its writes would be in autocommit, once for each replay, or in a transaction that nobody commits."""

    def handler(conn, user):
        if user.name == "bad":
            with suppress(sqlite3.IntegrityError):
                conn.execute(ROLLS_BACK[how])
            if then not in WAYS:
                conn.execute("SAVEPOINT mine" if "savepoint" in then else "BEGIN")
            writes = getattr(conn.cursor() if "cursor" in then else conn, then.rpartition(" ")[2], conn.execute)
            many = [(user.key,)] if "many" in then else (user.key,)
            writes(*[f"INSERT INTO stored VALUES ({user.key})"] if "script" in then else [INTO_STORED, many])
        else:
            conn.execute(INTO_STORED, (user.key,))

    bad = (7, 30)
    result = run(
        range(60), db, lambda n, q: q.put(User(str(n), "bad" if n in bad else "x")), workers=4, check=False,
        schema=GUARDED, handlers={User: handler},
    )  # fmt: skip
    stored = sorted(int(key) for (key,) in rows(db, "SELECT key FROM stored"))
    assert stored == [n for n in range(60) if n not in bad]
    assert (result.done, result.error) == (58, 2)
    assert sorted(failure.task for failure in result.failures) == ["30", "7"]


INTO_STORED = "INSERT INTO stored VALUES (?)"


def in_one_batch(db, tasks, sql, trace=None, **options):
    """Tasks one after the other whose statements meet in one transaction: the writer is held up before."""
    taken, goes_on = threading.Event(), threading.Event()

    def handler(conn, user):
        conn.set_trace_callback(trace)
        taken.set()
        assert goes_on.wait(WAIT)

    def work(task, ctx):
        if task == "first":
            ctx.put(User("first", "x"))
            ctx.put(pipeloom.MsgTaskProgress(ctx.task_id, 1, 2))
        elif task == "last":
            assert taken.wait(WAIT)
            goes_on.set()
        else:
            for statement in sql[task]:
                ctx.execute(*([statement] if isinstance(statement, str) else statement))

    tasks = ["first", *tasks, "last"]
    return run(tasks, db, work, workers=1, handlers={User: handler}, check=False, **options)


def test_rows_of_the_same_statement_from_different_tasks_are_stored_by_one(db):
    traced = []
    sql = {key: [("INSERT INTO users VALUES (?, ?)", (key, "x"))] for key in "abc"}
    result = in_one_batch(db, "abc", sql, traced.append, schema=USERS)
    assert result.done == 5 and rows(db, "SELECT key FROM users ORDER BY 1") == [("a",), ("b",), ("c",)]
    assert sum("INTO users" in statement for statement in traced) == 1


def test_a_savepoint_that_a_task_leaves_open_lets_no_other_undo_what_is_done(db):
    sql = {
        "opens": ["SAVEPOINT mine", "INSERT INTO stored VALUES ('opens')"],
        "between": ["INSERT INTO stored VALUES ('between')"],
        "undoes": ["ROLLBACK TO mine", "INSERT INTO stored VALUES ('undoes')"],
    }
    in_one_batch(db, list(sql), sql, schema="CREATE TABLE stored(key)")
    done = {name for _, name, status in rows(db) if status == "done" and name in sql}
    assert {key for (key,) in rows(db, "SELECT key FROM stored")} == done
    assert "between" in done


@pytest.mark.parametrize("how", ["a statement of its own", "another connection"])
def test_a_lock_that_a_handler_meets_by_its_own_doing_fails_its_task_and_no_other(db, how):
    """The cure of the former must not wait for this one, which the writer itself holds."""

    def handler(conn, user):
        insert_user(conn, user)
        if user.key != "1":
            return
        if how == "another connection":
            other = sqlite3.connect(str(db), timeout=0)
            try:
                other.execute("INSERT INTO users VALUES ('other', 'x')")
            finally:
                other.close()
        else:
            with closing(conn.execute("SELECT * FROM users")) as cursor:
                cursor.fetchone()
                conn.execute("DROP TABLE users")  # database table is locked

    schema = USERS + "; INSERT INTO users VALUES ('z', 'x')"
    result = run(range(3), db, lambda n, q: q.put(User(str(n), "x")), schema=schema, handlers={User: handler},
                 check=False, busy_timeout=5)  # fmt: skip
    assert (result.done, result.error) == (2, 1)
    assert "locked" in result.failures[0].message


@pytest.mark.parametrize("atomic", [True, False], ids=["held", "streamed"])
@pytest.mark.parametrize("how", ["execute", "executemany", "upsert"])
def test_threads_that_a_task_starts_may_all_store_at_once(db, many_switches, how, atomic):
    """Each row lands in its own table, and all are there."""
    many, errors = range(10_000), []

    def store(ctx, table):
        sql = f"INSERT INTO {table} VALUES (?)"
        try:
            for n in many:
                if how == "execute":
                    ctx.execute(sql, (n,))
                elif how == "upsert" and n % 10 == 0:
                    ctx.upsert(table, [{"x": n + more} for more in range(10)], key="x")
                elif how == "executemany" and n % 10 == 0:
                    ctx.executemany(sql, [(n + more,) for more in range(10)])
        except BaseException as error:
            errors.append(error)

    def work(task, ctx):
        threads = [threading.Thread(target=store, args=(ctx, table)) for table in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)

    schema = "".join(f"CREATE TABLE {table}(x PRIMARY KEY);" for table in "abcd")
    result = run([1], db, work, schema=schema, atomic=atomic, check=False)
    assert not errors and not result.failures, (errors, result.failures)
    for table in "abcd":
        assert [x for (x,) in rows(db, f"SELECT x FROM {table} ORDER BY x")] == list(many)


# ---- G2 Kill it anywhere, rerun with resume, and it finishes exactly once ------------------------------


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
            pipeline().main(["--resume"])
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
HOW = ["SIGKILL", "SIGKILL", "signals"][: 2 if PYPY else 3]  # whose sqlite3 makes another error of a signal's
EARLY["test_killed_at_random_moments_and_resumed_every_row_is_there_exactly_once"] = [
    (["killed.py", KILLS // 2, os.getpid() + number, how], {"killed.py": KILLED})
    for number, how in enumerate(HOW if os.name != "nt" else [])
]


@needs_posix
def test_killed_at_random_moments_and_resumed_every_row_is_there_exactly_once(early):
    """By SIGKILL, and by one to three of the signals that end a run."""
    faulthandler.dump_traceback_later(60 + KILLS, exit=True)
    for home, process in early["test_killed_at_random_moments_and_resumed_every_row_is_there_exactly_once"]:
        code = process.wait(60 + KILLS)
        assert code == 0, (process.args, (home / "output").read_text()[-3000:])


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


def test_a_dependent_runs_again_even_if_the_process_died_before_it(db):
    folder_pipeline(db, ["a"]).run()
    pipe = pipeloom.Pipeline(db, progress="none", resume=True)
    pipe.task(lambda ctx, file: None, name="load", each=["a", "b"])  # and dies here
    assert pipe.run().done == 1
    assert folder_pipeline(db, ["a", "b"]).run().done == 2
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'report'") == [("a b",)]


def test_the_row_of_a_stage_that_could_not_start_is_removed_once_it_runs(db):
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


class Named:
    """A task that has a name and no id."""

    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize(
    "kind, tasks",
    [
        (list, [Task(1, "a"), Task(2, "a"), Named("a")]),
        (iter, [Task(1, "a"), Task(2, "a"), Named("a")]),
        (list, [Task(1, "a"), Task(2, "a"), Task(3, "a"), Named("a"), Named("a")]),
        (list, [Named("a"), Task(1, "a")]),
        (list, [Named("a"), Task(1, "a"), Named("a"), Task(2, "b")]),
        (list, [Named("a"), Named("a"), Task(2, "a")]),
    ],
)
def test_resume_knows_each_of_the_tasks_with_one_name_whether_they_have_ids_or_not(db, kind, tasks):
    assert run(kind(tasks), db, nothing, resume=True).done == len(tasks)
    for _ in range(3):
        again = run(kind(tasks), db, nothing, resume=True)
        assert (again.done, again.skipped) == (0, len(tasks))
    assert len(rows(db)) == len(tasks)


def test_where_no_id_is_left_for_a_task_without_one_that_is_said(db):
    for _ in range(2):
        with pytest.raises(pipeloom.UsageError, match="no task_id is left for 'b': another task has 9223372036854775806"):
            run([Task(2**63 - 2, "a"), "b"], db, nothing)
    assert run([Task(2**63 - 2, "a"), Task(5, "c"), Task(-(2**63), "d")], db, nothing).done == 3


def test_a_dependent_runs_again_after_a_run_in_which_only_some_tasks_were_cancelled(db):
    """Items of one name that the next run does not give any more have been done meanwhile."""
    def load(ctx, item):
        if item == "y":
            raise pipeloom.TaskCancelled("not this one")

    def pipeline(items):
        pipe = Pipeline(db, progress="none")
        pipe.task(load, name=lambda item: f"file {item}", each=items)
        pipe.task(nothing_each, name="report", each=["p", "q"], after="load")
        return pipe.run(resume=True)

    assert pipeline(["a"]).done == 3
    assert pipeline(["a", "x", "y"]).cancelled == 2
    for done, skipped in ((2, 1), (0, 3)):
        result = pipeline(["a"])
        assert (result.done, result.skipped) == (done, skipped)


def test_a_later_run_finds_names_by_an_index_and_ids_without(tmp_path):
    for name, tasks, indexes in ("n.db", ["a"], [("task_runs_name",)]), ("i.db", [Task(1, "a")], []):
        for _ in range(2):
            run(tasks, tmp_path / name, nothing)
        assert rows(tmp_path / name, "SELECT name FROM sqlite_master WHERE type = 'index'") == indexes


@pytest.mark.parametrize("naming", [None, lambda item: f"file {item}"])
def test_a_dependent_runs_again_even_if_the_new_item_that_was_done_has_gone(tmp_path, naming):
    """A file is loaded, the process dies before the report, and the file is moved away."""
    def pipeline(items, report=lambda ctx: None, other=None):
        pipe = Pipeline(tmp_path / "x.db", progress="none", check=False)
        pipe.task(nothing_each, name=naming, each=items)
        pipe.task(report, name="report", after=nothing_each)
        if other:
            pipe.task(other, name="other")
        return pipe.run(resume=True)

    assert pipeline(["a"]).done == 2
    assert pipeline(["a"]).skipped == 2
    assert pipeline(["a", "c"], report=lambda ctx: 1 / 0).error == 1
    execute(tmp_path / "x.db", "UPDATE task_runs SET status = 'done', run_id = 1 WHERE name = 'report'")
    result = pipeline(["a"])  # as if the process had died before anything of that report was stored
    assert (result.done, result.skipped) == (1, 1)
    assert pipeline(["a"]).skipped == 2
    for _ in range(3):  # and what fails elsewhere makes nothing run again
        result = pipeline(["a"], other=lambda ctx: 1 / 0)
        assert (result.done, result.skipped, result.error) == (0, 2, 1)


# ---- G3 No hang ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize(
    "errors",
    [
        ["database or disk is full", "disk I/O error", "interrupted"],  # which pass by themselves, at times
        ["database is locked"],
        ["SQL logic error"],
        [sqlite3.DatabaseError("database disk image is malformed")],
        [MemoryError()],
    ],
    ids=repr,
)
def test_whichever_statement_fails_the_run_ends_honestly(tmp_path, watch, errors, forever):
    """SQLite's own anomaly method: let the 1st, 2nd, 3rd... statement fail, or all from there on, until a
    run gets through. Errors of one kind take turns."""
    template = tmp_path / "template.db"
    run([], template, nothing, schema=USERS)

    def one(nth):
        def fail(conn):
            number = next(numbers)
            if number == nth or (number > nth and forever):
                raise error

        path, numbers, result = tmp_path / f"{nth}.db", count(1), None
        error = errors[nth % len(errors)]
        error = sqlite3.OperationalError(error) if isinstance(error, str) else error
        shutil.copy(str(template), str(path))
        watch(path, fail)
        try:
            result = run(list("abc"), path, lambda t, q: q.put(User(t, "x")), schema=USERS, workers=1,
                         handlers={User: insert_user}, check=False, busy_timeout=0.1)  # fmt: skip
        except pipeloom.PipeloomError as failure:
            assert str(error) in str(failure)
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
        done = {name for _, name, status in rows(path) if status == "done"}
        assert {key for (key,) in rows(path, "SELECT key FROM users")} == done
        if result:  # then it speaks of every task, and what it says is stored
            assert result.done == len(done) and result.done + result.error == 3
            assert {failure.task for failure in result.failures} == set("abc") - done
        if nth == 45:
            assert next(numbers) <= nth and result.ok, "no run got through"

    at_once(one, [(nth,) for nth in range(1, 46, 4 if forever else 1)])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rollback_that_fails_is_taken_again_and_no_other_error_comes_of_it(db, watch, number):
    """The rollback after the `number`th time that its message was tried: in a batch, or alone."""

    def refuse(conn, message):
        tried.append(message)
        raise ValueError("no good")

    def fail(conn):
        if len(tried) == number and conn.in_transaction and not failed:
            failed.append(number)
            raise MemoryError

    tried, failed = [], []
    watch(db, fail)
    result = run(["a"], db, lambda task, ctx: ctx.put(User("a", "x")), handlers={User: refuse}, check=False)
    assert failed or len(tried) < number  # it may have come alone, and need no third try
    assert result.failures[0].message in ("ValueError: no good", "MemoryError")


def test_what_another_run_raises_in_a_task_is_an_error_of_that_task_like_any_other(db):
    """As WriterFailed is, where the disk of that one is full."""
    kinds = [pipeloom.WriterFailed, pipeloom.RunInProgress, pipeloom.DatabaseError]

    def work(kind, ctx):
        raise kind("inner.db", "has no room", "free some")

    async def work_async(kind, ctx):
        work(kind, ctx)

    for worker in (work, work_async):
        result = run(kinds, db, worker, workers=2, timeout=WAIT, check=False)
        assert result.error == 3 and all("inner.db" in failure.message for failure in result.failures)


def test_the_writer_dies_and_no_worker_stays_blocked_even_where_another_run_has_failed_before(db, watch):
    def work(task, ctx):
        if task == 0:
            raise pipeloom.WriterFailed("inner.db", "has no room", "free some")
        for _ in ctx.track(range(3_000)):
            ctx.put(MsgTaskProgress(ctx.task_id + 1000, 1, 2))
        dying.set()

    def fail(conn):
        if dying.is_set():
            raise sqlite3.OperationalError("SQL logic error")

    dying = threading.Event()
    watch(db, fail)
    with pytest.raises(pipeloom.WriterFailed, match="test.db"):
        run(range(8), db, work, workers=3, check=False)


def test_the_writer_dies_and_no_worker_stays_blocked(db, watch):
    def work(task, q):
        for step in range(100):
            q.put(MsgTaskProgress(q.task_id + 1000, step, 100))
        dying.set()

    def fail(conn):
        if dying.is_set():
            raise MemoryError("no memory for the batch")

    dying = threading.Event()
    watch(db, fail)
    with pytest.raises(pipeloom.WriterFailed, match="failed: MemoryError: no memory for the batch"):
        run(range(5_000), db, work, workers=4)


def test_a_writer_that_cannot_open_refuses_its_producers_and_says_why(tmp_path):
    starts = [MsgTaskStarted(number, "x", "now") for number in range(20)]
    with pytest.raises(pipeloom.PipeloomError, match="there is no directory"):
        run_alone(tmp_path / "missing" / "x.db", *starts, limit=1)


def test_a_stream_that_is_told_to_stop_ends_without_a_traceback(db, watch, monkeypatch):
    def work(task, ctx):
        ctx.execute("INSERT INTO users VALUES ('a', 'b')")
        streaming.set()
        ctx.put(MsgTaskProgress(ctx.task_id, 1, 2))
        ctx.sleep(WAIT)

    def fail(conn):
        if streaming.is_set():
            raise sqlite3.DatabaseError("database disk image is malformed")

    streaming, escaped = threading.Event(), []
    watch(db, fail)
    monkeypatch.setattr(threading, "excepthook", escaped.append)
    with pytest.raises(pipeloom.WriterFailed, match="malformed"):
        run([1], db, work, schema=USERS, atomic=False)
    assert not escaped


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
        assert re.search(r"(disk I/O error|disk is full), still after .* free some disk space", done.stderr)
        assert rows(home / "job.db", "PRAGMA integrity_check") == [("ok",)]
    python("fill.py", cwd=home, code=0)
    assert rows(home / "job.db", "SELECT count(*), count(DISTINCT item) FROM made") == [(200, 200)]
    assert rows(home / "job.db", "SELECT DISTINCT status FROM task_runs") == [("done",)]


def test_a_full_disk_ends_the_run_and_with_room_the_next_finishes_it(homes, caplog):
    def one(wal):
        folder = homes()
        db = folder / "job.db"
        with small_disk(folder):
            with pytest.raises(pipeloom.WriterFailed, match="full, still after .* free some disk space"):
                fill(db, wal=wal, busy_timeout=0.3)
            stored = rows(db, "SELECT item FROM made")
            assert rows(db, "SELECT id - 1 FROM task_runs WHERE status = 'done'") == stored
            assert len(stored) < 200 and rows(db, "PRAGMA integrity_check") == [("ok",)]

            grow = ["mount", "-o", "remount,size=40m", str(folder)]
            room = threading.Timer(1, subprocess.run, [grow], {"check": True})  # while the next run waits
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
    assert caplog.text.count("full; trying again for up to 10 s") == 2


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
        assert re.match(r"MemoryError|pipeloom\.\w+: ", done.stderr.splitlines()[-1]), done.stderr
    python("job.py", cwd=home, code=0)
    assert rows(home / "job.db", "SELECT count(*), count(DISTINCT item) FROM made") == [(3000, 3000)]
    assert rows(home / "job.db", "SELECT DISTINCT status FROM task_runs") == [("done",)]


@pytest.mark.parametrize("table", ["users", "task_runs"])
def test_damaged_pages_end_the_run_with_one_clear_error(db, table):
    run(range(2_000), db, lambda item, q: q.execute("INSERT INTO users VALUES (?, ?)", (str(item), "x" * 80)),
        schema=USERS)  # fmt: skip
    (root,) = rows(db, "SELECT rootpage FROM sqlite_master WHERE name = ?", table)[0]
    with db.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)
    error = pipeloom.WriterFailed if table == "users" else pipeloom.DatabaseError
    with pytest.raises(error, match="malformed; restore it(| from a backup) or use another file"):
        run(["new"] * 100, db, lambda item, q: q.execute("INSERT INTO users VALUES ('new', '')"))


def test_an_interrupted_statement_is_retried(db, watch):
    """As by a connection's interrupt(), which any thread may call."""
    looks, interrupted = count(1), []

    def interrupt():  # SQLite calls it every 20 steps of a statement, and stops if that is true
        number = next(looks)
        if number in moments:
            interrupted.append(number)
        return number in moments

    def work(item, q):
        q.executemany("INSERT INTO users VALUES (?, '')", [(str(k),) for k in range(20_000)])

    moments = {2**power for power in range(4, 12)}
    run([], db, nothing, schema=USERS)
    watch(db, lambda conn: conn.set_progress_handler(interrupt, 20))
    assert run(["one"], db, work).done == 1
    assert len(interrupted) > 5 and rows(db, "SELECT count(*) FROM users") == [(20_000,)]


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


def test_a_timeout_is_raised_as_a_pipeline_error(db, clock):
    def work(task, q):
        q.put(MsgTaskStarted(q.task_id, "a", "now"))
        clock.advance(q, 61)
        q.sleep(WAIT)

    with pytest.raises(pipeloom.PipelineError, match="timed out after 0.5 s") as error:
        run(["a"], db, work, timeout=0.5)
    assert isinstance(error.value.__cause__, TimeoutError)


def test_an_attempt_that_times_out_is_retried(db, clock):
    def work(task, ctx):
        if ctx.attempt == 1:
            clock.advance(ctx, 61)
            ctx.sleep(WAIT)
        return ctx.attempt

    run(["a"], db, work, timeout=60, retries=1, retry_delay=0)
    assert rows(db, "SELECT status, attempts, result FROM task_runs") == [("done", 2, "2")]


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


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_coroutine_raises_after_its_deadline_is_not_said_by_asyncio(db, clock, error, caplog):
    import asyncio

    async def work(task, ctx):
        asyncio.get_running_loop().call_later(0.01, clock.advance, ctx, 61)
        try:
            await asyncio.sleep(WAIT)
        except asyncio.CancelledError:
            raise error("late") from None

    assert run(["a"], db, work, timeout=60, check=False).failures[0].message == "timed out after 60 s"
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_coroutine_raises_is_the_cause_of_the_error(db, error):
    async def work(task, ctx):
        raise error("no")

    with pytest.raises(pipeloom.PipelineError) as caught:
        run(["a"], db, work)
    assert type(caught.value.__cause__) is error


@pytest.mark.parametrize("how", ["finished", "refused"])
def test_a_task_that_has_ended_and_goes_on_past_its_deadline_holds_no_worker(db, clock, how, caplog):
    def work(task, ctx):
        if task == "b":
            return
        if how == "finished":
            ctx.put(MsgTaskFinished(ctx.task_id, "done", "now"))
        else:
            ctx.put(MsgExecute("INSERT INTO nowhere VALUES (1)"))
            wait_for(lambda: ctx.cancelled)
        clock.advance(ctx, 61)
        over.wait(WAIT)

    over = threading.Event()
    run(["a", "b"], db, work, workers=1, timeout=60, atomic=False, check=False)
    over.set()
    assert [row[2] for row in rows(db)] == ["done" if how == "finished" else "error", "done"]
    assert "task 'a' has ended, but its function is still running: it timed out after 60 s" in caplog.text


@pytest.mark.parametrize("late", ["finish", "deadline"])
def test_late_messages_of_a_task_with_many_rows_block_no_other_task(db, clock, late):
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


def test_a_timeout_is_stored_even_if_the_stack_cannot_be_read(db, clock):
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
    def work(task, ctx):
        monkeypatch.setattr(Clock, "__call__", lambda self: 1 / 0)
        with suppress(ZeroDivisionError):
            clock.advance(ctx, 0)
        over.wait(WAIT)

    over = threading.Event()
    threading.Timer(0.3, over.set).start()
    with pytest.raises(ZeroDivisionError):
        run(["a"], db, work, timeout=60)


def test_a_task_that_hangs_does_not_hold_the_process_at_its_end(home):
    program = """if 1:
        import time, pipeloom
        def work(task, ctx): time.sleep(3600)
        pipeloom.run_pipeline(["a", "b", "c"], "h.db", worker_fn=work, timeout=0.05, progress="none")"""
    done = python("-c", program, cwd=home, code=1)
    said = r"PipelineError: 3 of 3 tasks failed: '[abc]': timed out after 0.05 s \(and 2 more\)"
    assert re.search(said, done.stderr), done.stderr


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
EARLY["test_pools_of_tasks_that_were_left_behind_do_not_hold_up_the_exit_code"] = [
    (arguments.split(), {"left.py": LEFT_BEHIND})
    for arguments in ("left.py", "-m pipeloom run left.py", "pipeloom.py run left.py")
]


POOL_HANGS = """
import os, signal, sys, time, pipeloom
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
kind, ending = sys.argv[1:] or ("", "")
del sys.argv[1:]
def work(ctx, number):
    with open(f"{number}.pid", "w") as file: file.write(str(os.getpid()))
    if number == 1: time.sleep(3600)
if __name__ == "__main__":
    if kind == "loky":
        from loky import get_reusable_executor as make
    else:
        make = {"processes": ProcessPoolExecutor, "threads": ThreadPoolExecutor}[kind]
    pool = make(2)
    pipe = pipeloom.Pipeline("x.db", executor=pool, timeout=0.5 if ending == "timeout" else None, progress="none")
    pipe.task(each=range(4))(work)
    pipe.main()
"""


@needs_posix
def test_a_task_that_hangs_in_a_pool_of_the_users_does_not_hold_up_the_exit_code(homes):
    def one(kind, ending, code):
        home = homes()
        (home / "t.py").write_text(POOL_HANGS)
        with subprocess.Popen([sys.executable, "t.py", kind, ending], cwd=str(home), stderr=subprocess.PIPE) as process:
            try:
                wait_for((home / "3.pid").exists)
                wait_for(lambda: rows(home / "x.db", "SELECT count(*) FROM task_runs WHERE status = 'done'") == [(3,)])
                for _ in range(0 if ending == "timeout" else 2):
                    process.send_signal(signal.SIGINT)
                    threading.Event().wait(0.3)
                _, errors = process.communicate(timeout=HANG)
            finally:
                process.kill()
        assert process.returncode == code and b"3 done, 1 " in errors and b"Traceback" not in errors, errors
        pid = int((home / "1.pid").read_text())
        wait_for(lambda: pid == process.pid or not is_alive(pid))

    kinds = ["processes", "threads", *["loky"] * bool(find_spec("loky"))]
    at_once(one, [(kind, *end) for kind in kinds for end in (("timeout", 1), ("signals", 130))])


def test_a_task_that_was_cut_off_in_a_pool_is_forgotten_when_it_ends(db):
    go = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        result = run(["a"], db, lambda task, ctx: go.wait(WAIT), executor=pool, timeout=0.05, check=False)
        assert result.failures[0].message == "timed out after 0.05 s" and len(pipeloom.LEFT_BEHIND) == 1
        go.set()
    wait_for(lambda: not pipeloom.LEFT_BEHIND)


@needs_posix
def test_pools_of_tasks_that_were_left_behind_do_not_hold_up_the_exit_code(early):
    for home, process in early["test_pools_of_tasks_that_were_left_behind_do_not_hold_up_the_exit_code"]:
        code, output = process.wait(WAIT), (home / "output").read_text()
        assert code == 1, output
        assert re.search(r"  pool: timed out after 0.3 s \(left.py:\d+, in pool\)\n", output)


def test_what_another_run_raises_in_an_iterator_is_said_to_be_of_that_iterator(tmp_path, caplog):
    def items():
        yield 1
        run(["x"], tmp_path / "inner.db", lambda task, ctx: 1 / 0)

    pipe = pipeloom.Pipeline(tmp_path / "x.db", progress="none")
    pipe.task(nothing_each, name="load", each=items)
    with pytest.raises(pipeloom.PipelineError, match="1 of 1 tasks failed: 'x'"):
        pipe.run()
    assert "each= of 'load' raised PipelineError: 1 of 1 tasks failed: 'x'" in caplog.text


def test_an_each_that_waits_for_the_tasks_of_another_is_no_deadlock(db):
    def results():
        for _ in range(300):
            yield made.get(timeout=WAIT)

    made = queue.Queue()
    pipe = pipeloom.Pipeline(db, progress="none", workers=2)
    pipe.task(nothing_each, name="takes", each=results)
    pipe.task(lambda ctx, n: made.put(n), name="makes", each=range(300))
    assert pipe.run().done == 600


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


FULL_PIPE = """
import logging, sys, pipeloom
if sys.argv[1] == "basic": logging.basicConfig(level=logging.INFO)
if sys.argv[1] == "setup": pipeloom.setup_logging(2)
pipeloom._Display.PATIENCE, pipeloom.READER_PATIENCE, pipeloom.LOG_EVERY = 1.0, 0.2, 0.2
pipe = pipeloom.Pipeline(sys.argv[1] + ".db", check=False, workers=2, retries=1, retry_delay=0.01)
@pipe.task(each=range(20))
def work(ctx, n):
    ctx.sleep(0.05)
    return 1 / (n % 2)
if sys.argv[1] == "main":
    del sys.argv[1]
    pipe.main()
sys.exit(30 + pipe.run().error)
"""


@needs_posix
def test_a_pipe_that_is_full_and_that_nobody_reads_does_not_keep_the_process_from_ending(home):
    def one(how, expected):
        with subprocess.Popen([sys.executable, "t.py", how], cwd=str(home), stderr=full) as process:
            try:
                assert process.wait(WAIT) == expected, how
            finally:
                process.kill()

    (home / "t.py").write_text(FULL_PIPE)
    nobody, full = os.pipe()
    try:
        os.set_blocking(full, False)
        for size in (4096, 1):
            try:
                while os.write(full, b"x" * size):
                    pass
            except BlockingIOError:
                continue
        os.set_blocking(full, True)
        at_once(one, [("plain", 40), ("basic", 40), ("setup", 40), ("main", 1)])
    finally:
        os.close(nobody)
        os.close(full)


ALARM = """
import faulthandler, linecache, random, signal, sqlite3, sys, threading, pipeloom
faulthandler.dump_traceback_later(12, exit=True)
class Alarm(Exception): pass
def on_alarm(*_): raise Alarm
signal.signal(signal.SIGALRM, on_alarm)
def traced(frame, event, _):
    path = frame.f_code.co_filename
    if path != pipeloom.__file__ and (path == __file__ or sys.argv[1] == "ours"):
        return None
    if event == "line" and not linecache.getline(path, frame.f_lineno).lstrip().startswith("with "):
        left[0] -= 1  # at `with`, from 3.12 on, tracing can raise where a signal cannot: before the release
        if left[0] == 0:
            sys.settrace(None)
            signal.raise_signal(signal.SIGALRM)  # as a timer does; only the moment is chosen
    return traced
def tasks():
    yield from range(10)
def work(task, ctx):
    ctx.execute("INSERT INTO made VALUES (?, ?)", (moment, str(task)))
def alarmed_run():
    threads = set(threading.enumerate())
    try:
        sys.settrace(traced)
        pipeloom.run_pipeline(tasks(), "x.db", worker_fn=work, workers=2, progress="none",
                              schema="CREATE TABLE IF NOT EXISTS made(moment, name)")
    except Alarm:
        raised.append(moment)
    except pipeloom.RunInProgress:
        if sys.argv[2] == "clean":  # the lock of an earlier one was left behind
            raise
    except RuntimeError as error:  # from the threading module, which that may leave without its lock
        assert isinstance(error.__context__, Alarm) or "unlocked lock" in str(error)
    finally:
        sys.settrace(None)
    for thread in set(threading.enumerate()) - threads:
        if sys.argv[2] == "clean":
            thread.join(6)
            assert not thread.is_alive(), (moment, thread)
moment, left, raised = 0, [10**9], []
alarmed_run()
moment, left = 1, [10**9]
alarmed_run()
lines = 10**9 - left[0]
conn = sqlite3.connect("x.db")
random.seed(int(sys.argv[3]))
for _ in range(int(sys.argv[4])):
    moment = random.randrange(1, lines)
    left = [moment]
    conn.execute("DELETE FROM made")
    conn.execute("DELETE FROM task_runs")
    conn.commit()
    alarmed_run()
    if sys.argv[2] == "clean":
        done = conn.execute("SELECT name FROM task_runs WHERE status = 'done' ORDER BY name").fetchall()
        stored = conn.execute("SELECT name FROM made ORDER BY name").fetchall()
        assert done == stored, (moment, done, stored)
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        assert handlers == [signal.default_int_handler, signal.SIG_DFL], (moment, handlers)
if sys.argv[2] == "clean":  # those that the log swallows, as it does whatever a handler raises, are a few
    assert len(raised) >= int(sys.argv[4]) - 2, raised
print("fine", lines)
"""


@needs_posix
@pytest.mark.parametrize("lines", ["ours", "all"])
def test_whenever_an_exception_comes_in_the_calling_thread_the_run_ends(home, lines):
    """In a line of this file, or (a relative) of what it calls, such as the wait in an Event."""
    (home / "alarm.py").write_text(ALARM)
    done = python("alarm.py", lines, "ends", 7, 60, cwd=home, timeout=HANG)
    assert done.returncode == 0 and done.stdout.startswith("fine"), done.stderr


@needs_posix
def test_whenever_an_exception_comes_in_the_calling_thread_all_is_as_it_was(home):
    """A relative: threads have ended, handlers are back, rows are there if and only if done, and it is raised."""
    (home / "alarm.py").write_text(ALARM)
    done = python("alarm.py", "ours", "clean", 7, 60, cwd=home, timeout=HANG)
    assert done.returncode == 0 and done.stdout.startswith("fine"), done.stderr


LAST_WORDS = """
import logging, sqlite3, sys, threading, time, pipeloom
kind = sys.argv[-1]
class Shy:
    def __str__(self): raise LookupError("no text")
    __repr__ = __str__
class Loud(logging.Handler):
    def emit(self, record): raise LookupError("no log")
if kind != "cancels":
    logging.getLogger("pipeloom").addHandler(Loud())
    logging.getLogger("pipeloom").setLevel("INFO" if kind == "is retried" else "WARNING")
def work(task, ctx):
    if task == 1 and kind == "cancels":
        raise pipeloom.TaskCancelled(Shy())
    if task == 1 and kind == "raises after its finish":
        ctx.put(pipeloom.MsgTaskFinished(ctx.task_id, "done", "now"))
        raise ValueError("too late")
    if task == 1 and kind == "is late after its finish":
        ctx.put(pipeloom.MsgTaskFinished(ctx.task_id, "done", "now"))
        time.sleep(1)
    if task == 1 and kind == "is retried" and ctx.attempt == 1:
        raise ValueError("once")
    if task == 1 and kind == "meets a lock":
        conn = sqlite3.connect("x.db", isolation_level=None, check_same_thread=False)
        conn.execute("BEGIN IMMEDIATE")
        threading.Timer(0.9, conn.close).start()
result = pipeloom.run_pipeline(
    range(4), "x.db", worker_fn=work, workers=1, progress="none", check=False, retries=1, retry_delay=0,
    timeout=0.3 if "is late" in kind else None,
)
print(result.done, result.error, result.cancelled)
"""


@pytest.mark.parametrize(
    "kind",
    ["cancels", "raises after its finish", "is late after its finish", "is retried", "meets a lock"],
)
def test_neither_a_text_that_raises_nor_a_logging_handler_that_does_keeps_a_task_from_its_end(home, kind):
    done = python("-c", LAST_WORDS, kind, cwd=home, timeout=HANG - 5)
    expected = "3 0 1" if kind == "cancels" else "4 0 0"  # done, error, cancelled
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


@pytest.mark.parametrize("error", ["cannot open", "bad message"])
def test_a_logging_handler_that_raises_keeps_no_producer_of_a_lone_writer_waiting(tmp_path, error):
    class Loud(logging.Handler):
        def emit(self, record):
            raise LookupError("no log")

    messages = queue.Queue(maxsize=1)
    writer = SQLiteWriter(tmp_path if error == "cannot open" else tmp_path / "x.db", messages, schema=USERS)
    loud = Loud()
    pipeloom.logger.addHandler(loud)
    try:
        writer.start()
        for n in range(5):
            messages.put(User(str(n), "x"), timeout=5)  # which nobody handles
        messages.put(MsgExecute("INSERT INTO users VALUES ('a', 'x')"), timeout=5)
        messages.put(pipeloom.SENTINEL, timeout=5)
        if error == "cannot open":
            with pytest.raises(pipeloom.DatabaseError):
                writer.join(WAIT)
        else:
            writer.join(WAIT)
            assert rows(tmp_path / "x.db", "SELECT key FROM users") == [("a",)]
    finally:
        pipeloom.logger.removeHandler(loud)
        if writer.is_alive():
            messages.put(pipeloom.SENTINEL)


HOARDERS = """
import ctypes, json, os, resource, socket, sys, traceback, pipeloom
def work(task, ctx):
    ctx.execute("INSERT INTO made VALUES (?)", (task,))
    if task % 3 == 1:
        large, small = [], None
        try:
            while True:
                large.append(bytearray(1 << 20))
        except MemoryError:
            while sys.version_info > (3, 10):  # until the traceback has no room; before, Python itself aborts
                small = (small,)
            raise
try:
    ctypes.CDLL("libgcc_s.so.1")  # which the end of a thread needs, before Python 3.11 or so
except OSError: pass
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20),) * 2)
try:
    result = pipeloom.run_pipeline(range(12), "x.db", worker_fn=work, workers=3, progress="none",
                                   check=False, schema="CREATE TABLE made(x)")
except (pipeloom.PipeloomError, MemoryError):  # the writer or this thread may have had no memory, either
    os.write(1, b"ended")  # which takes no memory
else:
    print(result.done, result.error, flush=True)
os._exit(0)  # as logging.shutdown may wait for a handler's lock that the library left locked, without memory
"""


@needs_linux
def test_tasks_that_use_all_memory_end_and_so_does_the_run(homes):
    def one(home):
        done = python("-c", HOARDERS, cwd=home, timeout=HANG, env={"MALLOC_ARENA_MAX": "1"})
        if "Cannot recover from MemoryErrors" not in done.stderr:  # for which Pythons before 3.12 abort, at times
            assert done.returncode == 0, done.stderr
            counts = [int(word) for word in done.stdout.split() if word.isdigit()]  # it may hit others, too
            assert sum(counts) == 12 and counts[1] >= 4 or "ended" in done.stdout, done.stdout + done.stderr
        names = [name for (name,) in rows(home / "x.db", "SELECT name FROM task_runs WHERE status = 'done'")]
        assert sorted(str(x) for (x,) in rows(home / "x.db", "SELECT x FROM made")) == sorted(names)

    at_once(one, [(homes(),) for _ in range(2)])


LOG_TABLE = """
import logging, sys, threading, time, pipeloom
retries = sys.argv[1] == "retries"
current, go, over, sent = threading.local(), threading.Event(), threading.Event(), [0]
class Gate: pass
class ToTable(logging.Handler):
    def emit(self, record):
        ctx = getattr(current, "ctx", None)
        if ctx is not None:
            ctx.put(pipeloom.MsgExecute("INSERT INTO log VALUES (?)", (record.getMessage(),)))
            sent[0] += 1
logging.getLogger().addHandler(ToTable())
logging.getLogger().setLevel(logging.INFO)
def on_gate(conn, gate):
    before = -1
    while sent[0] != before:  # until the channel is full, and a worker waits with the handler's lock
        before = sent[0]
        time.sleep(0.1)
def work(task, ctx):
    if retries and task == 5:
        ctx.put(Gate())
        if ctx.attempt < 4:
            raise LookupError("again")
        over.set()
        return
    if task == 0:
        print("ready", flush=True)
        sys.stdin.readline()
        go.set()
    go.wait(20)
    current.ctx = ctx
    try:
        for n in range(100_000 if retries else 3000):
            if over.is_set():
                break
            logging.info("line %d", n)
    finally:
        current.ctx = None
result = pipeloom.run_pipeline(
    range(6), "x.db", worker_fn=work, workers=6, atomic=False, progress="none", retries=3, retry_delay=0,
    schema="CREATE TABLE log(line)", check=False, handlers={Gate: on_gate},
)
print(result.done, sent[0])
"""


@pytest.mark.parametrize("what", ["a lock", "retries"])
def test_a_logging_handler_that_sends_to_the_context_meets_no_deadlock(home, what):
    """A worker holds its lock and waits for room, while the writer has something to say."""
    (home / "log.py").write_text(LOG_TABLE)
    with ExitStack() as holder, begun("log.py", what, cwd=home, stdin=subprocess.PIPE) as process:
        if what == "a lock":
            holder.enter_context(locked(home / "x.db", 1))
        output, errors = process.communicate("\n", timeout=HANG - 5)
        done, sent = output.split()
        assert done == "6", errors
        assert rows(home / "x.db", "SELECT count(*) FROM log") == [(int(sent),)]


@pytest.fixture
def narrow(monkeypatch):
    """The channel has room for one message."""
    monkeypatch.setattr(pipeloom.Channel.__init__, "__defaults__", (None, 1))


def send_some(ctx):
    for number in range(5):
        ctx.executemany("INSERT INTO users VALUES (?, 'x')", [(f"late {number}",)])


def test_the_writer_does_not_wait_for_room_in_its_own_channel(db, narrow):
    """The garbage collector may call the finalizer of a task's object, which sends, in any thread."""
    sender = []

    def work(task, ctx):
        sender.append(ctx)
        ctx.put(User("a", "x"))
        wait_until_stored(ctx, "1 < (SELECT count(*) FROM users)")

    def handle(conn, message):
        insert_user(conn, message)
        send_some(sender[0])

    run(["t"], db, work, schema=USERS, handlers={User: handle}, atomic=False)
    assert rows(db, "SELECT count(*) FROM users") == [(6,)]


def test_what_sends_while_its_task_sends_meets_no_deadlock(db):
    """A finalizer again, now where the lock of the attempt is held."""

    def work(task, ctx):
        with ctx.lock:
            ctx.progress(1, 2)
            ctx.executemany("INSERT INTO users VALUES (?, ?)", [("a", "x")])

    assert run(["t"], db, work, schema=USERS).done == 1


@needs_posix
def test_a_forked_child_that_sends_does_not_wait_for_room(db, narrow):
    def work(task, ctx):
        in_a_child(lambda: send_some(ctx))

    assert run(range(2), db, work, schema=USERS, atomic=False).done == 2
    assert rows(db, "SELECT count(*) FROM users") == [(0,)]


NO_FILES = """
import ctypes, resource, sys, pipeloom
import encodings.idna, inspect, json, socket, sqlite3, traceback, urllib.parse
try:
    ctypes.CDLL("libgcc_s.so.1")  # which the end of a thread needs, before Python 3.11 or so
except OSError: pass
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), 100))
try:
    pipeloom.run_pipeline(range(3), "x.db", worker_fn=lambda task, ctx: None, progress="none",
                          busy_timeout=0.3)
except pipeloom.PipeloomError as error:
    print(error)
"""


@needs_posix
def test_too_few_open_files_are_not_mistaken_for_a_full_disk(homes):
    """Wherever the limit is met: at the lock, the database, its WAL, or the reader."""

    def one(limit, home):
        done = python("-c", NO_FILES, limit, cwd=home, timeout=HANG)
        said = done.stdout.strip()
        named = re.search("open files|file descriptors|ulimit -n", said) and "disk" not in said
        if done.returncode or (said and not named):
            wrong.append((limit, said or done.stderr[-300:]))

    wrong = []
    cases = [(limit, homes()) for limit in (3, 4, 5, 6, 7, 8, 9, 3, 5, 7)]
    for _, home in cases[:7]:
        run(range(3), home / "x.db", nothing)  # an earlier run, whose names are to be read
    at_once(one, cases)
    assert not wrong


NO_THREADS = """
import asyncio, ctypes, resource, sys, threading, pipeloom
try:
    ctypes.CDLL("libgcc_s.so.1")
except OSError: pass
room, kind = int(sys.argv.pop(1)), sys.argv.pop(1)
options = {"timeout": 60} if kind == "timeout" else {"retries": 2, "retry_delay": 0}
pipe = pipeloom.Pipeline("x.db", schema="CREATE TABLE made(x)", workers=30, progress="none", **options)
def work(ctx, n):
    ctx.execute("INSERT INTO made VALUES (?)", (n,))
    if kind == "retries" and ctx.attempt == 1 and n % 10 == 0:
        raise LookupError(n)
async def work_async(ctx, n):
    await asyncio.sleep(0)
    work(ctx, n)
pipe.task(each=range(100), name="work")(work_async if kind == "async" else work)
threading.stack_size(256 << 20)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 * room + 128 << 20),) * 2)
pipe.main()
"""


@needs_linux
def test_with_few_threads_it_runs_with_those_or_says_so_in_one_line(homes):
    """There is room for so many stacks; workers, writer, timer, event loop: each may be the one too many."""
    wrong = []

    def one(room, kind, home):
        done = python("-c", NO_THREADS, room, kind, cwd=home, timeout=HANG, env={"MALLOC_ARENA_MAX": "1"})
        fine = "Traceback" not in done.stderr
        if done.returncode == 0:
            fine &= rows(home / "x.db", "SELECT count(*), count(DISTINCT x) FROM made") == [(100, 100)]
            fine &= rows(home / "x.db", "SELECT DISTINCT status FROM task_runs") == [("done",)]
        else:
            fine &= done.returncode == 2 and done.stderr.splitlines()[-1].startswith("pipeloom: ")
        if room == 6:
            fine &= done.returncode == 0 and " of 30 workers started: the system allows no more" in done.stderr
        if not fine:
            wrong.append((room, kind, done.returncode, done.stderr[-200:]))

    cases = [(room, "timeout") for room in (0, 1, 2, 3, 6)]
    cases += [(room, kind) for room in (2, 4) for kind in ("retries", "async")]
    at_once(one, [(*case, homes()) for case in cases])
    assert not wrong


BLOCKED = """
import os, queue, signal, sys, pipeloom
def items():
    yield 1
    queue.Queue().get()  # which only a signal can end
def work(ctx, n):
    if sys.argv[1] == "fails":
        raise ValueError("bad")
    os.rename("b.db", "moved.db")
pipe = pipeloom.Pipeline("b.db", fail_fast=True, progress="none", workers=2)
pipe.task(work, each=items)
try:
    pipe.run()
except pipeloom.PipeloomError as error:
    print(type(error).__name__)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@needs_posix
def test_an_each_that_blocks_keeps_neither_a_failure_nor_a_dead_writer_from_ending_the_run(homes):
    def one(how, expected):
        home = homes()
        (home / "b.py").write_text(BLOCKED)
        done = python("b.py", how, cwd=home, timeout=HANG)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr

    at_once(one, [("fails", "PipelineError\n"), ("moves", "WriterFailed\n")])


# ---- G4 No "database is locked" ------------------------------------------------------------------------


def test_a_foreign_lock_that_passes_is_waited_out_with_one_warning(tmp_path, caplog):
    """From the start on, from the second task's commit, and from the end of the last task."""
    paths = {(wal, moment): tmp_path / f"{wal}-{moment}.db" for wal in (True, False) for moment in (0, 2, 4)}
    at_once(lambda wal, moment: run_beside_a_lock(paths[wal, moment], moment, 1, wal=wal), list(paths))
    for path in paths.values():
        assert [row[2] for row in rows(path)] == ["done"] * 5
        assert rows(path, "SELECT key FROM users ORDER BY key") == [("1",), ("2",), ("3",), ("4",)]
        (warning,) = (text for text in caplog.messages if str(path) in text)
        assert "database is locked; trying again for up to 300 s" in warning


def test_a_foreign_lock_that_stays_ends_the_run_with_one_clear_error(tmp_path):
    said = "database is locked, still after .* close the program that holds the lock, or pass a longer busy_timeout="

    def one(moment):
        path = tmp_path / f"{moment}.db"
        with pytest.raises(pipeloom.WriterFailed, match=said):
            run_beside_a_lock(path, moment, 60, busy_timeout=0.5)
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
        run(range(1, 5), path, lambda item, q: q.execute("INSERT INTO users VALUES (?, 'x')", (str(item),)),
            resume=True)  # fmt: skip
        assert rows(path, "SELECT key FROM users ORDER BY key") == [("1",), ("2",), ("3",), ("4",)]

    at_once(one, [(0,), (2,), (4,)])


def test_a_foreign_writer_is_waited_for_and_is_no_run(db):
    run(["a"], db, nothing)
    execute(db, "CREATE TABLE own(x)")
    run(["b"], db, lambda task, ctx: execute(db, "INSERT INTO own VALUES (1)"))
    assert rows(db, "SELECT count(*) FROM own") == [(1,)]


def attached_run(db, other, seconds, moment, **options):
    """A run that stores in an attached database, which another process locks at some moment."""
    schema = f"ATTACH '{other}' AS other; CREATE TABLE IF NOT EXISTS other.made(x)"

    def work(item, ctx):
        if item == moment:
            holder.enter_context(locked(other, seconds))
        ctx.execute("INSERT INTO other.made VALUES (?)", (item,))

    with ExitStack() as holder:
        if moment == 0:
            execute(other, "CREATE TABLE made(x)")
            holder.enter_context(locked(other, seconds))
        return run(range(1, 5), db, work, workers=1, schema=schema, **options)


def test_a_lock_on_an_attached_database_is_waited_out(tmp_path, caplog):
    cases = [(wal, moment) for wal in (True, False) for moment in (0, 2, 4)]

    def one(wal, moment):
        result = attached_run(tmp_path / f"{wal}-{moment}.db", tmp_path / f"{wal}-{moment}.other", 1, moment,
                              wal=wal, check=False)  # fmt: skip
        assert (result.done, result.error) == (4, 0), result.failures
        stored = rows(tmp_path / f"{wal}-{moment}.other", "SELECT x FROM made ORDER BY x")
        assert stored == [(1,), (2,), (3,), (4,)]

    at_once(one, cases)


def test_a_lock_on_an_attached_database_that_stays_ends_the_run(tmp_path):
    def one(moment):
        with pytest.raises(pipeloom.WriterFailed, match="locked, still after"):
            other = tmp_path / f"{moment}.other"
            attached_run(tmp_path / f"{moment}.db", other, 60, moment, busy_timeout=0.3)
        if moment:
            done = len(rows(tmp_path / f"{moment}.db", "SELECT 1 FROM task_runs WHERE status = 'done'"))
            assert len(rows(tmp_path / f"{moment}.other", "SELECT x FROM made")) == done

    at_once(one, [(0,), (2,), (4,)])


# ---- G5 One run per database ---------------------------------------------------------------------------


@needs_posix
def test_a_path_through_a_link_and_back_is_where_the_system_says(tmp_path):
    (tmp_path / "else" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "else" / "folder")
    path = tmp_path / "link" / ".." / "y.db"

    def work(task, ctx):
        with ctx.connect() as conn:
            conn.execute("SELECT * FROM task_runs")
        with pytest.raises(pipeloom.RunInProgress):
            run([1], tmp_path / "else" / "y.db", nothing)
        assert run([1], tmp_path / "y.db", nothing).done == 1  # which is another
        return "seen"

    assert run(["a"], path, work)["a"] == "seen"
    assert pipeloom.read_status(path)["counts"] == {"done": 1}
    assert (tmp_path / "else" / "y.db").exists()


def test_a_second_run_on_the_same_database_is_refused_and_names_the_first(home):
    def work(task, ctx):
        wait_until_stored(ctx, "status = 'running'")
        with pytest.raises(pipeloom.RunInProgress, match=f"by process {os.getpid()} on {platform.node()}, since 20"):
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
                os.dup2(1, 2)
                time.sleep(60)
                os._exit(0)
            print("ready", flush=True)
            time.sleep(60)
        pipeloom.run_pipeline(["t"], "f.db", worker_fn=work, progress="none")"""
    with begun("-W", "ignore", "-c", program, cwd=home, start_new_session=True) as process:
        try:
            with pytest.raises(pipeloom.RunInProgress, match=f"is in use by process {process.pid}"):
                run(["next"], home / "f.db", nothing)
            process.kill()
            process.wait(WAIT)
            run(["next"], home / "f.db", nothing)  # while the child lives on
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert [row[1:] for row in rows(home / "f.db")] == [("t", "cancelled"), ("next", "done")]


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
    stored, told = [], []
    seen = SimpleNamespace(start=id, update=id, stop=told.append)
    with pytest.raises(pipeloom.WriterFailed, match="was deleted, moved or replaced during the run"):
        run(range(10_000), db, work, workers=2, wal=wal, progress=seen)
    assert told[0].done < 10_000 and told[0].done + told[0].cancelled == 10_000
    if how == "without its lock":
        assert ("meanwhile", "done") in [row[1:] for row in rows(db)]
        assert stored == rows(db, "SELECT count(*) FROM task_runs WHERE status = 'done'")


TWO = """
import os, subprocess, sys, pipeloom
pipe = pipeloom.Pipeline("x.db", schema="CREATE TABLE IF NOT EXISTS made(item)", progress="none")
@pipe.task
def work(ctx):
    ctx.execute("INSERT INTO made VALUES ('a')")
    if "SECOND" not in os.environ:
        subprocess.run([sys.executable, __file__], env={**os.environ, "SECOND": "1"})
pipe.main()
"""


@needs_permissions
def test_no_run_starts_where_the_lock_cannot_be_written(home):
    """SQLite opens it read-only, and its BEGIN EXCLUSIVE then excludes nobody: two runs at once went well."""
    (home / "two.py").write_text(TWO)
    path, lock = home / "x.db", home / "x.db-lock"
    run(["before"], path, nothing)
    lock.chmod(0o444)
    done = python("two.py", cwd=home, preexec_fn=as_an_ordinary_user, timeout=HANG)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert str(lock) in done.stderr  # which file it is
    assert [row[1] for row in rows(path)] == ["before"]
    assert rows(path, "SELECT name FROM sqlite_master WHERE name = 'made'") == []
    assert rows(path, "SELECT count(*) FROM pipeline_runs") == [(1,)]


# ---- G6 Ctrl-C does what people hope -------------------------------------------------------------------


@needs_posix
def test_ctrl_c_is_a_keyboard_interrupt_and_the_handlers_are_back(db):
    def work(task, q):
        if task == 3:
            os.kill(os.getpid(), signal.SIGINT)
        q.sleep(0.01)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(range(1000), db, work, workers=2)
    assert signal.getsignal(signal.SIGINT) is before
    assert rows(db, "SELECT done >= 3, cancelled > 900 FROM pipeline_runs") == [(1, 1)]
    assert {row[2] for row in rows(db)} == {"done", "cancelled"}


@needs_posix
def test_a_signal_lets_what_runs_finish_and_a_second_one_leaves_at_once(homes):
    def one(number, times, mode):
        home = homes()
        (home / "s.py").write_text(SLEEPER)
        with begun("s.py", mode, cwd=home) as process:
            threading.Event().wait(0.2)  # in Python, a signal just before a system call blocks goes unnoticed
            process.send_signal(number)
            for _ in range(times - 1):
                assert "no new tasks will start" in process.stderr.readline()
                process.send_signal(number)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == -number, errors
        assert {row[2] for row in rows(home / "s.db")} <= {"done", "cancelled"}
        done = check_stored_by_sleeper(home)
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
def test_ctrl_c_cancels_what_waits_for_its_retry(db, clock):
    def work(task, ctx):
        if task != "signals":
            raise RuntimeError("no")
        wait_until_stored(ctx, "status = 'queued'")
        os.kill(os.getpid(), signal.SIGINT)

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


@needs_posix
def test_a_locked_database_keeps_no_signal_from_ending_the_run(homes):
    """The first lets it wait for the lock; the third does not wait."""

    def one(signals):
        home = homes()
        (home / "s.py").write_text(SLEEPER)
        with begun("s.py", "finishes", cwd=home) as process:
            with locked(home / "s.db", 0.8 if signals == 1 else 60):
                for _ in range(signals):
                    process.send_signal(signal.SIGINT)
                    threading.Event().wait(0.3)
                _, errors = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT, errors
        assert signals == 1 or "database is locked, still after" in errors
        check_stored_by_sleeper(home)

    def from_the_start():
        home = homes()
        (home / "s.py").write_text(SLEEPER)
        run([], home / "s.db", nothing)
        with locked(home / "s.db", 60):
            process = subprocess.Popen([sys.executable, "s.py", "finishes"], cwd=str(home), stderr=subprocess.PIPE)
            try:
                while b"trying again" not in process.stderr.readline():  # its log line
                    assert process.poll() is None
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=HANG)
            finally:
                process.kill()
                process.communicate()
        assert process.returncode == -signal.SIGINT

    at_once(lambda check, *arguments: check(*arguments), [(one, 1), (one, 3), (from_the_start,)])


@needs_posix
@pytest.mark.parametrize(
    "how, signals, code",
    [("hangs", [signal.SIGTERM] * 2, -signal.SIGTERM), ("finishes", [], 0)],
)
def test_a_terminal_that_stands_still_keeps_no_run_and_no_signal_from_its_end(home, how, signals, code):
    import termios

    program = re.sub("print[(].*[)]", "pass", SLEEPER.replace('progress="none"', 'progress="ansi"'))
    (home / "t.py").write_text(program)

    def act(process, terminal):
        wait_for((home / "s.db").exists)
        threading.Event().wait(0.3)
        termios.tcflow(terminal, termios.TCOOFF)
        for number in signals:
            process.send_signal(number)
            threading.Event().wait(0.1)  # else two may arrive as one
        try:
            process.wait(WAIT)
        finally:
            termios.tcflow(terminal, termios.TCOON)

    assert on_terminal(["t.py"], [how], home, act=act)[0] == code


SWALLOWS_SIGNALS = """
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
    (home / "s.py").write_text(SWALLOWS_SIGNALS)
    with begun("s.py", cwd=home) as process:
        for _ in range(3):
            threading.Event().wait(0.2)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "swallowed\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == -signal.SIGINT


@needs_posix
def test_under_nohup_the_run_outlives_its_terminal(home):
    (home / "s.py").write_text(SLEEPER.replace("0.4", "0.1"))
    with begun("s.py", "finishes", cwd=home, start=("nohup", sys.executable)) as process:
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=WAIT)[0] == "restored\n" and process.returncode == 0
    assert [row[2] for row in rows(home / "s.db")] == ["done"] * 6


FULL_CHANNEL = """
import sys, threading, time, pipeloom
sent = [0]
def locked():
    print("ready", flush=True)
    sys.stdin.readline()  # the test has locked the database
class Item:
    def __init__(self, number):
        self.number = number
    @property
    def name(self):
        if self.number == 0 and threading.active_count() > 1 and not sent[0]:  # the writer has opened it
            sent[0] = 1
            locked()
        return str(self.number)
def streams(ctx):
    locked()
    while True:
        ctx.executemany("INSERT INTO made VALUES (?)", [(n,) for n in range(1000)])
        sent[0] += 1
def sources():
    yield 1
    before = -1
    while sent[0] != before or not before:  # until the channel is full
        before = sent[0]
        time.sleep(0.2)
if sys.argv[1] == "a long list":
    pipeloom.run_pipeline([Item(n) for n in range(100_000)], "x.db", worker_fn=lambda task, ctx: None,
                          progress="none", schema="CREATE TABLE IF NOT EXISTS made(x)")
else:
    pipe = pipeloom.Pipeline("x.db", progress="none", schema="CREATE TABLE IF NOT EXISTS made(x)",
                             atomic=False, workers=2)
    pipe.task(each=sources, name="first")(lambda ctx, item: streams(ctx))
    pipe.task(each=lambda: iter([1, 2]), name="second")(lambda ctx, item: None)
    pipe.run()
"""


@needs_posix
def test_signals_end_a_run_that_waits_for_room_while_another_program_holds_the_database(homes):
    """Two seconds after the second, nothing waits for the lock; the process then ends by that signal."""

    def one(number, how, home):
        (home / "s.py").write_text(FULL_CHANNEL)
        with begun("s.py", how, cwd=home, stdin=subprocess.PIPE) as process, locked(home / "x.db", 60):
            process.stdin.write("\n")
            process.stdin.flush()
            threading.Event().wait(0.7)
            for _ in range(2):
                process.send_signal(number)
                threading.Event().wait(0.2)
            with suppress(subprocess.TimeoutExpired):
                process.wait(HANG - 5)
            ended.append((how, number, process.poll()))

    hows = ("a long list", "a new source")
    cases = [(number, how, homes()) for number in (signal.SIGINT, signal.SIGTERM) for how in hows]
    for *_, home in cases:
        run(range(3), home / "x.db", nothing)
    ended = []
    at_once(one, cases)
    assert all(code == -number for _, number, code in ended), ended  # None: it hangs


POOL = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import pipeloom
def work(ctx, n):
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL) if n == 0 else time.sleep(30)
    open(f"began{n}", "w").close()
    time.sleep(1)
    ctx.execute("INSERT INTO t VALUES (?)", (n,))
pipe = pipeloom.Pipeline("p.db", progress="none", workers=2, schema="CREATE TABLE t(x)", check=False)
pipe.task(work, each=range(2))
if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=get_context(sys.argv[1])) as pool:
        result = pipe.run(executor=pool)
    print(result.done, result.error)
"""


@needs_posix
def test_ctrl_c_at_a_terminal_lets_the_tasks_in_a_process_pool_finish(homes):
    def one(method):
        home = homes()
        (home / "p.py").write_text(POOL)
        command = [sys.executable, "p.py", method, "finishes"]
        process = subprocess.Popen(command, cwd=str(home), start_new_session=True, stderr=subprocess.PIPE)
        try:
            wait_for(lambda: (home / "began0").exists() and (home / "began1").exists())
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, the children included
            process.communicate(timeout=WAIT)
            assert process.returncode == -signal.SIGINT
        finally:
            process.kill()
            process.communicate()
        assert rows(home / "p.db", "SELECT x FROM t ORDER BY x") == [(0,), (1,)]

    at_once(one, [("fork",), ("spawn",)])


@needs_posix
def test_a_pool_of_forked_processes_that_breaks_can_end_its_children(home):
    (home / "p.py").write_text(POOL)
    done = python("p.py", "fork", "dies", cwd=home, timeout=HANG, code=0)
    assert done.stdout in ("0 2\n", "0 1\n")  # the other one may not have begun


FORKED_AND_ENDED = """
import os, pipeloom, signal, time
def work(task, ctx):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    pid = os.fork()
    if not pid:
        os.write(1, b"%d" % (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL))
        time.sleep(60)
    os.kill(pid, signal.SIGTERM)  # before it heeds any, mostly
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
print(pipeloom.run_pipeline(range(40), "x.db", worker_fn=work, workers=2, progress="none").done)
"""


@needs_posix
def test_no_forked_child_loses_the_signal_that_is_to_end_it(home):
    done = python("-W", "ignore", "-c", FORKED_AND_ENDED, cwd=home, timeout=HANG, code=0)
    assert done.stdout.strip("1") == "40\n"


# ---- G7 Flat memory ------------------------------------------------------------------------------------


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


def test_tasks_are_pulled_lazily_in_the_calling_thread(db):
    pulled, ahead = [], []

    def tasks():
        for number in range(2_000):
            assert threading.current_thread() is threading.main_thread()
            pulled.append(number)
            yield number

    run(tasks(), db, lambda t, q: ahead.append(len(pulled) - t), workers=2)
    assert len(ahead) == 2_000 and ahead[0] <= 70
    assert sorted(ahead)[-50] <= 1_040  # as short as they are; a worker may be held up between two lines


# ---- G8 The display never harms the run ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["start", "update", "stop"])
def test_a_display_that_raises_harms_nothing(db, method, caplog):
    display = Recorder()
    setattr(display, method, lambda *_: 1 / 0)
    assert run(["a", "b"], db, nothing, progress=display).done == 2
    assert caplog.text.count("the progress display failed") == 1


def test_a_display_that_hangs_does_not_keep_the_process_from_ending(home):
    program = """if 1:
        import pipeloom, threading
        class Hangs:
            def start(self, total): pass
            def update(self, message): threading.Event().wait()
            def stop(self, result): pass
        print(pipeloom.run_pipeline(range(3), "x.db", worker_fn=lambda t, q: None, progress=Hangs()).done)"""
    assert python("-c", program, cwd=home, timeout=HANG, code=0).stdout == "3\n"


@pytest.mark.parametrize("method", ["start", "update", "stop"])
def test_a_display_that_hangs_harms_nothing(db, method, caplog, impatient):
    display, over, hung = Recorder(), threading.Event(), threading.Event()
    setattr(display, method, lambda *_: hung.set() or over.wait(2 * WAIT))
    tasks = range(400 if method == "stop" else 2000)
    try:
        work = nothing if method == "stop" else lambda task, ctx: hung.wait(WAIT)
        assert run(tasks, db, work, progress=display).done == len(tasks)
        assert [row[2] for row in rows(db)] == ["done"] * len(tasks)
    finally:
        over.set()
    assert "the progress display did not stop within 0.1 s and was abandoned" in caplog.text
    assert method == "stop" or "and was turned off: it is 1,000 messages behind" in caplog.text


CLOSED_STREAMS = """
(python -m pipeloom demo -n 3 --db 1.db 2>&-; echo $? >1) &
((python -m pipeloom demo -n 2 --db 2.db; echo $? >2) 2>&1 | head -c 1 >out) &
((python -m pipeloom demo -n 3 --fail 1 --db 3.db; echo $? >3) 2>&1 | true) &
(python -m pipeloom status --db nothing.db 2>&- >nothing; echo $? >4) &
(python -m pipeloom init-db --db 5.db && python -m pipeloom status --db 5.db >/dev/full 2>said; echo $? >5) &
(python -m pipeloom demo -n 2 --db 6.db 2>/dev/full; echo $? >6) &
(python -m pipeloom demo -n 2 --db 7.db >&- 2>&- <&-; echo $? >7) &
(python -m pipeloom init-db --db 8.db && (python -m pipeloom status --db 8.db; echo $? >8) 2>unread | true) &
wait
"""


@needs_posix
def test_closed_full_and_broken_streams_harm_nothing(home):
    script = CLOSED_STREAMS.replace("python", f"'{sys.executable}'")
    subprocess.run(script, shell=True, cwd=str(home), timeout=60)
    assert [(home / str(n)).read_text() for n in range(1, 9)] == [f"{c}\n" for c in (0, 0, 1, 2, 2, 0, 0, 0)]
    assert (home / "unread").read_text() == ""
    assert (home / "nothing").read_text() == ""
    assert (home / "said").read_text().startswith("pipeloom: cannot write to stdout")


@pytest.mark.parametrize("encoding", [b"utf-8", len, property(lambda _: 1 / 0)])
@pytest.mark.parametrize("progress", ["none", "log", "auto", "ansi"])
def test_an_odd_stderr_harms_nothing(db, monkeypatch, progress, encoding):
    """As that of a program with a window of its own."""

    class Odd(io.StringIO):
        pass

    Odd.encoding = encoding
    monkeypatch.setattr(sys, "stderr", Odd())
    assert run([1, 2], db, nothing, progress=progress).done == 2


@needs_posix
def test_why_the_bars_are_off_is_in_the_debug_log(home):
    program = THREE_TASKS.replace("ctx.sleep(0.1)", "item == 1 and __import__('os').close(2); ctx.sleep(0.3)")
    (home / "t.py").write_text(program)
    code, _ = on_terminal(["t.py"], ["-vv", "-l", "log", "-w", "1"], home)
    assert code == 0 and "the bars are off: OSError" in (home / "log").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_file_on_a_full_disk_harms_nothing(home):
    done = python("-m", "pipeloom", "demo", "-n", "1", "-vv", "-l", "/dev/full", cwd=home, code=0)
    told = "pipeloom: log file '/dev/full' cannot be written: No space left on device\n"
    assert done.stderr.count(told) == 1 and "1 done" in done.stderr and "Traceback" not in done.stderr


@needs_posix
def test_a_tiny_window_harms_nothing(homes):
    def one(size):
        home = homes()
        (home / "t.py").write_text(TERMINAL_PROGRAM)
        code, _ = on_terminal(["t.py"], ["ansi", "8"], home, size=size)
        assert code == 0 and [row[2] for row in rows(home / "t.db")] == ["done"] * 12

    at_once(one, [((5, 20),), ((1, 1),)])


@needs_posix
def test_a_window_that_shrinks_in_mid_run_gets_narrower_lines(home):
    def shrink(process, terminal):
        wait_for((home / "t.db-wal").exists)
        threading.Event().wait(0.3)
        resize(terminal, 4, 20)

    (home / "t.py").write_text(TERMINAL_PROGRAM)
    code, written = on_terminal(["t.py"], ["ansi", "8"], home, act=shrink)
    assert code == 0 and [row[2] for row in rows(home / "t.db")] == ["done"] * 12
    last = screen(written)[-1]
    assert last.startswith("12/12 done") and len(last) < 20


ONE_ROW = """
import pipeloom
pipeloom.run_pipeline(["one"], "t.db", worker_fn=lambda task, ctx: ctx.sleep(1.6), progress="ansi")
"""


@needs_posix
def test_no_more_rows_than_the_window_has_are_drawn_and_as_many_as_it_has(homes):
    def one(height, more):
        home = homes()
        (home / "t.py").write_text(ONE_ROW.replace('["one"], "t.db"', 'range(20), "t.db", workers=20'))
        code, written = on_terminal(["t.py"], [], home, size=(height, 80))
        assert code == 0 and more in written and (more or "more" not in written)

    at_once(one, [(8, "+15 more"), (24, ""), (50, "")])


@needs_posix
def test_a_window_that_shrinks_leaves_no_part_of_the_lines_that_it_has_folded(home):
    def shrink(process, terminal):
        wait_for((home / "t.db-wal").exists)
        threading.Event().wait(0.8)
        resize(terminal, 24, 26)

    (home / "t.py").write_text(ONE_ROW)
    code, written = on_terminal(["t.py"], [], home, act=shrink)
    erased = [len(rows) // len("\x1b[A\x1b[2K") for rows in re.findall(r"\r((?:\x1b\[A\x1b\[2K)+)", written)]
    assert code == 0 and max(erased) in (4, 8), erased  # one line or two, of 79 cells


SKIPPING = """
import sys, time, pipeloom
def tasks():
    yield from "abc"
    time.sleep(1.0 * (sys.argv[1] == "--resume"))
    print("no more")
def work(task, ctx): 1 / (task != 0)
pipeloom.run_pipeline(range(900) if sys.argv[1] == "fail" else tasks(), "t.db", worker_fn=work, progress="ansi",
                      workers=1, check=False, resume=sys.argv[1] == "--resume", fail_fast=True)
"""


@needs_posix
def test_the_line_on_all_tasks_counts_what_is_skipped_at_once_and_what_never_began_in_the_end(home):
    (home / "t.py").write_text(SKIPPING)
    assert on_terminal(["t.py"], [""], home)[0] == 0
    code, written = on_terminal(["t.py"], ["--resume"], home)
    assert code == 0 and "3 skipped" in written.partition("no more")[0]
    code, written = on_terminal(["t.py"], ["fail"], home)
    done, failed, cancelled = map(int, re.findall(r"(\d+)(?:/900 done| failed| cancelled)", screen(written)[-1]))
    assert (code, failed, done + failed + cancelled) == (0, 1, 900), written


@needs_posix
def test_a_dumb_terminal_gets_lines(home):
    (home / "t.py").write_text(THREE_TASKS)
    code, written = on_terminal(["t.py"], [], home, env={"TERM": "dumb"})
    assert code == 0 and "\x1b" not in written and written.count("3 done in") == 1


@needs_posix
def test_an_ascii_terminal_without_colour_gets_ascii_bars_without_colour(home):
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "NO_COLOR": "1"}
    (home / "t.py").write_text(THREE_TASKS)
    code, written = on_terminal(["t.py"], [], home, env=env)
    assert code == 0 and written.isascii() and "..." in written and "\x1b[32m" not in written


def test_an_ascii_stdout_shows_any_name(home):
    run(["\u65e5\u672c\n"], home / "n.db", nothing)
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = python("-m", "pipeloom", "status", "--db", "n.db", cwd=home, code=0, env=env)
    assert "\\u65e5" in done.stdout


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


def test_a_logging_handler_that_hangs_or_raises_holds_up_nobody(db, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(pipeloom._Display, "PATIENCE", 0.1)
    for emit in (lambda record: over.wait(2 * WAIT), lambda record: 1 / 0):
        handler = logging.Handler()
        handler.emit = emit
        monkeypatch.setattr(pipeloom.logger, "handlers", [handler])
        try:
            assert run(range(100), db, failing, check=False, store_task_status=False).error == 100
        finally:
            over.set()


def test_of_more_log_records_than_can_wait_the_last_are_told(db, caplog, monkeypatch):
    monkeypatch.setattr(pipeloom._Display, "BACKLOG", 3)
    display = pipeloom._Display("none")
    for number in range(9):
        display.tell(logging.WARNING, "number %d", number)
    display.thread.start()
    display.stop(None)
    assert caplog.messages == ["number 6", "number 7", "number 8"]


# ---- G9 Honest exit codes ------------------------------------------------------------------------------


WRONG_USE = [
    # what run_pipeline is given
    (lambda: run_pipeline("x.db", worker_fn=nothing), TypeError, "tasks='x.db': expected an iterable of tasks, as in"),
    (lambda: run_one(3), TypeError, "tasks=3: expected an iterable"),
    (lambda: run_one(path=3), TypeError, "db_path=3: expected a path"),
    (lambda: run_one(worker=3), TypeError, "worker_fn=3: expected a function(task, context) that does one task"),
    (lambda: run_pipeline([1], "x.db"), TypeError, "worker_fn=None: expected a function"),
    (lambda: run_one(worker=generates), TypeError, "worker_fn is a generator function, so its body would never run"),
    (lambda: run_one(worker=lambda: None), TypeError, "worker_fn cannot be called with (task, context): too many"),
    (lambda: run_one([Task(1, "a"), Task(1, "b")]), ValueError, "task_id 1 is that of tasks 'a' and 'b'; give each its own"),
    (lambda: run_one([Task("x", "a")]), ValueError, "task_id 'x' cannot be stored: expected an integer from -2**63"),
    (lambda: run_one([Task(2**63 - 1, "a")]), ValueError, "task_id 9223372036854775807 cannot be stored"),
    # options of a run
    (lambda: run_one(wrokers=2), TypeError, "a run has no option wrokers; it has workers, wal, "),
    (lambda: run_one(workers=0), ValueError, "workers=0: expected a whole number from 1; None is one per CPU"),
    (lambda: run_one(workers=1.5), ValueError, "workers=1.5: expected a whole number from 1"),
    (lambda: run_one(busy_timeout=-1), ValueError, "busy_timeout=-1: expected a number of seconds from 0 to 1e9"),
    (lambda: run_one(schema=3), TypeError, "schema=3: expected a str of SQL statements"),
    (lambda: run_one(executor=3), TypeError, "executor=3: expected a concurrent.futures.Executor"),
    (lambda: run_one(progress="blink"), ValueError, "progress='blink' is unknown: expected auto, rich, ansi, log, none or an"),
    (lambda: run_one(progress=object()), TypeError, "progress=<object object at ...> has no method start()"),
    (lambda: run_one(handlers=3), TypeError, "handlers=3: expected a mapping of message classes to functions"),
    (lambda: run_one(handlers={"x": insert_user}), TypeError, "not 'x' to <function insert_user at ...>"),
    (lambda: run_one(handlers={User: 3}), TypeError, "handlers= maps message classes to functions, not ...User'> to 3"),
    (lambda: run_one(handlers={MsgTaskStarted: print}), ValueError, "handlers= names MsgTaskStarted, which the writer handles"),
    (lambda: run_one(resume=True, store_task_status=False), ValueError, "resume= needs the task status, which store_t"),
    (lambda: run_one(redo=["a"], store_task_status=False), ValueError, "redo= needs the task status, which store_t"),
    # options of a run, a Pipeline and a task
    *[
        (call, ValueError, said)
        for options, said in [
            ({"retries": -1}, "retries=-1: expected a whole number from 0"),
            ({"retries": 1.5}, "retries=1.5: expected a whole number from 0"),
            ({"retry_delay": -1}, "retry_delay=-1: expected a number of seconds from 0"),
            ({"retry_delay": float("nan")}, "retry_delay=nan: expected"),
            ({"retry_delay": 10**400}, "expected a number of seconds from 0 to 1e9"),
            ({"timeout": 0}, "timeout=0: expected a number of seconds above 0, or None for no limit"),
            ({"timeout": float("nan")}, "timeout=nan: expected"),
            ({"timeout": "60"}, "timeout='60': expected"),
            ({"timeout": 10**400}, "expected a number of seconds above 0"),
        ]
        for call in (
            lambda options=options: run_one(**options),
            lambda options=options: Pipeline("x.db", **options),
            lambda options=options: declare_one(**options),
        )
    ],
    # what Pipeline and its decorators are given
    (lambda: Pipeline(3), TypeError, "db_path=3: expected a path, as in Pipeline('jobs.db')"),
    (lambda: declare_one().run(""), ValueError, "database '' is not a valid file name; pass the path of a file"),
    (lambda: Pipeline("x.db", speed=1), TypeError, "Pipeline has no option speed; it has workers, wal, "),
    (lambda: declare_one(workers=3), TypeError, "a task has no option workers; it has retries, retry_delay, timeout, atomic, executor"),
    (lambda: declare_one(executor=3), TypeError, "executor=3: expected a concurrent.futures.Executor"),
    (lambda: Pipeline().task(3), TypeError, "task(3): expected a function; options are named, as in each="),
    (lambda: Pipeline().handles(nothing), TypeError, "handles(<function nothing at ...>): expected a message class, as in"),
    (lambda: declare_one(each=3), TypeError, "each=3 of task 'a': expected an iterable, or a function that makes one"),
    (lambda: declare_one(each="abc"), TypeError, "each='abc' of task 'a': expected an iterable"),
    (lambda: declare_one(name=3), TypeError, "name=3 of task '<lambda>': expected a str, or a function of its each= item"),
    (lambda: declare_one(name=len), TypeError, "name=<built-in function len> of task '<lambda>': expected a str, or"),
    (lambda: declare_one(name=""), TypeError, "name='' of task '': expected a str"),
    (lambda: declare_one(generates), TypeError, "the function of task 'a' is a generator function, so its body would never run"),
    (lambda: declare_one(generates_too, each=[1]), TypeError, "the function of task 'a' is a generator function, so its body"),
    (lambda: declare_one(lambda: None), TypeError, "the function of task 'a' cannot be called with (ctx): too many"),
    (lambda: declare_one(lambda a: None, each=[1]), TypeError, "of task 'a' cannot be called with (ctx, item): too many"),
    (lambda: declare_one(lambda a, b, c: None, each=[1]), TypeError, "with (ctx, item): missing a required argument: 'c'"),
    # a graph that cannot be
    (lambda: run_graph(), ValueError, "the pipeline has no task; declare one with @pipe.task"),
    (lambda: run_graph(("a", "a")), ValueError, "circular after=: a after a; remove"),
    (lambda: run_graph(("a", "c"), ("b", "a"), ("c", "b")), ValueError, "circular after=: a after c after b after a"),
    (lambda: run_graph(("a", "load")), ValueError, "after='load' of task 'a': expected a task of this pipeline, which has a"),
    (lambda: run_graph(("a", nothing)), ValueError, "after='nothing' of task 'a': expected a task of this pipeline"),
    (lambda: run_graph(*((name, "x") for name in "abcdefghij")), ValueError, "which has a, b, c, d, e, f, g, h, i, j; declare"),
    (lambda: run_graph(*((name, "x") for name in "abcdefghijk")), ValueError, "g, h, i, j and more; declare it, or correct"),
    (lambda: run_graph(("a", 3)), ValueError, "after=3 of task 'a': expected a task"),
    (lambda: run_graph(("a", [["b"]])), ValueError, "after=['b'] of task 'a': expected a task"),
    (lambda: run_graph(("a", ()), ("b", "a[1]")), ValueError, "after='a[1]' of task 'b': expected a task"),
    (lambda: run_graph(("a", ()), ("a", ())), ValueError, "two tasks are named 'a'; give one of them another name"),
    # an unusable database
    (lambda: run_one(path="folder"), ValueError, "database 'folder' is a directory; pass the path of a file"),
    (lambda: run_one(path="no/x.db"), ValueError, "database 'no/x.db' cannot be created: there is no directory '.../no'; create"),
    (lambda: run_one(path=""), ValueError, "database '' is not a valid file name; pass the path of a file"),
    (lambda: run_one(path="x\0.db"), ValueError, "database 'x\\x00.db' is not a valid file name; pass the path of a file"),
    (lambda: run_one(path="text.db"), ValueError, "database 'text.db' cannot be read: file is not a database; restore it"),
    (lambda: run_one(path="other.db"), ValueError, "has a table task_runs that is not pipeloom's: it has no id INTEGER PRIMARY KEY, name, status, progress"),
    (lambda: run_one(path="no.db"), ValueError, "database 'no.db' cannot be locked through '.../no.db-lock': "),
    (lambda: run_one(path=os.devnull), ValueError, "is not a regular file"),
    (lambda: pipeloom.read_status("x.db"), ValueError, "database 'x.db' does not exist; pass the database of a run"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, said", WRONG_USE)
def test_wrong_use_is_one_clear_error_and_nothing_is_written(bad_folder, call, error, said):
    """`...` in the text stands for anything; that nothing is written, the fixture sees to."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, pipeloom.PipeloomError) and "\n" not in str(caught.value)
    assert re.search(re.escape(said).replace(r"\.\.\.", ".*"), str(caught.value)), str(caught.value)


BAD_COMMANDS = [
    ([], "expected a command; to see it work: "),
    (["dance"], "argument COMMAND: invalid choice: 'dance' (choose from "),
    (["demo", "-n", "0"], "--num-tasks: '0': expected a whole number from 1"),
    (["demo", "-n", "-3"], "'-3': expected a whole number from 1"),
    (["demo", "-w", "0"], "--workers: '0': expected a whole number from 1"),
    (["demo", "--db", ""], "database '' is not a valid file name; pass the path of a file"),
    (["demo", "--db", "folder"], "database 'folder' is a directory; pass the path of a file"),
    (["demo", "--db", "no/such/dir.db"], "there is no directory '.../no/such'; create it first"),
    (["demo", "--log-file", "no/such/x.log"], "--log-file 'no/such/x.log' cannot be written: No such file"),
    (["init-db", "--db", "no/such/dir.db"], "there is no directory '.../no/such'; create it first"),
    (["status", "--limit", "x"], "--limit: 'x': expected a whole number from 1"),
    (["status", "--limit", "9" * 20], f"'{'9' * 20}': expected a whole number from 1"),
    (["status", "--db", "missing.db"], "database 'missing.db' does not exist; pass the database of a run"),
    (["status", "--db", "text.db"], "database 'text.db' has no task status: file is not a database; pass a database"),
    (["status", "--db", "other.db"], "database 'other.db' has no task status: no such column: status; pass a database"),
    (["run", "nowhere.py"], "target 'nowhere.py': there is no file 'nowhere.py'; check the path"),
    (["run", "no_such_module_x:main"], "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_x'"),
    (["run", "json:nothing"], "target 'json:nothing': 'json' has no function or pipeline 'nothing'; name one that it has, as json:name"),
    (["run", "json"], "target 'json': expected package.module:name, file.py:name or file.py"),
    (["run", "math:pi"], "target 'math:pi': 'math' has no function or pipeline 'pi'; name one that it has, as math:name"),
    (["run", "json:dumps", "--arg", "novalue"], "--arg 'novalue': expected KEY=VALUE, as in --arg folder=incoming"),
    (["run", "json:dumps", "--arg", "what=1"], "json:dumps cannot be called with (what): missing a required argument: 'obj'"),
    (["run", "ast:walk"], "ast:walk is a generator function, so its body would never run"),
    (["run", "bad.py"], "target 'bad.py' cannot be imported: SyntaxError: "),
    (["run", "none.py"], "target 'none.py': 'none.py' has no function or pipeline 'main'; name one that it has, as none.py:name"),
    (["run", "two.py"], "target 'two.py': 'two.py' has no function or pipeline 'main'; name one that it has, as two.py:a or two.py:b"),
    (["run", "now.py"], "pipe.main() was called while the file was being imported; put it under `if __name__ == '__main__':`"),
    (["run", "pipe.py", "--arg", "a=1"], "is a Pipeline, which takes no arguments; pass a function instead"),
    (["run", "pipe.py", "--retries", "x"], "--retries: 'x': expected a whole number from 0"),
    (["run", "pipe.py", "--timeout", "0"], "timeout=0.0: expected a number of seconds above 0"),
    (["run", "pipe.py", "--db", ""], "database '' is not a valid file name; pass the path of a file"),
    (["run", "pipe.py", "--progress", "blink"], "progress='blink' is unknown: expected auto, rich, ansi, log, none"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, said", BAD_COMMANDS)
def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(
    bad_folder, capsys, same_logging, arguments, said
):
    """`...` in the text stands for anything; that nothing is written, the fixture sees to."""
    code = cli(*arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert re.search(re.escape(said).replace(r"\.\.\.", ".*"), err), err


@needs_posix
def test_the_exit_code_of_the_command_line_names_the_signal(homes):
    program = (
        SLEEPER.replace("try:", "def main():").replace("finally:", "if 0:").replace("sys.argv[1]", "'x'")
    )

    def one(number):
        home = homes()
        (home / "s.py").write_text(program)
        with begun("-m", "pipeloom", "run", "s.py", cwd=home) as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 128 + number, errors
        assert "done, " in errors and "Traceback" not in errors

    at_once(one, [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,)])


def test_with_vv_a_target_that_cannot_be_imported_shows_its_traceback(home):
    (home / "bad.py").write_text("def broken(): 1 / 0\nbroken()")
    done = python("-m", "pipeloom", "run", "bad.py", "-vv", cwd=home, code=2)
    assert "-vv shows the traceback" in done.stderr and "in broken\n" in done.stderr


MANY_FAILURES = """import pipeloom
pipe = pipeloom.Pipeline("m.db", workers=1)
@pipe.task(each=range(1203))
def bad(ctx, n): raise ValueError(n)
@pipe.task
def worse(ctx): 1 / 0
pipe.main()
"""


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


@needs_permissions
@pytest.mark.parametrize("there", [True, False], ids=["database is there", "is not"])
def test_a_read_only_directory_is_what_is_to_be_changed(home, there):
    folder = home / "folder"
    folder.mkdir()
    if there:
        run(["a"], folder / "x.db", nothing)
    folder.chmod(0o555)
    try:
        done = python("-m", "pipeloom", "demo", "-n", "1", "--db", "folder/x.db", cwd=home, code=2,
                      preexec_fn=as_an_ordinary_user, timeout=HANG)  # fmt: skip
    finally:
        folder.chmod(0o755)
    cure = done.stderr.rpartition(";")[2]  # what to do: about the directory, and not about the file
    assert re.search(r"\bfolder'", cure) or "directory" in cure, done.stderr
    assert "x.db'" not in cure, done.stderr


@needs_permissions
def test_permissions_are_those_of_where_a_link_leads(home):
    """Relative of 10 and 12: SQLite writes beside the file and not beside the link."""
    for name in ("real", "links"):
        (home / name).mkdir()
    os.symlink(os.path.join("..", "real", "x.db"), str(home / "links" / "y.db"))
    codes = {}
    for closed in ("links", "real"):
        (home / closed).chmod(0o555)
        done = python("-m", "pipeloom", "demo", "-n", "1", "--db", "links/y.db", cwd=home, timeout=HANG,
                      preexec_fn=as_an_ordinary_user)  # fmt: skip
        codes[closed] = done.returncode
        (home / closed).chmod(0o755)
    assert codes == {"links": 0, "real": 2}
    assert str(home / "real") in done.stderr.rpartition(";")[2], done.stderr


@needs_posix
def test_a_link_that_leads_in_a_circle_is_one_clear_error_at_once(tmp_path, caplog):
    """Relative of 10: who is asked for a path resolves links first. It was waited for, as a full disk is."""
    shown = tmp_path / "x.db"
    os.symlink(str(shown), str(shown))
    with pytest.raises(pipeloom.DatabaseError) as error:
        run(["a"], shown, nothing, busy_timeout=0.7)
    assert str(shown) in str(error.value) and "disk" not in str(error.value)
    assert "waiting" not in caplog.text


def test_a_locking_mode_in_the_schema_that_shuts_us_out_ourselves_is_named(db):
    """The second run has names to look up, by a connection of its own."""
    for _ in range(2):
        try:
            run(["a", "b"], db, nothing, schema="PRAGMA locking_mode=EXCLUSIVE", busy_timeout=0.3)
        except pipeloom.PipeloomError as error:
            assert "locking_mode" in str(error).replace(str(db), "")  # refused
        else:
            assert [row[2] for row in rows(db)] == ["done", "done"]  # or it works


@pytest.mark.parametrize("table", ["pipeline_runs", "task_runs"])
@pytest.mark.parametrize("shape", ["(name)", "(id, x)", "(id INTEGER PRIMARY KEY, name)", "AS SELECT 1 AS x"])
def test_a_table_of_the_users_that_has_the_name_of_ours_is_named_and_stays(db, table, shape):
    rows(db, f"CREATE {'VIEW' if 'AS' in shape else 'TABLE'} {table} {shape}")
    before = rows(db, "SELECT * FROM sqlite_master")
    with pytest.raises(pipeloom.DatabaseError) as error:
        run(["a"], db, nothing)
    assert table in str(error.value) and "restore" not in str(error.value)
    assert rows(db, "SELECT * FROM sqlite_master") == before


# ---- 4.1 Names that exist ------------------------------------------------------------------------------


def test_every_public_name_is_there_and_documented():
    for name in pipeloom.__all__:
        value = getattr(pipeloom, name)
        if name != "Msg" and (isinstance(value, type) or callable(value)):
            assert value.__doc__, name


@pytest.mark.parametrize("copy", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
def test_errors_travel_between_processes(copy):
    """One that cannot be made again from what was pickled would break a pool of the user's."""
    failure = pipeloom.Failure("load[b]", "ValueError: no")
    result = pipeloom.RunResult(1, 2, 1, 0, 0, 0.5, [failure], {}, "x.db")
    errors = [getattr(pipeloom, name)("x.db", "a", "b") for name in ("DatabaseError", "WriterFailed", "RunInProgress")]
    for error in (*errors, pipeloom.PipelineError(result), pipeloom.UsageError("no")):
        again = copy(error)
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert str(errors[0]) == "database 'x.db' a; b"


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


@pytest.mark.parametrize("kind", ["plain", pytest.param("rich", marks=needs_rich)])
def test_the_console_prints_to_stderr_without_the_markup(home, kind):
    hidden = "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None; " * (kind == "plain")
    program = hidden + "from pipeloom import console; console.print('[cyan]All[/cyan] tasks', 3); console.log('x')"
    done = python("-c", program, cwd=home, code=0)
    assert done.stdout == "" and done.stderr.startswith("All tasks 3\n") and "x" in done.stderr


def test_importing_it_imports_nothing_slow(home):
    slow = "rich argparse json typing asyncio concurrent.futures pathlib socket urllib.parse"
    program = (  # what logging imports is no matter of ours: from Python 3.15 on that is pathlib, too
        "import logging, sys; before = set(sys.modules); import pipeloom;"
        f"print({set(slow.split())!r} & set(sys.modules) - before)"
    )
    assert python("-S", "-c", program, cwd=home, code=0).stdout.strip() == "set()"


def test_an_old_sqlite_is_one_clear_error_at_the_start_of_a_run(db, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 22, 0))
    with pytest.raises(pipeloom.UsageError, match="pipeloom needs SQLite 3.24 or newer, not .*; use another Python"):
        run(["a"], db, nothing)
    assert not db.exists()


# ---- 4.2 The message interface -------------------------------------------------------------------------


def test_messages_are_frozen_and_have_the_fields_of_the_original_in_their_order():
    assert [f.name for f in dataclasses.fields(MsgTaskStarted)] == ["task_id", "name", "started_at"]
    assert [f.name for f in dataclasses.fields(MsgTaskProgress)] == ["task_id", "step", "total", "message"]
    assert [f.name for f in dataclasses.fields(MsgTaskFinished)] == [
        "task_id", "status", "finished_at", "result", "message",
    ]  # fmt: skip
    assert Task(7, "seven", 3) == Task(task_id=7, name="seven", steps=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MsgTaskProgress(1, 2, 3).step = 4


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


def test_any_iterable_is_pulled(db):
    kinds = [deque("ab"), {"a", "b"}, {"a": 1, "b": 2}, (c for c in "ab"), ("a", "b")]
    for number, tasks in enumerate(kinds):
        assert run(tasks, db.parent / f"{number}.db", nothing).done == 2


def test_tasks_without_an_id_are_numbered_above_those_with_one_and_never_share_a_row(db):
    run(["numbered", Task(1, "a"), Task(7, "b")], db, nothing)
    assert rows(db) == [(1, "a", "done"), (7, "b", "done"), (8, "numbered", "done")]
    with pytest.raises(ValueError, match="task_id 8 of task 'c' is another task's in this run"):
        run(["numbered", Task(8, "c")], db, nothing)
    run(["new", Task(9, "d")], db, nothing)
    assert rows(db)[3:] == [(9, "d", "done"), (10, "new", "done")]
    with pytest.raises(ValueError, match="task_id 11 of task 'e' is another task's in this run"):
        run(iter(["newer", Task(11, "e")]), db, nothing)


def test_a_double_id_from_a_generator_is_an_error_and_the_rest_is_stored(db, caplog):
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
    assert len(rows(db)) == 1 and caplog.messages == []


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


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("boom"), "RuntimeError: boom"),
        (RuntimeError("x" * 50_000 + "end"), "RuntimeError: xxx"),
        (SystemExit(7), "SystemExit: 7"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (MemoryError(), "MemoryError"),
        (BaseException("base"), "BaseException: base"),
        (RecursionError(), "RecursionError"),
        (unshowable_error(None), "Mute: (no text: its __str__ raised)"),
        (unshowable_error(5), "SyntaxError"),
        (SyntaxError("bad", ("f", "1", "1", "text")), "SyntaxError"),
    ],
)  # fmt: skip
def test_whatever_a_worker_raises_ends_its_task_only(db, error, said):
    def work(task, q):
        if task == "bad":
            raise error

    with pytest.raises(pipeloom.PipelineError, match="1 of 3 tasks failed: 'bad': ") as caught:
        run(["a", "bad", "c"], db, work)
    assert " more)" not in str(caught.value)
    assert caught.value.result.done == 2 and caught.value.__cause__ is error
    assert caught.value.result.failures[0].message.startswith(said)
    assert [row[2] for row in rows(db)] == ["done", "error", "done"]
    (traceback,) = rows(db, "SELECT traceback FROM task_runs WHERE id = 2")[0]
    assert type(error).__name__ in traceback and len(traceback) < 21_000  # of a long one, both ends


@pytest.mark.parametrize(
    "message, stored",
    [
        (MsgTaskProgress(1, 5, 10), 0.5),
        (MsgTaskProgress(1, 50, 10), 1.0),
        (MsgTaskProgress(1, -3, 10), 0.0),
        (MsgTaskProgress(1, 50, 0), 0.0),
        (MsgTaskProgress(1, 0.25, 1.0, "half\udc80"), 0.25),
        (MsgTaskProgress(1, 1, 4, Path("x")), 0.25),
        (MsgTaskProgress(True, 1, 2), 0.5),
    ],
)
def test_progress_outside_its_range_is_clamped(db, message, stored):
    def work(task, q):
        q.put(message)
        q.put_nowait(MsgTaskFinished(1, "error", "now"))

    def work_by_method(task, ctx):
        ctx.progress(message.step, message.total or None, message.message)
        ctx.put_nowait(MsgTaskFinished(1, "error", "now"))

    for worker in (work, work_by_method):
        run([Task(1, "one")], db, worker)
        assert rows(db, "SELECT progress FROM task_runs") == [(stored,)]


def test_a_function_that_turns_out_to_be_a_generator_is_an_error_and_not_done(db):
    def work(task, ctx):
        return (n for n in [task])

    async def work_async(task, ctx):
        yield task

    for worker in (work, lambda task, ctx: work_async(task, ctx)):
        (failure,) = run([1], db, worker, check=False).failures
        assert "is a generator, which nobody would run; return a list, or omit yield" in failure.message


def test_values_whose_meaning_is_clear_are_stored_as_text(db):
    def work(task, q):
        q.put(MsgTaskFinished(task.task_id, "done", "now", result={"a": Path("x")}, message="\udc80\0x" * 3))

    run([Task(1, "undecodable-\udcff"), Task(2, "x" * 1_000_000)], db, work)
    found = rows(db, "SELECT name, result, message FROM task_runs ORDER BY id")
    assert found[0] == ("undecodable-\\udcff", '{"a": "x"}', "\\udc80\0x" * 3)
    assert len(found[1][0]) == 1_000_000


@pytest.mark.parametrize(
    "send, said",
    [
        (lambda q: q.put(MsgTaskProgress(1, float("nan"), 10)), "progress nan of 10 cannot be stored: expected two finite"),
        (lambda q: q.put(MsgTaskProgress(1, 1, float("inf"))), "progress 1 of inf cannot be stored"),
        (lambda q: q.put(MsgTaskProgress(1, "x", 10)), "progress 'x' of 10 cannot be stored"),
        (lambda q: q.put(MsgTaskProgress(1, 10**400, 10)), "cannot be stored: expected two finite numbers"),
        (lambda q: q.put(MsgTaskProgress(2**63, 1, 2)), "task_id 9223372036854775808 cannot be stored"),
        (lambda q: q.put(MsgTaskProgress(-(2**63) - 1, 1, 2)), "task_id -9223372036854775809 cannot be stored"),
        (lambda q: q.put(MsgTaskStarted("one", "name", "now")), "task_id 'one' cannot be stored"),
        (lambda q: q.put(MsgTaskFinished(1, "banana", "now")), "status 'banana' is unknown: expected 'done', 'error' or"),
        (lambda q: q.put(MsgExecute(3)), "sql 3 cannot be run: expected a str"),
        (lambda q: q.execute(3), "sql 3 cannot be run: expected a str"),
        (lambda q: q.upsert("t", {"k": 1}, key="k"), "upsert into 't': rows is one dict; expected a list of mappings"),
        (lambda q: q.upsert("t", [{"k": 1}], key="x"), "upsert into 't': key ['x'] is not among the columns ['k']"),
        (lambda q: q.upsert("t", [{"k": 1}], key=[]), "upsert into 't': key [] is not among the columns ['k']"),
        (lambda q: q.put({"a": 1}), "no handler for messages of type dict; pass handlers={dict: function}"),
        (lambda q: q.put(None), "no handler for messages of type NoneType"),
        (lambda q: q.put(SENTINEL), "a worker must not send SENTINEL"),
    ],
)  # fmt: skip
def test_a_message_that_can_never_be_stored_is_refused_at_put(db, send, said):
    refused = []

    def work(task, q):
        with pytest.raises(pipeloom.MessageRefused) as error:
            send(q)
        refused.append(str(error.value))

    run([Task(1, "one"), Task(2, "two")], db, work)
    assert len(refused) == 2 and all(said in text for text in refused)
    assert [status for _, _, status in rows(db)] == ["done", "done"]


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


def test_messages_about_other_ids_leave_no_task_running(db):
    def work(task, ctx):
        ctx.put(MsgTaskStarted(70, "its own", "now"))
        ctx.put(MsgTaskProgress(77, 1, 2))

    run(["a"], db, work)
    assert rows(db) == [(1, "a", "done"), (70, "its own", "cancelled"), (77, "task-77", "cancelled")]


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


@pytest.mark.parametrize("when", ["in the same batch", "in a later one"])
def test_what_another_task_says_of_one_that_is_done_changes_nothing(db, when):
    class Slow:
        pass

    held, over, contexts = threading.Event(), threading.Event(), []

    def hold(conn, message):  # the writer, so that what follows shares a batch
        held.set()
        assert over.wait(WAIT)

    def work(task, ctx):
        if task == "slow":
            return ctx.put(Slow())
        if task == "done":
            return contexts.append(ctx)
        wait_for(lambda: contexts and contexts[0].closed)
        if when != "in the same batch":
            over.set()
            wait_until_stored(ctx, "name = 'done' AND status = 'done'")
        ctx.put(MsgTaskProgress(contexts[0].task_id, 1, 2, "late"))
        ctx.put(MsgTaskFinished(contexts[0].task_id, "error", "late", message="late"))
        over.set()
        return None

    def tasks():
        yield "slow"
        assert held.wait(WAIT)
        yield from ("other", "done")

    display = Recorder()
    result = run(tasks(), db, work, workers=3, handlers={Slow: hold}, atomic=False, progress=display)
    assert result.done == 3
    told = rows(db, "SELECT id, status, progress, message, attempts FROM task_runs WHERE name = 'done'")
    assert told == [(contexts[0].task_id, "done", 1.0, "", 1)]
    kinds = [type(message) for message in display.messages() if message.task_id == told[0][0]]
    assert kinds == [MsgTaskStarted, MsgTaskFinished]


def test_the_writer_works_alone_on_a_plain_queue(db):
    run_alone(
        db,
        MsgTaskStarted(1, "one", "t1"),
        MsgTaskProgress(1, 1, 4, "quarter"),
        MsgTaskFinished(1, "done", "t2", result="ok"),
        MsgTaskProgress(1, 2, 4, "late"),
        MsgTaskFinished(1, "error", "t3", message="late"),
        MsgTaskFinished(2, "error", "t3", message="never started"),
        {"unknown": "message"},
        MsgTaskStarted(3, "three", "t4"),
        limit=2,
    )
    assert rows(db, "PRAGMA journal_mode") == [("wal",)]
    assert rows(db, "SELECT id, name, status, progress, result, message FROM task_runs") == [
        (1, "one", "done", 1.0, "ok", ""),
        (2, "task-2", "error", 0.0, None, "never started"),
        (3, "three", "running", 0.0, None, ""),
    ]


def test_a_writer_alone_counts_the_attempts_of_a_task(db):
    for attempts in (1, 2):
        run_alone(db, MsgTaskStarted(1, "one", "t1"), MsgTaskFinished(1, "error", "t2"))
        assert rows(db, "SELECT attempts FROM task_runs") == [(attempts,)]


def test_what_a_task_says_of_another_is_shown(db):
    said = [MsgTaskStarted(99, "other", "t1"), MsgTaskProgress(99, 1, 2), MsgTaskFinished(99, "done", "t2")]
    display = Recorder()
    run(["a"], db, lambda task, ctx: [ctx.put(message) for message in said] and None, progress=display)
    assert [message for message in display.told if getattr(message, "task_id", 0) == 99] == said


def test_a_writer_alone_stores_many_rows_whatever_the_statement_and_the_kind_of_row(db):
    insert, pairs = "INSERT INTO users VALUES (?, ?)", [("a", "1"), ("b", "2")]
    run_alone(
        db, MsgExecute(insert, pairs, True), MsgExecute(insert, (["c", "3"],), many=True), MsgExecute(insert, ("d", "4")),
        MsgExecute("INSERT INTO users VALUES (:k, :n)", [{"k": "e", "n": "5"}], many=True),
        MsgExecute("UPDATE users SET name = name || ? WHERE key = ?", [("x", "a"), ("y", "e")], many=True),
        schema=USERS,
    )  # fmt: skip
    assert sorted(rows(db, "SELECT * FROM users")) == [("a", "1x"), ("b", "2"), ("c", "3"), ("d", "4"), ("e", "5y")]


def test_a_writer_alone_that_fails_keeps_nobody_who_joins_its_queue(db):
    starts = [MsgTaskStarted(id, str(id), "now") for id in range(10)]
    with pytest.raises(pipeloom.DatabaseError, match="cannot be created"):
        run_alone(db / "x.db", *starts)
    with pytest.raises(pipeloom.WriterFailed, match="was deleted, moved or replaced"):
        run_alone(db, User("a", "b"), *starts, limit=1, handlers={User: lambda conn, user: db.unlink()})


def test_a_writer_alone_that_keeps_no_status_has_no_say_in_a_table_of_that_name(db):
    execute(db, "CREATE TABLE task_runs(own)")
    run_alone(db, MsgExecute("INSERT INTO task_runs VALUES (1)"), store_task_status=False)
    assert rows(db, "SELECT * FROM task_runs") == [(1,)]
    with pytest.raises(pipeloom.DatabaseError, match="has a table task_runs that"):
        run_alone(db)


def test_a_plain_queue_is_checked_as_well(db):
    run_alone(
        db,
        MsgTaskStarted(1, None, "now"),
        MsgTaskProgress(1, float("nan"), 2),
        MsgTaskStarted("x", "x", "now"),
        MsgTaskFinished(1, "banana", "now"),
        MsgTaskFinished(1, "done", "now", result={"a": 1}),
    )
    assert rows(db, "SELECT id, status, progress, result FROM task_runs") == [(1, "done", 1.0, '{"a": 1}')]


def test_the_writer_takes_no_name_that_threads_need(db):
    thread, writer = threading.Thread(), SQLiteWriter(db, queue.Queue())
    ours = set(vars(SQLiteWriter)) | (set(vars(writer)) - set(vars(thread)))
    assert {name for name in ours & set(dir(thread)) if not name.startswith("__")} == {"run", "join"}


def test_a_writer_alone_drives_anything_with_the_methods_of_richs_progress(db):
    class Bars:
        def __getattr__(self, method):
            return lambda *arguments, **changes: called.append((method, *arguments, *changes.values()))

    called = []
    news = [MsgTaskStarted(1, "one", "now"), MsgTaskProgress(1, 2, 8), MsgTaskFinished(1, "done", "now")]
    run_alone(
        db, *news, MsgTaskStarted(2, "two", "now"), MsgTaskProgress(2, 8, 8), MsgTaskFinished(3, "done", "now"),
        task_progress=Bars(), task_bar_map={1: 0, 2: 7},
    )  # fmt: skip
    expected = [("update", 0, 25), ("update", 0, 100), ("remove_task", 0), ("refresh",), ("update", 7, 100)]
    assert called == expected


MANAGERS_PROGRAM = """
import queue, sys
if sys.argv[1] == "ansi": sys.modules["rich"] = sys.modules["rich.console"] = None
import pipeloom
from pipeloom import *
overall, tasks = make_overall_progress(), make_task_progress()
bars = preregister_task_bars(tasks, 3)
assert list(bars) == [1, 2, 3] and bars[1] == 0, bars
q = queue.Queue()
writer = SQLiteWriter("m.db", q, task_progress=tasks, task_bar_map=bars)
with overall:
    bar = overall.add_task("[cyan]All tasks", total=3)
    writer.start()
    for message in (MsgTaskStarted(1, "one", "now"), MsgTaskProgress(1, 1, 2), MsgTaskFinished(1, "done", "now"),
                    MsgTaskProgress(2, 1, 2), SENTINEL):
        q.put(message)
    writer.join(20)
    overall.advance(bar)
    overall.refresh()
left = tasks.tasks.values() if isinstance(tasks.tasks, dict) else tasks.tasks
rich = sys.modules.get("rich.progress")
print("rich" if rich and isinstance(overall, rich.Progress) else "ansi", [task.completed for task in left])
"""


@pytest.mark.parametrize("kind", ["ansi", pytest.param("rich", marks=needs_rich)])
def test_the_progress_managers_of_the_original_drive_bars(home, kind):
    (home / "m.py").write_text(MANAGERS_PROGRAM)
    done = python("m.py", kind, cwd=home, code=0)
    assert done.stdout == f"{kind} [50, 0]\n"


def test_bars_that_are_made_ahead_have_a_hundred_steps():
    made = []
    progress = SimpleNamespace(add_task=lambda name, total: made.append((name, total)) or len(made))
    assert pipeloom.preregister_task_bars(progress, 2) == {1: 1, 2: 2}
    assert made == [("task-1", 100), ("task-2", 100)]


def test_the_wal_is_empty_after_a_run_even_if_somebody_still_reads(db):
    run([], db, nothing, schema=USERS)
    with closing(sqlite3.connect(str(db))) as reader:
        assert reader.execute("SELECT count(*) FROM users").fetchall() == [(0,)]
        run(["a"], db, lambda task, ctx: ctx.execute("INSERT INTO users VALUES (1, 2)"))
        assert Path(f"{db}-wal").stat().st_size == 0


def test_a_writer_alone_says_which_message_nobody_handles(db, caplog):
    run_alone(db, object(), MsgTaskStarted(1, "one", "now"))
    assert "no handler for messages of type object; pass handlers={object: function}" in caplog.text
    assert rows(db) == [(1, "one", "running")]


def test_connect_sets_the_journal_and_the_pragmas(db):
    for path, wal, mode in ((str(db), True, "wal"), (db, False, "delete"), (":memory:", True, "memory")):
        conn = pipeloom.connect(path, wal=wal)
        assert conn.execute("PRAGMA journal_mode").fetchone() == (mode,)
        assert conn.execute("PRAGMA synchronous").fetchone() == (1,)
        assert conn.execute("PRAGMA foreign_keys").fetchone() == (1,)
        pipeloom.init_schema(conn, store_task_status=True)
        pipeloom.init_schema(conn, store_task_status=True)
        conn.execute("CREATE TABLE IF NOT EXISTS mine(x)")
        conn.execute("INSERT INTO mine VALUES (1)")
        pipeloom.wal_checkpoint(conn)  # which commits that first
        assert not conn.in_transaction
        conn.close()
    (db.parent / "other.db").write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="file is not a database"):
        pipeloom.connect(db.parent / "other.db")


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


def test_a_subclass_of_the_writer_has_the_connection_by_the_name_of_the_original(db):
    class Writer(SQLiteWriter):
        def handle(self, message):
            if isinstance(message, User):
                self._conn.execute("INSERT INTO users VALUES (?, ?)", (message.key, message.name))
            else:
                super().handle(message)

    messages = queue.Queue()
    writer = Writer(db, messages, schema=USERS)
    writer.start()
    messages.put(User("a", "x"))
    messages.put(pipeloom.SENTINEL)
    writer.join(WAIT)
    assert rows(db, "SELECT key FROM users") == [("a",)]


def test_the_command_line_is_importable_by_the_module_path_of_the_original():
    import pipeloom.cli
    from pipeloom.cli import main

    assert main is pipeloom.main and pipeloom.cli.main is main


TYPED = """
from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeloom import MsgExecute, Pipeline, RunResult, Task, TaskContext, run_pipeline

def work(task: Task, ctx: TaskContext) -> int:
    for step in ctx.track([1, 2]):
        ctx.progress(step, 2, task.name)
    ctx.put(MsgExecute("SELECT 1"))
    return 3

class Message: pass
def store(conn: sqlite3.Connection, message: Message) -> None: ...

result: RunResult = run_pipeline([], "x.db", worker_fn=work, workers=3, handlers={Message: store}, timeout=1)
print(result.done + 1, [failure.task.upper() for failure in result.failures])
run_pipeline([], "x.db", worker_fn=work, worker=3)  # wrong
run_pipeline([], "x.db", worker_fn=work, workers="3")  # wrong
pipe = Pipeline("x.db", retries=2, executor=ThreadPoolExecutor())
Pipeline("x.db", retires=2)  # wrong

@pipe.task
def bare(ctx: TaskContext) -> int:
    return 1

@pipe.task(each=lambda: Path().glob("*"), after=bare, executor=ThreadPoolExecutor())
async def load(ctx: TaskContext, path: Path) -> str:
    return path.name

@pipe.task(retrys=1)  # wrong
def mistyped(ctx: TaskContext) -> int:
    return 1

pipe.task(bare, name="again", retrys=1)  # wrong
pipe.task(bare, name="again")("not a context")  # wrong
bare("not a context")  # wrong
load("not a context", Path())  # wrong

@pipe.handles(Message)
def handle(conn: sqlite3.Connection, message: Message) -> None: ...

handle(1, Message())  # wrong

@pipe.handles(Message)  # wrong
def no_handler(conn: sqlite3.Connection) -> None: ...

result = pipe.run(workers=3, resume=True)
pipe.run(worker=3)  # wrong
"""


def test_type_checkers_find_mistyped_options_and_nothing_in_the_file(home):
    """mypy sees no package that is installed: neither Rich nor typing_extensions has to be."""
    pytest.importorskip("mypy")
    (home / "typed.py").write_text(TYPED, encoding="utf-8")
    options = ["--strict", "--no-site-packages", "--no-error-summary", "--show-error-codes"]
    found = python("-m", "mypy", *options, "pipeloom.py", "typed.py", cwd=home, code=1).stdout
    wrong = [f"typed.py:{number}" for number, line in enumerate(TYPED.split("\n"), 1) if "# wrong" in line]
    errors = re.findall(r"^(.+?:\d+): error", found, re.M)
    assert list(dict.fromkeys(errors)) == wrong, found


def test_the_options_that_type_checkers_know_are_those_that_there_are():
    known = {}
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name in ("TaskOptions", "RunOptions"):
            known[node.name] = {line.target.id for line in node.body}
    for call, names in [
        (lambda: run_one(x=1), known["TaskOptions"] | known["RunOptions"]),
        (lambda: declare_one(x=1), known["TaskOptions"]),
    ]:
        with pytest.raises(pipeloom.UsageTypeError) as raised:
            call()
        assert set(str(raised.value).partition("it has ")[2].split(", ")) == names


# ---- 4.3 The context -----------------------------------------------------------------------------------


def in_a_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join(WAIT)


def test_progress_that_the_writer_has_no_time_for_waits_in_one_message(db):
    """Else it would fill the channel, and the worker would wait for the writer, which waits for it here."""

    def work(task, ctx):
        if task == "first":
            return ctx.put(User("a", "b"))
        assert held.wait(WAIT)
        for step in range(10_000):
            ctx.progress(step, 10_000)
        return go.set()

    held, go, waited = threading.Event(), threading.Event(), []
    hold = {User: lambda conn, message: held.set() or waited.append(go.wait(WAIT))}
    assert run(["first", "second"], db, work, workers=2, handlers=hold).done == 2
    assert waited == [True]


def test_two_threads_of_a_task_that_sleep_at_once_leave_it_to_its_deadline(db, clock):
    async def sleeps(ctx):
        import asyncio

        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, ctx.sleep, seconds) for seconds in (0.05, 0.1)))
        try:
            clock.advance(ctx, 61)
            await asyncio.sleep(WAIT)
        finally:
            ended.set()

    def sees_it(ctx):
        assert ended.wait(WAIT / 2)

    ended, pipe = threading.Event(), Pipeline(db, progress="none", workers=2, check=False)
    pipe.task(sleeps, timeout=60)
    pipe.task(sees_it)
    result = pipe.run()
    assert result.done == 1 and result.failures[0].message == "timed out after 60 s"


def test_what_the_threads_of_a_task_send_in_turn_is_run_in_that_order(db):
    def work(task, ctx):
        for key in "abc":
            ctx.execute("INSERT INTO users VALUES (?, '')", (key,))
            in_a_thread(ctx.execute, "UPDATE users SET name = name || 'x'")

    run(["t"], db, work, schema=USERS)
    assert rows(db, "SELECT * FROM users") == [("a", "xxx"), ("b", "xx"), ("c", "x")]


def test_a_row_that_is_refused_leaves_no_trace(db):
    def work(task, ctx):
        with pytest.raises(pipeloom.MessageRefused):
            ctx.execute("INSERT INTO missing VALUES (?)", 5)
        ctx.execute("INSERT INTO users VALUES ('a', 'x')")

    assert run(["t"], db, work, schema=USERS).done == 1
    assert rows(db, "SELECT * FROM users") == [("a", "x")]


def test_a_thread_that_calls_nothing_but_the_context_can_send(db):
    def work(task, ctx):
        for key, send in (("a", ctx.execute), ("b", ctx.put)):
            arguments = "INSERT INTO users VALUES (?, 'x')", (key,)
            _thread.start_new_thread(send, arguments if key == "a" else (MsgExecute(*arguments),))
        while len(ctx.held) < 2:
            ctx.sleep(0.01)

    run(["t"], db, work, schema=USERS, timeout=WAIT)
    assert rows(db, "SELECT key FROM users ORDER BY key") == [("a",), ("b",)]


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


@pytest.mark.parametrize("atomic", [True, False])
def test_different_statements_are_run_in_the_order_in_which_a_task_executes_them(db, atomic):
    def work(task, ctx):
        for n in range(4):
            ctx.execute("INSERT INTO users VALUES (?, 'x')", (str(n),))
            ctx.execute("UPDATE users SET name = name || ?", (str(n),))

    run(["t"], db, work, schema=USERS, atomic=atomic)
    assert rows(db, "SELECT * FROM users") == [("0", "x0123"), ("1", "x123"), ("2", "x23"), ("3", "x3")]


@pytest.mark.parametrize("how", ["execute", "executemany", "both"])
def test_a_task_that_holds_very_many_rows_is_told_once_of_atomic_false(db, how, caplog, monkeypatch):
    monkeypatch.setattr(pipeloom, "MANY_ROWS", 100)

    def work(task, ctx):
        for n in range(0, 260, 5):
            if how == "execute" or (how == "both" and n % 2):
                for key in range(n, n + 5):
                    ctx.execute("INSERT INTO users VALUES (?, ?)", (f"{task}-{key}", "x"))
            else:
                ctx.executemany("INSERT INTO users VALUES (?, ?)", [(f"{task}-{n + k}", "x") for k in range(5)])

    run(["few", "many"], db, lambda task, ctx: task == "few" or work(task, ctx), schema=USERS)
    assert rows(db, "SELECT count(*) FROM users") == [(260,)]
    told = [record.getMessage() for record in caplog.records if "atomic=False" in record.getMessage()]
    number = 105 if how == "both" else 100  # what executemany sends is counted with the rows before it
    assert told == [f"task 'many' holds {number} rows in memory until it is done; atomic=False streams them instead"]
    caplog.clear()
    with ThreadPoolExecutor(1) as executor:  # where atomic=False is refused
        run(["many"], db, work, executor=executor, schema="DELETE FROM users")
    assert rows(db, "SELECT count(*) FROM users") == [(260,)] and not caplog.records


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
        ("INSERT INTO u(n, k) VALUES ('a, (b)', ?)", [(1,), (2,)]),
        ("INSERT OR REPLACE INTO u VALUES (?, -1.5)", [(1,), (1,), (2,)]),
        ("insert into u values (null, ?)", [(1,), (2,)]),
        ("INSERT INTO u VALUES (?, '?')", [(1,), (2,)]),
        ("INSERT INTO u VALUES (?, 'it''s')", [(1,), (2,)]),
        ("INSERT INTO u VALUES (?, random() < 0 OR 1)", [(1,), (2,)]),
        (
            "INSERT INTO u VALUES (?, ?) ON CONFLICT(k) DO UPDATE SET n = (SELECT max(n) + 1 FROM u)",
            [(1, 0), (2, 0), (3, 0), (1, 0), (2, 0), (3, 0)],
        ),
        (
            "INSERT INTO u VALUES (?, ?) ON CONFLICT(k) DO UPDATE SET n = n + (excluded.n IN keys)",
            [(1, 1), (2, 1), (3, 5), (1, 2), (2, 3), (4, 4), (1, 4)],
        ),
        ("INSERT INTO t VALUES (:a)", [{"a": 1}, {"a": 2}]),
        ("UPDATE t SET a = ? RETURNING a", [(1,), (2,)]),
        ("WITH w AS (SELECT ?) INSERT INTO t SELECT * FROM w", [(1,), (2,)]),
        ("INSERT INTO t DEFAULT VALUES", [(), ()]),
    ],
)
def test_many_rows_mean_what_they_mean_one_by_one(db, sql, values):
    if ("RETURNING" in sql and sqlite3.sqlite_version_info < (3, 35)) or sqlite3.sqlite_version_info < (
        3,
        24,
    ):
        pytest.skip("this SQLite is too old for the statement")
    schema = "CREATE TABLE IF NOT EXISTS t(a); CREATE TABLE IF NOT EXISTS u(k PRIMARY KEY, n);"
    schema += "CREATE VIEW IF NOT EXISTS keys AS SELECT k FROM u"
    run(["t"], db, lambda t, ctx: ctx.executemany(sql, values), schema=schema)
    conn = sqlite3.connect(":memory:")
    conn.executescript(schema)
    for row in values:
        conn.execute(sql, row).fetchall()
    for table in "tu":
        assert rows(db, f"SELECT * FROM {table}") == conn.execute(f"SELECT * FROM {table}").fetchall()
    conn.close()


def test_track_passes_items_on_and_says_how_far_they_are(db):
    display = Recorder()
    run(["t"], db, lambda t, ctx: [*ctx.track("abc")] == [*"abc"] or 1 / 0, progress=display)
    assert MsgTaskProgress(1, 3, 3) in display.told
    run(["t"], db, lambda t, ctx: [*ctx.track("abc", total=9)] == [*"abc"] or 1 / 0, progress=display)
    assert MsgTaskProgress(1, 3, 9) in display.told
    run(["t"], db, lambda t, ctx: [*ctx.track(iter("abc"))] == [*"abc"] or 1 / 0)


def test_track_says_how_far_it_is_ten_times_a_second_at_most(moments):
    ctx, told = pipeloom.TaskContext(None, "task", 1, "name"), []
    for _ in ctx.track(range(10)):
        moments.now += 0.04
        told.append(ctx.news and ctx.news.step)
    assert told == [None] * 3 + [3] * 3 + [6] * 3 + [9] and ctx.news.step == 10


def test_sleep_raises_as_soon_as_the_task_is_cancelled(db):
    def work(task, ctx):
        try:
            ctx.sleep(WAIT)
            told.append("went on")
        finally:
            over.set()

    told, over = [], threading.Event()
    assert run(["a"], db, work, timeout=0.05, check=False).error == 1
    assert over.wait(WAIT) and told == []


def test_in_another_process_sleep_sleeps(monkeypatch):
    slept = []
    monkeypatch.setattr(pipeloom.time, "sleep", slept.append)
    for seconds in (0.5, -1):
        pipeloom.TaskContext(None, "task", 1, "name").sleep(seconds)
    assert slept == [0.5, 0]


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 35), reason="SQLite has no RETURNING")
def test_a_statement_that_returns_rows_is_run_for_each_row(db):
    def work(task, ctx):
        ctx.executemany("INSERT INTO users VALUES (?, ?) RETURNING key", [("a", "x"), ("b", "y")])

    run(["t"], db, work, schema=USERS)
    assert rows(db, "SELECT key FROM users ORDER BY 1") == [("a",), ("b",)]


def test_a_worker_reads_what_is_committed_and_can_change_nothing(db):
    def work(task, ctx):
        with ctx.connect() as conn:
            assert conn.execute("SELECT count(*) FROM users").fetchone() == (0,)
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                conn.execute("INSERT INTO users VALUES (1, 2)")

    odd = db.parent / "a ?#%41é.db"
    run(["t"], odd, work, schema=USERS)
    assert sorted(path.name for path in db.parent.iterdir()) == [odd.name, odd.name + "-lock"]


def test_a_worker_may_change_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def work(task, q):
        os.chdir(str(tmp_path / "elsewhere"))
        with q.connect() as conn:
            return conn.execute("SELECT count(*) FROM pipeline_runs").fetchone()[0]

    assert run(["a"], "job.db", work).done == 1
    assert rows("../job.db", "SELECT result FROM task_runs") == [("1",)]


def test_threads_of_a_worker_may_send_until_its_end_and_are_refused_after_it(db):
    def late(ctx):
        assert over.wait(WAIT)
        ctx.put(MsgTaskProgress(ctx.task_id, 1, 2))  # which nobody needs any more
        ctx.put(MsgTaskFinished(ctx.task_id, "error", "now"))
        with pytest.raises(pipeloom.MessageRefused, match="was not stored"):
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
    assert done.stderr.count("ValueError: in the child") == 2 and "SystemExit" not in done.stderr


# ---- 4.4 Own messages and own tables -------------------------------------------------------------------


def test_a_schema_is_split_where_sqlite_would(db):
    script = """CREATE TABLE a(x); -- a comment; with a semicolon
        CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE a SET x = ';'; END;
        INSERT INTO a VALUES ('x;y') /* the last one ; needs none */"""
    for number, end in enumerate(["", ";", "; -- no statement", " ; /* none; either */ ;"]):
        path = db.parent / f"{number}.db"
        run([], path, nothing, schema=script + end)
        assert rows(path, "SELECT x FROM a") == [(";",)]


def test_a_schema_may_ask_for_something_and_one_of_odd_characters_is_an_error(db):
    run([], db, nothing, schema="CREATE TABLE a(x); SELECT * FROM a, sqlite_master; PRAGMA user_version; SELECT 1")
    assert rows(db, "SELECT count(*) FROM a") == [(0,)]
    for odd in ("\0", "\udc80"):
        with pytest.raises(pipeloom.UsageError, match="schema= failed: "):
            run([], db, nothing, schema=f"CREATE TABLE b(x); -- {odd}")


def test_a_schema_that_fails_is_an_error_and_leaves_nothing_behind(db):
    with pytest.raises(
        pipeloom.UsageError, match=r"schema= failed: near \"TABEL\": .*, in 'CREATE TABEL b\(y\)'"
    ):
        run([1], db, nothing, schema="CREATE TABLE a(x); CREATE TABEL b(y)")
    assert rows(db, "SELECT name FROM sqlite_master") == []


def test_a_table_of_the_users_may_have_any_name(db):
    schema = "CREATE TABLE staged(id INTEGER PRIMARY KEY, name, status); CREATE TABLE message(x)"
    for _ in range(2):
        run(["a"], db, lambda t, ctx: ctx.execute("INSERT INTO staged(name) VALUES (?)", (t,)), schema=schema)
        schema = None
    assert rows(db, "SELECT name FROM staged") == [("a",), ("a",)]


def test_rows_may_reference_their_tasks_row(db):
    schema = "CREATE TABLE made(task INTEGER REFERENCES task_runs(id))"

    def work(task, ctx):
        ctx.execute("INSERT INTO made VALUES (?)", (ctx.task_id if task != "bad" else 99,))

    result = run(iter(["a", "bad", "c"]), db, work, schema=schema, check=False)
    assert (result.done, result.error) == (2, 1)
    assert rows(db, "SELECT count(*) FROM made") == [(2,)]


@pytest.mark.parametrize("atomic", [True, False])
def test_rows_may_reference_any_task_that_has_started_also_beside_bad_ones(db, many_switches, atomic):
    """A batch with a bad row is stored in halves: a task's rows perhaps before its end."""
    schema = "CREATE TABLE made(task INTEGER REFERENCES task_runs(id), value NOT NULL)"
    started = []

    def work(task, ctx):
        started.append(ctx.task_id)
        ctx.execute("INSERT INTO made VALUES (?, ?)", (started[-2:][0], None if task % 100 == 0 else task))

    result = run(range(1_000), db, work, workers=4, schema=schema, atomic=atomic, check=False)
    assert (result.done, result.error) == (990, 10)
    assert rows(db, "SELECT count(*) FROM made") == [(990,)]


@pytest.mark.parametrize("status", ["running", "done"])
def test_a_trigger_that_refuses_the_row_of_a_task_fails_that_task_alone(db, status):
    refuse = f"""CREATE TABLE other(x); CREATE TRIGGER refuse BEFORE INSERT ON task_runs
        WHEN new.name = '7' AND new.status = '{status}' BEGIN SELECT RAISE(ABORT, 'not seven'); END"""

    def work(task, ctx):
        if status == "running" and task == 7:  # else it would be done before it is seen to run
            ctx.sleep(WAIT)  # which that ends

    result = run(range(40), db, work, workers=4, schema=refuse, check=False)
    assert (result.done, result.error) == (39, 1) and "not seven" in result.failures[0].message


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


def test_a_subclass_that_overrides_handle_sees_every_message(db):
    seen = []

    class Mine(SQLiteWriter):
        def handle(self, message):
            seen.append(type(message))
            if isinstance(message, User):
                insert_user(self._conn, message)
            else:
                super().handle(message)

    messages = MsgTaskStarted(1, "a", "now"), User("a", "x"), MsgTaskFinished(1, "done", "now")
    run_alone(db, *messages, kind=Mine, schema=USERS)
    assert rows(db, "SELECT * FROM users") == [("a", "x")]
    assert seen == [MsgTaskStarted, User, MsgTaskFinished]


BAD_STATEMENTS = {  # of load(): what its error says; {line} is that of load()
    "many rows": "NOT NULL constraint failed: t.b; row 1,701 of 3,000 is (1700, None), in 'INSERT INTO t VALUES (?, ?)'",
    "rolled back": "NOT NULL constraint failed: t.b; row 2,501 of 3,000 is (12500, None), in 'INSERT OR ROLLBACK INTO t VALUES (?, ?)'",
    "updates": "NOT NULL constraint failed: t.b; row 8 of 10 is (None, -5), in 'UPDATE t SET b = ? WHERE a = ?'",
    "returning": "NOT NULL constraint failed: t.b; row 3 of 4 is (20002, None), in 'INSERT INTO t VALUES (?, ?) ON",
    "one row": "no such table: nowhere; the row is (1,), in 'INSERT INTO nowhere VALUES (?)'",
    "upsert": "NOT NULL constraint failed: t.b; the row is (1, None), in",
    "put": "no such table: nowhere; in 'DELETE FROM nowhere'",
    "own message": "NOT NULL constraint failed: users.name",
    "long": "no such table: nowhere; the row is ('xxxxxxxxxxxx...xxxxxxxxxxxxx',), in 'INSERT INTO nowhere",
}


RETURNS = sqlite3.sqlite_version_info >= (3, 35)


def load(kind, ctx):
    if kind == "many rows":
        ctx.executemany("INSERT INTO t VALUES (?, ?)", [(n, None if n == 1700 else n) for n in range(3000)])
    if kind == "rolled back":
        ctx.executemany("INSERT OR ROLLBACK INTO t VALUES (?, ?)", [(n, None if n == 12_500 else n) for n in range(10_000, 13_000)])
    if kind == "returning":  # which executemany refuses
        sql = "INSERT INTO t VALUES (?, ?) ON CONFLICT DO NOTHING" + " RETURNING a" * RETURNS
        ctx.executemany(sql, [(20_000 + n, None if n == 2 else n) for n in range(4)])
    for n in range(10 if kind == "updates" else 0):
        ctx.execute("UPDATE t SET b = ? WHERE a = ?", (None if n == 7 else n, -5))
    if kind == "one row":
        ctx.execute("INSERT INTO  nowhere\nVALUES (?)", [1])
    if kind == "upsert":
        ctx.upsert("t", [{"a": 1, "b": None}], key="a")
    if kind == "put":
        ctx.put(MsgExecute("DELETE FROM nowhere"))
    if kind == "own message":
        ctx.put(User("a", None))
    if kind == "long":
        ctx.execute("INSERT INTO nowhere VALUES (?)" + " " * 200 + "-- comment", ("x" * 500,))


def test_a_row_that_fails_among_those_of_other_tasks_fails_its_own_task_and_is_named(db):
    """They come in one batch, as the writer is busy with another message until all have been sent."""
    sent, tasks = threading.Semaphore(0), range(1, 40)

    def work(task, ctx):
        if task == 0:
            return ctx.put(User("gate", "x"))
        ctx.executemany("INSERT INTO made VALUES (?, ?)", [(task, n) for n in range(2)])
        third = None if task % 13 == 0 else 3
        ctx.executemany("INSERT INTO made VALUES (?, ?)", [(task, 2), (task, third)])
        ctx.put(MsgTaskFinished(ctx.task_id, "done", "now"))
        return sent.release()

    def wait_for_all(conn, message):
        while tasks_left and sent.acquire(timeout=WAIT):
            tasks_left.pop()

    tasks_left = list(tasks)
    schema = "CREATE TABLE made(task, n INTEGER NOT NULL)"
    result = run([0, *tasks], db, work, workers=40, schema=schema, handlers={User: wait_for_all}, check=False)
    assert (result.done, result.error, len(result.causes)) == (37, 3, 1)
    assert sorted(re.search("row .*?\\)", failure.message)[0] for failure in result.failures) == [
        f"row 2 of 2 is ({task}, None)" for task in (13, 26, 39)
    ]
    stored = [(task, 4) for task in tasks if task % 13]
    assert rows(db, "SELECT task, count(*) FROM made GROUP BY 1 ORDER BY 1") == stored


def test_a_value_that_cannot_be_bound_is_numbered_within_its_row(db):
    def work(task, ctx):
        ctx.executemany("INSERT INTO t VALUES (?, ?, ?)", [*[(1, 2, 3)] * 47, (1, 2, {})])

    result = run(["a"], db, work, schema="CREATE TABLE t(a, b, c)", check=False)
    assert re.search(r"parameter [23]\b.*row 48 of 48 is \(1, 2, {}\)", result.failures[0].message)


def test_what_is_no_plain_insert_stands_where_it_was_sent(db):
    def work(task, ctx):
        ctx.execute("INSERT INTO t VALUES (?)", (task,))
        if task == 2:
            ctx.execute("UPDATE t SET x = x + 100")
        if task == 4:
            ctx.put(User("x", "x"))

    def double(conn, message):
        conn.execute("UPDATE t SET x = x * 1000")

    run(range(1, 7), db, work, workers=1, schema="CREATE TABLE t(x)", handlers={User: double})
    assert rows(db, "SELECT x FROM t ORDER BY rowid") == [(101_000,), (102_000,), (3_000,), (4_000,), (5,), (6,)]


@pytest.mark.parametrize("atomic", [True, False])
def test_sql_that_fails_names_its_statement_its_row_and_the_users_line(db, atomic):
    schema = f"{USERS}; CREATE TABLE t(a PRIMARY KEY, b NOT NULL); INSERT INTO t VALUES (-5, 5)"
    result = run(
        BAD_STATEMENTS, db, load, schema=schema, handlers={User: insert_user}, check=False, atomic=atomic
    )
    source = FILE.with_name("test_pipeloom.py").read_text(encoding="utf-8").splitlines()
    assert {failure.task for failure in result.failures} == set(BAD_STATEMENTS)
    for failure in result.failures:
        said = BAD_STATEMENTS[failure.task]
        if not atomic:  # rows are sent a thousand at a time
            said = said.replace("row 1,701 of 3,000", "row 701 of 1,000").replace("row 2,501 of 3,000", "row 501 of 1,000")
        assert said in failure.message and len(failure.message) < 250
        line = int(re.search(r" at test_pipeloom.py:(\d+), in load$", failure.cause)[1])
        assert re.search(r"ctx\.(execute|executemany|upsert|put)\(", source[line - 1])
        assert f"test_pipeloom.py\", line {line}, in load" in failure.traceback
        assert "pipeloom.py\", line" not in failure.traceback.replace("test_pipeloom.py", "")


def test_arguments_that_are_no_rows_are_refused_with_the_right_form(db):
    class Frame:
        def to_dict(self, orient):
            raise AssertionError

    def work(task, ctx):
        for send in (
            lambda: ctx.execute("INSERT INTO t VALUES (?)", "hello"),
            lambda: ctx.executemany("INSERT INTO t VALUES (?)", ["hello"]),
            lambda: ctx.upsert("t", Frame(), key="a"),
            lambda: ctx.execute("COMMIT"),
            lambda: ctx.execute("-- so\n/* so */ SAVEPOINT s"),
        ):
            with pytest.raises(pipeloom.MessageRefused) as error:
                send()
            told.append(str(error.value))

        ctx.execute("/* so */" * 40 + "INSERT INTO t VALUES (?)", (1,))  # is understood in no time

    told = []
    run(["a"], db, work, schema="CREATE TABLE t(a)")
    row = "params='hello': expected a row of values; for a single one, (value,)"
    frame = "upsert into 't': rows is one Frame; expected a list of mappings, as in [row] or df.to_dict('records')"
    transaction = "'COMMIT' is not allowed in a task, because the writer manages transactions; remove it"
    commented = "'-- so\\n/* so */ SAVEPOINT s' is not allowed in a task"
    assert told[:4] == [row, row, frame, transaction] and told[4].startswith(commented)
    assert rows(db, "SELECT a FROM t") == [(1,)]


# ---- 4.5 The declarative interface ---------------------------------------------------------------------


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


def test_the_result_is_text_as_it_is_and_anything_else_as_json(db):
    values = ["text", {"a": [1, None]}, None, 7, Path("x")]
    run(range(5), db, lambda t, ctx: values[t])
    assert rows(db, "SELECT result FROM task_runs ORDER BY id") == [
        ("text",), ('{"a": [1, null]}',), (None,), ("7",), ('"x"',),
    ]  # fmt: skip


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
    assert "load" not in {row[1] for row in rows(db)}  # the row of the stage, which could not start


def test_with_even_if_failed_a_task_starts_when_all_before_it_have_ended(db):
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
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'clean_up'") == [
        ('[["error"], ["cancelled"]]',)
    ]


def test_an_each_that_gives_nothing_is_done_at_once(db):
    pipe = pipeloom.Pipeline(db, progress="none")
    for number, each in enumerate(([], iter(()), lambda: [], lambda: iter(()), {}, range(0))):
        pipe.task(nothing, name=f"t{number}", each=each, after=f"t{number - 1}" if number else ())
    pipe.task(lambda ctx: None, name="last", after="t5")
    assert pipe.run().done == 1


@pytest.mark.parametrize("each", [lambda: 3, lambda: "abc", lambda: 1 / 0, iter([1, 2])])
def test_an_each_that_fails_ends_the_run_with_its_error_and_the_rest_is_stored(db, each, caplog):
    def name(item):
        if item == 2:
            raise ZeroDivisionError("two")
        return f"n{item}"

    pipe = pipeloom.Pipeline(db, progress="none")
    pipe.task(lambda ctx: None, name="first")
    pipe.task(lambda ctx, item: None, name=name, each=each, after="first")
    pipe.task(lambda ctx: None, name="last", after="<lambda>")
    with pytest.raises((TypeError, ZeroDivisionError)) as error:
        pipe.run()
    told = [f"each= of '<lambda>' raised {pipeloom._describe(error.value)}; no new tasks will start"]
    assert caplog.messages == ([] if isinstance(error.value, pipeloom.PipeloomError) else told)
    found = {row[1]: row[2] for row in rows(db)}
    assert found.pop("n1", "done") in ("done", "cancelled") and found == {"first": "done"}
    assert rows(db, "SELECT status FROM pipeline_runs") == [("error",)]


def test_long_chains_layers_and_large_fans_run(db):
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
        return f"async {len(shared)}"

    result = run(range(20), db, work, workers=4, check=False)
    assert (result.done, result.error, len(shared)) == (19, 1, 1)
    assert result.failures[0].message == "SystemExit: 7"
    assert rows(db, "SELECT DISTINCT result FROM task_runs WHERE status = 'done'") == [("async 1",)]


@pytest.mark.parametrize("how", ["SystemExit", "KeyboardInterrupt", "stop()"])
def test_what_a_coroutine_starts_cannot_end_the_loop_of_the_others(db, how):
    import asyncio

    async def beside(task):
        if task == 5 and how == "stop()":
            asyncio.get_running_loop().stop()
        elif task == 5:
            raise SystemExit(7) if how == "SystemExit" else KeyboardInterrupt(7)
        await asyncio.sleep(0.001)

    async def work(task, ctx):
        await asyncio.gather(beside(task))

    result = run(range(60), db, work, workers=8, check=False)
    assert result.done == 60 - result.error
    assert [failure.message for failure in result.failures] == ([f"{how}: 7"] if how != "stop()" else [])


def test_what_coroutines_leave_running_is_cancelled_at_the_end_of_the_run(db):
    import asyncio

    async def beside():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append("coroutine")

    async def generator():
        try:
            yield 1
        finally:
            ended.append("generator")

    def ends_the_loop():
        threading.Event().wait(0.2)  # for close(), which comes meanwhile
        sys.exit(3)

    async def work(task, ctx):
        loop, begun = asyncio.get_running_loop(), generator()
        kept.extend([begun, await begun.__anext__(), loop.create_task(beside())])
        asyncio.current_task().add_done_callback(lambda _: loop.call_soon(ends_the_loop))
        await asyncio.sleep(0)

    ended, kept = [], []
    run([1], db, work)
    wait_for(lambda: ended == ["coroutine", "generator"])


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


def test_a_failure_that_is_told_is_not_shown_with_what_an_attempt_before_has_raised(db):
    def work(task, ctx):
        if ctx.attempt == 1:
            raise ValueError("first")
        ctx.put(MsgTaskFinished(ctx.task_id, "error", "now", message="told"))

    result = run([1], db, work, retries=1, retry_delay=0)  # check=True raises what was raised, and nothing was
    assert result.causes == {"told": 1} and result.failures == [pipeloom.Failure("1", "told", None, "told")]
    assert rows(db, "SELECT message, traceback FROM task_runs") == [("told", None)]


def test_a_task_may_have_an_executor_of_its_own(db):
    with ThreadPoolExecutor(1, "its") as its, ThreadPoolExecutor(1, "all") as everybodys:
        pipe = Pipeline(db, progress="none", executor=everybodys)
        for name, options in {"own": {"executor": its}, "none": {"executor": None}, "other": {}}.items():
            pipe.task(lambda ctx: threading.current_thread().name, name=name, **options)
        pipe.run()
    stored = dict(rows(db, "SELECT name, result FROM task_runs"))
    assert (stored["own"], stored["other"]) == ("its_0", "all_0")
    assert "_0" not in stored["none"]


@pytest.mark.parametrize("how", ["raises", "reports", "constraint", "constraint, streamed"])
def test_every_kind_of_failure_is_retried_and_the_last_one_counts(db, how):
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
            wait_until_stored(ctx, "status = 'queued'")
            with ctx.connect() as conn:
                found.extend(
                    conn.execute("SELECT status, attempts, message FROM task_runs WHERE name = 'fails'")
                )
            clock.fly(ctx)

    order, found = [], []
    run(["fails", "b", "last"], db, work, workers=1, retries=1, retry_delay=1000)
    assert order == [("fails", 1), ("b", 1), ("last", 1), ("fails", 2)]
    assert found == [("queued", 1, "attempt 1 failed: RuntimeError: once")]


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


# ---- 4.6 Running ---------------------------------------------------------------------------------------


def test_an_empty_run_is_done(db):
    assert run([], db, nothing).ok
    assert run(iter(()), db, nothing).ok


def test_an_iterator_that_has_a_length_is_asked_for_once(db):
    class Sized:
        def __init__(self):
            self.rest = list(range(64))  # as many as are pulled ahead, so that the end is met later

        def __iter__(self):
            return self

        def __len__(self):
            return len(self.rest)

        def __next__(self):
            if not self.rest:
                raise StopIteration
            return self.rest.pop()

    pipe = Pipeline(db, progress="none", workers=2)
    pipe.task(lambda ctx, item: None, name="load", each=Sized)
    assert pipe.run().done == 64


def test_an_iterator_that_raises_ends_the_run_after_what_runs_has_finished(db):
    def tasks():
        yield from "ab"
        raise LookupError("no more files")

    with pytest.raises(LookupError, match="no more files"):
        run(tasks(), db, nothing)
    assert {row[2] for row in rows(db)} <= {"done", "cancelled"} and len(rows(db)) == 2
    assert rows(db, "SELECT status FROM pipeline_runs") == [("error",)]


def test_runs_follow_each_other_nest_and_work_in_any_thread(tmp_path):
    def work(task, q):
        run([f"{task}-{i}" for i in range(3)], tmp_path / f"{task}.db", nothing)

    thread = threading.Thread(target=lambda: run(["x", "y"], tmp_path / "outer.db", work, workers=2))
    thread.start()
    thread.join(WAIT)
    run(["x", "y"], tmp_path / "outer.db", nothing)
    assert rows(tmp_path / "outer.db", "SELECT status, done FROM pipeline_runs") == [("done", 2)] * 2
    assert len(rows(tmp_path / "x.db")) == len(rows(tmp_path / "y.db")) == 3


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
        f"IntegrityError: NOT NULL constraint failed: users.name at test_pipeloom.py:{line + 4}, in work": 50,
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


@pytest.mark.parametrize("options, level", [({}, 1), ({"durable": True}, 2)])
def test_each_commit_waits_for_the_disk_if_and_only_if_the_run_is_durable(db, options, level):
    def look(conn, message):
        levels.append(conn.execute("PRAGMA synchronous").fetchone()[0])

    levels = []
    run_alone(db, User("a", "b"), handlers={User: look}, **options)
    run([1], db, lambda task, ctx: ctx.put(User("a", "b")), handlers={User: look}, **options)
    assert levels == [level, level]


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


def test_a_name_keeps_its_old_id_if_tasks_with_ids_of_their_own_have_taken_others_of_that_name(db):
    run(["a", "a", "a"], db, nothing)
    assert run(["a", Task(2, "a"), "a"], db, nothing, resume=True).skipped == 3


def test_a_dependent_runs_again_when_something_before_it_has_run(db):
    assert folder_pipeline(db, ["a"]).run().done == 3
    assert folder_pipeline(db, ["a"]).run().skipped == 3
    result = folder_pipeline(db, ["a", "b"]).run()
    assert (result.done, result.skipped) == (3, 1)
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'report'") == [("a b",)]
    assert folder_pipeline(db, ["b"]).run().skipped == 3


def test_functions_run_in_processes_and_all_promises_stay(db):
    schema = "CREATE TABLE made(number, pid); CREATE TABLE square(number)"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        executor.submit(int).result()
        pipe = pipeloom.Pipeline(
            db, schema=schema, progress="none", workers=4, check=False, executor=executor
        )
        pipe.task(in_a_process, each=range(8), retries=1, retry_delay=0)
        pipe.handles(Squared)(lambda conn, m: conn.execute("INSERT INTO square VALUES (?)", (m.number,)))
        result = pipe.run()
        late = pipeloom.Pipeline(db, progress="none", workers=1, check=False, executor=executor, timeout=0.2)
        late.task(in_a_process_for_long, each=[7])
        assert late.run().failures[0].message == "timed out after 0.2 s"
    assert (result.done, result.error, result.cancelled) == (5, 2, 1)
    told = {failure.task: failure for failure in result.failures}
    assert (
        told["in_a_process[2]"].message == "Awkward: two"
        and "raise Awkward" in told["in_a_process[2]"].traceback
    )
    assert told["in_a_process[2]"].cause.startswith("Awkward at test_pipeloom.py:")
    assert told["in_a_process[3]"].message == "told"
    assert [n for (n,) in rows(db, "SELECT number FROM made ORDER BY 1")] == [0, 0, 1, 1, 5, 5, 6, 6, 7, 7]
    assert rows(db, "SELECT number FROM square ORDER BY 1") == [(0,), (1,), (25,), (36,), (49,)]
    assert rows(db, "SELECT count(*) FROM made WHERE pid = ?", os.getpid()) == [(0,)]
    assert rows(db, "SELECT attempts, result FROM task_runs WHERE name = 'in_a_process[5]'") == [
        (2, '{"number": 5}')
    ]
    assert rows(db, "SELECT result FROM task_runs WHERE name = 'in_a_process[6]'") == [("1",)]


def watched(executor, submit):
    """It stays of the library's own class, for whose processes tasks are grouped."""
    executor.submit = partial(submit, executor.submit)
    return executor


SHORT = "CREATE TABLE IF NOT EXISTS made(number, attempt)"


@pytest.mark.parametrize("other", [False, True])
def test_short_tasks_share_the_way_to_a_process_and_each_has_an_end_of_its_own(db, other):
    def submit(submit, *call):
        sent.append(call)
        return submit(*call)

    sent = []
    with watched(ProcessPoolExecutor(2, mp_context=get_context("spawn")), submit) as executor:
        executor.submit(int).result()
        pipe = Pipeline(db, schema=SHORT, progress="none", check=False, executor=executor, workers=4,
                        retries=1, retry_delay=0)  # fmt: skip
        pipe.handles(Squared)(lambda conn, m: None)
        pipe.task(short_in_a_process, each=[
            (number, "", len if number % 20 != 10 else lambda: None) for number in range(400)
        ])  # fmt: skip
        if other:  # which none of the groups must take
            pipe.task(lambda ctx, item: item, name="other", each=range(100), executor=None)
        result = pipe.run()
        assert other or len(sent) < 400  # and 60 of these tasks were sent again
    del executor, pipe, sent
    gc.collect()  # the pool's files
    assert (result.done, result.error, result.cancelled) == (320 + 100 * other, 80, 0)
    done = [number for number in range(400) if number % 20 not in (6, 7, 9, 10)]
    assert rows(db, "SELECT * FROM made ORDER BY 1") == [(number, 1 + (number % 20 == 8)) for number in done]
    of_these = "SELECT result, attempts FROM task_runs WHERE status = 'done' AND name LIKE 'short%' ORDER BY id"
    assert rows(db, of_these) == [(str(number), 1 + (number % 20 == 8)) for number in done]
    told = Counter(re.match(r"\w+", cause)[0] for cause in Counter(result.causes).elements())
    assert told == {"MessageRefused": 20, "UsageError": 20, "ValueError": 20, "told": 20}
    assert [cause for cause in result.causes if "its item cannot be sent to another process: " in cause]


@needs_posix
def test_of_short_tasks_whose_process_dies_each_has_the_error_and_a_resume_does_them_once(db, tmp_path):
    items = [(number, str(tmp_path / "died"), None) for number in range(300) if number % 20 < 5 or number == 150]
    for again in (False, True):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            pipe = Pipeline(db, schema=SHORT, progress="none", check=False, executor=executor, workers=2)
            pipe.task(short_in_a_process, each=items)
            result = pipe.run(resume=again)
    del executor, pipe
    gc.collect()  # their files
    assert result.ok and result.skipped and result.done, result.causes
    assert rows(db, "SELECT * FROM made ORDER BY 1") == [(number, 1) for number, *_ in items]


@pytest.mark.parametrize("called", [False, True])
def test_what_could_not_be_sent_has_the_error_and_takes_no_other_tasks_result(db, called):
    def submit(submit, *call):
        number = next(counted)
        if number == 8 and called:
            submit(*call)  # as where a process cannot be started for it
        if number == 8:
            group.extend(call[1])
            raise OSError(24, "Too many open files")
        return submit(*call)

    counted, group = count(), []
    with watched(ProcessPoolExecutor(1, mp_context=get_context("spawn")), submit) as executor:
        pipe = Pipeline(db, schema=SHORT, progress="none", check=False, executor=executor, workers=1)
        pipe.task(short_in_a_process, each=[(20 * number, "", None) for number in range(100)])
        result = pipe.run()
    del executor, pipe
    gc.collect()  # the pool's files
    assert result.error == len(group) > 1 and result.done == 100 - result.error
    assert len(result.causes) == 1 and result.failures[0].message == "OSError: [Errno 24] Too many open files"
    done = rows(db, "SELECT result, (id - 1) * 20 FROM task_runs WHERE status = 'done' ORDER BY id")
    assert all(int(stored) == number for stored, number in done)
    assert rows(db, "SELECT number FROM made ORDER BY 1") == [(number,) for _, number in done]


INLINE = SimpleNamespace()  # what a function that is pickled finds


def long_inline(task, ctx):
    INLINE.called.append(task)
    if task == 10:
        ctx.put(Squared(task))
    if task in (20, 21, 22, 150):  # of a group that has more behind
        INLINE.while_long(task)
        time.sleep(2 * pipeloom.QUICK)


@pytest.fixture
def inline():
    """A pool of the library's class, which calls at once, in the thread that submits."""

    def submit(_, function, calls):
        future, before = Future(), len(INLINE.called)
        future.set_result(function(calls))
        INLINE.groups.append((len(calls), INLINE.called[before:]))
        return future

    INLINE.called, INLINE.groups, INLINE.while_long = [], [], int
    executor = watched(ProcessPoolExecutor(1), submit)
    yield executor
    executor.shutdown()
    gc.collect()  # its files


@pytest.mark.parametrize("in_one_commit", [False, True])
def test_of_short_tasks_what_has_to_wait_for_a_long_one_is_queued_and_called_once(db, inline, in_one_commit):
    class Seen:
        def start(self, total):
            self.running, self.again, self.done = set(), set(), 0

        def update(self, message):
            if isinstance(message, MsgTaskStarted):
                self.running.add(message.task_id)
            elif message.status == "queued":
                self.running.discard(message.task_id)
                self.again.add(message.task_id)
            else:
                self.running.remove(message.task_id)
                self.done += 1

        def stop(self, result):
            pass

    def while_long(task):
        if not in_one_commit:
            threading.Event().wait(0.2)  # until it is stored that the group runs

    def hold_up(conn, message):
        wait_for(lambda: len(INLINE.called) == 200)

    seen, INLINE.while_long = Seen(), while_long
    handlers = {Squared: hold_up} if in_one_commit else {Squared: nothing}
    run(range(200), db, long_inline, executor=inline, workers=1, progress=seen, handlers=handlers)
    assert sorted(INLINE.called) == list(range(200))
    assert not seen.running and seen.done == 200 and bool(seen.again) != in_one_commit
    (waited,) = [size - len(tasks) for size, tasks in INLINE.groups if 20 in tasks]
    behind = {21, 22} & set(range(21, 21 + waited))
    assert {size for size, tasks in INLINE.groups if behind & set(tasks)} <= {1}  # as they may take long
    assert max(INLINE.groups)[0] == pipeloom.TOGETHER
    assert rows(db, "SELECT DISTINCT status, attempts FROM task_runs") == [("done", 1)]


@needs_posix
def test_ctrl_c_cancels_what_shares_the_way_with_a_long_task_and_has_not_been_called(db, inline):
    class Told(logging.Handler):
        def emit(self, record):
            if "no new tasks" in record.getMessage():
                told.set()

    def while_long(task):
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(WAIT)

    told, handler = threading.Event(), Told()
    INLINE.while_long = while_long
    pipeloom.logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(range(200), db, long_inline, executor=inline, workers=1, handlers={Squared: nothing})
    finally:
        pipeloom.logger.removeHandler(handler)
    called = INLINE.called[:]  # in this order, unless the machine is slow
    assert called[-1] == 20
    counts = dict(rows(db, "SELECT status, count(*) FROM task_runs GROUP BY status"))
    assert counts["done"] == len(called) and set(counts) <= {"done", "cancelled"}
    never = "SELECT DISTINCT started_at, attempts FROM task_runs WHERE status = 'cancelled'"
    assert rows(db, never) in ([], [(None, 0)])
    INLINE.called.clear()
    INLINE.while_long = int
    options = {"workers": 1, "resume": True, "handlers": {Squared: nothing}}
    assert run(range(200), db, long_inline, executor=inline, **options).done == 200 - len(called)
    assert sorted(called + INLINE.called) == list(range(200))


@needs_posix
def test_a_second_ctrl_c_cancels_what_has_begun_with_a_long_task_once(db, inline):
    class Seen:
        def start(self, total):
            self.ends = Counter()

        def update(self, message):
            if isinstance(message, MsgTaskFinished):
                self.ends[message.status] += 1

        def stop(self, result):
            self.result = result

    def while_long(task):  # until both are heeded: the group is cancelled, and then the rest comes back
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: told)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: seen.ends["cancelled"])

    told, handler, seen, before = [], logging.Handler(), Seen(), threading.active_count()
    handler.emit = lambda record: told.append(record) if "no new tasks" in record.getMessage() else None
    INLINE.while_long = while_long
    pipeloom.logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(range(200), db, long_inline, executor=inline, workers=1, progress=seen, handlers={Squared: nothing})
    finally:
        pipeloom.logger.removeHandler(handler)
    wait_for(lambda: threading.active_count() == before)
    (group,) = [tasks for _, tasks in INLINE.groups if 20 in tasks]
    assert seen.ends["queued"] == 0
    assert seen.ends["done"] == seen.result.done == INLINE.called.index(group[0])


def test_the_end_of_a_task_that_another_has_ended_keeps_when_it_started(db):
    begun, ended = threading.Event(), threading.Event()

    def work(task, ctx):
        if task.task_id == 1:
            begun.set()
            return ended.wait(WAIT)
        assert begun.wait(WAIT)
        ctx.put(MsgTaskFinished(1, "done", "now", None, "by another"))
        while True:
            with ctx.connect() as conn:
                if conn.execute("SELECT 1 FROM task_runs WHERE message = 'by another'").fetchone():
                    return ended.set()
            ctx.sleep(0.01)

    run([Task(1, "a"), Task(2, "b")], db, work, workers=2, timeout=WAIT)
    assert rows(db, "SELECT status, attempts, started_at IS NULL, message FROM task_runs WHERE id = 1") == [
        ("done", 1, 0, "")
    ]


NOT_PICKLED = "cannot be sent to another process: .*; define it with def at the top of a module, or"


@pytest.mark.parametrize(
    "function, options, told",
    [
        (lambda ctx: None, {}, NOT_PICKLED),
        (None, {}, NOT_PICKLED),
        (awaited, {}, "is an async def, which needs the event loop of this process;"),
        (reads_the_database, {"atomic": False}, "has atomic=False, which streams rows in this process;"),
    ],
)
def test_what_does_not_travel_to_an_executor_is_one_error_at_once(db, function, options, told):
    def local(ctx):
        pass

    with ProcessPoolExecutor(1) as executor:
        pipe = Pipeline(db, progress="none", executor=executor)
        pipe.task(function or local, name="odd", **options)
        whole = rf"^task 'odd' {told} run it on threads, as with @pipe.task\(executor=None\)$"
        with pytest.raises(pipeloom.UsageError, match=whole):
            pipe.run()
        with pytest.raises(pipeloom.UsageError, match="^worker_fn cannot"):
            run([1], db, lambda task, ctx: None, executor=executor)
    assert not db.exists()


class Elsewhere(Executor):
    """Another machine: what is sent there is pickled, and the database is not at its path."""

    def __init__(self, db):
        self.db = os.fsencode(str(db))

    def submit(self, function, *arguments):
        future = Future()
        sent = pickle.dumps(arguments).replace(self.db, b"/" + b"x" * (len(self.db) - 1))
        future.set_result(function(*pickle.loads(sent)))
        return future


def test_a_task_on_a_machine_without_the_database_is_told_so_when_it_reads(db):
    pipe = Pipeline(db, progress="none", check=False, executor=Elsewhere(db))
    pipe.task(reads_the_database)
    (failure,) = pipe.run().failures
    assert re.fullmatch(
        "UsageError: ctx.connect\\(\\): the database '/x+' cannot be read here, but only by its writer; "
        "use a file, and threads or processes of this machine",
        failure.message,
    )


ENGINES = """
import contextlib, os, signal, sys, pipeloom
kind = sys.argv[-1]
@contextlib.contextmanager
def engine():
    if kind == "loky":
        import loky
        yield loky.get_reusable_executor(2)
    elif kind == "dask":
        from dask.distributed import Client, LocalCluster
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
            with Client(cluster) as client:
                yield client.get_executor()
    elif kind == "mpi":
        from mpi4py.futures import MPIPoolExecutor
        with MPIPoolExecutor() as pool:
            yield pool
    else:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        with ProcessPoolExecutor(2, get_context(kind)) as pool:
            yield pool
def work(ctx, number):
    ctx.execute("INSERT INTO made VALUES (?, ?)", (number, os.getpid()))
    if number == 7 and kind != "mpi" and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError("three")
pipe = pipeloom.Pipeline("x.db", schema="CREATE TABLE IF NOT EXISTS made(number, pid)", workers=4, check=False)
pipe.task(work, each=range(20))
if __name__ == "__main__":
    for _ in range(2):
        with engine() as executor:
            result = pipe.run(executor=executor, resume=True, progress="log")
        print(result.done + result.skipped, result.error, result.cancelled, *(c[:40] for c in result.causes))
    print(os.getpid())
"""


@needs_posix
@pytest.mark.parametrize("kind", ["spawn", "fork", "forkserver", "loky", "dask", "mpi"])
def test_on_every_engine_a_process_is_killed_and_a_resume_finishes_exactly_once(home, kind):
    (home / "job.py").write_text(ENGINES)
    command = [sys.executable, "job.py", kind]
    if kind in ("loky", "dask"):
        pytest.importorskip({"dask": "distributed"}.get(kind, kind))
    elif kind == "mpi":
        pytest.importorskip("mpi4py")
        mpiexec = shutil.which("mpiexec", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        command = [mpiexec, "-n", "3", sys.executable, "-m", "mpi4py.futures", *command[1:]]
    done = subprocess.run(command, cwd=str(home), timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first, second, pid = done.stdout.decode().splitlines() if not done.returncode else [done.stderr.decode()] * 3
    numbers, executor_lost = list(map(int, first.split()[:3])), kind not in ("dask", "mpi")
    assert sum(numbers) == 20 and (numbers[0] < 19) == executor_lost, first  # dask runs a lost task again itself
    assert second.startswith("19 1 0 ValueError at job.py:"), second
    assert sorted(n for (n,) in rows(home / "x.db", "SELECT number FROM made")) == [*range(3), *range(4, 20)]
    assert (int(pid),) not in rows(home / "x.db", "SELECT DISTINCT pid FROM made")
    if executor_lost:
        (message,) = rows(home / "x.db", "SELECT DISTINCT status FROM pipeline_runs WHERE id = 1")
        assert message == ("error",)


INTERPRETERS = """
from concurrent.futures import InterpreterPoolExecutor
import pipeloom
pipe = pipeloom.Pipeline("x.db", schema="CREATE TABLE made(number)", workers=4, check=False, progress="none")
@pipe.task(each=range(20))
def work(ctx, number):
    ctx.execute("INSERT INTO made VALUES (?)", (number,))
    return 1 / (number - 7)
if __name__ == "__main__":
    with InterpreterPoolExecutor(2) as executor:
        result = pipe.run(executor=executor)
    print(result.done, result["work[9]"], *result.causes)
"""


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python has interpreters of its own from 3.14 on")
def test_functions_run_in_interpreters_of_their_own(home):
    (home / "job.py").write_text(INTERPRETERS)
    done = python("job.py", cwd=home, code=0)
    assert done.stdout == "19 0.5 ZeroDivisionError at job.py:8, in work\n", done.stderr
    assert sorted(n for (n,) in rows(home / "x.db", "SELECT number FROM made")) == [*range(7), *range(8, 20)]


SUBINTERPRETER = """
import sys
code = '''
import sys
sys.path.insert(0, ".")
import pipeloom
result = pipeloom.run_pipeline(range(3), "x.db", worker_fn=lambda task, ctx: None, progress="none")
print(result.done, flush=True)
'''
try:
    import _testcapi
except ImportError:
    print("skip")
else:
    sys.exit(_testcapi.run_in_subinterp(code) != 0)  # as mod_wsgi makes them
"""


def test_it_runs_in_a_subinterpreter(home):
    """There, the main thread may take no signals either."""
    done = python("-c", SUBINTERPRETER, cwd=home, timeout=HANG)
    if done.stdout.strip() == "skip":
        pytest.skip("this Python has no _testcapi")
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
    assert [row[2] for row in rows(home / "x.db")] == ["done"] * 3


def test_a_stored_traceback_begins_at_the_users_first_frame_and_an_error_shows_its_root(db):
    async def waits(ctx):
        raise LookupError("in a coroutine")

    def chained(ctx):
        try:
            json.loads("{")
        except ValueError as error:
            raise RuntimeError("Execution failed") from error

    pipe = Pipeline(db, progress="none", check=False)
    for function in (waits, chained):
        pipe.task(function, timeout=60)
    failures = {failure.task: failure for failure in pipe.run().failures}
    for failure in failures.values():
        first = failure.traceback.splitlines()[1]
        assert "test_pipeloom.py" in first and "asyncio" not in failure.traceback
        assert "pipeloom.py" not in failure.traceback.replace("test_pipeloom.py", "")
    root = "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert failures["chained"].message == f"RuntimeError: Execution failed (from {root})"


def test_a_cause_is_no_line_of_a_library_or_of_a_compiled_module(db):
    def work(task, ctx):
        names = {}
        code = compile("def parse(): raise ValueError('no number')", "pandas/_libs/parsers.pyx", "exec")
        exec(code, names)
        names["parse"]()

    (cause,) = run(["a"], db, work, check=False).causes
    assert re.fullmatch(r"ValueError at test_pipeloom.py:\d+, in work", cause)


def test_a_timeout_is_of_the_line_where_the_function_hangs(db, clock):
    def one(task, ctx):
        clock.advance(ctx, 61)
        ctx.sleep(WAIT)

    def other(task, ctx):
        clock.advance(ctx, 61)
        ctx.sleep(WAIT)

    result = run(["a", "b"], db, lambda t, c: (one if t == "a" else other)(t, c), timeout=60, check=False, workers=1)
    assert sorted(cause.rpartition(", in ")[2] for cause in result.causes) == ["one", "other"]
    assert all(cause.startswith("timed out after 60 s at test_pipeloom.py:") for cause in result.causes)
    assert all("threading.py" not in failure.traceback for failure in result.failures)


def test_a_result_is_one_line_and_gives_what_its_tasks_have_stored(db):
    pipe = Pipeline(db, progress="none")
    pipe.task(lambda ctx: {"rows": 7}, name="report")
    pipe.task(lambda ctx, item: item, name="load", each=["a"])
    for skipped in (0, 2):
        result = pipe.run(resume=True)
        assert result.skipped == skipped
        assert result["report"] == '{"rows": 7}' and result["load[a]"] == "a"
        with pytest.raises(KeyError):
            result["nothing"]
    assert re.fullmatch(r"<RunResult 2: 0 done, 2 skipped in \d.\d s; .*test.db>", repr(result))
    assert pipeloom.RunResult(1, done=1, error=2, cancelled=4, skipped=8, elapsed=0.5).total == 15
    result = pipe.run(store_task_status=False, db_path=db.with_name("other.db"))
    with pytest.raises(pipeloom.DatabaseError, match="has no results: no such table"):
        result["report"]


def test_a_pipeline_runs_on_another_database(tmp_path):
    pipe = Pipeline(tmp_path / "one.db", progress="none")
    pipe.task(lambda ctx: None, name="a")
    assert pipe.run(tmp_path / "other.db").done == pipe.run(db_path=str(tmp_path / "third.db")).done == 1
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["other.db", "third.db"]


def test_redo_runs_a_task_again_and_what_comes_after_it(db):
    def pipeline(ran):
        pipe = Pipeline(db, progress="none", workers=1)
        pipe.task(lambda ctx, item: ran.append(f"load[{item}]"), name="load", each=["a", "b"])
        pipe.task(lambda ctx: ran.append("report"), name="report", after="load")
        pipe.task(lambda ctx: ran.append("other"), name="other")
        return pipe

    pipeline([]).run()
    for redo, expected in (
        (["load[b]"], ["load[b]", "report"]),
        (["load"], ["load[a]", "load[b]", "report"]),
        (("report", "other"), ["other", "report"]),
    ):
        ran = []
        result = pipeline(ran).run(redo=redo)
        assert sorted(ran) == expected and result.done == len(expected) and result.total == 4
    with pytest.raises(pipeloom.UsageError, match="redo='lod': no task has this name; there are load, report, other"):
        pipeline([]).run(redo=["report", "lod"])
    assert rows(db, "SELECT count(*) FROM pipeline_runs") == [(4,)]
    with pytest.raises(pipeloom.UsageError, match="no task has this name"):
        pipeline([]).run(redo=["\udcff"])
    with pytest.raises(pipeloom.UsageTypeError, match="redo='load': expected a list of names of tasks"):
        pipeline([]).run(redo="load")


def test_an_each_that_gives_no_item_warns(db, caplog):
    pipe = Pipeline(db, progress="none")
    pipe.task(lambda ctx, item: None, name="load", each=lambda: iter(()))
    pipe.task(lambda ctx: None, name="report", after="load")
    assert pipe.run().done == 1
    assert caplog.messages == [
        "each= of task 'load' gave no item, so it has nothing to do; check it, if that is a surprise"
    ]


def test_a_function_that_is_declared_again_replaces_itself(db):
    """As the cell of a notebook that is changed and run again; two functions of one name are an error."""
    pipe = Pipeline(db, progress="none")
    for cell, result in (("cell-1", 1), ("cell-1", 2), ("cell-2", 3)):
        names = {"pipe": pipe, "__name__": "__main__"}
        exec(compile(f"@pipe.task\ndef work(ctx): return {result}", cell, "exec"), names)
    assert pipe.run()["work"] == "3"
    with pytest.raises(pipeloom.UsageError, match="two tasks are named 'work'"):
        exec(compile("\n\n@pipe.task\ndef work(ctx): return 4", "cell-2", "exec"), names)
    with pytest.raises(pipeloom.UsageError, match="two tasks are named 'made'"):
        for _ in range(2):

            @pipe.task(name="made")
            def made(ctx):
                pass


@pytest.mark.parametrize("how", ["killed", "fail_fast", "interrupted"])
def test_a_run_of_everything_that_was_cut_short_is_finished_by_resume_though_all_was_done_before(db, caplog, how):
    def begin_anew(run_number):
        def work(ctx, item):
            if run_number == 2 and item == 2:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "interrupted":
                    os.kill(os.getpid(), signal.SIGINT)
                1 / (how != "fail_fast")
            ctx.execute("INSERT OR REPLACE INTO made VALUES (?, ?)", (item, run_number))

        schema = "CREATE TABLE IF NOT EXISTS made(item INTEGER PRIMARY KEY, run INTEGER)"
        pipe = Pipeline(db, schema=schema, progress="none", workers=1, check=False)
        pipe.task(work, name="load", each=range(3_000))
        return pipe

    assert begin_anew(1).run().done == 3_000
    if how == "killed":
        in_a_child(begin_anew(2).run)
    else:
        with pytest.raises(KeyboardInterrupt) if how == "interrupted" else nullcontext():
            begin_anew(2).run(fail_fast=True)
    redone = rows(db, "SELECT count(*) FROM made WHERE run = 2")[0][0]
    assert redone < 3_000 and (redone or how == "killed")
    result = begin_anew(3).run(resume=True)
    assert (result.done, result.skipped) == (3_000 - redone, redone)
    assert rows(db, "SELECT count(*) FROM made WHERE run = 1") == [(0,)]
    assert begin_anew(4).run(resume=True).skipped == 3_000
    told = "run 2 was started without resume and cut short: what was done before it is done again"
    assert [record.getMessage() for record in caplog.records if "cut short" in record.getMessage()] == [told]


def test_a_run_of_everything_that_got_to_its_last_task_or_to_none_leaves_what_others_have_done(db):
    def failing():
        raise OSError("no such folder")
        yield

    run(["a", "b"], db, nothing)
    run(["c"], db, lambda task, ctx: 1 / 0, check=False)  # as a whole, with other tasks
    with pytest.raises(OSError):
        run(failing(), db, nothing)
    assert run(["a", "b", "c"], db, nothing, resume=True).skipped == 2


def test_with_resume_tasks_without_a_name_of_their_own_are_warned_of(db, caplog):
    class Job:
        pass

    pipe = Pipeline(db, progress="none")
    pipe.task(nothing_each, name="load", each=[Job()])
    pipe.run()
    assert caplog.messages == []
    pipe.run(resume=True)
    run([Job(), "x"], db, nothing, resume=True)
    run([Task(5, "x"), "y"], db, nothing, resume=True)
    warned = [message.partition(" have no names")[0] for message in caplog.messages if "have no names" in message]
    assert warned == ["items of task 'load'", "tasks"]


def test_what_a_name_function_returns_is_the_name_and_only_nothing_is_counted(db):
    pipe = Pipeline(db, progress="none")
    pipe.task(nothing_each, name=lambda item: item, each=[0, "", None, "a"])
    pipe.run()
    assert [name for _, name, _ in rows(db)] == ["0", "nothing_each[2]", "nothing_each[3]", "a"]


def test_a_redo_of_what_does_not_come_any_more_is_told(db, caplog):
    with pytest.raises(pipeloom.UsageError, match="redo='no': no task has this name; none has run yet"):
        run(["a"], db, nothing, redo=["no"])
    run(["a", "b"], db, nothing)
    run(["\x1b[31m"], db, nothing)
    with pytest.raises(pipeloom.UsageError, match=r"no task has this name; there are .*\?\[31m"):
        run(["a"], db, nothing, redo=["no"])
    assert run(["b", "c"], db, nothing, redo=["a", "b"]).done == 2
    assert "redo='a': no task of this run has this name" in caplog.messages
    assert not any("redo='b'" in message for message in caplog.messages)


# ---- 4.7 Progress --------------------------------------------------------------------------------------


def test_nothing_is_shown_before_it_is_committed(db):
    display = Recorder(db)
    run(["a", "b"], db, lambda t, q: q.progress(1, 2, "half"), progress=display)
    assert display.told[0] == ("start", 2) and display.told[-1][0] == "stop" and display.told[-1][1].done == 2
    kinds = {MsgTaskStarted: "running", MsgTaskProgress: "running", MsgTaskFinished: "done"}
    assert len(display.stored) == len(display.messages()) >= 4
    for message, (status,) in zip(display.messages(), display.stored):
        assert status in (kinds[type(message)], "done")


def test_a_run_where_all_is_well_says_nothing(db, caplog):
    assert run(range(3), db, lambda task, ctx: ctx.progress(1, 2)).done == 3
    assert caplog.messages == []


def test_without_a_terminal_a_run_writes_one_plain_line_at_its_end(home):
    (home / "t.py").write_text(THREE_TASKS)
    done = python("t.py", cwd=home, code=0)
    assert done.stdout == "" and re.fullmatch(r"3 done in .* s; database t.db\n", done.stderr)  # the summary
    (home / "t.py").write_text(THREE_TASKS.replace("pipe.main()", "pipe.run()"))
    done = python("t.py", cwd=home, code=0)
    line = r"\d\d:\d\d:\d\d pipeloom: 3/3 done  0:00:0\d\n"
    assert done.stdout == "" and re.fullmatch(line, done.stderr)


@needs_posix
def test_bars_and_log_lines_share_a_terminal_and_only_the_overall_bar_stays(homes):
    def one(progress):
        home = homes()
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

    at_once(one, [("ansi",)] + [("rich",)] * bool(rich))


LOGGING_PROGRAM = """
import logging, sys, threading, pipeloom
logging.basicConfig(level=logging.INFO)
up = threading.Event()
def work(task, ctx):
    up.set()
    logging.info("logged %s", task)
    print("half", end=" "); print("printed", task)
    assert sys.stdout.write("more") == 4
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
def test_no_line_that_is_printed_or_logged_in_any_way_is_lost_or_torn(homes):
    """In one run, and in two at once, which share the screen."""

    def one(progress, runs):
        home = homes()
        (home / "t.py").write_text(LOGGING_PROGRAM)
        code, written = on_terminal(["t.py"], [progress, str(runs)], home)
        assert code == 0, written
        shown = screen(written)
        for number in [*range(8), *range(100, 108)][: 8 * runs]:
            assert shown.count(f"INFO:root:logged {number}") == 1, shown
            assert sum(line.endswith(f"half printed {number}") for line in shown) == 1, shown
        assert sum(line.startswith("All tasks") for line in shown) == runs, shown
        assert "".join(shown).count("more") == 8 * runs, shown

    at_once(one, [(progress, runs) for progress in ("ansi", "auto") for runs in (1, 2)])


def failing(task, ctx):
    if task == "worse":
        ctx.put(MsgTaskFinished(ctx.task_id, "error", "now", None, "as I say"))
    elif task == "\x1b[2J":
        raise RuntimeError("no")
    else:
        raise ValueError(f"bad\n{task}")


def test_a_failure_is_one_line_in_the_log_ten_of_one_cause_at_most(db, caplog):
    tasks = [*range(25), "worse", "\x1b[2J"]
    assert run(tasks, db, failing, check=False, workers=1).error == 27
    said = [record.getMessage() for record in caplog.records]
    line = failing.__code__.co_firstlineno + 6
    assert said[0] == f"0 failed: ValueError: bad 0 (test_pipeloom.py:{line})"
    assert said[9].endswith(" [more failures like this one will only be counted]")
    assert said[10:] == [
        "worse failed: as I say",
        f"?[2J failed: RuntimeError: no (test_pipeloom.py:{line - 2})",
    ]
    assert {record.levelname for record in caplog.records} == {"ERROR"}


@needs_posix
@pytest.mark.parametrize("arguments", ["", "-l log"])
def test_on_a_terminal_a_failure_is_a_red_line_above_the_bars_and_the_summary_the_last_word(home, arguments):
    (home / "t.py").write_text(
        THREE_TASKS.replace("ctx.sleep(0.1)", "ctx.sleep(0.3 * item); assert item - 1, 'no good, ' * 9")
    )
    code, written = on_terminal(["t.py"], arguments.split(), home)
    shown = screen(written)
    assert code == 1
    (line,) = [line for line in shown if "work[1] failed: AssertionError" in line]
    assert re.match(r"\d\d:\d\d:\d\d ERROR    work\[1\] failed", line), line
    assert line.endswith("… (t.py:5)") and len(line) == 79
    assert re.search(r"\x1b\[31m\d\d:\d\d:\d\d ERROR    work\[1\] failed.*t.py:5\)\x1b\[0m\r", written)
    assert not any("All tasks" in line for line in shown), shown  # the summary says it
    assert sum("2 done, 1 failed" in line for line in shown) == 1


MANAGERS = """
import sys, threading, pipeloom
if sys.argv[1] == "ansi": pipeloom._rich_console = lambda: None
up = threading.Event()
def work(task, ctx):
    for step in ctx.track(range(4)):
        ctx.sleep(0.06)
    print("printed", task)
    for percent in range(3): sys.stderr.write(f"\\rover and over {percent}")
    sys.stderr.write("\\n")
with pipeloom.make_overall_progress() as overall, pipeloom.make_task_progress() as passing:
    bar = overall.add_task("[cyan]Mine", total=4)
    passing.add_task("Passing", total=4)
    overall.advance(bar, 3)
    pipeloom.run_pipeline(range(6), "m.db", workers=3, worker_fn=work, progress=sys.argv[1])
    overall.update(bar, advance=1)
assert threading.active_count() == 1, threading.enumerate()
"""


@needs_posix
@pytest.mark.parametrize("progress", ["ansi", pytest.param("rich", marks=needs_rich)])
def test_a_run_and_both_progress_managers_share_the_screen(home, progress):
    (home / "t.py").write_text(MANAGERS)
    code, written = on_terminal(["t.py"], [progress], home)
    shown = screen(written)
    assert code == 0, written
    assert "Passing" in written and not any("Passing" in line for line in shown), shown
    assert sum(line.startswith("Mine") and "100%" in line for line in shown) == 1, shown
    assert sum(line.startswith("All tasks") and "6/6 done" in line for line in shown) == 1, shown
    assert sum(line.startswith("printed") for line in shown) == 6 and len(shown) == 14, shown
    # a half line that is written over and over is kept once
    assert sum(line == "over and over 2" for line in shown) == 6 and "over and over 1" not in written, shown


def test_a_notebook_gets_a_line_every_two_seconds_and_other_streams_one_every_ten(moments, monkeypatch):
    for module, every in (("io", 10), ("ipykernel.iostream", 2)):
        stream = type("Stream", (io.StringIO,), {"__module__": module})()
        monkeypatch.setattr(sys, "stderr", stream)
        board = pipeloom._LogLines()
        board.tick()  # the display thread is there before the run begins
        board.start(10)
        board.update(MsgTaskStarted(1, "one", "now"))
        for _ in range(101):
            board.tick()
            moments.now += 0.2
        lines = stream.getvalue().splitlines()
        assert len(lines) == 20 / every and lines[-1].endswith("0/10 done  0:00:20  1 running")
        board.stop(pipeloom.RunResult(1, 9, 1, 0, 0, 20.2))
        assert stream.getvalue().endswith("9/10 done  1 failed  29.7/min  0:00:20\n")


@pytest.fixture
def logging_as_in_a_program(monkeypatch):
    """The loggers as they are where nobody has set anything up; pytest's handlers are back after it."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    levels = root.level, pipeloom.logger.level
    yield root
    for log in (root, pipeloom.logger):
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
    root.setLevel(levels[0])
    pipeloom.logger.setLevel(levels[1])


def test_log_lines_carry_the_clock_and_the_log_file_gets_plain_lines_with_the_date(
    tmp_path, capsys, logging_as_in_a_program
):
    pipeloom.setup_logging(1, tmp_path / "log")
    pipeloom.setup_logging(1, tmp_path / "log")
    pipeloom.logger.info("loading [/tmp/x] \x1b")
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO     loading \[/tmp/x\] \x1b\n", capsys.readouterr().err)
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO \[pipeloom\] loading \[/tmp/x\] \x1b\n"
    assert re.fullmatch(line, (tmp_path / "log").read_text())


def test_a_root_logger_that_has_handlers_is_left_alone_and_no_line_is_there_twice(
    tmp_path, capsys, logging_as_in_a_program
):
    root = logging_as_in_a_program
    for stream, shown in ((sys.stderr, "theirs: hello\n"), (io.StringIO(), " INFO     hello\n")):
        root.handlers[:] = [logging.StreamHandler(stream)]
        root.handlers[0].setFormatter(logging.Formatter("theirs: %(message)s"))
        root.setLevel(logging.ERROR)
        before = list(root.handlers)
        pipeloom.setup_logging(1, tmp_path / "log")
        pipeloom.logger.info("hello")
        logging.getLogger("other").info("not asked for")
        assert root.handlers == before and root.level == logging.ERROR
        said = capsys.readouterr().err
        assert said.endswith(shown) and said.count("\n") == 1
    assert (tmp_path / "log").read_text().count("hello") == 2


def test_the_log_file_has_failures_retries_and_how_the_run_ended(home):
    (home / "t.py").write_text(
        "import pipeloom\n"
        "pipe = pipeloom.Pipeline('t.db', retries=1, retry_delay=0, check=False)\n"
        "@pipe.task(each=[1, 2])\n"
        "def work(ctx, n): return 1 / (n - 1)\n"
        "pipe.main()"
    )
    done = python("t.py", "-v", "-l", "log", cwd=home, code=1)
    lines = (home / "log").read_text().splitlines()
    assert all(re.match(r"[\d-]{10} [\d:]{8},\d+ (INFO|ERROR) \[pipeloom\] ", line) for line in lines)
    failed = "work[1] failed: ZeroDivisionError: division by zero (t.py:4)"
    for said in (lines, done.stderr.splitlines()):
        assert sum("retrying in" in line for line in said) == 1
        assert sum(line.endswith(failed) for line in said) == 1
        assert sum("1 done, 1 failed in" in line for line in said) == 1  # on stderr by the summary alone
    assert re.search(r"run 1: 1 done, 1 failed in \d", lines[-1])
    (home / "log").unlink()
    done = python("t.py", "-l", "log", cwd=home, code=1)
    assert "retrying in" in (home / "log").read_text() and "retrying in" not in done.stderr


class Asking(logging.Handler):
    """A logging handler that finds out who calls it."""

    def __init__(self):
        super().__init__()
        self.threads = set()

    def emit(self, record):
        self.threads.add(threading.current_thread().name)


@pytest.mark.parametrize("progress", ["none", "log"])
def test_what_a_run_has_to_say_is_logged_by_the_display_thread(db, progress, monkeypatch):
    handler = Asking()
    monkeypatch.setattr(pipeloom.logger, "handlers", [handler])
    monkeypatch.setattr(pipeloom.logger, "level", logging.DEBUG)
    pipeloom.logger.manager._clear_cache()
    result = run(range(3), db, failing, check=False, retries=1, retry_delay=0, progress=progress)
    pipeloom.logger.manager._clear_cache()
    assert result.error == 3 and handler.threads == {"pipeloom-display"}


LONG_NAMES = """
import pipeloom
pipe = pipeloom.Pipeline("t.db", check=False, workers=1)
@pipe.task(each=[f"/srv/data/incoming/2026/11/21/store_{n:03}.csv" for n in range(30)])
def load(ctx, path):
    raise RuntimeError("HTTP 404 for " + path if "_029" not in path else "the disk is full")
pipe.main()
"""


@needs_posix
def test_whatever_the_window_a_failure_line_keeps_error_and_place_and_no_new_error_is_hidden(home):
    (home / "t.py").write_text(LONG_NAMES)
    code, written = on_terminal(["t.py"], [], home)
    shown = [line for line in screen(written) if " failed: " in line]
    assert code == 1 and len(shown) == 11, shown  # ten of one kind, and the other
    assert all("failed: RuntimeError: " in line and "(t.py:6)" in line for line in shown), shown
    assert "RuntimeError: the" in shown[-1] and len(shown[0]) == 79
    whole = written.replace("\r", "")
    assert "load[/srv/data/incoming/2026/11/21/store_000.csv] and 28 more: RuntimeError: HTTP 404" in whole
    assert "load[/srv/data/incoming/2026/11/21/store_029.csv]: RuntimeError: the disk is full (t.py:6, in load)" in whole


# ---- 4.8 What is stored --------------------------------------------------------------------------------


def test_one_task_is_one_row_however_many_messages_it_sent(db):
    with closing(pipeloom.connect(db)) as conn:
        pipeloom.init_schema(conn, store_task_status=True)
        conn.execute("CREATE TABLE written(id)")
        for what in ("INSERT", "UPDATE"):
            write = "BEGIN INSERT INTO written VALUES (new.id); END"
            conn.execute(f"CREATE TRIGGER on_{what} AFTER {what} ON task_runs {write}")
        conn.commit()
    q = queue.Queue()
    q.put(MsgTaskStarted(1, "one", "now"))
    for step in range(1, 1001):
        q.put(MsgTaskProgress(1, step, 1000, f"step {step}"))
    for message in (MsgTaskFinished(1, "done", "now"), SENTINEL):  # all of it is there when the writer comes
        q.put(message)
    writer = SQLiteWriter(db, q)
    writer.start()
    writer.join(WAIT)
    assert rows(db, "SELECT id FROM written") == [(1,)]
    assert rows(db, "SELECT progress, message, status FROM task_runs") == [(1.0, "", "done")]


def test_how_many_items_a_function_lists_is_stored_before_they_are_all_pulled(db):
    def work(ctx, item):
        if item == 0:
            with ctx.connect() as conn:
                wait_for(lambda: conn.execute("SELECT total FROM pipeline_runs").fetchone() == (5_000,))

    pipe = Pipeline(db, progress="none", workers=1)
    pipe.task(work, each=lambda: list(range(5_000)))
    assert pipe.run().done == 5_000


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
    assert rows(db, "SELECT name, result FROM task_runs WHERE name IN ('first', 'last')") == [
        ("first", None),
        ("last", "4"),
    ]
    assert rows(db, "SELECT total FROM pipeline_runs") == [(4,)]


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


def test_a_database_of_the_original_is_opened_and_completed(db):
    execute(
        db,
        ORIGINAL
        + "INSERT INTO task_runs(id, name, status) VALUES (1, 'old', 'running'), (2, 'fine', 'done')",
    )
    run([Task(3, "new")], db, nothing)
    assert rows(db) == [(1, "old", "cancelled"), (2, "fine", "done"), (3, "new", "done")]
    assert rows(db, "SELECT attempts FROM task_runs WHERE id = 3") == [(1,)]


def test_a_database_of_the_original_is_resumed_by_its_ids(db):
    execute(
        db, ORIGINAL + "INSERT INTO task_runs(id, name, status) VALUES (1, 'a', 'running'), (2, 'b', 'done')"
    )
    assert run([Task(1, "a"), Task(2, "b")], db, nothing, resume=True).skipped == 1
    assert rows(db) == [(1, "a", "done"), (2, "b", "done")]


@pytest.mark.parametrize("table", ["pipeline_runs", "task_runs"])
def test_without_status_a_table_of_the_users_may_have_the_name_of_ours(db, table):
    rows(db, f"CREATE TABLE {table}(x)")
    assert run(["a"], db, nothing, store_task_status=False).done == 1


# ---- 4.9 The command line and status -------------------------------------------------------------------


def test_the_demo_works_at_once_in_an_empty_directory(homes):
    def one(start):
        home = homes()
        if start == "-m repo.vendor.pipeloom":
            vendored(home)
        elif start == "app.zip":
            with zipfile.ZipFile(str(home / "app.zip"), "w") as file:
                file.write(str(home / "pipeloom.py"), "pipeloom.py")
                file.writestr("__main__.py", "import sys, pipeloom; sys.exit(pipeloom.main())")
            (home / "pipeloom.py").unlink()
        done = python(*start.split(), "demo", "--fail", "2", "-n", "4", cwd=home, code=1)
        assert "2 done, 2 failed" in done.stderr
        assert "RuntimeError: this task was asked to fail" in done.stderr
        found = rows(
            home / "wal_demo.db", "SELECT status, result, message FROM task_runs WHERE id > 2 ORDER BY id"
        )
        assert found == [("done", f"ok:task-{id}", "completed") for id in (3, 4)]
        assert rows(home / "wal_demo.db", "SELECT DISTINCT status FROM task_runs WHERE id < 3") == [
            ("error",)
        ]
        if start == "pipeloom.py":
            done = python(*start.split(), "demo", "-n", "4", "--resume", cwd=home, code=0)
            assert "2 done, 2 skipped" in done.stderr

    at_once(one, [("-m pipeloom",), ("pipeloom.py",), ("-m repo.vendor.pipeloom",), ("app.zip",)])


def test_the_command_line_of_the_original_works(home):
    command = "-m pipeloom demo --db ./wal_demo.db --num-tasks 2 -vv"
    done = python(*command.split(), cwd=home, code=0)
    assert "2 done" in done.stderr and "INFO" in done.stderr
    assert [row[2] for row in rows(home / "wal_demo.db")] == ["done"] * 2


@pytest.mark.parametrize(
    "start, target",
    [
        ("-m pipeloom", "job.py"),
        ("pipeloom.py", "job:main"),
        ("-m repo.vendor.pipeloom", "job.py:main"),
        ("-m repo.vendor.pipeloom", "job:main"),
        ("repo/vendor/pipeloom.py", "job.py"),
        ("repo/vendor/pipeloom.py", "job:main"),  # which is not beside pipeloom.py
        ("pipeloom", "job.py:main"),  # a copy in some folder of programs
        ("-m repo.vendor.pipeloom --package", "job.py:main"),
        ("-m cProfile pipeloom.py", "job.py:main"),
    ],
)
def test_run_calls_a_function_of_the_users_with_the_users_classes(home, start, target):
    module = "repo.vendor.pipeloom" if start.startswith("-m repo") else "pipeloom"
    if "vendor" in start:
        vendored(home)
    if start.endswith("--package"):  # which has imported the module before that is run
        start = start.split(" --")[0]
        (home / "repo" / "vendor" / "__init__.py").write_text("from .pipeloom import Pipeline")
    if start == "pipeloom":
        (home / "pipeloom.py").rename(home / "pipeloom")
    (home / "job.py").write_text(USER_FILE.format(module=module))
    arguments = ["--arg", "count=3", "--arg", "name=y", "--db", "mine.db", "-w", "2"]
    done = python(*start.split(), "run", target, *arguments, cwd=home, code=0)
    assert "3 done in" in done.stderr and "mine.db" in done.stderr
    assert sorted(rows(home / "mine.db", "SELECT x FROM t")) == [("y-0",), ("y-1",), ("y-2",)]
    assert not (home / "own.db").exists()


def test_arguments_on_the_command_line_are_numbers_truths_or_text(home):
    (home / "job.py").write_text("def main(**given): print(given)")
    given = {"a": True, "b": False, "c": 2, "d": 1.5, "e": "x=y", "f": ""}
    words = "--arg a=true --arg b=False --arg c=2 --arg d=1.5 --arg e=x=y --arg f=".split()
    assert python("pipeloom.py", "run", "job.py", *words, cwd=home, code=0).stdout == f"{given}\n"


def test_a_copy_that_other_processes_cannot_import_is_refused_with_processes(home):
    (home / "pipeloom.py").rename(home / "loom.v2.py")
    (home / "job.py").write_text(USER_FILE.format(module="pipeloom"))
    done = python("loom.v2.py", "run", "job.py", "--processes", "2", cwd=home, code=2)
    assert "other processes cannot import" in done.stderr and "name it pipeloom.py" in done.stderr
    assert "2 done" in python("loom.v2.py", "run", "job.py", cwd=home, code=0).stderr


@pytest.mark.parametrize("start", ["pipeloom.py", "-m pipeloom"])
def test_where_nothing_is_cached_the_file_is_compiled_once(home, start):
    (home / "sitecustomize.py").write_text(
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event == 'compile' and 'pipeloom.py' in str(arguments[1]):\n"
        "        sys.__stderr__.write('compiled\\n')\n"
        "sys.addaudithook(hook)"
    )
    env = {"PYTHONPATH": str(home), "PYTHONPYCACHEPREFIX": str(home / "empty"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = python(*start.split(), "--version", cwd=home, code=0, env=env)
    assert done.stderr == "compiled\n"


@pytest.mark.parametrize("name", ["site.py", "types.py", "2024.01.py"])
def test_run_takes_a_file_from_where_it_is_whatever_its_name(home, name):
    (home / "jobs").mkdir()
    program = USER_FILE.format(module="pipeloom")
    if name[0].isalpha():  # the library's own is still there
        program += f"import {name[:-3]} as other; assert other.__file__ != __file__\n"
    (home / "jobs" / name).write_text(program)
    done = python("-m", "pipeloom", "run", f"jobs/{name}", cwd=home, code=0)
    assert "2 done" in done.stderr


def test_run_awaits_a_coroutine(home):
    (home / "job.py").write_text("async def main(): print('ran')")
    assert python("-m", "pipeloom", "run", "job.py", cwd=home, code=0).stdout == "ran\n"


def test_a_pipeline_is_run_from_the_command_line_and_the_command_to_resume_works(homes):
    def one(command, main, check):
        home = homes()
        (home / "job.py").write_text(PIPELINE.format(main=main, check=check))
        done = python(*command.split(), cwd=home, code=1)
        assert "1 done, 1 failed, 1 cancelled" in done.stderr and "load[b]: ValueError: bad" in done.stderr
        resume = done.stderr.split("to go on: ")[1]
        assert resume.startswith(f"cd {home} && ")  # as this may be a mail of cron's
        (home / "repaired").touch()
        done = subprocess.run(resume, shell=True, stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
        assert done.returncode == 0 and "2 done, 1 skipped" in done.stderr and "to go on" not in done.stderr
        assert rows(home / "p.db", "SELECT name, status FROM task_runs ORDER BY name") == [
            ("load[a]", "done"),
            ("load[b]", "done"),
            ("report", "done"),
        ]

    at_once(
        one,
        [
            ("job.py", "", True),
            ("-m job", "", False),
            ("-m pipeloom run job.py", "", True),
            ("-m pipeloom run job.py", "def main(): pipe.main()", True),
            ("-m pipeloom run -- job.py", "def main(): pipe.run()", False),
        ],
    )


@needs_posix
def test_the_command_to_resume_of_a_script_that_finds_its_python_names_the_script_alone(home):
    script = home / "job"
    script.write_text(f"#!{sys.executable}\nimport sys; sys.path.insert(0, '.')\n" + PIPELINE.format(main="pipe.main()", check=True))
    script.chmod(0o755)
    done = subprocess.run(["./job"], cwd=str(home), stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith(" && ./job --resume\n"), done.stderr


def test_the_command_to_resume_names_the_folder_in_which_the_program_was_started(home):
    (home / "job.py").write_text(PIPELINE.format(main="import os; os.chdir('/'); pipe.main()", check=True))
    done = python("job.py", "--db", home / "p.db", cwd=home, code=1)
    assert f"\nto go on: cd {home} && " in done.stderr


@needs_posix
def test_the_command_to_resume_has_the_items_as_they_were_given_and_needs_no_folder(home):
    done = sh(home, "-w", "1", "false", "x", "--redo", "y", "--resume", code=1)
    assert done[1].endswith("pipeloom.py sh --resume -w 1 false x --redo y --resume\n")
    (home / "gone").mkdir()
    start = [sys.executable, "../pipeloom.py", "sh", "--db", "../x.db", "rmdir ../gone; false {}"]
    done = subprocess.run([*start, "x"], cwd=str(home / "gone"), stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and b"to go on: cd " in done.stderr and b"Traceback" not in done.stderr


def test_the_options_of_the_command_line_are_those_of_a_pipeline(home):
    (home / "job.py").write_text(PIPELINE.format(main="", check=True))

    def retried():
        options = "--retries 1 --timeout 9 --db q.db".split()
        python("-m", "pipeloom", "run", "job.py:pipe", *options, cwd=home, code=1)
        assert rows(home / "q.db", "SELECT attempts FROM task_runs WHERE name = 'load[b]'") == [(2,)]

    def in_memory():
        done = python(*"-m pipeloom demo -n 2 --fail 1 --db :memory:".split(), cwd=home, code=1)
        assert "to go on" not in done.stderr

    at_once(lambda check: check(), [(retried,), (in_memory,)])


PROCESSES = """
import os, time
from pathlib import Path
from pipeloom import Pipeline
pipe = Pipeline("p.db", schema="CREATE TABLE IF NOT EXISTS made(number PRIMARY KEY, pid)", workers=1)
@pipe.task(each=range(6), timeout=float(os.environ.get("LIMIT", 60)), retries=1, retry_delay=0)
def work(ctx, number):
    Path(f"pid{number}").write_text(str(os.getpid()))
    what = os.environ.get(f"TASK{number}")
    if what == "hangs":
        time.sleep(600)
    if what == "dies" or (what == "dies once" and ctx.attempt == 1):
        os.kill(os.getpid(), 9)
    if what == "forks" and not os.fork():
        return "of the child"
    ctx.upsert("made", [{"number": number, "pid": os.getpid()}], key="number")
@pipe.task(after=work, executor=None)
def report(ctx):
    return os.getpid()
@pipe.task(after=work, executor=None, even_if_failed=True, timeout=10)
def ended(ctx):
    while os.environ.get("TASK1") == "hangs":
        try:
            os.kill(int(Path("pid1").read_text()), 0)
        except ProcessLookupError:
            return
        ctx.sleep(0.01)
pipe.main()  # not under `if __name__ == "__main__":`, and the processes import it, too
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_linux
def test_with_processes_the_functions_run_in_processes_that_end_with_the_run(homes):
    def pids(home):
        return {int(path.read_text() or 0) for path in home.glob("pid*")}

    def all_well(home):
        python("job.py", "--processes", 2, cwd=home, code=0)
        made = rows(home / "p.db", "SELECT number, pid FROM made ORDER BY 1")
        ((parent,),) = rows(home / "p.db", "SELECT result FROM task_runs WHERE name = 'report'")
        assert [number for number, _ in made] == list(range(6)) and int(parent) not in pids(home)
        assert {pid for _, pid in made} == pids(home)

    def odd_ones(home):
        env = {"TASK1": "hangs", "TASK2": "dies", "TASK3": "dies once", "TASK4": "forks", "LIMIT": "2"}
        done = python("job.py", "--processes", 2, cwd=home, code=1, env=env, timeout=HANG)
        assert "5 done, 2 failed, 1 cancelled" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "work[1] failed: timed out after 2 s" in done.stderr
        assert "work[2] failed: BrokenProcessPool: " in done.stderr
        assert rows(home / "p.db", "SELECT DISTINCT result FROM task_runs") == [(None,)]
        done = python("job.py", "--processes", 2, "--resume", cwd=home, code=0)
        assert "4 done, 4 skipped" in done.stderr

    def interrupted(home, *numbers):
        env = {**os.environ, "TASK0": "hangs"}
        process = subprocess.Popen([sys.executable, "job.py", "--processes", "1"], cwd=str(home), env=env,
                                   stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
        try:
            wait_for(lambda: 0 not in pids(home) and pids(home))
            for number in numbers:
                process.send_signal(number)
                threading.Event().wait(0.3)
            stderr = process.communicate(timeout=HANG)[1]
        finally:
            process.kill()
            process.communicate()
        if numbers[0] == signal.SIGINT:
            assert process.returncode == 130 and b"Traceback" not in stderr, stderr

    def one(check, *arguments):
        home = homes()
        (home / "job.py").write_text(PROCESSES)
        check(home, *arguments)
        wait_for(lambda: not any(map(is_alive, pids(home))))

    cases = [(interrupted, signal.SIGINT, signal.SIGINT), (interrupted, signal.SIGKILL)]
    at_once(one, [(all_well,), (odd_ones,), *cases])


@needs_posix
def test_a_process_that_died_while_idle_is_replaced_and_one_that_is_killed_is_its_threads_own():
    def replaced(executor, other):
        pid = executor.submit(os.getpid).result(WAIT)
        assert executor.submit(os.getpid).result(WAIT) == pid
        others = other.submit(lambda: executor.submit(os.getpid).result(WAIT)).result(WAIT)
        assert others != pid
        for kill in (partial(os.kill, pid, signal.SIGKILL), lambda: executor.submit(os.getpid).cancel()):
            kill()
            threading.Event().wait(0.5)
            with suppress(BrokenExecutor):  # it may not be known yet that the process has died
                assert executor.submit(os.getpid).result(WAIT) != pid
            assert executor.submit(os.getpid).result(WAIT) != pid
        assert other.submit(lambda: executor.submit(os.getpid).result(WAIT)).result(WAIT) == others

    with pipeloom._processes() as executor, ThreadPoolExecutor(1) as other:
        replaced(executor, other)
    del executor
    gc.collect()  # their files


def test_processes_need_a_program_in_a_file_and_say_how_many_run(home):
    program = "import pipeloom; pipe = pipeloom.Pipeline('x.db'); pipe.task(len); pipe.main(['--processes', '2'])"
    done = python("-c", program, cwd=home, code=2)
    assert done.stderr == "pipeloom: --processes: other processes cannot import this program; put it into a file\n"
    (home / "job.py").write_text(PROCESSES)
    done = python("job.py", "--processes", 2, "-w", 3, cwd=home, code=2)
    assert done.stderr == "pipeloom: --processes N runs N tasks at once; omit -w\n"


class Unlike:
    """It can be pickled, and not unpickled."""

    def __reduce__(self):
        return int, ("no number",)


def sends(ctx, item):
    if item == "row":
        ctx.execute("INSERT INTO users VALUES (?, ?)", (threading.Lock(), 1))
    if item == "number":
        ctx.put(Squared(Unlike()))


def test_what_cannot_be_pickled_fails_its_task_only(db):
    items = {"lock": threading.Lock(), "odd": Unlike(), "row": "row", "number": "number", "good": 1}
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        pipe = Pipeline(db, progress="none", check=False, executor=executor, schema=USERS)
        pipe.task(sends, each=list(items.values()), name=lambda item: next(k for k, v in items.items() if v is item))
        pipe.handles(Squared)(lambda conn, message: None)
        result = pipe.run()
    told = {failure.task: failure.message for failure in result.failures}
    assert (result.done, sorted(told)) == (1, ["lock", "number", "odd", "row"])
    whole = "UsageError: its item cannot be sent to another process: TypeError: cannot pickle '_?thread.lock' object"
    assert re.fullmatch(whole, told["lock"])
    assert told["row"].startswith("MessageRefused: a row or message cannot be sent to another process: TypeError")
    assert told["odd"] == told["number"] == "ValueError: invalid literal for int() with base 10: 'no number'"


def test_a_dry_run_names_the_tasks_and_writes_nothing(home):
    (home / "job.py").write_text(USER_FILE.format(module="pipeloom"))
    (home / "pipe.py").write_text(PIPELINE.format(main="", check=True))

    def one(arguments, names):
        assert python(*arguments.split(), "--dry-run", cwd=home, code=0).stdout.split() == names

    at_once(
        one,
        [("-m pipeloom run job.py", ["x-0", "x-1"]), ("pipe.py", ["load[a]", "load[b]", "report"])],
    )
    assert not list(home.glob("*.db"))
    (home / "q.db").write_bytes(b"no database")  # which nobody reads, as all is run again
    one("pipe.py --db q.db", ["load[a]", "load[b]", "report"])


OWN_END = """
import atexit, sys, time, pipeloom
atexit.register(print, "at exit")
pipe = pipeloom.Pipeline("l.db", timeout=0.1, check=False, progress="none")
@pipe.task
def work(ctx): time.sleep(60 * (sys.argv[-1] == "hangs"))
def main():
    pipe.run()
    sys.exit("the program's own word")
"""


def test_a_program_ends_as_python_does_and_where_a_task_hangs_at_least_with_its_word_and_code(home):
    (home / "job.py").write_text(OWN_END + "if __name__ == '__main__': pipe.main()")
    assert python("job.py", cwd=home, code=0).stdout == "at exit\n"
    for end, printed in ("", "at exit\n"), ("hangs", ""):
        (home / "job.py").write_text(OWN_END.replace("sys.argv[-1]", repr(end)))
        done = python("-m", "pipeloom", "run", "job.py", cwd=home, code=1)
        assert done.stdout == printed and "the program's own word\n" in done.stderr


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


def test_a_handler_may_commit_where_bytes_are_compared_strictly(home):
    program = (
        "import pipeloom\n"
        "def store(conn, number):\n"
        "    with conn: conn.execute('INSERT INTO t VALUES (?)', (number,))\n"
        "result = pipeloom.run_pipeline([1, 2], 'x.db', worker_fn=lambda task, ctx: ctx.put(task), progress='none',\n"
        "                               schema='CREATE TABLE t(x)', handlers={int: store})\n"
        "print(result.done)"
    )
    assert python("-bb", "-W", "error", "-c", program, cwd=home, code=0).stdout == "2\n"


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
        if "-W" in start:
            done = python(*start, "--resume", cwd=home, code=1, env=env)
            assert "0 done, 6 skipped, 1 failed, 1 cancelled in " in done.stderr

    modes = [("-I", "log"), ("-OO", "ansi"), ("-X dev -W error", "ansi"), ("-S -X utf8=0", "log")]
    at_once(one, modes + [("-X dev", "rich")] * bool(rich))


STUCK = """
import pipeloom, threading, time, traceback
format_stack = traceback.format_stack
traceback.format_stack = lambda frame: time.sleep(0.03) or format_stack(frame)  # a disk that is slow to read
pipe = pipeloom.Pipeline("s.db", workers=3)
gone = threading.Event()
def hangs_here():
    open("hangs", "w").close()
    time.sleep(0.6)
    gone.set()
@pipe.task(each=["a", "b"])
def work(ctx, item):
    print("printed by", item)
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

    def act(process, terminal):
        wait_for((home / "hangs").exists)
        threading.Event().wait(0.2)
        process.send_signal(signal.SIGUSR1)

    code, written = on_terminal(["s.py"], [], home, act=act, size=(60, 100))
    shown = screen(written)
    assert code == 0, written
    stacks = "\n".join(shown)
    assert stacks.count("in hangs_here\n") == 2 and "in blocks\n" in stacks
    assert sorted(shown)[-2:] == ["printed by a", "printed by b"]  # what was above them is still there
    assert "Thread MainThread:" in stacks and "Thread pipeloom-writer:" in stacks and "Thread work[a]:" in stacks
    assert "All tasks" not in stacks and shown[-1].startswith("3 done in")  # the summary is the last word


def test_status_shows_counts_the_last_run_and_the_latest_tasks(db, capsys, same_logging):
    def work(task, ctx):
        if task == "bad":
            raise ValueError("no good\nat all")
        return 1

    run(["a", "bad", "c"], db, work, check=False, workers=1)
    assert cli("status", "--db", db) == 0
    out = capsys.readouterr().out
    state, counts, *rest = out.splitlines()
    when = r": failed after 0:00:0\d, at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(re.escape(str(db)) + when, state)
    assert counts == "2 of 3 done, 1 failed"
    assert [re.sub(r"\d:\d\d:\d\d", "TIME", line) for line in rest] == [
        "1 failed:", "  bad  TIME  ValueError: no good", "2 done:", "  c  TIME  1", "  a  TIME  1",
    ]  # fmt: skip
    assert cli("status", "--db", db, "--failed", "--json", "-n", 5) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"done": 2, "error": 1} and status["run"]["done"] == 2
    assert [task["name"] for task in status["tasks"]] == ["bad"]
    assert [task["name"] for task in status["failed"]] == ["bad"] and status["database"] == str(db)
    assert cli("status", "--db", db, "--failed") == 0
    assert "done:" not in capsys.readouterr().out
    assert cli("status", "--db", db, "--watch") == 0  # the run has ended, so this does too


def test_status_reads_a_live_run_without_holding_it_up(db):
    seen = []

    def work(task, ctx):
        wait_until_stored(ctx, "status = 'running'")
        seen.append(pipeloom.read_status(str(db)))

    run(["a"], db, work)
    assert seen[0]["run"]["status"] == "running" and seen[0]["tasks"][0]["status"] == "running"


def test_status_of_a_run_that_still_waits_for_a_lock_to_make_its_tables_is_empty(db):
    def look():
        with suppress(pipeloom.DatabaseError):  # the run has not begun
            seen.append(pipeloom.read_status(db))
        return seen

    seen = []
    with closing(sqlite3.connect(str(db), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(pipeloom.DatabaseError, match="has no task status: no such table"):
            pipeloom.read_status(db)
        thread = threading.Thread(target=run, args=([1], db, nothing))
        thread.start()
        wait_for(look)
    thread.join(WAIT)
    assert (seen[0]["run"], seen[0]["counts"], seen[0]["tasks"]) == (None, {}, [])
    assert pipeloom.read_status(db)["counts"] == {"done": 1}


@pytest.mark.parametrize("held", [[False, True, True, True], [True, False, False, False], [True, True], [False, False]])
def test_status_is_read_again_if_a_run_has_begun_or_ended_meanwhile(db, monkeypatch, held):
    run([1], db, nothing)
    answers, asked = iter(held), []
    monkeypatch.setattr(pipeloom._RunLock, "is_held", lambda path: asked.append(path) or next(answers))
    assert pipeloom.read_status(db)["counts"] == {"done": 1} and len(asked) == len(held)


def test_status_takes_the_lock_where_a_run_without_wal_is_between_two_transactions(db, monkeypatch):
    """There is no side file then; without a lock it may read pages that are being written."""
    opened, connect = [], pipeloom._connect_readonly

    def spied(*arguments, **options):
        opened.extend([options["idle"]] if "idle" in options else [])
        return connect(*arguments, **options)

    monkeypatch.setattr(pipeloom, "_connect_readonly", spied)

    def work(task, ctx):
        wait_for(lambda: not Path(f"{db}-journal").exists())
        pipeloom.read_status(db)

    run([1], db, work, wal=False)
    pipeloom.read_status(db)
    assert opened == [False, True]


def test_status_leaves_nothing_behind_and_knows_a_dead_run(home):
    program = """if 1:
        import os, pipeloom
        def work(task, ctx):
            if task: os.kill(os.getpid(), 9)
        pipeloom.run_pipeline(range(2), "k.db", workers=1, worker_fn=work, progress="none")"""
    run(["a"], home / "fine.db", nothing)
    before = set(home.iterdir())
    python("-m", "pipeloom", "status", "--db", "fine.db", cwd=home, code=0)
    assert set(home.iterdir()) ^ before <= {home / "__pycache__"}
    python("-c", program, cwd=home)
    out = python("-m", "pipeloom", "status", "--db", "k.db", "--watch", cwd=home, code=0).stdout
    assert "k.db: interrupted: process" in out and "is gone; it started 20" in out


STATUS_DB = ORIGINAL + """
INSERT INTO task_runs(id, name, status, progress, started_at, finished_at, message) VALUES
    (1, 'old', 'done', 1, '2026-01-01T00:00:00Z', '2026-01-01T01:02:03+00:00', NULL),
    (2, 'new', 'done', 1, '2026-01-02', '2026-01-02T00:00:01', 'two\nlines'),
    (3, 'odd', 'error', 0.5, 'yesterday', NULL, 'no good\nat all'),
    (4, 'off', 'cancelled', 0, NULL, NULL, 'interrupted'),
    (5, 'of\tf', 'cancelled', 0, NULL, NULL, 'interrupted'),
    (6, 'waits', 'queued', 0, '2026-01-01', NULL, 'attempt 1 failed: x'),
    (7, '7', 'running', 0.25, '2026-01-01', NULL, NULL);
"""


def test_status_of_an_original_database_says_what_each_task_is(db, capsys, same_logging, monkeypatch):
    monkeypatch.chdir(db.parent)
    execute("pipeloom.db", ORIGINAL)  # the default
    execute(db, STATUS_DB)
    before = contents(db.parent)
    assert cli("status", db) == 0  # a file is the database, also without --db
    out = re.sub(r" \d{3,}:\d\d:\d\d  25%", " LONG 25%", capsys.readouterr().out)
    assert out.splitlines() == [
        f"{db}: no run is recorded", "2 done, 1 running, 1 failed, 2 cancelled, 1 queued",
        "1 running:", "  7  LONG 25%", "1 failed:", "  odd  no good", "2 cancelled:",
        "  of f +1 more  interrupted", "1 queued:", "  waits  attempt 1 failed: x",
        "2 done:", "  new  0:00:01  two", "  old  1:02:03",
    ]  # fmt: skip
    assert cli("status", db, "-n", 1) == 0
    assert "  new  0:00:01  two\n  +1 more\n" in capsys.readouterr().out
    assert {task["id"] for task in pipeloom.read_status(db, failed=True)["tasks"]} == {3, 4, 5}
    assert contents(db.parent) == before


def test_status_of_a_database_of_version_1_0(db, capsys, same_logging):
    run(["a"], db, nothing)
    columns = "id, started_at, finished_at, status, host, pid, version, done, error, cancelled, skipped"
    execute(db, f"CREATE TABLE o AS SELECT {columns} FROM pipeline_runs; DROP TABLE pipeline_runs;"
            "ALTER TABLE o RENAME TO pipeline_runs")  # fmt: skip
    assert cli("status", db) == 0
    assert "finished after 0:00:0" in capsys.readouterr().out and pipeloom.read_status(db)["run"]["done"] == 1


def test_status_of_a_name_tells_all_about_the_task_and_suggests_others(db, capsys, same_logging, monkeypatch):
    def work(task, ctx):
        if task == "bad":
            raise ValueError("two\nlines")
        return {"rows": 3}

    names = ["load[a.csv]", "load[b.csv]", "bad", "load[incoming/2026/c1.csv]"]
    run(names, db, work, check=False, retries=1, retry_delay=0)
    assert cli("status", db, "bad") == 0
    out = capsys.readouterr().out
    assert re.match(
        r"bad \(task 3\): failed\n  attempts  2\n  started   20\S+ \S+\n  ended     20\S+ \S+\n  time      0:00:0\d\n"
        r"  progress  0%\n  run       1\n  message   ValueError: two\n            lines\n  traceback Trace",
        out,
    )
    assert "            ValueError: two\n" in out
    execute(db, "UPDATE task_runs SET started_at = '2020-01-01T00:00:00', finished_at = '2020-01-01T00:01:05' WHERE id = 2")
    assert cli("status", db, 2) == 0  # no name, so an id
    out = capsys.readouterr().out
    assert "  time      0:01:05\n" in out and '  result    {"rows": 3}\n' in out
    assert cli("status", "--db", db, "bad", "load[b.csv]", "--json") == 0
    assert [task["id"] for task in json.loads(capsys.readouterr().out)["tasks"]] == [3, 2]
    for name, hint in [
        ("c1", "did you mean 'load[incoming/2026/c1.csv]'?"), ("bda", "did you mean 'bad'?"),
        ("load[c.csv]", "did you mean 'load[b.csv]' or 'load[a.csv]'?"), ("zzz", "without a name lists them"),
    ]:  # fmt: skip
        assert cli("status", db, name) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and f"has no task {name!r}; " in said.err and hint in said.err
    assert cli("status", db.parent / "missing.db") == 2
    assert "missing.db' does not exist" in capsys.readouterr().err
    monkeypatch.chdir(db.parent)
    db.rename("pipeloom.db")
    Path("bad").touch()  # a file of the task's name
    assert cli("status", "bad", "--db", "./pipeloom.db") == 0
    assert "bad (task 3): failed" in capsys.readouterr().out


def test_what_status_says_is_as_of_one_commit(db):
    def change():
        with closing(pipeloom.connect(db)) as conn:
            while not over.is_set():
                conn.execute("UPDATE task_runs SET status = CASE status WHEN 'done' THEN 'error' ELSE 'done' END")
                conn.commit()

    run([1], db, nothing)
    over, changes = threading.Event(), threading.Thread(target=change)
    changes.start()
    try:
        for _ in range(200):
            status = pipeloom.read_status(db)
            kinds = {"done": status["done"], "error": status["failed"]}
            assert {kind: len(tasks) for kind, tasks in kinds.items() if tasks} == status["counts"]
    finally:
        over.set()
        changes.join(WAIT)


def test_status_says_how_many_were_done_in_earlier_runs_alone(db, capsys, same_logging):
    run(["a", "b"], db, nothing)
    run(["c"], db, lambda task, ctx: 1 / 0, check=False)
    assert cli("status", db) == 0
    assert "\n2 done, 2 of them in earlier runs:\n" in capsys.readouterr().out


def test_tasks_that_start_while_the_writer_is_busy_are_running_with_its_next_commit(db):
    def handler(conn, user):
        taken.set()
        assert started.wait(WAIT)

    def work(task, ctx):
        if task == "holds":
            ctx.put(User("x", "x"))
        elif task < "c":
            assert taken.wait(WAIT)
        else:
            names.append(task)
            if len(names) == 2:
                started.set()
            wait_until_stored(ctx, "name = 'c' AND status = 'running'")
            wait_until_stored(ctx, "name = 'd' AND status = 'running'")
            both.wait(WAIT)  # none is done before the other has seen it

    taken, started, both, names = threading.Event(), threading.Event(), threading.Barrier(2), []
    assert run(["holds", "a", "b", "c", "d"], db, work, workers=3, handlers={User: handler}).done == 5


@pytest.mark.parametrize("wal", [True, False])
def test_status_of_a_live_run_says_how_far_it_is(db, capsys, wal, same_logging):
    run(["before", "old"], db, nothing)
    out = []

    def work(task, ctx):
        if task == "c":
            ctx.progress(1, 4, "first")
            wait_until_stored(ctx, "message = 'first'")
            assert cli("status", db) == 0
            out.extend(capsys.readouterr().out.splitlines())
        return 1 / (task != "a")

    run(["a", "b", "c", "d"], db, work, workers=1, wal=wal, check=False)
    assert re.search(rf": running for 0:00:0\d, since 20.* \(process {os.getpid()} on ", out[0])
    assert out[1].partition(" runs")[0] == "1 of 4 done, 1 running, 1 failed, 2 done in earlier"
    assert out[2] == "1 running:" and re.fullmatch(r"  c  0:00:0\d  25%  first", out[3])
    assert out[6] == "3 done, 2 of them in earlier runs:"


@pytest.mark.parametrize(("began", "change", "left"), [
    (100, {}, "about 0:00:50 left"), (100, {"total": None}, ""), (0, {}, ""),
    (100, {"total": 23}, ""), (100, {"earlier": 1}, ""), (100, {"alive": None}, ""),
    (1.5, {}, "about 0:00:00 left"), (100, {"cancelled": 4}, "about 0:00:30 left"),
])  # fmt: skip
def test_status_gives_no_time_left_rather_than_a_wrong_one(began, change, left):
    counts = {"done": 19, "error": 1, "running": 2, "queued": 1, "cancelled": change.get("cancelled", 0)}
    run = {"status": "running", "alive": change.get("alive", True), "ended": None, "began": time.time() - began,
           "pid": 1, "host": "h", "total": change.get("total", 30)}  # fmt: skip
    status = {"database": "x.db", "run": run, "run_counts": counts,
              "counts": {**counts, "done": 19 + change.get("earlier", 0)}}  # fmt: skip
    line = pipeloom._run_lines(status)[1]
    assert (left in line) if left else ("left" not in line)
    assert bool(re.search("/(s|min)", line)) == bool(began)


def test_status_of_a_run_that_has_done_nothing_yet_speaks_of_no_earlier_runs():
    run = {"status": "running", "alive": True, "ended": None, "began": time.time(), "pid": 1, "host": "h", "total": 3}
    status = {"database": "x.db", "run": run, "run_counts": {"running": 1}, "counts": {"running": 1}}
    assert pipeloom._run_lines(status)[1] == "0 of 3 done, 1 running"


def status_of(**numbers):
    """What read_status() gives for so many tasks of each kind."""
    row = {"began": 1.0, "ended": 2.0, "progress": 0.5, "message": "m" * 300, "result": None}
    kinds = {
        word: [{**row, "name": f"{word}[{'x' * 90}{i}]"} for i in range(numbers.get(kind, 0))]
        for kind, word in pipeloom.KINDS.items()
    }
    return {"database": "x.db", "run": None, "run_counts": {}, "counts": numbers, **kinds}


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 12), (20, 5)])
def test_a_report_fits_the_window_and_says_how_many_more_there_are(size, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    width, height = size
    status = status_of(running=30, error=30, cancelled=3, queued=30, done=30)
    lines = pipeloom._report(status, False, width, height)
    assert len(lines) == height - 1 and all(pipeloom._width(line) < width for line in lines)
    if height >= 24:
        titles = [line for line in lines if line.endswith(":")]
        assert titles == ["30 running:", "30 failed:", "3 cancelled:", "30 queued:", "30 done:"]
        shown = [sum(line.startswith(f"  {word[:4]}") for line in lines) for word in pipeloom.KINDS.values()]
        more = [int(line[3:-5]) for line in lines if re.fullmatch(r"  \+\d+ more", line)]
        assert sum(shown) + sum(more) == 123 and min(shown) >= 2
    few = pipeloom._report(status_of(running=2, error=1), False, width, 24)
    assert len(few) == 7 and not any("more" in line for line in few)
    assert "more" not in pipeloom._report(status_of(done=5), False, width, 9)[-1]  # which just fits
    assert pipeloom._report(status_of(done=5), False, width, 8)[-1] == "  +2 more"


def test_a_report_in_a_pipe_shows_whole_names_and_one_in_a_window_both_ends(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    whole = pipeloom._report(status_of(error=1), False, 0, 0)
    assert f"  failed[{'x' * 90}0]  0:00:01  {'m' * 300}" in whole and "\x1b" not in "".join(whole)
    status = status_of(done=2)
    status["done"][0]["name"], status["done"][1]["name"] = "a", "longer"
    assert [line[:17] for line in pipeloom._report(status, False, 0, 0)[-2:]] == ["  a       0:00:01", "  longer  0:00:01"]
    cut = pipeloom._report(status_of(error=1), False, 80, 24)[-1]
    assert re.fullmatch(r"\x1b\[31m  failed\[x+(…|\.\.)x+0\]  0:00:01  m+(…|\.\.)\x1b\[0m", cut), cut


WATCHED = """
import os, pipeloom
def work(task, ctx):
    while not os.path.exists("go"):
        ctx.progress(1, 2)
        print("ready", flush=True)
        ctx.sleep(0.05)
    raise ValueError("bad")
try:
    pipeloom.run_pipeline(["a"], "w.db", worker_fn=work, progress="none", check=False)
except BaseException as error:
    print(error)
"""
WATCH = """
import os, sys, time, pipeloom
sleep, seen = time.sleep, []
def look(seconds):  # instead of the second between two reports
    seen.append(seconds)
    {look}
    sleep(0.01)
time.sleep = look
pipeloom._end_program(lambda: pipeloom.main(["status", "w.db", "--watch"]))
"""


@needs_posix
def test_watch_redraws_in_place_until_the_run_ends(home):
    look = WATCH.format(look="if len(seen) == 3: open('go', 'w').close()")
    with begun("-c", WATCHED, cwd=home):
        code, written = on_terminal(["-c", look], [], home)
    frames = written.split("\x1b[H")
    assert code == 0 and frames[0] == "" and len(frames) >= 5
    assert all(frame.endswith("\x1b[J\r\n") and frame.count("\x1b[J") == 1 for frame in frames[1:])
    assert "running for" in frames[1] and "1 running" in frames[1]
    assert "w.db: failed after" in frames[-1] and "0 of 1 done, 1 failed" in frames[-1]
    assert "ValueError: bad" in frames[-1]
    assert "\x1b[?" not in written and "\x1b[2J" not in written


@needs_posix
def test_watch_through_a_pipe_prints_only_what_is_new(home):
    look = WATCH.format(look="if len(seen) == 30: open('go', 'w').close()")
    stands = WATCHED.replace("ctx.progress(1, 2)", "pass")
    with begun("-c", stands, cwd=home):
        done = python("-c", look, cwd=home, code=0)
    # The task's end is committed before the run's, so that there may be a report between the two.
    assert done.stdout.count("1 running:") == 1 and done.stdout.count("w.db: failed after") == 1


@needs_posix
def test_ctrl_c_ends_watch_with_130(home):
    look = WATCH.format(look="os.kill(os.getpid(), 2)")
    with begun("-c", WATCHED, cwd=home):
        code, written = on_terminal(["-c", look], [], home)  # which checks the terminal, too
    assert code == 130 and "Traceback" not in written and written.endswith("\x1b[J\r\n")


def test_init_db_makes_the_tables(db, same_logging):
    assert cli("init-db", "--db", db) == 0
    assert cli("status", "--db", db) == 0


LOGS = """
import logging, sys, pipeloom
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")  # to stderr
own = logging.FileHandler("own.log")
logging.getLogger().addHandler(own)
before = logging.getLogger().handlers[:]
pipe = pipeloom.Pipeline("x.db", progress="none")
@pipe.task(retries=1, retry_delay=0)
def work(ctx):
    logging.getLogger("mine").warning("careful, %d", ctx.attempt)
    logging.getLogger("mine").info("an info line")
    if ctx.attempt == 1:
        raise LookupError("once")
try:
    pipe.main(sys.argv[1:])
except SystemExit as end:
    print("code", end.code)
root = logging.getLogger()
print("handlers", root.handlers == before, "level", root.level)
logging.info("after the end")
"""


@pytest.mark.parametrize("options", [[], ["-v"], ["-v", "-l", "x.log"]], ids=str)
def test_a_root_logger_that_the_program_has_configured_is_left_alone(home, options):
    (home / "logs.py").write_text(LOGS)
    done = python("logs.py", *options, cwd=home, code=0, timeout=HANG)
    assert done.stdout.split() == ["code", "0", "handlers", "True", "level", "20"]
    own = (home / "own.log").read_text()
    for line in ("careful, 1", "careful, 2", "an info line", "after the end"):
        wanted = 1 if "careful" in line or "after" in line else 2
        assert own.count(line) == wanted, own
        assert done.stderr.count(line) == wanted, done.stderr
    if "-l" in options:
        assert "once" in (home / "x.log").read_text()  # a retry, which goes to the logger `pipeloom`


CONFIGURES = """
import logging, pipeloom
logging.basicConfig(filename="own.log", level=logging.INFO)
pipe = pipeloom.Pipeline("x.db", progress="none")
@pipe.task
def work(ctx):
    logging.getLogger("mine").info("an info line")
"""


def test_a_program_that_configures_logging_does_so_under_pipeloom_run_as_well(home):
    """Relative of 13: basicConfig() does nothing where the root logger has a handler."""
    (home / "job.py").write_text(CONFIGURES)
    python("-m", "pipeloom", "run", "job.py", cwd=home, code=0, timeout=HANG)
    assert (home / "own.log").exists() and "an info line" in (home / "own.log").read_text()


@needs_permissions
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_status_tells_whether_a_run_is_on_also_where_its_lock_cannot_be_written_or_read(home, mode):
    path, said = home / "x.db", []

    def work(task, ctx):
        wait_for(lambda: rows(path, "SELECT status FROM task_runs") == [("running",)])
        (home / "x.db-lock").chmod(mode)
        done = python("-m", "pipeloom", "status", "--db", "x.db", cwd=home, code=0,
                      preexec_fn=as_an_ordinary_user, timeout=HANG)  # fmt: skip
        said.append(done.stdout)

    run(["a"], path, work)
    assert ": probably running for" in said[0] or (mode and ": running for" in said[0]), said  # and not interrupted: somebody might start another


@needs_posix
@pytest.mark.parametrize("link", ["beside", "elsewhere", "of a link"])
def test_status_through_a_symbolic_link_sees_what_is_committed(tmp_path, link):
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    path, shown = tmp_path / "real" / "x.db", tmp_path / "links" / "y.db"
    if link == "beside":
        shown = tmp_path / "real" / "y.db"
    os.symlink(os.path.join("..", "real", "x.db"), str(shown))
    if link == "of a link":
        os.symlink(str(shown), str(tmp_path / "z.db"))
        shown = tmp_path / "z.db"
    told = []

    def work(task, ctx):
        if task == 3:
            wait_for(lambda: rows(path, "SELECT count(*) FROM task_runs WHERE status = 'done'") == [(3,)])
            wait_for(lambda: len(rows(path)) == 4)
            told.append(pipeloom.read_status(str(shown)))

    run(range(4), path, work, workers=1)
    assert told[0]["counts"] == {"done": 3, "running": 1} and told[0]["run"]["status"] == "running"
    assert told[0]["database"] == str(shown)  # as the user named it
    assert pipeloom.read_status(str(shown))["counts"] == {"done": 4}


KILLED_BEHIND_A_LINK = """
import os, signal, pipeloom
def work(task, ctx):
    while task == 3 and pipeloom.read_status("x.db")["counts"].get("done") != 3:
        ctx.sleep(0.01)
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
pipeloom.run_pipeline(range(4), "x.db", worker_fn=work, workers=1, progress="none")
"""


@needs_posix
def test_status_through_a_symbolic_link_after_a_kill_shows_what_was_done(home):
    (home / "links").mkdir()
    os.symlink(str(home / "x.db"), str(home / "links" / "y.db"))
    python("-c", KILLED_BEHIND_A_LINK, cwd=home, code=-signal.SIGKILL, timeout=HANG)
    done = python("-m", "pipeloom", "status", "--db", "links/y.db", cwd=home, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "3 of 4 done, 1 interrupted\n1 interrupted:\n  3   0%\n3 done:\n" in done.stdout and ": interrupted: process" in done.stdout
    assert os.listdir(str(home / "links")) == ["y.db"]


QUIET = """
import sys, pipeloom
pipe = pipeloom.Pipeline("q.db", workers=1, store_task_status=True)
@pipe.task(each=[1, 2])
def work(ctx, n):
    if n == 2 and len(sys.argv) > 2: raise ValueError(n)
pipe.main()
"""


def test_with_quiet_nothing_is_printed_when_all_goes_well(home):
    (home / "q.py").write_text(QUIET)
    done = python("q.py", "-q", cwd=home, code=0)
    assert (done.stdout, done.stderr) == ("", "")
    done = python("q.py", "-q", "-v", cwd=home, code=1)
    assert "1 done, 1 failed in" in done.stderr and "work[2] failed: ValueError: 2 (q.py:6)" in done.stderr


def test_a_dry_run_with_resume_names_what_would_run(home):
    (home / "job.py").write_text(PIPELINE.format(main="pipe.main()", check=False))
    dry = ("job.py", "--dry-run")
    assert python(*dry, "--resume", cwd=home, code=0).stdout == "load[a]\nload[b]\nreport\n"
    python("job.py", cwd=home, code=1)  # load[b] fails
    assert python(*dry, "--resume", cwd=home, code=0).stdout == "load[b]\nreport\n"
    (home / "repaired").touch()
    python("job.py", "--resume", cwd=home, code=0)
    assert python(*dry, "--resume", cwd=home, code=0).stdout == ""
    assert python(*dry, "--redo", "load[a]", cwd=home, code=0).stdout == "load[a]\nreport\n"
    assert python(*dry, cwd=home, code=0).stdout == "load[a]\nload[b]\nreport\n"
    done = python("job.py", "--redo", "load[a]", cwd=home, code=0)
    assert "2 done, 1 skipped" in done.stderr
    (home / "repaired").unlink()
    done = python("job.py", "--redo", "load", cwd=home, code=1)
    assert done.stderr.endswith("job.py --resume\n")  # to redo it all again would be too much
    (home / "repaired").touch()
    done = python(*dry, "--redo", "no", cwd=home, code=2)
    assert "no task has this name" in done.stderr
    done = python("job.py", "--redo", "no", cwd=home, code=2)
    assert done.stderr.startswith("pipeloom: redo='no': no task has this name; there are load, report, load[")


def test_a_dry_run_of_a_database_that_cannot_be_read_says_so(home):
    (home / "job.py").write_text(PIPELINE.format(main="pipe.main()", check=False))
    python("job.py", cwd=home, code=1)
    dry = ("job.py", "--dry-run", "--resume")
    with closing(sqlite3.connect(str(home / "p.db"))) as conn:
        conn.execute("PRAGMA locking_mode=EXCLUSIVE")
        conn.execute("BEGIN EXCLUSIVE")
        conn.execute("CREATE TABLE other(x)")
        done = python(*dry, cwd=home, code=2)
        assert done.stdout == "" and "cannot be read now: database is locked; try again later" in done.stderr
    (home / "p.db").write_bytes(b"no database" * 1000)
    done = python(*dry, cwd=home, code=2)
    assert done.stdout == "" and "has no task status: file is not a database" in done.stderr
    execute(home / "own.db", "CREATE TABLE own(x)")
    assert python(*dry, "--db", "own.db", cwd=home, code=0).stdout == "load[a]\nload[b]\nreport\n"


def test_a_dry_run_names_the_items_behind_what_would_not_run(db, capsys, same_logging):
    def dry(*options):
        with pytest.raises(SystemExit):
            pipe.main(["--dry-run", *options])
        return capsys.readouterr().out.split()

    pipe = Pipeline(db, progress="none")
    pipe.task(lambda ctx: None, name="fetch")
    pipe.task(lambda ctx, item: None, name="clean", each=lambda: ["a", "b"], after="fetch")
    pipe.task(lambda ctx: None, name="report", after="clean")
    assert dry() == dry("--resume") == ["fetch", "clean[...]", "report"]
    pipe.run()
    assert dry("--resume") == []
    assert dry("--redo", "clean[a]") == ["clean[a]", "report"]
    assert dry("--redo", "fetch") == ["fetch", "clean[...]", "report"]


RUNS_WITHIN = """
import pipeloom
pipe = pipeloom.Pipeline("p.db")
@pipe.task(each=[1, 2])
def outer(ctx, n):
    return pipeloom.run_pipeline(range(3), f"in{n}.db", worker_fn=lambda task, ctx: None, progress="none").done
pipe.main()
"""


def test_the_options_of_the_command_line_are_not_those_of_a_run_within_a_task(home):
    (home / "job.py").write_text(RUNS_WITHIN)
    for options in ([], ["--redo", "outer[1]"]):
        done = python("job.py", "--db", "other.db", *options, cwd=home, code=0)
        assert done.stderr.count("done") == 1  # one summary
    assert rows(home / "other.db", "SELECT result FROM task_runs") == [("3",), ("3",)]
    assert rows(home / "in1.db", "SELECT count(*) FROM task_runs") == [(3,)] and not (home / "p.db").exists()


NAMELESS = """
import pipeloom
pipe = pipeloom.Pipeline("n.db", progress="none")
pipe.task(lambda ctx, item: None, name="load", each=[object(), object()])
def main():
    result = pipe.run()
    print(result.total, result.ok)
"""


def test_a_dry_run_counts_items_without_names_as_a_run_does_and_its_result_counts_nothing(home):
    (home / "job.py").write_text(NAMELESS)
    for options, printed in (["--dry-run"], "load[1]\nload[2]\n0 True\n"), ([], "2 True\n"):
        done = python("-m", "pipeloom", "run", *options, "job.py", cwd=home, code=0)
        assert done.stdout == printed
    assert [name for _, name, _ in rows(home / "n.db")] == ["load[1]", "load[2]"]


def test_what_was_not_redone_stays_in_the_command_that_goes_on(home):
    program = "import pipeloom\npipe = pipeloom.Pipeline('r.db', progress='none', workers=1)\n"
    program += "@pipe.task(each=range(3_000))\ndef load(ctx, n): 1 / (n != 1 or __import__('os').path.exists('repaired'))\npipe.main()"
    (home / "job.py").write_text(program)
    (home / "repaired").touch()
    python("job.py", cwd=home, code=0)
    (home / "repaired").unlink()
    done = python("job.py", "--redo", "load", "--fail-fast", cwd=home, code=1)
    assert done.stderr.endswith("job.py --redo load --fail-fast --resume\n")


def test_a_dry_run_knows_of_what_an_item_that_has_gone_has_done(db, capsys, same_logging):
    pipe = Pipeline(db, progress="none")
    pipe.task(lambda ctx, item: None, name="load", each=["a"])
    pipe.task(lambda ctx: None, name="report", after="load")
    pipe.run()
    execute(db, "INSERT INTO task_runs(id, name, status, progress, run_id) VALUES (9, 'load[b]', 'done', 1, 2)")
    with pytest.raises(SystemExit):
        pipe.main(["--resume", "--dry-run"])
    assert capsys.readouterr().out == "report\n"
    assert pipe.run(resume=True).done == 1


def test_a_summary_says_how_many_causes_it_leaves_out(home):
    (home / "c.py").write_text(
        "import pipeloom\n"
        "pipe = pipeloom.Pipeline('c.db', progress='none')\n"
        "@pipe.task(each=range(13))\n"
        "def work(ctx, n): exec(f'class E{n}(Exception): pass\\nraise E{n}')\n"
        "pipe.main()"
    )
    done = python("c.py", cwd=home, code=1)
    assert "13 failed, 13 causes:" in done.stderr and "\n  and 3 more causes\n" in done.stderr


def test_the_command_that_resumes_has_the_programs_own_arguments(home):
    program = THREE_TASKS.replace("ctx.sleep(0.1)", "1 / (item - 2)").replace("pipe.main()", "import sys; pipe.main(sys.argv[2:])")
    (home / "own.py").write_text(program)
    err = python("own.py", "folder", "-w", 2, cwd=home, code=1).stderr
    assert err.endswith("own.py folder -w 2 --resume\n"), err
    assert python("own.py", "folder", cwd=home, code=1).stderr.endswith("own.py folder --resume\n")


# ---- 4.9 sh --------------------------------------------------------------------------------------------


def sh(home, *arguments, given="", code=0, env=None):
    """`pipeloom.py sh` in a folder; returns what it wrote to stdout and to stderr, as bytes if it was given bytes."""
    done = subprocess.run(
        [sys.executable, "pipeloom.py", "sh", *map(str, arguments)],
        cwd=str(home), env={**os.environ, "PYTHONPATH": "", **(env or {})}, timeout=60, input=given,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=isinstance(given, str),
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout, done.stderr


def inodes(files):
    return [os.fstat(file).st_ino for file in files]


def commands_in(home, db="pipeloom.db"):
    return dict(rows(home / db, "SELECT name, status FROM task_runs"))


@contextmanager
def sh_begun(home, *arguments, **options):
    """A `pipeloom.py sh` whose commands write their process ids; at the end, all of these have ended."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "universal_newlines": True, **options}
    process = subprocess.Popen(
        [sys.executable, "pipeloom.py", "sh", *arguments], cwd=str(home), start_new_session=True, **options
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WAIT)
    for file in home.glob("*.pid"):
        wait_for(lambda file=file: not is_alive(int(file.read_text())))


@pytest.mark.parametrize(
    "arguments, given, expected",
    [
        (["-w", "1", "echo 1 {}", "a b", "it's", "$HOME", "", "-n"], "", "1 a b\n1 it's\n1 $HOME\n1 \n1 -n\n"),
        (["-w", "1", "echo 2", "a  b", "*"], "", "2 a  b\n2 *\n"),
        (["-w", "1", "echo {} {{}} {}", "a;b"], "", "a;b {} a;b\n"),
        (["-w", "1", "echo 3"], "a b\n\n'c\nlast", "3 a b\n3 'c\n3 last\n"),
        (["-w", "1", "-0", "echo 4 {}"], "a\nb\0c\0", "4 a\nb\n4 c\n"),
        (["-w", "1"], "echo 5; echo {}\nprintf 6 | tr 6 7\n", "5\n{}\n7"),
        (["-w", "1", "--tag", "printf 'x\\ny'"], "a b\n", "a b\tx\na b\ty\n"),
        (["--quiet-output", "echo; echo >&2"], "a\n", ""),
        (["-q", "-w", "1", "--", "echo", "--", "-x", "--dry-run"], "", "--\n-x\n--dry-run\n"),
    ],
)
@needs_posix
@once
def test_sh_runs_a_command_for_each_item(home, arguments, given, expected):
    out, err = sh(home, *arguments, given=given)
    assert out == expected
    assert ("done in" in err) == ("-q" not in arguments)


@needs_posix
@given(st.lists(st.text(st.characters(blacklist_characters="\0"), max_size=9), max_size=4), st.sampled_from(["x {}", "x"]))
@once
def test_sh_quotes_each_item(items, template):
    commands = list(pipeloom._commands(template, items))
    assert [shlex.split(command.name) for command in commands] == [["x", item] for item in items]


@needs_linux
def test_sh_takes_items_that_are_no_text(home):
    name = b"\xff\xe4.txt"
    (Path(os.fsdecode(os.fsencode(home))) / os.fsdecode(name)).write_bytes(b"\xfe\x00")
    out, _ = sh(home, "--tag", "cat {}", given=name + b"\n")
    assert out == name + b"\t\xfe\x00\n"
    assert commands_in(home) == {"cat '\\udcff\\udce4.txt'": "done"}


@needs_posix
def test_sh_resumes_by_the_text_of_the_commands_wherever_they_stand(home):
    (home / "two").write_text("")
    out, err = sh(home, "-w", "1", "cat {} && echo {}", "one", "two", code=1)
    assert out == "two\n" and "pipeloom.py sh --resume -w 1 'cat {} && echo {}' one two" in err
    for name in ("one", "three"):
        (home / name).write_text("")
    assert sh(home, "--resume", "--dry-run", "cat {} && echo {}", "three", "two", "one")[0] == "cat three && echo three\ncat one && echo one\n"
    out, err = sh(home, "-w", "1", "--resume", "cat {} && echo {}", "three", "two", "one")
    assert out == "three\none\n" and "2 done, 1 skipped" in err
    out, _ = sh(home, "--resume", "--redo", "cat two && echo two", "cat {} && echo {}", given="one\ntwo\n")
    assert out == "two\n"
    assert set(commands_in(home).values()) == {"done"}


@needs_posix
def test_sh_says_why_a_command_failed_and_keeps_the_end_of_its_output(home):
    long = "echo begin; head -c 70000 /dev/zero | tr '\\0' x; echo end"
    commands = ["echo oh >&2; echo no >&2; echo >&2; exit 3", "exit 4", "kill -9 $$", "no-such-command", long]
    out, err = sh(home, "-w", "1", given="\n".join(commands), code=1)
    found = rows(home / "pipeloom.db", "SELECT message, result FROM task_runs ORDER BY id")
    assert [message for message, _ in found[:3]] == ["exit 3: no", "exit 4", "SIGKILL"]
    assert re.fullmatch("exit 127: .*not found", found[3][0])
    assert found[4][1] == "x" * (2**16 - 4) + "end"
    assert out.endswith("end\n") and len(out) == 70_010
    assert "oh\nno\n" in err and "4 failed, 4 causes" in err and "  exit 4: exit 4\n" in err
    out, err = sh(home, "echo said; echo {} >&2; exit 1", *range(20), code=1)
    assert out == "said\n" * 20 and "20 failed, 1 cause" in err
    assert "the same command with --resume" in sh(home, "false", *range(300), code=1)[1].splitlines()[-1]


@needs_linux
def test_sh_mixes_no_lines_of_who_opens_its_stderr_anew_and_its_stdout_may_be_sought_in(home):
    say = "echo {} >&2; echo two >>/dev/stderr; echo three >&2; #"
    assert sh(home, say.format("one"), "x")[1].startswith("one\ntwo\nthree\n")
    assert sh(home, say.format("lost").replace(">>", ">"), "x")[1].startswith("two\nthree\n")
    seek = f"{shlex.quote(sys.executable)} -c 'import os; os.write(1, b\"abc\"); os.lseek(1, 0, 0); os.write(1, b\"X\")' #"
    assert sh(home, seek, "x")[0] == "Xbc"


@needs_posix
@once
def test_sh_prints_only_the_last_of_several_attempts(home):
    command = "echo {} >&2; echo {}; test -e again || { touch again; exit 1; }"
    out, err = sh(home, "--retries", "2", "-w", "1", command, "x", env={"PYTHONPATH": ""})
    assert out == "x\n" and err.count("x\n") == 2


@needs_posix
def test_sh_never_mixes_the_output_of_two_commands(home):
    command = "for i in 1 2 3 4 5 6 7 8 9; do echo {} $i; echo {} $i >&2; sleep 0.01; done"
    out, err = sh(home, "-w", "8", "-q", command, *range(24))
    for text in (out, err):
        blocks = [list(lines) for _, lines in groupby(text.splitlines(), lambda line: line.split()[0])]
        assert len(blocks) == 24 and all(len(block) == 9 for block in blocks)


@needs_linux
def test_sh_uses_files_again_but_keeps_none_of_their_text_and_none_at_its_end(home, monkeypatch):
    largest = "stat -L -c %s /proc/$PPID/fd/* 2>/dev/null | sort -n | tail -n 1"
    command = f"test {{}} -lt 10 || {{ echo {{}} >&2; {largest}; head -c 2000000 /dev/zero; }}"
    out, err = sh(home, "-w", "1", "-q", command, *range(25))
    assert sorted(map(int, err.split())) == list(range(10, 25))
    sizes = [int(size) for size in out.replace("\0", "").split()]
    assert len(sizes) == 15 and max(sizes) < 2_000_000
    late = "test {} = 0 && setsid sh -c 'sleep 0.3; echo late; echo late >&2' & sleep 0.05; test {} -lt 10 || echo {}"
    assert sh(home, "-w", "1", "-q", "--db", "late.db", late, *range(20)) == ("".join(f"{n}\n" for n in range(10, 20)), "")
    monkeypatch.chdir(home)
    before = os.listdir("/proc/self/fd")
    assert cli("sh", "-q", "--db", "here.db", ":", *range(20)) == 0
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_sh_without_its_source_says_so_and_runs_nothing(home):
    compileall.compile_file(str(home / "pipeloom.py"), legacy=True, quiet=1)
    (home / "pipeloom.py").unlink()
    done = python("-m", "pipeloom", "sh", "touch ran", "a", cwd=home, code=2)
    assert "sh needs the source of" in done.stderr and not (home / "ran").exists()


@needs_posix
def test_sh_keeps_output_in_files_that_it_closes_and_needs_no_TMPDIR(home):
    out, err = sh(home, "-w", "1", "-q", "echo {}; echo {} >&2", *range(3), env={"TMPDIR": str(home / "missing")})
    assert out == err == "0\n1\n2\n"
    if sys.platform == "linux":
        where = "readlink /proc/$$/fd/1; : {}"
        out, _ = sh(home, "-q", "--db", "where.db", where, 1, env={"TMPDIR": "", "TEMP": str(home)})
        assert out.startswith(str(home))
    limits = "import resource, sys, os; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["pipeloom.py", "sh", "-q", "--db", "few.db", "echo {}; test {} -gt 30", *map(str, range(60))]
    done = subprocess.run([sys.executable, "-c", limits, *command], cwd=str(home), stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and sorted(map(int, done.stdout.split())) == list(range(60))
    assert list(commands_in(home, "few.db").values()).count("done") == 29


@needs_linux
@once
def test_sh_copies_output_that_is_larger_than_its_memory(home):
    limits = "import resource, sys, os; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["pipeloom.py", "sh", "head -c {} /dev/zero", "600000000"]
    with subprocess.Popen([sys.executable, "-c", limits, *command], cwd=str(home), stdout=subprocess.PIPE) as process:
        size = sum(map(len, iter(partial(process.stdout.read, 1 << 20), b"")))
    assert (process.returncode, size) == (0, 600_000_000)


@needs_linux
@once
def test_sh_fails_a_command_whose_output_cannot_be_written_and_goes_on_where_nobody_reads_it(home):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "pipeloom.py", "sh", "-w", "1", "echo {}; touch {}.done", "a", "b"],
            cwd=str(home), stdout=full, stderr=subprocess.PIPE, universal_newlines=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1 and "2 failed, 1 cause" in done.stderr
    assert "cannot write its output to stdout: No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        subprocess.run(
            [sys.executable, "pipeloom.py", "sh", "--resume", "-w", "1", "echo {}; touch {}.done", "a", "b", "c"],
            cwd=str(home), stdout=nobody, check=True, timeout=60,
        )  # fmt: skip
    assert set(commands_in(home).values()) == {"done"} and (home / "c.done").exists()


@needs_posix
def test_what_sh_tells_of_a_command_that_its_shell_cannot_read_has_nothing_of_another(home):
    done = subprocess.run(
        [sys.executable, "pipeloom.py", "sh", "-w", "1", "-q"], input=b"printf %070000d 1\n(\n",
        cwd=str(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and b"\0" not in done.stderr and len(done.stderr) < 1_000


@needs_posix
def test_sh_reads_stdin_as_it_comes_and_says_so_where_there_is_none(home):
    process = subprocess.Popen(
        [sys.executable, "pipeloom.py", "sh", "-q", "echo {}"],
        cwd=str(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    with process:
        for item in (b"first\n", b"second\n"):
            process.stdin.write(item)
            assert process.stdout.readline() == item
        process.stdin.close()
    assert process.returncode == 0
    done = subprocess.run(
        f"{sys.executable} pipeloom.py sh 'echo {{}}' <&-", shell=True, cwd=str(home),
        stderr=subprocess.PIPE, universal_newlines=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, "stdin is closed; pass items" in done.stderr) == (2, True), done.stderr
    assert "0 done in" in sh(home, "echo {}")[1]


LEAVES = "echo $$ > {}.pid; (trap '' TERM; sh -c 'echo $$ > {}-child.pid; sleep 60; sleep 60') & "
OWN_GROUP = "timeout 60 sh -c 'echo $$ > {}-own.pid; sleep 60'; echo over"  # as timeout makes one


@needs_linux
@once
def test_no_process_of_sh_outlives_the_run(homes):
    """Not even one in the background that ignores SIGTERM."""

    def one(ending, expected):
        home = homes()
        command = LEAVES + ("sleep 0.3" if ending == "ends" else f"echo waits; {OWN_GROUP}")
        options = ["--timeout", "0.5"] if ending == "time-out" else []
        with sh_begun(home, *options, "-w", "2", command, "a", "b") as process:
            wait_for(lambda: len([file for file in home.glob("*-child.pid") if file.read_text()]) == 2)
            if ending == "SIGKILL":
                process.kill()
            elif ending in ("SIGINT", "SIGTERM"):
                process.send_signal(getattr(signal, ending))
                threading.Event().wait(0.3)  # so that the first is delivered
                process.send_signal(getattr(signal, ending))
            out, err = process.communicate(timeout=WAIT)
        assert process.returncode == expected, err
        if ending == "time-out":
            assert out == "waits\n" * 2 and "2 failed, 1 cause" in err and "timed out after 0.5 s" in err
        if ending in ("SIGINT", "SIGTERM"):
            assert "2 cancelled" in err

    at_once(one, [("ends", 0), ("time-out", 1), ("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])


@needs_posix
def test_sh_prints_what_a_command_says_when_it_is_cut_off(home):
    command = "trap 'sleep 0.3; echo last word; exit 1' TERM; sleep 60 & wait  # {}"
    out, err = sh(home, "--timeout", "0.3", command, "a", code=1)
    assert out == "last word\n" and "timed out after 0.3 s" in err


@needs_linux
@once
def test_no_command_that_begins_when_sh_is_killed_is_left(homes):
    def one(number):
        home = homes()
        with sh_begun(home, "-w", "8", "echo $$ > {}.pid; exec sleep 60; #", *map(str, range(20))) as process:
            wait_for(lambda: list(home.glob("*.pid")))
            threading.Event().wait(0.002 * number)
            process.kill()
            threading.Event().wait(0.2)  # the last ones write who they are

    at_once(one, [(number,) for number in range(4)])


STAYS = "trap '' TERM; for f in *.pid; do kill -0 $(cat $f) && touch both; done; echo $$ > $$.pid; sleep 60; sleep {}"
EARLY["test_sh_tries_again_only_when_nothing_is_left_of_the_attempt_before"] = [
    (["pipeloom.py", "sh", "--timeout", "1", "--retries", "1", STAYS, "60"], {})
]


@needs_linux
def test_sh_tries_again_only_when_nothing_is_left_of_the_attempt_before(early):
    for home, process in early["test_sh_tries_again_only_when_nothing_is_left_of_the_attempt_before"]:
        assert process.wait(WAIT) == 1 and not (home / "both").exists(), (home / "output").read_text()
        pids = [int(file.read_text()) for file in home.glob("*.pid")]
        assert len(pids) == 2
        wait_for(lambda pids=pids: not any(map(is_alive, pids)))


@needs_linux
@once
def test_no_command_of_sh_runs_that_nobody_watches(home):
    with sh_begun(home, "-w", "1", "touch {}; sleep 0.3; #", *"abc") as process:
        wait_for((home / "a").exists)
        keepers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (keeper,) = [pid for pid in keepers if b"_keep" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(keeper), signal.SIGKILL)
        _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1 and "2 failed" in err and "somebody has killed the process that watches" in err
    assert not (home / "c").exists()


@needs_posix
def test_sh_waits_for_who_reads_slowly_from_a_pipe_that_does_not_block(home):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb") as out:
        process = subprocess.Popen(
            [sys.executable, "pipeloom.py", "sh", "-q", "seq 50000; kill -{} $$", "35"], cwd=str(home), stdout=writer,
            stderr=subprocess.PIPE, universal_newlines=True,
        )  # fmt: skip
        os.close(writer)
        threading.Event().wait(0.5)
        assert out.read().count(b"\n") == 50_000
    assert "signal 35" in process.communicate(timeout=WAIT)[1] and process.returncode == 1


@needs_posix
def test_what_a_command_of_sh_prints_comes_above_the_bars(home):
    code, text = on_terminal(
        ["pipeloom.py", "sh"], ["--progress", "ansi", "-w", "2", "sleep 0.3; printf 'out {}\\nhalf'; echo err >&2", *"1234"], home
    )
    assert code == 0, text
    lines = screen(text)
    assert [line for line in lines if line.startswith("out")] and lines.count("half") == lines.count("err") == 4
    assert lines[-1].startswith("4 done in") and "All tasks" in text


@once
def test_the_help_of_each_command_fits_a_screen_and_ends_with_two_examples(home):
    for command in ("", *pipeloom.COMMANDS):
        env = {"COLUMNS": "80", "PATH": os.path.dirname(sys.executable)}  # where a short name will do
        said = python("pipeloom.py", *command.split(), "--help", cwd=home, code=0, env=env).stdout
        lines = said.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) < 80, said
        assert all(line.startswith("example: ") for line in lines[-2:]) and "pipeloom.py" in lines[-1]
    (home / "100%s.py").write_text("import pipeloom; pipeloom.Pipeline('100%s.db').main()")
    assert "(default: 100%s.db)" in python("100%s.py", "--help", cwd=home, code=0).stdout


@needs_posix
@once
def test_the_examples_of_the_help_work(homes):
    def one(command, number):
        home = homes()
        (home / "incoming").mkdir()
        (home / "commands.txt").write_text("true\n")
        (home / "a.log").write_text("x")
        program = THREE_TASKS.replace('"t.db"', '"sales.db"') + "def load(folder): print(folder)\n"
        (home / "job.py").write_text(program)
        run = partial(subprocess.run, shell=True, cwd=str(home), stdout=subprocess.PIPE, timeout=60)
        if command in ("status", ""):
            run(f"{sys.executable} job.py; {sys.executable} pipeloom.py init-db --db wal_demo.db", check=True)
        said = python("pipeloom.py", *command.split(), "--help", cwd=home, code=0).stdout
        example = re.findall("^example: (.*)", said, re.M)[number].replace("report --db", "'work[1]' --db")
        assert run(example).returncode == ("--fail" in example), example
        assert (home / "a.log.gz").exists() == ("gzip" in example)

    at_once(one, [(command, number) for command in ("", *pipeloom.COMMANDS) for number in (0, 1)])


# ---- Room: channel -------------------------------------------------------------------------------------

SENDER = SimpleNamespace(lock=nullcontext(), closed=False)


def test_a_full_channel_holds_its_producer_until_it_is_drained():
    channel, entered, done = pipeloom.Channel(limit=2), threading.Event(), threading.Event()

    def produce():
        channel.put(SENDER, 1)
        channel.put(SENDER, 2)
        entered.set()
        channel.put(SENDER, 3)
        done.set()

    thread = threading.Thread(target=produce)
    thread.start()
    assert entered.wait(WAIT) and not done.wait(0.05)
    batches = channel.batches()
    assert next(batches) == [(SENDER, 1), (SENDER, 2)]
    assert done.wait(WAIT)
    channel.close()
    assert list(batches) == [[(SENDER, 3)]]
    thread.join(WAIT)


def test_rows_fill_the_channel_until_their_message_is_drained():
    channel, done = pipeloom.Channel(limit=10), threading.Event()

    def produce():
        for number in (2, 3):
            channel.put(SENDER, number)
        done.set()

    channel.put(SENDER, 1, rows=100)
    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    assert not done.wait(0.05)
    assert next(channel.batches()) == [(SENDER, 1)]
    assert done.wait(WAIT)  # both, although nobody has drained the first
    thread.join(WAIT)


def test_what_many_threads_put_arrives_once_and_in_the_order_of_each(many_switches):
    channel, taken = pipeloom.Channel(limit=50), []

    def produce(who):
        for number in range(1_000):
            channel.put(SENDER, (who, number), rows=number % 3)

    def take():
        for items in channel.batches():
            taken.extend(message for _, message in items)

    reader = threading.Thread(target=take)
    reader.start()
    at_once(produce, [(who,) for who in range(8)])
    channel.close()
    reader.join(WAIT)
    assert not reader.is_alive() and len(taken) == 8_000
    for who in range(8):
        assert [number for sender, number in taken if sender == who] == list(range(1_000))


def test_a_full_channel_refuses_a_closed_sender_at_once():
    channel, sender = pipeloom.Channel(limit=1), SimpleNamespace(lock=threading.Lock(), closed=True)
    channel.put(SENDER, "fills it")
    assert channel.put(sender, "late") is False  # nobody drains it: this would wait for ever


def test_when_two_threads_end_an_attempt_at_once_one_wins():
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
    assert sorted(told) == [False, True] and [message for _, message in next(channel.batches())] == ["first"]


def test_a_channel_has_room_until_messages_and_rows_are_as_many_as_its_limit():
    channel = pipeloom.Channel(limit=4)
    channel.put(SENDER, 0)
    assert channel.has_room()
    channel.put(SENDER, 1, rows=2 * pipeloom.SMALL)
    assert not channel.has_room()
    assert [message for _, message in next(channel.batches())] == [0, 1] and channel.has_room()


def test_who_has_started_is_told_once_with_the_next_message_and_wakes_a_reader_that_sleeps():
    channel, others = pipeloom.Channel(), [SimpleNamespace(lock=nullcontext(), closed=False) for _ in range(2)]
    batches = channel.batches()
    channel.begin(SENDER)
    assert next(batches) == [(SENDER, pipeloom.STARTED)] and channel.begun() == [SENDER]
    channel.put(SENDER, 1)
    for other in others:
        channel.begin(other)
    assert next(batches) == [(SENDER, 1)] and channel.begun() == others and channel.begun() == []


def test_no_task_begins_once_the_channel_has_failed():
    channel = pipeloom.Channel()
    channel.put(SENDER, "nobody reads it")
    channel.fail(pipeloom.WriterFailed("x.db", "broken", "repair it"))
    with pytest.raises(pipeloom.WriterFailed):
        channel.begin(SENDER)


def test_a_channel_that_fails_releases_every_waiting_producer():
    channel, raised = pipeloom.Channel(limit=1), []
    channel.put(SENDER, 0)

    def produce():
        with pytest.raises(pipeloom.WriterFailed) as error:
            channel.put(SENDER, 1)
        raised.append(error.value)

    threads = [threading.Thread(target=produce) for _ in range(4)]
    for thread in threads:
        thread.start()
    failure = pipeloom.WriterFailed("x.db", "broken", "repair it")
    channel.fail(failure)
    for thread in threads:
        thread.join(WAIT)
    assert raised == [failure] * 4


# ---- Room: status --------------------------------------------------------------------------------------


class Started(SimpleNamespace):
    """An attempt that has started, as far as the status of its task is concerned."""

    name = "a"
    task_id = attempt = 1
    started_at, closed = "t1", False

    def owns(self, message):
        return message.task_id == 1


@pytest.fixture
def status(db):
    store = pipeloom._Store(str(db), True, False, 1.0, lambda: False, print)
    status = pipeloom._Status(store, kept=True, shows=False)
    store.patiently(store.open, lambda: status.open(None))

    def commit(*steps, begun=()):
        def apply():
            status.start_over()
            for step, *arguments in steps:
                status.sender = next((a for a in arguments if isinstance(a, Started)), None)
                step(*arguments)
            status.write()

        status.begun += begun
        store.patiently(store.commit, apply)
        status.committed()
        return rows(db, "SELECT status, attempts, started_at FROM task_runs")

    status.commit = commit
    yield status
    store.close()


def test_a_task_that_was_put_back_is_queued_until_it_has_started_again(status):
    attempt = Started()
    assert status.commit(begun=[attempt]) == [("running", 1, "t1")]
    attempt.started_at = None
    assert status.commit((status.put_back, attempt), begun=[attempt]) == [("queued", 0, None)]
    attempt.started_at = "t2"
    assert status.commit(begun=[attempt]) == [("running", 1, "t2")]
    attempt.started_at = "t3"  # and once more, before the writer comes
    assert status.commit((status.put_back, attempt)) == [("running", 1, "t3")]


def test_the_attempts_of_a_task_are_counted_whatever_another_says_between_them(status):
    first, second = Started(may_retry=lambda: True, trouble=pipeloom._NO_TROUBLE), Started(attempt=2, closed=True)
    assert status.commit((status.attempt_ended, first, "error", "t2", None, "no")) == [("queued", 1, "t1")]
    assert status.commit((status.finished, MsgTaskFinished(1, "error", "t2"))) == [("error", 1, "t1")]
    assert status.commit((status.attempt_ended, second, "done", "t3", None, ""), begun=[second]) == [("done", 2, "t1")]


# ---- Room: the rows that tasks have in common ----------------------------------------------------------


LOGGED = """
    CREATE TABLE log(n INTEGER PRIMARY KEY, task, step);
    CREATE TABLE a(task, step); CREATE TABLE b(task, step);
    CREATE TRIGGER log_a AFTER INSERT ON a BEGIN INSERT INTO log(task, step) VALUES (new.task, new.step); END;
    CREATE TRIGGER log_b AFTER INSERT ON b BEGIN INSERT INTO log(task, step) VALUES (new.task, new.step); END;
"""
INTO_A, INTO_B = "INSERT INTO a VALUES (?, ?)", "INSERT INTO b(task, step) VALUES (?, ?) ON CONFLICT DO NOTHING"
OTHER = "INSERT INTO log(task, step) SELECT ?, ?"  # no plain INSERT
STEPS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([INTO_A, INTO_A, INTO_B, OTHER]), st.integers(1, 3)), max_size=12)


@given(STEPS)
def test_rows_that_are_joined_are_all_stored_and_each_task_keeps_its_order(steps):
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.executescript(LOGGED)
        sent, others = {}, []

        def hand_over(statement):
            pipeloom._run_statement(conn, statement)
            others.append((conn.execute("SELECT count(*) FROM log").fetchone()[0], sum(map(len, sent.values()))))

        joined = pipeloom._Joined(conn, True, hand_over)
        for task, sql, number in steps:
            own = sent.setdefault(task, [])
            rows = [(task, len(own) + n) for n in range(number)]
            own.extend(rows)
            joined.store(task, pipeloom._Statement(sql, rows, True, None))
        joined.insert()
        stored = conn.execute("SELECT task, step FROM log ORDER BY n").fetchall()
    for task, rows in sent.items():
        assert [row for row in stored if row[0] == task] == rows
    assert len(stored) == sum(map(len, sent.values()))
    assert all(there == sent_before for there, sent_before in others)  # what is no plain INSERT comes after all


def test_the_same_statement_of_many_tasks_is_run_once():
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.executescript("CREATE TABLE a(task, step); CREATE TABLE b(task, step)")
        run_there = []
        joined = pipeloom._Joined(conn, True, pytest.fail)
        for task in range(300):
            for sql in (INTO_A, INTO_B):
                joined.store(task, pipeloom._Statement(sql, [(task, 1)], True, None))
        conn.set_trace_callback(run_there.append)
        joined.insert()
        conn.set_trace_callback(None)
        assert [sql.split()[2][:1] for sql in run_there if sql.startswith("INSERT")] == ["a", "b"]


# ---- Room: roster --------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.none() | st.integers(-3, 25), st.sampled_from("abc")), max_size=40),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_roster_gives_each_task_an_id_of_its_own_and_names_their_old_ones(
    old_database, tasks, resume, known
):
    """Against a dictionary of what an earlier run has stored, and a set of the ids that were given out. Where
    they are known before, as in a list, an old row whose id and name a task has is not another's."""
    highest = max([own for own, _ in tasks if own is not None], default=0)
    ids = {own: name for own, name in tasks if own is not None} if known else {highest: ""}
    run = SimpleNamespace(
        writer=SimpleNamespace(
            store=SimpleNamespace(path=old_database, shown="test.db"),
            status=SimpleNamespace(last_id=max(OLD_ROWS)),
        ),
        options={"resume": resume},
        graph=SimpleNamespace(stages=[SimpleNamespace(declared=SimpleNamespace(ids=ids))]),
    )
    roster, taken, new = pipeloom._Roster(run), set(), max(10, highest)
    with closing(roster):
        for own, name in tasks:
            if own is not None and own in taken:
                with pytest.raises(
                    pipeloom.UsageError, match=f"task_id {own} of task '{name}' is another task's"
                ):
                    roster.find(own, name)
                continue
            id, done_in = roster.find(own, name)
            free = [old for old in OLD_ROWS if OLD_ROWS[old][0] == name != ids.get(old) and old not in taken]
            if own is None and not free:
                new += 1
            assert id == (own if own is not None else free[0] if free else new)
            assert done_in == (7 if resume and OLD_ROWS.get(id, ("", ""))[1] == "done" else None)
            assert id not in taken
            taken.add(id)


# ---- Room: graph ---------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 7)), st.booleans(), st.sampled_from(["done", "failed", "empty"])),
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_graph_starts_each_stage_once_and_after_all_that_it_comes_after(plan):
    options = {name: default for name, (default, _, _) in pipeloom.OPTIONS.items()}
    writer = SimpleNamespace(store=SimpleNamespace(path=""), kinds=())
    after, ends, started, ended = {}, {}, [], set()
    for number, (others, even, end) in enumerate(plan):
        declared = pipeloom._Declared(f"t{number}", None, None, ())
        declared.even_if_failed, ends[declared] = even, end
        after[declared] = [before for n, before in enumerate(after) if n in others]
    stages = {declared: pipeloom._Stage(declared, options, writer) for declared in after}

    def begin(stage):
        before = [stages[other] for other in after[stage.declared]]
        assert stage not in started and ended >= set(before)
        spoiled = any(other.standing.spoiled for other in before)
        assert bool(stage.standing.doomed) == (spoiled and not stage.declared.even_if_failed)
        started.append(stage)
        if ends[stage.declared] == "empty":  # it ends at once, as it has no task
            stage.exhausted = True
            ended.add(stage)

    graph = pipeloom._Graph(stages, after)
    graph.begin = begin
    graph.start()
    for stage in started:  # which grows
        if stage not in ended:
            stage.submitted = stage.settled = 1
            stage.exhausted = True
            failed = "it failed" if ends[stage.declared] == "failed" else ""
            stage.standing.spoiled = stage.standing.spoiled or failed
            ended.add(stage)
            graph.stirred(stage)
    assert len(started) == len(stages)


# ---- Room: signals and retry delays --------------------------------------------------------------------


@needs_posix
def test_each_signal_is_more_urgent_and_so_is_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for number, signals, moments in (
        (signal.SIGINT, 1, [(0, 1), (1000, 1)]),
        (signal.SIGTERM, 1, [(0, 1), (4.9, 1), (5.1, 2), (7.2, 3)]),
        (signal.SIGINT, 2, [(0, 2), (1.9, 2), (2.1, 3)]),
        (signal.SIGINT, 3, [(0, 3)]),
    ):
        now[0], stopped = 0.0, []
        these = pipeloom._Signals(stopped.append)
        assert these.urgency() == 0
        these.install()
        try:
            for _ in range(signals):
                signal.raise_signal(number)
        finally:
            these.restore()
        assert stopped == ["interrupted"] * signals
        for moment, urgency in moments:
            now[0] = moment
            assert these.urgency() == urgency, (number, signals, moment)


@pytest.mark.parametrize(
    "first, attempt, low",
    [(2, 1, 2), (2, 2, 4), (2, 3, 8), (2, 5000, 3600), (7200, 1, 7200), (7200, 2, 7200), (0, 9, 0)],
)
def test_the_delay_before_a_retry_doubles_up_to_an_hour_and_is_a_little_random(first, attempt, low):
    assert low <= pipeloom._delay(first, attempt) <= low * 1.25


# ---- Room: timer ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_timer_does_everything_in_its_order_when_it_is_due_and_nothing_that_was_called_off(plan):
    done, clock = [], Clock()
    timer = type("Timer", (pipeloom._Timer,), {"clock": clock})()
    expected = [[] for _ in range(10)]
    for number, (delay, called_off) in enumerate(plan):
        entry = timer.after(delay + 0.5, lambda number=number: done.append(number))
        if called_off:
            timer.call_off(entry)
        else:
            expected[delay].append(number)
    for moment in range(11):
        clock.now = moment
        assert timer.step() > 0
        assert done == sum(expected[:moment], [])
    assert timer.step() == threading.TIMEOUT_MAX  # nothing is left


# ---- Room: the files of sh's commands ------------------------------------------------------------------


@needs_linux
@pytest.mark.parametrize("command, is_used_again", [("exit", True), ("exec sleep 60 >/dev/null", False)])
def test_files_are_used_again_only_if_no_process_has_them_open(command, is_used_again):
    with closing(pipeloom._Scratch()) as scratch, ExitStack() as ends:
        with scratch.file() as out, scratch.file() as err:
            files = [out, err]
            process = subprocess.Popen(f"exec {pipeloom.REOPEN}; {command}", shell=True, stderr=files[1], stdout=files[0])
            before = inodes(files)
            for file in files:  # so that no new file is given its number
                ends.callback(os.close, os.dup(file))
            ends.callback(process.wait, WAIT)
            ends.callback(process.kill)
            if command == "exit":
                process.wait(WAIT)
            else:
                wait_for(lambda: os.readlink(f"/proc/{process.pid}/exe").endswith("sleep"))
        with scratch.file() as out, scratch.file() as err:
            assert (sorted(inodes([out, err])) == sorted(before)) is is_used_again


OPENS = """
import os, threading, pipeloom
def look():
    while not over:
        os.close(os.open(f"/proc/self/fd/{file}", os.O_RDONLY))
over = []
with pipeloom._Scratch().file() as file:
    thread = threading.Thread(target=look)
    thread.start()
    found = {pipeloom._is_free(file) for _ in range(300)}
    over.append(1)
    thread.join()
print(sorted(found))
"""


@needs_linux
def test_who_looks_into_a_file_of_a_command_does_no_harm(home):
    assert python("-c", OPENS, cwd=home, code=0).stdout in ("[False]\n", "[False, True]\n", "[True]\n")


def test_where_files_cannot_be_opened_once_more_none_is_used_again(monkeypatch):
    open_file = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: open_file(str(path).replace("/proc/", "/none/"), *more))
    with closing(pipeloom._Scratch()) as scratch:
        assert not scratch.reopens
        with scratch.file() as file:
            os.fstat(file)
        with pytest.raises(OSError):  # it is closed
            os.fstat(file)


# ---- Room: renderer functions --------------------------------------------------------------------------


@needs_rich
def test_on_a_terminal_rich_draws_where_it_can_be_imported(monkeypatch):
    monkeypatch.setattr(pipeloom, "_is_terminal", lambda stream: True)
    assert pipeloom._best_display() == "rich"
    monkeypatch.setattr(pipeloom, "_rich_console", lambda: None)
    assert pipeloom._best_display() == "ansi"
    assert pipeloom._terminal_size(io.StringIO()) == (80, 24)  # as nobody knows


def test_a_bar_of_ones_own_changes_in_what_is_given_and_in_nothing_else(monkeypatch):
    monkeypatch.setattr(pipeloom, "_rich_console", lambda: None)
    progress = pipeloom.make_overall_progress()
    bar = progress.add_task("[cyan]Loading", total=4, completed=1)
    for change, name, percent in (
        ({}, "Loading", 25), ({"total": 8}, "Loading", 12), ({"completed": 4}, "Loading", 50),
        ({"advance": 2}, "Loading", 75), ({"description": "[b]Done"}, "Done", 75), ({"completed": 0}, "Done", 0),
    ):  # fmt: skip
        progress.update(bar, **change)
        (line,) = progress.lines(80, 5)
        assert line.startswith(name) and f" {percent}%" in line, (change, line)
    progress.remove_task(bar)
    progress.update(bar, total=1)  # is let be
    assert progress.lines(80, 5) == []


@given(st.text(max_size=60), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_any_name_fits_its_width_and_holds_no_control_character(text, width):
    line = pipeloom._fit(text, width)
    assert pipeloom._width(line) == width
    assert line.isprintable() or not line
    assert pipeloom._fit("\u65e5\u672c\u8a9e", 4) == "\u65e5\u672c"
    assert pipeloom._fit("e\u0301", 3) == "e\u0301  "


@pytest.mark.parametrize(
    "encoding, colourless, drawn",
    [
        ("utf-8", "", "\x1b[32m━━╸\x1b[0m\x1b[90m━━\x1b[0m"),
        ("utf-8", "1", "━━╸  "),
        ("ascii", "", "\x1b[32m##\x1b[0m\x1b[90m...\x1b[0m"),
        (None, "1", "##..."),
    ],
)
def test_a_bar_shows_how_much_is_left_also_without_colour(monkeypatch, encoding, colourless, drawn):
    monkeypatch.setenv("NO_COLOR", colourless)
    assert pipeloom._Style(SimpleNamespace(encoding=encoding)).bar(0.5, 5) == drawn


@needs_rich
def test_with_rich_a_bar_is_richs_own():
    bar = pipeloom._Style(SimpleNamespace(encoding="utf-8"), rich=True).bar(0.5, 10)
    assert "\u2501" * 5 in bar


@given(st.lists(st.tuples(st.text(max_size=50), st.floats(0, 2), st.text(max_size=50))), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_no_line_is_wider_than_the_window(bars, width):
    style = pipeloom._Style(io.StringIO())
    style.colour = False
    shown = [pipeloom._Bar(name, total, 1, text, began=len(text)) for name, total, text in bars]
    lines = list(pipeloom._lines(shown, width, style))
    assert len(lines) == len(bars)
    for line in lines:
        assert pipeloom._width(line) == max(width - 1, 0) and (line.isprintable() or not line)
    assert len(pipeloom._line("x" * 200, width)) == width - 1 and len(pipeloom._line("x" * 200, 0)) == 200


@given(st.text(max_size=60), st.integers(5, 50))
def test_a_long_name_loses_its_middle_and_keeps_both_ends(name, width):
    name = name.replace(".", "")  # whose dots could not be told from those of the cut
    clean = pipeloom._clean(name)
    line = pipeloom._fit(name, width, "..")
    if pipeloom._width(clean) <= width:
        assert line == clean + " " * (width - pipeloom._width(clean))
    else:
        head, dots, tail = line.rstrip().rpartition("..")
        assert dots and clean.startswith(head) and clean.rstrip().endswith(tail)
        assert not clean.isascii() or len(head + dots + tail.rstrip()) <= width == len(line)
    assert pipeloom._fit("incoming/2026/january/sales.csv", 20, "..") == "incoming/..sales.csv"


class Moments:
    """A clock for the display: `now` is what the test says."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(pipeloom.time, "monotonic", lambda: self.now)


def board_of(total=None, clock=None):
    """A display of bars without a terminal."""
    style = pipeloom._Style(io.StringIO())
    style.colour = False
    board = pipeloom._TerminalBars(style)
    board.total = total
    return board


def shown_by(board, width=80, room=23):
    return [line.rstrip() for line in board.lines(width, room)]


@pytest.fixture
def moments(monkeypatch):
    return Moments(monkeypatch)


def test_the_total_line_and_as_many_rows_as_fit_are_shown(moments):
    board = board_of(10_000)
    for id in range(10_000):
        board.update(MsgTaskStarted(id, f"task-{id}", "now"))
    board.update(MsgTaskFinished(0, "error", "now"))
    assert "+9,999 more" in shown_by(board)[1]  # a task that has only just begun has no row
    moments.now += 1
    for room in range(2, 12):
        lines = shown_by(board, 100, room)
        assert len(lines) == room and lines[0].startswith("All tasks") and "1 failed" in lines[0]
    assert lines[1].startswith("task-1 ") and lines[-1] == "+9,990 more"
    assert (
        len(board.lines(80, 1)) == 1 and board.lines(80, 0) == [] and len(board.lines(80, 20_000)) == 10_000
    )
    for id in range(6, 10_000):
        board.update(MsgTaskFinished(id, "done", "now"))
    assert [line.split()[0] for line in shown_by(board, room=6)[1:]] == [f"task-{id}" for id in range(1, 6)]
    assert shown_by(board, room=5)[-1] == "+2 more"


def test_a_task_keeps_its_row_with_its_time_and_a_row_left_free_closes_after_a_moment(moments):
    def rows_shown():
        return [line.partition(" ")[0] for line in shown_by(board)[1:]]

    board = board_of(9)
    for id in "abc":
        board.update(MsgTaskStarted(ord(id), id, "now"))
    moments.now += 61
    assert rows_shown() == ["a", "b", "c"] and all("0:01:01" in line for line in shown_by(board)[1:])
    board.update(MsgTaskFinished(ord("a"), "done", "now"))
    board.update(MsgTaskStarted(ord("d"), "d", "now"))
    assert rows_shown() == ["", "b", "c"]  # and "d" has only just begun
    moments.now += 0.2
    assert rows_shown() == ["d", "b", "c"]
    board.update(MsgTaskFinished(ord("b"), "done", "now"))
    assert rows_shown() == ["d", "", "c"]
    moments.now += 0.3
    assert rows_shown() == ["d", "", "c"]
    moments.now += 0.3
    assert rows_shown() == ["d", "c"]


def test_bars_stay_in_their_column_when_the_longest_name_has_gone(moments):
    board, columns = board_of(9), set()
    for id, name in (1, "a rather long name"), (2, "b"):
        board.update(MsgTaskStarted(id, name, "now"))
        board.update(MsgTaskProgress(id, 1, 2))
        moments.now += 1
        columns.add(board.lines(80, 23)[1].index("50%"))
        board.update(MsgTaskFinished(id, "done", "now"))
    assert len(columns) == 1


@pytest.mark.parametrize("total, done", [(60, 37), (9_999, 5_000), (1_000_000, 654_321), (None, 654_321)])
def test_at_80_columns_the_total_line_has_counts_failures_rate_time_and_eta(moments, total, done):
    board = board_of(total)
    board.counts.update(done=done, error=3)
    moments.now += 100
    (line,) = shown_by(board)
    counts = f"{done:,} done" if total is None else f"{done:,}/{total:,} done"
    assert f"{counts}  3 failed" in line and f"{pipeloom._rate((done + 3) / 100)}  0:01:40" in line
    assert "eta 0:0" in line or total is None
    assert ("#" in line) == (total == 60)  # the bar gives way first
    assert len(line) < 80


@given(
    st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
    st.none() | st.integers(0, 10**9),
    st.integers(1, 250),
)
def test_whatever_the_counts_the_total_line_fits_and_done_comes_first(counts, total, width):
    board = board_of(total)
    board.counts = dict(zip(board.counts, counts))
    (line,) = board.lines(width, 1)
    assert len(line) == width - 1 and "\n" not in line
    assert width < 80 or (f"{counts[0]:,}" in line and (f"  {counts[1]:,} failed" in line or not counts[1]))
    facts = ["eta -:--:--", *filter(None, board.facts().values())]
    assert width < 40 or line.rstrip().endswith(tuple(facts)), line  # and not with half of one


def test_a_bar_and_an_eta_that_come_and_go_move_nothing(moments):
    board = board_of(60)
    board.counts.update(done=10)
    moments.now += 20
    (known,) = shown_by(board)
    board.counts.update(done=0)
    (unknown,) = shown_by(board)
    assert "eta 0:01:40" in known and "eta -:--:--" in unknown
    assert known.index("done") == unknown.index("done") and known.index("eta") == unknown.index("eta")


def test_there_is_no_eta_while_the_rest_waits_for_a_retry_and_none_that_is_a_guess(moments):
    board = board_of(4)
    for id in (1, 2, 3, 4):
        board.update(MsgTaskStarted(id, "t", "now"))
    moments.now += 10
    assert board.eta(10) is None  # nobody says how far it is
    for id in (1, 2, 3, 4):
        board.update(MsgTaskProgress(id, id, 5))
    assert board.eta(10) == pytest.approx(40)  # the slowest ends last
    for id in (1, 2):
        board.update(MsgTaskFinished(id, "done", "now"))
    for id in (3, 4):
        board.update(MsgTaskFinished(id, "queued", "", None, "attempt 1 failed: why"))
    board.update(MsgTaskFinished(5, "queued", ""))  # which has not failed, but waits for its turn
    assert board.eta(10) is None and "2 to retry" in shown_by(board)[0] and "2/4 done" in shown_by(board)[0]
    board.total = 9  # others come after these
    assert board.eta(10) is None
    board.total = 4
    board.update(MsgTaskStarted(3, "t", "now"))
    board.update(MsgTaskProgress(3, 1, 2))
    assert board.eta(10) is None and "1 to retry" in shown_by(board)[0]
    board.total = 100
    assert board.eta(10) == pytest.approx(490)  # by the rate
    board = board_of(1)
    board.update(MsgTaskStarted(1, "last", "now"))
    board.update(MsgTaskProgress(1, 1, 3))
    moments.now += 10
    assert board.eta(10) == pytest.approx(20)


@pytest.mark.parametrize(
    "per_second, said",
    [(6543.21, "6,543/s"), (12.34, "12.3/s"), (1, "1.0/s"), (0.0165, "59.4/h"), (1 / 60, "1.0/min"), (0.5, "30.0/min"), (0.02, "1.2/min"), (0.001, "3.6/h")],
)
def test_a_rate_is_per_second_minute_or_hour(per_second, said):
    assert pipeloom._rate(per_second) == said


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
        assert found - set(sys.stdlib_module_names) == {"typing_extensions"}  # for type checkers only


def test_the_version_in_pyproject_is_read_from_the_module():
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text and "pipeloom.__version__" in text


# ---- README and examples -------------------------------------------------------------------------------


@pytest.fixture
def as_in_the_readme(home):
    """Runs a command line of the README in a folder with its first program; returns the exit code and what was said."""
    (home / "job.py").write_text(readme_blocks("python")[0])
    (home / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "python3").chmod(0o755)
    env = {**os.environ, "PATH": f"{home}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    options = {"shell": True, "cwd": str(home), "env": env, "universal_newlines": True, "timeout": 60}

    def one(command):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        return done.returncode, done.stdout

    return one


@needs_posix
@once
def test_the_transcripts_of_the_readme_are_true(as_in_the_readme):
    def alike(text):
        text = re.sub(r"\d\d:\d\d:\d\d|\d+\.\d s|[\d.]+K", "N", text)
        text = re.sub(r"cd \S+ && (\S+) job", "python3 job", text)
        return sorted(line for line in text.splitlines() if line)

    as_in_the_readme("echo x > a.log; echo y > b.log")
    for block in readme_blocks("text"):
        for part in block[2:].split("\n$ "):
            command, _, said = part.partition("\n")
            assert alike(as_in_the_readme(command)[1]) == alike(said), command


@needs_posix
@once
def test_every_command_of_the_readme_runs(as_in_the_readme):
    text = " ".join((HERE / "README.md").read_text(encoding="utf-8").split("\n"))
    commands = [command.strip() for command in readme_blocks("sh") if "pip install" not in command]
    commands += re.findall("`(python3 [^`]+)`", text)
    commands += [f"python3 job.py {options}" for options in re.findall("`(--resume --[^`]+)`", text)]
    commands += re.findall("`15 2 .*? cd /srv/sales && ([^`]+)`", text)
    commands += [command.rstrip("&") for command in re.findall("`(nohup [^`]+)`", text)]
    assert len(commands) >= 10
    assert as_in_the_readme("mkdir incoming; echo tea,3 > incoming/a.csv; echo true > commands.txt; python3 job.py")[0] == 0
    for command in commands:
        if "benchmark" not in command:  # it takes minutes
            assert as_in_the_readme(command)[0] == 0, command
    assert 'docker run --rm -it -v "$PWD":/w -w /w python:3-alpine python pipeloom.py demo' in text


def test_the_readme_is_short_and_names_only_files_that_are_there():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for path in re.findall(r"\((examples/[^)]+)\)|`(examples/\w+\.\w+)", text):
        assert (HERE / "".join(path)).exists()


def test_every_program_of_the_readme_runs(homes):
    for block in readme_blocks("python"):
        home = homes()
        (home / "program.py").write_text(block)
        python("program.py", cwd=home, code=0)
        (database,) = home.glob("*.db")  # and its lock beside it
        assert {row[2] for row in rows(database)} == {"done"}


def test_the_tests_that_the_readme_names_for_each_promise_exist():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    promises = dict(re.findall(r"^\| (G\d) \|.*\| (.*) \|$", text, re.M))
    assert sorted(promises) == [f"G{n}" for n in range(1, 10)]
    for names in promises.values():
        assert names and all(callable(globals().get(name[1:-1])) for name in names.split(", ")), names


def test_every_example_is_tested():
    names = {path.name for path in (HERE / "examples").glob("*.py")}
    assert names == {
        "benchmark.py", "cluster.py", "download.py", "http_json.py", "load_csv.py", "local_servers.py", "report.py",
        "verify_install.py",
    }  # fmt: skip


def test_the_cluster_counts_primes_once(tmp_path):
    pytest.importorskip("distributed")
    for done, skipped in ((50, 0), (0, 50)):
        said = example("cluster.py", "--resume", cwd=tmp_path).stdout
        assert re.search(f"{done} done" + f", {skipped} skipped" * bool(skipped), said), said
    assert rows(tmp_path / "primes.db", "SELECT count(*) FROM prime") == [(78_498,)]


LOSSY = """
import sys, whole
def executemany(self, sql, rows, keep=whole.TaskContext.executemany):
    keep(self, sql, list(rows)[1:])
whole.TaskContext.executemany = executemany
sys.modules["pipeloom"] = whole
"""

BROKEN = """
import sys, whole
whole.run_pipeline = lambda *arguments, **options: 1 / 0
sys.modules["pipeloom"] = whole
"""


@pytest.fixture
def measured(home):
    """Runs a copy of examples/benchmark.py, and sees that no temporary file is left."""
    for folder in ("examples", "temporary"):
        (home / folder).mkdir()
    shutil.copy(str(HERE / "examples" / "benchmark.py"), str(home / "examples"))

    def one(*arguments, code):
        env = {"TMPDIR": str(home / "temporary")}
        done = python("examples/benchmark.py", "--rounds", 1, *arguments, cwd=home, code=code, env=env)
        assert not os.listdir(str(home / "temporary"))
        return done

    return one


@needs_posix
@once
def test_the_benchmark_can_measure_each_of_its_lines_and_finds_what_it_claims_in_the_database(measured):
    lines = {line["name"]: line for line in json.loads(measured("--limit", 4, "--json", code=0).stdout)}
    names = "tasks listed original messages execute executemany one_row ten_rows busy lag latency"
    names += " busy_processes executor returned bars_ansi memory start_import start_help"
    names += " bars_rich" * bool(rich)
    assert set(lines) - {"sh"} == set(names.split()) and ("sh" in lines) == bool(shutil.which("xargs"))
    for line in lines.values():
        assert line["verdict"] in ("met", "missed") and line["size"] <= 4 and line["ours"] > 0
        assert (line["other"] > 0) == ("|" in line["what"])


@once
def test_the_benchmark_prints_the_lines_that_are_asked_for(measured):
    done = measured("--only", "execute", "--limit", 3, code=0)
    assert re.fullmatch("execute .* >= 1 x .* 3 tasks .*\nexecutemany .* >= 1.2 x .*\n", done.stdout)
    assert "--only" in measured("--only", "nonsense", code=2).stderr


@pytest.mark.parametrize(
    "library, told", [(LOSSY, "not true of the database"), (BROKEN, "ZeroDivision")], ids=["lossy", "broken"]
)
@once
def test_the_benchmark_notices_a_library_that_loses_rows_or_does_not_work(measured, home, library, told):
    shutil.move(str(home / "pipeloom.py"), str(home / "whole.py"))
    (home / "pipeloom.py").write_text(library, encoding="utf-8")
    done = measured("--only", "executemany", "--limit", 3, code=1)
    assert re.match(f"executemany FAILED .*{told}", done.stdout), done.stdout


@once
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


SHORT_EXAMPLES = sorted({path.name for path in (HERE / "examples").glob("*.py")} - {"benchmark.py", "report.py"})


@pytest.mark.parametrize("name", SHORT_EXAMPLES)
def test_an_example_is_python_3_8_in_under_80_lines_and_opens_no_database_itself(name):
    text = (HERE / "examples" / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    tree = ast.parse(text, feature_version=(3, 8))
    assert ast.get_docstring(tree) and "sqlite3" not in text


@pytest.mark.parametrize("name", ["load_csv.py", "http_json.py", "download.py", "verify_install.py"])
@once
def test_an_example_refuses_a_bad_argument_in_one_line_and_leaves_nothing(name, tmp_path):
    for arguments in (["no-such-thing"], ["--no-such-option"], ["-w", "4", "after-an-option"]):
        done = example(name, *arguments, cwd=tmp_path, code=2)
        assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert arguments[-1] in done.stderr
    assert list(tmp_path.iterdir()) == []


def attempts(path):
    return dict(rows(path, "SELECT name, attempts FROM task_runs"))


def test_load_csv_drops_the_lines_that_a_file_no_longer_has(tmp_path):
    (tmp_path / "in").mkdir()
    for text, found in (("\ufeffa,1\nb,2\n", ['["a", "1"]', '["b", "2"]']), ("c,3\n", ['["c", "3"]'])):
        (tmp_path / "in" / "a.csv").write_text(text, encoding="utf-8")
        done = example("load_csv.py", "in", cwd=tmp_path)
        assert done.stdout == f"1 files in the database hold {len(found)} lines\n"
        assert rows(tmp_path / "load_csv.db", "SELECT * FROM line ORDER BY number") == [
            (os.path.join("in", "a.csv"), number, fields) for number, fields in enumerate(found, 1)
        ]
    (tmp_path / "in" / "a.csv").write_bytes(b"d,4\n\xff\n")
    assert "UnicodeDecodeError" in example("load_csv.py", "in", cwd=tmp_path, code=1).stderr
    assert rows(tmp_path / "load_csv.db", "SELECT fields FROM line") == [('["c", "3"]',)]


@contextmanager
def served(answer):
    """A web server. `answer(path, range)` gives status, headers and content; yields its address."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, content = answer(self.path, self.headers["Range"])
            self.send_response_only(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(WAIT)


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@once
def test_http_json_stores_every_row_although_requests_fail_and_one_answer_takes_too_long(tmp_path):
    stored = []
    for _ in range(2):
        done = example("http_json.py", "-v", cwd=tmp_path)
        assert done.stdout == "10 users have written 100 posts\n"
        assert "503" in done.stderr and "timed out after 0.5 s" in done.stderr
        again = {name for name, number in attempts(tmp_path / "http_json.db").items() if number == 2}
        assert again == {"users/2", "users/4", "users/5"}
        stored.append(
            rows(tmp_path / "http_json.db", "SELECT * FROM user JOIN post ON user = user.id ORDER BY post.id")
        )
    assert stored[0] == stored[1] and len(set(stored[0])) == 100
    assert "11 skipped" in example("http_json.py", "--resume", cwd=tmp_path).stderr


@once
def test_http_json_says_which_url_is_not_there_and_stores_the_others(tmp_path, no_proxy):
    def answer(path, _):
        number = int(path.split("/")[3])
        user = {"id": number, "name": "Ann"}
        posts = [{"id": number, "userId": number, "title": "Hello"}]
        content = json.dumps(posts if path.endswith("/posts") else user).encode()
        return (404, {}, b"") if path == "/v1/users/7/posts" else (200, {}, content)

    with served(answer) as address:
        done = example("http_json.py", f"{address}/v1/", "--retries=0", cwd=tmp_path, code=1)
    assert f"users/7 failed: OSError: {address}/v1/users/7/posts: HTTP Error 404" in done.stderr
    others = [(number,) for number in range(1, 11) if number != 7]
    for table in ("user", "post"):
        assert rows(tmp_path / "http_json.db", f"SELECT id FROM {table} ORDER BY id") == others


def sha256(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()


@once
def test_download_goes_on_where_it_broke_off_and_again_fetches_only_what_is_damaged(tmp_path):
    def look():
        stats = {path.name: path.stat() for path in (tmp_path / "downloads").iterdir()}
        return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}

    def stored():
        return rows(tmp_path / "download.db", "SELECT file, url, size, sha256 FROM file ORDER BY file")

    said = example("download.py", "-v", cwd=tmp_path).stderr
    assert len(re.findall(r"broke off after [\d,]+ of [\d,]+ bytes; retrying", said)) == 8
    files, first = look(), stored()
    assert [os.path.basename(row[0]) for row in first] == sorted(files) and len(files) == 8
    for name, url, size, digest in first:
        content = (tmp_path / name).read_bytes()
        assert (len(content), sha256(content)) == (size, digest) and url.endswith(os.path.basename(name))
    example("download.py", cwd=tmp_path)
    assert set(attempts(tmp_path / "download.db").values()) == {1}
    assert "8 skipped" in example("download.py", "--resume", cwd=tmp_path).stderr
    assert (look(), stored()) == (files, first)
    (tmp_path / "downloads" / "file-3.bin").write_bytes(b"damaged")
    example("download.py", cwd=tmp_path)
    assert {name for name, entry in look().items() if entry != files[name]} == {"file-3.bin"}
    assert stored() == first


@pytest.mark.parametrize("knows_ranges", [True, False])
@once
def test_download_takes_ranges_or_starts_over_and_a_wrong_checksum_leaves_no_file(
    knows_ranges, tmp_path, no_proxy
):
    content, listed, asked = b"0123456789" * 20_000, {}, []

    def answer(path, wanted):
        if path == "/files/SHA256SUMS":
            return 200, {}, "".join(f"{digest}  {name}\n" for name, digest in listed.items()).encode()
        asked.append((path, wanted))
        if path == "/files/empty":
            return 200, {}, b""
        first = int(wanted[6:-1]) if wanted and knows_ranges else 0
        return (206 if wanted and knows_ranges else 200), {}, content[first:]

    def run_again(*options, code=0):
        del asked[:]
        done = example("download.py", f"{address}/files/SHA256SUMS", *options, cwd=tmp_path, code=code)
        return done, {path.name: path.read_bytes() for path in folder.iterdir()}

    folder = tmp_path / "downloads"
    folder.mkdir()
    digest = sha256(content)
    listed.update({"a b": digest, "empty": sha256(b""), "whole": digest})
    (folder / f"a b.{digest[:8]}.part").write_bytes(content[:70_000])
    (folder / f"whole.{digest[:8]}.part").write_bytes(content)  # killed before it got its name
    with served(answer) as address:
        _, found = run_again()
        assert found == {"a b": content, "empty": b"", "whole": content}
        assert sorted(asked) == [("/files/a%20b", "bytes=70000-"), ("/files/empty", None)]
        content = b"another edition"
        listed["a b"] = sha256(content)
        _, found = run_again("--resume")
        assert found["a b"] == content and asked == [("/files/a%20b", None)]
        listed["whole"] = sha256(b"what is not there")
        done, after = run_again("--resume", "--retries=0", code=1)
        assert "has not the checksum that is listed" in done.stderr and after == found
    assert rows(tmp_path / "download.db", "SELECT sha256 FROM file ORDER BY file") == [
        (sha256(found["a b"]),), (sha256(b""),), (sha256(found["whole"]),)
    ]  # fmt: skip


def noted(path, content):
    from base64 import urlsafe_b64encode

    digest = urlsafe_b64encode(bytes.fromhex(sha256(content))).decode().rstrip("=")
    return f'"{path}",sha256={digest},{len(content)}\n'


def package(folder, name, files, record=True):
    """Install a package in a folder, as pip would; `files` are {path: content}."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    if record:
        lines = [noted(path, content) for path, content in files.items()]
        lines += [f"{info.name}/RECORD,,\n", "some/cache.pyc,,\n"]
        (info / "RECORD").write_text("".join(lines), encoding="utf-8")
    return info / "RECORD"


@once
def test_verify_install_finds_a_changed_and_a_missing_file(tmp_path):
    site = tmp_path / "site"
    files = {"some/good.py": b"good", "some/edited.py": b"before", "some/gone.py": b"gone", "some/a,b": b""}
    record = package(site, "Some_Thing", files)
    package(site, "other", {"other.py": b"other"})
    package(site, "unrecorded", {"unrecorded.py": b"?"}, record=False)
    package(tmp_path / "shadowed", "some-thing", {"some/never.py": b"never"})
    (tmp_path / "shadowed" / "some" / "never.py").unlink()
    path = os.pathsep.join(map(str, (HERE, site, site, tmp_path / "shadowed")))

    def verify(*names, code):
        program = HERE / "examples" / "verify_install.py"
        return python(program, *names, cwd=tmp_path, code=code, env={"PYTHONPATH": path})

    def stored():
        ours = "SELECT * FROM file WHERE package IN ('other', 'some-thing') ORDER BY package, path"
        return rows(tmp_path / "verify_install.db", ours)

    good = [("other", "other.py", "good")] + [("some-thing", name, "good") for name in sorted(files)]
    for _ in range(2):
        done = verify("some-thing", "Other", code=0)
        assert done.stdout == "2 packages, 5 files, 0 missing, 0 changed\n" and stored() == good
    (site / "some" / "edited.py").write_bytes(b"after")
    (site / "some" / "gone.py").unlink()
    for options in ([], ["--resume"]):
        assert verify("Some_Thing", "other", *options, code=1).stdout == (
            "some-thing: some/edited.py is changed\n"
            "some-thing: some/gone.py is missing\n"
            "2 packages, 5 files, 1 missing, 1 changed\n"
        )
    assert verify("other", code=0).stdout == "1 packages, 1 files, 0 missing, 0 changed\n"
    for names in ([], ["other"], []):  # a report on one package is none on all
        done = verify(*names, "--resume", code=0 if names else 1)
        assert ("some/gone.py is missing" in done.stdout) is not bool(names)
    record.write_text(noted("some/good.py", b"good"), encoding="utf-8")
    assert verify("some_thing", code=0).stdout == "1 packages, 1 files, 0 missing, 0 changed\n"
    assert stored() == [("other", "other.py", "good"), ("some-thing", "some/good.py", "good")]
    assert "without a RECORD: unrecorded" in verify("unrecorded", "other", code=2).stderr


@once
def test_verify_install_checks_every_recorded_file_of_this_python(tmp_path):
    done = example("verify_install.py", cwd=tmp_path, code=None)
    *damaged, last = done.stdout.splitlines()
    packages, files, missing, changed = map(
        int, re.fullmatch(r"(\d+) packages, (\d+) files, (\d+) missing, (\d+) changed", last).groups()
    )
    assert len(damaged) == missing + changed and done.returncode == (1 if damaged else 0), done.stderr
    records = {path for place in sys.path for path in Path(place).glob("*.dist-info/RECORD")}
    lines = [line for path in records for line in path.read_text(encoding="utf-8").splitlines()]
    assert packages == len(records) and files == sum(",sha256=" in line for line in lines) > 100


FIRST = ("id INTEGER PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, progress REAL NOT NULL DEFAULT 0.0,"
         " message TEXT, started_at TEXT, finished_at TEXT, result TEXT")  # fmt: skip


class Page(HTMLParser):
    """A page of report.py: every tag is closed where it ought to be, and nothing comes from elsewhere."""

    def __init__(self, path):
        super().__init__()
        self.open, self.text, self.tags, self.titles = [], "", [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [] and not {"script", "link", "img", "iframe"} & set(self.tags)
        assert not re.search(r"https?:|//|url\(|@import", self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes), attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"
            self.titles += [data] if self.open[-2:] == ["rect", "title"] else []


def reported(db, cwd):
    assert example("report.py", db, cwd=cwd).stdout == f"{db}.html\n"
    return Page(Path(f"{db}.html"))


def status_table(db, columns=FIRST):
    execute(db, f"CREATE TABLE task_runs({columns})")
    return "INSERT INTO task_runs(name, status, message, started_at, finished_at) "


@once
def test_a_report_shows_the_newest_run_what_failed_in_it_and_why(db, tmp_path):
    pipe = Pipeline(db, progress="none", workers=2)

    @pipe.task(each=["<script>alert(1)</script>", "a\x1b[31m\udce4 & b", "語" * 500, "plain"], name=str)
    def load(ctx, name):
        ctx.sleep(0.02)
        if name.startswith("<script>") and len(runs) == 1:
            raise ValueError(f"<b>{name}</b>")

    pipe.task(lambda ctx: None, name="after", after=load)
    runs = [1]
    pipe.run(check=False)
    before = db.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    page = reported(db, tmp_path)
    assert (db.read_bytes(), [*before[1], "test.db.html"]) == (before[0], sorted(os.listdir(str(tmp_path))))
    assert "<script>alert(1)</script>" in page.text and "a\\x1b[31m\\udce4 & b" in page.text
    assert "ValueError: <b><script>alert(1)</script></b>" in page.text and "Traceback (most" in page.text
    assert "not started: " in page.text and "語" * 100 in page.text and "語" * 101 not in page.text
    assert len(page.titles) == 4 and any(title.startswith("plain, ") for title in page.titles)
    runs.append(2)
    pipe.run(resume=True)
    page = reported(db, tmp_path)
    assert "Run 2 is the newest that ran something. Run 2: done." in page.text
    assert "3 earlier tasks are not shown" in page.text and "ValueError" not in page.text
    pipe.run(resume=True)
    page = reported(db, tmp_path)
    assert "Run 2 is the newest that ran something. Run 3: done." in page.text and len(page.titles) == 2


RUNNING = """
import pipeloom
def work(task, ctx):
    ctx.progress(1, 4)
    if task == 5: print("ready", flush=True)
    ctx.sleep(60)
pipeloom.run_pipeline(range(6), "test.db", worker_fn=work, workers=6, progress="none")
"""


@needs_posix
@once
def test_a_report_tells_tasks_that_run_from_those_of_a_killed_run(home):
    with begun("-c", RUNNING, cwd=home) as process:
        wait_for(lambda: rows(home / "test.db", "SELECT count(*) FROM task_runs WHERE progress > 0") == [(6,)])
        page = reported(home / "test.db", home)
        assert "running" in page.text and "unfinished" not in page.text and len(page.titles) == 6
        process.kill()
        process.wait(WAIT)
    page = reported(home / "test.db", home)
    assert "unfinished" in page.text and "25%" in page.text and "interrupted" in page.text


@once
def test_a_report_of_10000_tasks_is_smaller_than_a_megabyte_however_many_ran_at_once(db, tmp_path):
    insert = status_table(db)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 9999) SELECT "
    time = "strftime('%Y-%m-%dT%H:%M:%f', '2026-01-01', '+' || ({}) || ' seconds') || '+00:00'"
    for lanes, late in ((8, "i / 8"), (10_000, "0")):
        execute(db, "DELETE FROM task_runs")
        names = f"replace(hex(zeroblob(20)), '00', '&<') || i, 'error', 'no ' || i, {time.format(late)}"
        execute(db, f"{insert} {numbers} {names}, {time.format(late + ' + 1')} FROM n")
        page = reported(db, tmp_path)
        assert len(page.source.encode("utf-8")) < 1_000_000 and f"{lanes:,} at once at most" in page.text
        drawn = [int((re.findall(r"longest of (\d+)$", title) or ["1"])[0]) for title in page.titles]
        assert sum(drawn) == 10_000


def test_a_report_needs_no_more_than_the_columns_of_the_original_and_no_times(db, tmp_path):
    insert = status_table(db)
    values = ["('fine', 'done', NULL, '2026-01-01T00:00:00+00:00', '2026-01-01T00:00:02Z')",
              "('never', 'cancelled', 'not started', NULL, '2026-01-01T00:00:02')",
              "('odd', 'done', '', 'yesterday', '<i>')", "('odder', 'error', x'ff00', '12', 'now')",
              "('back', 'strange', '', '2026-01-01T00:00:01', '2025-01-01')",
              "(x'00ff', 'running', '', '2026-01-01T00:00:01', NULL)"]  # fmt: skip
    assert "nothing" in reported(db, tmp_path).text
    execute(db, insert + "VALUES " + ", ".join(values))
    page = reported(db, tmp_path)
    assert any(title.startswith("fine, 2 s, done") for title in page.titles)
    assert "not started" in page.text and "unfinished" in page.text and "b'\\x00\\xff'" in page.text


def test_a_report_of_what_it_cannot_read_or_write_is_one_line_and_exit_code_2(db, tmp_path):
    (tmp_path / "text.db").write_text("no database " * 100)
    sqlite3.connect(str(tmp_path / "empty.db")).close()
    status_table(db)
    (tmp_path / "folder").mkdir()
    wrong = [["missing.db"], ["text.db"], ["empty.db"], [db, db], [db, "missing/page.html"], [db, "folder"]]

    def refused(*arguments):
        done = example("report.py", *arguments, cwd=tmp_path, code=2)
        assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("report: "), done

    at_once(refused, wrong)
    assert rows(db, "SELECT count(*) FROM task_runs") == [(0,)]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
