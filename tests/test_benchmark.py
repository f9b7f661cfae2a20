"""The arithmetic of benchmark.py, no timings: FLOPs, weights, fits, hours, files and their frames, what is kept."""

import argparse
import json

import benchmark
import numpy as np
import pytest
import torch
from benchmark import KINDS, Work


def closed_formula(work: Work) -> int:
    """FLOPs of forward and backward for a clip: 2 a multiply-add; a backward costs two forwards, but the pixels', one.

    Linear layers of a block: 12 D^2 multiply-adds a token; attention: 2 N D a token.
    """
    s, spots, slots = benchmark.SIZES[work.size], (work.resolution // 16) ** 2, work.frames // 2
    tokens, values = spots * slots, 1536
    visible = tokens - slots * int(work.ratio * spots + 1e-6) if work.task == "step" else tokens
    blocks = lambda n, dim, depth: depth * n * (12 * dim**2 + 2 * n * dim)
    once = blocks(visible, s["dim"], s["depth"])
    if work.task == "step":
        dim, masked = s["decoder_dim"], tokens - visible
        once += visible * s["dim"] * dim + blocks(tokens, dim, work.decoder_depth)
        once -= visible * (10 * dim**2 + 2 * tokens * dim)  # in the last block they are but keys and values
        once += masked * dim * values
    else:
        once += s["dim"] * benchmark.CLASSES
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
    assert benchmark.flops(work)[0] == closed_formula(work)


@pytest.mark.parametrize("task", ["step", "finetune"])
def test_contenders_compute_the_same(task):
    pytest.importorskip("transformers")
    work = Work(task, size="tiny", frames=4, resolution=32, ratio=0.75)
    (_, ours, _), (_, theirs, _) = (benchmark.build(work, who, 2) for who in ("ours", "hf"))
    for a, b in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rounds_and_ratios():
    costs = [dict(seconds=s, memory=m, whole=10 + m) for s, m in ((1, 5), (9, 7), (2, 6))]
    found = benchmark.measured(costs)
    assert found == dict(ms=2000, rounds_ms=[1000, 9000, 2000], mb=7, whole_mb=17)
    assert benchmark.ratio([1, 10, 2], [2, 10, 8]) == 2  # of 2, 1 and 4; the ratio of medians would be 4

    class Counter:
        def __init__(self, name):
            self.name = name

        def turn(self, steps):
            asked.append(self.name)
            return dict(seconds=1, memory=1, whole=1)

    asked = []
    benchmark.in_turn([Counter("a"), Counter("b")], rounds=2, steps=1)
    assert "".join(asked) == "ab" + "ab" + "ba"


def test_fit_finds_the_law_and_has_no_negative_coefficient():
    x = np.array([[1, 1.0, 3.0], [1, 2.0, 1.0], [1, 4.0, 5.0], [1, 8.0, 2.0]])
    np.testing.assert_allclose(benchmark.fit(x, x @ [0.5, 2, 3]), [0.5, 2, 3])
    assert benchmark.fit(x, x @ [5, 2, -0.5]).min() >= 0
    points = ((1, 2, 3, 4), (2, 7, 5, 1), (5, 3, 9, 2), (9, 1, 20, 7), (4, 4, 1, 9))
    rows = [dict(factor="f", step_flops=f, parameters=p, activations=a, values=v, ms=3 + f + 2 * p,
                 mb=1 + p + 5 * a + v) for f, p, a, v in points]  # fmt: skip
    laws = benchmark.fit_scale([*rows, dict(factor="processes")])
    assert laws["ms"]["step_flops"] == pytest.approx(1) and laws["mb"]["activations"] == pytest.approx(5)
    assert laws["mb"]["largest_error"] < 1e-9 and rows[0]["ms_fit"] == pytest.approx(rows[0]["ms"])


def test_hours_of_a_recipe(tmp_path, monkeypatch, capsys):
    assert benchmark.gpu_hours(3.6e18, 1e15, 0.5) == pytest.approx(2)
    monkeypatch.setattr(benchmark, "flops", lambda work: (10**12, 0))
    rows = [dict(reader=benchmark.OURS, files=files, clips_per_s=10.0) for files in KINDS]
    (tmp_path / "loader.json").write_text(json.dumps(dict(rows=rows)))
    benchmark.hours(argparse.Namespace(out=tmp_path, command="hours"))
    rows = {row["preset"]: row for row in json.loads((tmp_path / "hours.json").read_text())["rows"]}
    ucf101 = rows["ucf101"]
    assert ucf101["clips"] == 3200 * 49 * 192  # 49 whole batches of 9,537 videos
    assert ucf101["A100"] == "60-89"  # 3.01e19 FLOPs at 45 and 30 % of 312 TFLOP/s
    assert ucf101["A100 cores"] == "9-14"  # 93.6 to 140.4 clips/s, 10 a core
    short = rows["ucf101-short"]
    assert short["clips"] == 2 * 400 * 49 * 192 and short["A100 cores"] == "5-7"  # two clips of a video, read at once
    assert (tmp_path / "ucf101-expected.png").exists()
    assert ucf101["authors_tflops"] == pytest.approx(34.8, abs=0.1)  # in 240 GPU-hours
    assert "cores a H100" in capsys.readouterr().out


def test_what_is_kept_beside_new_rows(tmp_path, monkeypatch):
    args = argparse.Namespace(out=tmp_path, command="step", videos=None, rounds=3)
    benchmark.keep(args, [dict(size="a", ms=1), dict(size="b", ms=2)], ("size",))
    rows = benchmark.keep(args, [dict(size="b", ms=3)], ("size",))
    assert [(row["size"], row["ms"], row["flags"]["rounds"]) for row in rows] == [("a", 1, 3), ("b", 3, 3)]
    monkeypatch.setattr(benchmark, "machine", lambda: {"cpu": "another"})
    assert [row["size"] for row in benchmark.keep(args, [dict(size="c")], ("size",))] == ["c"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_what_they_stand_for_and_all_read_the_same(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(KINDS, kind, KINDS[kind] | dict(frames=40))
    path = tmp_path / f"a.{KINDS[kind]['suffix']}"
    benchmark.write_file(path, kind, seed=0)
    frames = benchmark.whole_file(path)
    assert frames.shape == (40, *KINDS[kind]["size"][::-1], 3)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1  # it moves
    with benchmark.av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [packet.is_keyframe for packet in packets].count(True) == 1  # long groups of pictures
    wanted = [30, 3, 12]
    assert torch.equal(benchmark.read_frames(path, wanted), torch.from_numpy(frames[wanted]).permute(0, 3, 1, 2))


def test_pil_clip():
    torch.manual_seed(0)
    clip = benchmark.pil_clip(torch.full((2, 3, 48, 64), 255, dtype=torch.uint8), 32)
    assert clip.shape == (2, 3, 32, 32) and clip.dtype == torch.float32
    torch.testing.assert_close(
        clip[0, :, 5, 5], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )
