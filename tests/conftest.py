"""What several test files share."""

import multiprocessing
import os
import socket
import sys

import pytest

# Runs are bit for bit alike on CPUs alone. gpu.py is for GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
# On tensors as small as these, threads mostly wait for each other. torch reads it when it is
# imported, which is not yet: the process that hands out tests to others does without it.
os.environ["OMP_NUM_THREADS"] = "1"


def draw_nothing(patch) -> None:
    """Stages leave no figures, which take up to a second each."""
    import visualize

    for name in ("main", "plot_log", "plot_classes", "plot_confusion"):
        patch.setattr(visualize, name, lambda *args: None)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy data set of 24 training and 12 test videos."""
    from lib import prepare

    folder = tmp_path_factory.mktemp("data") / "toy"
    prepare.make_toy(folder, train=24, test=12)
    return folder


@pytest.fixture
def here(toy, tmp_path, monkeypatch):
    """An empty working directory; the toy set's path. Stages draw nothing."""
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    return str(toy)


def _work(rank, size, port, stage, argv, start):
    multiprocessing.set_start_method(start, force=True)
    here = dict(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    os.environ.update({key: str(value) for key, value in here.items()})
    draw_nothing(pytest.MonkeyPatch())
    with open(f"{stage}-{rank}.txt", "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
        __import__(stage).main(argv)


@pytest.fixture(scope="session")
def forks():
    """Processes that start without importing torch anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot", "av", "pretrain"])
    return context


@pytest.fixture
def train(forks):
    def train(size, stage, *argv, start=None):
        """Run a stage in as many processes as torchrun would; `start`: how their workers start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        how = (size, port, stage, argv, start)
        jobs = [forks.Process(target=_work, args=(rank, *how)) for rank in range(size)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(300)
        said = [open(f"{stage}-{rank}.txt").read() for rank in range(size)]
        assert [job.exitcode for job in jobs] == [0] * size, said

    return train
