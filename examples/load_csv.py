"""Load every CSV file of a folder into the table `line` of load_csv.db, one task a file.

    python examples/load_csv.py FOLDER [--resume] [-w 8]     # its *.csv; --help lists all options
    python examples/load_csv.py                              # the RECORD files of the installed packages

A second run reads the files again and changes nothing, unless they have changed: then the database has their
new lines, and no old ones. With --resume it loads only the files that are not loaded yet.
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is

from pipeloom import Pipeline  # noqa: E402

LINE = "CREATE TABLE IF NOT EXISTS line(file TEXT, number INTEGER, fields TEXT, PRIMARY KEY (file, number))"
pipe = Pipeline("load_csv.db", schema=LINE)
folder = None


def files():
    if folder:
        return sorted(folder.glob("*.csv"))
    # What pip has installed: each RECORD is a CSV file of path, hash and size.
    return sorted({path for place in sys.path for path in Path(place).glob("*.dist-info/RECORD")})


@pipe.task(each=files)
def load(ctx, path):
    ctx.execute("DELETE FROM line WHERE file = ?", (str(path),))  # there may be fewer lines than last time
    with path.open(newline="", encoding="utf-8-sig") as file:  # -sig: Excel begins a file with such a mark
        lines = enumerate(ctx.track(csv.reader(file)), 1)
        rows = ((str(path), number, json.dumps(fields)) for number, fields in lines)
        ctx.executemany("INSERT INTO line VALUES (?, ?, ?)", rows)


@pipe.task(after=load)
def report(ctx):
    with ctx.connect() as db:
        files, lines = db.execute("SELECT count(DISTINCT file), count(*) FROM line").fetchone()
    print(f"{files} files in the database hold {lines} lines")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        folder = Path(arguments.pop(0))
        if not folder.is_dir():
            print(f"load_csv: {str(folder)!r} is no folder; name one that holds CSV files", file=sys.stderr)
            sys.exit(2)
    pipe.main(arguments)
