"""The experiments: their commands are valid, are made once and go on; reports say what the runs' files say."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import engine
import experiments
import finetune
import linprobe
import pretrain
import visualize
from experiments import EXPERIMENTS, jobs_of, measure, run
from visualize import claims_of, read_score

STAGES = {"pretrain.py": pretrain, "finetune.py": finetune, "linprobe.py": linprobe}
CELLS = sorted({cell for experiment in EXPERIMENTS.values() for *_, cell in experiment["rows"]})


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "STOPPED", [])
    experiments.LAB.mkdir(parents=True)
    return experiments.LAB


def finish(cell, seed, machine="one", **found):
    """Leave the files of a cell's commands, as if they had run for a minute each."""
    for name, _, product, by in jobs_of(cell, seed):
        product.parent.mkdir(exist_ok=True)
        product.write_text(json.dumps(found))
        about = dict(by=by, machines=[machine], seconds=60)
        (experiments.LAB / f"{name}.job").write_text(json.dumps(about))


@pytest.mark.parametrize("cell", CELLS)
def test_every_command_is_one_its_stage_accepts(cell):
    for name, (script, *flags), product, _ in jobs_of(cell, 1):
        line = " ".join(flags)
        if script == "visualize.py":
            _, cfg = engine.parse_config(visualize.Config, flags, "", {"": {}})
            assert cfg.out == f"{experiments.LAB / name}.png" and product.name == f"{name}-psnr.json"
        else:
            _, cfg = engine.parse_config(STAGES[script].Config, flags, "", STAGES[script].PRESETS)
            assert f"runs/{cfg.name}" == str(product.parent) and "SEED" not in line
        assert cfg.seed == 1 and "-s0" not in line and not ("checkpoint.pt" in line and "-s1/checkpoint.pt" not in line)
        if script == "pretrain.py":
            assert cfg.warmup < cfg.epochs


# What of the toy recipe a cell's pre-training changes, and its last job.
CHANGES = {
    "base": {}, "depth1": dict(decoder_depth=1), "depth4": dict(decoder_depth=4), "l1": dict(loss="l1"),
    "center": dict(target="center"), "double": dict(target="double"), "dense": dict(stride=1),
    "random75": dict(mask="random"), "frame75": dict(mask="frame"), "tube50": dict(ratio=0.5),
    "tube90": dict(ratio=0.9), "tube95": dict(ratio=0.95), "epochs10": dict(epochs=10), "epochs20": dict(epochs=20),
    "few": dict(splits="runs/lab/few-s1.txt"), "few-long": dict(splits="runs/lab/few-s1.txt", epochs=120, warmup=4),
    "half": dict(splits="runs/lab/half-s1.txt"), "half-long": dict(splits="runs/lab/half-s1.txt", epochs=60, warmup=2),
    "still": dict(data=data.STILL), "still-random": dict(data=data.STILL, mask="random"),
    "still-frame": dict(data=data.STILL, mask="frame"),
    "base:probe": {}, "none:probe": dict(init="random"), "none": dict(init="none", init_scale=1, base_lr=0.008),
    "none:tuned40": dict(init="none", init_scale=1, base_lr=0.008, epochs=40), "still:still": dict(data=data.STILL),
    "few-long:all25": dict(shots=25, epochs=32, warmup=3.2), "half-long:all50": dict(shots=50, epochs=16, warmup=1.6),
    "base:all100": dict(shots=100, epochs=8, warmup=0.8), "still-frame:leak-frame": dict(mask="frame"),
    "still:leak-tube": {}, "still-random:leak-random": dict(mask="random"),
}  # fmt: skip


@pytest.mark.parametrize("cell", CHANGES)
def test_a_cell_changes_what_its_name_says(cell):
    """And nothing else of the toy recipe."""
    jobs = jobs_of(cell, 1)
    _, (script, *flags), *_ = jobs[0] if ":" not in cell and cell != "none" else jobs[-1]
    if script == "visualize.py":
        module, preset = visualize, dict(ratios=(0.75,), scored=200)  # of all masks
    else:
        module, preset = STAGES[script], STAGES[script].PRESETS["toy"]
    _, cfg = engine.parse_config(module.Config, flags, "", {"": preset})
    changed = {name: value for name, value in vars(cfg).items() if value != vars(module.Config(**preset))[name]}
    ours = ["name", "seed", "resume", "out", "checkpoint"] + ["init"] * (":" in cell and "none" not in cell)
    assert {name: value for name, value in changed.items() if name not in ours} == CHANGES[cell]


