"""The experiments: their commands are valid, run once and resume; pages say what the runs left."""

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
from conftest import draw_nothing
from matplotlib.figure import Figure

import finetune
import pretrain
from data import Split, read_split
from experiments import leak, motion, report, run, scene
from experiments.report import claims_of, read_score, verdict
from experiments.run import Job, Series, groups_of, jobs_of, measure
from experiments.table import DOWN, EXPERIMENTS, LAB, PRETRAIN
from lib import engine

MSE, L1 = "epochs120:ucf101_5-tuned", "l1:ucf101_5-tuned"
PROBE = "epochs120:ucf101_5-probe"
CELLS = sorted({cell for experiment in EXPERIMENTS.values() for *_, cell in experiment["rows"]})
RESULTS, OVERVIEW = Path("experiments/results"), Path("docs/results.md")
HEAD = "path,label,prediction,correct,top5,probabilities\n"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LAB.mkdir(parents=True)
    return LAB


def finish(cell, fold, machine="one", commit="c0ffee", **found):
    """Leave the files of a cell's jobs, as if they had run for a minute each."""
    for job in jobs_of(cell, fold):
        job.product.parent.mkdir(exist_ok=True)
        job.product.write_text(json.dumps(found))
        about = dict(chain=job.chain, ended=True, machines=[machine], commits=[commit], seconds=60)
        job.record.write_text(json.dumps(about))


# ------------------------------------------------------------------------------------- the table


def parsed(job):
    """(stage, Config) that a job's command gives."""
    script, *flags = job.argv
    if script == "-m":
        return leak, engine.parse_config(leak.Config, flags[1:], "", {"": {}})[1]
    stage = run.STAGES[script]
    preset, cfg = engine.parse_config(stage.Config, flags, "", stage.PRESETS)
    assert preset == "own"
    return stage, cfg


def test_every_command_is_one_its_stage_accepts():
    for cell in CELLS:
        jobs = jobs_of(cell, 1)
        for job in jobs:
            stage, cfg = parsed(job)
            where = cfg.out if stage is leak else f"runs/{cfg.name}"
            assert where in (str(job.product), str(job.product.parent))
            line = " ".join(job.argv)
            assert "FOLD" not in line and "fold2" not in line
            assert cfg.seed == 0 and ("_train1.txt" in line or "_test1.txt" in line)
            if job is not jobs[-1]:
                assert cfg.warmup < cfg.epochs
            elif ":" in cell and not cell.startswith("none"):
                assert f"{LAB}/{cell.partition(':')[0]}-fold1/checkpoint.pt" in line


