import sys
import threading
import time

import pytest

from ckptcache.storage.behind import IN_HAND, behind


def refuse_threads(monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)


@pytest.fixture(params=[True, False], ids=["with a thread", "without"])
def threads(request, monkeypatch):
    if not request.param:
        refuse_threads(monkeypatch)
    return request.param


def test_all_is_done_in_order_by_the_end(threads):
    done = []
    with behind(done.append) as put:
        for number in range(100):
            put(number)
    assert done == list(range(100))


def test_the_caller_goes_on_while_the_work_is_done():
    entered, release, done = threading.Event(), threading.Event(), []

    def work(item):
        entered.set()
        assert release.wait(10)
        done.append(item)

    with behind(work) as put:
        put(1)
        assert entered.wait(10)
        put(2)
        assert done == []
        release.set()
    assert done == [1, 2]


def test_so_many_buffers_used_in_turn_are_never_filled_while_they_are_needed():
    buffers, seen = [[None] for _ in range(IN_HAND)], []

    def slow(buffer):
        time.sleep(0.001)
        seen.append(tuple(buffer))

    with behind(slow) as put:
        for number in range(200):
            buffer = buffers[number % IN_HAND]
            buffer[0] = number
            put(buffer)
    assert seen == [(number,) for number in range(200)]


def test_what_fails_is_told_once_and_nothing_is_done_after_it(threads):
    done, before = [], threading.active_count()

    def work(item):
        if item == 3:
            raise OSError("full")
        done.append(item)

    with pytest.raises(OSError, match="full"), behind(work) as put:
        for number in range(100):
            put(number)
    assert done == [0, 1, 2]
    assert threading.active_count() == before


def test_what_fails_last_is_told_at_the_end():
    with pytest.raises(ZeroDivisionError), behind(lambda item: 1 / item) as put:
        put(0)


def test_a_caller_that_fails_is_heard_and_leaves_no_thread(threads):
    done, before = [], threading.active_count()
    with pytest.raises(KeyError), behind(done.append) as put:
        put(1)
        raise KeyError
    assert done == [1]
    assert threading.active_count() == before


def interrupted_at(number, body) -> bool:
    """Run `body` with an interrupt before the line of that number that is the worker's; whether it came.

    Not within threading's own lines: unlike a signal, a trace may come there before a lock is given back.
    """
    file, left = behind.__wrapped__.__code__.co_filename, [number]

    def trace(frame, event, _):
        if frame.f_code.co_filename == file and event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        body()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_whatever_line_is_interrupted_no_thread_is_left_and_nobody_waits():
    def body():
        with behind(lambda _: None) as put:
            for item in range(4):
                time.sleep(0.001)  # by then the worker waits for it
                put(item)

    number = 1
    while interrupted_at(number, body):
        number += 1
        deadline = time.monotonic() + 5
        # One that was interrupted before it was started is listed too, and never runs.
        while any(t.name == "ckptcache-behind" and t.ident is not None for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.0001)
    assert number > 20
