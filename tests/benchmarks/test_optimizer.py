import re

import pytest

from benchmarks import optimizer


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    optimizer.main(optimizer.Options(arch="resnet18", image_size=32, turns=1, muon=False))
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()[3:]}
    assert set(rows) == {"agd", "spectral", "sgd", "adam"}
    assert int(rows["agd"][1]) == 8
    assert re.match(r"11,\d{3},\d{3} parameters in 21 tensors", output)
    assert float(rows["adam"][2]) == 1
    assert float(rows["sgd"][3]) == 1
