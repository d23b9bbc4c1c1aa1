"""What several test files share."""

import jaxtyping
import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("support")

from support.checks import at_less_cost  # noqa: E402  as nothing of it may come before that line

# Before anything is imported that is checked; where it comes too late, checks are but slower.
jaxtyping.jaxtyped = at_less_cost(jaxtyping.jaxtyped)

from support.ranks import Ranks  # noqa: E402  whose assertions then tell what they found

# Small tensors gain nothing from a second thread, and wait for it where others use the cores.
torch.set_num_threads(1)

# The same examples every time: a failure on one machine is a failure on all.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_report_header() -> str:
    """What the tests ran on."""
    return f"torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def on_both(tmp_path_factory):
    """Call a function in two processes of one group; what each of them answered."""
    ranks = Ranks(tmp_path_factory.mktemp("group"))
    yield ranks.call
    ranks.end()
