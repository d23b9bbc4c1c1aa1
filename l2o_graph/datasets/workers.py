"""Devices, and pools of single-threaded processes that end with their parent."""

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
Output = TypeVar("Output")


def check_device(device: str) -> None:
    """Raise a ValueError for a device that torch cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: cannot use '{device}' ({reason})") from error


def in_parallel(
    work: Callable[[Item], Output], items: Sequence[Item], jobs: int
) -> Iterator[Output]:
    """Map a function over items in parallel, and yield results as they are finished.

    Every process has one thread, so results are bit-identical for any number of jobs. The processes
    end if the caller is stopped or killed.

    Args:
        work: Function of an item; has to be picklable.
        items: Items, which are started in this order.
        jobs: Number of processes. With 1, this process does the work, in the order of the items.

    Raises:
        BrokenProcessPool: If a process is killed.
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
        # One item per process: queued items would still be started after an interrupt.
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
    # Ctrl-C reaches all processes; a worker should end without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Otherwise a worker would wait for work forever after its parent was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
