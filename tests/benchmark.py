"""How long, how large: our steps beside Hugging Face's, our loader beside other decoders, cost as work grows. By hand.

    python tests/benchmark.py step --sizes small base --precisions fp32 bf16 --modes eager compiled    # pre-training
    python tests/benchmark.py step --cross --decoder-mask 0.5      # ours with options beyond the paper
    python tests/benchmark.py finetune --sizes small base --precisions fp32 bf16 --modes eager compiled
    python tests/benchmark.py loader                   # also --videos FILE ...: their frames instead of made-up ones
    python tests/benchmark.py scale                    # or --factors frames ratio: a part; writes scale.png as well
    python tests/benchmark.py hours                    # recipes in GPU-hours and cores, in seconds; ucf101-expected.png
    python tests/benchmark.py all                      # all of it, one after the other

Each prints a table and writes OUT/COMMAND.json (default tests/reference); what is there from the same machine and
versions stays, so that a table can be made in pieces: --sizes base --modes compiled is one. On 2 idle CPU cores an
eager row takes a minute (small) to three (base), a compiled one two minutes more, loader two minutes, a factor of scale
one or two. Needs transformers; decord and torchcodec (with FFmpeg's libraries) only for their rows. On CPU (Linux) and
on GPUs; --processes N trains on N of them, or in N processes with a share of the threads each, by DDP. Run it on an
idle machine: others on its cores double times and blur ratios. tests/reference holds what to expect.

How: each contender is a process of its own (so memory is its own), has the same weights, inputs, autocast and fused
AdamW, and is checked to give the same loss and predictions. After a warm-up they are asked in turn, A B B A ..., for a
few steps each, and the medians and the median of the rounds' ratios are told. Ours gets uint8 clips (fine-tuning: 0-1
floats, as its stage); Hugging Face's gets them as normalised floats, made outside of the timed steps, which favours it.
Memory on CPU is the peak of the process while it steps, less what it held after imports (the whole is in the JSON); on
GPU torch.cuda.max_memory_allocated. Utilisation is the FLOPs that a step needs (see flops) over its time and over the
best matrix product measured here in the same type, whoever computes it and however.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from data import MultiScaleCrop, Split, Videos, make_loader, pretrain_transform, read_frames, sample_clip  # noqa: E402
from masking import MASKS, running_cell_mask  # noqa: E402
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, Classifier, VideoMAE, to_official  # noqa: E402
from pretrain import PRESETS, Config  # noqa: E402
from visualize import processor  # noqa: E402

CLASSES = 101
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """A training step: what is computed, and in what way. `batch` is clips per step over all processes."""

    task: str = "step"  # or "finetune"
    size: str = "small"
    precision: str = "fp32"
    mode: str = "eager"  # or "compiled"
    batch: int = 2
    frames: int = 16
    resolution: int = 224
    ratio: float = 0.9
    decoder_depth: int | None = None
    processes: int = 1
    threads: int = 1  # of each process
    checkpointing: bool = False
    cross: bool = False  # this one and the next: of ours alone
    decoder_mask: float = 0.0
    device: str = "cpu"


# ------------------------------------------------------------------------------------------ contenders


HUGGING_FACE = {  # patterns in the official names -> names of Hugging Face's modules, in this order
    r"^(encoder\.)?patch_embed\.proj": "videomae.embeddings.patch_embeddings.projection",
    r"^(encoder\.)?blocks": "videomae.encoder.layer", "encoder.norm": "videomae.layernorm",
    "decoder.blocks": "decoder.decoder_layers", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "attn.proj": "attention.output.dense",
    r"attn\.": "attention.attention.", "q_bias": "query.bias", "v_bias": "value.bias", r"^head\.": "classifier.",
}  # fmt: skip


def hugging_face_names(model: VideoMAE | Classifier) -> dict[str, torch.Tensor]:
    """Our weights under the names of Hugging Face's modules."""
    state = {}
    for name, value in to_official(model).items():
        for pattern, new in HUGGING_FACE.items():
            name = re.sub(pattern, new, name)
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True) if "qkv" in name else [("", value)]
        state |= {name.replace("qkv", part): rows for part, rows in parts}
    return state


