"""Controllers side by side: the same networks for all, means, and what a difference is worth."""

import pytest
from scipy import stats
from support.optimizers import controller_file

from meta_train.benchmarks.compare import main, markdown


def test_prints_a_table_of_families_and_one_of_pairs(tmp_path, capsys):
    data = ["--data-root", str(tmp_path / "data"), "--draws", "2", "--steps", "5"]
    controllers = [f"one={controller_file(tmp_path)}", f"again={controller_file(tmp_path)}"]
    assert main([*controllers, "start", "--families", "regression", "pinn", *data]) == 0
    title, head, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("mean log loss after 5 steps, 2 draws a family")
    assert head == "| family | one | again | start |"
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| regression", "| pinn (held out)"]
    _, one, again, start = rows[0].split(" | ")
    assert one == again != start.removesuffix(" |")
    same = [row for row in rows if row.startswith("| one - again ")]
    assert same == [
        f"| one - again | {label} | +0.000 ± 0.000 | 1 | +0.000 ± 0.000 | 1 |"
        for label in ("trained on", "held out")
    ]


def test_a_difference_stands_with_its_error_and_a_paired_test():
    ends = {"a": [1.0, 2.0, 4.0], "b": [0.5, 1.0, 3.75]}
    found = {name: {"pinn": [(x, -x) for x in xs]} for name, xs in ends.items()}
    table = markdown(found)
    differences = [x - y for x, y in zip(*ends.values(), strict=True)]
    mean, error = sum(differences) / 3, stats.sem(differences)
    p = stats.ttest_rel(*ends.values()).pvalue
    assert "| pinn (held out) | 2.333, -2.333 | 1.750, -1.750 |" in table
    assert f"| a - b | held out | {mean:+.3f} ± {error:.3f} | {p:.2g} |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "unknown checkpoint 'nothing'"), (["a=nothing.safetensors"], "nothing.safe")],
)
def test_what_is_no_controller_is_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
