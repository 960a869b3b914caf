"""Load images with other libraries under one augmentation policy, for comparison with this
project's loader.

The policy is `[augment.train]` of `recipes/phase1.toml`, the first training phase: random crop,
flip, color jitter, resampling, JPEG, blur and grayscale. Main entries: each `*_images(place,
workers)` loads the images with one library, as its documentation shows.

- `place`: a folder (Path) that `benchmarks.loader.pack()` or `unpack()` filled:
  `images/<class>/*.jpg` and the shard set `shards/bench`.
- `workers`: the number of worker processes or threads (int, at least 1).

It is a generator of ints: the number of images of each batch, for `EPOCHS` epochs (default 1) in
batches of `BATCH` (default 30). To change these two constants, assign to the module before the
call, as `benchmarks.contenders` does: `peers.BATCH = 256`. The incomplete batch at the end of an
epoch is left out (with some libraries, that of each worker). At the first batch, ImportError is
raised if the library is not installed.

LitData, Streaming and Energon read their own format: `prepare_litdata(place)`,
`prepare_streaming(place)` or `prepare_energon(place)` must be called once before. It writes a
folder in `place` and returns nothing, or raises ImportError. A library without augmentation gets
torchvision's transforms on Pillow images (`torchvision_policy()`). All batches are uint8, as in
this project: normalization, which users of these libraries would add, is left out.
"""

import io
import tomllib
from collections.abc import Iterator
from pathlib import Path

BATCH = 30
EPOCHS = 1
"""Images per batch, and epochs; `benchmarks.contenders` sets both before a loader starts."""

SIZE = 256
RECIPE = tomllib.loads((Path(__file__).parents[1] / "recipes/phase1.toml").read_text("utf-8"))
POLICY = RECIPE["augment"]["train"]


def torchvision_policy():
    """Return the policy of phase 1 as torchvision transforms, which the original trains with."""
    import torch
    from PIL import Image
    from torchvision import transforms

    class Reencode:
        """Encode as JPEG and decode again."""

        def __call__(self, image: Image.Image) -> Image.Image:
            low, high = POLICY["jpeg_quality"]
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=int(torch.randint(low, high + 1, ())))
            return Image.open(stream).convert("RGB")

    class Resample:
        """Resize to a smaller size and back."""

        def __call__(self, image: Image.Image) -> Image.Image:
            side = int(SIZE * torch.empty(()).uniform_(*POLICY["resample_scale"]))
            bilinear = Image.Resampling.BILINEAR
            return image.resize((side, side), bilinear).resize((SIZE, SIZE), bilinear)

    jitter = transforms.ColorJitter(
        POLICY["brightness"], POLICY["contrast"], POLICY["saturation"], POLICY["hue"]
    )
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=POLICY["scale"], ratio=POLICY["ratio"]),
            transforms.RandomHorizontalFlip(POLICY["hflip"]),
            transforms.RandomApply([jitter], p=POLICY["color_jitter"]),
            transforms.RandomApply([Resample()], p=POLICY["resample"]),
            transforms.RandomApply([Reencode()], p=POLICY["jpeg"]),
            transforms.RandomApply(
                [transforms.GaussianBlur(3, POLICY["blur_sigma"])], p=POLICY["blur"]
            ),
            transforms.RandomGrayscale(p=POLICY["grayscale"]),
            transforms.PILToTensor(),
        ]
    )


