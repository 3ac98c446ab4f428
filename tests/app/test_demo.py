"""The demo, quick: what it makes, that it needs no network with a warm cache, and what it says without data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triewise.cache import cache_folder


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-m", "triewise", *words]
    return subprocess.run(code, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_quick_demo_offline(tmp_path: Path) -> None:
    if not (cache_folder() / "ml-100k").is_dir():
        pytest.skip("ml-100k is not in the cache; run triewise prepare ml-100k --out DIR once")
    done = command(tmp_path, "demo", "--quick", "--json", TRIEWISE_OFFLINE="1", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    further = {"MSL taught by SASRec", "MSL over codes"} - set(result["left_out"])
    assert set(result["rows"]) == {"MSL", "LML", "SASRec", "item-kNN", "most popular"} | further
    html = (tmp_path / result["report"]).read_text(encoding="utf-8")
    assert html.count("<svg") >= 6
    assert "Traceback" not in done.stderr


def test_without_data_and_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    done = command(tmp_path, "demo", "--quick", TRIEWISE_OFFLINE="1", TRIEWISE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: wanted ml-100k, which is not in the cache")
    assert "ml-100k.zip" in last
