"""Faster imports: the same functions, and whole packages for whoever imports them later."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.lean_import import import_part
from tests.builders import ROOT

PART = "torchmetrics.functional.classification"


def run(code: str) -> str:
    """Run code in a new process, which has imported nothing, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What one new process prints of its modules and optimizers: torch loads slowly."""
    code = """
import json, sys, model.metrics
with_metrics = [*sys.modules]
import model.tracking.history
with_history = [*sys.modules]
import boto3
import torch
from model.lean_import import lean_import
weight = torch.ones(3, requires_grad=True)
with lean_import():
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    solver = torch.optim.LBFGS([weight])
weight.sum().backward()
solver.step(lambda: weight.square().sum())
with lean_import():
    optimizer.state_dict()
    torch.nn.functional.gelu(torch.nn.Linear(3, 3, device="meta")(torch.ones(1, 3, device="meta")))
print(json.dumps({
    "with_metrics": with_metrics,
    "with_history": with_history,
    "with_optimizers": [*sys.modules],
}))
"""
    return json.loads(run(code))


def test_metrics_load_neither_texts_nor_sounds_nor_the_compiler(printed: dict[str, Any]) -> None:
    loaded = printed["with_metrics"]
    assert "torch" in loaded and "model.metrics" in loaded
    unwanted = {"transformers", "scipy.signal", "torch._dynamo", "torchvision", "torchmetrics"}
    assert not unwanted & set(loaded)


def test_a_history_of_tensorboard_loads_no_client_of_s3(printed: dict[str, Any]) -> None:
    assert "tensorboard" in printed["with_history"] and "boto3" not in printed["with_history"]


@pytest.mark.slow
def test_a_later_import_gets_the_whole_package() -> None:
    code = f"""
import model.metrics, torch, torchmetrics
from {PART} import binary_auroc
import torchmetrics.functional as functional
scores, labels = torch.tensor([0.1, 0.9, 0.3]), torch.tensor([0, 1, 1])
assert functional.classification.binary_auroc is binary_auroc
assert functional.text and torchmetrics.AUROC
assert model.metrics.classification.binary_auroc(scores, labels) == binary_auroc(scores, labels)
print("same")
"""
    assert run(code) == "same"


@pytest.mark.slow
def test_a_loaded_package_is_used_as_it_is() -> None:
    code = f"import torchmetrics, sys, model.metrics as m; print(m.classification.__name__, " \
        f"m.classification is sys.modules['{PART}'])"  # fmt: skip
    assert run(code) == f"{PART} True"


def test_a_part_is_imported_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the part, no half-made package is left for other imports."""
    inner = tmp_path / "outer_package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (inner / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (inner / "part.py").write_text("from outer_package.inner import other\n")
    (inner / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    part = import_part("outer_package", "inner.part")
    assert (part.__name__, part.other.__name__) == (
        "outer_package.inner.part", "outer_package.inner.other",
    )  # fmt: skip
    assert not [name for name in sys.modules if name.startswith("outer_package")]


def test_a_part_that_cannot_be_imported_alone_is_imported_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "whole_package"
    package.mkdir()
    (package / "__init__.py").write_text("needed = 1")
    (package / "part.py").write_text("from whole_package import needed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as caught:
        import_part("whole_package", "nothing.here")
    assert caught.value.name == "whole_package.nothing"
    del sys.modules["whole_package"]
    part = import_part("whole_package", "part")
    assert part.needed == 1 and sys.modules.pop("whole_package.part") is part
    del sys.modules["whole_package"]


def test_an_optimizer_does_not_load_the_compiler(printed: dict[str, Any]) -> None:
    assert "torch._dynamo" not in printed["with_optimizers"]


@pytest.mark.slow
def test_torch_compile_works_later() -> None:
    code = """
import json, sys, torch
from model.lean_import import lean_import
weight = torch.ones(3, requires_grad=True)
with lean_import():
    optimizer = torch.optim.AdamW([weight], lr=0.1)
assert "torch._dynamo" not in sys.modules
weight.sum().backward()
optimizer.step()
double = torch.compile(lambda x: 2 * x, backend="eager")
later = torch.optim.AdamW([torch.ones(3, requires_grad=True)])
print(json.dumps({
    "doubled": double(torch.ones(2)).tolist(),
    "compiler": "torch._dynamo" in sys.modules,
    "later_lr": later.param_groups[0]["lr"],
    "steps": optimizer.state[weight]["step"].item(),
}))
"""
    assert json.loads(run(code)) == {
        "doubled": [2, 2], "compiler": True, "later_lr": 0.001, "steps": 1.0,
    }  # fmt: skip
