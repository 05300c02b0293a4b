import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from pipeline.batches.prefetch import Prefetcher


class OpenFile:
    """An opened object of a class, because weak references need one."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_wanted_files_are_opened_ahead_and_once():
    opened_numbers: list[int] = []
    ahead = Prefetcher(lambda number: opened_numbers.append(number) or OpenFile(number), threads=1)
    ahead.want([5, 3, 9])
    assert ahead[9].number == 9 and opened_numbers == [5, 3, 9]
    ahead.want([9, 3])
    assert ahead[3].number == 3 and ahead[4].number == 4 and opened_numbers == [5, 3, 9, 4]


def test_files_that_are_no_longer_wanted_are_freed():
    ahead = Prefetcher(OpenFile, threads=2)
    first, second = weakref.ref(ahead[1]), weakref.ref(ahead[2])
    ahead.want([2, 3])
    assert ahead[3].number == 3
    gc.collect()
    assert first() is None and second() is not None


def test_a_file_that_is_freed_before_its_turn_is_not_opened():
    opened_numbers, may_open = [], threading.Event()

    def open_number(number: int) -> int:
        may_open.wait(10)
        opened_numbers.append(number)
        return number

    ahead = Prefetcher(open_number, threads=1)
    ahead.want(range(20))
    time.sleep(0.1)  # the first is being opened
    ahead.want([7])
    may_open.set()
    assert ahead[7] == 7 and opened_numbers == [0, 7]


def test_a_failed_file_is_retried_when_it_is_read():
    tries: list[int] = []

    def open_number(number: int) -> int:
        tries.append(number)
        if len(tries) < 3:
            raise ConnectionError("gone")
        return number

    ahead = Prefetcher(open_number)
    ahead.want([1])
    while not tries:
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(ConnectionError, match="gone"):
        ahead[1]
    assert ahead[1] == 1 and len(tries) == 3


def test_threads_end_with_their_prefetcher():
    before = set(threading.enumerate())
    ahead = Prefetcher(OpenFile, threads=3)
    ahead.want(range(5))
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    del ahead
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_program_does_not_wait_for_unused_files():
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import time\nfrom pipeline.batches.prefetch import Prefetcher\n"
                    "Prefetcher(lambda number: time.sleep(30)).want(range(8))"], check=True, timeout=60)
    assert time.monotonic() - begin < 25
