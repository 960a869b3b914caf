"""Import of the original project's checkpoint: same logits, and no code is run."""

import hashlib
import pickle
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from model import checkpoint
from model.__main__ import main
from model.export import import_original
from model.inference.fitness import notices
from model.network import normalization
from model.recipe import Network
from tests.builders import TINY
from tests.servers import Server


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Use a ConvNeXtV2 of a few kB instead of Base, whose weights have 350 MB."""
    monkeypatch.setattr(import_original, "Network", lambda **_: TINY)
    torch.manual_seed(0)
    return timm.create_model(TINY.name, num_classes=2, **TINY.options).eval()


def published(net: nn.Module, path: Path, prefix: str = "") -> Path:
    """Write a file as the original training code does, and return its path."""
    optimizer = torch.optim.AdamW(net.parameters())
    model = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save(
        {"epoch": 4, "model": model, "optimizer": optimizer.state_dict(),
         "scheduler": {"_step_count": 7}, "scaler": {}}, path,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_the_imported_network_computes_the_same_logits(
    small: nn.Module, tmp_path: Path, prefix: str
) -> None:
    file = published(small, tmp_path / "checkpoint_phase2.pth", prefix)
    result = CliRunner().invoke(main, ["import", str(file), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(main, ["import", str(file), "--runs", str(tmp_path / "runs")])
    assert again.exit_code == 1 and "exists; name another run with --run" in again.output
    net, preprocess, meta = checkpoint.load_network(checkpoint.find(tmp_path / "runs"))
    assert (preprocess.crop_size, preprocess.resize_size) == (256, 288)
    assert meta["classes"] == ["real", "fake"]
    assert [notice.kind for notice in notices(meta)] == ["uncalibrated"]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in normalization(TINY))
    with torch.inference_mode():
        expected = small((images / 255 - mean) / std)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


def test_the_network_is_the_originals() -> None:
    network = import_original.recipe_of("x").network
    assert network == Network(
        name="convnextv2_base",
        pretrained=False,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    with torch.device("meta"):
        net = timm.create_model(network.name, num_classes=2)
    assert len(net.state_dict()) == 380
    assert sum(p.numel() for p in net.parameters()) == 87_694_850


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda p: torch.save({"model": Evil()}, p), "contains more than tensors"),
        (lambda p: p.write_bytes(pickle.dumps(Evil())), "contains more than tensors"),
        (lambda p: p.write_bytes(b"not a checkpoint"), "checkpoint"),
        (lambda p: torch.save(torch.zeros(3), p), "expected a dictionary of weights"),
        (lambda p: torch.save({"epoch": 3, "model": {"a": 1}}, p), "expected `model` with"),
        (lambda p: torch.save({"model": {"a": torch.zeros(1)}}, p), "do not fit"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(
    small: nn.Module, tmp_path: Path, content, said: str, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "x.pth"
    content(path)
    result = CliRunner().invoke(main, ["import", str(path), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 1
    assert said in result.output
    assert "code was run" not in result.output + capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_the_published_file_is_downloaded_and_checked(
    small: nn.Module, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    body = published(small, tmp_path / "p.pth").read_bytes()
    digest = hashlib.sha256(body).hexdigest()
    path = (
        f"/{import_original.REPOSITORY}/resolve/{import_original.REVISION}/{import_original.FILE}"
    )
    server.bodies[path] = body
    server.headers[path] = {"ETag": f'"{digest}"', "X-Repo-Commit": import_original.REVISION}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = ["fetch", "original", "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "it is not the published file, and is not used" in result.output.replace("\n", " ")
    monkeypatch.setattr(import_original, "SHA256", digest)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    folder = checkpoint.find(tmp_path / "runs")
    assert folder.parent.name == "original"
    # The audit is recorded only for the published file.
    texts = [notice.text for notice in notices(checkpoint.read_meta(folder))]
    assert len(texts) == 2 and "15 of 32 real web photographs AI (47 %" in texts[0]
    assert "this detector is not calibrated" in result.output
    server.bodies.clear()
    monkeypatch.setattr(import_original, "REVISION", "0" * 40)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "could not be downloaded" in result.output and "python -m model import" in result.output
    said = result.output.replace("\n", "")
    assert f"by hand from {server.url}/{import_original.REPOSITORY}/resolve/{'0' * 40}/" in said
