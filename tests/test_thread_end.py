"""The threads that the end of the program waits for: those that computed and are there, and no others."""

from __future__ import annotations

import threading

from arcee_mlx import thread_end
from arcee_mlx.thread_end import wait_for_ended_threads, wait_for_this_thread_at_exit


def test_a_thread_is_known_once_and_forgotten_when_it_is_gone() -> None:
    def work() -> None:
        for _ in range(3):
            wait_for_this_thread_at_exit()
        assert list(thread_end._threads.values()).count(threading.current_thread()) == 1

    for _ in range(50):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        wait_for_ended_threads()
    assert sum(not thread.is_alive() for thread in thread_end._threads.values()) <= 1


def test_a_thread_with_the_number_of_one_that_is_gone_is_known_by_itself() -> None:
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()

    def work() -> None:
        native_id = threading.get_native_id()
        thread_end._threads[native_id] = gone
        wait_for_this_thread_at_exit()
        assert thread_end._threads[native_id] is threading.current_thread()

    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_the_main_thread_is_not_waited_for() -> None:
    wait_for_this_thread_at_exit()
    assert threading.main_thread() not in thread_end._threads.values()