def test_names_that_are_none():
    for cell in ("epoch20", "base:tune"):
        with pytest.raises(KeyError):
            jobs_of(cell, 0)


def test_claims_are_about_the_rows_and_say_what_the_paper_says():
    for name, experiment in EXPERIMENTS.items():
        paper = {cell: number for _, number, cell in experiment["rows"]}
        for text, gap, more, less in experiment.get("claims", []):
            assert {*more.split(" + "), *less.split(" + ")} <= set(paper)
            if isinstance(gap, float) and text != "tubes beat random masks (theirs: 90 %)":  # both of theirs are
                numbers = [sum(paper[cell] for cell in side.split(" + ")) for side in (more, less)]
                assert numbers[0] - numbers[1] == pytest.approx(gap), (name, text)


def test_cells_share_their_pretraining():
    (first, tuned), (again, probe) = jobs_of("base", 0), jobs_of("base:probe", 0)
    assert [argv for argv, _ in tuned[3]] == [first[1], tuned[1]] and [first[3], tuned[3][:1]] == [first[3]] * 2
    assert first == again and tuned[0] != probe[0] and jobs_of("base@Pulse", 0) == [first, tuned]
    assert first != jobs_of("base", 1)[0] and len(jobs_of("none", 0)) == 1
    assert "--init none" in " ".join(jobs_of("none", 0)[0][1]) and "random" in jobs_of("none:probe", 0)[0][1]


def test_a_job_runs_once_and_goes_on(lab, tmp_path):
    (tmp_path / "stage.py").write_text(
        "import os, sys; print(os.environ['OMP_NUM_THREADS'], flush=True); open('tries', 'a').write('x')\n"
        "if len(open('tries').read()) < 2: sys.exit('no')\nopen(sys.argv[1], 'w').write('made')"
    )
    job = ("a", ["stage.py", "made"], tmp_path / "made", [[["stage.py", "made"], None]])
    with pytest.raises(ValueError, match="did not finish, see runs/lab/a.log; the same command goes on"):
        run(*job, 3)
    first = json.loads((lab / "a.job").read_text())["seconds"]
    assert first > 0 and (lab / "a.log").read_text() == "3\nno\n"
    run(*job, 1)
    second = json.loads((lab / "a.job").read_text())["seconds"]
    assert second > first and not experiments.RUNNING
    run(*job, 1)
    assert (tmp_path / "tries").read_text() == "xx" and json.loads((lab / "a.job").read_text())["seconds"] == second
    for other in ([[["stage.py", "other"], None]], [[["stage.py", "made"], {"epochs": 1}]], [job[3][0], job[3][0]]):
        with pytest.raises(ValueError, match=r"lab/a.job is of other commands or recipes: remove runs/lab/a\*$"):
            run(*job[:3], other, 1)
    (lab / "a.job").unlink()  # killed between the two: it is asked again, and says that nothing is left to do
    run(*job, 1)
    assert (tmp_path / "tries").read_text() == "xxx" and (lab / "a.job").exists()


