"""Call a function on two ranks: processes that exchange values through gloo, as under torchrun."""

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from model.distributed import DistEnv, init_distributed
from tests.forked import FORK, start_process
from tests.servers import HANG_S


def one_rank(rank: int, port: int, body: Callable[[DistEnv], object], said: Connection) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    try:
        with init_distributed() as dist:
            said.send(body(dist))
    except Exception as error:
        said.send(f"{type(error).__name__}: {error}")


def received(pipe: Connection) -> Any:
    """Return what a rank has sent."""
    try:
        return pipe.recv() if pipe.poll(60) else "nothing in 60 s"
    except EOFError:
        return "died"


def two_ranks(body: Callable[[DistEnv], object]) -> list[Any]:
    """Call `body` on two ranks, and return the result or the error of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
    ranks = [start_process(one_rank, rank, port, body, pipes[rank][1]) for rank in range(2)]
    for _, writer in pipes:
        writer.close()  # this process's copy: reading ends when a rank has died
    results = [received(pipe) for pipe, _ in pipes]
    for process in ranks:
        process.join(HANG_S)
        assert not process.is_alive()
    return results
