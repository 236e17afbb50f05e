"""The servers that http_json.py and download.py ask where they are given no URL: both fail on purpose."""

import hashlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

MOODS = {"/users/2": "fails", "/users/4/posts": "fails", "/users/5": "drips"}  # each of them once
FILES = {f"file-{n}.bin": bytes(range(n, 256)) * 4_000 for n in range(1, 9)}
SUMS = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in FILES.items())


def start(handler):
    """Serve on a free port for as long as this process lives; returns the address."""
    os.environ["no_proxy"] = "127.0.0.1"  # a proxy could not reach it
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that ran out of time has hung up
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class Users(BaseHTTPRequestHandler):
    """Ten users, /users/N, and their posts, /users/N/posts."""

    def do_GET(self):
        mood = MOODS.pop(self.path, "works")
        self.send_response_only(503 if mood == "fails" else 200)
        self.end_headers()
        for _ in range(10 if mood == "drips" else 0):  # the client hears something all the time
            self.wfile.write(b" ")
            time.sleep(0.1)
        n = int(self.path.split("/")[2])
        posts = [{"id": 10 * n + i, "userId": n, "title": f"Thought {i} of user {n}"} for i in range(10)]
        answer = posts if self.path.endswith("/posts") else {"id": n, "name": f"User {n}"}
        self.wfile.write(json.dumps(answer).encode())


class Files(BaseHTTPRequestHandler):
    """Some files and their /SHA256SUMS. Who asks for a whole file gets the first half of it."""

    def do_GET(self):
        content = FILES.get(self.path[1:], SUMS.encode())
        first = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.send_response_only(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        breaks_off = first == 0 and self.path[1:] in FILES
        self.wfile.write(content[first : len(content) // 2 if breaks_off else None])
