"""INRClassifier and INREditor: published sizes, slow twins, symmetry, and what they refuse."""

import itertools
import json
import math
import struct

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from support import dense_twin, reference, slow_ng_t
from support.graphs import assert_same_with_gradients
from support.optimizers import random_checkpoint
from support.slow_ng_t import LargestTensor, noisy
from torch import Tensor, nn

from l2o_graph import INRClassifier, INREditor
from l2o_graph.datasets.inr.siren import OMEGA0, responses
from l2o_graph.inr import (
    INRModelConfig,
    evaluate,
    initialise,
    inr_config,
    list_inr_models,
    load_inr_model,
    save_inr_model,
    statistics_of,
)
from l2o_graph.layout.blocks import topology_of
from l2o_graph.metanets.statistics import Statistics
from l2o_graph.paper.checkpoints import load_checkpoint

LAYOUT = (2, 3, 4, 2)
MODELS = {
    "ng_gnn": {"model": "ng_gnn", "hidden": 4},
    "ng_t": {"model": "ng_t", "hidden": 8, "heads": 2},
    "ng_t, axial": {"model": "ng_t", "hidden": 8, "heads": 2, "axial": True},
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
BOTH_TASKS = pytest.mark.parametrize("task", ["classify", "edit"])


def inrs(count: int, layout=LAYOUT, seed: int = 0, dtype=torch.float64):
    """Networks with the spread of fitted ones, some weights exactly 0."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    weights, biases = initialise(generators, layout, output="linear")
    for w, b in zip(weights, biases, strict=True):
        b += 0.02 * torch.stack([torch.randn(b.shape[1], generator=g) for g in generators])
        w[:, 0, 0] = 0
    return [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]


def made(name: str, task: str = "classify", layout=LAYOUT, **changes):
    """A small float64 model without dropout, with noise on every weight."""
    options = {"layers": 3, "layout": layout, "classes": 3, "dropout": 0.0, **MODELS[name]}
    config = inr_config(task=task, **options | changes)
    statistics = statistics_of(*inrs(20, layout, seed=100)) if config.normalise else None
    torch.manual_seed(4)  # with some others no unit of a head this small is ever active
    model = {"classify": INRClassifier, "edit": INREditor}[task](config, statistics)
    return noisy(model)


def flat(answer) -> Tensor:
    """Logits, or all weights and biases of each network in a row."""
    parts = [answer] if isinstance(answer, Tensor) else [*answer[0], *answer[1]]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "changes", "count"),
    [
        ("ng_gnn", "classify", {}, 331_466),
        ("ng_gnn", "classify", {"probes": 4}, 333_266),
        ("ng_gnn", "classify", {"probes": 16}, 336_362),
        ("ng_gnn", "classify", {"probes": 64}, 348_746),
        ("ng_gnn", "classify", {"hidden": 32}, 92_010),
        ("ng_t", "classify", {}, 376_586),
        ("ng_t", "classify", {"probes": 4}, 378_386),
        ("ng_t", "classify", {"probes": 16}, 381_482),
        ("ng_t", "classify", {"probes": 64}, 393_866),
        ("ng_t", "classify", {"probes": 64, "axial": True, "heads": 4}, 378_090),
        ("ng_gnn", "edit", {}, 298_440),
        ("ng_gnn", "edit", {"hidden": 128}, 1_186_696),
        ("ng_t", "edit", {}, 391_112),
    ],
)
def test_models_have_the_parameters_of_the_published_ones(model, task, changes, count):
    config = inr_config(model, task, **changes)
    statistics = Statistics.neutral(3) if config.normalise else None
    made = {"classify": INRClassifier, "edit": INREditor}[task](config, statistics)
    assert sum(p.numel() for p in made.parameters()) == count


def test_ng_gnn_amplifies_by_the_published_mean_degree():
    model = INRClassifier(inr_config("ng_gnn"), Statistics.neutral(3))
    assert {round(layer.delta, 4) for layer in model.body.backbone.layers} == {2.2469}


def test_nothing_of_ng_gnn_is_as_large_as_pairs_of_nodes():
    layout = (2, 64, 64, 1)
    model, networks = made("ng_gnn", layout=layout), inrs(1, layout)
    with torch.no_grad(), LargestTensor() as largest:
        model(*networks)
    assert largest.entries == 64 * 64 * 256  # Fourier features of one kernel's edges
    assert largest.entries < sum(layout) ** 2 * 256


# Slow twins -------------------------------------------------------------------------------------


def features(module, x: list[float]) -> Tensor:
    """Of one vector, a frequency at a time."""
    if module.frequencies is None:
        return torch.tensor(x, dtype=torch.float64)
    turns = [sum(b * e for b, e in zip(row, x, strict=True)) for row in module.frequencies.tolist()]
    angles = [2 * math.pi * turn for turn in turns]
    waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    return torch.tensor(waves, dtype=torch.float64)


def first_states(model, weights: list[Tensor], biases: list[Tensor]):
    """Nodes, (source, target) pairs and edges of one network, out of matrices over all nodes."""
    config, body = model.config, model.body
    starts = [0, *itertools.accumulate(config.layout)]
    n = starts[-1]
    matrix = [[0.0] * n for _ in range(n)]
    vector = [0.0] * n
    forward = []
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        w_mean, w_std, b_mean, b_std = 0.0, 1.0, 0.0, 1.0
        if model.statistics is not None:
            s = model.statistics
            w_mean, w_std = s.weight_mean[layer].item(), s.weight_std[layer].item()
            b_mean, b_std = s.bias_mean[layer].item(), s.bias_std[layer].item()
        for o, i in itertools.product(range(len(weight)), range(len(weight[0]))):
            pair = starts[layer] + i, starts[layer + 1] + o
            matrix[pair[0]][pair[1]] = (weight[o, i].item() - w_mean) / w_std
            forward.append(pair)
        for o, b in enumerate(bias.tolist()):
            vector[starts[layer + 1] + o] = (b - b_mean) / b_std
    pairs = forward
    if config.reverse or config.model == "ng_t":
        pairs = forward + [(target, source) for source, target in forward]
    states = []
    for j, i in pairs:
        there, back = matrix[j][i], matrix[i][j]
        x = [there, back, there + back] if config.reverse else [there]
        states.append(body.edges.second(body.edges.first(features(body.edges.features, x))))
    said = slow_responses(model, weights, biases) if config.probes else None
    nodes, row = [], -1
    for layer, size in enumerate(config.layout):
        hidden = 0 < layer < len(config.layout) - 1
        row += hidden
        for k in range(size):
            row += not hidden
            v = body.nodes.first(features(body.nodes.features, [vector[starts[layer] + k]]))
            if said is not None:
                v = v + body.nodes.probes[layer](said[layer][k])
            v = body.nodes.second(v)
            nodes.append(v if body.nodes.table is None else v + body.nodes.table[row])
    return nodes, pairs, states


def slow_responses(model, weights, biases) -> list[list[Tensor]]:
    """What each input and each neuron says at the probes, one neuron at a time."""
    said = [list(model.probes)]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        neurons = [
            sum(w * x for w, x in zip(row, said[-1], strict=True)) + b
            for row, b in zip(weight, bias, strict=True)
        ]
        last = layer == len(weights) - 1
        said.append([x + 0.5 if last else torch.sin(OMEGA0 * x) for x in neurons])
    return said


def slow_answer(model, weights, biases) -> Tensor:
    """One network's logits, or its edited weights and biases in a row."""
    config, backbone, head = model.config, model.body.backbone, model.body.head
    nodes, pairs, states = first_states(model, weights, biases)
    if config.model == "ng_gnn":
        nodes, states = reference.ng_gnn(backbone, nodes, pairs, states)
    else:
        for layer in backbone.layers:
            nodes, states = slow_ng_t.slow_layer(layer, nodes, pairs, states, all_pairs=True)
    if config.task == "classify":
        return head.maps(torch.cat(nodes[-config.layout[-1] :]))
    edge, node, edited = iter(states), iter(nodes[config.layout[0] :]), []
    for weight, scale in zip(weights, model.weight_scale, strict=True):
        edited += [w + scale * head.of_edge(next(edge)) for w in weight.flatten()]
    for bias, scale in zip(biases, model.bias_scale, strict=True):
        edited += [b + scale * head.of_node(next(node)) for b in bias]
    return torch.cat(edited)


CHANGES = {
    "as it is": {},
    "probes": {"probes": 3},
    "other features": {"reverse": True, "fourier": 0.0, "positions": False, "normalise": True},
    "no features": {"reverse": False, "fourier": 0.0, "normalise": False, "omega0": OMEGA0},
    "both ways": {"reverse": True},
}


@BOTH_TASKS
@pytest.mark.parametrize("changes", CHANGES)
@EVERY_MODEL
def test_answers_equal_the_loop_over_neurons_and_edges(name, changes, task):
    # Two layers, of which the second is the last, and few neurons, in layers of several sizes.
    layout = (2, 2, 3, 2)
    model = made(name, task, layout=layout, layers=2, **CHANGES[changes])
    weights, biases = inrs(2, layout)
    found = flat(model(weights, biases))
    networks = zip(zip(*weights, strict=True), zip(*biases, strict=True), strict=True)
    expected = torch.stack([slow_answer(model, w, b) for w, b in networks])
    assert_same_with_gradients([found], [expected], list(model.parameters()))


@pytest.mark.parametrize("changes", CHANGES)
def test_answers_equal_those_of_matrices_over_all_pairs_of_nodes(changes):
    model = made("ng_gnn", **{**CHANGES[changes], "normalise": True})
    networks = inrs(3)
    found, expected = model(*networks), dense_twin.logits(model, *networks)
    assert_same_with_gradients([found], [expected], list(model.parameters()))


def test_the_measurement_of_throughput_runs(capsys):
    dense_twin.main(["--batch", "2", "--hidden", "4", "--rounds", "1"])
    assert "INRs/s, n x n" in capsys.readouterr().out


# Symmetry ---------------------------------------------------------------------------------------


def permuted(networks, orders: list[Tensor]):
    """Networks with the neurons of every layer in another order."""
    weights, biases = networks
    moved = [
        w[:, to][:, :, of] for w, (of, to) in zip(weights, itertools.pairwise(orders), strict=True)
    ]
    return moved, [b[:, order] for b, order in zip(biases, orders[1:], strict=True)]


def in_order(layout) -> list[Tensor]:
    return [torch.arange(size) for size in layout]


@BOTH_TASKS
@EVERY_MODEL
@settings(max_examples=8)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.sampled_from([0, 2]), st.data())
def test_the_order_of_hidden_neurons_means_nothing(name, task, hidden, probes, data):
    layout = (2, *hidden, 2)
    model, networks, orders = (
        made(name, task, layout, probes=probes),
        inrs(2, layout),
        in_order(layout),
    )
    for i in range(1, len(layout) - 1):
        orders[i] = torch.tensor(data.draw(st.permutations(range(layout[i]))))
    answer = model(*networks)
    expected = answer if task == "classify" else permuted(answer, orders)
    found = flat(model(*permuted(networks, orders)))
    torch.testing.assert_close(found, flat(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", [0, -1], ids=["inputs", "outputs"])
@BOTH_TASKS
@EVERY_MODEL
def test_the_order_of_inputs_and_outputs_means_something(name, task, layer):
    model, networks, orders = made(name, task), inrs(2), in_order(LAYOUT)
    orders[layer] = orders[layer].flip(0)
    answer = model(*networks)
    expected = answer if task == "classify" else permuted(answer, orders)
    assert (flat(model(*permuted(networks, orders))) - flat(expected)).abs().max() > 1e-4


@pytest.mark.parametrize("of", ["weights", "biases"])
@BOTH_TASKS
@EVERY_MODEL
def test_moving_one_side_of_a_layer_is_no_symmetry(name, task, of):
    """The rows of its weights without the columns of the next, or its biases alone."""
    model, (weights, biases) = made(name, task), inrs(2)
    order = torch.tensor([1, 2, 0])
    moved = [w[:, order] if of == "weights" and not i else w for i, w in enumerate(weights)]
    shifted = [b[:, order] if of == "biases" and not i else b for i, b in enumerate(biases)]
    answer, found = model(weights, biases), model(moved, shifted)
    if task == "edit":  # what was moved is moved in the answer too
        k = 0 if of == "weights" else len(weights)
        parts = [*answer[0], *answer[1]]
        parts[k] = parts[k][:, order]
        answer = parts[: len(weights)], parts[len(weights) :]
    assert (flat(found) - flat(answer)).abs().max() > 1e-4


# A network alone --------------------------------------------------------------------------------


@BOTH_TASKS
@EVERY_MODEL
def test_an_answer_does_not_depend_on_the_batch(name, task):
    model = made(name, task, layout=(2, 8, 8, 1), probes=4).float()
    weights, biases = inrs(1, (2, 8, 8, 1), seed=7, dtype=torch.float32)
    alone = flat(model(weights, biases))
    others = inrs(12, (2, 8, 8, 1), dtype=torch.float32)
    others = [3 * w for w in others[0]], [b + 1 for b in others[1]]  # of another size altogether
    for place in (0, 5, 12):
        batch = [
            [torch.cat([t[:place], own, t[place:]]) for own, t in zip(mine, rest, strict=True)]
            for mine, rest in zip((weights, biases), others, strict=True)
        ]
        found = flat(model(*batch))[place : place + 1]
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)


# Probes and statistics --------------------------------------------------------------------------


def test_probes_see_what_networks_say():
    """The output as it is drawn, and each hidden layer as the sine of a shorter network."""
    weights, biases = inrs(3)
    points = torch.rand(2, 5, dtype=torch.float64) * 2 - 1
    said = responses(weights, biases, points)
    torch.testing.assert_close(said[0], points.expand(3, 2, 5))
    torch.testing.assert_close(said[-1], evaluate(weights, biases, points))
    for layer in range(1, len(LAYOUT) - 1):
        shorter = evaluate(weights[:layer], biases[:layer], points) - 0.5
        torch.testing.assert_close(said[layer], torch.sin(OMEGA0 * shorter))


def test_probes_read_networks_as_they_are_and_are_learned():
    model = made("ng_gnn", probes=3)
    seen = []
    model.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    networks = inrs(2)
    model(*networks).square().sum().backward()
    ((of_body, _, said),) = seen
    torch.testing.assert_close(said[-1], evaluate(*networks, model.probes))
    assert (of_body[0] - networks[0][0]).abs().max() > 0.1  # which is normalised
    assert model.probes.grad is not None and (model.probes.grad != 0).all()


def test_probes_start_uniform_within_the_image():
    probes = INRClassifier(inr_config("ng_gnn", probes=64), Statistics.neutral(3)).probes
    assert probes.shape == (2, 64)
    assert probes.abs().max() <= 1 and probes.min() < -0.9 and probes.max() > 0.9


def test_statistics_are_a_mean_and_a_deviation_of_each_layer():
    weights, biases = inrs(30, (2, 8, 8, 1), dtype=torch.float32)
    found = statistics_of(weights, biases)
    for layers, mean, std in (
        (weights, found.weight_mean, found.weight_std),
        (biases, found.bias_mean, found.bias_std),
    ):
        exact = [layer.numpy().astype(np.float64) for layer in layers]
        np.testing.assert_allclose(mean, [x.mean() for x in exact], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(std, [x.std() for x in exact], rtol=1e-6)


def test_normalised_networks_have_mean_0_and_deviation_1():
    model = made("ng_gnn").float()
    networks = inrs(50, dtype=torch.float32)
    normalise = INRClassifier(model.config, statistics_of(*networks)).statistics
    for layers in normalise(*networks):
        for layer in layers:
            assert layer.mean().abs() < 1e-5 and abs(layer.std(correction=0) - 1) < 1e-5


def test_numbers_that_never_vary_become_zero():
    weights, biases = inrs(4)
    statistics = statistics_of(weights, [torch.full_like(b, 0.3) for b in biases])
    assert (statistics.bias_std == 1).all()
    torch.testing.assert_close(statistics.bias_mean, torch.full((3,), 0.3))


# Dropout, names, gradients ----------------------------------------------------------------------


@BOTH_TASKS
@EVERY_MODEL
def test_dropout_is_for_training_alone(name, task):
    model, networks = made(name, task, dropout=0.3), inrs(4)
    assert not torch.equal(flat(model(*networks)), flat(model(*networks)))
    model.eval()
    answer = flat(model(*networks))
    assert torch.equal(answer, flat(model(*networks)))
    without = made(name, task)
    without.load_state_dict(model.state_dict())
    assert torch.equal(answer, flat(without(*networks)))


@BOTH_TASKS
@EVERY_MODEL
def test_gradient_reaches_every_weight(name, task):
    model, networks = made(name, task, probes=2), inrs(3)
    answer = flat(model(*networks))
    (torch.randn_like(answer) * answer).sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-9, key


def test_an_editor_starts_at_a_hundredth_of_what_its_head_says():
    networks = inrs(2, (2, 32, 32, 1))
    model = INREditor(inr_config("ng_gnn", "edit"), statistics_of(*networks)).eval().double()
    said = flat(model.answer(*networks))
    change = flat(model(*networks)) - flat(networks)
    torch.testing.assert_close(change, 0.01 * said)


def test_names_of_what_is_stored():
    """Renamed, they would make files of others unreadable."""
    layer = ["layers.0", "layers.1"]
    linear = ["weight", "bias"]
    names = [f"statistics.{of}_{what}" for of in linear for what in ("mean", "std")]
    names += ["probes", "body.nodes.table"]
    for side in ("edges", "nodes"):
        names += [f"body.{side}.features.frequencies"]
        names += [f"body.{side}.{part}.{x}" for part in ("first", "second") for x in linear]
    for n, part, x in itertools.product(range(3), (0, 1), linear):
        names.append(f"body.nodes.probes.{n}.{part}.{x}")
    for part, x in itertools.product(("film", "message", "node", "mix"), linear):
        names += [f"body.backbone.{of}.{part}.{x}" for of in layer]
    for part, x in itertools.product(("edge", "source", "target", "out"), linear):
        names.append(f"body.backbone.{layer[0]}.{part}.{x}")
    names += [f"body.backbone.norms.0.{x}" for x in linear]
    names += [f"body.head.maps.{n}.{x}" for n in (0, 2, 4) for x in linear]
    model = made("ng_gnn", layout=(2, 3, 1), layers=2, probes=1)
    assert sorted(model.state_dict()) == sorted(names)


# What is refused --------------------------------------------------------------------------------


@BOTH_TASKS
def test_networks_of_another_layout_are_refused(task):
    model = made("ng_gnn", task)
    expected = r"expected layout \(2, 3, 4, 2\), .*, found \(2, 5, 2\)"
    with pytest.raises(ValueError, match=expected):
        model(*inrs(2, (2, 5, 2)))
    weights, biases = inrs(2)
    with pytest.raises(ValueError, match="INRs, layer 1: expected a weight"):
        model([weights[0], weights[1][:, :, :2], weights[2]], biases)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@BOTH_TASKS
def test_weights_that_are_not_finite_are_refused_with_the_numbers_of_the_networks(task, value):
    weights, biases = inrs(5)
    weights[1][3, 0, 0], biases[2][1, 0] = value, -value
    with pytest.raises(ValueError, match="others in 2 of 5 networks: 1, 3"):
        made("ng_gnn", task)(weights, biases)


def test_finite_weights_whose_sum_is_not_are_no_fault():
    weights, biases = inrs(2, dtype=torch.float32)
    weights[0][:] = 3e38
    made("ng_gnn").float()(weights, biases)


def test_statistics_that_do_not_fit_are_refused():
    config = inr_config("ng_gnn")
    with pytest.raises(ValueError, match=r"expected statistics of 3 layers .*, found none"):
        INRClassifier(config)
    with pytest.raises(ValueError, match=r"expected statistics of 3 layers .*, found those of 2"):
        INRClassifier(config, Statistics.neutral(2))
    with pytest.raises(ValueError, match=r"expected no statistics .*, found those of 3"):
        INREditor(inr_config("ng_gnn", "edit", normalise=False), Statistics.neutral(3))
    with pytest.raises(ValueError, match="INREditor: expected task 'edit', found 'classify'"):
        INREditor(config, Statistics.neutral(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gnn"}, "model: expected 'ng_gnn' or .*, found 'gnn'"),
        ({"task": "draw"}, "task: expected 'classify' or 'edit', found 'draw'"),
        ({"layout": (2,)}, r"layout: expected two widths or more, found \(2,\)"),
        ({"layers": 0}, "layers: expected at least 1, found 0"),
        ({"probes": -1}, "probes: expected at least 0, found -1"),
        ({"dropout": 1.0}, "dropout: expected at least 0, less than 1, found 1.0"),
        ({"model": "ng_t", "heads": 3}, "heads: expected a divisor of 128 channels .*, found 3"),
    ],
)
def test_configs_out_of_range_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which is quicker to refuse
    with pytest.raises(ValueError, match=message):
        INRModelConfig(**{"model": "ng_gnn", **changes})


# Checkpoints ------------------------------------------------------------------------------------


@BOTH_TASKS
@EVERY_MODEL
def test_a_model_comes_back_as_it_was_saved(name, task, tmp_path):
    model, networks = made(name, task, probes=2, dropout=0.2).float().eval(), inrs(3)
    networks = [t.float() for t in networks[0]], [t.float() for t in networks[1]]
    path = tmp_path / "deep" / "model.safetensors"
    save_inr_model(path, model, {"epochs": 3})
    before = torch.get_rng_state()
    again = type(model).from_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == model.config and again.provenance == {"epochs": 3}
    torch.testing.assert_close(flat(again(*networks)), flat(model(*networks)))
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(theirs) == list(ours) and all(torch.equal(theirs[k], ours[k]) for k in ours)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.fixture
def path(tmp_path):
    save_inr_model(tmp_path / "digits.safetensors", made("ng_gnn").float(), {})
    return tmp_path / "digits.safetensors"


def test_checkpoints_of_another_kind_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="expected an INREditor, found an INRClassifier"):
        INREditor.from_checkpoint(path)
    with pytest.raises(ValueError, match=r"found 'l2o_graph INR model.*': not a learned optimi"):
        load_checkpoint(path)
    optimizer = random_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="found 'l2o_graph learned optimizer': not a model of INR"):
        load_inr_model(optimizer)


