"""The ordered pass, models of outputs and several answers: slow twins, symmetry, refusals."""

import math

import pytest
import torch
from support.sirens import networks
from support.slow_ng_t import noisy
from torch import nn

from l2o_graph import INRClassifier, INREditor
from l2o_graph.inr import inr_config, load_inr_model, render, save_inr_model, statistics_of
from l2o_graph.metanets.statistics import Statistics

LAYOUT = (2, 5, 4, 2)


def inrs(count=6, layout=LAYOUT):
    weights, biases = networks(count, layout, dtype=torch.float64)
    return weights, [3 * torch.randn_like(b) / 30 for b in biases]


def made(model="ordered", task="classify", layout=LAYOUT, **changes):
    """A small float64 model with noise on every weight."""
    options = {"hidden": 6, "layout": layout, "classes": 3, **changes}
    config = inr_config(model, task, **options)
    torch.manual_seed(1)
    kind = {"classify": INRClassifier, "edit": INREditor}[task]
    return noisy(kind(config, statistics_of(*inrs(20, layout)))).eval()


def permuted(weights, biases, seed=0):
    """The same networks with their hidden neurons in another order, each its own."""
    dice = torch.Generator().manual_seed(seed)
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    orders = []
    for i in range(len(weights) - 1):
        order = torch.stack(
            [torch.randperm(weights[i].shape[1], generator=dice) for _ in weights[i]]
        )
        for n, o in enumerate(order):
            weights[i][n], biases[i][n] = weights[i][n, o], biases[i][n, o]
            weights[i + 1][n] = weights[i + 1][n][:, o]
        orders.append(order)
    return weights, biases, orders


def slow(model, weights, biases, responses):
    """Logits of one network, weight by weight, neuron by neuron."""
    body, s = model.body, model.statistics
    features = body.features
    states = list(body.inputs)
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        w = (w - s.weight_mean[layer]) / s.weight_std[layer]
        b = (b - s.bias_mean[layer]) / s.bias_std[layer]
        step, coming = body.steps[layer], []
        for j in range(len(w)):
            message = torch.zeros(body.inputs.shape[1], dtype=w.dtype)
            for i in range(len(w[0])):
                message += step.read(features(w[j, i])) * step.say(states[i])
            own = body.own[layer](features(b[j]))
            if body.probes:
                own = own + body.probes[layer](responses[layer + 1][j])
            coming.append(step.norm(step.cell(message / math.sqrt(len(w[0])), own)))
        states = coming
    found = torch.cat(states)
    if body.probes:
        found = torch.cat([found, 3 * (responses[-1] - 0.5).flatten()])
    return body.head(found)


def answers_at(points, weights, biases):
    """What each neuron of one network says at points, one point at a time."""
    said = [[] for _ in range(len(weights) + 1)]
    for point in points.T:
        x = point
        said[0].append(x)
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = w @ x + b
            x = x + 0.5 if layer == len(weights) - 1 else (30.0 * x).sin()
            said[layer + 1].append(x)
    return [torch.stack(each, -1) for each in said]


@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("fourier", [0.0, 0.25])
def test_the_ordered_pass_is_its_slow_twin(probes, fourier):
    model = made(probes=probes, fourier=fourier, canonical=False)
    weights, biases = inrs()
    found = model(weights, biases)
    for n in range(len(found)):
        w, b = [w[n] for w in weights], [b[n] for b in biases]
        responses = answers_at(model.probes, w, b) if probes else []
        torch.testing.assert_close(slow(model, w, b, responses), found[n], rtol=1e-9, atol=1e-9)


def test_probegen_is_an_mlp_on_what_networks_answer_at_generated_points():
    model = made("probegen", probes=5, layers=3)
    weights, biases = inrs()
    first, second = model.generator.maps
    points = (second.weight @ (first.weight @ model.generator.codes.T + first.bias[:, None])
              + second.bias[:, None])  # fmt: skip
    for n, found in enumerate(model(weights, biases)):
        said = answers_at(points, [w[n] for w in weights], [b[n] for b in biases])[-1]
        x = 3 * (said - 0.5).flatten()
        for layer in model.body.net:
            x = layer(x)
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
    assert len([m for m in model.body.net if isinstance(m, nn.Linear)]) == 3


def test_drawn_is_a_cnn_on_the_images_of_the_networks():
    model = made("drawn", probes=36, layers=1, dropout=0.0)
    weights, biases = inrs()
    for n, found in enumerate(model(weights, biases)):
        image = torch.zeros(2, 6, 6, dtype=torch.float64)
        for row, y in enumerate(torch.linspace(-1, 1, 6).double()):
            for column, x in enumerate(torch.linspace(-1, 1, 6).double()):
                network = [w[n] for w in weights], [b[n] for b in biases]
                said = answers_at(torch.stack([x, y])[:, None], *network)[-1]
                image[:, row, column] = 3 * (said[:, 0] - 0.5)
        first, second, last = (m for m in model.body.net if hasattr(m, "weight"))
        x = first(image[None]).relu()
        x = second(x).relu().unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        torch.testing.assert_close(found, last(x.flatten()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "changes"),
    [("ordered", {}), ("ordered", {"probes": 3}), ("ordered", {"probes": 3, "generated": True}),
     ("probegen", {"probes": 4, "layers": 2}), ("drawn", {"probes": 16}),
     ("ng_gnn", {"canonical": True, "layers": 2})],
)  # fmt: skip
@pytest.mark.parametrize("layout", [LAYOUT, (2, 6, 5, 3)])
def test_logits_stay_when_hidden_neurons_change_places(model, layout, changes):
    model = made(model, layout=layout, **changes)
    weights, biases = inrs(layout=layout)
    found = model(weights, biases)
    other = permuted(weights, biases)
    torch.testing.assert_close(model(*other[:2]), found, rtol=0, atol=1e-9)
    outputs = [*weights[:-1], weights[-1].flip(1)], [*biases[:-1], biases[-1].flip(1)]
    assert (model(*outputs) - found).abs().max() > 1e-4, "outputs are told apart"
    torn = [other[0][0], *weights[1:]], biases  # rows of one layer without columns of the next
    assert (model(*torn) - found).abs().max() > 1e-4, "it is another network"
    one = model([w[1:2] for w in weights], [b[1:2] for b in biases])
    torch.testing.assert_close(one, found[1:2], rtol=0, atol=1e-12)


