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
    # resnet18 has 21 parameters, of 197 taps together: their norms, and should gradients be of an
    # unusual size, their largest entries and the norms again.
    assert count - sgd_count <= 21
    assert size - sgd_size <= 4 * (2 * 197 + 21)
    if axis == "data":
        assert (count, size) == (sgd_count, sgd_size)
        # All that there is to send: the gradients, and BatchNorm's averages.
        assert size == pytest.approx(4 * 11_678_912, rel=0.01)


@pytest.mark.slow
def test_without_batch_norm_a_step_sends_once():
    options = scaling.Options(arch="fcn", image_size=16, batch=4)
    # 768 x 256, 8 of 256 x 256 and 256 x 1000 parameters; sums of examples, losses and hits.
    size = 4 * (768 * 256 + 8 * 256**2 + 256 * 1000 + 3)
    found = scaling.in_new_process(options, "data=2", 2, "agd")
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"][0] == 1
    assert found["all-reduce"][1] == pytest.approx(size, abs=32)
