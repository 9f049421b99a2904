"""What every test stands on: one thread, a fixed seed, reproducible property tests."""

from __future__ import annotations

import os
import re
from typing import Any

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


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take addresses (`<object object at 0x7f…>`) out of the names that `ids=str` gives.

    They differ from process to process, and parallel workers refuse to run tests that are not named alike.
    """
    parametrize = metafunc.parametrize

    def with_stable_names(*args: Any, ids: Any = None, **options: Any) -> None:
        def name(value: object) -> str | None:
            given = ids(value)
            return given if given is None else re.sub(r" at 0x[0-9a-f]+", "", str(given))

        parametrize(*args, ids=name if callable(ids) else ids, **options)

    metafunc.parametrize = with_stable_names  # type: ignore[method-assign]
