"""Check the files of the installed packages against the hashes in their RECORD, one task a package.

    python examples/verify_install.py [--resume] [-w 8]      # all packages of this Python
    python examples/verify_install.py pip setuptools

It prints the files that are missing or changed, and a summary; the exit code is 1 if there are any. A second
run checks them all again. With --resume it leaves out the versions that it has checked, whatever it found.
"""

import csv
import hashlib
import sys
from base64 import urlsafe_b64encode
from collections import Counter
from importlib.metadata import distributions
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is

from pipeloom import Pipeline  # noqa: E402

FILE = "CREATE TABLE IF NOT EXISTS file(package TEXT, path TEXT, state TEXT, PRIMARY KEY (package, path))"
pipe = Pipeline("verify_install.db", schema=FILE)


def installed():
    found = {}
    for package in distributions():
        name = package.metadata["Name"]
        if name and package.read_text("RECORD"):  # whatever else installed it noted no hashes
            found.setdefault(normal(name), package)  # of two, Python imports the first
    return found


def normal(name):
    return name.lower().replace("_", "-")


def state_of(path, noted):
    algorithm, _, expected = noted.partition("=")
    if not path.exists():
        return "missing"
    found = urlsafe_b64encode(hashlib.new(algorithm, path.read_bytes()).digest()).decode().rstrip("=")
    return "good" if found == expected else "changed"


@pipe.task(each=lambda: packages.items(), name=lambda item: f"{item[0]} {item[1].version}")
def verify(ctx, item):
    name, package = item  # package.files would not do: it leaves out what is missing, from Python 3.12 on
    record = [line for line in csv.reader(package.read_text("RECORD").splitlines()) if line[1]]
    rows = [(name, path, state_of(package.locate_file(path), noted)) for path, noted, _ in ctx.track(record)]
    ctx.execute("DELETE FROM file WHERE package = ?", (name,))  # another version may have had other files
    ctx.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", rows)


@pipe.task(each=lambda: [set(packages)], name=lambda _: f"report: {scope}", after=verify, even_if_failed=True)
def report(ctx, names):
    with ctx.connect() as db:
        rows = [row for row in db.execute("SELECT * FROM file ORDER BY package, path") if row[0] in names]
    for package, path, state in rows:
        if state != "good":
            print(f"{package}: {path} is {state}")
    count = Counter(state for _, _, state in rows)
    print(f"{len(names)} packages, {len(rows)} files, {count['missing']} missing, {count['changed']} changed")
    if count["missing"] or count["changed"]:
        raise RuntimeError("files are missing or changed")


if __name__ == "__main__":
    given = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    packages = installed()
    unknown = [name for name in given if normal(name) not in packages]
    if unknown:
        print(f"verify_install: not installed, or without a RECORD: {', '.join(unknown)}", file=sys.stderr)
        sys.exit(2)
    packages = {normal(name): packages[normal(name)] for name in given} or packages
    scope = ", ".join(sorted(packages)) if given else "all"
    pipe.main(sys.argv[1 + len(given) :])
