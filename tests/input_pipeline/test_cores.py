import math

import pytest

from input_pipeline import cores


@pytest.mark.parametrize(
    ("available", "processes", "workers"),
    [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 2, 3), (8, 8, 1), (200, 1, cores.MAX_WORKERS)],
)
def test_by_default_a_core_is_left_for_the_devices(monkeypatch, available, processes, workers):
    monkeypatch.setattr(cores, "cores", lambda: available)
    assert cores.default_workers(processes) == workers


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({}, math.inf),
        ({"job/step": "max 100000"}, math.inf),
        ({"job/step": "250000 100000", "job": "max 100000"}, 2.5),
        ({"job/step": "800000 100000", "job": "400000 100000"}, 4),
        ({"": "50000 100000", "other": "1 1"}, 0.5),
    ],
)
def test_a_quota_is_that_of_the_cgroup_and_of_those_around_it(tmp_path, limits, allowed):
    membership = tmp_path / "membership"
    membership.write_text("1:cpu:/elsewhere\n0::/job/step\n")
    for name, limit in limits.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "cpu.max").write_text(limit + "\n")
    assert cores.quota(membership, tmp_path) == allowed
    assert cores.quota(tmp_path / "none", tmp_path / "none") == math.inf
