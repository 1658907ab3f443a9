"""Ops are timed by replays where they can be recorded; who cannot be keeps its row, which says so."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_toys import ToyWork, make_toy_work, toy_contest

from opensora_fast.benchmarks.measuring.contest import OP_CALLS, forward_backward_call, run_contest
from opensora_fast.benchmarks.measuring.provider import Provider, of_function
from opensora_fast.benchmarks.measuring.replay import CudaGraphs, RecordedCall, make_replay, own_stream, recorder_of
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.shapes import Pack
from opensora_fast.benchmarks.suites import models, ops
from opensora_fast.benchmarks.suites.scale import scale_of


class Tape:
    """Records calls on the CPU as a graph does: outputs stay where they are, replays write them anew.

    Args:
        refuse: whether the n-th call that is to be recorded cannot be.
    """

    def __init__(self, refuse=lambda number: False):
        self.refuse = refuse
        self.recorded = 0
        self.replayed = []

    def __call__(self, call):
        number = self.recorded
        self.recorded += 1
        if self.refuse(number):
            raise RuntimeError("it waits for the GPU\nand more")
        outputs = call()
        pairs = outputs if isinstance(outputs, tuple) else (outputs,)

        def replay():
            self.replayed.append(number)
            again = call()
            for output, new in zip(pairs, again if isinstance(again, tuple) else (again,), strict=True):
                output.copy_(new)

        return RecordedCall(replay, outputs)


class ForgetfulTape(Tape):
    """Its replays do nothing: the work was done where it did not look, as on another stream."""

    def __call__(self, call):
        return RecordedCall(lambda: None, super().__call__(call).outputs)


def contest_with(names, tapes, kind=Tape, **options):
    def make():
        tapes.append(kind(**options))
        return tapes[-1]

    return replace(toy_contest(names), make_recorder=make)


def test_samples_are_of_replays():
    tapes = []
    rows, refused = run_contest(contest_with(["eager", "other"], tapes), Session("cpu"))
    assert not refused
    assert [(row.provider, row.direction, row.timed) for row in rows] == [
        (provider, direction, "graph") for direction in OP_CALLS for provider in ("eager", "other")
    ]
    assert len(tapes) == len(OP_CALLS)  # each with memory of its own, free before the next direction's
    samples = sum(row.samples for row in rows)
    warm_up, checks = 3 * len(rows), len(rows)
    assert sum(len(tape.replayed) for tape in tapes) == samples + warm_up + checks
    assert tapes[0].replayed[-4:] == [0, 1, 0, 1]  # interleaved


def test_a_call_that_cannot_be_recorded_is_timed_as_it_is_and_says_so():
    tapes = []
    contest = contest_with(["eager", "other"], tapes, refuse=lambda number: number == 1)
    rows, _ = run_contest(contest, Session("cpu"))
    assert {(row.provider, row.status, row.timed) for row in rows} == {
        ("eager", "ok", "graph"),
        ("other", "ok", "calls: RuntimeError: it waits for the GPU"),
    }
    assert all(row.samples >= 3 and row.p50_ms > 0 for row in rows)
    assert {number for tape in tapes for number in tape.replayed} == {0}


def test_a_replay_that_computes_nothing_is_not_timed():
    rows, _ = run_contest(contest_with(["eager"], [], ForgetfulTape), Session("cpu"))
    assert {row.timed for row in rows} == {"calls: ValueError: a replay does not write all that the call returns"}


@pytest.mark.parametrize("written", [(4, 3), (4, 0), (0, 4)])
def test_a_replay_that_leaves_out_a_part_is_refused(written):
    def record(call):
        outputs = call()

        def replay():
            for output, count in zip(outputs, written, strict=True):
                output[:count] = 1.0

        return RecordedCall(replay, outputs)

    with pytest.raises(ValueError, match="a replay does not write all that the call returns"):
        make_replay(lambda: (torch.ones(4), torch.ones(4)), record)


def replaying(*values):
    """Records calls whose replays write these values."""

    def record(call):
        outputs = call()

        def replay():
            for output, value in zip(outputs, values, strict=True):
                output.copy_(value)

        return RecordedCall(replay, outputs)

    return record


FIRST, SECOND = torch.linspace(-1, 1, 100), torch.linspace(3, 4, 100)


@pytest.mark.parametrize(
    "values",
    [(FIRST, torch.zeros(100)), (0.8 * FIRST, SECOND), (FIRST, torch.full((100,), torch.inf)), (FIRST.flip(0), SECOND)],
    ids=["zeros", "another size", "infinite", "other places"],
)
def test_a_replay_that_writes_other_values_is_refused(values):
    with pytest.raises(ValueError, match="a replay computes something else than the call"):
        make_replay(lambda: (FIRST.clone(), SECOND.clone()), replaying(*values))


def test_a_replay_may_sum_in_another_order():
    """And what is zero but for rounding, as a gradient may be, is another number each time."""
    noise = 1e-5 * torch.ones(100)
    make_replay(lambda: (FIRST.clone(), noise.clone()), replaying(1.01 * FIRST, -noise))()


def test_a_result_that_is_handed_on_is_left_alone():
    """The gradient of a sum is what was sent back, which the next call needs as well."""
    given = torch.randn(8)
    replay = make_replay(lambda: (given, given * 2), Tape())
    replay()
    assert given.isfinite().all()


def test_what_a_call_reads_lives_as_long_as_its_replay():
    """The gradient that is sent back, and an implementation's own copies of the inputs, belong to the call alone."""

    def record(call):  # as a graph, it knows addresses and holds nothing
        outputs = call()
        return RecordedCall(partial(outputs.copy_, outputs.clone()), outputs)

    given = torch.randn(8)
    alive = weakref.ref(given)
    replay = make_replay(partial(torch.neg, given), record)
    del given
    gc.collect()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


