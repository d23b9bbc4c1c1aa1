"""What several test files share."""

import pytest
import torch
from helpers_ranks import Ranks
from hypothesis import settings
from torch import nn

from l2o_graph.rule import RuleConfig, UpdateRule

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


def random_rule(config: RuleConfig, seed: int = 0) -> UpdateRule:
    """A float64 rule with noise on every weight, so that nothing is as it is at the start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = UpdateRule(config).double()
        for p in rule.parameters():
            fan_in = p.shape[1] if p.dim() > 1 else 10
            p.data += torch.randn(p.shape, dtype=p.dtype) / fan_in**0.5
    return rule


def random_like(tensors, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Normal tensors of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=dtype) for t in tensors]


def paper_cnn(inputs: int, hidden: int) -> nn.Sequential:
    """The network that Kofinas et al. 2024, section 4.3, train."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(hidden, 2 * hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * hidden, 10),
    )
