"""Faster imports: the same functions, and whole packages for whoever imports them later."""

import subprocess
import sys

import pytest

from tests.builders import ROOT

PART = "torchmetrics.functional.classification"


def run(code: str) -> str:
    """Run code in a new process, which has imported nothing, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_metrics_load_neither_texts_nor_sounds_nor_the_compiler() -> None:
    code = "import sys, model.metrics; print(*sys.modules, sep='\\n')"
    loaded = run(code).split()
    assert "torch" in loaded and "model.metrics" in loaded
    unwanted = {"transformers", "scipy.signal", "torch._dynamo", "torchvision", "torchmetrics"}
    assert not unwanted & set(loaded)


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


@pytest.mark.parametrize(("package", "part"), [("email", "mime.text"), ("email", "nothing.here")])
def test_a_part_of_another_package(package: str, part: str) -> None:
    code = f"""
import sys
from model.lean_import import import_part
for key in [key for key in sys.modules if key.startswith("{package}")]:
    del sys.modules[key]
try:
    print(import_part("{package}", "{part}").__name__)
except ImportError as error:
    print("no", error.name)
"""
    assert run(code) == {"mime.text": "email.mime.text", "nothing.here": "no email.nothing"}[part]


def test_an_optimizer_does_not_load_the_compiler_and_torch_compile_works_later() -> None:
    code = """
import sys, torch
from model.lean_import import lean_import
weight = torch.ones(3, requires_grad=True)
with lean_import():
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    solver = torch.optim.LBFGS([weight])
weight.sum().backward()
solver.step(lambda: weight.square().sum())
assert "torch._dynamo" not in sys.modules
optimizer.step()
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(2)).tolist() == [2, 2] and "torch._dynamo" in sys.modules
other = torch.optim.AdamW([torch.ones(3, requires_grad=True)])
print(other.param_groups[0]["lr"], optimizer.state[weight]["step"].item())
"""
    assert run(code) == "0.001 1.0"
