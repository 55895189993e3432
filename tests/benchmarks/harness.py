"""Compare code paths on a noisy machine: alternate them, keep every ratio, write down where it ran.

A benchmark script gives each contender as a callable that does one unit of work. All contenders run once a round, in
an order that rotates, so a disturbance hits all of them; what is reported is the median over rounds of the ratio to the
baseline *of the same round*, with its quartiles. Times are not compared across runs.
"""

import importlib
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Work = Callable[[], object]
Row = dict[str, Any]


def alternate(
    contenders: dict[str, Work],
    rounds: int = 15,
    warmup: int = 2,
    inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one number a round.

    Args:
        contenders: name -> one unit of work.
        rounds: measured rounds.
        warmup: unmeasured rounds before.
        inner: calls per measurement, for work of microseconds.
        clock: ``time.process_time`` where others use the cores and all work is done in this process.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(warmup + rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = _time(contenders[name], inner, clock)
            if r >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _time(work: Work, inner: int, clock: Callable[[], float] = time.perf_counter) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    for _ in range(inner):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / inner


def ratios(seconds: dict[str, list[float]], baseline: str) -> list[Row]:
    """One row per contender: median milliseconds, and median and quartiles of the ratio to the baseline's round."""
    rows = []
    for name, times in seconds.items():
        per_round = [t / b for t, b in zip(times, seconds[baseline], strict=True)]
        low, _, high = quantiles(per_round, n=4) if len(per_round) > 1 else per_round * 3
        rows.append(
            {
                "name": name,
                "median_ms": round(1e3 * median(times), 4),
                "ratio": round(median(per_round), 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
            }
        )
    return rows


def markdown(rows: list[Row]) -> str:
    """The rows as a markdown table with the union of their keys as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "–".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def save(method: str, section: str, rows: list[Row], packages: tuple[str, ...] = ()) -> None:
    """Print the table, and store it as ``section`` of ``results/<method>.json`` with what is known of the machine."""
    print(f"\n## {method}: {section}\n\n{markdown(rows)}")
    path = RESULTS / f"{method}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = {"environment": environment(packages), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def environment(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Processor, cores, threads, versions and date; no host name."""
    return {
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
        "date": date.today().isoformat(),
    }


def peer(module: str) -> ModuleType | None:
    """A package to compare with, or ``None`` when it is not installed (see requirements.txt)."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def copy_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes per second, read plus written, of copying a tensor much larger than the caches: the best of 7."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(_time(lambda: target.copy_(source), 1) for _ in range(7))


def read_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes per second of a matrix-vector product that streams a matrix much larger than the caches: the best of 7."""
    matrix = torch.ones(64, megabytes * 2**12, device=device)
    vector = torch.ones(matrix.shape[1], device=device)
    matrix.mv(vector)
    return matrix.nbytes / min(_time(lambda: matrix.mv(vector), 1) for _ in range(7))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
