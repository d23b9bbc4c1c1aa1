"""Baselines on INRs: their symmetries, values against loops, counts, and that they learn."""

import cmath
import itertools
import math
import statistics as python_statistics

import pytest
import torch
from support.rules import random_like
from torch import Tensor, nn

from l2o_graph.inr import INRClassifier, INREditor, evaluate, inr_config, statistics_of
from l2o_graph.metanets.baselines.equivariant import NFNEncoding, space_of
from l2o_graph.metanets.baselines.inr import BASELINES
from l2o_graph.metanets.baselines.sets import SetClassifier, SetEditor
from l2o_graph.metanets.inr import load_inr_model, save_inr_model
from l2o_graph.metanets.statistics import Normalisation
from l2o_graph.models.equivariant import HNP, NP
from l2o_graph.models.stat_nn import StatNN, layer_statistics, statistics
from l2o_graph.models.weight_space import pooled, pooled_size

LAYOUT = (2, 6, 5, 1)
LAYOUTS = [LAYOUT, (3, 4, 2), (1, 4, 4, 4, 3)]
CLASSES = 3
SMALL = {
    "mlp": {"hidden": 16},
    "stat_nn": {"hidden": 16},
    "set_nn": {"hidden": 16},
    "dwsnet": {"hidden": 8, "layers": 3},
    "nfn": {"hidden": 8},
}
CLASSIFIERS = list(BASELINES)
EDITORS = [name for name in BASELINES if name != "stat_nn"]
# A set of rows is none of the networks' symmetries: see its own test.
SYMMETRIC = {
    "classify": ["stat_nn", "dwsnet", "nfn"],
    "edit": ["set_nn", "dwsnet", "nfn"],
}


def networks(count: int, layout=LAYOUT, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(o, i) for i, o in itertools.pairwise(layout)] + [(o,) for o in layout[1:]]
    tensors = random_like([torch.empty(count, *shape) for shape in shapes], seed)
    return tensors[: len(layout) - 1], tensors[len(layout) - 1 :]


def disturbed(model: nn.Module, layout) -> nn.Module:
    """In float64, with nothing left at 0 or 1: norms have seen a batch, and all weights differ."""
    model = model.double().train()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model(*networks(20, layout, seed=9))
    return model.eval()


def baseline(name: str, task, layout=LAYOUT, **changes) -> nn.Module:
    sizes = {"classes": CLASSES, **SMALL[name], **changes}
    return BASELINES[name](inr_config(name, task, layout=layout, **sizes))


def classifier(name: str, layout=LAYOUT, **changes) -> nn.Module:
    return disturbed(baseline(name, "classify", layout, **changes), layout)


def editor(name: str, layout=LAYOUT, **changes) -> nn.Module:
    return disturbed(baseline(name, "edit", layout, **changes), layout)


def apart(found, expected) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


# Symmetry --------------------------------------------------------------------------------------


def orders_of(count: int, layout=LAYOUT) -> list[Tensor]:
    """An order of each hidden layer's neurons, another for each network."""
    return [torch.stack([torch.randperm(n) for _ in range(count)]) for n in layout[1:-1]]


def permuted(weights, biases, orders) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = list(weights), list(biases)
    for k, order in enumerate(orders):
        after = weights[k + 1]
        weights[k] = weights[k].gather(1, order[..., None].expand_as(weights[k]))
        biases[k] = biases[k].gather(1, order)
        weights[k + 1] = after.gather(2, order[:, None].expand_as(after))
    return weights, biases


def test_permuted_networks_are_the_same_functions():
    """What the tests below permute by."""
    weights, biases = networks(4)
    points = random_like([torch.empty(2, 7)], seed=1)[0]
    found = evaluate(*permuted(weights, biases, orders_of(4)), points)
    torch.testing.assert_close(found, evaluate(weights, biases, points))
    assert apart(permuted(weights, biases, orders_of(4))[0], weights) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SYMMETRIC["classify"])
