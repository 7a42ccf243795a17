"""What benchmarks compute from what they measured."""

import contextlib
import importlib
import pathlib
import sys
import time

import pytest

BENCH = pathlib.Path(__file__).parent.parent / "bench"


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a benchmark, whose name and those of what it imports are forgotten afterwards."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in {path.stem for path in BENCH.glob("*.py")} & sys.modules.keys():
        del sys.modules[name]


def test_kernels_that_overlap_are_busy_once(benchmark_module):
    device_time = benchmark_module("device_time")
    times = [(10, 20), (0, 5), (12, 15), (18, 25), (25, 26), (40, 40.5)]
    kernels = [device_time.Kernel("kernel", "", *time) for time in times]
    assert device_time.busy_us(kernels) == 5 + 16 + 0.5
    assert device_time.busy_us([]) == 0


def test_clock_and_power_count_once_they_have_settled(benchmark_module, monkeypatch):
    power = benchmark_module("power")
    samples = []

    @contextlib.contextmanager
    def sampled():
        yield samples

    def run():  # four steps, at another clock in the first half
        time.sleep(0.01)
        now = time.perf_counter()
        warm = bool(samples) and now - samples[0].at > 0.5
        samples.append(power.Sample(now, *((1500, 690, 50, True) if warm else (1980, 300, 40, False))))
        return 4

    monkeypatch.setattr(power, "sampled", sampled)
    monkeypatch.setattr(power, "SETTLED", 0.75)
    found = power.turn(run, 1)
    assert found["SM clock MHz"] == found["least SM clock MHz"] == 1500
    assert found["W"] == 690 and found["share of samples at the power limit"] == 1
    assert found["ms"] >= 2.5  # of a step
    assert found["J"] == pytest.approx(690 * found["ms"] / 1e3)
