"""Where work is done: devices, and processes of one thread that end with who started them."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from typing import TypeVar

import torch

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def check_device(device: str) -> None:
    """Refuse a device that torch cannot work on, by a ValueError with torch's reason."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: cannot use '{device}' ({reason})") from error


def in_parallel(
    work: Callable[[Item], Answer], items: Sequence[Item], jobs: int
) -> Iterator[Answer]:
    """Answers as they come, the same to the bit for any number of jobs: each of one thread.

    Where the caller is stopped or killed, so are the processes.

    Args:
        work: What is done with each item; a function that can be pickled.
        items: Started in this order.
        jobs: Processes; 1 for this one, where the order of the answers is that of the items.

    Raises:
        BrokenProcessPool: When a process is killed.
    """
    if jobs == 1 or not items:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(work, items)
        finally:
            torch.set_num_threads(threads)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(items)), get_context("spawn"), initializer=_begin_as_worker
    )
    try:
        # No more than are worked on: what is queued would be begun after an interrupt.
        waiting = iter(items)
        running = {pool.submit(work, item) for item in itertools.islice(waiting, jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(work, item) for item in itertools.islice(waiting, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin_as_worker() -> None:
    torch.set_num_threads(1)
    # An interrupt from the keyboard reaches all processes; a worker has nothing to say about it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A worker waits for work for ever where the parent was killed and cannot tell it to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