def test_permuted_hidden_neurons_keep_the_logits(name, layout):
    model, given = classifier(name, layout), networks(4, layout)
    for training in (False, True):
        model.train(training)
        for module in model.modules():  # the only thing that is random
            if isinstance(module, nn.Dropout | nn.Dropout1d):
                module.eval()
        found = model(*permuted(*given, orders_of(4, layout)))
        assert (found - model(*given)).abs().max() < 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SYMMETRIC["edit"])
def test_permuted_hidden_neurons_permute_the_deltas(name, layout):
    model, given, orders = editor(name, layout), networks(4, layout), orders_of(4, layout)
    found, expected = model(*permuted(*given, orders)), permuted(*model(*given), orders)
    assert max(apart(a, b) for a, b in zip(found, expected, strict=True)) < 1e-9


def test_an_mlp_has_no_such_symmetry():
    given, orders = networks(4), orders_of(4)
    model = classifier("mlp")
    assert (model(*permuted(*given, orders)) - model(*given)).abs().max() > 1e-2
    model = editor("mlp")
    assert apart(model(*permuted(*given, orders))[0], permuted(*model(*given), orders)[0]) > 1e-2


def test_a_set_of_rows_has_it_only_where_nobody_reads_the_neurons():
    """inr2vec's elements: the order of a layer's neurons is that of the next layer's columns."""
    model = classifier("set_nn")
    assert isinstance(model, SetClassifier)
    weights, biases = networks(4)
    logits = model(weights, biases)
    assert (model(*permuted(weights, biases, orders_of(4))) - logits).abs().max() > 1e-3
    order = orders_of(4)[0]
    moved = weights[0].gather(1, order[..., None].expand_as(weights[0]))
    found = model([moved, *weights[1:]], [biases[0].gather(1, order), *biases[1:]])
    assert (found - logits).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["dwsnet", "nfn"])
@pytest.mark.parametrize("end", ["inputs", "outputs"])
def test_inputs_and_outputs_have_an_order(name, end):
    layout = (3, 6, 5, 3)

    def turned(weights, biases):
        if end == "inputs":
            return [weights[0].roll(1, 2), *weights[1:]], biases
        return [*weights[:-1], weights[-1].roll(1, 1)], [*biases[:-1], biases[-1].roll(1, 1)]

    given = networks(4, layout)
    model = classifier(name, layout)
    assert (model(*turned(*given)) - model(*given)).abs().max() > 1e-3
    model = editor(name, layout)
    found, expected = model(*turned(*given)), turned(*model(*given))
    assert apart(found[0], expected[0]) > 1e-3
    assert apart(found[1], expected[1]) > 1e-3


@pytest.mark.parametrize("name", ["dwsnet", "nfn"])
def test_a_neuron_is_one_on_both_of_its_sides(name):
    """Rows of one weight alone are no symmetry, though statistics take it for one."""
    weights, biases = networks(4)
    half = [weights[0].roll(1, 1), *weights[1:]]
    model = classifier(name)
    assert (model(half, biases) - model(weights, biases)).abs().max() > 1e-3
    blind = classifier("stat_nn")
    assert (blind(half, biases) - blind(weights, biases)).abs().max() < 1e-9


@pytest.mark.parametrize(("models", "make"), [(CLASSIFIERS, classifier), (EDITORS, editor)])
def test_an_answer_does_not_depend_on_the_batch(models, make):
    weights, biases = networks(5)
    for name in models:
        model = make(name)
        whole = model(weights, biases)
        alone = model([w[3:4] for w in weights], [b[3:4] for b in biases])
        if models is CLASSIFIERS:
            whole, alone = ([whole],), ([alone],)
        for a, b in zip(itertools.chain(*whole), itertools.chain(*alone), strict=True):
            torch.testing.assert_close(a[3:4], b, rtol=1e-12, atol=1e-12)


# Values ----------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def slow_elements(of: str, weights, biases, network: int) -> list[tuple[Tensor, int]]:
    """Each element and its kind."""
    answer = []
    if of == "parameter":
        for kind, tensor in enumerate((*weights, *biases)):
            answer += [(x[None], kind) for x in tensor[network].flatten()]
        return answer
    widest = max(w.shape[2] for w in weights)
    for kind, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for row, b in zip(weight[network], bias[network], strict=True):
            filling = row.new_zeros(widest - len(row))
            answer.append((torch.cat([row, filling, b[None]]), kind))
    return answer


