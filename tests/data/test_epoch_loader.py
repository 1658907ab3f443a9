"""Epochs that follow each other: the next one is begun while the last batches of this one are used, and nothing else
is different."""

import time

import pytest
from fake_clips import FakeDecoder, GatedDecoder, make_loader, summarize, take_epoch


def take_epochs(epochs, **options):
    """The batches of each epoch, loaded by themselves."""
    loader = make_loader(FakeDecoder(bad=[4]), **options)
    expected = [summarize(take_epoch(loader, epoch)) for epoch in range(epochs)]
    loader.close()
    return expected


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("prefetch", [0, 1, 5, 20])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_those_of_epochs_loaded_by_themselves(prefetch, drop_last):
    options = {"sampler_options": {"drop_last": drop_last, "rank": 1, "world_size": 3}}
    expected = take_epochs(4, **options)
    loader = make_loader(FakeDecoder(bad=[4]), prefetch=prefetch, **options)
    assert [summarize(loader.iterate(epoch, 0)) for epoch in range(4)] == expected
    # Resumed within an epoch, at its end, and at the start of one that is not the next.
    for epoch, steps in ((0, 1), (2, 0), (1, len(expected[1])), (2, 0), (1, 0), (3, 0)):
        assert summarize(loader.iterate(epoch, 3 * steps)) == expected[epoch][steps:]
    loader.close()


def test_the_next_epoch_is_begun_while_the_last_batches_are_used():
    expected = take_epochs(2)
    decoder = GatedDecoder(bad=[4])
    loader = make_loader(decoder, prefetch=2)
    batches = loader.iterate(0, 0)
    first = [next(batches) for _ in expected[0]]
    of_epoch = len(decoder.requests)
    wait_for(lambda: len(decoder.requests) > of_epoch)
    time.sleep(0.1)
    decoder.gate.clear()
    assert list(batches) == [] and summarize(first) == expected[0]
    batches = loader.iterate(1, 0)
    assert next(batches).epoch == 1, "without any decoding"
    decoder.gate.set()
    assert summarize(batches) == expected[1][1:]
    loader.close()


@pytest.mark.parametrize(
    "how",
    ["left in an epoch", "left in other micro-batches", "left between epochs", "other epoch", "other micro-batches"],
)
def test_no_thread_is_left(how, count_begun_threads):
    loader = make_loader(FakeDecoder(), prefetch=1)
    if how.startswith("left in"):
        batches = loader.iterate(0, 0) if how == "left in an epoch" else loader.load(loader.sampler.iterate(0, 0))
        next(batches)
        batches.close()
        assert count_begun_threads() == 0
    else:
        assert len(list(loader.iterate(0, 0))) == 8
        assert count_begun_threads() == 1, "it has begun epoch 1"
    if how == "other epoch":
        assert {batch.epoch for batch in loader.iterate(2, 0)} == {2}
        assert count_begun_threads() == 1
    if how == "other micro-batches":
        assert {batch.epoch for batch in take_epoch(loader)} == {0}
        assert count_begun_threads() == 0
        assert {batch.epoch for batch in loader.iterate(1, 0)} == {1}, "it is begun anew"
    loader.close()
    assert count_begun_threads() == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_next_epoch_comes_when_it_is_reached(prefetch):
    class Failing(FakeDecoder):
        def decode(self, requests):
            if len(self.requests) >= 16:
                raise ZeroDivisionError("in the decoder")
            return super().decode(requests)

    loader = make_loader(Failing(), prefetch=prefetch)
    assert len(list(loader.iterate(0, 0))) == 8
    with pytest.raises(ZeroDivisionError, match="in the decoder"):
        list(loader.iterate(1, 0))
    loader.close()


def test_epochs_without_a_batch_are_not_run_through():
    """A thread that looked for a batch ahead would plan epochs for ever."""
    loader = make_loader(FakeDecoder(), prefetch=2)
    asked = []

    def iterate(epoch, consumed):
        asked.append(epoch)
        return iter(())

    loader.sampler.iterate = iterate
    assert list(loader.iterate(0, 0)) == []
    wait_for(lambda: len(asked) > 3)
    time.sleep(0.1)
    assert asked == [0, 1, 2, 3]
    assert list(loader.iterate(1, 0)) == []
    loader.close()
