"""A plan's projection is what the processes of a run would do: their steps, and how long each waits for the slowest."""

import numpy as np
import pandas as pd
import pytest

from opensora_fast.config import load_train_config
from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.costs.step_time import StepTime
from opensora_fast.data.buckets.bucket import Bucket
from opensora_fast.train.costs import RunCosts
from opensora_fast.train.inputs.data import read_data
from opensora_fast.train.locate_config import locate_config
from opensora_fast.train.planning.cluster_plan import project_orders
from opensora_fast.train.planning.mix import mix_of_table


@pytest.fixture
def table(tmp_path):
    """table(clips) writes a table of clips of two sizes and two lengths."""

    def write(clips: int) -> str:
        draw = np.random.default_rng(clips)
        sizes = np.array([(144, 256), (240, 426)])[draw.integers(0, 2, clips)]
        names = ["path", "text", "num_frames", "height", "width", "fps"]
        rows = zip(draw.choice([1, 60], clips), sizes[:, 0], sizes[:, 1], strict=True)
        path = tmp_path / "clips.csv"
        pd.DataFrame([("a.mp4", "x", *row, 24.0) for row in rows], columns=names).to_csv(path, index=False)
        return str(path)

    return write


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("clips", "world_size"), [(1, 1), (1, 8), (40, 1), (40, 7), (400, 8), (400, 64)])
def test_the_projection_is_what_the_processes_of_a_run_do(table, clips, world_size, drop_last):
    """Steps, waiting, tokens per second and time of an epoch, in both orders, from the batches of every process."""
    overrides = [f"dataset.data_path={table(clips)}", f"drop_last={drop_last}", "allow_empty_buckets=True"]
    config = load_train_config(locate_config("stage1"), overrides).config
    costs, time = RunCosts(config, Bucket(config.bucket_config)), StepTime(DATASHEETS["H800"])
    try:
        read_data(config, world_size=world_size)
    except ValueError:
        with pytest.raises(ValueError, match="gives no micro-batch|cannot serve"):
            mix_of_table(config, world_size)
        return
    mix = mix_of_table(config, world_size)
    balanced = mix_of_table(config.model_copy(update={"balance": True}), world_size)
    assert np.array_equal(balanced.bucket_of, mix.bucket_of), "shuffled, whatever is configured"
    for order in project_orders(costs, world_size, time, mix):
        ordered = config.model_copy(update={"balance": order.balanced})
        ranks = [list(read_data(ordered, rank, world_size).sampler.iterate(0, 0)) for rank in range(world_size)]
        steps = [[costs.get_videos(batch.bucket) for batch in step] for step in zip(*ranks, strict=True)]
        seconds = np.array([[time.seconds(costs.count_step(videos, world_size)) for videos in step] for step in steps])
        epoch = seconds.max(axis=1).sum()
        assert len(steps) == mix.steps
        assert order.epoch_seconds == pytest.approx(epoch)
        assert order.idle == pytest.approx(1 - seconds.sum() / (epoch * world_size), abs=1e-9) and order.idle >= 0
        assert order.tokens_per_s == pytest.approx(sum(videos.tokens for step in steps for videos in step) / epoch)