@pytest.fixture
def series(lab, tmp_path, monkeypatch):
    """Starts a series of table1b; each cell is two stages of a minute, but tube90's second, which fails."""
    (tmp_path / "stage.py").write_text(
        "import os, signal, sys, time\nname = sys.argv[1]\nmake = lambda: open(f'runs/lab/{name}.made', 'w').close()\n"
        "save = lambda *a: sys.exit(make() or open('saved', 'w').close())\nsignal.signal(signal.SIGTERM, save)\n"
        "open(f'began-{name}', 'w').write(str(os.getpid()))\n"
        "if name.startswith('tube90'):\n    time.sleep(0.5); sys.exit('no' if 'next' in name else make())\n"
        "time.sleep(60)"
    )
    nothing, job = lambda *a, **k: data.Split([], [], []), lambda at: (at, ["stage.py", at], lab / f"{at}.made", [])
    for module, name in ((experiments, "make_toy"), (experiments, "read_split"), (finetune, "draw_shots")):
        monkeypatch.setattr(module, name, nothing)
    monkeypatch.setattr(experiments, "jobs_of", lambda cell, seed: [job(cell), job(f"{cell}-next")])

    def main(jobs):
        sys.stdout, sys.stderr = open("out", "w"), open("err", "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
        experiments.main(["table1b", "--jobs", str(jobs)])

    def start(jobs, *began):
        process = multiprocessing.get_context("fork").Process(target=main, args=(jobs,))  # imports nothing again
        process.start()
        for _ in range(600):
            if all(Path(f"began-{name}").exists() for name in began):
                break
            time.sleep(0.1)
        time.sleep(0.2)
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_series_stops_its_commands(series, number):
    """Both signals, to the series alone: the stage gets SIGTERM, and even if it ends well no other command begins."""
    process = series(1, "base")
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 1 and Path("err").read_text() == "stopped: the same command goes on\n"
    assert Path("saved").exists() and Path("out").read_text() == "python stage.py base\n"


def test_an_error_stops_the_other_commands(series):
    process = series(4, "base", "tube90-next")
    process.join(50)
    assert process.exitcode == 1
    assert "stage.py tube90-next did not finish, see runs/lab/tube90-next.log" in Path("err").read_text()
    assert Path("saved").exists() and not Path("began-base-next").exists()


def test_a_killed_series_is_not_doubled(series):
    """Its stage works on; another series waits for nobody and says so. Reports do not mind."""
    process = series(1, "base")
    process.kill()
    process.join(20)
    with pytest.raises(SystemExit, match="runs/lab is at work already"):
        experiments.main(["table1b"])
    experiments.main(["--report"])
    os.kill(int(Path("began-base").read_text()), signal.SIGKILL)


def test_series_makes_what_is_missing_and_stops_at_an_error(lab, monkeypatch):
    done, made = [], []
    part = data.Split([Path(f"{experiments.TOY}/{name}.avi") for name in "ba"], [0, 0], ["c"])
    monkeypatch.setattr(experiments, "make_toy", lambda out, still=False: made.append((out, still)))
    monkeypatch.setattr(experiments, "read_split", lambda folder: part)
    monkeypatch.setattr(finetune, "draw_shots", lambda split, shots, seed: made.append((shots, seed)) or split)

    def fake(name, argv, product, by, threads):
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
    assert made == [(experiments.TOY, False), (experiments.STILL, True), (25, 0), (50, 0), *made[:2], (25, 1), (50, 1)]
    assert (lab / "few-s1.txt").read_text() == "a.avi\nb.avi\n"


def said(name, claim):
    """What a claim's cells give, one seed."""
    return {text: ours for text, _, ours in claims_of(measure(name, range(1)))}[claim]


def test_measure(lab):
    for seed in (0, 1):
        for cell, top1 in (("l1", 40 + seed), ("base", 43 - seed)):
            finish(cell, seed, top1=top1)
    finish("l1", 2, top1=99)  # seed 2 is not complete
    found = measure("table1f", range(3))
    assert found["seeds"] == [0, 1] and found["minutes"] == [4, 4] and found["machines"] == ["one", "one"]
    assert found["rows"] == [
        dict(label="L1", paper=69.1, cell="l1", ours=[40, 41], minutes=[2, 2]),
        dict(label="MSE", paper=69.6, cell="base", ours=[43, 42], minutes=[2, 2]),
    ]
    assert claims_of(found) == [("MSE: better than L1", pytest.approx(0.5), [3, 1])]
    assert measure("table1f", range(1, 2))["seeds"] == [1]
    record = json.loads((lab / "base-s1-tuned.job").read_text())
    record["by"][0][1]["weight_decay"] = 0.5  # the recipe of the pre-training that it started from
    (lab / "base-s1-tuned.job").write_text(json.dumps(record))
    assert measure("table1f", range(3))["seeds"] == [0]
    with pytest.raises(ValueError, match=r"base-s1-tuned.job is of other .*: remove runs/lab/base-s1-tuned\*"):
        run(*jobs_of("base", 1)[1], 1)
    (lab / "base-s0.job").unlink()
    assert measure("table1f", range(3))["seeds"] == []
    finish("base", 0, top1=43)
    halves = (("half-long:all50", 1), ("none:all50", 1))
    for cell, top1 in (("base:all100", 90), ("few-long:all25", 70), ("none:all100", 60), ("none:all25", 10), *halves):
        finish(cell, 0, top1=top1)
    assert said("table2", "it helps more with fewer") == [(70 - 10) - (90 - 60)]
    for number, (mask, pre) in enumerate((("tube", "still"), ("random", "still-random"), ("frame", "still-frame"))):
        keys = ("model still", "model moving", "nearest still", "nearest moving")
        finish(f"{pre}:leak-{mask}", 0, psnr={"75%": {key: 10**number * 2**i for i, key in enumerate(keys)}})
    assert said("leak", "random masks leak still places, model") == [10 - 1]
    assert said("leak", "frame masks leak moving places, nearest") == [800 - 8]


def test_report(lab, capsys):
    for seed in (0, 1):
        for cell, top1 in (("l1", 40 + seed), ("base", 43 - seed)):
            finish(cell, seed, top1=top1)
    readme, results = Path("README.md"), Path("results")
    readme.write_text(f"before\n{visualize.MARK}old\n{visualize.MARK}after\n")
    for _ in range(2):  # again, it replaces what it wrote
        experiments.main(["--report"])
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        line = "| MSE: better than L1 | +0.5 | +2.0 ± 1.4 (+3.0, +1.0) | leans to agree (5 seeds) |"
        assert text.count(line) == 1
    assert sorted(path.name for path in results.iterdir()) == ["table1f.json", "table1f.md", "table1f.png"]
    page = (results / "table1f.md").read_text()
    assert "| L1 | 69.1 | 40.5 ± 0.7 (40.0, 41.0) | 2.0 |" in page and line in page
    assert (
        "8 minutes of one core, with the runs that other experiments share: seeds 0, 1 on one." in page
        and "experiments.py table1f`" in page
    )
    assert "    python pretrain.py --loss l1 --resume --seed 0 --name lab/l1-s0\n" in page
    stored, before = json.loads((results / "table1f.json").read_text()), readme.read_text()
    assert stored == json.loads(json.dumps(measure("table1f", range(3))))
    shutil.rmtree(lab)  # as in a fresh clone: what is known stays
    experiments.main(["--report"])
    assert readme.read_text() == before and json.loads((results / "table1f.json").read_text()) == stored
    assert (results / "table1f.md").read_text() == page
    for odd in (f"one {visualize.MARK}mark", "none"):  # is left alone
        readme.write_text(odd)
        experiments.main(["--report"])
        assert readme.read_text() == odd


def test_seeds_from_elsewhere_add_up(lab, capsys):
    """A page keeps the seeds that are not here, unless other commands or recipes made them."""
    for seed, top1 in ((0, 10), (2, 30)):
        finish("l1", seed, top1=top1)
        finish("base", seed, top1=2 * top1)
    experiments.main(["--report"])
    shutil.rmtree(lab)
    lab.mkdir()
    for seed, top1 in ((1, 20), (2, 35)):
        finish("l1", seed, machine="two", top1=top1)
        finish("base", seed, machine="two", top1=2 * top1)
    (lab / "l1-s1.job").write_text((lab / "l1-s1.job").read_text().replace("two", "three"))
    experiments.main(["--report"])
    page = Path("results/table1f.json")
    found = json.loads(page.read_text())
    assert found["seeds"] == [0, 1, 2] and found["machines"] == ["one", "three and two", "two"]
    assert [row["ours"] for row in found["rows"]] == [[10, 20, 35], [20, 40, 70]]
    text = page.with_suffix(".md").read_text()
    assert "12 minutes of one core" in text and "seed 0 on one; seed 1 on three and two; seed 2 on two." in text
    one_more = [*found["rows"], found["rows"][0] | {"cell": "more"}]
    for old in ({"commands": ["x"]}, {"recipes": {}}, {"rows": one_more}):  # that has more seeds: kept
        page.write_text(json.dumps(found | old))
        capsys.readouterr()
        experiments.main(["--report"])
        assert "table1f.md is of other commands or recipes and of 3 seeds: kept" in capsys.readouterr().out
        assert json.loads(page.read_text())["seeds"] == [0, 1, 2]
    page.write_text(json.dumps(found | {"rows": found["rows"][::-1]}))  # rows are told by their cells
    experiments.main(["--report"])
    assert [row["ours"] for row in json.loads(page.read_text())["rows"]] == [[10, 20, 35], [20, 40, 70]]
    page.write_text(json.dumps(visualize.with_seeds(found, found) | {"recipes": {}, "seeds": [5, 6]}))  # no more: not
    experiments.main(["--report"])
    assert json.loads(page.read_text())["seeds"] == [1, 2]


def test_machine_names_the_type_too(monkeypatch):
    """Two processors of one name need not compute in the same type, nor give the same numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for known, dtype in ({"avx512_bf16": True}, "bfloat16"), ({}, "float32"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert visualize.machine(2) == f"{visualize.processor()}, {dtype}, 2 threads"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    assert visualize.machine(1) == "H100, bfloat16, 1 thread"


def test_minutes_are_shown_where_they_are_known(lab):
    rows = [dict(label=label, paper=None, cell=label, ours=[1, 2], minutes=[None, 3.0]) for label in ("a, x", "b, x")]
    found = dict(title="t", note="n", commands=[], recipes={}, seeds=[0, 1], minutes=[1, 3], machines=["m", "m"])
    found |= dict(rows=rows, axis=visualize.MINUTES)
    text = lambda: Path("page.md").read_text()
    visualize.results_page(found, Path("page"))
    assert "| minutes of one core (seed 1) |" in text() and "| a, x |  | 1.5 ± 0.7 (1.0, 2.0) | 3.0 |" in text()
    del found["axis"]
    rows[0]["cell"] = "a@key"  # two rows of one run
    visualize.results_page(found, Path("page"))
    assert "minutes of one core |" not in text() and "minutes of one core (" not in text()
    rows[0] |= dict(cell="a", minutes=[None, None])
    visualize.results_page(found, Path("page"))
    assert "minutes of one core |" not in text() and "minutes of one core (" not in text()


def test_values(lab):
    finish("still:leak-tube", 0, psnr={"75%": {"model still": 20.5}})
    value = lambda cell, seed: read_score(jobs_of(cell, seed)[-1][2], cell.partition("@")[2])
    assert value("still:leak-tube@model still", 0) == 20.5
    finish("base", 0, top1=50.0)
    table = (
        "path,label,prediction,correct,top5,probabilities\na,Pulse,Pulse,True,Pulse,1\nb,Turn2,Pulse,False,Pulse,1\n"
    )
    (lab / "base-s0-tuned" / "predictions.csv").write_text(table)
    assert value("base", 0) == 50 and value("base@Pulse", 0) == 100 and value("base@Turn2", 0) == 0


def test_every_experiment_can_be_drawn(lab):
    for number, cell in enumerate(CELLS):
        psnr = {f"{who} {part}": 10 + number for who in ("model", "nearest") for part in ("still", "moving")}
        finish(cell, 0, top1=number, psnr={"75%": psnr})
        if "@" in cell and "leak" not in cell:
            rows = "".join(f"{name},{name},{name},True,{name},1\n" for name in experiments.MOTIONS)
            head = "path,label,prediction,correct,top5,probabilities\n"
            (jobs_of(cell, 0)[-1][2].parent / "predictions.csv").write_text(head + rows)
    experiments.main(["--report", "--seeds", "1"])  # without a README
    assert {path.stem for path in Path("results").glob("*.png")} == set(EXPERIMENTS)


@pytest.mark.parametrize(
    "argv", [[], ["table9"], ["all", "--report"], *(["all", f"--{name}", "-1"] for name in ("seeds", "first", "jobs"))]
)
def test_mistakes(lab, argv):
    with pytest.raises(ValueError, match="name all or some of table1a"):
        experiments.main(argv)


def test_verdict():
    """A 95 % interval, and as many seeds as would make it: Student's t of 2 degrees of freedom is 4.30, of 3 3.18."""
    verdict = visualize.verdict
    assert verdict([10, 11, 12]) == "agrees" and verdict([-10, -11, -12]) == "**disagrees**"
    edge = 4.30 / 3**0.5  # times the deviation
    assert verdict([edge - 0.99, edge + 0.01, edge + 1.01]) == "agrees"
    assert verdict([edge - 1.01, edge - 0.01, edge + 0.99]) == "leans to agree (4 seeds)"
    assert 2.26 * 2.466 / 10**0.5 < 1.833 < 2.31 * 2.466 / 9**0.5  # t, deviation and mean of the next
    assert verdict([-3, 1, -3.5]) == "leans to **disagree** (10 seeds)"
    assert verdict([1, -1.001]) == "leans to **disagree** (1,000 or more seeds)"
    assert verdict([10, 11, 12], False) == "holds" and verdict([2.0], False) == "leans to hold"
    assert verdict([-10, -11, -12], False) == "does **not** hold" and verdict([-2.0], False) == "leans **not** to hold"
    assert verdict([1, -1]) == "open" and verdict([0.0]) == "open" and verdict([2.0]) == "leans to agree"
    assert verdict([1, 1, 1, 1]) == "agrees"
