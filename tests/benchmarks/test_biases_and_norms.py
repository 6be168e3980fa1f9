import pytest

from benchmarks import biases_and_norms


@pytest.mark.slow
def test_the_table_has_a_row_for_each_optimiser(capsys, monkeypatch):
    # Each compiles both networks for a quarter of a minute.
    rows = dict(list(biases_and_norms.OPTIMIZERS.items())[-2:])
    monkeypatch.setattr(biases_and_norms, "OPTIMIZERS", rows)
    biases_and_norms.main(biases_and_norms.Options(steps=2, seeds=1))
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["training", "loss"]
    for name, row in zip(biases_and_norms.OPTIMIZERS, rows, strict=True):
        assert row.startswith(name)
        assert all(0 < float(loss) < 10 for loss in row[len(name) :].split())
