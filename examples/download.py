"""Download the files that a SHA256SUMS file lists; a download that broke off goes on where it stopped.

    python examples/download.py https://example.org/files/SHA256SUMS [--resume] [-w 8]
    python examples/download.py -v       # asks a local server that breaks off each file; -v shows the retries

A second run checks what is in `downloads` and fetches what differs. With --resume it checks only new files.
"""

import hashlib
import re
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urljoin
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is

from pipeloom import Pipeline  # noqa: E402

FILE = "CREATE TABLE IF NOT EXISTS file(file TEXT PRIMARY KEY, url TEXT, size INTEGER, sha256 TEXT)"
pipe = Pipeline("download.db", schema=FILE, workers=4, retries=5, retry_delay=0.2)


@pipe.task(each=lambda: files, name=lambda file: f"{file[1]} {file[2][:8]}")
def download(ctx, file):
    url, path, sha256 = file
    part = Path(f"{path}.{sha256[:8]}.part")
    if not is_whole(path, sha256):
        if not is_whole(part, sha256):  # a run may have been killed just before the renaming
            fetch_rest(ctx, url, part)
        if not is_whole(part, sha256):
            part.unlink()
            raise ValueError(f"{url} has not the checksum that is listed")
        part.replace(path)
    size = path.stat().st_size
    ctx.execute("DELETE FROM file WHERE file = ? AND sha256 <> ?", (str(path), sha256))
    ctx.execute("INSERT OR IGNORE INTO file VALUES (?, ?, ?, ?)", (str(path), url, size, sha256))


def is_whole(path, sha256):
    digest = hashlib.sha256()
    if path.exists():
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return path.exists() and digest.hexdigest() == sha256


def fetch_rest(ctx, url, part):
    part.parent.mkdir(exist_ok=True)
    with part.open("ab") as file:
        request = Request(url, headers={"Range": f"bytes={file.tell()}-"} if file.tell() else {})
        with urlopen(request, timeout=10) as response:
            if response.status != 206:  # the server sends the whole file again
                file.truncate(file.seek(0))
            size = file.tell() + int(response.headers["Content-Length"])
            for block in iter(lambda: response.read(1 << 16), b""):
                ctx.progress(file.tell(), size)
                file.write(block)
        if file.tell() < size:
            raise ConnectionError(f"{url} broke off after {file.tell():,} of {size:,} bytes")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        import local_servers

        arguments.insert(0, local_servers.start(local_servers.Files) + "/SHA256SUMS")
    url, *options = arguments
    try:
        with urlopen(url, timeout=10) as response:
            listed = re.findall(r"(?m)^([0-9a-f]{64}) [ *]([^/\\\r\n]+)\r?$", response.read().decode())
    except (OSError, ValueError, HTTPException) as error:
        print(f"download: cannot read {url}: {error}", file=sys.stderr)
        sys.exit(2)
    files = [(urljoin(url, quote(name)), Path("downloads", name), sha256) for sha256, name in listed]
    pipe.main(options)