def test_unknown_names_and_paths_to_nothing_are_refused(path):
    with pytest.raises(ValueError, match="unknown checkpoint 'digits', expected one of"):
        load_inr_model("digits")
    with pytest.raises(FileNotFoundError, match="expected a file, found none"):
        load_inr_model(path.with_name("none.safetensors"))


def test_damaged_files_are_refused(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tensors, metadata = load(content), json.loads(content[8 : 8 + length])["__metadata__"]
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        load_inr_model(path)
    config = {**json.loads(metadata["config"]), "model": "gnn"}
    path.write_bytes(save(tensors, {**metadata, "config": json.dumps(config)}))
    with pytest.raises(ValueError, match=r"expected an INRModelConfig .*gnn"):
        load_inr_model(path)
    missing = {key: t for key, t in tensors.items() if key != "body.nodes.table"}
    path.write_bytes(save(missing, metadata))
    with pytest.raises(ValueError, match="expected the tensors of INRModelConfig"):
        load_inr_model(path)
    spoilt = {**tensors, "body.nodes.table": tensors["body.nodes.table"] * math.nan}
    path.write_bytes(save(spoilt, metadata))
    with pytest.raises(ValueError, match=r"expected finite weights, .*'body.nodes.table'"):
        load_inr_model(path)


def test_a_model_that_is_not_finite_is_not_stored(tmp_path):
    model = made("ng_gnn").float()
    nn.init.constant_(model.body.nodes.table, math.nan)
    with pytest.raises(ValueError, match="expected finite weights"):
        save_inr_model(tmp_path / "model.safetensors", model, {})
    assert not list(tmp_path.iterdir())


def test_a_layout_that_a_file_brings_first_can_be_used(tmp_path):
    """What is kept of a layout for all models of it is not made on the meta device."""
    layout = (2, 7, 5, 1)
    save_inr_model(tmp_path / "other.safetensors", made("ng_gnn", layout=layout).float(), {})
    topology_of.cache_clear()
    model, networks = load_inr_model(tmp_path / "other.safetensors"), inrs(2, layout)
    assert flat(model.double()(*networks)).isfinite().all()


def test_packaged_models_are_there_and_say_how_they_were_made():
    assert list_inr_models() == ["fmnist-inr", "mnist-inr"]
    for name in list_inr_models():
        model = INRClassifier.from_checkpoint(name)
        networks = inrs(3, model.config.layout, dtype=torch.float32)
        assert model(*networks).shape == (3, 10)
        assert {"commit", "config", "val_accuracy", "test_accuracy"} <= model.provenance.keys()
