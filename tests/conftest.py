"""Every test starts from the same random state. Without a GPU, kernels run in Triton's interpreter.

Property tests try few cases, the same every time; ``pytest -m fuzz`` tries many, others every time.
"""

import functools
import gc
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, Phase, settings

sys.path.append(str(Path(__file__).parents[1]))  # for bench, which is not installed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a process for each core already
    os.environ["OMP_NUM_THREADS"] = "1"  # and in processes that tests start

TOGETHER = {  # files whose tests one process runs, by what they share
    "test_distributed.py": "forked processes",
    "test_interruption.py": "forked processes",
    "test_kills.py": "forked processes",
    "test_resources.py": "compiled kernels",
    "test_accuracy.py": "studies",
}
_OPTIONS = {"deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("few", max_examples=10, derandomize=True, **_OPTIONS)
settings.register_profile("many", max_examples=int(os.environ.get("PM_VIT_CASES", "1000")), **_OPTIONS)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(_tries(config))


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``-n``, one process runs all tests that share what is costly to make, and begins with them."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(nodeid.split("::")[0].split("/")[-1], nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests tell how many cases they tried, as a property of their reports."""
    for item in items:
        if hasattr(getattr(item, "obj", None), "hypothesis"):
            item.obj.hypothesis.inner_test = _counting(item, item.obj.hypothesis.inner_test)


def _counting(item: pytest.Item, test: Callable[..., None]) -> Callable[..., None]:
    tried = itertools.count(1)

    @functools.wraps(test)
    def counted(*args: object, **kwargs: object) -> None:
        item.user_properties[:] = [("cases", next(tried))]
        return test(*args, **kwargs)

    return counted


def _tries(config: pytest.Config) -> str:
    return "many" if "fuzz" in config.option.markexpr else "few"


@pytest.fixture(scope="session")
def tries(request: pytest.FixtureRequest) -> str:
    """``"few"``, or ``"many"`` for ``-m fuzz``."""
    return _tries(request.config)


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """What is there stays: accelerate asks for many garbage collections, which need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # fixtures of a module come before the next test's own
