"""The device and precision of a computation, and the number of its CPU threads."""

import pytest
import torch

from model.device import choose_device, choose_precision, half_of_threads, one_thread
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
