"""`qie serve` at more than its capacity: ``python -m bench.serving_load``.

The capacity is measured first, with as many clients as a batch has images. Then requests arrive at random times, at
``--load`` times that rate, whether others are answered or not. Every request is counted by its answer, the time of
those that were accepted is compared with their deadline, and the memory of the server at the end with that behind the
first tenth of the run.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.report import argument_parser, write_report
from bench.served import Served, batched_pocket, served
from qie.engines.terminal import table

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "cat.jpg"
BATCH = 8
INSTRUCTIONS = ("tint it purple", "blur it", "flip it upside down", "make it grayscale")


@dataclass(slots=True)
class _Answers:
    """What became of the requests.

    Attributes:
        statuses: requests by status; 0 for those without an answer.
        seconds: of the accepted ones.
    """

    statuses: "Counter[int]" = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="length of the run, default: 10")
    parser.add_argument("--load", type=float, default=2, help="requests over capacity, default: 2")
    parser.add_argument("--timeout", type=float, default=30, help="deadline of a request in seconds, default: 30")
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bundle = batched_pocket(Path(folder), batch=BATCH)
        with served(bundle, "--timeout", str(options.timeout)) as server:
            figures = asyncio.run(measure(server, options))
    statuses, accepted = figures["statuses"], figures["accepted_seconds"]
    rows = [
        ["capacity", f"{figures['capacity']:.1f} requests/s"],
        ["sent", f"{sum(statuses.values())} in {options.minutes:g} min"],
        *([("without an answer" if status == 0 else f"answered {status}"), str(n)] for status, n in statuses.items()),
        ["time of accepted requests", f"median {accepted['median']:.1f} s, p95 {accepted['p95']:.1f} s"],
        ["deadline", f"{options.timeout:g} s"],
        ["memory of the server", f"{figures['memory_first'] / 2**20:.0f} MiB, {figures['memory_growth']:+.1%}"],
    ]
    print(table(rows))
    write_report(options, figures)


async def measure(server: Served, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the capacity, then send more."""
    content = IMAGE.read_bytes()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=4 * options.timeout, limits=limits) as client:

        async def edit(answers: _Answers) -> None:
            data = {"prompt": random.choice(INSTRUCTIONS), "seed": str(random.randrange(2**32))}
            begun = time.perf_counter()
            try:
                answer = await client.post("/v1/images/edits", files={"image": content}, data=data)
            except httpx.TransportError:
                answers.statuses[0] += 1
                return
            answers.statuses[answer.status_code] += 1
            if answer.status_code == httpx.codes.OK:
                answers.seconds.append(time.perf_counter() - begun)

        async def edits(answers: _Answers, until: float) -> None:
            while time.perf_counter() < until:
                await edit(answers)

        for length in (5, 20):  # the first warms up
            calm, begun = _Answers(), time.perf_counter()
            await asyncio.gather(*(edits(calm, begun + length) for _ in range(BATCH)))
            capacity = calm.statuses[httpx.codes.OK] / (time.perf_counter() - begun)
        answers, tasks, memory = _Answers(), set[asyncio.Task[None]](), list[int]()
        begun = arrival = time.perf_counter()
        while arrival < begun + 60 * options.minutes:
            arrival += random.expovariate(options.load * capacity)
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            task = asyncio.create_task(edit(answers))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            memory.append(server.resident_bytes)
        await asyncio.gather(*tasks)
    tenth = max(1, len(memory) // 10)
    first, last = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
    return {
        "capacity": capacity,
        "load": options.load,
        "minutes": options.minutes,
        "timeout": options.timeout,
        "statuses": dict(sorted(answers.statuses.items())),
        "accepted_seconds": {
            "median": statistics.median(answers.seconds),
            "p95": statistics.quantiles(answers.seconds, n=20)[-1],
            "most": max(answers.seconds),
        },
        "memory_first": first,
        "memory_growth": last / first - 1,
    }


if __name__ == "__main__":
    main()
