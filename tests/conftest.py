"""What several test files share."""

import multiprocessing
import os
import socket
import sys

import pytest
import torch

import data

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)  # more threads wait for each other longer than they work, on tensors as small as these


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    data.make_toy(folder, train=24, test=12)
    return folder


def _work(rank, size, port, stage, argv, start):
    multiprocessing.set_start_method(start, force=True)
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in here.items()})
    torch.set_num_threads(1)
    with open(f"{stage}-{rank}.txt", "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
        __import__(stage).main(argv)


@pytest.fixture(scope="session")
def forks():
    """Processes that start without importing torch anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot", "av", "torch.distributed.fsdp"])
    return context


@pytest.fixture
def train(forks):
    def train(size, stage, *argv, start=None):
        """Run a stage in as many processes as torchrun would; `start`: how their workers start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        jobs = [forks.Process(target=_work, args=(rank, size, port, stage, argv, start)) for rank in range(size)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(100)
        assert [job.exitcode for job in jobs] == [0] * size, [open(f"{stage}-{r}.txt").read() for r in range(size)]

    return train
