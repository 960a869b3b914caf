"""Classifiers of transformers and timm, from a local test hub and from folders: scores equal those
of the library, and no pickle or repository code is loaded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model.adapters.detector import DetectorError, OtherDetector
from model.adapters.networks import open_timm, open_transformers
from model.evaluation.scoring import logits_in_batch
from tests.builders import photo
from tests.servers import MODEL, NEW, Server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SAME = 1e-6
"""Tolerance of a probability: float32 sums depend on the batch size."""


def vit(folder: Path, labels: dict[int, str]) -> Path:
    """Write a transformers classifier with random weights, and return its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, id2label=labels,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config)
    torch.nn.init.normal_(net.classifier.weight)
    net.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size, do_resize=True).save_pretrained(folder)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pictures(count: int) -> list[np.ndarray]:
    return [photo(seed, 50 + seed, 60) for seed in range(count)]


def probabilities(detector: OtherDetector, images: list[np.ndarray]) -> np.ndarray:
    return np.array([one.probability for one in detector.predict(images, 4)])


def test_transformers_from_the_hub(server: Server, tmp_path: Path) -> None:
    """The expected values come from the library's processor and model, called directly."""
    transformers = pytest.importorskip("transformers")
    folder = vit(tmp_path / "made", {0: "artificial", 1: "human"})
    pickled = {"pytorch_model.bin": b"never", "evil.py": b"raise SystemExit"}
    server.publish_model(files_in(folder) | pickled, NEW)
    detector = open_transformers(MODEL)
    brought = {path.rpartition("/")[2] for path, _ in server.got("/resolve/")}
    assert "model.safetensors" in brought and not brought & set(pickled)
    about = detector.meta["detector"]
    assert (about["revision"], about["fake_labels"]) == (NEW, ["artificial"])
    assert detector.identity.startswith(f"hf:{MODEL} ")
    net = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = pictures(6)
    with torch.inference_mode():
        expected = [
            net(**processor(images=Image.fromarray(image), return_tensors="pt"))
            .logits.double().softmax(1)[0, 0].item()
            for image in images
        ]  # fmt: skip
    np.testing.assert_allclose(probabilities(detector, images), expected, atol=SAME)
    assert np.ptp(expected) > 0.01


