"""Before step 0 on a GPU, buckets that will not fit are named with a fix that works."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from opensora_fast.config import load_train_config
from opensora_fast.costs.memory import usable_memory
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.train.costs import RunCosts
from opensora_fast.train.inputs.data import read_data
from opensora_fast.train.locate_config import locate_config
from opensora_fast.train.planning.memory_check import GIB, advise_on_graphs, count_buckets, warn_of_memory


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of so many GiB, of which so many are taken by what stands."""

    def use(gib: float, allocated: float) -> None:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(allocated * GIB))
        properties = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return use


def load(*overrides: str):
    return load_train_config(
        locate_config("stage1"), ["allow_empty_buckets=True", "drop_last=False", *overrides]
    ).config


@pytest.fixture
def clips(tmp_path) -> str:
    """Clips of 144p and 240p, 16 frames each."""
    rows = [("a.mp4", "x", 60, 144, 256, 24.0)] * 20 + [("b.mp4", "x", 60, 240, 426, 24.0)] * 20
    path = tmp_path / "clips.csv"
    pd.DataFrame(rows, columns=["path", "text", "num_frames", "height", "width", "fps"]).to_csv(path, index=False)
    return str(path)


def tell(config, linear="torch") -> list[str]:
    lines: list[str] = []
    warn_of_memory(config, read_data(config), 1, torch.device("cuda", 0), lines.append, linear)
    return lines


def warn(config, linear="torch") -> list[str]:
    return [line for line in tell(config, linear) if line.startswith("warning")]


def test_nothing_is_said_on_a_cpu_or_where_all_fits(clips, gpu):
    config = load(f"dataset.data_path={clips}")
    lines: list[str] = []
    warn_of_memory(config, read_data(config), 1, torch.device("cpu"), lines.append)
    gpu(80, allocated=14)
    assert lines == [] and warn(config) == []


def test_a_bucket_that_does_not_fit_is_named_with_fixes_that_work(clips, gpu):
    overrides = (f"dataset.data_path={clips}", "bucket_config.144p.16=(1.0, 40)")
    gpu(80, allocated=14)
    (line,) = warn(load(*overrides))
    pattern = (
        r"warning: bucket_config\['144p'\]\[16\]: batch size 40 needs (\d+\.\d) GiB \(counted\), the GPU has 75.2 "
    )
    match = re.match(pattern + r"GiB .*: lower the batch size to (\d+), or set grad_checkpoint=(\d+)$", line)
    assert match and float(match[1]) > 75.2
    assert warn(load(overrides[0], f"bucket_config.144p.16=(1.0, {match[2]})")) == []
    assert warn(load(overrides[0], f"bucket_config.144p.16=(1.0, {int(match[2]) + 1})")) != []
    assert warn(load(*overrides, f"grad_checkpoint={match[3]}")) == []
    assert warn(load(*overrides, f"grad_checkpoint={int(match[3]) - 1}")) != []


def test_quack_has_room_for_more_clips(clips, gpu):
    gpu(80, allocated=14)
    line = warn(load(f"dataset.data_path={clips}", "bucket_config.144p.16=(1.0, 40)"))[0]
    most = int(re.search(r"lower the batch size to (\d+)", line)[1])
    config = load(f"dataset.data_path={clips}", f"bucket_config.144p.16=(1.0, {most + 1})")
    assert warn(config) != [] and warn(config, "quack") == []


def test_graphs_are_named_where_they_take_the_memory(clips, gpu):
    overrides = (f"dataset.data_path={clips}", "bucket_config.144p.16=(1.0, 12)")
    gpu(80, allocated=14)
    assert warn(load(*overrides)) == warn(load(*overrides, "cuda_graph_tokens=100")) == []
    *lines, last = warn(load(*overrides, "cuda_graph_tokens=30000"))
    assert lines and all(line.startswith("warning: bucket_config[") for line in lines)
    assert re.match(r"warning: \d+\.\d GiB of each are held by CUDA graphs .*cuda_graph_tokens=0 needs none", last)


def test_graphs_are_advised_before_step_0_where_there_is_room_for_them(clips, gpu):
    overrides = (f"dataset.data_path={clips}",)
    gpu(80, allocated=14)
    (line,) = tell(load(*overrides))
    assert line.startswith("note: cuda_graph_tokens=16384 would replay") and line.endswith(
        "every bucket fits beside them"
    )
    assert tell(load(*overrides, "cuda_graph_tokens=16384")) == []
    gpu(80, allocated=25)
    assert tell(load(*overrides)) == []
    assert warn(load(*overrides, "cuda_graph_tokens=16384")) != []


