"""The first signal lets a run stop by itself, and afterwards signals do what they did before."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from opensora_fast.train.stop import StopSignals


@pytest.fixture(autouse=True)
def as_in_a_shell():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_is_noted_and_the_second_acts():
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_they_act_as_before_when_a_run_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_in_another_thread_leaves_them_to_the_main_thread():
    def run():
        with StopSignals() as stop:
            return stop.received, signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor() as pool:
        assert pool.submit(run).result() == (None, signal.default_int_handler)
