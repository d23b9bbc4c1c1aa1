"""In a process that a test will stop: it waits at a place until the test has done so.

Only then is what was done until the stop the same on a machine that is busy.
"""

import itertools
import sys

READY = "ready to be stopped"


def wait():
    """Say that all is ready, and wait for the end of the input."""
    # Commands may have put a file in the place of their output.
    print(READY, file=sys.__stdout__, flush=True)
    sys.__stdin__.read()


def before(owner, name, count):
    """Wait before the call of this number, from 1, of a function of a class or a module."""
    whole, calls = getattr(owner, name), itertools.count(1)

    def held(*args, **kwargs):
        if next(calls) == count:
            wait()
        return whole(*args, **kwargs)

    setattr(owner, name, held)


def after_answer(owner, name, count):
    """Wait behind the answer of this number, from 1, of a generator."""
    whole = getattr(owner, name)

    def held(*args, **kwargs):
        for number, answer in enumerate(whole(*args, **kwargs), 1):
            yield answer
            if number == count:
                wait()

    setattr(owner, name, held)
