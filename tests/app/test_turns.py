"""Turns: few at a time, the most urgent first."""

import threading

from server import wait_for
from streamvid.app.turns import Turns


def test_the_most_urgent_waiter_is_next_and_never_two_at_once():
    turns, order, inside = Turns(), [], []

    def work(deadline):
        with turns.turn(deadline):
            inside.append(deadline)
            assert len(inside) == 1
            order.append(deadline)
            inside.remove(deadline)

    with turns.turn(0.0):
        threads = [threading.Thread(target=work, args=(deadline,)) for deadline in (5.0, 2.0, 9.0, 3.0)]
        for count, thread in enumerate(threads, start=1):
            thread.start()
            wait_for(lambda count=count: len(turns._waiting) == count)
    for thread in threads:
        thread.join(5)
    assert order == [2.0, 3.0, 5.0, 9.0]


def test_places_are_filled_and_given_on():
    turns, inside, together = Turns(2), set(), []
    go_on = threading.Event()

    def work(number):
        with turns.turn(number):
            inside.add(number)
            together.append(set(inside))
            go_on.wait(30)
            inside.discard(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(inside) == 2 and len(turns._waiting) == 2)
    go_on.set()
    for thread in threads:
        thread.join(5)
    assert max(map(len, together)) == 2 and len(together) == 4
    with turns.turn(0.0), turns.turn(0.0):  # all places are free again
        pass


def test_an_error_in_a_turn_passes_it_on():
    turns = Turns()
    for _ in range(2):
        try:
            with turns.turn(0.0):
                raise ValueError
        except ValueError:
            pass
    with turns.turn(0.0):
        pass