def slow_states(encoder, of: str, weights, biases, network: int) -> list[Tensor]:
    first, second = (m for m in encoder.deeper.modules() if isinstance(m, nn.Linear))
    states = []
    for x, kind in slow_elements(of, weights, biases, network):
        state = encoder.value.weight @ x + encoder.kind.weight[kind]
        states.append(linear(second, linear(first, state.relu()).relu()).relu())
    return states


def slow_pooled(states: list[Tensor]) -> Tensor:
    grid = torch.stack(states)
    return torch.cat([grid.sum(0) / len(states), grid.max(0).values])


def test_sets_equal_the_loop_over_elements():
    model = classifier("set_nn", hidden=8, layers=3)
    assert isinstance(model, SetClassifier)
    given = networks(2)
    found = model(*given)
    for n in range(2):
        x = slow_pooled(slow_states(model.encoder, "row", *given, n))
        first, second, third = (m for m in model.head if isinstance(m, nn.Linear))
        expected = linear(third, linear(second, linear(first, x).relu()).relu())
        torch.testing.assert_close(found[n], expected)


def test_edits_of_sets_equal_the_loop_over_elements():
    model, given = editor("set_nn", hidden=8, layers=3), networks(2)
    assert isinstance(model, SetEditor)
    deltas = [t for part in model(*given) for t in part]
    for n in range(2):
        states = slow_states(model.encoder, "parameter", *given, n)
        context = linear(model.others, slow_pooled(states))
        expected = [linear(model.delta, (linear(model.own, s) + context).relu()) for s in states]
        found = torch.cat([t[n].flatten() for t in deltas])
        torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("size", [2, 3, 10, 33])
def test_statistics_are_those_of_python(size):
    x = random_like([torch.empty(3, size, 2)], seed=0)[0]
    for found, row in zip(statistics(x).tolist(), x.flatten(1).tolist(), strict=True):
        quartiles = python_statistics.quantiles(row, n=4, method="inclusive")
        expected = [
            python_statistics.fmean(row),
            python_statistics.variance(row),
            min(row),
            *quartiles,
            max(row),
        ]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_statistics_of_a_single_scalar_are_finite_with_their_gradients():
    x = torch.tensor([[3.0], [-1.0]], requires_grad=True)
    found = statistics(x)
    found.square().sum().backward()
    assert found.tolist() == [[3, 0, 3, 3, 3, 3, 3], [-1, 0, -1, -1, -1, -1, -1]]
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_networks_of_different_depth_make_one_batch_of_statistics():
    """As CNNs of different depths do: weights of four axes, and zeros for layers that are not."""
    model = StatNN(layers=3, hidden=8).double()
    conv = random_like([torch.empty(1, 4, 1, 3, 3), torch.empty(1, 5, 4)], seed=0)
    shallow = layer_statistics(conv, random_like([torch.empty(1, 4), torch.empty(1, 5)], 1), 3)
    deep = layer_statistics(*networks(1), 3)
    assert not shallow[:, 28:].any()
    torch.testing.assert_close(shallow[:, :7], statistics(conv[0]))
    answers = model.head(torch.cat([shallow, deep]))
    torch.testing.assert_close(answers[1:], model(*networks(1)))
    with pytest.raises(ValueError, match="StatNN: expected at most 2 layers, found 3"):
        layer_statistics(*networks(1), 2)


