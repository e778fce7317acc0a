import threading
from concurrent.futures import Future

from trainer.media_check import ClipPrefetch


class Started:
    """Records what was started; no future is ever done."""

    def __init__(self):
        self.names, self.futures = [], {}

    def __call__(self, name):
        self.names.append(name)
        self.futures[name] = Future()
        return self.futures[name]


def test_work_is_started_in_order_and_no_further_than_the_limit():
    started = Started()
    prefetch = ClipPrefetch(started, limit=2)
    prefetch.expect("abcd")
    assert started.names == ["a", "b"]
    assert prefetch.take("a") is started.futures["a"]
    assert started.names == ["a", "b", "c"]


def test_what_was_not_expected_is_started_when_it_is_taken():
    started = Started()
    prefetch = ClipPrefetch(started, limit=1)
    prefetch.expect("ab")
    assert prefetch.take("b") is started.futures["b"]
    prefetch.take("z")
    assert started.names == ["a", "b", "z"]


def test_a_name_taken_twice_is_worked_on_twice():
    started = Started()
    prefetch = ClipPrefetch(started, limit=3)
    prefetch.expect(["a", "a"])
    assert started.names == ["a"]
    assert prefetch.take("a") is not prefetch.take("a")
    assert started.names == ["a", "a"]


def test_a_new_expectation_keeps_what_it_shares_and_gives_up_the_rest():
    started = Started()
    prefetch = ClipPrefetch(started, limit=2)
    prefetch.expect("ab")
    prefetch.expect("bc")
    assert started.futures["a"].cancelled()
    assert started.names == ["a", "b", "c"]
    assert prefetch.take("b") is started.futures["b"]


def test_takers_of_many_threads_all_get_their_own():
    started = Started()
    prefetch = ClipPrefetch(started, limit=4)
    names = [str(number) for number in range(64)]
    prefetch.expect(names)
    taken = {}
    threads = [threading.Thread(target=lambda n=name: taken.__setitem__(n, prefetch.take(n))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(started.names) == sorted(names)
    assert all(taken[name] is started.futures[name] for name in names)
