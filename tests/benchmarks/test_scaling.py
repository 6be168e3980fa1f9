import pytest

from benchmarks import scaling


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_agd_sends_nothing_but_norms(axis):
    options = scaling.Options(arch="resnet18", image_size=64, batch=4)
    agd, sgd = (
        scaling.in_new_process(options, f"{axis}=8", 8, optimiser) for optimiser in ("agd", "sgd")
    )
    (count, size), (sgd_count, sgd_size) = agd.pop("all-reduce"), sgd.pop("all-reduce")
    # No parameter and no gradient is gathered for a norm.
    assert agd == sgd
    # resnet18 has 21 parameters, of 197 taps together.
    assert count - sgd_count <= 21
    assert size - sgd_size <= 4 * 2 * 197
    if axis == "data":
        assert (count, size) == (sgd_count, sgd_size)
        # All that there is to send: the gradients, and BatchNorm's averages.
        assert size == pytest.approx(4 * 11_678_912, rel=0.01)