def test_signs_of_neurons_change_nothing_in_canonical_form_and_much_without():
    weights, biases = inrs()
    flipped = [-weights[0], -weights[1], weights[2]], [-biases[0], biases[1], biases[2]]
    torch.testing.assert_close(
        made(canonical=True)(*flipped), made(canonical=True)(weights, biases), rtol=0, atol=1e-9
    )
    model = made(canonical=False)
    assert (model(*flipped) - model(weights, biases)).abs().max() > 1e-3


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("model", ["ordered", "ng_gnn", "ng_t"])
def test_edits_move_with_the_neurons(model, answers):
    layout = (2, 5, 4, 1)
    changes = {"layers": 2, "heads": 2} if model == "ng_t" else {}
    editor = made(model, "edit", layout, answers=answers, canonical=False, **changes)
    weights, biases = inrs(layout=layout)
    edited = editor(weights, biases)
    assert [t.shape for t in edited[0]] == [(answers * 6, *w.shape[1:]) for w in weights]
    other = permuted(weights, biases)
    found = editor(*other[:2])
    assert (edited[0][1].unflatten(0, (answers, -1)) - weights[1]).abs().max() > 1e-4
    torch.testing.assert_close(
        render(*found), render(*edited), rtol=0, atol=1e-8
    )  # the same neurons with the same changes draw the same
    of_first = torch.stack([b[o] for b, o in zip(edited[1][0][:6], other[2][0], strict=True)])
    torch.testing.assert_close(found[1][0][:6], of_first, rtol=0, atol=1e-9)


def test_several_answers_are_drawn_as_the_mean_of_their_images():
    editor = made("ordered", "edit", (2, 5, 4, 1), answers=3)
    weights, biases = inrs(layout=(2, 5, 4, 1))
    images = render(*editor(weights, biases)).view(3, 6, 28, 28)
    torch.testing.assert_close(editor.draw(weights, biases), images.mean(0))
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_an_editor_in_canonical_form_begins_at_the_same_images():
    config = inr_config("ordered", "edit", hidden=6, layout=(2, 5, 4, 1))
    weights, biases = inrs(layout=(2, 5, 4, 1))
    editor = INREditor(config, statistics_of(weights, biases)).double()
    with torch.no_grad():
        editor.weight_scale.zero_()
        editor.bias_scale.zero_()
    torch.testing.assert_close(
        editor.draw(weights, biases), render(weights, biases), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(
    ("model", "task", "changes", "count"),
    [("ordered", "classify", {}, 127_050), ("probegen", "classify", {}, 303_980),
     ("drawn", "classify", {}, 96_362)],
)  # fmt: skip
def test_sizes(model, task, changes, count):
    made = INRClassifier(inr_config(model, task, **changes), Statistics.neutral(3))
    assert sum(p.numel() for p in made.parameters()) == count


@pytest.mark.parametrize(
    ("model", "changes"),
    [("ordered", {"probes": 3, "generated": True}), ("probegen", {"probes": 4}),
     ("drawn", {"probes": 25})],
)  # fmt: skip
def test_a_stored_model_says_the_same(model, changes, tmp_path):
    config = inr_config(model, hidden=6, layout=LAYOUT, classes=3, **changes)
    weights, biases = ([t.float() for t in part] for part in inrs())
    trained = INRClassifier(config, statistics_of(weights, biases)).eval()
    path = tmp_path / "model.safetensors"
    save_inr_model(path, trained, {})
    again = load_inr_model(path)
    assert again.config == config
    with torch.no_grad():
        torch.testing.assert_close(again(weights, biases), trained(weights, biases))


@pytest.mark.parametrize(
    ("model", "task", "changes", "words"),
    [
        ("mlp", "classify", {"probes": 4}, "probes: expected model 'ng_gnn' or 'ng_t' or"),
        ("probegen", "classify", {"probes": 0, "generated": False}, "probes: expected at least 1"),
        ("ordered", "classify", {"generated": True}, "generated: expected at least 1 probe"),
        ("ordered", "classify", {"answers": 2}, "answers: expected 1 to classify, found 2"),
        ("mlp", "edit", {"answers": 2}, "answers: expected model 'ng_gnn' or 'ng_t' or 'ordered'"),
        ("probegen", "edit", {"probes": 4}, "'probegen' does not read single parameters"),
        ("drawn", "edit", {"probes": 16}, "'drawn' does not read single parameters"),
        ("drawn", "classify", {"probes": 50}, "probes: expected the pixels of a square image"),
        ("drawn", "classify", {"probes": 9}, "probes: expected .* side 4 or more"),
        ("drawn", "classify", {"layout": (3, 4, 1)}, "networks of 2 inputs"),
        ("drawn", "classify", {"generated": True}, "generated: expected fixed probes"),
        ("ordered", "classify", {"reverse": True}, "reverse: expected model 'ng_gnn' or 'ng_t'"),
    ],
)
def test_what_cannot_be_is_named(model, task, changes, words):
    with pytest.raises(ValueError, match=words):
        inr_config(model, task, **changes)