def test_graphs_are_advised_as_what_they_take_when_configured():
    """Whether they fit, too; and not where no step is small, or processes share their micro-batches."""
    pairs = {"144p": {1: (1.0, 3), 16: (1.0, 8)}, "360p": {16: (1.0, 3)}}

    def count(*overrides: str, pairs=pairs):
        config = load(f"bucket_config={pairs}", *overrides)
        costs = RunCosts(config, Bucket(config.bucket_config))
        model = costs.get_memory_model(2)
        return costs, model, count_buckets(costs, model, 80 * GIB)

    verdicts = set()
    for recomputed in ("grad_checkpoint=0", "grad_checkpoint=True"):
        costs, model, buckets = count(recomputed)
        _, graphed, beside_graphs = count(recomputed, "cuda_graph_tokens=16384")
        advice = advise_on_graphs(costs, model, buckets, 80 * GIB)
        assert (advice.small, advice.pairs) == (1, 3) and advice.memory == graphed.graphs(costs.recomputed)
        assert advice.fits == all(line.fits for line in beside_graphs)
        assert ("not every bucket fits" in advice.describe()) != advice.fits
        verdicts.add(advice.fits)
    assert verdicts == {False, True}
    assert advise_on_graphs(*count(pairs={"360p": {16: (1.0, 3)}}), 80 * GIB) is None
    assert advise_on_graphs(*count("sp_size=2"), 80 * GIB) is None


def test_what_is_allocated_counts_not_what_is_guessed(clips, gpu):
    config = load(f"dataset.data_path={clips}", "bucket_config.144p.16=(1.0, 12)")
    gpu(80, allocated=14)
    assert warn(config) == []
    gpu(80, allocated=45)
    (line,) = warn(config)
    costs = RunCosts(config, Bucket(config.bucket_config))
    model = costs.get_memory_model(1)
    (guessed,) = count_buckets(costs, model, 80 * GIB, {("144p", 16)})
    needed = (guessed.peak - model.standing) / GIB + 45
    assert f"bucket_config['144p'][16]: batch size 12 needs {needed:.1f} GiB" in line


def test_of_many_buckets_that_do_not_fit_the_first_are_named_and_the_others_counted(tmp_path, gpu):
    lengths = range(2, 9)
    path = tmp_path / "clips.csv"
    rows = [("a.mp4", "x", length + 1, 144, 256, 24.0) for length in lengths]
    pd.DataFrame(rows, columns=["path", "text", "num_frames", "height", "width", "fps"]).to_csv(path, index=False)
    gpu(80, allocated=14)

    def warn_of(count: int) -> list[str]:
        entries = {length: (1.0, 4000 if length < 2 + count else 1) for length in lengths}
        return warn(
            load(f"dataset.data_path={path}", "dataset.frame_interval=1", f"bucket_config={{'144p': {entries}}}")
        )

    assert len(warn_of(5)) == 5 and all("bucket_config['144p']" in line for line in warn_of(5))
    *lines, last = warn_of(7)
    assert len(lines) == 5 and last == "warning: and 2 more buckets; `opensora-fast plan` lists them"


def test_buckets_without_clips_are_not_looked_at(clips, gpu):
    gpu(80, allocated=14)
    assert warn(load(f"dataset.data_path={clips}", "bucket_config.1024.1=(0.3, 4000)")) == []


def test_a_clip_that_never_fits_is_to_be_removed():
    config = load("bucket_config={'720p': {4000: (1.0, 1)}}")
    costs = RunCosts(config, Bucket(config.bucket_config))
    (line,) = count_buckets(costs, costs.get_memory_model(1), 80 * GIB)
    assert (line.fits, line.largest_batch, line.fewest_recomputed) == (False, 0, None)
    assert line.describe_misfit(80 * GIB).endswith("remove it: one clip is too much even with grad_checkpoint=True")


def test_a_clip_that_fits_only_with_recomputation_in_a_smaller_batch_is_not_to_be_removed():
    """Not one clip fits as configured, and the batch size not even with recomputation; some clips do."""

    def count(*overrides: str):
        config = load("bucket_config={'720p': {64: (1.0, 40)}}", *overrides)
        costs = RunCosts(config, Bucket(config.bucket_config))
        return count_buckets(costs, costs.get_memory_model(64), 80 * GIB)[0]

    line = count()
    assert (line.largest_batch, line.fewest_recomputed) == (0, None)
    fix = re.search(r": lower the batch size to (\d+) with grad_checkpoint=True$", line.describe_misfit(80 * GIB))
    assert fix and count(f"bucket_config.720p.64=(1.0, {fix[1]})", "grad_checkpoint=True").fits
    assert not count(f"bucket_config.720p.64=(1.0, {int(fix[1]) + 1})", "grad_checkpoint=True").fits


def test_the_aspect_ratio_with_the_most_tokens_decides():
    config = load()
    costs = RunCosts(config, Bucket(config.bucket_config))
    model, memory = costs.get_memory_model(64), 80 * GIB
    for line in count_buckets(costs, model, memory):
        ids = [bucket_id for bucket_id in costs.bucket.ids if bucket_id[:2] == (line.resolution, line.frames)]
        peaks = [model.peak(costs.get_videos(bucket_id), costs.recomputed) for bucket_id in ids]
        assert line.peak == max(peaks) and line.fits == (line.peak <= usable_memory(memory))
