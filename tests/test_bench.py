"""What benchmarks compute from what they measured."""

import pathlib
import sys

import pytest


@pytest.fixture
def device_time(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent / "bench")
    yield __import__("device_time")
    sys.modules.pop("device_time")


def test_kernels_that_overlap_are_busy_once(device_time):
    times = [(10, 20), (0, 5), (12, 15), (18, 25), (25, 26), (40, 40.5)]
    kernels = [device_time.Kernel("kernel", "", *time) for time in times]
    assert device_time.busy_us(kernels) == 5 + 16 + 0.5
    assert device_time.busy_us([]) == 0
