"""What does HTTP cost, and how much more does the service answer when many ask at once?

    python benchmarks/serve.py RUN [--requests N] [--clients C] [--search S] [--k K] [--memory N]
    python benchmarks/serve.py --quick

RUN is a trained run. `triewise serve RUN` is started on a free port of this machine. First each history is asked for
alone, in this process and over HTTP in turn: the medians and their difference. Then as many requests come from one
client, and from C clients of which each asks again when it has its answer: throughput, p50 and p99. At last twice as
many clients as there is room for ask at once: how many are told to come again, and whether one is answered afterwards.
With ``--memory`` C clients ask N times more: the memory of the service (RSS, MB) after a tenth, a half and all of it.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed  # noqa: E402
from benchmarks._data import quick_run  # noqa: E402
from triewise import load  # noqa: E402
from triewise.serving import answer  # noqa: E402

QUEUE = 64
MAX_BATCH = 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--search", default="exact")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--memory", type=int, default=0)
    options = parsed(parser, requests=20, memory=40)
    if (options.run is None) != options.quick:
        parser.error("wanted either a run or --quick")
    with tempfile.TemporaryDirectory() as scratch:
        options.run = options.run or quick_run(Path(scratch))
        command = [sys.executable, "-m", "triewise", "serve", str(options.run), "--port", "0"]
        command += ["--search", options.search, "--queue", str(QUEUE), "--max-batch", str(MAX_BATCH)]
        log = Path(scratch, "log")
        with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as server:
            try:
                print(json.dumps(measured(options, port_of(log, server), server.pid)))
            finally:
                server.terminate()
    sys.exit(server.returncode)


def port_of(log: Path, server: subprocess.Popen[bytes]) -> int:
    """The port, once the service is ready."""
    while server.poll() is None:
        found = re.search(r"http://\S+:(\d+) answers", log.read_text())
        if found and asyncio.run(Connection.once(int(found[1]), "GET", "/health/ready")) == 200:
            return int(found[1])
        time.sleep(0.2)
    raise SystemExit(log.read_text())


class Connection:
    """One kept open, with no more of HTTP than is needed."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Connection:
        """Open it."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: Any) -> None:
        """Close it."""
        self.writer.close()

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of an answer."""
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer)
        assert length is not None
        return int(answer.split()[1]), await self.reader.readexactly(int(length[1]))

    @classmethod
    async def once(cls, port: int, method: str, path: str) -> int:
        """The status of one request."""
        async with cls(port) as connection:
            return (await connection.ask(method, path))[0]


def measured(options: argparse.Namespace, port: int, process: int) -> dict[str, Any]:
    """All of it."""
    recommender = load(options.run).with_settings(search=options.search)
    ids, rng = recommender.catalog.item_id, np.random.default_rng(0)
    lists = [
        [ids[i] for i in rng.integers(0, len(ids), rng.integers(1, 11))] for _ in range(options.requests)
    ]
    bodies = [json.dumps({"histories": [{"ids": names}], "k": options.k}).encode() for names in lists]

    def here(names: list[str]) -> None:
        answer(recommender, [names], options.k, by="id")

    here(lists[0])
    alone, over_http = asyncio.run(in_turn(port, lists[:200], bodies[:200], here))
    one, many = (asyncio.run(load_of(port, bodies, clients)) for clients in (1, options.clients))
    crowd = asyncio.run(load_of(port, bodies[: 4 * (QUEUE + MAX_BATCH)], 2 * (QUEUE + MAX_BATCH)))
    again = asyncio.run(load_of(port, bodies[:10], 1))
    resident: list[float | None] = []
    for n in (options.memory // 10, options.memory * 2 // 5, options.memory // 2) if options.memory else ():
        asyncio.run(load_of(port, [bodies[i % len(bodies)] for i in range(n)], options.clients))
        resident.append(resident_mb(process))
    return {
        "resident_mb": resident,
        "requests": options.requests,
        "alone_ms": 1000 * alone,
        "http_ms": 1000 * over_http,
        "overhead": over_http / alone - 1,
        "one_client": one,
        f"{options.clients}_clients": many,
        "times": many["per_second"] / one["per_second"],
        "overload": crowd["status"],
        "afterwards": again["status"],
    }


def resident_mb(process: int) -> float | None:
    """Memory of a process; None where the system does not say."""
    file = Path(f"/proc/{process}/statm")
    return round(int(file.read_text().split()[1]) * 4096 / 1e6, 1) if file.exists() else None


async def in_turn(port: int, lists: list[Any], bodies: list[bytes], here: Any) -> tuple[float, float]:
    """Median seconds of an answer in this process, and over HTTP."""
    seconds: tuple[list[float], list[float]] = ([], [])
    async with Connection(port) as connection:
        for names, body in zip(lists, bodies, strict=True):
            begun = time.perf_counter()
            here(names)
            between = time.perf_counter()
            await connection.ask("POST", "/v1/recommend", body)
            seconds[0].append(between - begun)
            seconds[1].append(time.perf_counter() - between)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


async def load_of(port: int, bodies: list[bytes], clients: int) -> dict[str, Any]:
    """Requests from some clients, each of which asks again when it has its answer."""
    left, seconds, status = list(bodies), list[float](), Counter[int]()

    async def client() -> None:
        async with Connection(port) as connection:
            while left:
                body, begun = left.pop(), time.perf_counter()
                status[(await connection.ask("POST", "/v1/recommend", body))[0]] += 1
                seconds.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - begun
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    found = {"per_second": len(bodies) / took, "p50_ms": 1000 * float(p50), "p99_ms": 1000 * float(p99)}
    return found | {"status": {str(code): n for code, n in status.items()}}


if __name__ == "__main__":
    main()
