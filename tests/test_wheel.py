"""What people install: the wheel holds the data it needs, and works from where it is unpacked."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRY = """
import torch, l2o_graph
assert l2o_graph.__file__.startswith({folder!r}), l2o_graph.__file__
model = torch.nn.Linear(3, 2)
optimizer = l2o_graph.NGOptimizer(model.parameters())
before = model.weight.detach().clone()
model(torch.ones(4, 3)).square().sum().backward()
optimizer.step()
assert not torch.equal(model.weight, before)
print(*l2o_graph.list_checkpoints())
"""


@pytest.mark.slow
def test_the_wheel_works_by_itself(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    packaged = ("controllers/general", "cnn/cnn-park", "inr/fmnist-inr", "inr/mnist-inr")
    assert {f"l2o_graph/zoo/{name}.safetensors" for name in packaged} < {*names}
    assert "l2o_graph/datasets/fmnist_sample.npz" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "examples"))]
    # In the folder and without the site's .pth files of an editable installation first.
    folder = str(tmp_path / "unpacked")
    run = [sys.executable, "-W", "ignore", "-c", TRY.format(folder=folder)]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "general" in done.stdout.split()
