"""Two processes of one group on gloo, to call functions in."""

import multiprocessing
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = range(2)
# However busy a machine is: whoever waits for a process that has failed is ended before.
LIMIT = timedelta(hours=1)


class Ranks:
    """Processes that stay for many calls.

    Args:
        folder: Where they meet.
    """

    def __init__(self, folder: Path):
        self._folder, self._numbers, self._pools = folder, count(), []

    def call(self, work, *args, **options):
        """Call a function in both; what each of them answered.

        Where one of them fails the other, which would wait for it, is ended; the next call starts
        both anew.
        """
        if not self._pools:
            store, context = self._folder / f"store-{next(self._numbers)}", "spawn"
            self._pools = [
                ProcessPoolExecutor(
                    1, multiprocessing.get_context(context), initializer=_join,
                    initargs=(rank, store),
                )
                for rank in RANKS
            ]  # fmt: skip
        answers = [pool.submit(work, *args, **options) for pool in self._pools]
        wait(answers, return_when=FIRST_EXCEPTION)
        failed = [a.exception() for a in answers if a.done() and a.exception() is not None]
        if failed:
            self.end(kill=True)
            raise failed[0]
        return [answer.result() for answer in answers]

    def end(self, kill: bool = False) -> None:
        """End both."""
        for pool in self._pools:
            for process in pool._processes.values() if kill else ():
                process.kill()
            pool.shutdown()
        self._pools = []


def _join(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", f"file://{store}", LIMIT, len(RANKS), rank)
    torch.set_num_threads(1)
