"""Measure the overhead of `evaluate.py --detector` against calling a third-party detector directly.

Main entry: `costs(shards, folder, network)`.

- `shards`: the folder (Path) of packed sets; the set `small` in it is used.
- `folder`: a folder (Path) with the same images as `.jpg` files below its subfolder `raw/`. Model
  files are written to it: `detector.py`, `timm/`, `hf/`. FileExistsError is raised if `timm/` is
  there already.
- `network`: the timm name of a network. Its weights are random.

The detectors are a Python file (`file`) and a timm model (`timm`), both with this network, and a
tiny ViT of transformers (`hf`, if installed). An adapter is the object through which `evaluate.py
--detector` calls such a detector (`OtherDetector`). Each detector is timed three times: by hand,
through its adapter, and by hand again.

- By hand: Pillow opens image files in one thread, and the library's own calls score them.
- Through the adapter: the same images are read from shards; then the same preprocessing and network
  run, with batches of the same size.

`costs()` returns a dict: kind of detector -> dict of its figures. A time is a dict of `seconds` and
CPU seconds (`processor_s`).

- `by_hand`: a list of the two times by hand.
- `adapter`: the time through the adapter.
- `ratio`: a dict of `seconds` and `processor_s`, each that of `adapter` divided by the mean of
  `by_hand`.
- `alone`: the time through the adapter without preprocessing and network (`Nothing`): reading and
  decoding remain.
- `alone_ratio`: the CPU seconds of `alone`, divided by the mean CPU seconds by hand.

`print_costs(figures, images)` takes this dict and the number of images and prints a table; `python
-m benchmarks.evaluation --detector` calls both. `of_file()`, `of_timm()` and `of_transformers()`
each make one kind of detector and return a pair: its adapter, and a function that scores a list of
Pillow images by hand. `spent(work)` calls `work()` and returns its time.
"""

import importlib.util
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import console
from model.adapters.detector import OtherDetector
from model.adapters.networks import open_timm, open_transformers
from model.adapters.python_file import open_file
from model.evaluation.scoring import score_shards
from model.score import AT_A_TIME
from sharding.format import open_shards

FILE = """
import timm, torch
from timm.data import create_transform, resolve_data_config
net = timm.create_model("{network}", num_classes=2).eval()
transform = create_transform(**resolve_data_config(model=net))

def predict(images):
    with torch.inference_mode():
        return net(torch.stack([transform(image) for image in images])).softmax(1)[:, 1].tolist()
"""

Bare = Callable[[Sequence[Image.Image]], Any]


def spent(work: Callable[[], Any]) -> dict[str, float]:
    """Run `work` and return its wall-clock seconds and its CPU seconds (with child processes)."""

    def processor() -> float:
        of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in of)

    began, cost = time.perf_counter(), processor()
    work()
    return {"seconds": time.perf_counter() - began, "processor_s": processor() - cost}


def of_file(folder: Path, network: str) -> tuple[OtherDetector, Bare]:
    """Return the adapter and the direct call of a Python file with a timm network."""
    path = folder / "detector.py"
    path.write_text(FILE.format(network=network), encoding="utf-8")
    detector = open_file(path, trust=True)
    return detector, detector.judge.predict


def of_timm(folder: Path, network: str) -> tuple[OtherDetector, Bare]:
    """Return the adapter and the direct call of a timm model in a local folder."""
    model = folder / "timm"
    model.mkdir()
    net = timm.create_model(network, num_classes=2).eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, model / "model.safetensors")
    settings = {**net.pretrained_cfg, "num_classes": 2, "label_names": ["real", "fake"]}
    config = {"architecture": network, "num_classes": 2, "pretrained_cfg": settings}
    (model / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    transform = create_transform(**resolve_data_config(model=net))

    def bare(images: Sequence[Image.Image]) -> Any:
        with torch.inference_mode():
            return net(torch.stack([transform(image) for image in images])).softmax(1)

    return open_timm(str(model), device="cpu"), bare


def of_transformers(folder: Path) -> tuple[OtherDetector, Bare]:
    """Return the adapter and the direct call of a tiny ViT of transformers.

    It has width 192, 12 layers, 224 pixels and random weights.
    """
    import transformers

    model = folder / "hf"
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
        id2label={0: "real", 1: "fake"},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(model)
    transformers.ViTImageProcessor().save_pretrained(model)
    net = transformers.AutoModelForImageClassification.from_pretrained(model).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(model)

    def bare(images: Sequence[Image.Image]) -> Any:
        with torch.inference_mode():
            return net(**processor(images=list(images), return_tensors="pt")).logits.softmax(1)

    return open_transformers(str(model), device="cpu"), bare


class Nothing:
    """Detector without computation, to time reading, decoding and the adapter alone."""

    fixed_batches = False

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def score(self, prepared: Sequence[Image.Image]) -> np.ndarray:
        return np.full(len(prepared), 0.5)


def costs(shards: Path, folder: Path, network: str) -> dict[str, Any]:
    """Return the cost of each kind of detector by hand and by its adapter, and their ratio.

    transformers is skipped where it is not installed.
    """
    made = {"file": of_file(folder, network), "timm": of_timm(folder, network)}
    if importlib.util.find_spec("transformers"):
        made["hf"] = of_transformers(folder)
    shard_set = open_shards([shards / "small"])
    files = sorted((folder / "raw").rglob("*.jpg"))
    figures = {}
    for kind, (detector, bare) in made.items():

        def by_hand(bare: Bare = bare) -> None:
            for first in range(0, len(files), AT_A_TIME):
                images = [Image.open(f).convert("RGB") for f in files[first : first + AT_A_TIME]]
                bare(images)

        def adapted(detector: OtherDetector = detector) -> None:
            score_shards(detector, shard_set)

        bare([Image.fromarray(np.zeros((150, 200, 3), np.uint8))] * AT_A_TIME)
        adapted()  # warm-up: the first call takes 0.3 s more for every detector
        first, between, second = spent(by_hand), spent(adapted), spent(by_hand)
        by_hand_cost = {name: (first[name] + second[name]) / 2 for name in first}
        ratio = {name: between[name] / by_hand_cost[name] for name in between}
        # The load of the machine changes a network's time by more than an adapter costs.
        empty = replace(detector, judge=Nothing())
        alone = spent(lambda empty=empty: score_shards(empty, shard_set))
        figures[kind] = {
            "by_hand": [first, second], "adapter": between, "ratio": ratio, "alone": alone,
            "alone_ratio": alone["processor_s"] / by_hand_cost["processor_s"],
        }  # fmt: skip
    return figures


def print_costs(figures: dict[str, Any], images: int) -> None:
    """Print a table with a row for each kind of detector."""
    rows = [
        [kind, *(cost[which] for which in ("seconds", "processor_s")
                 for cost in (*figure["by_hand"], figure["adapter"])),
         figure["ratio"]["seconds"], figure["ratio"]["processor_s"],
         figure["alone"]["processor_s"], figure["alone_ratio"]]
        for kind, figure in figures.items()
    ]  # fmt: skip
    columns = ["detector", "by hand, s", "again", "adapter", "by hand, processor s", "again",
               "adapter", "ratio", "ratio of processor s", "reading and adapter alone",
               "of by hand"]  # fmt: skip
    console.table(f"adapters on {images:,} small images", columns, rows)
