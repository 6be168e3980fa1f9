import pytest

from benchmarks import startup


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    startup.main(startup.Options(turns=1, flags="--epochs 1 --depth 2 --platform cpu"))
    lines = capsys.readouterr().out.splitlines()
    seconds = {line[:36].strip(): float(line[36:].split()[0]) for line in lines}
    assert len(seconds) == 8
    for name in ("cold", "warm"):
        assert 0 < seconds[f"until the first step, {name}"] <= seconds[f"train.py, {name}"]
