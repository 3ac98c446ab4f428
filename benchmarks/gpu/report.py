"""A part's JSON, written whole after each of its sections, and the clock that says how much time is left."""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triewise.decoding.engine import Children, TrieEngine
from triewise.decoding.treecache import TreeCache
from triewise.files import write_json

Row = dict[str, Any]


class Report:
    """One part of the suite: sections one after the other, each recorded, none able to stop the next.

    Args:
        part: Name of the part and of its file.
        out: Folder of the JSON files.
        limit_s: Seconds after which no further section starts.
        device: Where things run.
        facts: What else the head of the file says.
    """

    def __init__(self, part: str, out: Path, limit_s: float, device: torch.device, facts: Row) -> None:
        self.path, self.device, self.limit_s = out / f"{part}.json", device, limit_s
        self.started = time.monotonic()
        self.value: Row = {"part": part, "limit_s": limit_s, **facts, **machine(device), "sections": {}}
        self.value["skipped"] = []
        out.mkdir(parents=True, exist_ok=True)
        self.save()

    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit_s - (time.monotonic() - self.started)

    def save(self) -> None:
        """Write the file as it is now."""
        self.value["seconds"] = round(time.monotonic() - self.started, 2)
        write_json(self.path, plain(self.value))

    def run(self, name: str, work: Callable[[Row], None], needs_s: float = 3.0) -> bool:
        """Run a section if there is time for it; whether it ended well.

        Args:
            name: Key of the section.
            work: Fills the row it is given; what it filled in before an error is kept.
            needs_s: Seconds that must be left.
        """
        if self.left() < needs_s:
            self.value["skipped"].append(name)
            self.save()
            return False
        row: Row = {}
        self.value["sections"][name] = row
        started = time.monotonic()
        try:
            work(row)
        except Exception:
            row["error"] = traceback.format_exc()
            print(f"{name}: FAILED\n{row['error']}", file=sys.stderr, flush=True)
        row["section_seconds"] = round(time.monotonic() - started, 2)
        self.save()
        if "error" not in row:
            print(f"{self.value['part']} {name}: {_line(row)}", file=sys.stderr, flush=True)
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
        return "error" not in row


def _line(row: Row) -> str:
    return ", ".join(f"{k} {v}" for k, v in plain(row).items() if isinstance(v, int | float | str))[:400]


def plain(value: Any) -> Any:
    """JSON values: arrays become lists, numbers keep six digits, what is not finite becomes text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}") if math.isfinite(value) else str(float(value))
    return value if value is None else str(value)


def machine(device: torch.device) -> Row:
    """Device, versions and precision settings."""
    import transformers

    facts: Row = {
        "device": str(device),
        "name": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"name": torch.cuda.get_device_name(device), "memory_gb": total / 1e9, "free_gb": free / 1e9}
        facts["capability"] = list(torch.cuda.get_device_capability(device))
    return facts


@contextlib.contextmanager
def stops(device: torch.device) -> Iterator[dict[str, int]]:
    """Where the host waits for a CUDA device inside the block, as torch counts it: places, most often first."""
    places: dict[str, int] = {}
    if device.type != "cuda":
        yield places
        return
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(
        f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message)
    )
    places |= dict(found.most_common())


def synchronise(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of a piece of work, launched work included, and its result."""
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - started, result


def ceilings(device: torch.device, dtype: torch.dtype, size: int = 8192) -> Row:
    """Measured rates: FLOP/s of a square matrix product, bytes/s (read and written) of a large copy."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(size * size * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows: Row = {"matrix": size}
    for name, work, amount in (
        ("flops", lambda: torch.mm(a, b), 2 * size**3),
        ("bytes", lambda: target.copy_(source), 2 * source.numel()),
    ):
        work()
        seconds = [timed(work, device)[0] for _ in range(10)]
        rows[f"{name}_per_second"] = amount / float(np.median(seconds))
    return rows


def fast_path(engine: TrieEngine, row: Row, name: str) -> None:
    """Whether an engine takes the tree cache. Where it refuses it is made to: speed can be measured all the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row[f"fast_path{name}"] = engine.tree_cache_works
    row[f"warnings{name}"] = [str(w.message) for w in caught]
    if not row[f"fast_path{name}"]:
        row[f"forced{name}"] = True
        engine.__dict__["tree_cache_works"] = True
        loud = f"THE TREE CACHE WAS REFUSED AND IS FORCED, results may be wrong: {row[f'warnings{name}']}"
        print(loud, file=sys.stderr, flush=True)


def peak_gb(device: torch.device, reset: bool = False) -> float | None:
    """Largest memory of tensors since the last reset, in GB; None on a CPU."""
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


@contextlib.contextmanager
def pieces(device: torch.device) -> Iterator[Row]:
    """Seconds and calls of the pieces of a search; each waits for the device, so their sum is above the usual time.

    ``prompt``: prompts through the body; ``body``: trie nodes through it; ``head``: their logits and normalisers,
    ``constraint`` left out; ``constraint``: which children a prefix has. What is left of the total is the search
    itself, on the CPU.
    """
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def wrapped(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seconds, result = timed(lambda: function(*args, **kwargs), device)
            spent[name] += seconds
            calls[name] += 1
            return result

        return run

    kept = (TreeCache.admit, TreeCache.append, TrieEngine.edges, Children.below)
    result: Row = {}
    started = time.perf_counter()
    try:
        TreeCache.admit = wrapped("prompt", kept[0])  # type: ignore[method-assign]
        TreeCache.append = wrapped("body", kept[1])  # type: ignore[method-assign]
        TrieEngine.edges = wrapped("head", kept[2])  # type: ignore[method-assign]
        Children.below = staticmethod(wrapped("constraint", kept[3]))  # type: ignore[assignment]
        yield result
    finally:
        TreeCache.admit, TreeCache.append, TrieEngine.edges = kept[:3]  # type: ignore[method-assign]
        Children.below = kept[3]  # type: ignore[method-assign]
    synchronise(device)
    total = time.perf_counter() - started
    result |= {"total_ms": 1e3 * total, "calls": dict(calls)}
    result |= {f"{name}_ms": 1e3 * seconds for name, seconds in spent.items()}
    result["search_ms"] = 1e3 * (total - sum(spent.values()))
    result |= {f"{name}_share": spent[name] / total for name in ("prompt", "body", "head", "constraint")}


def kernels(work: Callable[[], Any], device: torch.device, most: int = 15) -> Row:
    """How long the device is busy in a piece of work, and with what; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds, _ = timed(work, device)
    events = [e for e in profiler.key_averages() if getattr(e, "device_type", None) == DeviceType.CUDA]
    micro = {e.key: float(getattr(e, "self_device_time_total", 0.0)) for e in events}
    busy = sum(micro.values()) / 1e6
    top = sorted(events, key=lambda e: -micro[e.key])[:most]
    return {
        "wall_ms": 1e3 * seconds,
        "busy_ms": 1e3 * busy,
        "busy_share": busy / seconds,
        "launches": sum(e.count for e in events),
        "kernels": [{"name": e.key[:90], "ms": micro[e.key] / 1e3, "calls": e.count} for e in top],
    }
