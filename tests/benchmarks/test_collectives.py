from benchmarks import collectives
from benchmarks.collectives import Collective

# As a TPU's compiler writes them, shortened: layouts behind the shapes, a gather that is spread
# over the start and the end of other computations, a reduction of which a device keeps its
# share, and a loop that runs four times.
TPU = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%begin (p: bf16[8,4]) -> bf16[8,32] {
  %all-gather.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={1}
}

%end (p: bf16[8,4]) -> bf16[8,32] {
  %all-gather.2 = bf16[8,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={1}
}

%all-reduce-scatter.3 (p: f32[16,2]) -> f32[2,2] {
  %all-reduce.3 = f32[16,2]{1,0} all-reduce(%p), channel_id=8, replica_groups=[2,8]<=[16], \
to_apply=%add
  ROOT %slice = f32[2,2]{1,0} dynamic-slice(%all-reduce.3)
}

%condition (p: (f32[10], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  ROOT %compare = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (f32[10], u32[])) -> (f32[10], u32[]) {
  %permute = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), \
channel_id=9, source_target_pairs={{0,1},{1,0}}
  %done = f32[10]{0} collective-permute-done(%permute)
}

ENTRY %main.1 (p: f32[16,2]) -> f32[2,2] {
  %start = (bf16[8,4], bf16[8,32]) fusion(%p), kind=kCustom, calls=%begin
  %finish = bf16[8,32] fusion(%start), kind=kCustom, calls=%end
  %scattered = f32[2,2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %loop = (f32[10], u32[]) while(%tuple), condition=%condition, body=%body
  ROOT %all-reduce.4 = (f32[3]{0}, /*index=1*/bf16[2]{0}) all-reduce(%a, %b), channel_id=10, \
replica_groups=mesh['a'=2,'b'=8] {'a','b':(1)4}, to_apply=%add
}
"""

# As those for a CPU and a GPU write them.
OTHERS = """
ENTRY %main (p: f32[8]) -> f32[] {
  %all-reduce.1 = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1},{2,3}}
  %all-reduce.2 = f32[] all-reduce-start(%b), channel_id=2, replica_groups={}, to_apply=%add
  %all-gather.1 = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), channel_id=3, \
replica_groups=[1,4]<=[4], dimensions={0}
  %reduce-scatter = f32[2]{0} reduce-scatter(%d), channel_id=4, replica_groups=[1,4]<=[4]
}
"""


def test_what_a_program_for_tpus_sends():
    found = collectives.of_program(TPU, 16)
    assert found == [
        Collective("all-gather", 2 * 8 * 32, 8, 1),
        Collective("reduce-scatter", 4 * 16 * 2, 8, 1),
        Collective("collective-permute", 4 * 10, 16, 4),
        Collective("all-reduce", 4 * 3 + 2 * 2, 8, 1),
    ]
    assert collectives.count(found) == {
        "all-gather": (1, 512),
        "reduce-scatter": (1, 128),
        "collective-permute": (4, 160),
        "all-reduce": (1, 16),
    }


def test_what_other_programs_send():
    assert collectives.of_program(OTHERS, 4) == [
        Collective("all-reduce", 32, 2, 1),
        Collective("all-reduce", 4, 4, 1),
        Collective("all-gather", 32, 4, 1),
        Collective("reduce-scatter", 32, 4, 1),
    ]


def test_what_a_device_of_a_ring_sends():
    assert Collective("all-gather", 80, 8, 1).sent == 70
    assert Collective("reduce-scatter", 80, 8, 1).sent == 70
    assert Collective("all-reduce", 80, 8, 1).sent == 140
    assert Collective("collective-permute", 80, 8, 1).sent == 80