def test_which_label_is_fake_is_not_guessed(tmp_path: Path) -> None:
    named = vit(tmp_path / "named", {0: "artificial", 1: "human"})
    silent = vit(tmp_path / "silent", {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(DetectorError, match="name them with --fake-label"):
        open_transformers(str(silent))
    images = pictures(3)
    first, second = (
        probabilities(open_transformers(str(silent), fake_labels=[label]), images)
        for label in ("LABEL_0", "LABEL_1")
    )
    np.testing.assert_allclose(first + second, 1, atol=SAME)
    np.testing.assert_allclose(probabilities(open_transformers(str(named)), images), first)


def test_neither_pickles_nor_code_of_a_repository_are_loaded(tmp_path: Path) -> None:
    folder = vit(tmp_path / "made", {0: "fake", 1: "real"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = {"model_type": "evil", "auto_map": {"AutoModelForImageClassification": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(DetectorError, match="which is never run"):
        open_transformers(str(folder))
    (folder / "config.json").write_text(json.dumps(config | own | {"model_type": []}))
    with pytest.raises(DetectorError, match="which is never run"):
        open_transformers(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 100_001}))
    with pytest.raises(DetectorError, match="num_labels 100001 in"):
        open_transformers(str(folder))
    many = config | {"problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(many))
    with pytest.raises(DetectorError, match="probability of its own"):
        open_transformers(str(folder))
    for opened in (open_transformers, open_timm):
        (folder / "config.json").write_text("[1, 2]")
        with pytest.raises(DetectorError, match=r"config.json that is no object of JSON: \[1, 2\]"):
            opened(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DetectorError, match="never opened"):
        open_transformers(str(folder))
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_not_initialized_at_random(tmp_path: Path) -> None:
    """transformers would initialize a missing head at random and score with it."""
    from safetensors.torch import load_file

    folder = vit(tmp_path / "made", {0: "fake", 1: "real"})
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DetectorError, match="has no weights for classifier"):
        open_transformers(str(folder))


def test_weights_of_another_network_are_not_ignored(tmp_path: Path) -> None:
    """As of a head on stages: transformers builds timm's own head and scores with it."""
    from safetensors.torch import load_file

    folder = vit(tmp_path / "made", {0: "fake", 1: "real"})
    extra = {"timm_model.stage_head.fc.weight": torch.zeros(2, 8)}
    tensors = load_file(folder / "model.safetensors") | extra
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DetectorError, match=r"weights that its network does not use.*stage_head"):
        open_transformers(str(folder))


def test_a_missing_model_is_refused(server: Server) -> None:
    pytest.importorskip("transformers")
    for name, said in ((MODEL, "could not be downloaded"), ("no such name", "neither a folder")):
        with pytest.raises(DetectorError, match=said):
            open_transformers(name)


def timm_model(folder: Path, **settings: Any) -> Path:
    """Write a small timm network with random weights in timm's hub format; return its folder."""
    import timm

    torch.manual_seed(4)
    net = timm.create_model("convnextv2_atto", num_classes=2, depths=[1, 1, 1, 1], dims=[8] * 4)
    torch.nn.init.normal_(net.head.fc.weight)
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "num_classes": 2, "mean": [0.5] * 3, "std": [0.5] * 3,
           "first_conv": "stem.0", "classifier": "head.fc", "crop_pct": 1.0}  # fmt: skip
    config = {"architecture": "convnextv2_atto", "num_classes": 2, "pretrained_cfg": cfg,
              "model_args": {"depths": [1, 1, 1, 1], "dims": [8] * 4}} | settings  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_timm_from_a_folder(tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    folder = timm_model(tmp_path / "made", label_names=["real", "ai"])
    detector = open_timm(str(folder))
    assert not detector.judge.net.training
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=net))
    images = pictures(5)
    with torch.inference_mode():
        expected = [
            net(transform(Image.fromarray(image))[None]).double().softmax(1)[0, 1].item()
            for image in images
        ]
    np.testing.assert_allclose(probabilities(detector, images), expected, atol=SAME)
    assert np.ptp(expected) > 1e-4
    about = detector.meta["detector"]
    assert (about["name"], about["revision"], about["fake_labels"]) == ("made", "", ["ai"])


def test_timm_without_labels_needs_fake_label(tmp_path: Path) -> None:
    folder = timm_model(tmp_path / "made")
    with pytest.raises(DetectorError, match="--fake-label"):
        open_timm(str(folder))
    assert open_timm(str(folder), fake_labels=["LABEL_1"]).meta["detector"]["fake_labels"] == [
        "LABEL_1"
    ]


def test_a_partial_batch_gives_identical_scores(tmp_path: Path) -> None:
    detector = open_timm(str(timm_model(tmp_path / "made", label_names=["fake", "real"])))
    prepared = [detector.preprocess_file(image) for image in pictures(40)[:32]]
    whole = logits_in_batch(detector, prepared)
    for count in (1, 5, 31):
        assert np.array_equal(logits_in_batch(detector, prepared[:count]), whole[:count])


@pytest.mark.parametrize("make", [vit, timm_model], ids=["hf", "timm"])
def test_damaged_weights_are_a_one_line_error(tmp_path: Path, make: Callable[..., Path]) -> None:
    if make is vit:
        folder, opened = vit(tmp_path / "made", {0: "fake", 1: "real"}), open_transformers
    else:
        folder, opened = timm_model(tmp_path / "made", label_names=["fake", "real"]), open_timm
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(DetectorError, match="opens") as refused:
        opened(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_classes": None}, "num_classes None in"),
        ({"num_classes": 100_001}, "num_classes 100001 in"),
        ({"num_classes": 0}, "num_classes 0 in"),
        ({"num_classes": -5}, "num_classes -5 in"),
        ({"label_names": 5}, "label_names 5 and"),
        ({"pretrained_cfg": None}, "pretrained_cfg None in"),
        ({"pretrained_cfg": {"num_classes": 2, "mean": None, "input_size": "x"}}, "timm opens"),
    ],
)  # fmt: skip
def test_a_wrong_type_in_the_config_of_timm_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = timm_model(tmp_path / "made", **settings)
    config = json.loads((folder / "config.json").read_text())
    if settings.keys() == {"num_classes"}:
        del config["pretrained_cfg"]["num_classes"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DetectorError, match=said):
        open_timm(str(folder), fake_labels=["LABEL_1"])


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "x"}, {"image_size": None}, {"id2label": ["real", "fake"]},
        {"num_attention_heads": 0}, {"id2label": {"one": "real"}},
    ],
)  # fmt: skip
def test_an_odd_value_in_the_config_of_transformers_is_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = vit(tmp_path / "made", {0: "real", 1: "fake"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(DetectorError, match=r"no|not") as refused:
        open_transformers(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("server")
def test_a_broken_download_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def broken(*_args: object, **_options: object) -> str:
        raise HTTPError("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(DetectorError, match=r"could not be downloaded .*peer closed connection"):
        open_timm(MODEL)
