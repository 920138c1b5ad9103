"""Start-up: wall time and peak memory of fresh Python processes, taken in turn.

    python scripts/benchmark_startup.py --rounds 10

A first round, which fills the disk cache, is not counted. The peak is the resident memory's (VmHWM, Linux only), read
by the process itself at its end in a run of its own: what ``getrusage`` reports begins with the parent's.
"""

import argparse
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarking import Round, in_turn, machine, print_table, summarize, write_json

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import ppl_vae": ["-c", "import ppl_vae"],
    "ppl-vae --help": ["-m", "ppl_vae", "--help"],
    "import torch": ["-c", "import torch"],
    "import pyro": ["-c", "import pyro"],
    "import arviz": ["-c", "import arviz"],
}

# Runs the rest of its command line as Python would, then tells the process's own status.
TELLING = """
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(open("/proc/self/status").read()))
way, what, *sys.argv[1:] = sys.argv[1:]
exec(what) if way == "-c" else runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


def run(arguments: list[str]) -> str:
    """Starts Python; returns what it wrote to standard error."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stderr


def peak_mib(arguments: list[str]) -> float | None:
    """Peak resident memory of a command; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", run(["-c", TELLING, *arguments]))
    return int(found[1]) / 1024 if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    sides: dict[str, Round] = {name: partial(run, arguments) for name, arguments in COMMANDS.items()}
    in_turn(sides, 1)
    summaries = summarize(in_turn(sides, options.rounds))
    peaks = {name: peak_mib(arguments) for name, arguments in COMMANDS.items()}

    rows = [
        [name, f"{summary.median:.3f}", f"{min(summary.seconds):.3f}", f"{peak:.0f}" if peak is not None else ""]
        for (name, summary), peak in zip(summaries.items(), peaks.values(), strict=True)
    ]
    print_table(["process", "median s", "fastest s", "peak MiB"], rows)
    versions = machine("ppl-vae", "torch", "pyro-ppl", "arviz")
    write_json(options.json, {**versions, "rounds": options.rounds, "seconds": summaries, "peak_mib": peaks})


if __name__ == "__main__":
    main()
