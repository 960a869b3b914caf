"""The device and precision of a computation, and the number of its CPU threads."""

import sysconfig
from pathlib import Path

import pytest
import torch

from model.device import (
    choose_compile,
    choose_device,
    choose_precision,
    half_of_threads,
    one_thread,
)
from tests.builders import CPU


def test_one_thread_computes_the_block_and_the_number_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        with one_thread(active=False):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError("an error in the block")
        assert torch.get_num_threads() == 2
        for threads, half in ((5, 2), (1, 1)):
            torch.set_num_threads(threads)
            with half_of_threads():
                assert torch.get_num_threads() == half
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_another_device_or_precision_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="no such device: gpu; use auto, cpu, cuda or cuda:N"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="no such device: cpu:7; use auto, cpu, cuda or cuda:N"):
        choose_device("cpu:7")
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="no such precision: int8; use auto, bf16, fp16 or fp32"):
        choose_precision("int8", CPU)
    assert choose_precision("bf16", CPU) == (torch.bfloat16, "asked for")
    assert choose_precision("auto", CPU)[0] is torch.float32


def test_torch_compile_is_not_chosen_where_no_compiler_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A slim container with a GPU has no C compiler: the first step of a training failed there."""
    gpu = torch.device("cuda")
    for name in ("gcc", "clang", "g++", "clang++"):
        (tmp_path / name).touch(0o700)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    assert choose_compile("auto", gpu) == (True, "faster on cuda")
    assert choose_compile("on", CPU) == (True, "asked for")
    assert choose_compile("auto", CPU) == (False, "auto uses it on GPUs only")

    (tmp_path / "Python.h").unlink()
    used, reason = choose_compile("auto", gpu)
    assert not used
    assert reason.startswith("torch.compile needs Python's headers, and there is no ")

    (tmp_path / "gcc").unlink()
    (tmp_path / "clang").unlink()
    needed = "torch.compile needs a C compiler, and there is no gcc or clang: install one, or"
    assert choose_compile("auto", gpu) == (False, f"{needed} name yours in CC")
    with pytest.raises(ValueError, match=r"run\.compile=on, but torch\.compile needs a C compiler"):
        choose_compile("on", gpu)
    (tmp_path / "g++").unlink()
    (tmp_path / "clang++").unlink()
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, .*or set run.compile=off"):
        choose_compile("on", CPU)
    assert choose_compile("off", CPU) == (False, "asked for")