def test_without_a_recorder_nothing_is_recorded():
    rows, _ = run_contest(toy_contest(["eager"]), Session("cpu"))
    assert {row.timed for row in rows} == {""} and recorder_of("cpu") is None and recorder_of("cuda") is CudaGraphs


# ---- on a GPU ----


def cuda_work():
    leaves = {name: leaf.detach().cuda().requires_grad_() for name, leaf in make_toy_work().leaves.items()}
    return ToyWork(leaves, "cuda")


def many_launches(work):
    y = work.leaves["a"] * work.leaves["b"]
    for _ in range(20):
        y = y + 0.0
    return y


def wait_for_the_gpu(work):
    y = work.leaves["a"] * work.leaves["b"]
    return y + 0.0 * y.sum().item()


def wait_behind_torch(work):
    """As a library does, unseen by PyTorch's own check."""
    y = work.leaves["a"] * work.leaves["b"]
    torch.cuda.synchronize()
    return y


def cuda_contest(**providers):
    contest = toy_contest(["eager"])
    return replace(
        contest,
        work=cuda_work(),
        providers=[Provider(name.replace("_", "-"), of_function(function)) for name, function in providers.items()],
        make_recorder=recorder_of("cuda"),
    )


@pytest.mark.gpu
def test_the_kernels_of_a_small_op_take_less_time_than_its_call():
    contest = cuda_contest(many=many_launches)
    replayed, _ = run_contest(contest, Session("cuda"))
    called, _ = run_contest(replace(contest, make_recorder=None), Session("cuda"))
    assert [row.timed for row in replayed] == ["graph", "graph"] and [row.timed for row in called] == ["", ""]
    for kernels, call in zip(replayed, called, strict=True):
        assert 0 < kernels.p50_ms < call.p50_ms, kernels.direction


@pytest.mark.gpu
@pytest.mark.parametrize("waiting", [wait_for_the_gpu, wait_behind_torch])
def test_who_waits_for_the_gpu_is_timed_as_called_and_disturbs_nobody(waiting):
    rows, refused = run_contest(cuda_contest(first=many_launches, waits=waiting, last=many_launches), Session("cuda"))
    assert not refused and all(row.status == "ok" and row.p50_ms > 0 for row in rows)
    for row in rows:
        assert row.timed.startswith("calls: ") if row.provider == "waits" else row.timed == "graph"
    before = torch.cuda.memory_reserved()
    kept = torch.randn(2**26, device="cuda")  # neither random numbers nor memory are as in a capture
    del kept
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
def test_gradients_after_replays_are_those_of_an_eager_call():
    with own_stream("cuda"):
        work = cuda_work()
        bound = of_function(many_launches)(work)
        call = forward_backward_call(bound, work)
        call()
        recordings = []

        def record(call):
            recordings.append(CudaGraphs()(call))
            return recordings[-1]

        replay = make_replay(call, record)
        with torch.no_grad():
            for leaf in work.leaves.values():
                leaf.mul_(-3.0)  # a replay reads what is there by then
        for _ in range(3):
            replay()
        eager = call()
        assert all(torch.equal(*pair) for pair in zip(recordings[0].outputs, eager, strict=True))


@pytest.mark.gpu
def test_the_memory_of_replays_is_free_afterwards():
    contest = cuda_contest(many=many_launches)
    run_contest(contest, Session("cuda"))
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        run_contest(contest, Session("cuda"))
    assert torch.cuda.memory_reserved() <= before


CASES = {
    "modulated_norm": lambda scale, pack: ops.elementwise_case(scale, "modulated_norm", pack, 0.0),
    "mlp": lambda scale, pack: ops.mlp_case(scale, pack, 0.0),
    "adamw": lambda scale, pack: ops.adamw_case(scale, 0.0),
    "spatial": lambda scale, pack: ops.attention_case(scale, "spatial", pack, 0.0),
    "temporal": lambda scale, pack: ops.attention_case(scale, "temporal", pack, 0.0),
    "cross": lambda scale, pack: ops.attention_case(scale, "cross", pack, 0.0),
    "length": lambda scale, pack: ops.list_length_cases(scale)[0],
    "block": lambda scale, pack: models.block_case(scale, pack, 0.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_eager_and_ours_are_replayed_in_every_suite_of_ops_and_blocks(name):
    scale = scale_of("cuda")
    case = CASES[name](scale, Pack.of(scale.headline[0]))
    rows, refused = case.measure(Session("cuda", seconds_factor=0.05), ("eager", "ours"))
    assert not refused
    found = {(row.provider, row.status, row.timed) for row in rows}
    assert found == {("eager", "ok", "graph"), ("ours", "ok", "graph")}
