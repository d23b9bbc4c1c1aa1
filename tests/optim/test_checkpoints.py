"""The paper's rules load by path, refuse what they are not, and are never half written."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load, save
from support.optimizers import controller_file, random_checkpoint
from support.rules import random_rule

from l2o_graph import NGOptimizer, PaperOptimizer
from l2o_graph.paper.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from l2o_graph.paper.features import FEATURE_VERSION
from l2o_graph.paper.rule import PAPER, RuleConfig, UpdateRule

SMALL = RuleConfig(hidden=8, layers=2, inner=8)


@pytest.fixture
def path(tmp_path):
    return random_checkpoint(tmp_path)


def parts(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a file, to be put together in another way."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return load(content), json.loads(content[8 : 8 + length])["__metadata__"]


def rewritten(path, **header):
    """The file with other entries in its header; None takes one out."""
    tensors, metadata = parts(path)
    metadata = {key: text for key, text in {**metadata, **header}.items() if text is not None}
    path.write_bytes(save(tensors, metadata))
    return path


def refused(path, match: str) -> None:
    """Both ways in say the same, and name the file."""
    for use in (load_checkpoint, lambda p: PaperOptimizer([torch.ones(2)], checkpoint=p)):
        with pytest.raises(ValueError, match=match) as caught:
            use(path)
        assert str(path) in str(caught.value)


# What loads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, RuleConfig("ff", hidden=8, layers=1, inner=4)])
def test_a_rule_comes_back_as_it_was_saved(config, tmp_path):
    rule, path = random_rule(config).float(), tmp_path / "deep" / "down" / "rule.safetensors"
    provenance = {"steps": 3, "data": "none", "curve": [1.5, 0.5]}
    save_checkpoint(path, rule, provenance)
    for given in (path, str(path)):
        checkpoint = load_checkpoint(given)
        assert checkpoint.rule.config == config and checkpoint.provenance == provenance
        theirs, ours = checkpoint.rule.state_dict(), rule.state_dict()
        assert list(theirs) == list(ours)
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)
        assert not any(p.requires_grad for p in checkpoint.rule.parameters())


def test_a_file_in_the_working_directory_needs_no_suffix(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    (path.parent / "mine").write_bytes(path.read_bytes())
    assert load_checkpoint("mine").identity.startswith("mine@")


def test_identity_follows_from_the_content(tmp_path):
    one, other = random_checkpoint(tmp_path, 0), random_checkpoint(tmp_path, 1)
    again = tmp_path / "again.safetensors"
    again.write_bytes(one.read_bytes())
    digest = {
        path: load_checkpoint(path).identity.partition("@")[2] for path in (one, other, again)
    }
    assert digest[one] == digest[again] != digest[other]


def test_weights_are_float32_on_the_cpu_whatever_was_saved_and_whatever_is_default(tmp_path):
    path = tmp_path / "double.safetensors"
    save_checkpoint(path, random_rule(SMALL).double(), {})
    tensors, metadata = parts(path)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    path.write_bytes(save({key: t.double() for key, t in tensors.items()}, metadata))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            checkpoint = load_checkpoint(path)
    finally:
        torch.set_default_dtype(torch.float32)
    for p in checkpoint.rule.parameters():
        assert p.dtype == torch.float32 and p.device.type == "cpu"


def test_loading_draws_no_random_numbers(path):
    before = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_needs_no_pickle(path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert isinstance(load_checkpoint(path), Checkpoint)


# What does not ---------------------------------------------------------------------------------


def test_a_controller_is_no_rule_and_a_rule_no_controller(path, tmp_path):
    folder = tmp_path / "controllers"
    folder.mkdir()
    other = controller_file(folder)
    refused(other, "found 'l2o_graph controller': not a learned optimizer of the paper's")
    with pytest.raises(ValueError, match="a file of --preset paper, which is for PaperOptimizer"):
        NGOptimizer([torch.ones(2)], checkpoint=path)


def test_the_rule_of_before_is_refused(path):
    """A file of the nominal rule, with options that there are no more."""
    config = '{"preset": "nominal", "hidden": 16, "layers": 2, "inner": 8, "model": "ng_gnn"}'
    refused(rewritten(path, feature_version="2", config=config), "expected feature version 3, .* 2")
    refused(rewritten(path, feature_version="3"), "expected a RuleConfig .*preset")


@pytest.mark.parametrize("as_text", [True, False])
def test_missing_file(as_text, tmp_path):
    missing = tmp_path / "gone.safetensors"
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors': expected a file, found none"):
        load_checkpoint(str(missing) if as_text else missing)
    with pytest.raises(FileNotFoundError, match="expected a file, found none"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_truncated_file(kept, path):
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "expected a whole safetensors file, found: ")


def test_file_of_another_format(tmp_path):
    path = tmp_path / "pickled.safetensors"
    torch.save({"weight": torch.ones(3)}, path)
    refused(path, "expected a whole safetensors file, found: ")
    path.write_text("not a checkpoint at all, only some text\n" * 10)
    refused(path, "expected a whole safetensors file, found: ")


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_foreign_safetensors_file(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"weight": torch.ones(3)}, header))
    found = "None" if header is None else "'pt'"
    refused(path, rf"expected format 'l2o_graph learned optimizer'.*found {found}: not a learned")


@pytest.mark.parametrize("version", ["0", "99", None])
def test_other_feature_version(version, path):
    expected = rf"feature version {FEATURE_VERSION}, .*found {version}"
    refused(rewritten(path, feature_version=version), expected)


@pytest.mark.parametrize(
    "config, found",
    [
        (None, "KeyError"),
        ("{", "JSONDecodeError"),
        ("[8, 2]", "TypeError"),
        ("7", "TypeError"),
        ('{"depth": 3}', "depth"),
        ('{"preset": "paper"}', "preset"),
        ('{"model": "gnn"}', "'gnn'"),
        ('{"hidden": 0}', "hidden: expected at least 1, found 0"),
        ('{"layers": -1}', "layers: expected at least 1, found -1"),
        ('{"inner": "8"}', "inner"),
        ('{"hidden": 8.5}', "hidden"),
    ],
)
def test_configuration_that_makes_no_rule(config, found, path):
    refused(rewritten(path, config=config), f"(?s)expected a RuleConfig .*{found}")


@pytest.mark.parametrize("provenance", [None, "{"])
def test_unreadable_provenance(provenance, path):
    refused(rewritten(path, provenance=provenance), "expected a RuleConfig and a provenance")


def test_tensors_that_do_not_fit_the_configuration(path):
    tensors, metadata = parts(path)
    first = next(iter(tensors))
    missing = {key: t for key, t in tensors.items() if key != first}
    extra = {**tensors, "surplus": torch.ones(2)}
    other = {**tensors, first: torch.ones(2, 3, 4)}
    for wrong, found in [
        (missing, f"Missing key.*{first}"),
        (extra, "Unexpected key.*surplus"),
        (other, f"size mismatch for {first}"),
    ]:
        path.write_bytes(save(wrong, metadata))
        refused(path, f"(?s)expected the tensors of RuleConfig.model='ng_gnn'.*{found}")
    path.write_bytes(save(tensors, metadata))
    refused(
        rewritten(path, config='{"hidden": 16, "layers": 2, "inner": 8}'),
        "(?s)hidden=16.*size mismatch",
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(bad, path):
    tensors, metadata = parts(path)
    tensors["head.layers.4.bias"][1] = bad
    path.write_bytes(save(tensors, metadata))
    refused(path, r"expected finite weights, found others in \['head.layers.4.bias'\]")


# Saving ----------------------------------------------------------------------------------------


def broken_disk(monkeypatch):
    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()
    rule = random_rule(SMALL, seed=5)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(path, rule, {"when": object()})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        broken_disk(patch)
        save_checkpoint(path, rule, {})
    rule.head.layers[-1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite weights, found others in \['head.lay"):
        save_checkpoint(path, rule, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    load_checkpoint(path)


def test_a_save_onto_a_directory_or_below_a_file(path):
    folder = path.parent / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        save_checkpoint(folder, random_rule(SMALL), {})
    with pytest.raises(OSError, match=path.name):
        save_checkpoint(path / "below.safetensors", random_rule(SMALL), {})
    assert sorted(path.parent.iterdir()) == sorted([folder, path])


def test_a_save_replaces_the_old_file(path):
    before = load_checkpoint(path)
    save_checkpoint(path, random_rule(SMALL, seed=5), {"now": "other"})
    after = load_checkpoint(path)
    assert after.identity != before.identity and after.provenance == {"now": "other"}
    assert list(path.parent.iterdir()) == [path]


def test_saving_does_not_touch_the_rule(tmp_path):
    rule = UpdateRule(SMALL).double()
    save_checkpoint(tmp_path / "rule.safetensors", rule, {})
    assert all(p.requires_grad and p.dtype == torch.float64 for p in rule.parameters())


def test_the_published_rule_fits_through_a_file(tmp_path):
    path = tmp_path / "paper.safetensors"
    save_checkpoint(path, UpdateRule(PAPER["ng_gnn"]), {})
    assert load_checkpoint(path).rule.config == PAPER["ng_gnn"]
