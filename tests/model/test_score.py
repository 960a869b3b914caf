"""Scores that are NaN or infinite are errors, never verdicts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint, load_detector
from model.inference.prediction import UNREADABLE, predictions
from model.network import build
from model.score import ScoreError, score, score_set
from model.verdict import probability, verdict
from pipeline.batch import Batch
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.stream import evaluation_batches
from sharding.format import ShardSet
from tests.builders import CPU, PREPROCESS, TINY, broken_copy, encode, photo, small_recipe


def test_a_logit_that_is_not_finite_has_no_probability() -> None:
    probabilities = probability(np.array([0.0, np.nan, np.inf, -np.inf, 1e6, -1e6]))
    assert np.isnan(probabilities).tolist() == [False, True, True, True, False, False]
    assert probabilities[[0, 4, 5]].tolist() == [0.5, 1.0, 0.0]


def test_there_is_no_verdict_for_nan_or_infinity() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="no verdict: its score is not a finite number"):
            verdict(value, (0.3, 0.6))
        good, bad = predictions(["a", "b"], [0.2, value], {}, (0.3, 0.6))
        assert good.verdict == "no sign of AI"
        assert (bad.verdict, bad.probability) == (UNREADABLE, None)
        assert bad.error.startswith("its score is not a finite number")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_of_bad_weights_gives_an_error_for_each_image(
    tmp_path: Path, old: ShardSet, value: float
) -> None:
    net = build(TINY, pretrained=False)
    with torch.no_grad():
        net.backbone.head.fc.bias[1] = value
    folder = tmp_path / "run/step_0000001"
    checkpoint.save(
        folder,
        net,
        recipe=small_recipe(),
        state=None,
        record=checkpoint.Record(step=1, epoch=1, metrics={}, selection=None, data={"train": []}),
    )
    (prediction,) = load_detector(folder, device="cpu").predict([encode(photo(1))])
    assert (prediction.verdict, prediction.probability) == (UNREADABLE, None)
    assert "not a finite number" in prediction.error
    loading = Loading(batch_size=16, num_workers=0)
    loader = open_loader(old, preprocess=PREPROCESS, loading=loading, device=CPU)
    with pytest.raises(ScoreError, match=r"80 of 80 scores of .* are not finite, first: "):
        score_set(net.eval(), loader)


def test_padding_that_cannot_be_read_is_no_failure(data: Path, tmp_path: Path) -> None:
    """Padding reads sample 0 again. Here only the later read fails."""
    shards = broken_copy(data, tmp_path, [], "all")
    loading = Loading(batch_size=77, num_workers=0, backend="pil")  # DALI reads ahead
    loader = open_loader(shards, preprocess=PREPROCESS, loading=loading, device=CPU)
    last: list[Batch] = []

    def damaged_later() -> Iterator[Batch]:
        batches = evaluation_batches(loader)
        yield next(batches)
        path = shards.shard_path(0)
        with path.open("r+b") as stream:
            stream.write(b"\0" * path.stat().st_size)
        last.extend(batches)
        yield from last

    scores = score(build(TINY, pretrained=False).eval(), damaged_later(), CPU)
    assert len(shards) == 80 and not last[0].images[3:].any()
    assert 0 in scores.samples and 0 not in scores.failures
    assert sorted([*scores.samples, *scores.failures]) == list(range(80))


def test_scores_stay_with_their_images_if_others_cannot_be_read(
    data: Path, old: ShardSet, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = build(TINY, pretrained=False).eval()
    shards = broken_copy(data, tmp_path, [2, 30], "all")
    whole, part = (
        score_set(net, open_loader(
            one, preprocess=PREPROCESS, loading=Loading(batch_size=16, num_workers=0), device=CPU
        ))
        for one in (old, shards)
    )  # fmt: skip
    assert sorted(part.failures) == [2, 30]
    kept = np.delete(np.arange(len(old)), [2, 30])
    assert part.samples.tolist() == kept.tolist()
    np.testing.assert_array_equal(part.labels, whole.labels[kept])
    spread = np.abs(np.diff(whole.logits)).mean()
    np.testing.assert_allclose(part.logits, whole.logits[kept], atol=spread / 100)
