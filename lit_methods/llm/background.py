"""Work in daemon threads: an interrupted process waits for none of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


def in_background(function: Callable[[], Result]) -> "Future[Result]":
    """Start a function; ``result()`` waits for it and raises what it raised.

    Unlike ``ThreadPoolExecutor``, neither Ctrl-C during ``result()`` nor the end of the process waits for the thread.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def map_in_background(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Results of a function in the order of its arguments, so many at a time; an error stops what has not begun."""
    todo: SimpleQueue[int] = SimpleQueue()
    results: dict[int, Result] = {}
    for index in range(len(items)):
        todo.put(index)

    def work() -> None:
        while True:
            try:
                index = todo.get_nowait()
            except Empty:
                return
            try:
                results[index] = function(items[index])
            except BaseException:
                while not todo.empty():
                    todo.get_nowait()
                raise

    for thread in [in_background(work) for _ in range(min(workers, len(items)))]:
        thread.result()
    return [results[index] for index in range(len(items))]
