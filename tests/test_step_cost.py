"""The timing script measures what it says, against the passes of the same net."""

from meta_train.step_cost import PASS, main


def test_measures_both_nets_and_prints_the_bars(capsys):
    costs = main(["--rounds", "1", "--unroll", "4", "--snapshots", "1"])
    assert [c.passes for c in costs if c.work.name == PASS] == [1.0, 1.0]
    assert all(c.seconds > 0 and c.passes > 0 for c in costs)
    bars = [(c.work.net, c.work.name, c.work.bar) for c in costs if c.work.bar is not None]
    assert ("CIFAR-10", "NGOptimizer step", 0.4) in bars
    assert ("FashionMNIST", "meta-training step, look-ahead, 1 of 4 differentiated", 5.0) in bars
    printed = capsys.readouterr().out
    assert "| CIFAR-10 | NGOptimizer step |" in printed
    assert "random images" in printed
