"""Tests of values from files: each one that a layout does not allow is an error of one line."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, Optional

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from checked import LONGEST, checked, limited, one_of


@dataclass(frozen=True)
class Part:
    number: float
    pair: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Odd:
    number: int

    def __post_init__(self) -> None:
        if not self.number % 2:
            raise ValueError(f"{self.number} is even")


class Chain(TypedDict):
    next: Optional["Chain"]


class Layout(TypedDict):
    part: NotRequired[Part]
    parts: NotRequired[dict[str, Part]]
    share: NotRequired[Annotated[float, limited("a number from 0 to 1", lambda p: 0 <= p <= 1)]]
    kind: NotRequired[Literal["a", "b"]]
    choice: NotRequired[Annotated[str, one_of(("c", "d"))]]
    few: NotRequired[Annotated[list[int], Field(min_length=1, max_length=2)]]
    count: NotRequired[int]
    rates: NotRequired[list[float]]
    chain: NotRequired[Chain | None]
    name: NotRequired[str]


def test_values_become_the_type_and_unknown_keys_of_a_dict_are_ignored() -> None:
    values = {"part": {"number": 1, "pair": [2, 3.0]}, "share": 1, "later": {"x": float("nan")}}
    assert checked(Layout, values) == {"part": Part(1.0, (2, 3)), "share": 1.0}
    assert checked(dict[str, Part], {"a": {"number": 2}}) == {"a": Part(2.0)}


def nested(depth: int, around: Any = 1) -> Any:
    for _ in range(depth):
        around = [around]
    return around


def chain(length: int) -> dict[str, Any] | None:
    value = None
    for _ in range(length):
        value = {"next": value}
    return value


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "it holds list, expected an object"),
        (None, "it holds NoneType, expected an object"),
        ({"part": 5}, "part takes an object, got 5"),
        ({"part": None}, "part takes an object, got null"),
        ({"part": {}}, "part.number is missing"),
        ({"part": {"numbr": 1}}, "unknown key 'part.numbr'; did you mean number?"),
        ({"parts": {"a": {"x": 1}}}, "unknown key 'parts.a.x'; known: number, pair"),
        ({"part": {"number": "2"}}, 'part.number takes a number, got "2"'),
        ({"part": {"number": True}}, "part.number takes a number, got true"),
        ({"part": {"number": float("inf")}}, "part.number must be a finite number, got inf"),
        ({"part": {"number": 1, "pair": [1]}}, "part.pair has 1 values, which is too few"),
        ({"share": 1.5}, "share takes a number from 0 to 1, got 1.5"),
        ({"share": True}, "share takes a number from 0 to 1, got true"),
        ({"share": "1"}, 'share takes a number from 0 to 1, got "1"'),
        ({"share": None}, "share takes a number from 0 to 1, got null"),
        ({"share": float("nan")}, "share takes a number from 0 to 1, got NaN"),
        ({"share": 10**400}, f"share takes a number from 0 to 1, got 1{'0' * 79} ... {'0' * 15}"),
        ({"rates": [1, 10**400]}, f"rates.1 takes a number, got 1{'0' * 79} ... {'0' * 15}"),
        ({"count": 10**30, "rates": 7}, "rates takes a list, got 7"),
        ({"count": False}, "count takes a whole number, got false"),
        ({"kind": "c"}, "kind takes 'a' or 'b', got \"c\""),
        ({"choice": "e"}, "choice takes 'c' or 'd', got \"e\""),
        ({"choice": 5}, "choice takes a text, got 5"),
        ({"few": []}, "few takes a length of at least 1, got 0"),
        ({"few": [1, 2, 3, 4]}, "few takes a length of at most 2, got 4"),
        ({"chain": chain(300)}, "it is nested too deeply"),
        ({"chain": chain(5000)}, "it is nested too deeply"),
        ({"name": nested(5000)}, "it is nested too deeply"),
        ({"rates": [[]] * 1001}, "1,001 values are missing or wrong"),
    ],
)
def test_a_wrong_value_is_named_with_what_its_key_takes(values: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked(Layout, values, "x.json")
    assert str(caught.value) == f"x.json: {said}"
    with pytest.raises(ValueError) as caught:
        checked(Layout, values)
    assert str(caught.value) == said


def test_a_check_of_a_class_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"^x: 2 is even$"):
        checked(Odd, {"number": 2}, "x")
    with pytest.raises(ValueError, match=r"^x: a: 2 is even$"):
        checked(dict[str, Odd], {"a": {"number": 2}}, "x")


def test_a_long_key_or_value_is_shortened() -> None:
    text = "x" * 10_000
    with pytest.raises(ValueError) as caught:
        checked(Layout, {"parts": {text: {"number": text}}})
    said = str(caught.value)
    assert len(said) < 3 * LONGEST and said.startswith("parts.xxx")
    assert json.loads(said[said.index('"') :].replace(" ... ", "")) == "x" * (LONGEST - 7)
