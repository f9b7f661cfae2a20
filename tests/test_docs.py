"""README and docs: the five changes run as they stand; links, files and flags are right."""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
BLOCKS = {
    re.search(r"(?:def|class) (\w+)", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", TEXT[ROOT / "docs/method.md"], re.S)
}
HOME = {name: block.splitlines()[0].removeprefix("# ") for name, block in BLOCKS.items()}
VIDEO, CUBE, GRID = (8, 48, 48), (2, 8, 8), (4, 6, 6)


@pytest.fixture
def change(monkeypatch):
    """Append a block to its file: run it in that module, and undo that afterwards."""

    def change(name):
        path = HOME[name].removesuffix(".py").replace("/", ".")
        module = importlib.import_module(path)
        for attribute, value in list(vars(module).items()):
            if attribute in ("MASKS", "MODELS", "READERS"):
                monkeypatch.setattr(module, attribute, dict(value))
        monkeypatch.setitem(vars(module), name, None)  # is taken away again at the end
        exec(compile(BLOCKS[name], HOME[name], "exec"), vars(module))
        return vars(module)[name]

    return change


def train(monkeypatch, stage, *argv):
    """A stage read anew, so that its flags know the change, for a few steps."""
    spec = importlib.util.spec_from_file_location(f"{stage}_anew", ROOT / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.main([*argv, "--epochs", "1", "--warmup", "0", "--batch", "8", "--workers", "0"])


def losses(name):
    lines = [json.loads(line) for line in Path("runs", name, "log.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert found and all(math.isfinite(loss) for loss in found)


def clips(batch):
    torch.manual_seed(0)
    return torch.randint(256, (batch, VIDEO[0], 3, *VIDEO[1:]), dtype=torch.uint8)


def test_blocks():
    """There are five, none longer than 20 lines, for three files."""
    assert len(BLOCKS) == 5 and set(HOME.values()) == {
        "masking.py",
        "lib/variants.py",
        "lib/lists.py",
    }
    assert max(len(block.strip().splitlines()) for block in BLOCKS.values()) <= 20


def test_motion_mask(change, monkeypatch, here):
    mask = change("motion_mask")
    video = clips(200)
    video[..., 24:] = video[:, :1, ..., 24:]  # the right half stands still
    masked = mask(video, GRID, 0.25).view(-1, *GRID)
    assert (masked == masked[:, :1]).all()  # tubes
    assert (masked[:, 0].flatten(1).sum(dim=1) == 9).all()
    assert masked[..., :3].float().mean() > 3 * masked[..., 3:].float().mean()
    assert masked[:, 0, :, :3].float().mean(dim=0).min() > 0.2  # all moving places, and at random
    train(monkeypatch, "pretrain", "toy", "--data", here, "--mask", "motion", "--name", "motion")
    losses("motion")


CHANGED = [("hog", "HOG"), ("mlp", "MLPDecoder"), ("contrastive", "Contrastive")]


@pytest.mark.parametrize("flag, name", CHANGED)
def test_models(change, monkeypatch, here, flag, name):
    """All parameters learn; a change works through the flag, and its checkpoint can be loaded."""
    from lib import variants, weights
    from masking import MASKS

    Model = change(name)
    assert variants.MODELS[flag] is Model
    model = Model("toy", VIDEO, CUBE, "3d")
    video = clips(3)
    mask = MASKS["tube"](video, GRID, 0.75)
    loss, pred = model(video, mask)
    loss.backward()
    assert loss.isfinite() and pred.shape == (3, 4 * 27, model.target_values())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    train(monkeypatch, "pretrain", "toy", "--data", here, "--model", flag, "--name", flag)
    losses(flag)
    monkeypatch.setattr(weights, "MODELS", variants.MODELS)
    assert type(weights.load_model(f"runs/{flag}/checkpoint.pt")[0]) is Model


def test_hog_target(change):
    """Ramps to the right and left, down, and both ways along a diagonal; a single colour."""
    model = change("HOG")("toy", VIDEO, CUBE)
    ramp = torch.arange(48) / 48
    diagonal = (ramp - ramp[:, None]) / 2
    video = torch.zeros(6, VIDEO[0], 3, *VIDEO[1:])
    for clip, image in zip(video, (ramp, -ramp, ramp[:, None], diagonal, -diagonal), strict=False):
        clip += image
    target = model.target(video, torch.arange(144).expand(6, -1))  # (6, N, 9)
    # Of 9 directions in half a turn. Angles count from right to down, so the diagonal is at 135.
    expected = torch.eye(9)[[0, 0, 4, 6, 6]][:, None].expand(-1, 144, -1)
    assert torch.allclose(target[:5], expected, atol=1e-5)
    assert (target[5] == 0).all()


def test_mlp_decoder_is_local(change):
    """A prediction depends on its place and the mean of the latents alone."""
    model = change("MLPDecoder")("toy", VIDEO, CUBE).eval()
    latent = torch.randn(1, 36, 128)
    visible, masked = torch.arange(36)[None], torch.arange(36, 144)[None]
    whole = model.decode(latent, visible, masked)
    part = model.decode(latent.flip(1), visible, masked[:, :5])
    assert torch.allclose(whole[:, :5], part, atol=1e-5)


def test_contrastive_loss(change):
    """It adds nothing for a single clip, and something for several."""
    from masking import MASKS
    from model import VideoMAE

    model = change("Contrastive")("toy", VIDEO, CUBE)
    for batch in (1, 4):
        video = clips(batch)
        mask = MASKS["tube"](video, GRID, 0.75)
        added = model(video, mask)[0] - VideoMAE.forward(model, video, mask)[0]
        assert (added.abs() < 1e-6) == (batch == 1) and added > -1e-6
    assert model(video, mask)[0] != model(video, mask)[0]  # other halves each time


def test_parts_of_a_loss_are_logged(change, monkeypatch, here):
    change("Contrastive")
    train(
        monkeypatch, "pretrain", "toy", "--data", here, "--model", "contrastive", "--name", "parts"
    )
    lines = [json.loads(line) for line in open("runs/parts/log.jsonl")]
    assert all({"pixels", "contrast"} <= line.keys() for line in lines if "loss" in line)


def test_list_format(change, monkeypatch, here):
    """A table gives both stages the videos that the folder gives, and their classes."""
    import finetune
    from lib import lists

    change("read_table")

    def rows(split):
        names = [split.classes[label] for label in split.labels]
        return sorted(zip(map(str, split.paths), names, strict=True))

    parts = {part: lists.read_split(here, train=part == "train") for part in ("train", "test")}
    lines = ["file,action,part"]
    for part, split in parts.items():
        lines += [f"{Path(path).relative_to(here)},{name},{part}" for path, name in rows(split)]
    Path("table.csv").write_text("\n".join(lines) + "\n")
    found = finetune.read_parts(finetune.Config(data=here, splits="table.csv"), "own")
    assert [rows(split) for split in found] == [rows(split) for split in parts.values()]
    train(
        monkeypatch, "pretrain", "toy", "--data", here, "--splits", "table.csv", "--name", "table"
    )
    losses("table")


# ---------------------------------------------------------------------------------------- the words


def test_lengths():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 200
    assert len(TEXT[ROOT / "docs/method.md"].splitlines()) <= 250


def anchors(text):
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Every relative link and image leads to a file, and its anchor to a heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def flags_of(script):
    """The flags of a script, of its dataclass or of the argparse calls in its source."""
    source = (ROOT / script).read_text()
    if "class Config" in source:
        config = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config
        names = {field.name.replace("_", "-") for field in dataclasses.fields(config)}
        return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | {"--help"}
    if script == "data.py":  # its commands are in the rooms below
        source += "".join(path.read_text() for path in (ROOT / "lib").glob("*.py"))
    return set(re.findall(r"\"(--[a-z-]+)\"", source)) | {"--help"}


SCRIPTS = ["pretrain.py", "contrast.py", "finetune.py", "linprobe.py", "detect.py"]
SCRIPTS += ["visualize.py", "data.py"]
SCRIPTS += ["experiments/run.py", "lib/export.py", "tests/benchmark.py", "tests/gpu.py"]
SCRIPTS += ["experiments/scene.py", "experiments/motion.py"]
MODULES = {"-m lib.weights": "lib/export.py"}
MODULES |= {
    f"-m experiments.{name}": f"experiments/{name}.py" for name in ("run", "scene", "motion")
}


def names_of(line):
    """The scripts that a line names, and where the first name ends."""
    for module, script in MODULES.items():
        line = line.replace(module, script)
    found = [script for script in SCRIPTS if re.search(rf"(?<![\w/]){re.escape(script)}", line)]
    ends = [line.index(script) for script in found]
    return found, line, min(ends, default=0)


def test_flags():
    """Every flag on a line belongs to a script of that line, or to any if it names none."""
    flags = {script: flags_of(script) for script in SCRIPTS}
    every = set.union(*flags.values())
    for page, text in TEXT.items():
        for line in text.replace("\\\n", " ").splitlines():
            if any(word in line for word in ("#SBATCH", "pip install", "hf download")):
                continue  # flags of others
            scripts, line, begin = names_of(line)
            allowed = set.union(*(flags[script] for script in scripts)) if scripts else every
            used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line[begin:] if scripts else line))
            if not scripts:
                used -= {"--signal"}  # Slurm's
            assert used <= allowed, (page.name, line, used - allowed)


def test_values():
    """Presets, masks, models and make's targets that are named exist."""
    from lib.variants import MODELS
    from masking import MASKS

    changed = {"motion", "hog", "mlp", "contrastive"}
    make = (ROOT / "Makefile").read_text()
    for text in TEXT.values():
        assert set(re.findall(r"--model (\w+)", text)) <= {*MODELS} | changed
        assert set(re.findall(r"--mask (\w+)", text)) <= {*MASKS} | changed
        for target in re.findall(r"(?:^    |`)make (\w+)", text, re.M):
            assert re.search(rf"^{target}:", make, re.M), target
        for stage, preset in re.findall(
            r"(pretrain|contrast|finetune|linprobe|detect)\.py ([a-z][\w-]*)", text
        ):
            if preset not in ("and", "names", "to"):
                assert preset in importlib.import_module(stage).PRESETS, preset


def rows_of(stage):
    """The rows of the recipes in docs/training.md: (preset, {column: cell})."""
    text = TEXT[ROOT / "docs/training.md"].split(f"## {stage} recipes\n")[1]
    head, _, *rows = re.search(r"(?:\|.*\n)+", text)[0].splitlines()
    head, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows))
    for cells in rows:
        for preset in cells[0].partition(" (ours)")[0].split(", "):
            yield preset, dict(zip(head, cells, strict=True))


