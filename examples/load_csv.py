"""Load every CSV file of a folder into SQLite, a task a file, through messages and a handler.

    python examples/load_csv.py [FOLDER]

No worker has a connection: it sends what it reads as a message, and the handler upserts it in the writer.
A second run changes nothing. Without a folder it loads the RECORD files of the packages installed in the
Python that runs it: each is a CSV file of path, hash and size.
"""

import csv
import json
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is

import pipeloom  # noqa: E402

DATABASE = "load_csv.db"
BATCH = 500  # lines in a message
SCHEMA = """
    CREATE TABLE IF NOT EXISTS line(file TEXT, number INTEGER, fields TEXT, PRIMARY KEY(file, number));
"""


@dataclass(frozen=True)
class Lines:
    """Some lines of a file, as (file, number, fields)."""

    rows: list


def load(path, q):
    """The worker: read one file, send what it holds."""
    with open(str(path), newline="", encoding="utf-8", errors="replace") as file:
        batch = []
        for number, fields in enumerate(q.track(csv.reader(file)), 1):
            batch.append((str(path), number, json.dumps(fields)))
            if len(batch) == BATCH:
                q.put(Lines(batch))
                batch = []
        q.put(Lines(batch))


def upsert(conn, lines):
    """The handler, in the writer's thread and transaction."""
    conn.executemany("INSERT OR REPLACE INTO line VALUES (?, ?, ?)", lines.rows)


def files(arguments):
    if arguments:
        folder = Path(arguments[0])
        if not folder.is_dir():
            print(f"load_csv: {str(folder)!r} is no folder; name one that holds CSV files", file=sys.stderr)
            sys.exit(2)
        return sorted(folder.glob("*.csv"))
    records = {
        Path(str(d.locate_file(f))) for d in distributions() for f in d.files or () if f.name == "RECORD"
    }
    return sorted(path for path in records if path.is_file())


def count_lines(path):
    with open(str(path), newline="", encoding="utf-8", errors="replace") as file:
        return sum(1 for _ in csv.reader(file))


def main():
    paths = files(sys.argv[1:])
    result = pipeloom.run_pipeline(
        paths, DATABASE, worker_fn=load, workers=4, schema=SCHEMA, handlers={Lines: upsert}
    )
    held = sum(map(count_lines, paths))
    print(f"{result.done} files are in {DATABASE}; they hold {held} lines")


if __name__ == "__main__":
    main()
