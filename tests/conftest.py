"""Real, tiny, seeded data: awkward images, and shard sets built by the real builder."""

import io
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import recipes
from model import checkpoint
from model.network import Network
from model.network import build as build_network
from pipeline import Loading, Pool, Replay, Stream, open_loader, open_pool
from pipeline.augment import Augment, View
from sharding.build import build
from sharding.catalog import Catalog, read_catalog
from sharding.format import ShardSet, open_shards

VIEW = View(size=48, resize=54)

TINY = Network(
    name="convnextv2_atto",
    pretrained=False,
    scratch="fan_in",
    options={"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "patch_size": 2},
)

# Every operation at once, often: nothing of the graph stays unused.
HARSH = Augment(
    scale=(0.4, 1.0), ratio=(0.8, 1.25), flip=0.5, jitter=0.6, brightness=0.3, contrast=0.3,
    saturation=0.3, hue=0.1, resample=0.5, resample_scale=(0.6, 0.95), jpeg=0.5,
    jpeg_quality=(40, 95), blur=0.5, blur_sigma=(0.1, 0.8), grey=0.2, jpegs=(1, 3), grid=0.4,
    resample_filters=("bilinear", "bicubic", "lanczos"), webp=0.3, webp_quality=(40, 90),
)  # fmt: skip


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Without a GPU its tests are skipped with a reason, or fail where one is required."""
    if torch.cuda.is_available() or os.environ.get("REQUIRE_GPU"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def photo(seed: int, width: int = 90, height: int = 70) -> np.ndarray:
    """Smooth colour fields with noise: compresses like a photograph, and every pixel matters."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + rng.normal(0, 5, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def encode(
    pixels: np.ndarray | Image.Image, image_format: str = "JPEG", **options: object
) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


CATALOG = """
[sets]
old = "train"
new = "train"
val = "val"

[sources.alpha]
licence = "test"
set = "old"
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "gan" }]

[sources.beta]
licence = "test"
set = "old"
law = "dda"
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "vae" }]

[sources.dummy]
licence = "test"
set = "old"
replay = false
fake = ["fake"]

[sources.gamma]
licence = "test"
set = { new = 0.8, val = 0.2 }
real = [{ folder = "real", generator = "camera" }]
fake = [{ folder = "fake", generator = "diffusion" }]
"""


def write_raw(folder: Path) -> Path:
    """Raw datasets and `catalog.toml`: 40 + 30 + 10 old images, 120 new or validation ones."""
    kinds = [
        ("jpg", "JPEG", {"quality": 90}), ("JPEG", "JPEG", {"quality": 75, "subsampling": 0}),
        ("png", "PNG", {}), ("webp", "WEBP", {"quality": 80}),
    ]  # fmt: skip
    plan = {"alpha": (25, 15), "beta": (15, 15), "dummy": (0, 10), "gamma": (60, 60)}
    number = 0
    for source, counts in plan.items():
        for label, count in zip(("real", "fake"), counts, strict=True):
            for i in range(count):
                suffix, image_format, options = kinds[number % len(kinds)]
                pixels = photo(number, 60 + 7 * (number % 9), 60 + 5 * (number % 7))
                path = folder / source / label / f"{i:03d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                # The fakes carry a grid, so that something can be learned.
                pixels[::2, ::2] = pixels[::2, ::2] // 2 if label == "fake" else pixels[::2, ::2]
                path.write_bytes(encode(pixels, image_format, **options))
                number += 1
    (folder / "catalog.toml").write_text(CATALOG)
    return folder


