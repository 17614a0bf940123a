"""The suites under pytest-benchmark: which cases there are, each measured once, and the result files."""

import collections
import itertools
from pathlib import Path

import pytest
import torch

from . import attention, model, results, transition
from .machine import describe

SUITES = {"attention": attention, "transition": transition, "model": model}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    group = parser.getgroup("pm-vit")
    group.addoption("--full", action="store_true", help="every case, not only the quick ones")
    group.addoption(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/<suite>.json for every suite that ran whole; nothing where a test failed",
    )


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    cases = [
        (suite, case, name)
        for suite, module in SUITES.items()
        for case in module.cases(DEVICE, full)
        for name in module.names(case, DEVICE)
    ]
    metafunc.parametrize(
        ("suite", "case", "name"), cases, ids=[f"{suite}-{case}-{name}" for suite, case, name in cases]
    )


class Measurements:
    """Records by suite and case, each measured when it is first asked for."""

    def __init__(self):
        self._machine = None
        self.records = collections.defaultdict(dict)

    @property
    def machine(self):
        if self._machine is None:
            self._machine = describe(DEVICE)
        return self._machine

    def of(self, suite, case):
        if case not in self.records[suite]:
            self.records[suite][case] = SUITES[suite].measure(case, DEVICE, self.machine)
        return self.records[suite][case]


@pytest.fixture(scope="session")
def measurements(pytestconfig):
    pytestconfig.measurements = Measurements()
    return pytestconfig.measurements


class Replay:
    """A clock that shows times measured before, so that pytest-benchmark tables what was taken in turns."""

    def __init__(self):
        self._shown = iter(())

    def load(self, seconds):
        """Show each of these durations between two looks at the clock."""
        self._shown = itertools.chain.from_iterable((0.0, duration) for duration in seconds)

    def __call__(self):
        return next(self._shown)


REPLAY = Replay()


def replay():
    """The timer that the benchmarks are given."""
    return REPLAY()


def pytest_sessionfinish(session, exitstatus):
    folder, measured = session.config.getoption("results"), getattr(session.config, "measurements", None)
    if folder is None or measured is None or exitstatus != 0:
        return
    full = session.config.getoption("full")
    for suite, records in measured.records.items():
        cases = SUITES[suite].cases(DEVICE, full)
        if set(records) != set(cases):
            print(f"\n{suite}: {len(records)} of {len(cases)} cases ran, nothing is written")
            continue
        written = [{name: x for name, x in records[case].items() if name != "times_ms"} for case in cases]
        facts = getattr(SUITES[suite], "facts", dict)()
        results.write(folder / f"{suite}.json", {**measured.machine, **facts}, written)
        print(f"\n{folder / suite}.json")