STAGES = dict(
    pretrain="Pre-training", contrast="Contrastive", finetune="Fine-tuning",
    detect="Action detection",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_recipes(stage):
    """The tables have all presets, and their numbers."""
    module, seen = importlib.import_module(stage), []
    for preset, row in rows_of(STAGES[stage]):
        cfg = module.Config(**module.PRESETS[preset])
        seen.append(preset)
        length = f"{cfg.steps:,} steps" if cfg.epochs is None else str(cfg.epochs)
        assert row["epochs"] == length, preset
        assert int(row["batch"].split(",")[0]) == cfg.batch, preset
        assert float(row["base lr"]) == cfg.base_lr, preset
        assert row["flip"] == ("yes" if cfg.flip else "no"), preset
        if stage == "contrast":
            assert row["smallest crop"] == f"{100 * cfg.smallest:.0f} %", preset
        if stage == "pretrain":
            assert row["mask"] == f"{cfg.mask} {cfg.ratio:.0%}".replace("%", " %"), preset
            assert ("2 clips" in row["batch"]) == (cfg.repeats == 2), preset
        if stage in ("pretrain", "contrast"):
            assert int(row["stride"]) == cfg.stride, preset
            assert row["model"].startswith(cfg.size), preset
            assert row["model"].endswith(f"{cfg.frames}x{cfg.resolution}x{cfg.resolution}"), preset
            continue
        if stage == "finetune":
            assert f"{cfg.clips}x{cfg.crops}" in row["test views"].split(", "), preset
        else:
            assert row["model"].startswith(cfg.size or "that of the weights"), preset
        for name in {"layer decay", "drop path", "head dropout"} & row.keys():
            assert float(row[name]) == getattr(cfg, name.replace(" ", "_")), preset
    assert sorted(seen) == sorted(module.PRESETS)


def test_files():
    """Every Python file, page and folder of the project that is named exists."""
    named = re.compile(
        r"(?<![\w/.~-])((?:[\w]+/)*[\w]+\.(?:py|md)|(?:lib|docs|tests|experiments)/)"
    )
    for page, text in TEXT.items():
        text = re.sub(r"\(https?:[^)]*\)", "", text)
        for name in named.findall(text):
            places = [ROOT / name, page.parent / name]
            assert any(place.exists() for place in places), (page.name, name)