@pytest.mark.parametrize(("permutable", "kept"), [(NP, 6), (HNP, 2 + 1 + 1 + 1 + 3 + 3)])
def test_pooling_keeps_what_is_not_permuted(permutable, kept):
    """Of (2, 6, 5, 3): a number for each input, or each output, where these have an order."""
    layout = (2, 6, 5, 3)
    space = space_of(layout, permutable)
    assert pooled_size(space) == kept
    weights, biases = networks(2, layout)
    features = [t for pair in zip(weights, biases, strict=True) for t in pair]
    found = pooled(space, [t[:, None] for t in features], torch.amax)
    expected = []
    for n in range(2):
        w0, b0, w1, b1, w2, b2 = (t[n].tolist() for t in features)
        if permutable == NP:
            inputs, outputs, last = [itertools.chain(*w0)], [itertools.chain(*w2)], [b2]
        else:
            inputs, outputs, last = zip(*w0, strict=True), w2, [[b] for b in b2]
        groups = [*inputs, b0, itertools.chain(*w1), b1, *outputs, *last]
        expected.append([max(group) for group in groups])
    assert found.tolist() == expected


def test_nfn_tells_scalars_by_waves_and_inputs_and_outputs_by_their_numbers():
    layout, (weights, biases) = (2, 4, 3), networks(2, (2, 4, 3))
    encoding = NFNEncoding(layout).double()
    found = encoding(weights, biases)
    assert [tuple(x.shape[1:]) for x in found] == [(263, 4, 2), (263, 4), (263, 3, 4), (263, 3)]

    def number(p: float | None) -> list[float]:
        if p is None:
            return [0.0] * 7
        waves = [cmath.exp(1j * math.pi * band * p) for band in (1, 1.25, 1.5)]
        return [w.imag for w in waves] + [w.real for w in waves] + [p]

    def check(entry: Tensor, value: float, p: float | None):
        waves = [cmath.exp(2j * math.pi * b * value) for b in encoding.frequencies.tolist()]
        expected = [w.real for w in waves] + [w.imag for w in waves] + number(p)
        assert entry.tolist() == pytest.approx(expected, abs=1e-6)  # made in float32

    for n, neuron in itertools.product(range(2), range(4)):
        check(found[1][n, :, neuron], biases[0][n, neuron].item(), None)
        for j, p in enumerate((-1.0, 1.0)):
            check(found[0][n, :, neuron, j], weights[0][n, neuron, j].item(), p)
        for o, p in enumerate((-1.0, 0.0, 1.0)):
            check(found[2][n, :, o, neuron], weights[1][n, o, neuron].item(), p)
            check(found[3][n, :, o], biases[1][n, o].item(), p)


# Counts ----------------------------------------------------------------------------------------


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_stat_nn_has_as_many_weights_as_published():
    assert count(StatNN(layers=6)) == 1_087_001


def test_weights_of_classifiers():
    siren = (2, 32, 32, 1)
    found = {name: count(make(inr_config(name))) for name, make in BASELINES.items()}
    # Zhou et al. 2023: with n inputs, m outputs and three layers HNP has this many maps, ...
    n, m = 2, 1
    hnp = (3 + n + 2 * m) ** 2 + (n + 2) ** 2 + (2 + m) ** 2 + 1
    # ... and NP 4 L^2 + 10 L - 4, of which 5 are the same as others where there is one output.
    np = 4 * 9 + 10 * 3 - 4 - 5
    fixed = n + 4 + m  # biases of a channel: one for each fixed entry of each of six tensors
    assert fixed == pooled_size(space_of(siren, HNP))
    norms = 4 * 6 * 2 * 32
    dwsnet = hnp * (32 + 4 * 32 * 32) + fixed * 5 * 32 + norms + (fixed * 32 + 1) * 10
    layers = np * ((256 + 7) * 48 + 2 * 48 * 48) + 6 * 3 * 48
    nfn = layers + (6 * 48 + 1) * 128 + 129 * 128 + 129 * 10
    assert found == {
        "mlp": 1186 * 256 + 2 * 257 * 256 + 257 * 10,
        "stat_nn": 43 * 1000 + 1001 * 1000 + 1001 * 10,
        "set_nn": 33 * 256 + 3 * 256 + 257 * 256 + 513 * 256 + 257 * 256 + 257 * 10,
        "dwsnet": dwsnet,
        "nfn": nfn,
    }
    assert (dwsnet, nfn) == (314_506, 1_037_882)


# In use ----------------------------------------------------------------------------------------


