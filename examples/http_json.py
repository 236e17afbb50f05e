"""Load users and their posts from a JSON API into two tables, one task a user, with retries and time-outs.

    python examples/http_json.py https://jsonplaceholder.typicode.com [--resume] [-w 8]
    python examples/http_json.py -v           # asks a local server that fails now and then; -v shows when

A second run asks again and finds the same rows. With --resume it asks only for users that are not stored yet.
"""

import json
import sys
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is

from pipeloom import Pipeline  # noqa: E402

TABLES = """
    CREATE TABLE IF NOT EXISTS user(id INTEGER PRIMARY KEY, name TEXT);
    CREATE TABLE IF NOT EXISTS post(id INTEGER PRIMARY KEY, user INTEGER, title TEXT);
"""
pipe = Pipeline("http_json.db", schema=TABLES, workers=4, retries=3, retry_delay=0.2, timeout=60)


def get(url):
    try:
        with urlopen(url, timeout=10) as response:  # for each wait; the task's timeout= is for all of them
            return json.load(response)
    except OSError as error:  # which does not say what was asked for
        raise OSError(f"{url}: {error}") from None


@pipe.task(each=lambda: [f"{api}/users/{n}" for n in range(1, 11)], name=lambda url: url[len(api) + 1 :])
def load(ctx, url):
    user, posts = get(url), get(f"{url}/posts")
    ctx.upsert("user", [{"id": user["id"], "name": user["name"]}], key="id")
    ctx.upsert("post", [{"id": p["id"], "user": p["userId"], "title": p["title"]} for p in posts], key="id")


@pipe.task(after=load)
def report(ctx):
    with ctx.connect() as db:
        ((users,),) = db.execute("SELECT count(*) FROM user")
        ((posts,),) = db.execute("SELECT count(*) FROM post")
    print(f"{users} users have written {posts} posts")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        api = arguments.pop(0).rstrip("/")
        if not api.startswith(("http://", "https://")):
            print(f"http_json: {api!r} is no URL; it should begin with http:// or https://", file=sys.stderr)
            sys.exit(2)
    else:
        import local_servers

        api = local_servers.start(local_servers.Users)
        arguments.insert(0, "--timeout=0.5")  # one answer takes a second
    pipe.main(arguments)
