"""What all tests share: the devices, the one external package, and how hypothesis runs."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# The second environment of `make test` holds the core alone, and says so. Everywhere else a missing
# client is a failure: a skipped parity test would look like a passed one.
CORE_ONLY = os.environ.get("PAGED_KV_CORE_ONLY") == "1"
if CORE_ONLY:
    collect_ignore_glob = [
        "*lightzero*",
        "*huggingface*",
        "*cli*",
        "*profile*",
        "*html*",
        "workers",
    ]
CLIENTS = {  # marker: what it needs, and the package to look for
    "lightzero": ("LightZero", "lzero"),
    "huggingface": ("transformers", "transformers"),
    "kgen": ("KGen", "kgen"),
    "ray": ("Ray", "ray"),
}

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
# `make mutants`: whether a test fails is all that counts, not the smallest example.
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate]
)
# Most that one test may take of the processor, for mutants that loop; 0: no matter how much.
SECONDS = float(os.environ.get("PAGED_KV_TEST_SECONDS", "0"))
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that takes longer than it may. One of a mutant may loop and catch that: then the
    process ends.
    """
    if not SECONDS:
        return (yield)

    def end(*_: object) -> None:
        if "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", ""):
            os._exit(pytest.ExitCode.TESTS_FAILED)
        pytest.fail(f"took more than {SECONDS} s of the processor")

    signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a client in the core environment; fail it anywhere else where the client is
    missing.
    """
    for marker, (name, package) in CLIENTS.items():
        if item.get_closest_marker(marker) is None:
            continue
        if CORE_ONLY:
            pytest.skip(f"the core environment has no {name}")
        if importlib.util.find_spec(package) is None:
            pytest.fail(
                f"{name} is missing: run make test, or test the core alone with "
                "PAGED_KV_CORE_ONLY=1"
            )


@pytest.fixture(autouse=True)
def _whoever_traces_goes_on() -> Iterator[None]:
    """A test that traces puts back who traced before: else nothing after it counts as covered."""
    before = sys.gettrace()
    yield
    assert sys.gettrace() is before