def hugging_face(model: VideoMAE | Classifier):
    """Hugging Face's VideoMAEForPreTraining or ForVideoClassification with the weights of ours and SDPA."""
    import transformers

    c, s = model.config, SIZES[model.config["size"]]
    config = transformers.VideoMAEConfig(
        image_size=c["video_size"][1], patch_size=c["cube"][1], num_frames=c["video_size"][0],
        tubelet_size=c["cube"][0], hidden_size=s["dim"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
        intermediate_size=4 * s["dim"], decoder_hidden_size=s["decoder_dim"],
        decoder_num_hidden_layers=c.get("decoder_depth", 0), decoder_num_attention_heads=s["decoder_heads"],
        decoder_intermediate_size=4 * s["decoder_dim"], layer_norm_eps=1e-6, num_labels=c.get("classes", 2),
        use_mean_pooling=isinstance(model, Classifier), attn_implementation="sdpa",
    )  # fmt: skip
    kinds = transformers.VideoMAEForVideoClassification, transformers.VideoMAEForPreTraining
    theirs = kinds[isinstance(model, VideoMAE)](config)
    (theirs.decoder.norm if isinstance(model, VideoMAE) else theirs.fc_norm).eps = 1e-6  # fixed at 1e-5 there
    theirs.load_state_dict(hugging_face_names(model), strict=True)
    return theirs.train()


def build(work: Work, who: str, clips: int):
    """The net of "ours" or "hf", a function of nothing that computes (loss, predictions), and the optimiser.

    Weights, clips, masks and labels depend on the work alone; float32 unless autocast is on around the function.
    """
    torch.manual_seed(0)
    size, device = (work.frames, work.resolution, work.resolution), torch.device(work.device)
    pretrain = work.task == "step"
    if pretrain:
        model = VideoMAE(work.size, size, decoder_depth=work.decoder_depth, cross=work.cross and who == "ours")
    else:
        model = Classifier(work.size, CLASSES, size, init_scale=1.0)  # so that predictions say something
    video = torch.randint(0, 256, (clips, size[0], 3, *size[1:]), dtype=torch.uint8)
    masks = [MASKS["tube"](clips, model.encoder.grid, work.ratio).to(device)] if pretrain else []
    if work.decoder_mask and who == "ours":
        masks.append(running_cell_mask(clips, model.encoder.grid, work.decoder_mask).to(device))
    labels = torch.randint(CLASSES, (clips,), device=device)
    if who == "hf":
        model = hugging_face(model)
        if work.checkpointing:
            model.gradient_checkpointing_enable()
        video = (video / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    else:
        model.encoder.checkpointing = work.checkpointing
        video = video if pretrain else video / 255
    model, video = model.to(device), video.to(device)
    net = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model

    def forward():
        out = net(video, *masks)
        loss, pred = out if isinstance(out, tuple) else (getattr(out, "loss", None), getattr(out, "logits", out))
        return loss if pretrain else F.cross_entropy(pred.float(), labels, label_smoothing=0.1), pred

    return model, forward, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)


def peak_memory(cuda: bool, reset: bool = False) -> float:
    """MB at most since the last reset, of this process or of the tensors on its GPU; then reset."""
    status = "" if cuda else Path("/proc/self/status").read_text()
    found = torch.cuda.max_memory_allocated() / 2**20 if cuda else int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    if reset:
        torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
    return found


def contend(work: Work, who: str, rank: int, port: int, pipe) -> None:
    """A contender's process: send loss and some predictions, then for each number of steps received what they cost.

    That is dict(seconds of a step, memory, whole), MB; memory is the peak less what was held after imports. The first
    steps are the warm-up; 0 steps end the process.
    """
    cuda, warm = work.device == "cuda", False
    torch.set_num_threads(work.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for both
    if cuda:
        torch.cuda.set_device(rank)
    if who == "hf":
        from transformers import VideoMAEForPreTraining  # noqa: F401  before memory is looked at
    if work.mode == "compiled":
        torch.compile(lambda x: x + 1)(torch.ones(1))  # loads the compiler
    if work.processes > 1:
        here = dict(init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=work.processes)
        dist.init_process_group("nccl" if cuda else "gloo", **here)
    peak_memory(cuda, reset=True)
    held = peak_memory(cuda)
    model, forward, optimizer = build(work, who, work.batch // work.processes)
    with torch.no_grad():
        loss, pred = forward()
    pipe.send([loss.item(), *pred.flatten()[:: max(pred.numel() // 7, 1)].tolist()])
    if work.mode == "compiled":
        model.compile()
    for steps in iter(pipe.recv, 0):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
        begun = begin.record() if cuda else time.perf_counter()
        for _ in range(steps):
            loss = pred = None
            with torch.autocast(work.device, DTYPES[work.precision], enabled=work.precision != "fp32"):
                loss, pred = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if cuda:
            end.record()
            torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1e3 if cuda else time.perf_counter() - begun
        whole, warm = peak_memory(cuda, reset=not warm), True
        pipe.send(dict(seconds=seconds / steps, memory=whole - held, whole=whole))


class Contender:
    """The processes of one contender, seen from outside."""

    def __init__(self, work: Work, who: str):
        os.environ["OMP_NUM_THREADS"] = str(work.threads)  # for the processes to come
        context, self.name, self.pipes, self.processes = multiprocessing.get_context("spawn"), f"{who} {work}", [], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(work.processes):
            mine, other = context.Pipe()
            self.processes.append(context.Process(target=contend, args=(work, who, rank, port, other), daemon=True))
            self.processes[-1].start()
            other.close()  # so that a process that ends is noticed
            self.pipes.append(mine)
        self.said = self.receive()[0]

    def receive(self) -> list:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError as error:
            raise RuntimeError(f"{self.name} ended, see above") from error

    def turn(self, steps: int) -> dict[str, float]:
        """Some steps in all of its processes: the cost of the slowest and largest."""
        for pipe in self.pipes:
            pipe.send(steps)
        costs = self.receive()
        return {key: max(cost[key] for cost in costs) for key in costs[0]}

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):  # where it has ended already
                pipe.send(0)
            process.join(10)
            process.terminate()


def in_turn(contenders: list, rounds: int, steps: int) -> list[dict]:
    """Warm all up, then ask them in turn, every other round backwards: what measured() makes of the costs of each."""
    warm_up = [3 * contender.turn(3)["seconds"] for contender in contenders]  # compiling included
    costs = [[] for _ in contenders]
    for number in range(rounds):
        for i in list(range(len(contenders)))[:: 1 if number % 2 == 0 else -1]:
            costs[i].append(contenders[i].turn(steps))
    return [dict(measured(cost), warm_up_s=spent) for cost, spent in zip(costs, warm_up, strict=True)]


def measured(costs: list[dict]) -> dict:
    """ms (median), rounds_ms, mb and whole_mb (at most) of a step, out of the costs of each round."""
    milliseconds = [round(1e3 * cost["seconds"], 3) for cost in costs]
    return dict(ms=float(np.median(milliseconds)), rounds_ms=milliseconds,
                mb=max(cost["memory"] for cost in costs), whole_mb=max(cost["whole"] for cost in costs))  # fmt: skip


def compare(entries: list[tuple[Work, str]], rounds: int, steps: int, same: bool) -> list[dict]:
    """What was measured of each (work, who); with `same`, RuntimeError unless all say the same loss and predictions."""
    contenders = []
    try:
        for work, who in entries:
            contenders.append(Contender(work, who))
        first = np.array(contenders[0].said)
        for contender in contenders[1:] if same else ():
            if not np.allclose(contender.said, first, rtol=1e-3, atol=1e-3):
                raise RuntimeError(f"{contenders[0].name} and {contender.name} differ: {first} {contender.said}")
        return in_turn(contenders, rounds, steps)
    finally:
        for contender in contenders:
            contender.close()


def ratio(one: list[float], other: list[float]) -> float:
    """The other's cost as a multiple of the one's, round by round; the median."""
    return float(np.median([b / a for a, b in zip(one, other, strict=True)]))


# ------------------------------------------------------------------------------------ necessary FLOPs, peak


@functools.cache
def count_flops(work: Work) -> tuple[int, int]:
    """(FLOPs, parameters) of our model's forward and backward for one clip, counted while it computes one on the CPU.

    Counted are matrix products, 2 FLOPs a multiply-add: linear layers and attention (as plain products, so that none
    is hidden in a kernel and none is computed twice). Not counted: norms, GELU, softmax, loss, optimiser.
    """
    model, forward, _ = build(replace(work, device="cpu", checkpointing=False), "ours", 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()[0].backward()
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def flops(work: Work) -> tuple[int, int]:
    """count_flops, of what matters to it alone."""
    return count_flops(replace(work, precision="fp32", mode="eager", batch=1, processes=1, threads=1, device="cpu"))


def utilisation(count: float, ms: float, peak: float) -> float:
    """Percent of a peak of FLOP/s that `count` FLOPs in `ms` milliseconds are."""
    return 100 * count / (ms / 1e3) / peak


def matmul_peak(work: Work) -> float:
    """FLOP/s: the best of some square matrix products in the precision and on the threads (GPUs) of a work."""
    torch.set_num_threads(work.threads * work.processes if work.device == "cpu" else 1)
    best = 0.0
    for n in (2048, 4096) if work.device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=work.device, dtype=DTYPES[work.precision]) for _ in range(2))
        for _ in range(4):
            begun = time.perf_counter()
            a @ b
            if work.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - begun))
    return best * (work.processes if work.device == "cuda" else 1)


# ---------------------------------------------------------------------------------------- tables and files


def machine() -> dict:
    """What the figures depend on, for the JSON."""
    found = {"cpu": processor(), "cores": os.cpu_count()}
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name in ("torch", "torchvision", "transformers", "av", "decord", "torchcodec"):
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    return found | {"python": platform.python_version()}


def keep(args, rows: list[dict], keys: tuple[str, ...], **more) -> list[dict]:
    """Write rows to OUT/COMMAND.json, in the place of those with the same `keys`; returns all that are in it now.

    Rows of another machine or other versions are dropped, since they must not stand in one table with these.
    """
    path, about = args.out / f"{args.command}.json", machine()
    old = json.loads(path.read_text()) if path.exists() else {}
    identity = lambda row: [row.get(key) for key in keys]
    new = [identity(row) for row in rows]
    kept = [row for row in old.get("rows", []) if old["machine"] == about and identity(row) not in new]
    flags = {key: value for key, value in vars(args).items() if key not in ("out", "videos")}
    how = dict(date=time.strftime("%Y-%m-%d"), flags=flags)
    merged = kept + [how | row for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(machine=about, **more, rows=merged), indent=1) + "\n")
    return merged


def table(columns: dict, rows: list[dict]) -> None:
    """Print rows as markdown; `columns` are {heading: (key, format)}, a missing value is a dash."""
    print("", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), sep="\n")
    for row in rows:
        cells = ("–" if row.get(key) is None else format(row[key], how) for key, how in columns.values())
        print("| " + " | ".join(cells) + " |", flush=True)


# -------------------------------------------------------------------------------------- step and finetune


def work_of(args, **changes) -> Work:
    """The work that the flags ask for, with changes."""
    count = changes.get("processes", args.processes)
    threads = 1 if args.device == "cuda" else max(args.threads // count, 1)
    basic = dict(batch=args.batch, processes=count, threads=threads, checkpointing=args.checkpointing)
    if args.command == "step":
        basic |= dict(cross=args.cross, decoder_mask=args.decoder_mask)
    return Work(device=args.device, **(basic | changes))


def steps(args) -> None:
    """Rows of `step` or `finetune`: ours beside Hugging Face's."""
    rows, keys = [], ("size", "precision", "mode", "batch", "processes", "threads", "checkpointing", "device")
    keys += ("cross", "decoder_mask")
    for size, precision, mode in itertools.product(args.sizes, args.precisions, args.modes):
        work = work_of(args, task=args.command, size=size, precision=precision, mode=mode)
        peak, same = matmul_peak(work), not work.cross and not work.decoder_mask
        ours, theirs = compare([(work, "ours"), (work, "hf")], args.rounds, args.steps, same)
        peak, (count, _) = max(peak, matmul_peak(work)), flops(work)  # measured twice: others may compute, too
        row = asdict(work) | dict(gflops_per_clip=count / 1e9, peak_gflops=peak / 1e9)
        row["options"] = " ".join(
            ["cross"] * work.cross + [f"decoder-mask {work.decoder_mask}"] * (work.decoder_mask > 0)
        )
        for name, found in (("ours", ours), ("hf", theirs)):
            row |= {f"{name}_{key}": value for key, value in found.items()}
            row[f"{name}_utilisation"] = utilisation(count * work.batch, found["ms"], peak) if same else None
        row["hf_over_ours"] = ratio(ours["rounds_ms"], theirs["rounds_ms"])
        row["hf_over_ours_mb"] = row["hf_mb"] / row["ours_mb"]
        rows.append(row)
        print(f"{size} {precision} {mode}: {row['ours_ms']:.0f} and {row['hf_ms']:.0f} ms", flush=True)
        merged = keep(args, rows, keys)  # after each, as it takes long
    columns = {
        "model": ("size", ""), "precision": ("precision", ""), "mode": ("mode", ""), "options": ("options", ""),
        "clips": ("batch", ""), "processes": ("processes", ""), "ours, ms": ("ours_ms", ".0f"),
        "HF, ms": ("hf_ms", ".0f"),
        "HF / ours, time": ("hf_over_ours", ".2f"), "ours, MB": ("ours_mb", ".0f"), "HF, MB": ("hf_mb", ".0f"),
        "HF / ours, MB": ("hf_over_ours_mb", ".2f"), "GFLOP a clip": ("gflops_per_clip", ".0f"),
        "ours, % of peak": ("ours_utilisation", ".0f"), "HF, % of peak": ("hf_utilisation", ".0f"),
    }  # fmt: skip
    table(columns, merged)


# -------------------------------------------------------------------------------------------------- loader


KINDS = {  # as UCF101's and HMDB51's files, and as Kinetics' are
    "XviD 320x240": dict(suffix="avi", size=(320, 240), frames=180, codec="mpeg4", rate=500_000, bf="1"),
    "H.264 340x256": dict(suffix="mp4", size=(340, 256), frames=300, codec="libx264", rate=400_000, bf="3"),
}
FPS = 25


def texture(side: int, rng: np.random.Generator) -> Image.Image:
    """Coloured noise with the spectrum of natural images (amplitude 1 / frequency)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency
    image = np.fft.ifft2(noise).real
    image = image.mean(0) + 0.4 * image  # colours vary less than brightness
    return Image.fromarray((128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def footage(size: tuple[int, int], frames: int, seed: int, video: str | None = None):
    """Frames (H, W, 3) uint8: a camera that pans and zooms, before it a thing that moves; or a video's, to and fro."""
    if video:
        with av.open(video) as container:
            shown = [f.to_image().resize(size) for _, f in zip(range(frames), container.decode(video=0), strict=False)]
        yield from (np.asarray((shown + shown[::-1])[i % (2 * len(shown))]) for i in range(frames))
        return
    rng = np.random.default_rng(seed)
    ground, thing = texture(1024, rng), texture(128, rng).resize((size[0] // 4, size[1] // 2))
    (x, y), zoom, (vx, vy) = rng.uniform(100, 300, 2), rng.uniform(1, 1.5), rng.uniform(-2, 2, 2)
    for i in range(frames):
        left, top, scale = x + 80 * math.sin(vx * i / 40), y + 80 * math.sin(vy * i / 40), zoom + 0.2 * math.sin(i / 40)
        box = (left, top, left + size[0] * scale, top + size[1] * scale)
        image = ground.resize(size, Image.Resampling.BILINEAR, box)
        place = size[0] * (0.4 + 0.3 * math.sin(i / 15)), size[1] * (0.3 + 0.1 * math.cos(i / 9))
        image.paste(thing, tuple(map(int, place)))
        yield (np.asarray(image) + rng.normal(0, 3, (*size[::-1], 1))).clip(0, 255).astype(np.uint8)


def write_file(path: Path, kind: str, seed: int, video: str | None = None) -> None:
    k = KINDS[kind]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(k["codec"], rate=FPS, options={"bf": k["bf"], "g": "250"})
        (stream.width, stream.height), stream.pix_fmt, stream.bit_rate = k["size"], "yuv420p", k["rate"]
        for image in footage(k["size"], k["frames"], seed, video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def decode_only(path: Path, wanted: list[int]) -> None:
    """The least that PyAV must do: decode from the key frame before the clip (AVI: the start) to its last frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count, number = 1, -1
        if path.suffix == ".mp4":
            container.seek(round(min(wanted) / FPS / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts * stream.time_base * FPS) if path.suffix == ".mp4" else number + 1
            if number >= max(wanted):
                return


def decord_frames(path: Path, wanted: list[int]) -> torch.Tensor:
    import decord

    return torch.from_numpy(decord.VideoReader(str(path), num_threads=1).get_batch(wanted).asnumpy()).permute(
        0, 3, 1, 2
    )


def torchcodec_frames(path: Path, wanted: list[int]) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(wanted).data


def pil_clip(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(T, 3, H, W) uint8 -> (T, 3, size, size) float32, as the official code is described to do it.

    Frame by frame through PIL: MultiScaleCrop (one of 10 boxes at one of 13 places), bilinear, to float, normalise.
    """
    box = MultiScaleCrop(size).make_params([frames])
    left, top, w, h = (box[side] for side in ("left", "top", "width", "height"))
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]
    images = [image.crop((left, top, left + w, top + h)) for image in images]
    images = [image.resize((size, size), Image.Resampling.BILINEAR) for image in images]
    clip = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float().div(255)
    return (clip - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def whole_file(path: Path) -> np.ndarray:
    """All frames (T, H, W, 3) that PyAV shows."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


OURS, WORKER = "ours: read_frames, transform", "ours, from a worker (make_loader)"


def load(paths: list[Path], clips: int, rounds: int, pipe) -> None:
    """The loader's process, one thread: sends {reader: dict(rounds_ms, right, note)} for files of one kind.

    All read the same clips, in turn, round by round; `right` says whether the frames are those of whole_file (a mean
    difference of 2 of 255 is allowed, for conversions from YUV that differ).
    """
    torch.set_num_threads(1)
    transform, sample = pretrain_transform(224, flip=False), functools.partial(sample_clip, frames=16, stride=4)
    videos, wanted, expected = Videos(Split(paths, [-1] * len(paths), []), sample, transform), {}, {}
    for i, path in enumerate(paths):
        frames = whole_file(path)
        for key in ((i, i * clips + k) for k in range(clips)):  # (file, seed), from which videos draws the same
            torch.manual_seed(key[1])
            wanted[key] = sample(len(frames))
            expected[key] = torch.from_numpy(frames[wanted[key]]).permute(0, 3, 1, 2).int()
    found, fetch = {"decode only": {}}, {OURS: read_frames}
    for name, read in (("decord", decord_frames), ("torchcodec", torchcodec_frames)):
        try:
            read(paths[0], [0])
            fetch[f"{name}, our transform"] = read
        except (ImportError, OSError, RuntimeError):  # torchcodec: also where FFmpeg's libraries are missing
            has = importlib.util.find_spec(name)
            found[f"{name}, our transform"] = dict(note="does not load here" if has else "not installed")
    for name, read in fetch.items():
        off = [(read(paths[key[0]], wanted[key]).int() - expected[key]).abs().float().mean() for key in wanted]
        found[name] = dict(right=bool(max(off) < 2))
    ways = {name: lambda key, read=read: transform(tv_tensors.Video(read(paths[key[0]], wanted[key])))
            for name, read in fetch.items()}  # fmt: skip
    ways |= {"decode only": lambda key: decode_only(paths[key[0]], wanted[key]), OURS: videos.__getitem__}
    name, read = ("decord", decord_frames) if "decord, our transform" in fetch else ("PyAV", read_frames)
    ways[f"{name}, then PIL as the official code"] = lambda key: pil_clip(read(paths[key[0]], wanted[key]), 224)
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            begun = time.perf_counter()
            for key in wanted:
                ways[name](key)
            spent = 1e3 * (time.perf_counter() - begun) / len(wanted)
            found.setdefault(name, {}).setdefault("rounds_ms", []).append(spent)
        batches = make_loader(videos, [[key] for key in wanted], 1, pin=False)
        next(batches)  # the worker has started
        begun = time.perf_counter()
        for _ in range(len(wanted) - 1):
            next(batches)
        spent = 1e3 * (time.perf_counter() - begun) / (len(wanted) - 1)
        batches.close()
        found.setdefault(WORKER, {}).setdefault("rounds_ms", []).append(spent)
    pipe.send(found)


def loader(args) -> None:
    """Rows of `loader`: clips 16x224x224, stride 4, a process and a thread, beside decoding alone."""
    context, rows = multiprocessing.get_context("spawn"), []
    os.environ["OMP_NUM_THREADS"] = "1"
    for kind, k in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            sources = args.videos or [None] * args.files
            paths = [Path(folder) / f"{i}.{k['suffix']}" for i in range(len(sources))]
            for i, (path, video) in enumerate(zip(paths, sources, strict=True)):
                write_file(path, kind, i, video)
            size = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
            mine, other = context.Pipe()
            process = context.Process(target=load, args=(paths, args.clips, args.rounds, other))
            process.start()
            other.close()
            found = mine.recv()
            process.join()
        limit = found["decode only"]["rounds_ms"]
        for reader, row in found.items():
            row |= dict(files=kind, footage="given" if args.videos else "made", kilobytes=size, reader=reader)
            if ms := row.get("rounds_ms"):
                row |= dict(ms=float(np.median(ms)), clips_per_s=1e3 / float(np.median(ms)), ratio=ratio(limit, ms))
            row["note"] = row.get("note") or {True: "right", False: "OTHER FRAMES", None: ""}[row.get("right")]
            rows.append(row)
    merged = keep(args, rows, ("files", "footage", "reader"))
    columns = {
        "files": ("files", ""), "footage": ("footage", ""), "reader": ("reader", ""), "ms a clip": ("ms", ".1f"),
        "clips/s per core": ("clips_per_s", ".1f"), "of decode only": ("ratio", ".2f"), "frames": ("note", ""),
    }  # fmt: skip
    table(columns, merged)


# -------------------------------------------------------------------------------------- cost as work grows


FACTORS = {
    "frames": (4, 8, 16, 32), "resolution": (112, 160, 224, 320), "ratio": (0.5, 0.75, 0.9, 0.95),
    "decoder_depth": (1, 2, 4, 8), "size": ("tiny", "small", "base"), "processes": (1, 2),
}  # fmt: skip


def sizes_of(work: Work) -> dict[str, float]:
    """What a step must keep in a process: `activations`, over all blocks tokens x width, and predicted `values`."""
    s, spots, slots = SIZES[work.size], (work.resolution // 16) ** 2, work.frames // 2
    clips, masked = work.batch / work.processes, slots * int(work.ratio * spots + 1e-6)
    tokens = slots * spots
    blocks = (tokens - masked) * s["dim"] * s["depth"] + tokens * s["decoder_dim"] * work.decoder_depth
    return dict(activations=clips * blocks, values=clips * masked * 1536)


def fit(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients, none below 0, with the least squares of the relative errors: features (n, k), values (n,)."""
    used, coefficients = list(range(features.shape[1])), np.zeros(features.shape[1])
    while used:
        found = np.linalg.lstsq(features[:, used] / values[:, None], np.ones(len(values)), rcond=None)[0]
        if found.min() >= 0:
            coefficients[used] = found
            break
        used.pop(int(found.argmin()))
    return coefficients


def fit_scale(rows: list[dict]) -> dict:
    """The laws of time and memory, fitted to the points of one process; adds ms_fit and mb_fit to all but `processes`.

    ms of a step = constant + FLOPs x a + parameters x b; MB the same of parameters, activations and values.
    """
    laws, rows = {}, [row for row in rows if row["factor"] != "processes"]
    for value, keys in (("ms", ("step_flops", "parameters")), ("mb", ("parameters", "activations", "values"))):
        features = np.array([[1, *(row[key] for key in keys)] for row in rows], dtype=float)
        values = np.array([row[value] for row in rows])
        coefficients = fit(features, values)
        errors = abs(features @ coefficients / values - 1)
        laws[value] = dict(zip(("constant", *keys), coefficients.tolist(), strict=True))
        laws[value] |= dict(median_error=float(np.median(errors)), largest_error=float(errors.max()))
        for row, said in zip(rows, features @ coefficients, strict=True):
            row[f"{value}_fit"] = float(said)
    return laws


def plot_scale(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(2, len(FACTORS), sharex="col")
    for column, factor in enumerate(FACTORS):
        mine = [row for row in rows if row["factor"] == factor]
        mine.sort(key=lambda row: list(SIZES).index(row["size"]) if factor == "size" else row[factor])
        x = [str(row[factor]) for row in mine]
        for axis, value, unit in zip(axes[:, column], ("ms", "mb"), ("ms per step", "MB"), strict=True):
            axis.plot(x, [row[value] for row in mine], "o", label="measured")
            axis.plot(x, [row.get(f"{value}_fit", np.nan) for row in mine], "-", label="fit")
            axis.set_ylim(bottom=0)
            axis.set_ylabel(unit if column == 0 else "")
        axes[1, column].set_xlabel(factor.replace("_", " ") + (" (1 thread each)" if factor == "processes" else ""))
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


def scale(args) -> None:
    """Rows of `scale`: our pre-training step, one factor at a time around small, 16x224x224, 90 %, decoder depth 4."""
    rows, keys = [], ("factor", "factor_value", "batch", "device")
    for factor in args.factors:
        values = tuple(args.sizes) if factor == "size" else FACTORS[factor]
        if factor == "processes" and args.device == "cuda":
            values = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
        basic = work_of(args, precision="bf16" if args.device == "cuda" else "fp32", decoder_depth=4, processes=1)
        basic = replace(basic, threads=1) if factor == "processes" else basic
        works = [replace(basic, **{factor: value}) for value in values]
        found = compare([(work, "ours") for work in works], args.rounds, args.steps, same=False)
        peak = matmul_peak(basic)
        for value, work, cost in zip(values, works, found, strict=True):
            count, parameters = flops(work)
            row = asdict(work) | cost | sizes_of(work) | dict(factor=factor, factor_value=value, parameters=parameters)
            row |= dict(gflops_per_clip=count / 1e9, step_flops=count * work.batch, peak_gflops=peak / 1e9)
            row |= dict(
                ms_per_clip=cost["ms"] / work.batch, utilisation=utilisation(count * work.batch, cost["ms"], peak)
            )
            rows.append(row)
        merged = keep(args, rows, keys)
    laws = fit_scale(merged)
    merged = keep(args, merged, keys, laws=laws)
    columns = {
        "factor": ("factor", ""), "value": ("factor_value", ""), "GFLOP a clip": ("gflops_per_clip", ".0f"),
        "ms a clip": ("ms_per_clip", ".0f"), "% of peak": ("utilisation", ".0f"), "ms a step": ("ms", ".0f"),
        "fitted": ("ms_fit", ".0f"), "MB": ("mb", ".0f"), "fitted MB": ("mb_fit", ".0f"),
    }  # fmt: skip
    table(columns, merged)
    t, m = laws["ms"], laws["mb"]
    print(
        f"\nms of a step = {t['constant']:.0f} + {1e9 * t['step_flops']:.3g} a GFLOP + {1e6 * t['parameters']:.3g} a "
        f"million parameters: off by {t['median_error']:.0%} (median), at most {t['largest_error']:.0%}\n"
        f"MB = {m['constant']:.0f} + {2**20 * m['parameters']:.1f} bytes a parameter + {2**20 * m['activations']:.0f} "
        f"bytes a token, block and width + {2**20 * m['values']:.1f} bytes a predicted value: "
        f"off by {m['median_error']:.0%} (median), at most {m['largest_error']:.0%}"
    )
    plot_scale(merged, args.out / "scale.png")


# --------------------------------------------------------------------------------- hours of the recipes


VIDEOS = {"ucf101": 9537, "hmdb51": 3570, "ssv2": 168_913, "k400": 240_000,
          "ucf101-short": 9537, "hmdb51-short": 3570}  # of the training parts; k400: about  # fmt: skip
LIKE = {"ssv2": "H.264 340x256", "k400": "H.264 340x256"}  # the others: XviD 320x240
GPUS = {"A100": 312e12, "H100": 989e12, "RTX 4090": 165e12}  # dense bf16 FLOP/s of the data sheets
ASSUMED = (0.30, 0.45)  # utilisation, an assumption: what well-tuned transformers of this size reach
AUTHORS = {"ucf101": (30, 8), "k400": (27, 64)}  # hours, GPUs that the authors report; V100s in the second case
V100 = 125e12  # fp16
KNOWN = {
    100: 67.5,
    3200: 91.3,
}  # UCF101, top-1 in % by epochs: a user's 67 to 68 (MCG-NJU/VideoMAE#13), the paper's (base)
SCRATCH = 51.4  # the paper's Table 2


def gpu_hours(total_flops: float, peak: float, utilisation: float) -> float:
    return total_flops / (peak * utilisation) / 3600


def draw_expected(out: Path) -> None:
    """What fine-tuning on UCF101 might reach by epochs of pre-training: known points, and a line as a guess."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    first, last = sorted(KNOWN)
    epochs = [first * 2**i for i in range(6)]
    guess = [KNOWN[first] + (KNOWN[last] - KNOWN[first]) * math.log(e / first) / math.log(last / first) for e in epochs]
    axis.plot(epochs, guess, linestyle="--", color="grey", label="a guess: straight in the logarithm")
    axis.scatter(*zip(*KNOWN.items(), strict=True), zorder=3, label="a user's report; the paper (base)")
    axis.axhline(SCRATCH, linestyle=":", color="tab:red", label="from scratch (paper)")
    axis.set(
        xscale="log", xlabel="epochs of pre-training on UCF101", ylabel="top-1 after fine-tuning, %", ylim=(40, 100)
    )
    axis.set_xticks(epochs, epochs)
    axis.minorticks_off()
    axis.set_title("estimated: nobody has run this with our code", fontsize=9)
    axis.legend(fontsize=7)
    figure.savefig(out, dpi=120)


def hours(args) -> None:
    """Rows of `hours`: what the published recipes need, from counted FLOPs, data sheets and an assumed utilisation."""
    path = args.out / "loader.json"
    measured = json.loads(path.read_text())["rows"] if path.exists() else []
    rate = {row["files"]: row["clips_per_s"] for row in measured if row["reader"].startswith("ours:")}
    rows = []
    for preset in VIDEOS:
        keys = ("size", "ratio", "epochs", "batch", "repeats")
        recipe = {key: PRESETS[preset].get(key, getattr(Config, key)) for key in keys}
        per_clip, _ = flops(Work(size=recipe["size"], ratio=recipe["ratio"]))
        videos = recipe["epochs"] * (VIDEOS[preset] // recipe["batch"]) * recipe["batch"]  # whole steps, as the loop
        clips, like = videos * recipe["repeats"], LIKE.get(preset, "XviD 320x240")
        row = recipe | dict(preset=preset, clips=clips, gflops_per_clip=per_clip / 1e9)
        row["exaflops"] = clips * per_clip / 1e18
        for gpu, peak in GPUS.items():
            least, most = (gpu_hours(clips * per_clip, peak, share) for share in ASSUMED[::-1])
            row[gpu] = f"{least:.0f}-{most:.0f}" if most > 3 else f"{least:.1f}-{most:.1f}"
            if like in rate:  # clips of one video are read at once, for hardly more than one
                need = [peak * share / per_clip / recipe["repeats"] / rate[like] for share in ASSUMED]
                row[f"{gpu} cores"] = f"{need[0]:.0f}-{need[1]:.0f}"
        if preset in AUTHORS:
            row["authors_gpu_hours"] = math.prod(AUTHORS[preset])
            row["authors_tflops"] = clips * per_clip / row["authors_gpu_hours"] / 3600 / 1e12
        rows.append(row)
    draw_expected(args.out / "ucf101-expected.png")
    keep(args, rows, ("preset",), gpus=GPUS, assumed_utilisation=ASSUMED, videos=VIDEOS)
    columns = {
        "recipe": ("preset", ""), "model": ("size", ""), "clips": ("clips", ","),
        "GFLOP a clip": ("gflops_per_clip", ".0f"), "EFLOP": ("exaflops", ".1f"),
    }  # fmt: skip
    columns |= {f"{gpu}, hours": (gpu, "") for gpu in GPUS} | {f"cores a {gpu}": (f"{gpu} cores", "") for gpu in GPUS}
    table(columns, rows)
    print(
        f"\nGPU-hours at {ASSUMED[0]:.0%} to {ASSUMED[1]:.0%} of the data sheet's dense bf16 rate, an assumption; "
        f"cores that decode as fast, by the clips/s of `loader` (k400 and, as if, ssv2: H.264; the others: XviD)."
    )
    for row in rows:
        if preset := row["preset"] if "authors_tflops" in row else None:
            print(
                f"{preset}: the authors report {row['authors_gpu_hours']} GPU-hours: {row['authors_tflops']:.1f} "
                f"TFLOP/s a GPU, {row['authors_tflops'] * 1e12 / V100:.0%} of a V100's peak ({V100 / 1e12:.0f})."
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"step": steps, "finetune": steps, "loader": loader, "scale": scale, "hours": hours}
    parser.add_argument("command", choices=(*commands, "all"))
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, help="models (default: small base; scale: tiny small base)")
    add("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES), help="of step, finetune (default: both)")
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"], help="default: both")
    add("--batch", type=int, help="clips per step (default: 4, scale 2; on GPU 32)")
    add("--processes", type=int, default=1, help="of step, finetune: each with a GPU, or a share of the threads")
    add("--threads", type=int, default=os.cpu_count(), help="over all processes, on CPU (default: %(default)s)")
    add("--checkpointing", action="store_true", help="activations are computed twice, in both contenders")
    add("--cross", action="store_true", help="of step: ours with pretrain.py's option, Hugging Face's as it is")
    add("--decoder-mask", type=float, default=0.0, help="of step: likewise")
    add("--rounds", type=int, default=5, help="times that each is asked (default: %(default)s)")
    add("--steps", type=int, help="in a round (default: 2, on GPU 20)")
    add("--files", type=int, default=4, help="of loader: files of each kind (default: %(default)s)")
    add("--videos", nargs="+", help="of loader: videos whose frames the files get")
    add("--clips", type=int, default=5, help="of loader: clips of each file (default: %(default)s)")
    add("--factors", nargs="+", choices=FACTORS, default=list(FACTORS), help="of scale (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=HERE / "tests" / "reference", help="folder of the results (default: %(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and args.processes > torch.cuda.device_count():
        parser.error(f"--processes {args.processes}, but torch sees {torch.cuda.device_count()} GPUs")
    for command in commands if args.command == "all" else (args.command,):
        mine, gpu = copy.copy(args), args.device == "cuda"
        mine.command, mine.steps = command, args.steps or (20 if gpu else 2)
        mine.batch = args.batch or (32 if gpu else 2 if command == "scale" else 4)
        mine.sizes = args.sizes or (list(FACTORS["size"]) if command == "scale" else ["small", "base"])
        if mine.batch % mine.processes:
            parser.error(f"--batch {mine.batch} must be a multiple of --processes {mine.processes}")
        if command in ("step", "finetune") and not importlib.util.find_spec("transformers"):
            parser.error(f"{command} compares with Hugging Face: pip install transformers")
        commands[command](mine)


if __name__ == "__main__":
    main()
