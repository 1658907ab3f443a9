"""A decoder in its own process: crashes and hangs of that process cost one clip each."""

import multiprocessing
import time

import pytest
import torch
from failing_decoders import FailingDecoder, end_at_once, make_nothing

from opensora_fast.data.decoding.clips import BadClip, ClipRequest
from opensora_fast.data.decoding.isolated_decoder import IsolatedDecoder


def make_requests(*paths):
    return [ClipRequest(row, path, (0, 1), (4, 6)) for row, path in enumerate(paths)]


def describe(results):
    return [result.reason if isinstance(result, BadClip) else float(result.mean()) for result in results]


def test_crash_exit_and_hang_cost_one_clip_each():
    decoder = IsolatedDecoder(FailingDecoder, time_limit=1.0)
    results = decoder.decode(make_requests("a", "bad", "crash", "b"))
    assert describe(results) == [0.0, "it is bad", "decoding crashed (SIGSEGV)", 3.0]
    assert results[0].shape == (3, 2, 4, 6) and results[0].is_contiguous()
    restarts = decoder.restarts
    assert restarts == 2, "once together with the others, once alone"

    assert describe(decoder.decode(make_requests("crash", "c"))) == ["decoding crashed (SIGSEGV)", 1.0]
    assert decoder.restarts == restarts, "a file that crashed is not tried again"

    assert describe(decoder.decode(make_requests("exit"))) == ["decoding crashed (exit code 3)"]
    started = time.monotonic()
    assert describe(decoder.decode(make_requests("hang"))) == ["decoding hung for more than 1 s"]
    assert time.monotonic() - started < 30
    assert describe(decoder.decode(make_requests("d"))) == [0.0]
    decoder.close()
    assert not multiprocessing.active_children()


def test_errors_of_the_program_are_raised_and_the_process_goes_on():
    decoder = IsolatedDecoder(FailingDecoder, time_limit=20.0)
    with pytest.raises(ZeroDivisionError, match="an error of the program"):
        decoder.decode(make_requests("a", "error"))
    assert describe(decoder.decode(make_requests("a"))) == [0.0]
    assert decoder.restarts == 0
    assert decoder.decode([]) == []
    decoder.close()
    decoder.close()


def test_decoder_that_cannot_be_made():
    with pytest.raises(ValueError, match="no decoder here"):
        IsolatedDecoder(make_nothing, time_limit=20.0).decode(make_requests("a"))
    with pytest.raises(RuntimeError, match="ended while it started"):
        IsolatedDecoder(end_at_once, time_limit=20.0).decode(make_requests("a"))
    assert not multiprocessing.active_children()


def test_large_clips_come_back_whole():
    decoder = IsolatedDecoder(FailingDecoder, time_limit=20.0)
    (clip,) = decoder.decode([ClipRequest(7, "a", tuple(range(16)), (240, 426))])
    assert clip.shape == (3, 16, 240, 426) and torch.equal(clip, torch.full_like(clip, 7.0))
    decoder.close()


def test_time_limit():
    with pytest.raises(ValueError, match="time_limit"):
        IsolatedDecoder(FailingDecoder, time_limit=0)
