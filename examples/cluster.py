"""Count primes on a dask cluster. The functions run there; the database, the bars and all promises stay here.

    pip install "dask[distributed]"
    python examples/cluster.py [--resume] [tcp://SCHEDULER:8786]    # no address: two processes on this machine

Kill what you like and run it again with --resume: what is committed stays, and the rest runs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where pipeloom.py is

from pipeloom import Pipeline  # noqa: E402

SIZE = 20_000
pipe = Pipeline("primes.db", schema="CREATE TABLE IF NOT EXISTS prime(number INTEGER PRIMARY KEY)")


@pipe.task(each=range(0, 1_000_000, SIZE), name=lambda first: f"primes from {first:,}", retries=2)
def primes(ctx, first):
    numbers = range(max(first, 2), first + SIZE)
    found = [n for n in numbers if all(n % d for d in range(2, int(n**0.5) + 1))]
    ctx.upsert("prime", [{"number": n} for n in found], key="number")
    return len(found)


def main(arguments):
    from dask.distributed import Client

    local = {"n_workers": 2, "threads_per_worker": 1}
    address = next((argument for argument in arguments if not argument.startswith("-")), None)
    with Client(address, **({} if address else local)) as client:
        client.upload_file(sys.modules["pipeloom"].__file__)  # the machines of the cluster need it, too
        print(pipe.run(executor=client.get_executor(), workers=16, resume="--resume" in arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
