"""Build the objects of a planned training run: the network with its first weights, optimizer,
gradient scaler, and, if the recipe uses them, the moving average of the weights and the teacher
(the trained network that the run started from, for distillation). With a frozen backbone, also
compute the features that are not stored yet, and switch the run from images to stored features.

Main entry: `assemble(planned)` takes a `RunPlan` (made by `plan()` in `plan.py`) and returns a
`TrainState` (these objects: `net`, `optimizer`, `scaler`, `ema`, `teacher` and more) on the run's
device. If the run is resumed, it has the state of the checkpoint. torch's random generators are
seeded. It raises `NetworkError` if the weights cannot be fetched or do not fit, and
`CheckpointError` if a checkpoint is damaged (both are `ValueError`s). Nothing is written.

`with_features(planned, train_state)` takes both. It computes the missing features, writes them to
the folder `features.store` of the recipe, and returns the plan with a `FeatureLoader` (its
`stream.loader`). If the recipe has no `[features]` or `stored = false` there, it computes nothing
and returns the plan unchanged. `on_features(planned, source)` only changes the plan: the features
of the `FeatureSource` are stored already.

`compile_network(planned, train_state)` takes both and returns the torch module that the training
loop calls with images: the network in `DistributedDataParallel` on several ranks, and compiled if
the plan says so. On several ranks, each must call all three functions.

`embed_part(recipe, data, runs, init_from, names, part, dist)`, for `python -m model embed`,
computes all missing features of a recipe's run.

- `recipe`: a `Recipe` with `[features]`, read by `recipes.load(Recipe, path)`.
- `data`: the folder of all shard sets (packed images), a `Path`, or a `UPath` for an address.
- `runs`: `Path` of the folder of all runs.
- `init_from`: `Path` of the network's first weights (checkpoint folder or ImageNet `.safetensors`
  file), or None for those of the recipe.
- `names`: a list of further shard sets below `data`, of which only view 0 is computed. It may be
  empty.
- `part`: number of this task, from 0, and number of independent tasks that divide the work, as of a
  Ray cluster. A task of N computes every N-th shard. None (the default): the ranks of `dist` do.
- `dist`: the `DistEnv` of `init_distributed()`, whose ranks all call the function; None (the
  default) is one process.

It returns the number of images that this task or rank computed; an image counts once per view.

`with_features()` and `embed_part()` raise `FeatureError` if the backbone is not frozen or a feature
is not finite, and `LoadError` if a tar is missing or too many images cannot be decoded.
`with_features()` also raises `FeatureError` if the teacher of the run has another backbone,
`embed_part()` if the recipe has no `[features]`. `embed_part()` also raises `ValueError` if the run
cannot be planned, its weights cannot be loaded or a set of `names` cannot be opened. All of these
are `ValueError`s. Both functions raise `OSError` for a file that cannot be read or written.

`views_of(recipe)` returns the numbers of the stored views that training reads: 0 is the center
crop, v >= 1 the augmentation of epoch v - 1. `embed_run()` computes the missing features of a run,
and of view 0 of more `sets`. It returns the number of images computed by this rank or task.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

import console
from model import checkpoint
from model.device import keep_freed_memory
from model.distributed import DistEnv, all_gather_object
from model.features.embed import Embedder, embed_sets
from model.features.loader import FeatureLoader, FeatureSource, source_of
from model.features.store import FeatureError, frozen_sha256
from model.network import Detector, build, load_backbone_file, load_weights
from model.recipe import Recipe
from model.training.optim import make_optimizer
from model.training.plan import RunPlan, Weights, plan
from model.training.saving import restore
from model.training.step import TrainState, average_of, wrap_ddp
from sharding.format import ShardSet, open_shards
from sharding.lock import reading
from storage import AnyPath

COMPILING_PAYS = 50_000
"""Images times views from which `run.compile = "auto"` compiles the computation of features on a
GPU. Compiling takes about 40 s, in which a GPU embeds tens of thousands of images uncompiled (an
estimate; not measured yet).
"""


def assemble(planned: RunPlan) -> TrainState:
    """Build the training state on the run's device, as it is after `planned.done` steps. torch's
    random generators are seeded.

    Raises:
        NetworkError: timm's weights cannot be fetched.
    """
    recipe, device, dist = planned.recipe, planned.device, planned.dist
    keep_freed_memory(device)
    torch.manual_seed(recipe.run.seed)
    torch.backends.cudnn.benchmark = True
    # A frozen backbone draws no random numbers later, so that the draws of random weights, which a
    # checkpoint replaces, can be left out.
    replaced = planned.weights.kind == "checkpoint" and recipe.network.freeze_backbone
    net = build(recipe.network, pretrained=planned.weights.kind == "timm", empty=replaced)
    _load(net, planned.weights)
    net.to(device)
    optimizer = make_optimizer(net.backbone, recipe.optim, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=planned.dtype == torch.float16)
    train_state = TrainState(net, optimizer, scaler, device, planned.dtype, dist)
    train_state.ema = average_of(net) if recipe.optim.ema_decay else None
    if planned.teacher and planned.teacher.path:
        teacher, _, _ = checkpoint.load_network(planned.teacher.path)
        teacher.requires_grad_(False).to(memory_format=torch.channels_last)
        train_state.teacher = teacher.to(device)
    if dist.world_size > 1:  # weights are equal on all ranks; stochastic depth must differ
        torch.manual_seed(recipe.run.seed + 1_000_003 * (1 + dist.rank))
    if planned.resumed:
        restore(train_state, planned.resumed, planned.done)
    return train_state


def _load(net: Detector, weights: Weights) -> None:
    """Load weights from a file or checkpoint. timm's weights and random ones are in `net`
    already.
    """
    if weights.path is None:
        return
    if weights.kind == "file":
        load_backbone_file(net, weights.path)
    else:
        load_weights(net, checkpoint.read_weights(weights.path), str(weights.path))


def compile_network(planned: RunPlan, train_state: TrainState) -> torch.nn.Module:
    """Return the network that the training loop calls: wrapped in DDP on several ranks, and
    compiled if the plan says so. With stored features only their computation is compiled: a step of
    a linear head takes less time than its compilation.
    """
    net = wrap_ddp(train_state)
    if not planned.compiled or planned.features is not None:
        return net
    return cast(torch.nn.Module, torch.compile(net))


def views_of(recipe: Recipe) -> range:
    """Return the numbers of the views that training reads."""
    assert recipe.features is not None
    return range(min(recipe.features.views + 1, recipe.run.epochs))


def check_teacher(train_state: TrainState, source: FeatureSource) -> None:
    """Refuse a teacher that cannot read the stored features of `source`.

    Raises:
        FeatureError: its backbone is another one, or not frozen.
    """
    teacher = train_state.teacher
    if teacher is not None and frozen_sha256(teacher) != source.backbone.sha256:
        raise FeatureError(
            "replay.distill_weight: the teacher has another backbone than this run, so it cannot "
            "read the stored features; set features.stored=false"
        )


def with_features(planned: RunPlan, train_state: TrainState) -> RunPlan:
    """Compute missing features and return the plan with a loader of stored features. If the recipe
    asks for none, the plan is returned unchanged.

    Raises:
        FeatureError: the teacher has another backbone, or a feature is not finite.
        LoadError: too many images cannot be decoded.
    """
    recipe = planned.recipe
    if recipe.features is None or not recipe.features.stored:
        return planned
    source = source_of(recipe, train_state.net, planned.dtype)
    check_teacher(train_state, source)
    embed_run(planned, train_state, source)
    all_gather_object(planned.dist, None)  # barrier: read only after all ranks have written
    planned = on_features(planned, source)
    console.log.info("features %s", planned.stream.loader.reason)
    return planned


def on_features(planned: RunPlan, source: FeatureSource) -> RunPlan:
    """Return the plan with a loader of the stored features of `source` in place of images."""
    stream, dist = planned.stream, planned.dist
    loader = FeatureLoader(
        stream.pool.shards, source, planned.recipe.loading, planned.device,
        dist.rank, dist.world_size,
    )  # fmt: skip
    return replace(planned, stream=replace(stream, loader=loader), features=source)


def embed_run(
    planned: RunPlan,
    train_state: TrainState,
    source: FeatureSource,
    sets: Sequence[ShardSet] = (),
    *,
    part: tuple[int, int] | None = None,
) -> int:
    """Compute all missing features of a run, and view 0 of more `sets`; return the number of images
    computed here. The work is shared by the ranks of the run, or, if `part` (task, number of tasks)
    is given, by independent tasks.

    Raises:
        FeatureError: a feature is not finite.
        LoadError: too many images cannot be decoded.
    """
    recipe, views = planned.recipe, views_of(planned.recipe)
    rank, world_size = part or (planned.dist.rank, planned.dist.world_size)
    many = len(planned.stream.pool.shards) * len(views) >= COMPILING_PAYS
    embedder = Embedder(
        net=train_state.net,
        device=planned.device,
        dtype=planned.dtype,
        loading=recipe.loading,
        rank=rank,
        world_size=world_size,
        compiled=planned.compiled and (many or recipe.run.compile == "on"),
    )
    count = 0
    for number in views:
        count += embed_sets(embedder, [planned.stream.pool.shards], source, number)
    return count + embed_sets(embedder, [*planned.validation.values(), *sets], source, 0)


def embed_part(
    recipe: Recipe,
    data: AnyPath,
    runs: Path,
    init_from: Path | None,
    names: Sequence[str],
    part: tuple[int, int] | None = None,
    dist: DistEnv | None = None,
) -> int:
    """Compute the missing features of a recipe's run, and view 0 of the sets `names` below `data`.
    The shards are divided among the ranks of `dist`, or, if `part` (task, number of tasks) is
    given, among independent tasks. Returns the number of images computed here.

    Raises:
        ValueError: as `plan` and `embed_run`.
    """
    if recipe.features is None:
        raise FeatureError(
            f"{recipe.name} has no [features]; set the number of stored views per image, such as "
            "--set features.views=0"
        )
    planned = plan(recipe, data, runs, init_from=init_from, dist=dist)
    sets = [open_shards([data / name]) for name in names]
    with reading(planned.stream.pool.shards, *planned.validation.values(), *sets):
        train_state = assemble(planned)
        source = source_of(planned.recipe, train_state.net, planned.dtype)
        return embed_run(planned, train_state, source, sets, part=part)