def deltas(answer) -> list[Tensor]:
    return [t for part in answer for t in part]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_tensor_of_a_classifier_gets_a_gradient(name):
    model = baseline(name, "classify").double()
    model(*networks(32)).square().sum().backward()
    check_gradients(model)


@pytest.mark.parametrize("name", EDITORS)
def test_every_tensor_of_an_editor_gets_a_gradient(name):
    model = baseline(name, "edit").double()
    given = networks(32)
    answer = model(*given)
    for d, t in zip(deltas(answer), deltas(given), strict=True):
        assert d.shape == t.shape
    sum(d.square().sum() for d in deltas(answer)).backward()
    check_gradients(model)


def check_gradients(model: nn.Module):
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_learns_which_networks_have_larger_weights(name):
    torch.manual_seed(0)
    model = baseline(name, "classify", classes=2).double()
    weights, biases = networks(16)
    labels = torch.arange(16) % 2
    weights = [w * (1 + labels[:, None, None]) for w in weights]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        losses.append(nn.functional.cross_entropy(model(weights, biases), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_learns_to_shrink_networks(name):
    torch.manual_seed(0)
    model, given = baseline(name, "edit").double(), networks(16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        pairs = zip(deltas(model(*given)), deltas(given), strict=True)
        losses.append(sum((d + t / 2).square().mean() for d, t in pairs))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e10])
@pytest.mark.parametrize("models", [CLASSIFIERS, EDITORS], ids=["classifiers", "editors"])
def test_answers_are_finite_on_weights_of_any_size(models, scale):
    given = [[scale * t.float() for t in part] for part in networks(4)]
    for name in models:
        model = classifier(name).float() if models is CLASSIFIERS else editor(name).float()
        for training in (True, False):
            answer = model.train(training)(*given)
            for t in [answer] if models is CLASSIFIERS else deltas(answer):
                assert t.isfinite().all(), name


# In the place of a graph model -------------------------------------------------------------------


@pytest.mark.parametrize(("models", "task"), [(CLASSIFIERS, "classify"), (EDITORS, "edit")])
def test_a_baseline_takes_the_place_of_a_graph_model(models, task, tmp_path):
    weights, biases = ([t.float() for t in part] for part in networks(4))
    given = statistics_of(weights, biases)
    normalised = Normalisation(given)(weights, biases)
    for name in models:
        config = inr_config(name, task, layout=LAYOUT, hidden=8, layers=2, classes=CLASSES)
        model = (INRClassifier if task == "classify" else INREditor)(config, given).eval()
        answer, said = model(weights, biases), model.body.net(*normalised)
        if task == "classify":
            torch.testing.assert_close(answer, said)
        else:
            expected = [w + 0.01 * d for w, d in zip(weights, said[0], strict=True)]
            torch.testing.assert_close(answer[0], expected)
        path = tmp_path / f"{name}.safetensors"
        save_inr_model(path, model, {})
        again = load_inr_model(path)(weights, biases)
        torch.testing.assert_close(again, answer, rtol=0, atol=0)


def test_a_baseline_is_not_asked_for_what_it_lacks():
    graphs = {"probes": 4, "fourier": 1.0, "axial": True, "reverse": True, "positions": False}
    for name, value in graphs.items():
        words = f"{name}: expected model 'ng_gnn' or 'ng_t'.*, found 'mlp'"
        with pytest.raises(ValueError, match=words):
            inr_config("mlp", **{name: value})
    with pytest.raises(ValueError, match="'stat_nn' does not read single parameters and"):
        inr_config("stat_nn", "edit")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize(("models", "make"), [(CLASSIFIERS, classifier), (EDITORS, editor)])
def test_answers_on_a_gpu_are_those_on_the_cpu(models, make):
    given = networks(4)
    for name in models:
        here = make(name)(*given)
        there = make(name).cuda()(*([t.cuda() for t in part] for part in given))
        pairs = (
            [(here, there)]
            if models is CLASSIFIERS
            else zip(deltas(here), deltas(there), strict=True)
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b.cpu(), rtol=1e-8, atol=1e-8)
