"""Names of devices: every command and detector reads them alike."""

import os
import re

import click
import pytest
import torch

import cli
from devices import cores, device_here, parse_device
from model.device import choose_device
from sharding.pairs.decoder import load_decoder

BAD = ("", "gpu", "auto:", "auto:0", "cpu:", "cpu:0", "cuda:", "cuda:x", "cuda:²", "cuda:٣",
       "cuda:-1", "cuda: 1", "cuda:0\n", "cuda:99999999999", "CUDA")  # fmt: skip


def test_a_name_is_a_kind_and_a_number() -> None:
    names = ("auto", "cpu", "cuda", "cuda:0", "cuda:0012")
    assert [parse_device(name) for name in names] == [
        ("auto", None), ("cpu", None), ("cuda", None), ("cuda", 0), ("cuda", 12),
    ]  # fmt: skip
    assert parse_device(torch.device("cuda", 1)) == ("cuda", 1)
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", BAD)
def test_every_reader_refuses_another_name_with_the_same_line(name: str) -> None:
    said = re.escape(f"no such device: {name}; use auto, cpu, cuda or cuda:N")
    with pytest.raises(ValueError, match=said):
        parse_device(name)
    with pytest.raises(ValueError, match=said):
        choose_device(name)
    with pytest.raises(ValueError, match=said):
        load_decoder("nowhere", name)
    with pytest.raises(click.UsageError, match=said):
        cli.Device().convert(name, None, None)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1"])
def test_the_option_keeps_a_name_as_it_is(name: str) -> None:
    assert cli.Device().convert(name, None, None) == name


@pytest.mark.parametrize(
    ("count", "asked", "device"),
    [(0, "auto", "cpu"), (2, "auto", "cuda:1"), (2, "cpu", "cpu"), (2, "cuda", "cuda"),
     (2, "cuda:1", "cuda:1"),
     (0, "cuda", "--device cuda, but there is no CUDA device here; use cpu or auto"),
     (2, "cuda:2", "no device cuda:2 here; number of CUDA devices: 2, from cuda:0")],
)  # fmt: skip
def test_a_device_is_one_that_torch_sees(
    monkeypatch: pytest.MonkeyPatch, count: int, asked: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if " " not in device:
        assert device_here(asked, local=1) == device
        return
    with pytest.raises(ValueError, match=device):
        device_here(asked)


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
