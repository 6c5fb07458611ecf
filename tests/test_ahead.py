"""Working ahead: so many results and no more, and whoever waits for one can give up on a producer that hangs."""

import threading

import pytest
from run_tools import wait_until

from kdjax.training.ahead import Ahead


@pytest.mark.parametrize("depth", [0, 2])
def test_results_come_in_order_and_no_more_are_made_than_wanted(depth):
    made = []

    def produce():
        made.append(len(made))
        return made[-1]

    ahead = Ahead(produce, depth)
    for taken in range(4):
        wait_until(lambda taken=taken: len(made) == taken + depth, 5)
        assert ahead.take(lambda: False) == taken
    wait_until(lambda: len(made) == 4 + depth, 5)
    ahead.join()
    assert made == list(range(4 + depth))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_producer_that_hangs_is_given_up_and_one_that_fails_is_heard(depth):
    goes_on = threading.Event()

    def produce():
        assert goes_on.wait(30)
        raise OSError("no space")

    ahead = Ahead(produce, depth)
    assert ahead.take(lambda: True) is None
    goes_on.set()
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            ahead.take(lambda: False)
