"""Tests of decoders: a VAE in diffusers format is loaded from a folder or the hub, without code."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sharding.pairs import decoder as module
from sharding.pairs.decoder import CONFIG_FILE, WEIGHTS_FILE, DecoderError, find_decoder
from sharding.pairs.decoder import load_decoder as load
from storage import sha256_of
from tests.builders import photo
from tests.sharding.pairs.vae import save_kl, save_plain


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kl(tmp_path_factory.mktemp("models") / "My KL" / "vae")


@pytest.mark.slow  # loading diffusers takes seconds
def test_any_image_size_is_unchanged_and_the_result_is_reproducible(kl: Path) -> None:
    decoder = load(str(kl), "cpu")
    assert (decoder.name, decoder.kind, decoder.factor) == ("my_kl", "AutoencoderKL", 4)
    assert decoder.sha256 == sha256_of(kl / WEIGHTS_FILE)
    for width, height in ((33, 18), (32, 16), (1, 1)):
        pixels = photo(1, width, height)
        made = decoder.reconstruct(pixels)
        assert made.shape == pixels.shape and made.dtype == np.uint8
        assert (made == load(str(kl), "cpu").reconstruct(pixels)).all()


@pytest.mark.slow  # loading diffusers takes seconds
def test_padding_repeats_the_border(kl: Path) -> None:
    decoder, pixels = load(str(kl), "cpu"), photo(1, 33, 18)
    whole = np.pad(pixels, [(0, 2), (0, 3), (0, 0)], mode="edge")
    expected = decoder.reconstruct(whole)[:18, :33]
    assert np.abs(decoder.reconstruct(pixels).astype(int) - expected).max() <= 1


@pytest.mark.slow  # loading diffusers takes seconds
def test_a_plain_tiny_autoencoder_returns_nearly_the_same_image(tmp_path: Path) -> None:
    decoder = load(str(save_plain(tmp_path / "plain")), "cpu")
    pixels = photo(2, 41, 30)
    assert decoder.kind == "AutoencoderTiny"
    # Its latents pass through 3 tanh(x / 3), which lowers white by 9 of 255 levels.
    assert 0 < np.abs(decoder.reconstruct(pixels).astype(int) - pixels).max() <= 10


@pytest.mark.slow  # loading diffusers takes seconds
def test_pickles_other_classes_and_missing_files_are_refused(kl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    config = json.loads((kl / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DecoderError, match=r"has no .*safetensors .*pickles are not read"):
        load(str(folder))
    (folder / WEIGHTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(DecoderError, match="no AutoencoderKL that diffusers loads"):
        load(str(folder), "cpu")
    (folder / CONFIG_FILE).write_text(json.dumps({"_class_name": "MyCode", "auto_map": {}}))
    with pytest.raises(DecoderError, match="_class_name is 'MyCode', expected AutoencoderKL or"):
        load(str(folder), "cpu")
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(DecoderError, match="is no JSON"):
        load(str(folder), "cpu")
    with pytest.raises(DecoderError, match="is no folder and no name of the hub"):
        find_decoder("../nowhere")


@pytest.mark.usefixtures("server")
def test_only_two_files_are_downloaded_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The files are not read before the decoder is loaded."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    asked: list[tuple] = []
    vae = tmp_path / "My KL" / "vae"
    vae.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (vae / file).touch()

    def download(repository: str, *, allow_patterns: list[str], **_options: object) -> str:
        asked.append((repository, *allow_patterns))
        return str(vae.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_decoder("owner/name/vae") == vae
    assert asked == [("owner/name", f"vae/{CONFIG_FILE}", f"vae/{WEIGHTS_FILE}")]
    with pytest.raises(DecoderError, match="has no folder other"):
        find_decoder("owner/name/other")

    for kind in (OSError, HTTPError):  # the second: a download that breaks off

        def offline(*_args: object, kind: type[Exception] = kind, **_options: object) -> str:
            raise kind("no route")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        with pytest.raises(DecoderError, match=r"did not come from the hub \(no route\)"):
            find_decoder("owner/name")


def test_without_diffusers_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(module, "find_decoder", lambda _name: pytest.fail("downloaded"))
    with pytest.raises(DecoderError, match="pairs need diffusers; install the extra `pairs`"):
        load("owner/name", "cpu")


def test_outputs_that_are_not_finite_are_refused() -> None:
    import torch

    class Broken:
        def encode(self, image: torch.Tensor) -> dict:
            return type("Encoded", (dict,), {"latents": image})(latents=image)

        def decode(self, latent: torch.Tensor) -> object:
            return type("Decoded", (), {"sample": latent / 0})

    with pytest.raises(DecoderError, match="finite ones"):
        module._reconstruct(Broken(), photo(1, 8, 8), 1, "cpu")


class Latents(dict):
    """Output of a diffusers encoder: a mapping whose keys are also attributes."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(("levels", "expected"), [(0.6, 101), (0.4, 100), (300, 255), (-300, 0)])
def test_values_are_rounded_and_clipped_to_0_to_255(levels: float, expected: int) -> None:
    vae = SimpleNamespace(
        encode=lambda image: Latents(latents=image),
        decode=lambda latent: SimpleNamespace(sample=latent + levels / 127.5),
    )
    pixels = np.full((4, 5, 3), 100, np.uint8)
    assert (module._reconstruct(vae, pixels, 2, "cpu") == expected).all()


@pytest.mark.slow  # loading diffusers takes seconds
def test_a_decoder_without_three_channels_is_refused(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        in_channels=1, out_channels=3, encoder_block_out_channels=(4,), num_encoder_blocks=(1,),
        decoder_block_out_channels=(4,), num_decoder_blocks=(1,),
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(DecoderError, match=r"has \(1, 3\) channels in and out, expected \(3, 3\)"):
        load(str(tmp_path), "cpu")
