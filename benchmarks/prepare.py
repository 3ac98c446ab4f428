"""How long does `triewise prepare` take for 20 million interactions, and how much memory?

    python benchmarks/prepare.py [--interactions N] [--format parquet|csv] [--folder DIR] [--quick]

Synthetic interactions of 200,000 users with 50,000 items: Zipf-distributed items, a few rare ones, users of very
different activity, rows in no order, some of them twice. They are prepared as users prepare them,
`triewise prepare csv:DIR --k-core 5 --split time-windows --max-history 10`, in a fresh process. Before that the
splits of 2,000 interactions are compared with loops, row by row; afterwards all counts with those of a second way
to find them. The last line of stdout is one JSON object: `seconds` is the wall clock of the whole command,
`peak_gb` the largest resident memory of its process in 10**9 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.reference import splits as slow  # noqa: E402

from benchmarks._command import parsed, peak_bytes  # noqa: E402
from triewise.data import load_dataset, prepare  # noqa: E402
from triewise.progress import note  # noqa: E402

K_CORE, MAX_HISTORY = 5, 10
PER_USER, PER_ITEM = 100, 400  # interactions, on average


def synthetic(n: int, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Interactions (user, item, timestamp) in no order, and titles (item, title)."""
    rng = np.random.default_rng(seed)
    n_users, n_items = max(n // PER_USER, 20), max(n // PER_ITEM, 20)
    activity = rng.lognormal(sigma=1.2, size=n_users)
    user = np.searchsorted(np.cumsum(activity / activity.sum()), rng.random(n)).clip(max=n_users - 1)
    n_common = n_items - n_items // 20
    item = np.minimum((n_common + 1.0) ** rng.random(n) - 1, n_common - 1).astype(np.int32)
    rare = rng.integers(0, n, n // 4000)
    item[rare] = rng.integers(n_common, n_items, len(rare))
    when = rng.integers(1_000_000_000, 1_600_000_000, n)
    twice = rng.integers(0, n, (2, n // 20_000))
    for column in (user, item, when):
        column[twice[0]] = column[twice[1]]
    users = pl.Series([f"A{number * 7919:013X}" for number in range(n_users)])
    items = pl.Series([f"B{number:09d}" for number in range(n_items)])
    events = pl.DataFrame({"user_id": users.gather(user), "item_id": items.gather(item), "timestamp": when})
    return events, pl.DataFrame(
        {"item": items, "title": [f"Item number {number}" for number in range(n_items)]}
    )


def write(folder: Path, n: int, form: str) -> Path:
    folder.mkdir()
    events, titles = synthetic(n)
    titles.write_csv(folder / "titles.csv")
    path = folder / f"interactions.{form}"
    events.write_parquet(path) if form == "parquet" else events.write_csv(path)
    return path


def expected_counts(path: Path) -> dict[str, int]:
    """Users, items, interactions and rows, found by grouping and joining instead of counting arrays."""
    rows = (pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)).lazy()
    rows = rows.with_columns(pl.col("user_id", "item_id").rank("dense")).unique().collect().lazy()
    n_rows = -1
    while n_rows != (n_rows := rows.select(pl.len()).collect().item()):
        for name in ("user_id", "item_id"):
            kept = rows.group_by(name).len().filter(pl.col("len") >= K_CORE)
            rows = rows.join(kept.select(name), on=name, how="semi").collect().lazy()
    per_user = rows.group_by("user_id").len().collect()["len"].cast(pl.Int64).to_numpy()
    n_windows = int(np.maximum(per_user - MAX_HISTORY, 1).sum())  # k-core users have more than one
    first, second = int(n_windows * 0.8), int(n_windows * 0.9)
    return {
        "users": len(per_user),
        "items": rows.select(pl.col("item_id").n_unique()).collect().item(),
        "interactions": n_rows,
        "train_rows": first,
        "valid_rows": second - first,
        "test_rows": n_windows - second,
    }


def check_small(folder: Path) -> None:
    """Compare 2,000 interactions with loops, row by row."""
    path = write(folder / "small", 2000, "csv")
    settings = {"max_history": MAX_HISTORY, "k_core": K_CORE, "split": "time-windows"}
    dataset = prepare(f"csv:{path.parent}", folder / "small-out", **settings)
    events = sorted(set(pl.read_csv(path).iter_rows()))
    pairs = [(user, (item, when)) for user, item, when in events]
    core = slow.k_core([(user, item) for user, item, _ in events], K_CORE)
    users, items = {user for user, _ in core}, sorted({item for _, item in core})
    left = [(user, *event) for user, event in pairs if user in users and event[0] in items]
    index = {name: number for number, name in enumerate(items)}
    numbered = [(user, index[item], when) for user, item, when in left]
    raw_ids = tuple(str(number) for number in range(len(items)))
    for name, wanted in zip(
        ("train", "valid", "test"), slow.time_windows(numbered, raw_ids, MAX_HISTORY), strict=True
    ):
        got = getattr(dataset, name)
        rows = zip(got.user_id, got.history, got.target.tolist(), got.timestamp.tolist(), strict=True)
        shown = [(user, history.tolist(), target, when) for user, history, target, when in rows]
        assert shown == [row[:4] for row in wanted], f"other {name} rows than the loops"


def measure(words: list[str]) -> None:
    """Run the command in this process; the last line of stderr is the peak of its memory."""
    from triewise import cli

    sys.argv = ["triewise", *words]
    try:
        cli.main()
    finally:
        print(peak_bytes() / 1e9, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    parser.add_argument(
        "--folder", type=Path, help="where the data lie meanwhile; default a temporary folder"
    )
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    settings = parsed(parser, interactions=20_000)
    if settings.measure:
        measure(settings.measure)
        return
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        check_small(folder)
        note(f"equal to loops at 2000 interactions; now {settings.interactions:,} as {settings.format}")
        path = write(folder / "raw", settings.interactions, settings.format)
        words = ["prepare", f"csv:{path.parent}", "--out", str(folder / "out"), "--k-core", str(K_CORE)]
        words += ["--split", "time-windows", "--max-history", str(MAX_HISTORY), "--json"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--measure", *words], check=True, capture_output=True, encoding="utf-8"
        )
        seconds = time.perf_counter() - started
        *lines, peak = done.stderr.splitlines()
        for line in lines:
            note(f"  {line}")
        info = json.loads(done.stdout)
        wanted = expected_counts(path)
        found = {key: info["counts"][key] for key in wanted}
        assert found == wanted, f"wanted {wanted}, got {found}"
        assert len(load_dataset(folder / "out").valid.target) == wanted["valid_rows"]
        size = sum(file.stat().st_size for file in (folder / "out").iterdir())
        raw_size = path.stat().st_size
    for key, count in info["repairs"].items():
        note(f"  repaired {key}: {count:,}")
    note(f"{settings.interactions:,} interactions: {seconds:.1f} s, peak {float(peak):.2f} GB")
    report = {
        "n": settings.interactions,
        "seconds": round(seconds, 1),
        "peak_gb": round(float(peak), 2),
        "format": settings.format,
        "raw_gb": round(raw_size / 1e9, 2),
        "prepared_gb": round(size / 1e9, 2),
        **wanted,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
