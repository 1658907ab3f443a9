import time

import pytest
import torch

from opensora_fast.train.step.host_values import HostValues
from opensora_fast.train.step.randomness import seed_step


def draw(*key):
    seed_step(*key)
    return torch.randn(8), torch.randint(0, 1000, (8,))


def test_draws_depend_on_seed_step_and_rank_only():
    first = draw(42, 7, 0)
    torch.randn(1000)
    again = draw(42, 7, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [draw(42, 8, 0), draw(43, 7, 0), draw(42, 7, 1), draw(7, 42, 0)]
    assert all(not torch.equal(first[0], other[0]) for other in others)


def test_the_seed_of_a_step_has_64_bits_and_is_the_same_in_all_versions():
    """Of 32 bits, some steps of a long run on many processes would share theirs."""
    seed_step(42, 7, 0)
    assert torch.initial_seed() == 8400447655315631758


def test_host_values():
    values = HostValues(torch.tensor(1.5, requires_grad=True), torch.tensor([2.0]), torch.tensor(3, dtype=torch.int32))
    assert values.get() == [1.5, 2.0, 3.0]
    assert not values._host.requires_grad  # it would keep the history of the step


def test_host_values_are_waited_for_as_long_as_it_takes_within_the_limit():
    class Late:
        """An event of a device that is still computing when it is first asked."""

        asked = 0

        def query(self):
            self.asked += 1
            return self.asked > 2

    values = HostValues(torch.tensor(1.5))
    values._event = Late()
    assert values.get(seconds=5) == [1.5] and values._event.asked == 3


def test_host_values_that_never_come_are_given_up_after_the_limit_and_not_before():
    class Never:
        """An event of a device that waits for a process that is lost."""

        def query(self):
            return False

    values = HostValues(torch.tensor(1.5))
    values._event = Never()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="has not computed it within 0.2 seconds"):
        values.get(seconds=0.2)
    assert time.monotonic() - started >= 0.2
