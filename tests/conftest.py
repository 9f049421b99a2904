"""What every test stands on: one thread, a fixed seed, reproducible property tests."""

from __future__ import annotations

import os
import re

# Set before torch is imported, and inherited by the fresh processes that some tests start: the floats of a 1x1
# convolution depend on the number of threads, so the two sides of an exactness test must have the same.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# derandomize: a failing example fails for everybody and a passing run passes again. QBENCH_HYPOTHESIS=search looks for
# new examples.
settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("QBENCH_HYPOTHESIS", "fixed"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take addresses out of the names of tests (`<object object at 0x7f…>`).

    They differ from process to process, and parallel workers refuse to run tests that are not named alike.
    """
    for item in items:
        item._nodeid = re.sub(r" at 0x[0-9a-f]+", "", item.nodeid)
