"""The arithmetic of benchmark.py and its contenders; no timings."""

import argparse
import json

import bench_loader
import benchmark
import contenders
import numpy as np
import pytest
import torch
from contenders import Work

from lib import speed
from lib.video import read_frames
from model import SIZES


def closed_formula(work: Work) -> int:
    """FLOPs of forward and backward for a clip, 2 per multiply-add.

    A backward costs two forwards, except for the first layer: pixels need no gradient. Linear
    layers of a block are 12 D^2 multiply-adds per token, attention 2 N D.
    """
    s, places, time_steps = SIZES[work.size], (work.resolution // 16) ** 2, work.frames // 2
    tokens, values = places * time_steps, 1536
    masked = time_steps * int(work.ratio * places + 1e-6) if work.task == "step" else 0
    visible = tokens - masked
    blocks = lambda n, dim, depth: depth * n * (12 * dim**2 + 2 * n * dim)
    once = blocks(visible, s["dim"], s["depth"])
    if work.task == "step":
        dim = s["decoder_dim"]
        once += visible * s["dim"] * dim + blocks(tokens, dim, work.decoder_depth)
        once += masked * dim * values
    else:
        once += s["dim"] * contenders.CLASSES
    return 2 * (3 * once + 2 * visible * values * s["dim"])


@pytest.mark.parametrize(
    "work",
    [
        Work(size="toy", frames=4, resolution=64, decoder_depth=2),
        Work(size="tiny", frames=8, resolution=48, ratio=0.5, decoder_depth=1),
        Work("finetune", size="toy", frames=4, resolution=64),
    ],
)
def test_counted_flops_are_the_closed_formula(work):
    assert contenders.flops(work)[0] == closed_formula(work)


@pytest.mark.parametrize("task", ["step", "finetune"])
def test_contenders_compute_the_same(task):
    pytest.importorskip("transformers")
    work, found = Work(task, size="toy", frames=4, resolution=32, ratio=0.75, batch=2), {}
    for who in ("ours", "hf", "plain"):
        model, forward = contenders.build(work, who)
        loss, pred = forward()
        loss.backward()
        grads = [p.grad.norm() for p in model.parameters()]  # all are trained
        found[who] = (loss, pred, torch.stack(grads).norm())
    for who in ("hf", "plain"):
        torch.testing.assert_close(found[who], found["ours"], atol=1e-5, rtol=1e-4)


class Pipe:
    """The other end of a contender's pipe."""

    def __init__(self, *steps: int):
        self.steps, self.sent = iter(steps), []
        self.send = self.sent.append

    def recv(self) -> int:
        return next(self.steps)


def test_a_contender_computes_and_only_ours_has_our_kernel(monkeypatch):
    installed = []
    monkeypatch.setattr(speed, "use_faster_attention", lambda: installed.append(1))
    saved = []
    monkeypatch.setattr(speed, "save_memory", lambda model, how: saved.append(how))
    said, work = [], Work(size="toy", frames=4, resolution=32, ratio=0.75, batch=2)
    for who in ("plain", "hf", "ours", "ours-less"):
        pipe = Pipe(1, 2, 0)
        benchmark.contend(work, who, pipe)
        said.append(torch.tensor(pipe.sent[0]["said"]))
        assert all(cost["seconds"] > 0 and cost["whole"] > 0 for cost in pipe.sent[1:])
        assert len(pipe.sent) == 3
        assert bool(installed) == (who in contenders.MEMORY)
    assert saved == ["fast", "less"]
    for other in said[1:]:
        torch.testing.assert_close(other, said[0], atol=1e-4, rtol=1e-4)


def test_our_kernel_in_another_contender_is_an_error(monkeypatch):
    class Process:
        def __init__(self, target, args, daemon):
            args[2].send(dict(said=[1.0], kernel=True))

        start = terminate = join = lambda self: None

    context = benchmark.multiprocessing.get_context("spawn")
    monkeypatch.setattr(type(context), "Process", Process)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert benchmark.Contender(Work(), "ours-less").said == [1.0]
    with pytest.raises(RuntimeError, match="would use the attention kernel"):
        benchmark.Contender(Work(), "plain")


def test_rounds_and_ratios():
    costs = [dict(seconds=s, memory=m, whole=10 + m) for s, m in ((1, 5), (9, 7), (2, 6))]
    found = benchmark.measured(costs)
    assert found == dict(ms=2000, rounds_ms=[1000, 9000, 2000], mb=7, whole_mb=17)
    assert benchmark.ratio([1, 10, 2], [2, 10, 8]) == 2  # of 2, 1, 4; that of medians would be 4

    class Counter:
        def __init__(self, name):
            self.name = name

        def turn(self, steps):
            asked.append(self.name)
            return dict(seconds=1, memory=1, whole=1)

    asked = []
    benchmark.in_turn([Counter("a"), Counter("b")], rounds=2, steps=1)
    assert "".join(asked) == "ab" + "ab" + "ba"


def step_rows(tmp_path, monkeypatch, *flags) -> list[dict]:
    """The rows of `benchmark.py step` where all contenders cost what is asked here."""
    costs = {"ours": (10, 100), "ours-less": (12, 60), "hf": (20, 150), "plain": (30, 200)}
    made = lambda who: dict(ms=costs[who][0], rounds_ms=[costs[who][0]] * 2, mb=costs[who][1])
    compare = lambda entries, *_, **__: [made(who) for _, who in entries]
    monkeypatch.setattr(benchmark, "compare", compare)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda work: 1e12)
    monkeypatch.setattr(benchmark, "flops", lambda work: (10**9, 0))
    benchmark.main(["step", *flags, "--threads", "1", "--out", str(tmp_path)])
    return json.loads((tmp_path / "step.json").read_text())["rows"]


