"""What is freed and needed again at once."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from ppl_vae.memory import keep_what_is_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        buffers = [torch.ones(2**19) for _ in range(8)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_what_is_freed()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have limits of their own")
def test_memory_that_is_freed_is_there_for_the_next_step():
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=own)
    before, after = map(int, done.stdout.split())
    assert after <= before // 10
    assert after < 20 * 8 * 2**21 // 4096 // 10  # of all pages, a tenth at most
