import pytest

from benchmarks import scaling

HLO = """
  %all-reduce.1 = f32[64,10]{1,0} all-reduce(f32[64,10]{1,0} %dot), channel_id=1
  %all-reduce.2 = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce(f32[8]{0} %a, bf16[2,3]{1,0} %b)
  %all-gather.1 = f32[3,3,64]{2,1,0} all-gather(f32[3,3,8]{2,1,0} %c), dimensions={2}
  %norm = f32[] all-reduce-start(f32[] %d), to_apply=%add
  ROOT %add = f32[64,10]{1,0} add(f32[64,10]{1,0} %all-reduce.1, f32[64,10]{1,0} %e)
"""


def test_collectives_are_counted_with_the_bytes_they_result_in():
    assert scaling.count_collectives(HLO) == {
        "all-reduce": (3, 4 * 640 + 4 * 8 + 2 * 6 + 4),
        "all-gather": (1, 4 * 576),
    }


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