def test_rows_of_step(tmp_path, monkeypatch, capsys):
    rows = step_rows(tmp_path, monkeypatch, "--sizes", "toy", "--precisions", "fp32")
    told = [(row["mode"], row["who"], row["time_ratio"], row["mb_ratio"]) for row in rows]
    assert told == [
        ("eager", "ours", 1, 1),
        ("eager", "ours-less", 1.2, 0.6),
        ("eager", "hf", 2, 1.5),
        ("eager", "plain", 3, 2),
        ("compiled", "ours", 1, 1),
        ("compiled", "hf", 2, 1.5),
        ("compiled", "plain", 3, 2),
    ]
    assert rows[2]["utilisation"] == pytest.approx(20)  # 4 clips of 1 GFLOP in 20 ms at 1 TFLOP/s
    assert (
        "| toy | fp32 | eager | 4 | 1 | hf | 20 | 2.00 | 150 | 1.50 | 20 |"
        in capsys.readouterr().out
    )


def test_what_is_kept_beside_new_rows(tmp_path, monkeypatch):
    args = argparse.Namespace(out=tmp_path, command="step")
    benchmark.keep(args, [dict(size="a", ms=1), dict(size="b", ms=2)], ("size",))
    rows = benchmark.keep(args, [dict(size="b", ms=3)], ("size",))
    assert [(row["size"], row["ms"]) for row in rows] == [("a", 1), ("b", 3)]
    monkeypatch.setattr(benchmark, "machine", lambda: {"cpu": "another"})
    assert [row["size"] for row in benchmark.keep(args, [dict(size="c")], ("size",))] == ["c"]


def test_hours_of_a_recipe(tmp_path, monkeypatch, capsys):
    assert benchmark.gpu_hours(3.6e18, 1e15, 0.5) == pytest.approx(2)
    monkeypatch.setattr(benchmark, "flops", lambda work: (10**12, 0))
    rows = [dict(who="ours", files=files, clips_per_s=10.0) for files in bench_loader.KINDS]
    (tmp_path / "loader.json").write_text(json.dumps(dict(rows=rows)))
    benchmark.main(["hours", "--out", str(tmp_path)])
    rows = {row["preset"]: row for row in json.loads((tmp_path / "hours.json").read_text())["rows"]}
    ucf101 = rows["ucf101"]
    assert ucf101["clips"] == 3200 * 49 * 192  # 49 whole batches of 9,537 videos
    assert ucf101["A100"] == "77-134"  # 3.01e19 FLOPs at 35 and 20 % of 312 TFLOP/s
    assert ucf101["A100 cores"] == "6-11"  # 62.4 to 109.2 clips/s, 10 per core
    short = rows["ucf101-short"]
    assert short["clips"] == 2 * 400 * 49 * 192
    assert short["A100 cores"] == "3-5"  # two clips of a video, read at once
    assert ucf101["reported_tflops"] == pytest.approx(34.8, abs=0.1)  # in 240 GPU hours
    assert "cores per H100" in capsys.readouterr().out


@pytest.mark.parametrize("kind", bench_loader.KINDS)
def test_files_of_the_loader_and_their_readers(tmp_path, monkeypatch, kind):
    k = bench_loader.KINDS[kind] | dict(frames=22)
    monkeypatch.setitem(bench_loader.KINDS, kind, k)
    path = bench_loader.write_files(tmp_path, kind, [None])[0]
    frames = bench_loader.whole_file(path)
    assert frames.shape == (22, *k["size"][::-1], 3)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1  # it moves
    with bench_loader.av.open(str(path)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys.count(True) == 1  # far apart
    assert bench_loader.right(read_frames, [path], {(0, 0): [20, 3, 12]})
    wrong = lambda path, wanted: read_frames(path, [number + 1 for number in wanted])
    assert not bench_loader.right(wrong, [path], {(0, 0): [20, 3, 12]})
    bench_loader.decode_only(path, [20, 3, 12])


def test_the_loader_is_measured_beside_decoding(tmp_path, monkeypatch):
    for kind, k in bench_loader.KINDS.items():
        monkeypatch.setitem(bench_loader.KINDS, kind, k | dict(frames=20))
    monkeypatch.setattr(bench_loader, "KINDS", dict(list(bench_loader.KINDS.items())[:1]))
    flags = "loader --files 1 --clips 2 --rounds 1 --workers 1".split()
    benchmark.main([*flags, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    who = [row["who"] for row in rows if row["who"] != "decord"]
    assert who == ["decode only", "ours", "ours, 1 worker"]
    assert all(row["ms"] > 0 for row in rows) and rows[0]["ratio"] == 1
    assert rows[1]["note"] == "right"
