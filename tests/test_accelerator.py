"""The accelerator benchmark runs, at tiny shapes, on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_row_is_measured_and_says_where(tmp_path: Path) -> None:
    result = tmp_path / "rows.json"
    done = run("--smoke", "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = {row["row"]: row for row in json.loads(result.read_text())}
    assert [name.split(",")[0] for name in rows] == [
        "child",
        "decode",
        "decode step",
        "gram",
        "randomized",
        "qd loop",
    ]
    for name, row in rows.items():
        assert {"ours", "peer", "peer_name", "unit", "ratio", "limit"} < row.keys()
        assert row["ours"] > 0
        assert row["ratio"] > 0
        assert row["device"]
        assert row["versions"]["jax"]
        assert row["date"]
        assert name in done.stdout
    assert next(row["agreement"] for row in rows.values() if "agreement" in row) == 1.0


def test_an_unknown_row_is_refused_before_anything_runs() -> None:
    done = run("--rows", "decode,nothing")
    assert done.returncode == 2
    assert "unknown rows nothing: expected some of child, decode, decompose, qd" in done.stderr
