"""The experiments: their commands are valid, are made once and go on; reports say what the runs' files say."""

import json

import pytest

import data
import engine
import experiments
import finetune
import linprobe
import pretrain
import visualize
from experiments import EXPERIMENTS, jobs_of, measure, run, value

STAGES = {"pretrain.py": pretrain, "finetune.py": finetune, "linprobe.py": linprobe}
CELLS = sorted({cell for experiment in EXPERIMENTS.values() for *_, cell in experiment["rows"]})


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiments.LAB.mkdir(parents=True)
    return experiments.LAB


def finish(cell, seed, **found):
    """Leave the files of a cell's commands, as if they had run for a minute each."""
    for name, argv, product in jobs_of(cell, seed):
        product.parent.mkdir(exist_ok=True)
        product.write_text(json.dumps(found))
        (experiments.LAB / f"{name}.job").write_text(json.dumps(dict(command=argv, seconds=60)))


@pytest.mark.parametrize("cell", CELLS)
def test_every_command_is_one_its_stage_accepts(cell):
    for name, (script, *flags), product in jobs_of(cell, 1):
        if script == "visualize.py":
            engine.parse_config(visualize.Config, flags, "", {"": {}})
            assert product.with_suffix(".png") == experiments.LAB / f"{name}.png"
            continue
        _, cfg = engine.parse_config(STAGES[script].Config, flags, "", STAGES[script].PRESETS)
        assert cfg.seed == 1 and f"runs/{cfg.name}" == str(product.parent) and "SEED" not in " ".join(flags)
        if script == "pretrain.py":
            assert cfg.warmup < cfg.epochs


def test_cells_of_claims_are_cells_of_rows():
    for experiment in EXPERIMENTS.values():
        cells = {cell for *_, cell in experiment["rows"]}
        for _, _, more, less in experiment.get("claims", []):
            assert {*more.split(" + "), *less.split(" + ")} <= cells


def test_cells_share_their_pretraining():
    (first, tuned), (again, probe) = jobs_of("base", 0), jobs_of("base:probe", 0)
    assert first == again and tuned[0] != probe[0] and jobs_of("base@Pulse", 0) == [first, tuned]
    assert first != jobs_of("base", 1)[0] and len(jobs_of("none", 0)) == 1
    assert "--init none" in " ".join(jobs_of("none", 0)[0][1]) and "random" in jobs_of("none:probe", 0)[0][1]


def test_a_job_runs_once_and_goes_on(lab, tmp_path):
    (tmp_path / "stage.py").write_text(
        "import os, sys; print(os.environ['OMP_NUM_THREADS'], flush=True); open('tries', 'a').write('x')\n"
        "if len(open('tries').read()) < 2: sys.exit('no')\nopen(sys.argv[1], 'w').write('made')"
    )
    job = ("a", ["stage.py", "made"], tmp_path / "made")
    with pytest.raises(ValueError, match="did not finish, see runs/lab/a.log; the same command goes on"):
        run(*job, 3)
    first = json.loads((lab / "a.job").read_text())["seconds"]
    assert first > 0 and (lab / "a.log").read_text() == "3\nno\n"
    run(*job, 1)
    second = json.loads((lab / "a.job").read_text())["seconds"]
    assert second > first
    run(*job, 1)
    assert (tmp_path / "tries").read_text() == "xx" and json.loads((lab / "a.job").read_text())["seconds"] == second
    with pytest.raises(ValueError, match="runs/lab/a was made by another command: remove"):
        run("a", ["stage.py", "other"], tmp_path / "made", 1)


def test_series_makes_what_is_missing_and_stops_at_an_error(lab, monkeypatch):
    done, nothing = [], lambda *args, **more: data.Split([], [], [])
    for name in ("make_toy", "read_split", "draw_shots"):
        monkeypatch.setattr(experiments, name, nothing)

    def fake(name, argv, product, threads):
        done.append(name)
        if name == "random75-s1":
            raise ValueError("stop")

    monkeypatch.setattr(experiments, "run", fake)
    with pytest.raises(ValueError, match="stop"):
        experiments.main(["table1b", "figure3", "--seeds", "3", "--jobs", "1"])
    assert len(done) == len(set(done))  # what both need is made once
    assert [name for name in done if name.startswith("base")] == [
        "base-s0",
        "base-s0-tuned",
        "base-s1",
        "base-s1-tuned",
    ]
    assert "random75-s1-tuned" not in done and "base-s2" not in done


