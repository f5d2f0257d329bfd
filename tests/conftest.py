"""What all tests share: the devices, the one external package, and how hypothesis runs."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# The second environment of `make test` holds the core alone, and says so. Everywhere else a missing
# LightZero is a failure: a skipped parity test would look like a passed one.
CORE_ONLY = os.environ.get("PAGED_KV_CORE_ONLY") == "1"
if CORE_ONLY:
    collect_ignore_glob = ["*lightzero*", "*cli*", "*profile*", "*html*"]

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dev")

torch.set_num_threads(1)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def modes_as_they_were() -> Iterator[None]:
    """Autograd and the collector are on again after each test.

    Errors that tests place between any two instructions may leave them off; signals find no such
    place.
    """
    yield
    torch.set_grad_enabled(True)
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs LightZero in the core environment; fail it anywhere else where LightZero is
    missing.
    """
    if item.get_closest_marker("lightzero") is None:
        return
    if CORE_ONLY:
        pytest.skip("the core environment has no LightZero")
    if importlib.util.find_spec("lzero") is None:
        pytest.fail(
            "LightZero is missing: run make test, or test the core alone with PAGED_KV_CORE_ONLY=1"
        )