def build_all(
    raw: Path, out: Path, jobs: int = 1, catalog: Catalog | None = None, max_bad: float = 0.01
) -> Path:
    """Every set of `raw`, by the real builder."""
    catalog = catalog or read_catalog([raw / "catalog.toml"])
    build(catalog, raw, out, jobs=jobs, max_bad=max_bad)
    return out


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def data(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the sets old, new and val."""
    return build_all(raw, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def old(data: Path) -> ShardSet:
    return open_shards([data / "old"])


@pytest.fixture(scope="session")
def new(data: Path) -> ShardSet:
    return open_shards([data / "new"])


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the program logs from info on, a message each."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ai_images_detector")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which s3:// means moto's server."""
    log = (tmp_path_factory.mktemp("s3") / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = ""
    for _ in range(300):
        log.seek(0)
        if found := [w for w in log.read().split() if w.startswith("http://127.0.0.1:")]:
            address = found[0]
            break
        time.sleep(0.1)
    assert address, "moto's server did not start"
    yield {
        "AWS_ENDPOINT_URL": address,
        "FSSPEC_S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture(scope="session")
def client(s3: dict[str, str]) -> Iterator[object]:
    """Amazon's own client of that server."""
    import boto3  # the other tests must run where it is not installed

    found = boto3.client(
        "s3", endpoint_url=s3["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    yield found
    found.close()


@pytest.fixture
def make_stream(data: Path) -> Callable[..., Stream]:
    """A training stream over the tiny sets: `make_stream(backend="pil", batch_size=6, ...)`."""

    def make(
        *, batch_size: int = 6, rank: int = 0, world: int = 1, pool: Pool | None = None,
        old_per_new: str = "1:8", seed: int = 3, **loading: object,
    ) -> Stream:  # fmt: skip
        replay = Replay(sets=["old"], old_per_new=old_per_new)
        pool = pool or open_pool(data, ["new"], replay)
        loader = open_loader(
            pool.shards, view=VIEW, loading=Loading(batch_size=batch_size, **loading),
            device=torch.device("cpu"), rank=rank, world=world,
        )  # fmt: skip
        return Stream(loader, pool, replay, {"train": HARSH, "dda": Augment()}, "train", seed)

    return make


@dataclass
class SmallRecipe:
    """What a checkpoint must know of a recipe."""

    name: str = "small"
    network: Network = field(default_factory=lambda: TINY)
    view: View = field(default_factory=lambda: View(size=32, resize=36))


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with one checkpoint, whose network is drawn and not trained."""
    runs = tmp_path_factory.mktemp("small_runs")
    torch.manual_seed(1)
    checkpoint.save(
        runs / "small" / "step_0000001", build_network(TINY, pretrained=False),
        recipe=SmallRecipe(), step=1, epoch=1, metrics={}, selection=0.5, data={"train": ["x"]},
        state=None,
    )  # fmt: skip
    return runs


CALIBRATION = {
    "fitted_on": ["val"], "index_sha256": {"val": "0" * 64}, "reals": 40, "fakes": 30,
    "threshold_at": "auto", "threshold_fpr_1": None, "threshold_fpr_5": 0.6, "band": [0.3, 0.6],
    "before": {"nll": 0.5, "ece": 0.1}, "after": {"nll": 0.4, "ece": 0.05},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, calibrated, step 7 of the run `tiny`."""
    torch.manual_seed(5)
    net = build_network(TINY, pretrained=False)
    for name, weight in net.named_parameters():
        if "grn" in name:  # zero at first, and then without effect
            torch.nn.init.normal_(weight)
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "step_0000007"
    checkpoint.save(
        folder, net, recipe=SmallRecipe(name="tiny", view=VIEW), step=7, epoch=0.5,
        metrics={}, selection=None, data={"train": ["old"], "replay": []}, state=None,
    )  # fmt: skip
    checkpoint.annotate(folder, {"temperature": 1.7, "threshold": 0.6, "calibration": CALIBRATION})
    return folder


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    """A recipe that trains in a second, on the tiny sets."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""
extends = ["{recipes.FOLDER / "phase1.toml"}"]
name = "tiny"
[data]
train = ["old"]
validate = ["val"]
[view]
size = 32
resize = 36
[network]
name = "convnextv2_atto"
pretrained = false
scratch = "fan_in"
drop_path = 0.2
[network.options]
depths = [1, 1, 2, 1]
dims = [8, 8, 16, 16]
patch_size = 2
[loading]
batch_size = 16
workers = 0
[run]
epochs = 2
log_every = 2
"""
    )
    return path


def train_tiny(data: Path, runs: Path, *overrides: str) -> Path:
    """Train a network of a few thousand weights on the tiny sets, as run `tiny`; returns `runs`."""
    import train  # here, because TensorBoard takes a second to import

    settings = [
        'name="tiny"', 'data.train=["old"]', 'data.validate=["val"]', "view.size=32",
        "view.resize=36", 'network.name="convnextv2_atto"', "network.pretrained=false",
        'network.scratch="fan_in"', "network.options.depths=[1,1,2,1]",
        "network.options.dims=[8,8,16,16]", "network.options.patch_size=2", "run.epochs=1",
        "loading.batch_size=16", "loading.workers=0", *overrides,
    ]  # fmt: skip
    recipe = recipes.load(train.Recipe, recipes.FOLDER / "phase1.toml", settings)
    train.train(recipe, data, runs)
    return runs


def can_mount() -> bool:
    """Whether a test may mount a file system of its own."""
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([unshare, "-m", "true"], check=False).returncode
