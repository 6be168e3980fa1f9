import re

import pytest

from tests.helpers import ROOT, finish, start


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
def test_the_benchmark_runs():
    benchmark = ROOT / "benchmarks" / "processes.py"
    out, err, code = finish(start(benchmark, "--dispatches", 2, "--turns", 1))
    assert code == 0, err
    assert re.match(r"one process, two devices +[\d.]+ ms a dispatch\n", out)
    agreed = re.findall(r"^two processes, agreeing on (\w+ ?\w+) +[\d.]+ ms a dispatch", out, re.M)
    assert agreed == ["nothing", "late votes", "votes"]
