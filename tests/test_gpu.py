"""gpu.py on a CPU: every row is computed, and one that fails costs nothing else."""

import json

import bench_loader
import gpu
import gpu_right
import pytest
import torch


def missing(*args):
    raise ModuleNotFoundError("No module named 'av'")


@pytest.fixture
def short(monkeypatch):
    """Fewer steps and frames; nothing is compiled, which takes minutes."""
    monkeypatch.setattr(gpu_right, "STEPS", 4)
    kind = bench_loader.KINDS["XviD 320x240"] | dict(frames=20)
    monkeypatch.setitem(bench_loader.KINDS, "XviD 320x240", kind)
    monkeypatch.setattr(gpu_right.Right, "compiling", missing)
    monkeypatch.setattr(gpu, "compiled", lambda bench: None)
    monkeypatch.setattr(gpu, "matmul_peak", lambda work: 1e12)


def test_all_rows_on_a_cpu_and_a_failure_costs_one(short, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(gpu, "learn", missing)
    gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    failed = {row["what"]: row["result"] for row in rows if row["ok"] is not True}
    assert failed.keys() == {"--compile", "toy demo"}
    assert set(failed.values()) == {"failed in missing: ModuleNotFoundError: No module named 'av'"}
    assert {row["part"] for row in rows} == {"right", "fast", "fed", "learn"}
    report = (tmp_path / "gpu.md").read_text()
    assert all(f"| {row['part']} | {row['what']} | {row['mark']} |" in report for row in rows)
    by_name = {row["what"]: row for row in rows}
    programs = by_name["step, base, 90% masked, eager"]["numbers"]["programs"]
    assert [program["who"] for program in programs] == ["ours", "ours-less", "ours-least", "hf"]
    assert programs[0]["loss"] == pytest.approx(programs[3]["loss"], rel=1e-2)
    assert "matrix products" in by_name["profile, base"]["result"]
    assert "bit for bit; " in by_name["--resume"]["result"]


def test_without_pyav_the_loader_crops_raw_frames(short, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loader, "write_files", missing)
    gpu.main(["--device", "cpu", "--parts", "fed", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, True]
    assert "PyAV is missing" in rows[1]["result"]


def bench(tmp_path, minutes=1.0):
    return gpu.Bench(gpu.argparse.Namespace(device="cpu", tiny=True, out=tmp_path, minutes=minutes))


def test_what_is_wrong_is_told(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = gpu_right.Right(bench(tmp_path))
    assert right.resume()[0]
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert not right.resume()[0]
    right.reference = lambda: [1.0] * 4
    assert not right.precision("bf16")[0]


def test_no_row_begins_when_time_is_up(tmp_path):
    late = bench(tmp_path, minutes=0)
    late.tiny = False
    late.row("fast", "a row", missing)
    assert late.rows[0]["ok"] is None and late.rows[0]["result"] == "left out: no time"


@pytest.mark.parametrize(
    "name, words",
    [
        ("aten::addmm", "matrix products of linear layers"),
        ("aten::_flash_attention_backward", "attention"),
        ("aten::native_layer_norm_backward", "LayerNorm"),
        ("aten::_fused_adamw_", "AdamW"),
        ("aten::softmax", "aten::softmax"),
    ],
)
def test_operations_in_words(name, words):
    assert gpu.in_words(name) == words
