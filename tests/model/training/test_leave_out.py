"""Calibration on left-out sources: heads, thresholds, recorded rates, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import recipes
from model import checkpoint
from model.calibration.fit import CalibrationError, Over, calibrate_sources, threshold_over_sources
from model.evaluation.plan import Options
from model.evaluation.run import evaluate
from model.evaluation.scores import read_scores
from model.features.loader import source_of
from model.features.store import FeatureError
from model.recipe import Calibrating, Recipe
from model.training.assemble import assemble, with_features
from model.training.leave_out import leave_one_out
from model.training.plan import plan
from model.training.run import train
from model.verdict import probability
from pipeline.loading import Loading
from pipeline.replay import Replay
from tests.checkpoints import last_of

SETTINGS = [
    "network.freeze_backbone=true", 'network.head="stages"', "network.drop_path_rate=0.0",
    "optim.lr=0.02", "run.epochs=2", "features.views=0",
]  # fmt: skip


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Recipe:
    store = f'features.store="{tmp_path / "store"}"'
    return recipes.load(Recipe, tiny_recipe, [*SETTINGS, store])


@pytest.mark.parametrize(
    ("decay", "ranks"), [pytest.param(0.0, 1, marks=pytest.mark.slow), (0.9, 2)]
)
def test_each_source_is_scored_by_a_head_that_never_saw_it(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path, decay: float, ranks: int
) -> None:
    """The head equals that of a run without the source, also one of several ranks or averages."""
    recipe = replace(recipe, optim=replace(recipe.optim, ema_decay=decay))
    planned = plan(recipe, data, tmp_path / "runs", init_from=weights)
    state = assemble(planned)
    planned = with_features(planned, state)
    own = {name: p.clone() for name, p in state.net.named_parameters()}
    small = replace(recipe.loading, batch_size=recipe.loading.batch_size // ranks)
    loader = replace(planned.stream.loader, loading=small, world_size=ranks)
    planned = replace(
        planned,
        recipe=replace(planned.recipe, loading=small),
        stream=replace(planned.stream, loader=loader),
    )
    scored = leave_one_out(planned, state, source_of(planned.recipe, state.net, torch.float32))
    assert all(torch.equal(p, own[name]) for name, p in state.net.named_parameters())
    shards = planned.stream.pool.shards
    codes, names = shards.codes("source")
    assert sorted(scored) == sorted({names[code] for code in codes})
    for name in ("alpha", "beta"):
        without = replace(recipe, name=name, data=replace(recipe.data, repeats={name: 0.0}))
        train(without, data, tmp_path / "runs", init_from=weights)
        folder = last_of(tmp_path / "runs" / name)
        head = load_file(folder / "weights.safetensors")
        rows = np.flatnonzero(codes == names.index(name))
        features = torch.from_numpy(planned.stream.loader.table(0).rows(rows)).float()
        logits = features @ head["stage_head.fc.weight"].T + head["stage_head.fc.bias"]
        labels, scores = scored[name]
        np.testing.assert_array_equal(labels, shards.column("label")[rows])
        np.testing.assert_allclose(scores, (logits[:, 1] - logits[:, 0]).numpy(), atol=1e-4)


def test_sources_that_belong_together_are_left_out_together(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="fill no batch of 64; use a smaller"):
        large = replace(recipe, loading=replace(recipe.loading, batch_size=64))
        planned = plan(large, data, tmp_path / "large", init_from=weights)
        state = assemble(planned)
        planned = with_features(planned, state)
        leave_one_out(planned, state, source_of(planned.recipe, state.net, torch.float32))
    recipe = replace(recipe, loading=replace(recipe.loading, batch_size=4))
    planned = plan(recipe, data, tmp_path / "runs", init_from=weights)
    state = assemble(planned)
    planned = with_features(planned, state)
    source = source_of(planned.recipe, state.net, torch.float32)
    alone = leave_one_out(planned, state, source)
    together = Calibrating(together={"both": ["alpha", "beta"]})
    grouped = replace(planned, recipe=replace(planned.recipe, calibration=together))
    scored = leave_one_out(grouped, state, source)
    assert scored.keys() == alone.keys()
    assert not np.allclose(scored["alpha"][1], alone["alpha"][1])
    unused = replace(planned, stream=replace(planned.stream, repeats={"alpha": 0.0}))
    assert leave_one_out(unused, state, source).keys() == alone.keys() - {"alpha"}
    rest = sorted(alone.keys() - {"alpha", "beta"})
    assert all(np.array_equal(scored[name][1], alone[name][1]) for name in rest)


@pytest.mark.parametrize(
    ("replayed", "exclude", "together", "solver"),
    [
        ("new", [], {"both": ["alpha", "gamma"]}, "lbfgs"),
        pytest.param("again", ["beta"], {}, "lbfgs", marks=pytest.mark.slow),
        ("again", ["beta"], {}, "adamw"),
    ],
)
def test_a_left_out_source_is_not_replayed_either(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path,
    replayed: str, exclude: list[str], together: dict[str, list[str]], solver: str,
) -> None:  # fmt: skip
    """Nor are the other sources of its group. Here no old sample is left, so the head learns as in
    a run without replay.
    """
    for name in ("old", "new", "val"):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "again").symlink_to(data / "old")  # one set cannot be new and old
    recipe = replace(recipe, optim=replace(recipe.optim, solver=solver))
    replay = Replay(sets=[replayed], ratio="1:2", exclude_sources=exclude)
    with_replay = replace(recipe, replay=replay, calibration=Calibrating(together=together))
    weighed = replace(with_replay, replay=replace(replay, weight=20.0))
    scores, left_out = [], []
    for number, one in enumerate((recipe, with_replay, weighed)):
        planned = plan(one, tmp_path, tmp_path / f"runs{number}", init_from=weights)
        state = assemble(planned)
        planned = with_features(planned, state)
        source = source_of(planned.recipe, state.net, torch.float32)
        scores.append(leave_one_out(planned, state, source, left_out.append))
    assert scores[0].keys() == scores[1].keys() == {"alpha", "beta", "dummy"}
    assert left_out[3:6] == [*(together.values() or [["alpha"]]), ["beta"], ["dummy"]]
    np.testing.assert_allclose(scores[0]["alpha"][1], scores[1]["alpha"][1], atol=1e-4)
    assert np.abs(scores[0]["beta"][1] - scores[1]["beta"][1]).max() > 1e-3
    assert np.abs(scores[1]["beta"][1] - scores[2]["beta"][1]).max() > 1e-3


def test_a_run_calibrates_on_left_out_sources_and_records_the_rates(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path
) -> None:
    recipe = replace(recipe, calibration=Calibrating(on="left_out", max_fpr=0.2))
    best = train(recipe, data, tmp_path / "runs", init_from=weights)
    meta = checkpoint.read_meta(best)
    calibration = meta["calibration"]
    assert calibration["method"] == "sources left out, most_sources"
    assert calibration["fitted_on"] == ["old"]
    assert set(calibration["sources"]) == {"alpha", "beta", "dummy"}
    assert calibration["band"][1] == meta["threshold"]
    rates = [of["false_positive_rate"] for of in calibration["sources"].values() if of["reals"]]
    assert min(rates) <= 0.2
    assert meta["calibrated_metrics"]["sets"]["val"]["count"] == 22


def test_a_rate_for_too_few_images_is_refused_before_heads_are_trained(
    recipe: Recipe, weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "model.training.conclude.calibrate_left_out", lambda *_: pytest.fail("heads were trained")
    )
    recipe = replace(recipe, calibration=Calibrating(on="left_out", max_fpr=0.001))
    best = train(recipe, data, tmp_path / "runs", init_from=weights)
    assert checkpoint.read_meta(best)["calibration"] is None


def scores_of(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Make scores of four real sources, of which the last looks more like a fake, and two
    of fakes.
    """
    rng = np.random.default_rng(seed)
    shifts = {"a": -3.0, "b": -2.5, "c": -2.0, "odd": 0.0}
    scores = {n: (np.zeros(400, int), rng.normal(s, 1, 400)) for n, s in shifts.items()}
    return scores | {n: (np.ones(300, int), rng.normal(s, 1, 300)) for n, s in (("x", 3), ("y", 1))}


def test_thresholds_over_sources() -> None:
    """The rate holds for the selected images, and not for others."""
    reals = [pair[1] for name, pair in scores_of().items() if name in ("a", "b", "c", "odd")]
    probabilities = [probability(logits) for logits in reals]
    pooled, most, worst = (
        threshold_over_sources(probabilities, 0.05, over)
        for over in ("pooled", "most_sources", "worst_source")
    )
    assert np.mean(np.concatenate(probabilities) >= pooled) == pytest.approx(0.05, abs=0.005)
    assert np.mean(probabilities[3] >= pooled) > 0.15
    assert np.mean(probabilities[3] >= worst) <= 0.05
    shares = [np.mean(own >= most) for own in probabilities]
    assert sum(share <= 0.05 for share in shares) == 3
    assert pooled < worst
    assert most <= worst


def test_the_band_keeps_both_error_rates() -> None:
    scores = scores_of()
    by_rate = {}
    for rate in (0.01, 0.05, 0.2):
        asked = Calibrating(on="left_out", threshold="pooled", max_fpr=rate, max_miss=rate)
        fitted = calibrate_sources(scores, asked)
        reals, fakes = (
            probability(
                np.concatenate([z for y, z in scores.values() if y[0] == label]), fitted.temperature
            )
            for label in (0, 1)
        )
        assert np.mean(reals >= fitted.band[1]) <= rate
        assert np.mean(fakes < fitted.band[0]) <= rate
        assert fitted.threshold == fitted.band[1]
        assert fitted.threshold_at == "max_fpr"
        assert fitted.sources["odd"]["false_positive_rate"] == pytest.approx(
            np.mean(probability(scores["odd"][1], fitted.temperature) >= fitted.threshold)
        )
        assert fitted.sources["odd"]["recall"] is None
        by_rate[rate] = fitted.band[1]
    assert by_rate[0.01] > by_rate[0.05] > by_rate[0.2]


