"""Images that are decoded at the same time fit into the memory budget."""

import threading
import time

import numpy as np
import pytest

from imaging import budget
from imaging.decode import DecodeError, decode, decoded, prepare
from tests.builders import encode, photo
from tests.servers import HANG_S

DATA = {kind: encode(photo(1, 40, 30), kind) for kind in ("JPEG", "PNG", "GIF")}
SIZE = 40 * 30 * budget.BYTES_PER_PIXEL


@pytest.fixture
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> budget.ByteBudget:
    shared = budget.ByteBudget(2 * SIZE)
    monkeypatch.setattr(budget, "_budget", shared)
    return shared


@pytest.mark.parametrize("kind", DATA)
def test_threads_wait_for_each_other(kind: str, two_at_a_time: budget.ByteBudget) -> None:
    inside, most, lock, together = 0, 0, threading.Lock(), threading.Barrier(2)

    def work() -> None:
        nonlocal inside, most
        with decoded(DATA[kind]):
            with lock:
                inside += 1
                most = max(most, inside)
            together.wait(HANG_S)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
    assert two_at_a_time.used == 0


@pytest.mark.parametrize("act", [decode, prepare])
@pytest.mark.parametrize("data", [*DATA.values(), DATA["JPEG"][:-9], DATA["PNG"][:900]])
def test_reserved_memory_is_released_after_success_and_error(
    act, data: bytes, two_at_a_time: budget.ByteBudget
) -> None:
    for _ in range(5):
        try:
            act(data)
        except DecodeError:
            continue
    assert two_at_a_time.used == 0


def test_a_picture_larger_than_the_budget_is_decoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_budget", budget.ByteBudget(9))
    np.testing.assert_array_equal(decode(DATA["PNG"]), photo(1, 40, 30))


def test_processes_decode_one_large_picture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Lock:
        def __enter__(self) -> None:
            taken.append("large")

        def __exit__(self, *_error: object) -> None:
            taken.append("done")

    monkeypatch.setattr(budget, "_one_large", Lock())
    with budget.decoding(budget.LARGE_PIXELS - 1):
        assert taken == []
    with budget.decoding(budget.LARGE_PIXELS):
        assert taken == ["large"]
    assert taken == ["large", "done"]
