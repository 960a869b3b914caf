"""Labels that mean AI-generated: from their words, or named by the user."""

import pytest

from model.adapters.detector import DetectorError
from model.adapters.labels import fake_indices, meaning_of


@pytest.mark.parametrize(
    ("label", "meaning"),
    [
        ("fake", "fake"), ("Fake Image", "fake"), ("AI", "fake"), ("ai_generated", "fake"),
        ("AIGenerated", "fake"), ("artificial", "fake"), ("Deepfake", "fake"),
        ("SYNTHETIC", "fake"), ("real", "real"), ("Realism", ""), ("human", "real"),
        ("Natural photo", "real"), ("authentic", "real"), ("not ai", ""), ("non-fake", ""),
        ("real vs fake", ""), ("AI or not", ""), ("LABEL_1", ""), ("0", ""), ("", ""),
        ("main", ""), ("unreal", ""), ("rain", ""), ("realAI", ""),
    ],
)  # fmt: skip
def test_the_meaning_of_a_label_comes_from_its_words(label: str, meaning: str) -> None:
    assert meaning_of(label) == meaning


def test_the_order_of_labels_is_not_used() -> None:
    assert fake_indices({0: "artificial", 1: "human"}, [], "m") == [0]
    assert fake_indices({0: "human", 1: "artificial"}, [], "m") == [1]
    assert fake_indices({0: "real", 1: "ai_sd", 2: "ai_dalle"}, [], "m") == [1, 2]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, "--fake-label"),
        ({0: "fake", 1: "photo"}, "clear words"),
        ({0: "fake", 1: "deepfake"}, "all of the labels"),
        ({0: "real", 1: "human"}, "none of the labels"),
        ({}, "none"),
        (dict(enumerate(["x"] * 1000)), "and 994 more"),
    ],
)
def test_unclear_labels_are_refused(labels: dict[int, str], said: str) -> None:
    with pytest.raises(DetectorError, match=said):
        fake_indices(labels, [], "owner/name")


def test_labels_named_by_the_user_have_priority() -> None:
    labels = {0: "LABEL_0", 1: "LABEL_1"}
    assert fake_indices(labels, ["label_0"], "m") == [0]
    assert fake_indices({0: "fake", 1: "real"}, ["real"], "m") == [1]
    with pytest.raises(DetectorError, match="no label 'LABEL_2'"):
        fake_indices(labels, ["LABEL_2"], "m")
    with pytest.raises(DetectorError, match="all of the labels"):
        fake_indices(labels, ["LABEL_0", "LABEL_1"], "m")