def test_most_sources_ignores_one_odd_source_of_fakes() -> None:
    """One source of fakes that looks real does not make every image uncertain."""
    rng = np.random.default_rng(2)
    scores = scores_of() | {
        n: (np.ones(300, int), rng.normal(s, 1, 300)) for n, s in (("z", 2), ("hidden", -4))
    }
    lows = {
        over: calibrate_sources(scores, Calibrating(on="left_out", threshold=over)).band[0]
        for over in ("pooled", "most_sources", "worst_source")
    }
    assert lows["worst_source"] < lows["pooled"] < lows["most_sources"]


def test_too_few_images_are_refused() -> None:
    few = {name: (labels[:4], logits[:4]) for name, (labels, logits) in scores_of().items()}
    with pytest.raises(CalibrationError, match="calibration needs at least 20 of each"):
        calibrate_sources(few, Calibrating(on="left_out"))
    said = r"too few real .* of 0\.001: 0 of 3 sources have enough, expected half \(at least 999"
    with pytest.raises(CalibrationError, match=said):
        threshold_over_sources([np.linspace(0, 1, 50)] * 3, 0.001, "worst_source")
    asked = Calibrating(on="left_out", threshold="pooled", max_fpr=0.05, max_miss=0.001)
    said = r"too few fake images .* of 0\.001: all sources together have 600, at least 999"
    with pytest.raises(CalibrationError, match=said):
        calibrate_sources(scores_of(), asked)


@pytest.mark.parametrize("over", ["most_sources", "worst_source"])
def test_a_threshold_rests_on_at_least_half_of_the_sources(over: Over) -> None:
    """A threshold from one easy source would call most images of the others fake."""
    rng = np.random.default_rng(6)
    hard = {f"hard{n}": (np.zeros(45, int), rng.normal(0, 1, 45)) for n in range(3)}
    easy = {f"easy{n}": (np.zeros(60, int), rng.normal(-4, 1, 60)) for n in range(3)}
    fakes = {
        "x": (np.ones(300, int), rng.normal(3, 1, 300)),
        "small": (np.ones(9, int), np.ones(9)),
    }
    asked = Calibrating(threshold=over, max_fpr=0.02)
    said = r"rate of 0\.02: 1 of 4 sources have enough, expected half \(at least 49 are needed\)"
    with pytest.raises(CalibrationError, match=said):
        calibrate_sources({**hard, "easy0": easy["easy0"], **fakes}, asked)
    fitted = calibrate_sources(hard | easy | fakes, asked)
    assert fitted.sources_used == {"real": (3, 6), "fake": (1, 2)}
    assert fitted.threshold == dict(fitted.at_fpr)[0.02]  # that of a higher rate: also of the hard
    higher = calibrate_sources(hard | easy | fakes, replace(asked, max_fpr=0.03))
    assert fitted.threshold >= higher.threshold
    pooled = calibrate_sources(hard | easy | fakes, replace(asked, threshold="pooled"))
    assert pooled.sources_used == {}


def test_a_pooled_rate_holds_for_all_images_together() -> None:
    """Small sources count too: here most real images are in sources of 10, which look fake."""
    rng = np.random.default_rng(4)
    small = {f"small{n}": (np.zeros(10, int), rng.normal(1, 1, 10)) for n in range(200)}
    scores = scores_of() | small
    fitted = calibrate_sources(scores, Calibrating(on="left_out", threshold="pooled", max_fpr=0.05))
    reals = np.concatenate([logits for labels, logits in scores.values() if labels[0] == 0])
    called = probability(reals, fitted.temperature) >= fitted.threshold
    assert called.mean() == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['calibration.on="left_out"'], r"on stored features: add \[features\]"),
        (
            ['calibration.on="left_out"', *SETTINGS, 'run.init_from="other"'],
            "needs an untrained head",
        ),
        (["calibration.max_fpr=0"], "shares between 0 and 0.5"),
        (["calibration.max_miss=0.5"], "shares between 0 and 0.5"),
    ],
)
def test_impossible_recipes_are_refused(overrides: list[str], said: str, tiny_recipe: Path) -> None:
    with pytest.raises(recipes.RecipeError, match=said):
        recipes.load(Recipe, tiny_recipe, overrides)


def test_evaluation_reads_the_store(
    recipe: Recipe, weights: Path, data: Path, small_runs: Path, tmp_path: Path
) -> None:
    best = train(recipe, data, tmp_path / "runs", init_from=weights)
    figures = {}
    for name, features in (("pixels", None), ("stored", tmp_path / "store")):
        options = Options(loading=Loading(num_workers=0), features=features)
        report = evaluate(best, data, ["val", "new"], tmp_path / name, options=options)
        assert set(report["sets"]) == {"val", "new"}
        assert (tmp_path / name / "speed.json").exists() == (name == "pixels")
        figures[name] = read_scores(tmp_path / name / "scores.parquet").numbers("probability")
    np.testing.assert_allclose(figures["stored"], figures["pixels"], atol=2e-3)
    assert len(list((tmp_path / "store").glob("*/new/view0/*.arrow"))) > 0
    with pytest.raises(FeatureError, match="frozen backbone only"):
        evaluate(last_of(small_runs / "small"), data, ["val"], tmp_path, options=options)
