"""Controllers that are trained apart and joined."""

import dataclasses

import pytest
import torch
from helpers_meta_training import TINY, little

from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.optim.controller import ControllerConfig, joined
from meta_train.members import train_members

TWO = dataclasses.replace(
    TINY, members=2, outer_steps=3, controller=ControllerConfig("none", hidden=3)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An empty folder: images are then those of the packaged sample."""
    return tmp_path_factory.mktemp("data")


def weights_of(path):
    return load_checkpoint(path).controller.vector()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("members")
    with little():
        return out, train_members(TWO, out, data)


def test_members_are_trained_by_seeds_of_their_own_and_joined(trained):
    out, result = trained
    members = [load_checkpoint(out / f"member-{i}" / "checkpoint.safetensors") for i in (0, 1)]
    found = load_checkpoint(result.checkpoint)
    assert found.controller.config.hidden == 6
    expected = joined([member.controller for member in members])
    assert torch.equal(found.controller.vector(), expected.vector())
    assert not torch.equal(*(member.controller.vector() for member in members))
    assert [m.provenance["config"]["seed"] for m in members] == [0, 1]
    assert found.provenance["config"] == dataclasses.asdict(TWO)
    assert found.provenance["outer_steps"] == result.steps == 6
    assert result.finished


def test_members_of_another_seed_are_others(trained, data, tmp_path):
    other = dataclasses.replace(TWO, seed=1, outer_steps=1)
    with little():
        train_members(other, tmp_path, data)
    seeds = [
        load_checkpoint(tmp_path / f"member-{i}" / "checkpoint.safetensors").provenance["config"][
            "seed"
        ]
        for i in (0, 1)
    ]
    assert seeds == [2, 3]


def test_a_resumed_run_leaves_members_that_are_done(trained, data, tmp_path):
    out, result = trained
    first = out / "member-0" / "checkpoint.safetensors"
    written, joined_before = first.stat().st_mtime_ns, weights_of(result.checkpoint)
    second = out / "member-1"
    for path in second.iterdir():  # as if the run had been killed between the two
        path.unlink()
    with little():
        again = train_members(TWO, out, data, resume=True)
    assert first.stat().st_mtime_ns == written
    assert torch.equal(weights_of(again.checkpoint), joined_before)


def test_members_whose_messages_cannot_be_joined_are_refused(data, tmp_path):
    config = dataclasses.replace(TWO, controller=ControllerConfig("attention"))
    with pytest.raises(ValueError, match="members: expected 1 with the reader 'attention'"):
        train_members(config, tmp_path, data)


def test_one_member_is_a_run_in_the_folder_itself(data, tmp_path):
    with little():
        result = train_members(dataclasses.replace(TWO, members=1, outer_steps=1), tmp_path, data)
    assert result.checkpoint == tmp_path / "checkpoint.safetensors"
    assert load_checkpoint(result.checkpoint).controller.config.hidden == 3