def test_report(lab, capsys):
    for seed in (0, 1):
        for cell, top1 in (("l1", 40 + seed), ("base", 43 - seed)):
            finish(cell, seed, top1=top1)
    finish("l1", 2, top1=99)  # seed 2 is not complete
    experiments.README.write_text(f"before\n{experiments.MARK}old\n{experiments.MARK}after\n")
    found = measure("table1f", range(3))
    assert found["seeds"] == [0, 1] and found["minutes"] == 8
    assert found["rows"] == [dict(label="L1", paper=69.1, ours=[40, 41]), dict(label="MSE", paper=69.6, ours=[43, 42])]
    assert found["claims"] == [dict(text="MSE: better than L1", paper=pytest.approx(0.5), ours=[3, 1])]
    for _ in range(2):  # again, it replaces what it wrote
        experiments.main(["--report"])
        text = experiments.README.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("| MSE: better than L1 | +0.5 | +2.0 ± 1.4 (+3.0, +1.0) | agrees |") == 1
    assert sorted(path.name for path in experiments.RESULTS.iterdir()) == ["table1f.json", "table1f.md", "table1f.png"]
    assert json.loads((experiments.RESULTS / "table1f.json").read_text()) == json.loads(json.dumps(found))
    page = (experiments.RESULTS / "table1f.md").read_text()
    assert "| L1 | 69.1 | 40.5 ± 0.7 (40.0, 41.0) |" in page and "8 minutes of one core, 2 seeds" in page
    assert "    python pretrain.py --loss l1 --resume --seed 0 --name lab/l1-s0\n" in page


def test_values(lab):
    finish("still:leak-tube", 0, psnr={"75%": {"model still": 20.5}})
    assert value("still:leak-tube@model still", 0) == 20.5
    finish("base", 0, top1=50.0)
    table = (
        "path,label,prediction,correct,top5,probabilities\na,Pulse,Pulse,True,Pulse,1\nb,Pulse,Turn2,False,Turn2,1\n"
    )
    (lab / "base-s0-tuned" / "predictions.csv").write_text(table)
    assert value("base", 0) == 50 and value("base@Pulse", 0) == 50


def test_every_experiment_can_be_drawn(lab):
    for number, cell in enumerate(CELLS):
        psnr = {f"{who} {part}": 10 + number for who in ("model", "nearest") for part in ("still", "moving")}
        finish(cell, 0, top1=number, psnr={"75%": psnr})
        if "@" in cell and "leak" not in cell:
            rows = "".join(f"{name},{name},{name},True,{name},1\n" for name in experiments.MOTIONS)
            head = "path,label,prediction,correct,top5,probabilities\n"
            (jobs_of(cell, 0)[-1][2].parent / "predictions.csv").write_text(head + rows)
    experiments.README.write_text("no marks")
    experiments.main(["--report", "--seeds", "1"])
    assert {path.stem for path in experiments.RESULTS.glob("*.png")} == set(EXPERIMENTS)
    assert experiments.README.read_text() == "no marks"


@pytest.mark.parametrize("argv", [[], ["table9"], ["all", "--report"], ["all", "--seeds", "0"], ["all", "--jobs", "0"]])
def test_mistakes(lab, argv):
    with pytest.raises(ValueError, match="name all or some of table1a"):
        experiments.main(argv)


@pytest.mark.parametrize(
    "gaps, said",
    [
        ([1.0, 2.0], "agrees"),
        ([-1.0, -2.0], "**disagrees**"),
        ([0.0], "**open**"),
        ([-1.0, 3.0], "**open**, 34 seeds might tell"),
    ],
)
def test_verdict(gaps, said):
    assert visualize.verdict(gaps) == said
