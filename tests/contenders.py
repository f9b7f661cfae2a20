"""The contenders of benchmark.py and gpu.py: the same training step, computed by several programs.

ours        model.py, and what lib/speed.py does around it
ours-less   the same with --memory less
ours-least  the same with --memory least
hf          Hugging Face's VideoMAE with PyTorch's scaled_dot_product_attention
plain       a step as plain as that of the official code, written from its description: a Conv3d
            embeds all cubes and the masked ones are dropped afterwards; attention is two matrix
            products and a softmax; the target is computed for all cubes, from normalised floats

They get the same weights, clips and masks, and compute the same loss and predictions. Ours gets
uint8 clips in pre-training and floats in 0-1 in fine-tuning, as its stages do. The others get
normalised floats. Normalising is not timed, which favours them.
"""

import functools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from lib import export, speed  # noqa: E402
from masking import MASKS  # noqa: E402
from model import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    Attention,
    Classifier,
    VideoMAE,
    normalize_cubes,
    patchify,
    split_tokens,
)

MEMORY = {"ours": "fast", "ours-less": "less", "ours-least": "least"}  # values of --memory
CONTENDERS = (*MEMORY, "hf", "plain")
CLASSES = 101
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """A training step: what is computed, and in what way."""

    task: str = "step"  # pre-training; or "finetune"
    size: str = "small"
    precision: str = "fp32"
    mode: str = "eager"  # or "compiled"
    batch: int = 4  # clips per step
    frames: int = 16
    resolution: int = 224
    ratio: float = 0.9
    decoder_depth: int | None = None
    threads: int = 1
    device: str = "cpu"


# ------------------------------------------------------------------------------------------ plain


def kernel(model: VideoMAE | Classifier) -> Tensor:
    """The weight (D, P) of our patch embedding as the kernel (D, C, p0, p1, p2) of a Conv3d."""
    p0, p1, p2 = model.encoder.cube
    weight = model.encoder.patch_embed.weight.detach()
    pattern = "d (p0 p1 p2 c) -> d c p0 p1 p2"
    return rearrange(weight, pattern, p0=p0, p1=p1, p2=p2).contiguous()


class PlainAttention(Attention):
    """Attention as two matrix products. All attention weights (B, heads, N, N) exist at once."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)
        return self.proj(rearrange(weights @ v, "b heads n d -> b n (heads d)"))


class Plain(nn.Module):
    """The plain step with the weights of one of our models. Takes normalised clips."""

    def __init__(self, model: VideoMAE | Classifier):
        super().__init__()
        self.model = model
        for part in model.modules():
            if isinstance(part, Attention):
                part.__class__ = PlainAttention
        cube, linear = model.encoder.cube, model.encoder.patch_embed
        self.embed = nn.Conv3d(3, len(linear.weight), cube, stride=cube)
        self.embed.weight.data, self.embed.bias = kernel(model), linear.bias
        del model.encoder.patch_embed
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def encode(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Clips (B, T, C, H, W) and a mask of the visible tokens (B, N) -> latents (B, V, D)."""
        x = self.embed(video.transpose(1, 2)).flatten(2).mT + self.model.encoder.pos_embed
        if visible is not None:
            x = x[visible].reshape(len(x), -1, x.shape[-1])
        for block in self.model.encoder.blocks:
            x = block(x)
        return self.model.encoder.norm(x)

    def forward(self, video: Tensor, mask: Tensor | None = None):
        """Logits (B, classes) without a mask, else loss and predictions (B, M, P)."""
        model = self.model
        if mask is None:
            return model.head(model.dropout(model.fc_norm(self.encode(video).mean(dim=1))))
        latent = self.encode(video, ~mask)
        visible, masked = split_tokens(mask)
        pred = model.decode(latent, visible, masked)
        with torch.no_grad():
            cubes = normalize_cubes(patchify(video * self.std + self.mean, model.encoder.cube))[0]
            target = cubes[mask].reshape(pred.shape)
        return F.mse_loss(pred.float(), target), pred


# ----------------------------------------------------------------------------------- Hugging Face


def hugging_face(model: VideoMAE | Classifier) -> nn.Module:
    """VideoMAEForPreTraining or VideoMAEForVideoClassification with the weights of our model."""
    classes = range(model.config.get("classes", 0))
    theirs, _ = export.to_hugging_face(model, dict(classes=[f"class {i}" for i in classes]))
    last = theirs.fc_norm if classes else theirs.decoder.norm
    last.eps = 1e-6  # ours; there it is fixed at 1e-5
    theirs.set_attn_implementation("sdpa")
    return theirs.train()


