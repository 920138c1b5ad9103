"""What the benchmarks share: sides timed in turn, their ratios to the first, and a table."""

import json
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Round = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    """A side's rounds: seconds each, and the quotient by the baseline's seconds in the same round."""

    seconds: list[float]
    median: float
    ratio: float
    quartiles: tuple[float, float]


def seconds_of(work: Round) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(sides: Mapping[str, Round], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round. The order is drawn anew for every round, so that no side always follows
    the same other; what the machine does besides then falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(sides), len(sides)):
            seconds[name].append(seconds_of(sides[name]))
    return seconds


def summarize(seconds: Mapping[str, Sequence[float]]) -> dict[str, Summary]:
    """Medians, with ratios to the first side: medians and quartiles over rounds, each round against itself."""
    baseline = next(iter(seconds.values()))
    return {name: _summary(values, baseline) for name, values in seconds.items()}


def _summary(values: Sequence[float], baseline: Sequence[float]) -> Summary:
    ratios = [value / reference for value, reference in zip(values, baseline, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Summary(list(values), median(values), middle, (low, high))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A column of names, then columns of numbers, as a Markdown table."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width if number == 0 else "-" * (width - 1) + ":" for number, width in enumerate(widths)])
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |", flush=True)


def machine(*packages: str) -> dict[str, str]:
    """What the numbers depend on: processor, Python, and the versions of those packages that are installed."""
    found = {"machine": platform.machine(), "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path | None, record: Mapping[str, Any]) -> None:
    """Writes a record where one was asked for; summaries become objects."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1, default=asdict) + "\n", encoding="utf-8")
