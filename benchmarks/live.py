"""How long does a catalogue of a million titles take to change while it is recommended from, and how is it built anew?

    python benchmarks/live.py [--items N] [--change N] [--runs R] [--clients C] [--quick]

Titles are three to eight made-up words; the model is the `tiny` one with a tokenizer trained on 5,000 of them. A change
removes and adds so many items, in memory and on disk; another thread asks for recommendations all the while. The result
is compared with a recommender built from nothing: the hashes of prompts, trie and counts (`equal`). At last the same
recommender is served (`triewise serve`), and its catalogue changed over HTTP while C clients ask: `http` has the
statuses of their answers and how long they waited, before the change and during it.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks._command import parsed, peak_bytes  # noqa: E402
from benchmarks.serve import Connection, port_of  # noqa: E402
from triewise.data import Catalog  # noqa: E402
from triewise.models import load_backbone  # noqa: E402
from triewise.progress import note  # noqa: E402
from triewise.recommenders import GenerativeRecommender  # noqa: E402
from triewise.recommenders.generative import hashes  # noqa: E402
from triewise.serving import LiveCatalogue  # noqa: E402
from triewise.tokens import Trie, build_prompts  # noqa: E402


def titles(n: int, seed: int = 0) -> list[str]:
    """Distinct titles of made-up words, whose frequencies fall as 1 / rank."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("aeioubcdfghklmnprst"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 20_000)]
    length = rng.integers(3, 9, n)
    drawn = np.minimum(20_001 ** rng.random(length.sum()) - 1, 19_999).astype(int).tolist()
    ends = np.cumsum(length).tolist()
    return [
        " ".join(words[w] for w in drawn[end - size : end]).title() + f" {i}"
        for i, (end, size) in enumerate(zip(ends, length.tolist(), strict=True))
    ]


def built(like: Any, item_id: tuple[str, ...], title: tuple[str, ...], counts: Any) -> GenerativeRecommender:
    """A recommender from nothing but its model."""
    catalog = Catalog.from_titles(item_id, title)
    prompts = build_prompts(like.tokenizer, catalog)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    return GenerativeRecommender(like, catalog, prompts, trie, counts, search="beam", alpha=0.2)


def over_http(recommender: GenerativeRecommender, change: dict[str, Any], clients: int) -> dict[str, Any]:
    """What clients of a service get while its catalogue changes."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        recommender.save_pretrained(run)
        command = [sys.executable, "-m", "triewise", "serve", str(run), "--port", "0", "--timeout", "600"]
        with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as server:
            try:
                return asyncio.run(
                    asked_meanwhile(port_of(log, server), json.dumps(change).encode(), clients)
                )
            finally:
                server.terminate()


async def asked_meanwhile(port: int, change: bytes, clients: int) -> dict[str, Any]:
    """Waits of clients who ask again when they have their answer: 20 of each before a change, and all during it."""
    waits: dict[str, list[float]] = {"before": [], "during": []}
    status, phase, body = Counter[int](), "before", b'{"histories": [{"ids": ["1", "7"]}], "k": 10}'

    async def client() -> None:
        nonlocal phase
        async with Connection(port) as connection:
            for n in range(1 << 30):
                if phase == "after" or (phase == "before" and n == 20):
                    return
                begun, asked = time.perf_counter(), phase
                status[(await connection.ask("POST", "/v1/recommend", body))[0]] += 1
                waits[asked].append(time.perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(clients)))
    phase = "during"
    running = [asyncio.create_task(client()) for _ in range(clients)]
    begun = time.perf_counter()
    async with Connection(port) as connection:
        told, _ = await connection.ask("POST", "/v1/catalog", change)
    seconds, phase = time.perf_counter() - begun, "after"
    await asyncio.gather(*running)
    found: dict[str, Any] = {
        "change_status": told,
        "change_seconds": round(seconds, 2),
        "status": dict(status),
    }
    for name, each in waits.items():
        p50, p99, longest = (round(1000 * float(np.quantile(each, q))) for q in (0.5, 0.99, 1))
        found[name] = {"requests": len(each), "p50_ms": p50, "p99_ms": p99, "longest_ms": longest}
    note(f"over HTTP: {found}")
    return found


def measure(n_items: int, n_change: int, runs: int, clients: int) -> dict[str, Any]:
    names = titles(n_items + n_change * runs)
    backbone = load_backbone("tiny", titles=names[:5000], device="cpu")
    backbone.model.requires_grad_(False)
    started = time.perf_counter()
    ids = tuple(map(str, range(n_items)))
    base = built(backbone, ids, tuple(names[:n_items]), np.arange(n_items) % 7)
    anew = time.perf_counter() - started
    base.recommend([[0]], 10)
    note(f"built from nothing in {anew:.1f} s: {base.trie}")
    with tempfile.TemporaryDirectory() as folder:
        live = LiveCatalogue(base, Path(folder, "versions"))
        waits: list[float] = []
        asking = threading.Event()

        def ask() -> None:
            while not asking.is_set():
                began = time.perf_counter()
                assert len(live.current.recommender.recommend([[1, 2]], 10).items) == 1
                waits.append(time.perf_counter() - began)

        cpu: list[float] = []

        def timed(what: str, act: Any) -> float:
            began, computed = time.perf_counter(), time.thread_time()
            act()
            seconds = time.perf_counter() - began
            cpu.append(round(time.thread_time() - computed, 2))
            note(
                f"{what}: {seconds:.2f} s, {cpu[-1]:.2f} of the CPU; a request waited {max(waits, default=0):.2f} s"
            )
            return seconds

        def change(run: int) -> None:
            fresh = range(n_items + run * n_change, n_items + (run + 1) * n_change)
            gone = ids[run * n_change : (run + 1) * n_change]
            live.change([(f"new-{i}", names[i]) for i in fresh], gone)

        quiet = [timed("a change", lambda run=run: change(run)) for run in range(runs - 1)]
        thread = threading.Thread(target=ask)
        thread.start()
        busy = timed("a change while it answers", lambda: change(runs - 1))
        asking.set()
        thread.join()
        back = timed("the way back", live.rollback)
        started = time.perf_counter()
        again = LiveCatalogue(base, Path(folder, "versions"))
        restart = time.perf_counter() - started
        made = again.current.recommender
    wanted = built(backbone, made.catalog.item_id, made.catalog.title, made.counts)
    same = hashes(made.prompts, made.trie, made.counts) == hashes(wanted.prompts, wanted.trie, wanted.counts)
    add = [{"id": f"new-{i}", "title": names[i]} for i in range(n_items, n_items + n_change)]
    http = over_http(base, {"add": add, "remove": list(ids[:n_change])}, clients)
    return {
        "equal": bool(same),
        "items": n_items,
        "changed": n_change,
        "built_seconds": round(anew, 2),
        "change_seconds": [round(seconds, 2) for seconds in quiet],
        "change_cpu_seconds": cpu[: len(quiet)],
        "change_while_answering_seconds": round(busy, 2),
        "rollback_seconds": round(back, 2),
        "restart_seconds": round(restart, 2),
        "requests_meanwhile": len(waits),
        "longest_request_seconds": round(max(waits, default=0.0), 2),
        "http": http,
        "peak_gb": round(peak_bytes() / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--change", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    settings = parsed(parser, items=3_000, change=30, runs=2)
    print(json.dumps(measure(settings.items, settings.change, settings.runs, settings.clients)))


if __name__ == "__main__":
    main()
