"""The play-out clock: closed forms."""

import pytest
from streamvid.app.playout import PlayoutClock


def test_it_runs_in_real_time_from_the_first_chunk_on_and_stops_where_nothing_is_made():
    clock = PlayoutClock()
    assert clock.position(100.0) == 0.0
    clock.extend(0.75, now=100.0)
    assert clock.position(100.5) == 0.5 and clock.ahead(100.5) == 0.25
    assert clock.position(103.0) == 0.75  # starved
    clock.extend(1.5, now=103.0)
    assert clock.position(103.25) == 1.0  # goes on from where it stood, no jump


def test_a_report_sets_it_right_and_its_rate_counts():
    clock = PlayoutClock()
    clock.extend(10.0, now=0.0)
    clock.report(2.0, rate=0.5, now=1.0)
    assert clock.position(3.0) == 3.0
    assert clock.seconds_until(ahead=5.0, now=3.0) == pytest.approx(4.0)  # 2 s too much, at half speed
    clock.report(99.0, rate=1.0, now=3.0)
    assert clock.position(3.0) == 10.0  # nobody sees what is not made


def test_a_pause_holds_it():
    clock = PlayoutClock(start=5.0)
    clock.extend(8.0, now=0.0)
    clock.hold(now=1.0)
    assert clock.position(50.0) == 6.0 and clock.seconds_until(1.0, 50.0) is None
    clock.release(now=60.0)
    assert clock.position(61.0) == 7.0