OTHERS = ["tennis7", "tennis7-image", "tennis7-moco", "tennis7-labels"]
OTHERS += ["ucf101_5-moco", "ucf101_5-labels"]
CHANGES = {  # what a name changes of "epochs120", in pre-training
    "epochs120": {},
    "epochs60": dict(epochs=60, warmup=2.5),
    "depth4": dict(decoder_depth=4),
    "tube75": dict(ratio=0.75),
    "tube95": dict(ratio=0.95),
    "random90": dict(mask="random"),
    "frame87": dict(mask="frame", ratio=0.875),
    "center": dict(model="center"),
    "l1": dict(loss="l1"),
    "videos50": dict(splits="runs/lab/few-fold1.txt", epochs=700, warmup=30),
    "videos50-epochs120": dict(splits="runs/lab/few-fold1.txt"),
    "pool": dict(data="datasets", splits="runs/lab/pool-fold1.txt", ratio=0.75),
    "ucf101_5": dict(epochs=240, warmup=10),
    "ucf101_5-image": dict(epochs=240, warmup=10, stride=0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_changes_what_its_name_says(name):
    (_, usual), (_, cfg) = (
        parsed(jobs_of(f"{pre}:ucf101_5-tuned", 1)[0]) for pre in ("epochs120", name)
    )
    changed = {key: value for key, value in vars(cfg).items() if value != getattr(usual, key)}
    changed.pop("name", None)
    assert changed == CHANGES[name]
    assert {*PRETRAIN} - {*CHANGES} == {*OTHERS}


def test_scratch_differs_in_its_start_alone():
    for how in ("tuned", "long", "probe"):
        (_, scratch), (_, ours) = (
            parsed(jobs_of(f"{pre}:tennis7-{how}", 2)[-1]) for pre in ("none", "tennis7")
        )
        changed = {key for key, value in vars(ours).items() if value != getattr(scratch, key)}
        assert changed - {"init_scale"} == {"name", "init"}


def test_claims_are_about_the_rows_and_say_what_the_paper_says():
    for name, experiment in EXPERIMENTS.items():
        paper = {cell: number for _, number, cell in experiment["rows"]}
        for text, gap, more, less in experiment.get("claims", []):
            sides = [side.split(" + ") for side in (more, less)]
            assert {*sides[0], *sides[1]} <= set(paper)
            if isinstance(gap, float):
                ours = [sum(paper[cell] for cell in side) for side in sides]
                assert ours[0] - ours[1] == pytest.approx(gap), (name, text)


def test_names():
    """Each is used in some experiment. Others are refused."""
    used = [cell.partition("@")[0].split(":") for cell in CELLS]
    assert {pre for pre, _ in used} == {*PRETRAIN, "none"}
    assert {down for _, down in used} == set(DOWN)
    for cell in ("epoch120:ucf101_5-tuned", "l1:ucf101_5-tune"):
        with pytest.raises(KeyError):
            jobs_of(cell, 0)


# ------------------------------------------------------------------------------------------- jobs


def test_what_cells_share_runs_once():
    (first, tuned), (again, probe) = jobs_of(MSE, 1), jobs_of(PROBE, 1)
    assert first == again and tuned.name != probe.name
    assert jobs_of(f"{MSE}@3", 1) == [first, tuned]
    assert [argv for argv, _ in tuned.chain] == [first.argv, tuned.argv]
    assert first.chain == tuned.chain[:1] == probe.chain[:1]
    assert first != jobs_of(MSE, 2)[0] and len(jobs_of("none:tennis7-long", 1)) == 1
    groups = groups_of(["table1b", "figure3", "table3"], 1)
    names = [job.name for group in groups for job in group]
    assert len(names) == len(set(names)) and [first, tuned, probe] in groups


def test_a_job_runs_once_and_resumes(lab, tmp_path):
    Path("stage.py").write_text(
        "import os, sys\n"
        "print(os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "open('tries', 'a').write('x')\n"
        "open('made', 'w').close()\n"
        "if len(open('tries').read()) < 2: sys.exit('no')\n"
    )
    series = Series(1)
    job = Job("a", ["stage.py"], tmp_path / "made", [[["stage.py"], None]])
    with pytest.raises(ValueError, match="did not finish, see runs/lab/a.log; the same command"):
        series.run(job)
    first = job.about()
    assert first["seconds"] > 0 and (lab / "a.log").read_text() == "1\nno\n" and not job.done()
    series.run(job)
    second = job.about()
    assert second["seconds"] > first["seconds"] and job.done() and not series.running
    series.run(job)
    assert Path("tries").read_text() == "xx" and job.about() == second
    for chain in ([[["other.py"], None]], [[["stage.py"], {"epochs": 1}]], job.chain * 2):
        other = Job("a", ["stage.py"], job.product, chain)
        assert not other.done()
        with pytest.raises(ValueError, match=r"a.job is of other .*: remove it and runs/lab/a$"):
            series.run(other)
    assert Path("tries").read_text() == "xx"
    job.record.unlink()  # killed between product and record: the stage is asked again
    series.run(job)
    assert Path("tries").read_text() == "xxx" and job.done()


@pytest.fixture
def series(lab, monkeypatch):
    """Starts a series of table1b in a process. Stages take a minute, random90's second fails."""
    Path("stage.py").write_text(
        "import os, signal, sys, time\n"
        "name = sys.argv[1]\n"
        "def save(*_):\n"
        "    open('saved', 'w').close()\n"
        "    open(f'runs/lab/{name}.made', 'w').close()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open(f'began-{name}', 'w').write(str(os.getpid()))\n"
        "if name == 'random90':\n"
        "    open(f'runs/lab/{name}.made', 'w').close()\n"
        "elif name == 'random90-next':\n"
        "    while not os.path.exists('began-epochs120'):\n"  # it can be asked to stop from then on
        "        time.sleep(0.05)\n"
        "    sys.exit('no')\n"
        "else:\n"
        "    time.sleep(60)\n"
    )

    def job(name):
        return Job(name, ["stage.py", name], LAB / f"{name}.made", [[["stage.py", name], None]])

    def jobs_of(cell, fold):
        name = cell.partition(":")[0]
        return [job(name), job(f"{name}-next")]

    monkeypatch.setattr(run, "jobs_of", jobs_of)

    def main(jobs):
        sys.stdout, sys.stderr = open("out", "w"), open("err", "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        run.main(["table1b", "--jobs", str(jobs)])

    def start(jobs, *began):
        process = multiprocessing.get_context("fork").Process(target=main, args=(jobs,))
        process.start()
        for _ in range(400):
            if all(Path(f"began-{name}").exists() for name in began):
                break
            time.sleep(0.05)
        time.sleep(0.1)
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_series_stops_its_stages(series, number):
    """The stage gets SIGTERM, and even if it ends well nothing else begins."""
    process = series(1, "epochs120")
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 1
    assert Path("err").read_text() == "stopped: the same command continues\n"
    assert Path("saved").exists() and Path("out").read_text() == "python stage.py epochs120\n"


def test_an_error_stops_the_other_stages(series):
    process = series(4, "epochs120", "random90-next")
    process.join(20)
    assert process.exitcode == 1
    assert "stage.py random90-next did not finish, see runs/lab/random90" in Path("err").read_text()
    assert Path("saved").exists() and not Path("began-epochs120-next").exists()


def test_a_killed_series_is_not_doubled(series):
    """Its stage works on and holds the lock. Reports do not mind."""
    process = series(1, "epochs120")
    process.kill()
    process.join(20)
    with pytest.raises(ValueError, match="another series is at work in runs/lab"):
        run.main(["table1b"])
    run.main(["--report"])
    os.kill(int(Path("began-epochs120").read_text()), signal.SIGKILL)


def test_the_list_of_few_videos(lab, monkeypatch):
    """Those that fine-tuning draws. It is written where a command names it."""
    paths = [Path(f"datasets/UCF-101/Swing/{number:02}.avi") for number in range(12)]
    part = Split(paths, [0] * 12, ["Swing"])
    monkeypatch.setattr(run, "read_split", lambda *where: asked.append(where) or part)
    monkeypatch.setattr(Series, "run_all", lambda self, groups: None)
    asked = []
    with pytest.raises(ValueError, match="datasets/UCF-101 is not there: link the data set to it"):
        run.run_series(["table1b"], [1], 1)
    Path("datasets/UCF-101").mkdir(parents=True)
    run.run_series(["table1b"], [1], 1)
    assert not asked
    run.run_series(["table2"], [2], 1)
    assert asked == [("datasets/UCF-101", "experiments/lists/ucf101_5_train2.txt")]
    drawn = finetune.draw_shots(part, 10, 0).paths
    lines = (lab / "few-fold2.txt").read_text().splitlines()
    assert lines == sorted(f"Swing/{path.name}" for path in drawn)


def test_the_list_of_both_sets(lab):
    """Training videos alone, in the folder that holds both sets."""
    os.symlink(Path(run.__file__).parent, "experiments")
    run.write_pool("pool.txt", 2)
    lines = Path("pool.txt").read_text().splitlines()
    assert len(lines) == len({*lines}) == 279 + 245
    assert lines[0].startswith("UCF-101/Diving/") and lines[-1].startswith("tennis7/")
    for name, folder in (("ucf101_5", "UCF-101"), ("tennis7", "tennis7")):
        tested = Path(f"experiments/lists/{name}_test2.txt").read_text().splitlines()
        assert not {f"{folder}/{line.split()[0]}" for line in tested} & {*lines}


@pytest.mark.parametrize(
    "argv", ["", "table9", "all --report", "all --folds 0", "all --folds 3 4", "all --jobs 0"]
)
def test_mistakes(lab, argv):
    with pytest.raises(ValueError, match="all or some of ucf101_5|--folds are of 1, 2 and 3"):
        run.main(argv.split())


# ------------------------------------------------------------------------------------------ pages


def test_verdict():
    """A 95 % interval by Student's t: 12.71 for 2 folds, 4.30 for 3."""
    assert verdict([10, 11, 12]) == "agrees" and verdict([-10, -11, -12]) == "**disagrees**"
    edge = 4.30 / 3**0.5  # the half width for three values one apart, whose deviation is 1
    assert verdict([edge - 0.99, edge + 0.01, edge + 1.01]) == "agrees"
    assert verdict([edge - 1.01, edge - 0.01, edge + 0.99]) == "open"
    half = 12.71 * 2**0.5 / 2**0.5  # for 0 and 2 the deviation is sqrt(2)
    assert (
        verdict([half - 0.99, half + 1.01]) == "agrees"
        and verdict([half - 1.01, half + 0.99]) == "open"
    )
    assert verdict([2.0]) == "open" and verdict([1, -1]) == "open" and verdict([0, 0]) == "open"
    assert verdict([1, 1, 1]) == "agrees"


def test_scores(lab):
    finish(MSE, 1, top1=50.0)
    rows = "a,Swing,Swing,1,Swing,1\nb,Diving,Swing,0,Swing,1\n"
    product = jobs_of(MSE, 1)[-1].product
    product.with_name("predictions.csv").write_text(HEAD + rows)
    scores = [read_score(product, key) for key in ("", "Swing", "Diving")]
    assert scores == [50, 100, 0]
    finish(PROBE, 1, top1=50.0, knn=40.0)
    assert read_score(jobs_of(PROBE, 1)[-1].product, "knn") == 40
    finish("ucf101_5:leak-tube", 1, psnr={"model still": 20.5})
    assert read_score(jobs_of("ucf101_5:leak-tube", 1)[-1].product, "model still") == 20.5


def test_measure(lab):
    for fold in (1, 2):
        finish(L1, fold, top1=39 + fold)
        finish(MSE, fold, top1=44 - fold)
    finish(L1, 3, top1=99)  # fold 3 is not complete
    found = measure("table1f", [1, 2, 3])
    assert found["folds"] == [1, 2] and found["minutes"] == [4, 4]
    assert found["machines"] == [["one"]] * 2 and found["commits"] == [["c0ffee"]] * 2
    assert found["rows"] == [
        dict(label="L1", paper=69.1, cell=L1, ours=[40, 41], minutes=[2, 2]),
        dict(label="MSE", paper=69.6, cell=MSE, ours=[43, 42], minutes=[2, 2]),
    ]
    assert claims_of(found) == [("MSE: better than L1", pytest.approx(0.5), [3, 1])]
    assert measure("table1f", [2])["folds"] == [2]
    record = jobs_of(MSE, 2)[1].record
    about = json.loads(record.read_text())
    about["chain"][0][1]["weight_decay"] = 0.5  # the recipe of its pre-training was another
    record.write_text(json.dumps(about))
    assert measure("table1f", [1, 2, 3])["folds"] == [1]
    with pytest.raises(
        ValueError, match="epochs120-fold2-ucf101_5-tuned.job is of other .*: remove"
    ):
        Series(1).run(jobs_of(MSE, 2)[1])


def test_claims_of_sums(lab):
    scores = {"epochs120": 90, "videos50": 70, "none": 60}
    for pre, top1 in scores.items():
        finish(f"{pre}:ucf101_5-{'few' if pre == 'videos50' else 'tuned'}", 1, top1=top1)
    finish("none:ucf101_5-few", 1, top1=10)
    ours = {text: gaps for text, _, gaps in claims_of(measure("table2", [1]))}
    assert ours["it helps more with fewer"] == [(70 - 10) - (90 - 60)]


def test_report(lab, monkeypatch):
    for fold in (1, 2):
        finish(L1, fold, top1=39 + fold)
        finish(MSE, fold, top1=44 - fold)
    OVERVIEW.parent.mkdir()
    OVERVIEW.write_text(f"before\n{report.MARK}stale\n{report.MARK}after\n")
    line = "| MSE: better than L1 | +0.5 | +2.0 ± 1.4 (+3.0, +1.0) | open |"
    for _ in range(2):  # the second time it replaces what it wrote
        run.main(["--report"])
        text = OVERVIEW.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
        assert text.count(line) == 1 and "(../experiments/results/table1f.md)" in text
    names = sorted(path.name for path in RESULTS.iterdir())
    assert names == ["table1f.json", "table1f.md", "table1f.png"]
    page = (RESULTS / "table1f.md").read_text()
    assert "| L1 | 69.1 | 40.5 ± 0.7 (40.0, 41.0) | 2.0 |" in page and line in page
    assert "\nMade at commit c0ffee.\n" in page and "experiments.run table1f`" in page
    assert "8 minutes of one core" in page and ": one." in page
    assert " --loss l1 --name lab/l1-fold1 --resume\n" in page
    stored, before = (RESULTS / "table1f.json").read_text(), OVERVIEW.read_text()
    shutil.rmtree(lab)  # as in a fresh clone: what is known stays
    run.main(["--report"])
    assert OVERVIEW.read_text() == before and (RESULTS / "table1f.json").read_text() == stored
    assert (RESULTS / "table1f.md").read_text() == page
    OVERVIEW.write_text(f"one {report.MARK} mark")
    run.main(["--report"])
    assert OVERVIEW.read_text() == f"one {report.MARK} mark"


def test_folds_from_elsewhere_add_up(lab, capsys):
    """A page keeps the folds that are not here, unless other commands or recipes made them."""
    for fold, top1 in ((1, 10), (3, 30)):
        finish(L1, fold, top1=top1)
        finish(MSE, fold, top1=2 * top1)
    run.main(["--report"])
    shutil.rmtree(lab)
    lab.mkdir()
    for fold, top1 in ((2, 20), (3, 35)):
        finish(L1, fold, machine="two", commit="later", top1=top1)
        finish(MSE, fold, machine="three", commit="later", top1=2 * top1)
    run.main(["--report"])
    page = RESULTS / "table1f.json"
    found = json.loads(page.read_text())
    assert found["folds"] == [1, 2, 3]
    assert found["machines"] == [["one"], ["three", "two"], ["three", "two"]]
    assert [row["ours"] for row in found["rows"]] == [[10, 20, 35], [20, 40, 70]]
    text = page.with_suffix(".md").read_text()
    assert "Made at commit c0ffee and later." in text and "12 minutes of one core" in text
    for old in ({"commands": ["x"]}, {"recipes": {}}, {"rows": found["rows"][:1]}):
        page.write_text(json.dumps(found | old))  # has more folds: kept
        capsys.readouterr()
        run.main(["--report"])
        assert "is of other commands or recipes and of more folds: kept" in capsys.readouterr().out
        assert json.loads(page.read_text())["folds"] == [1, 2, 3]
    page.write_text(json.dumps(found | {"recipes": {}, "folds": [1, 2]}))  # no more folds: replaced
    run.main(["--report"])
    assert json.loads(page.read_text())["folds"] == [2, 3]


def test_every_experiment_can_be_drawn(lab, monkeypatch):
    save = Figure.savefig
    small = lambda self, out, **how: save(self, out, **(how | {"dpi": 20}))
    monkeypatch.setattr(Figure, "savefig", small)
    for number, cell in enumerate(CELLS):
        keys = [f"{key} {part}" for key in ("model", "nearest") for part in ("still", "moving")]
        finish(cell, 1, top1=number, knn=number, psnr={key: 10.0 + number for key in keys})
        rows = "".join(f"{label},{label},{label},1,{label},1\n" for label in range(5))
        (jobs_of(cell, 1)[-1].product.parent / "predictions.csv").write_text(HEAD + rows)
    run.main(["--report", "--folds", "1"])  # without docs/results.md
    assert {path.stem for path in RESULTS.glob("*.png")} == set(EXPERIMENTS)


def test_committed_pages_say_which_code_made_them():
    folder = Path(__file__).parents[1] / RESULTS
    pages = [path for path in folder.glob("*.md")]
    assert {path.stem for path in pages} <= set(EXPERIMENTS)
    for path in pages:
        found = json.loads(path.with_suffix(".json").read_text())
        assert "\nMade at commit " in path.read_text() and found["commits"]
        assert path.read_text() == report.page_text(found, path.stem)


# ------------------------------------------------------------------------------------------- leak


def test_still_and_moving_places():
    video = torch.zeros(1, 8, 3, 24, 24)
    video[:, ::2, :, :8, :8] = 1  # one place of nine flickers much, one a little
    video[:, ::2, 1, 8:16, 16:] = 0.5
    parts = leak.still_and_moving(video, (2, 8, 8))
    assert list(parts) == ["still", "moving"] and not (parts["still"] & parts["moving"]).any()
    for part in parts.values():  # three whole places, the same in every frame and colour
        assert part.shape == video.shape and part.float().mean() == pytest.approx(1 / 3)
        assert (part == part[:, :1, :1]).all()
        share = part[0, 0, 0].reshape(3, 8, 3, 8).float().mean(dim=(1, 3))
        assert set(share.flatten().tolist()) == {0, 1}
    assert parts["moving"][..., :8, :8].all() and parts["moving"][..., 8:16, 16:].all()


# ---------------------------------------------------------------------------------- on their own


def test_the_orders_of_frames():
    found = motion.orders(8, torch.Generator().manual_seed(0))
    assert sorted(found["shuffled"].tolist()) == found["as it is"].tolist() == [*range(8)]
    assert found["shuffled"].tolist() not in ([*range(8)], [*range(7, -1, -1)])
    assert found["reversed"].tolist() == [*range(7, -1, -1)] and {*found["one frame"].tolist()} == {
        4
    }


def test_motion_scene_and_leak_through_their_mains(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    few = ["toy", "--data", str(toy), *"--epochs 1 --batch 12 --precision fp32 --warmup".split()]
    pretrain.main([*few, "0"])
    finetune.main([*few, "0", "--shots", "1", "--clips", "2"])
    split = read_split(toy, train=False)
    videos = zip(split.paths, split.labels, strict=True)
    Path("list").write_text("".join(f"{path} {label}\n" for path, label in videos))
    where, model = ["--data", str(toy), "--splits", "list"], "runs/{}-toy/checkpoint.pt"
    capsys.readouterr()

    motion.main([*where, "--checkpoint", model.format("finetune"), "--clips", "2"])
    words = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(":")[0] for line in words] == [*motion.orders(2, torch.Generator())]
    top1 = json.loads(Path("runs/finetune-toy/results.json").read_text())["top1"]
    assert f"as it is: top-1 {top1:.1f} % of 12 test videos" in words[0]
    scene.main([*where[:2], "--train", "list", "--test", "list"])  # each is its own neighbour
    assert "top-1 100.0 % of 12 test videos" in capsys.readouterr().out
    leak.main([*where, "--checkpoint", model.format("pretrain"), "--mask", "frame", "--out", "a/b"])
    psnr = json.loads(Path("a/b").read_text())["psnr"]
    assert psnr["nearest still"] > psnr["nearest moving"] and len(psnr) == 4