# ------------------------------------------------------------------------------------------- step


def build(work: Work, who: str, clips: int | None = None):
    """(net, forward) of a contender on work.device; forward() -> (loss, predictions).

    Clips, masks and labels depend on the work alone. Weights depend on the device, too. Everything
    is float32 unless autocast is on around forward. `clips` replaces the batch of the work. The
    attention kernel of lib/speed.py is not installed here: see settle.
    """
    torch.manual_seed(0)
    device, clips = torch.device(work.device), clips or work.batch
    size, pretrain = (work.frames, work.resolution, work.resolution), work.task == "step"
    with device:  # drawing the weights of a large model on a CPU takes seconds
        if pretrain:
            model = VideoMAE(work.size, size, decoder_depth=work.decoder_depth)
        else:  # logits that say something
            model = Classifier(work.size, CLASSES, size, init_scale=1.0)
        grid = model.encoder.grid
        if who == "hf":
            model = hugging_face(model)
        elif who == "plain":
            model = Plain(model)
    torch.manual_seed(0)  # on a GPU, drawing weights took no number from the CPU's generator
    video = torch.randint(0, 256, (clips, size[0], 3, *size[1:]), dtype=torch.uint8)
    masks = [MASKS["tube"](video, grid, work.ratio).to(device)] if pretrain else []
    labels = torch.randint(CLASSES, (clips,)).to(device)
    video = video.to(device)
    if who in MEMORY:
        video = video if pretrain else video / 255
    else:
        mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)
        video = (video / 255 - mean[:, None, None]) / std[:, None, None]

    def forward() -> tuple[Tensor, Tensor]:
        out = model(video, *masks)
        if who == "hf":
            out = (out.loss, out.logits) if pretrain else out.logits
        if pretrain:
            return out
        return F.cross_entropy(out.float(), labels, label_smoothing=0.1), out

    return model, forward


def settle(work: Work, who: str, model: nn.Module) -> None:
    """What belongs to ours alone: the attention kernel on CPUs and the memory policy."""
    if who in MEMORY:
        speed.place(model, torch.device(work.device))
        if work.mode == "eager":
            speed.save_memory(model, MEMORY[who])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimiser for all."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)


def train_step(work: Work, forward, optimizer) -> Tensor:
    """Forward, backward and update; returns the loss."""
    dtype = DTYPES[work.precision]
    with torch.autocast(work.device, dtype, enabled=dtype != torch.float32):
        loss, _ = forward()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


# ------------------------------------------------------------------------------------------ FLOPs


@functools.cache
def count_flops(work: Work) -> tuple[int, int]:
    """(FLOPs of a clip, parameters), counted in our model's forward and backward.

    Counted are matrix products, 2 FLOPs per multiply-add: linear layers and attention (as plain
    products, so that none is hidden in a kernel and none is computed twice). Not counted: norms,
    GELU, softmax, loss, optimiser.
    """
    model, forward = build(work, "ours", clips=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()[0].backward()
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def flops(work: Work) -> tuple[int, int]:
    """count_flops, of what matters to it alone."""
    same = dict(precision="fp32", mode="eager", batch=1, threads=1)
    return count_flops(replace(work, **same))


def utilisation(count: float, ms: float, peak: float) -> float:
    """Percent of a peak, in FLOP/s, that `count` FLOPs in `ms` milliseconds are."""
    return 100 * count / (ms / 1e3) / peak


def matmul_peak(work: Work) -> float:
    """FLOP/s of the best of some square matrix products, in the precision of the work."""
    cuda, best = work.device == "cuda", 0.0
    for n in (4096, 8192) if cuda else (2048, 4096):
        shape = dict(device=work.device, dtype=DTYPES[work.precision])
        a, b = torch.randn(n, n, **shape), torch.randn(n, n, **shape)
        for _ in range(4):
            best = max(best, 2 * n**3 / timed(lambda a=a, b=b: a @ b, cuda))
    return best


def timed(call, cuda: bool) -> float:
    """Seconds that a call takes, on the GPU by its own events."""
    if not cuda:
        return clock(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock(call) -> float:
    """Seconds that a call takes by the clock."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
