"""Every test starts from the same seed, an empty parameter store and warnings that count as errors."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # before torch: waiting threads soon sleep, for busy machines
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, each in one thread

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    """For tests that compare with a truth: double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