def torchvision_images(place: Path, workers: int) -> Iterator[int]:
    """Load with torchvision's ImageFolder and DataLoader, as the original does."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(place / "images"), torchvision_policy())
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    for _ in range(EPOCHS):
        for images, _label in loader:
            yield len(images)


def webdataset_images(place: Path, workers: int) -> Iterator[int]:
    """Load this project's tars with WebDataset and WebLoader, shuffled by shard and in a buffer."""
    import webdataset

    policy = torchvision_policy()
    tars = sorted(map(str, (place / "shards/bench").glob("*.tar")))
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(policy, lambda facts: facts["label"])
        .batched(BATCH, partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    for _ in range(EPOCHS):
        for images, _label in loader:
            yield len(images)


def dali_images(place: Path, workers: int) -> Iterator[int]:
    """Load this project's tars and `.idx` files with DALI's reader and random numbers.

    It decodes on a GPU if there is one. Decoding and cropping are fused, as in DALI's ImageNet
    example.
    """
    import torch
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    tars = sorted(map(str, (place / "shards/bench").glob("*.tar")))
    on_gpu = torch.cuda.is_available()

    def chance(probability: float):
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def around(width: float):
        return fn.random.uniform(range=(1 - width, 1 + width))

    @pipeline_def(
        batch_size=BATCH, num_threads=workers, device_id=0 if on_gpu else None,
        enable_conditionals=True,
    )  # fmt: skip
    def policy():
        data, facts = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["jpg", "json"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1000,
            name="reader",
        )
        image = fn.decoders.image_random_crop(
            data,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            random_area=POLICY["scale"],
            random_aspect_ratio=POLICY["ratio"],
        )
        image = fn.resize(image, size=[SIZE, SIZE])
        image = fn.flip(image, horizontal=fn.random.coin_flip(probability=POLICY["hflip"]))
        if chance(POLICY["color_jitter"]):
            image = fn.color_twist(
                image,
                brightness=around(POLICY["brightness"]),
                contrast=around(POLICY["contrast"]),
                saturation=around(POLICY["saturation"]),
                hue=fn.random.uniform(range=(-360 * POLICY["hue"], 360 * POLICY["hue"])),
            )
        if chance(POLICY["resample"]):
            side = SIZE * fn.random.uniform(range=POLICY["resample_scale"])
            image = fn.resize(image, resize_x=side, resize_y=side)
            image = fn.resize(image, size=[SIZE, SIZE])
        if chance(POLICY["jpeg"]):
            low, high = POLICY["jpeg_quality"]
            quality = fn.random.uniform(values=list(range(low, high + 1)))
            image = fn.jpeg_compression_distortion(
                image, quality=fn.cast(quality, dtype=types.INT32)
            )
        if chance(POLICY["blur"]):
            sigma = fn.random.uniform(range=POLICY["blur_sigma"])
            image = fn.gaussian_blur(image, sigma=sigma, window_size=3)
        if chance(POLICY["grayscale"]):
            image = fn.saturation(image, saturation=0.0)
        return image, fn.pad(facts)

    iterator = DALIGenericIterator(
        [policy()],
        ["images", "facts"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.DROP,
    )
    for _ in range(EPOCHS):
        for batch in iterator:
            yield len(batch[0]["images"])
        iterator.reset()


def spdl_images(place: Path, workers: int) -> Iterator[int]:
    """Load with SPDL's DataLoader, which uses threads.

    FFmpeg decodes, crops, resizes and flips in one filter, without Python's lock. torchvision does
    the rest of the policy.
    """
    import random

    import spdl.io
    import torch
    from PIL import Image
    from spdl.dataloader import DataLoader
    from torchvision import transforms

    policy = torchvision_policy()
    rest = transforms.Compose(policy.transforms[2:])
    paths = [str(path) for path in (place / "images").rglob("*.jpg")]
    random.shuffle(paths)

    def load(path: str) -> torch.Tensor:
        packets = spdl.io.demux_image(path)
        shape = torch.empty((3, packets.height, packets.width), device="meta")
        crop = transforms.RandomResizedCrop.get_params(shape, POLICY["scale"], POLICY["ratio"])
        top, left, height, width = crop
        chain = [f"crop={width}:{height}:{left}:{top}", f"scale={SIZE}:{SIZE}:flags=bilinear"]
        if torch.rand(()) < POLICY["hflip"]:
            chain.append("hflip")
        chain.append("format=pix_fmts=rgb24")
        frames = spdl.io.decode_packets(packets, filter_desc=",".join(chain))
        pixels = spdl.io.to_numpy(spdl.io.convert_frames(frames))
        return rest(Image.fromarray(pixels))

    loader = DataLoader(
        paths,
        preprocessor=load,
        batch_size=BATCH,
        drop_last=True,
        aggregator=torch.stack,
        num_threads=workers,
    )
    for _ in range(EPOCHS):
        for images in loader:
            yield len(images)


def prepare_litdata(place: Path) -> None:
    """Write the images as LitData chunks."""
    import litdata

    paths = sorted(map(str, (place / "images").rglob("*.jpg")))
    litdata.optimize(
        fn=_litdata_sample,
        inputs=paths,
        output_dir=str(place / "litdata"),
        chunk_bytes="64MB",
        num_workers=2,
    )


def _litdata_sample(path: str) -> dict:
    from PIL import Image

    return {"image": Image.open(path), "class": int(Path(path).parent.name == "fake")}


def litdata_images(place: Path, workers: int) -> Iterator[int]:
    """Load with LitData's streaming dataset and loader, which decodes to tensors itself."""
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision import transforms

    policy = transforms.Compose([transforms.ToPILImage(), torchvision_policy()])

    class Images(StreamingDataset):
        """Dataset that applies the policy to each image."""

        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return policy(sample["image"]), sample["class"]

    dataset = Images(str(place / "litdata"), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)
    for _ in range(EPOCHS):
        for images, _labels in loader:
            yield len(images)


def prepare_streaming(place: Path) -> None:
    """Write the images as MosaicML Streaming shards."""
    from PIL import Image
    from streaming import MDSWriter

    columns = {"x": "jpeg", "y": "int"}
    with MDSWriter(out=str(place / "streaming"), columns=columns) as writer:
        for path in sorted((place / "images").rglob("*.jpg")):
            writer.write({"x": Image.open(path), "y": int(path.parent.name == "fake")})


def streaming_images(place: Path, workers: int) -> Iterator[int]:
    """Load with MosaicML's StreamingVisionDataset and torch's DataLoader."""
    from streaming.vision.base import StreamingVisionDataset
    from torch.utils.data import DataLoader
    from torchvision import transforms

    to_rgb = transforms.Lambda(lambda image: image.convert("RGB"))

    dataset = StreamingVisionDataset(
        local=str(place / "streaming"),
        shuffle=True,
        batch_size=BATCH,
        transform=transforms.Compose([to_rgb, torchvision_policy()]),
    )
    loader = DataLoader(dataset, BATCH, num_workers=workers, drop_last=True)
    for _ in range(EPOCHS):
        for images, _labels in loader:
            yield len(images)


ENERGON_DATASET = """
sample_type:
  __module__: megatron.energon
  __class__: ImageClassificationSample
field_map:
  image: jpg
  label: json[label]
"""


def prepare_energon(place: Path) -> None:
    """Write Energon's index of this project's tars, in a folder of links to the tars."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = place / "energon"
    folder.mkdir()
    for tar in sorted((place / "shards/bench").glob("*.tar")):
        (folder / tar.name).symlink_to(tar.resolve())
    BaseWebdatasetFactory.prepare_dataset(
        folder,
        [path.name for path in sorted(folder.glob("*.tar"))],
        split_parts_ratio=[("train", 1.0), ("val", 0.0), ("test", 0.0)],
        workers=2,
    )
    (folder / ".nv-meta/dataset.yaml").write_text(ENERGON_DATASET)


def energon_images(place: Path, workers: int) -> Iterator[int]:
    """Load with Megatron-Energon and a task encoder. Its loader never ends."""
    from megatron.energon import (
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon.flavors.webdataset import SampleDecoder

    policy = torchvision_policy()

    class Encoder(DefaultTaskEncoder):
        """Task encoder that applies the policy to each image."""

        decoder = SampleDecoder(image_decode="pilrgb")

        @stateless(restore_seeds=True)
        def encode_sample(self, sample):
            sample.image = policy(sample.image)
            return sample

    dataset = get_train_dataset(
        place / "energon",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    total = len(list((place / "images").rglob("*.jpg"))) // BATCH * EPOCHS
    for _, batch in zip(range(total), get_loader(dataset), strict=False):
        yield len(batch.image)
