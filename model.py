"""VideoMAE (Tong et al., NeurIPS 2022): a video ViT that sees a few cubes of a clip and rebuilds the rest.

Read from top to bottom: transformer parts, cubes and positions, the encoder (only visible cubes), VideoMAE (encoder,
decoder, loss; sections 3.1 and 3.3), the classifier of the fine-tuning stage, and weights under other projects' names.

Shapes, here and in every docstring:
    B  clips in the batch     T  frames     C  channels (3)     H, W  height and width, pixels
    N  tokens = t*h*w, the grid of cubes; a cube is p0 frames x p1 rows x p2 columns; index n = (t_i*h + y_i)*w + x_i
    D  token width            P  values in a cube = p0*p1*p2*C, in the order (p0 p1 p2 c), channel fastest
    V  visible tokens of a clip     M  masked tokens of a clip     V + M = N
A video is (B, T, C, H, W), uint8 0-255 or float 0-1. Parameter names are the official checkpoints' names.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Width, blocks and heads of encoder and decoder. Small to huge: paper Table 8 and section 4.2; decoder depth 12 for
# large and huge as in the official scripts (the paper says 4). Tiny and toy are ours.
SIZES = {
    "toy": dict(dim=128, depth=4, heads=4, decoder_dim=96, decoder_depth=2, decoder_heads=3),
    "tiny": dict(dim=192, depth=12, heads=3, decoder_dim=96, decoder_depth=4, decoder_heads=3),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base": dict(dim=768, depth=12, heads=12, decoder_dim=384, decoder_depth=4, decoder_heads=6),
    "large": dict(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=12, decoder_heads=8),
    "huge": dict(dim=1280, depth=32, heads=16, decoder_dim=640, decoder_depth=12, decoder_heads=8),
}
EPS = (1e-6, 1e-6)  # of all LayerNorms but the last one before a head, and of that one; Hugging Face's differ
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}  # paper Table 1f
TARGETS = ("clip", "center", "double")  # paper Table 1c; see VideoMAE
POSITIONS = ("1d", "3d")  # see position_table
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------- transformer


def recompute(function, *args):
    """function(*args), of whose intermediate values the backward keeps none but computes again those that it needs.

    Around "norm, linear" and "GELU, linear" this repeats the norm or GELU alone, which costs little time: activations
    shrink by a third. A compiler would repeat the linear, too, and is left to choose by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """Joint space-time self-attention over all tokens it is given, (B, N, D) -> (B, N, D) (paper section 3.3)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))  # no bias for k: it would shift all logits of a query alike
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, norm: nn.Module, rows: slice) -> Tensor:
        """`rows` of the 3*D outputs q, k, v of norm(x)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return F.linear(norm(x), self.qkv.weight[rows], bias[rows])

    def forward(self, x: Tensor, norm: nn.Module, context: Tensor | None = None) -> Tensor:
        """All tokens attend to all; with `context` (B, K, D), those of x attend to those of the context alone. `norm`
        comes first; it is done here so that its output need not be kept, see recompute."""
        if context is None:
            q, k, v = recompute(self.project, x, norm, slice(None)).chunk(3, dim=2)
        else:
            d = x.shape[2]
            q = recompute(self.project, x, norm, slice(0, d))
            k, v = recompute(self.project, context, norm, slice(d, None)).chunk(2, dim=2)
        q, k, v = (rearrange(part, "b n (heads d) -> b heads n d", heads=self.heads) for part in (q, k, v))
        return self.proj(rearrange(attend(q, k, v), "b heads n d -> b n (heads d)"))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, N, d) each, by PyTorch's kernel, but for bf16 on CPUs by ours."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_cpu(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class MLP(nn.Module):
    """Two linear layers with exact GELU between, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """(B, N, D) -> (B, N, D); `norm` as in Attention."""
        hidden = recompute(lambda x: self.fc1(norm(x)), x)
        return recompute(lambda x: self.fc2(F.gelu(x)), hidden)


def drop(x: Tensor, rate: float, chance: Tensor | None) -> Tensor:
    """Zeros where `chance` (0-1, broadcast to x) is below `rate`, the rest scaled to keep the mean; None: x as it is.

    With the chances of each clip drawn outside, a step is the same however its batch is spread over passes and GPUs.
    """
    return x if chance is None or rate == 0 else x * (chance >= rate) / (1 - rate or 1)


class Block(nn.Module):
    """Pre-norm transformer block, x + attn(norm1(x)), then x + mlp(norm2(x)).

    `drop_path` is the rate at which a clip skips each of its two branches.
    """

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path = drop_path

    def forward(self, x: Tensor, chance: tuple[Tensor, Tensor] | None = None, context: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `chance` (B, 1, 1) decides for each branch which clips skip it, see drop; `context`
        see Attention."""
        first, second = chance or (None, None)
        x = x + drop(self.attn(x, self.norm1, context), self.drop_path, first)
        return x + drop(self.mlp(x, self.norm2), self.drop_path, second)


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, checkpointing: bool, chances: Tensor | None = None, context: Tensor | None = None
) -> Tensor:
    """Apply the blocks in turn, with two columns each of `chances` (B, 2*depth) for drop path (None: nothing drops).

    With checkpointing, keep only the blocks' inputs and compute each again in the backward, linear layers too.
    """
    pairs = [None] * len(blocks) if chances is None else [c[..., None, None].unbind(1) for c in chances.split(2, dim=1)]
    for block, pair in zip(blocks, pairs, strict=True):
        keep_inputs = checkpointing and torch.is_grad_enabled()
        arguments = (x, pair, context)
        x = checkpoint(block, *arguments, use_reentrant=False) if keep_inputs else block(*arguments)
    return x


def precision_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of matrix products; "auto": bf16 where the hardware has it, else fp16 on GPU and float32 on CPU."""
    if precision == "auto":
        cuda, cpu = device.type == "cuda", getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.8
        on_cpu = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else on_cpu
        precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def init_linears(module: nn.Module, init_weight) -> None:
    """Initialise every Linear in a module (qkv as one matrix): the weight by `init_weight`, the bias to 0.

    Official code: nn.init.xavier_uniform_ for pre-training, nn.init.trunc_normal_ with std .02 for fine-tuning.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init_weight(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def widths(size: str | dict) -> dict:
    """The entry of SIZES with this name; a dict of the same keys, for models of other sizes, is returned as it is."""
    if not isinstance(size, dict) and size not in SIZES:
        raise ValueError(f"size {size!r} is unknown: use one of {', '.join(SIZES)}")
    return size if isinstance(size, dict) else SIZES[size]


def set_eps(model: nn.Module, eps: tuple[float, float]) -> None:
    """Give a VideoMAE's or Classifier's LayerNorms their eps, see EPS."""
    for name, part in model.named_modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps[name in ("decoder.norm", "fc_norm")]


# ---------------------------------------------------------------------------------------- cubes and positions


def grid_of(video_size: tuple[int, int, int], cube: tuple[int, int, int]) -> tuple[int, int, int]:
    """Cubes along (time, rows, columns) of a (T, H, W) video; ValueError where a side does not divide."""
    if len(cube) != 3:
        raise ValueError(f"a cube has three sides (frames, rows, columns), not {len(cube)}: {cube}")
    for name, side, edge in zip(("frames", "height", "width"), video_size, cube, strict=True):
        if edge < 1 or side < edge or side % edge:
            raise ValueError(f"{name} {side} must be a multiple of the cube's {edge} (cube {'x'.join(map(str, cube))})")
    return tuple(side // edge for side, edge in zip(video_size, cube, strict=True))


def patchify(video: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """(B, T, C, H, W) -> (B, N, P): cut into cubes, any dtype. Serves the embedding *and* the target."""
    p0, p1, p2 = cube
    return rearrange(video, "b (t p0) c (h p1) (w p2) -> b (t h w) (p0 p1 p2 c)", p0=p0, p1=p1, p2=p2)


def unpatchify(cubes: Tensor, grid: tuple[int, int, int], cube: tuple[int, int, int]) -> Tensor:
    """(B, N, P) -> (B, T, C, H, W): the exact inverse of patchify for a grid of (t, h, w) cubes."""
    (t, h, w), (p0, p1, p2) = grid, cube
    pattern = "b (t h w) (p0 p1 p2 c) -> b (t p0) c (h p1) (w p2)"
    return rearrange(cubes, pattern, t=t, h=h, w=w, p0=p0, p1=p1, p2=p2)


def normalize_cubes(cubes: Tensor, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Zero mean, unit variance per cube and channel: (B, N, P) float -> same, and mean and std (B, N, 1, C).

    Paper section 3.3 and the official code: unbiased variance, y = (u - mean) / (std + 1e-6); the std returned
    includes the 1e-6, so that y * std + mean gives the cube back.
    """
    u = rearrange(cubes, "b n (p c) -> b n p c", c=channels)
    mean = u.mean(dim=2, keepdim=True)
    u = u - mean
    std = torch.linalg.vector_norm(u, dim=2, keepdim=True) / (u.shape[2] - 1) ** 0.5 + 1e-6
    return rearrange(u.div_(std), "b n p c -> b n (p c)"), mean, std


def unit_range(pixels: Tensor) -> Tensor:
    """uint8 0-255 -> float32 0-1; floats are taken as 0-1 already."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()


def sincos(index: Tensor, dim: int, longest: float) -> Tensor:
    """Sine (even columns) and cosine (odd) of index / longest^(2*floor(j/2)/dim): (N,) -> (N, dim), in float64."""
    angle = index.double()[:, None] / longest ** (2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)


def position_table(grid: tuple, dim: int, kind: str, trained_grid: tuple | None = None) -> Tensor:
    """Fixed positions of the tokens, (N, D) float32.

    "1d", the official code: PE[n, j] = sin(n / 10000^(2*floor(j/2)/D)) for even j, cos of the same for odd j, over the
    flattened index n. "3d", ours: time, row and column each get a third of the width, the longest wave 100 cubes;
    narrow models learn it much sooner, since one flattened index hides from them which cubes are neighbours.

    For weights trained on another grid, that grid's table is interpolated (trilinear, align_corners False), so that the
    same place in the picture keeps its code. Computing "1d" anew, as the official code does, moves every code but those
    of the first row, because the index of a row's start changes with the row's length.
    """
    if trained_grid is not None and tuple(trained_grid) != tuple(grid):
        t, h, w = trained_grid
        table = rearrange(position_table(trained_grid, dim, kind), "(t h w) d -> 1 d t h w", t=t, h=h, w=w)
        return rearrange(F.interpolate(table, size=tuple(grid), mode="trilinear"), "1 d t h w -> (t h w) d")
    t, h, w = grid
    n = torch.arange(t * h * w)
    if kind == "1d":
        return sincos(n, dim, 10000).float()
    third = dim // 6 * 2  # even; what is left over stays zero
    axes = [sincos(place, third, 100) for place in (n // (h * w), n // w % h, n % w)]
    return F.pad(torch.cat(axes, dim=1), (0, dim - 3 * third)).float()


def token_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool mask -> indices of the visible (B, V) and of the masked tokens (B, M), each ascending.

    Reads the counts back to the host, the one synchronisation of a step (of two, with a decoder mask). ValueError where
    the counts of the clips differ or where nothing is visible or masked.
    """
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(f"each clip must mask the same number of its {mask.shape[1]} tokens, not 0, not all: {counts}")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : -counts[0]], order[:, -counts[0] :]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) at index (B, K) -> (B, K, D)."""
    return tokens[torch.arange(len(index), device=index.device)[:, None], index]


# ------------------------------------------------------------------------------------------------- encoder


class Encoder(nn.Module):
    """Cube embedding, fixed positions, ViT blocks, and a last LayerNorm unless `final_norm` is off.

    `video_size` is (T, H, W) in frames and pixels, `positions` a kind of position_table, `trained_grid` the grid of the
    weights to be loaded if not the own one. Drop path grows linearly with depth, from 0 to `drop_path`.
    """

    def __init__(
        self, dim, depth, heads, video_size, cube, positions="1d", drop_path=0.0, final_norm=True, trained_grid=None
    ):
        super().__init__()
        self.video_size, self.cube, self.grid = tuple(video_size), tuple(cube), grid_of(video_size, cube)
        self.checkpointing = False  # set True to trade compute for memory
        # A Linear on flattened cubes is the paper's Conv3d with stride = kernel; it has PyTorch's default
        # initialisation, as there. Unlike a Conv3d it can embed the visible cubes alone.
        self.patch_embed = nn.Linear(cube[0] * cube[1] * cube[2] * 3, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        init_linears(self.blocks, nn.init.xavier_uniform_)
        self.register_buffer("positions", position_table(self.grid, dim, positions, trained_grid), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD), persistent=False)

    def forward(self, video: Tensor, visible: Tensor | None = None, chances: Tensor | None = None) -> Tensor:
        """(B, T, C, H, W) -> (B, N, D), or (B, V, D) when `visible` (B, V) names the tokens to look at.

        `chances` (B, 2*depth), uniform in 0-1, decide which clips skip which branches; None: none does.
        """
        size = (video.shape[1], *video.shape[3:])
        if size != self.video_size:
            raise ValueError(f"the model was built for clips of (T, H, W) = {self.video_size}, this one is {size}")
        cubes = patchify(video, self.cube)
        cubes = cubes if visible is None else take(cubes, visible)  # still uint8: only visible cubes become floats
        pixels = rearrange(unit_range(cubes), "b n (p c) -> b n p c", c=3)
        x = self.patch_embed(rearrange((pixels - self.mean) / self.std, "b n p c -> b n (p c)"))
        x = x + (self.positions if visible is None else self.positions[visible])
        return self.norm(run_blocks(self.blocks, x, self.checkpointing, chances))


# ------------------------------------------------------------------------------------------------ VideoMAE


class Decoder(nn.Module):
    """Blocks over visible (B, V, D) and mask tokens (B, M, D); the last `keep` mask tokens become their cubes' pixels.

    With `cross`, mask tokens attend to the visible ones alone, which stay as they are (CrossMAE, Fu et al. 2024).
    """

    def __init__(self, dim: int, depth: int, heads: int, values: int, cross: bool):
        super().__init__()
        self.cross = cross
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, values)
        init_linears(self, nn.init.xavier_uniform_)

    def forward(self, visible: Tensor, masked: Tensor, keep: int, checkpointing: bool) -> Tensor:
        if self.cross:
            x = run_blocks(self.blocks, masked[:, -keep:], checkpointing, context=visible)
        else:
            x = run_blocks(self.blocks[:-1], torch.cat([visible, masked], dim=1), checkpointing)
            x = run_blocks(self.blocks[-1:], x[:, -keep:], checkpointing, context=x)  # the rest is read by nobody
        return self.head(self.norm(x))


class VideoMAE(nn.Module):
    """Masked autoencoder: `loss, pred = model(video, mask)` (paper sections 3.1 and 3.3).

    size           a name of SIZES, or a dict like its entries
    video_size     (T, H, W) of the clips the encoder sees, frames and pixels
    cube           (frames, rows, columns) of a token
    positions      kind of position_table: "1d" (official code) or "3d" (ours)
    decoder_depth  blocks of the decoder (paper Table 1a); None: the size's own
    target         what is predicted (paper Table 1c; the variants are our reading, no code was published):
                   "clip"    the masked cubes of the input
                   "center"  frame T/2 only, at its masked places; needs tube masks
                   "double"  videos come with 2T frames, the encoder sees every second, each token predicts
                             the frames between as well
    normalize      predict cubes with zero mean and unit variance (the paper); False: pixels in 0-1
    loss           a name of LOSSES
    eps            of the LayerNorms, see EPS
    cross          a decoder without attention among mask tokens, see Decoder; off in the paper
    """

    def __init__(
        self,
        size: str | dict = "base",
        video_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        positions: str = "1d",
        decoder_depth: int | None = None,
        target: str = "clip",
        normalize: bool = True,
        loss: str = "mse",
        eps: tuple[float, float] = EPS,
        cross: bool = False,
    ):
        super().__init__()
        known = {"positions": POSITIONS, "target": TARGETS, "loss": LOSSES}
        for (name, allowed), value in zip(known.items(), (positions, target, loss), strict=True):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
        s = widths(size)
        depth = s["decoder_depth"] if decoder_depth is None else decoder_depth
        self.config = dict(size=size, video_size=list(video_size), cube=list(cube), positions=positions,
                           decoder_depth=depth, target=target, normalize=normalize, loss=loss,
                           eps=list(eps), cross=cross)  # fmt: skip
        self.target, self.normalize, self.loss = target, normalize, LOSSES[loss]
        self.encoder = Encoder(s["dim"], s["depth"], s["heads"], video_size, cube, positions)
        frames = {"clip": cube[0], "center": 1, "double": 2 * cube[0]}[target]
        self.target_cube = (frames, cube[1], cube[2])
        self.encoder_to_decoder = nn.Linear(s["dim"], s["decoder_dim"], bias=False)  # PyTorch's default initialisation
        self.mask_token = nn.Parameter(torch.zeros(1, 1, s["decoder_dim"]))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = Decoder(s["decoder_dim"], depth, s["decoder_heads"], frames * cube[1] * cube[2] * 3, cross)
        table = position_table(self.encoder.grid, s["decoder_dim"], positions)
        self.register_buffer("positions", table, persistent=False)
        set_eps(self, eps)

    def forward(self, video: Tensor, mask: Tensor, decoder_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Video (B, T, C, H, W) and mask (B, N), True = masked -> the mean loss over the predicted cubes, float32,
        and the predictions (B, M, P) in ascending token order (target "center": only those of the central slot; with a
        decoder mask: only those that are decoded).

        Masked tokens that are True in `decoder_mask` (B, N) are left out of decoder and loss (after VideoMAE V2, which
        also gives the decoder mask tokens for some of the places that the encoder sees).
        """
        visible, masked = token_indices(mask)
        if decoder_mask is not None:
            _, masked = token_indices(mask & ~decoder_mask)
        keep = masked.shape[1]
        if self.target == "center":
            masked, keep = self.center_last(mask, masked)
        return self.reconstruct(video, visible, masked, keep)

    def reconstruct(self, video: Tensor, visible: Tensor, masked: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Encode the visible tokens (B, V), decode the masked ones (B, M): loss and predictions of the last `keep`."""
        latent = self.encoder(video[:, ::2] if self.target == "double" else video, visible)
        pred = self.decode(latent, visible, masked, keep)
        return self.loss(pred.float(), self.target_cubes(video, masked[:, -keep:])), pred

    def compile(self, backend: str = "inductor", fullgraph: bool = False) -> None:
        """Compile what comes after the tokens are counted, shapes that are the same in every step: one graph, which
        `fullgraph` insists on, but where FSDP2 gathers a block's weights in between."""
        self.reconstruct = torch.compile(self.reconstruct, backend=backend, fullgraph=fullgraph)

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor, keep: int) -> Tensor:
        """Latents (B, V, D) -> predicted cubes (B, keep, P) of the last `keep` masked tokens.

        Every masked place enters as the one shared mask token plus its position; order does not matter to attention.
        """
        seen = self.encoder_to_decoder(latent) + self.positions[visible]
        return self.decoder(seen, self.mask_token + self.positions[masked], keep, self.encoder.checkpointing)

    def target_video(self, video: Tensor) -> Tensor:
        """The frames the decoder predicts: all, or for target "center" only frame T/2 (dimension T kept)."""
        center = video.shape[1] // 2
        return video[:, center : center + 1] if self.target == "center" else video

    def target_cubes(self, video: Tensor, index: Tensor) -> Tensor:
        """What to predict at tokens `index` (B, K): (B, K, P) float32, normalised per cube and channel if so built."""
        cubes = patchify(self.target_video(video), self.target_cube)
        cubes = unit_range(take(cubes, index % cubes.shape[1]))
        return normalize_cubes(cubes)[0] if self.normalize else cubes

    def center_last(self, mask: Tensor, masked: Tensor) -> tuple[Tensor, int]:
        """Rotate the masked indices so that those of the central slot come last; also their number in a slot."""
        t, h, w = self.encoder.grid
        if not torch.equal(mask, mask[:, : h * w].repeat(1, t)):
            raise ValueError("target 'center' needs a mask that is the same in every slot: use tube masking")
        slot, count = self.encoder.video_size[0] // 2 // self.encoder.cube[0], masked.shape[1] // t
        return masked.roll((t - 1 - slot) * count, dims=1), count


# ---------------------------------------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """The pre-trained encoder with a new head: mean over tokens, LayerNorm, dropout, Linear (fine-tuning, Table 10).

    `trained_grid` is the grid of the pre-trained weights if not the own one, see position_table; `eps` see EPS.
    """

    def __init__(
        self,
        size: str | dict,
        classes: int,
        video_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        positions: str = "1d",
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
        init_scale: float = 1e-3,
        trained_grid: tuple[int, int, int] | None = None,
        eps: tuple[float, float] = EPS,
    ):
        super().__init__()
        s = widths(size)
        self.encoder = Encoder(
            s["dim"], s["depth"], s["heads"], video_size, cube, positions, drop_path, False, trained_grid
        )
        self.config = dict(size=size, classes=classes, video_size=list(video_size), cube=list(cube),
                           positions=positions, drop_path=drop_path, head_dropout=head_dropout, init_scale=init_scale,
                           trained_grid=list(trained_grid or self.encoder.grid), eps=list(eps))  # fmt: skip
        self.fc_norm = nn.LayerNorm(s["dim"])
        self.head_dropout, self.draws = head_dropout, 2 * s["depth"] + s["dim"]
        self.head = nn.Linear(s["dim"], classes)
        for module in (self.encoder.blocks, self.head):
            init_linears(module, partial(nn.init.trunc_normal_, std=0.02))
        self.head.weight.data.mul_(init_scale)
        set_eps(self, eps)

    def forward(self, video: Tensor, chances: Tensor | None = None) -> Tensor:
        """(B, T, C, H, W) -> logits (B, classes).

        `chances` (B, self.draws), uniform in 0-1, decide what drop path (2 columns a block) and dropout (D columns)
        leave out; drawn here if not given while training.
        """
        if chances is None and self.training:
            chances = torch.rand(len(video), self.draws, device=video.device)
        paths, values = (None, None) if chances is None else chances.tensor_split([-len(self.fc_norm.weight)], dim=1)
        x = self.fc_norm(self.encoder(video, chances=paths).mean(dim=1))
        return self.head(drop(x, self.head_dropout, values))


# ------------------------------------------------------------------------------------ weights from elsewhere


# Other projects' names -> ours: patterns replaced in this order. Official pre-training and fine-tuning, MAE for images,
# Hugging Face (its files have q_bias and v_bias, its modules since version 5 query.bias and value.bias).
RENAMES = (
    (r"^(module\.|_orig_mod\.|backbone\.)+", ""),  # wrappers
    (r"^(videomae\.)?embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed."),
    (r"^(videomae\.)?encoder\.layer\.", "encoder.blocks."),
    (r"^(videomae\.)?layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.(query|value)\.bias$", lambda match: f".{match[1][0]}_bias"),
    (r"^classifier\.", "head."),
    (r"^(patch_embed|blocks|norm)\.", r"encoder.\1."),
    (r"\.patch_embed\.proj\.", ".patch_embed."),
)


def to_ours(state: dict[str, Tensor], frames: int = 2) -> dict[str, Tensor]:
    """A state dict in any of the namings of RENAMES, or in ours, under our names and in our shapes; other keys stay.

    The Conv3d kernel (D, C, p0, p1, p2) becomes (D, P). MAE's for images, (D, C, p1, p2), is inflated to `frames` equal
    slices, 1/frames of it (I3D, paper section 4.2), so that a static clip is embedded like its image; MAE's decoder,
    class token and positions fit nothing here. A bias of the keys is left out: it moves all logits of a query alike.
    """
    ours = {}
    for name, value in state.items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        ours[name] = value
    for name in list(ours):
        attn = name.rpartition("attn.")[0] + "attn."
        parts = [f"{attn}{part}.weight" for part in ("query", "key", "value")]
        if name == parts[0] and all(part in ours for part in parts):
            ours[f"{attn}qkv.weight"] = torch.cat([ours.pop(part) for part in parts])
        elif name == f"{attn}qkv.bias":
            ours[f"{attn}q_bias"], _, ours[f"{attn}v_bias"] = ours.pop(name).chunk(3)
    kernel = ours.get("encoder.patch_embed.weight", torch.empty(0))
    if kernel.ndim == 4:
        ours.pop("mask_token", None)  # of MAE's own decoder
        kernel = kernel[:, :, None].expand(-1, -1, frames, -1, -1) / frames
    if kernel.ndim == 5:
        ours["encoder.patch_embed.weight"] = rearrange(kernel, "d c p0 p1 p2 -> d (p0 p1 p2 c)")
    return ours


def to_official(model: VideoMAE | Classifier) -> dict[str, Tensor]:
    """The weights under the official code's names and with its Conv3d, for others to load; to_ours is the inverse.

    The official code computes the "1d" table of the grid at hand: ValueError where the model's positions are others, or
    its decoder attends otherwise.
    """
    (p0, p1, p2), grid = model.encoder.cube, list(model.encoder.grid)
    if model.config["positions"] != "1d" or model.config.get("trained_grid", grid) != grid:
        raise ValueError("the official code cannot use these weights: it has no 3d and no interpolated positions")
    if model.config.get("cross"):
        raise ValueError("the official code cannot use these weights: it has no cross attention")
    state = model.state_dict()
    kernel = rearrange(state["encoder.patch_embed.weight"], "d (p0 p1 p2 c) -> d c p0 p1 p2", p0=p0, p1=p1, p2=p2)
    state["encoder.patch_embed.weight"] = kernel.contiguous()
    prefix = "encoder." if isinstance(model, Classifier) else ""
    return {k.removeprefix(prefix).replace("patch_embed.", "patch_embed.proj."): value for k, value in state.items()}


def infer_config(state: dict[str, Tensor]) -> dict:
    """The arguments of VideoMAE or Classifier that the shapes of a state dict in any known naming show.

    Heads are not among them and come from SIZES; neither is the size of the clips.
    """
    ours = to_ours(state)
    if "encoder.patch_embed.weight" not in ours:
        raise ValueError(f"no cube embedding in these weights ({', '.join(list(state)[:3])} ...): not a VideoMAE")
    blocks = {tuple(name.split(".")[:3]) for name in ours if ".blocks." in name}
    depth, decoder_depth = (sum(block[0] == part for block in blocks) for part in ("encoder", "decoder"))
    dim = len(ours["encoder.patch_embed.weight"])
    sizes = [name for name, s in SIZES.items() if (s["dim"], s["depth"]) == (dim, depth)]
    if not sizes:
        raise ValueError(f"weights {dim} wide and {depth} blocks deep fit no entry of SIZES in model.py: add one")
    config = {"size": sizes[0]} | ({"decoder_depth": decoder_depth} if decoder_depth else {})
    for kernel in state.values():
        if kernel.ndim in (4, 5):  # the only such tensor; one for images gets two frames
            config["cube"] = [2, *kernel.shape[2:]][-3:]
    return config | ({"classes": len(ours["head.weight"])} if "head.weight" in ours else {})


def load_weights(model: VideoMAE | Classifier, state: dict[str, Tensor], least: float = 0.95) -> str:
    """Copy into a model what fits it by name and shape of a state dict in our names (see to_ours); returns a report.

    ValueError below a share `least` of the encoder's tensors, and of the decoder's where both have one, or where one of
    these has another shape; 0 allows all. The rest may stay new, such as a classifier's fc_norm and head: the
    pre-trained last norm is not used for it (official code).
    """
    own = model.state_dict()
    parts = ("encoder.", "decoder.") if any(name.startswith("decoder.") for name in state) else "encoder."
    groups = {"matched": [], "missing": [], "new": [], "unexpected": [name for name in state if name not in own]}
    for name, value in own.items():
        kind = "missing" if name.startswith(parts) else "new"
        if name not in state:
            groups[kind].append(name)
        elif state[name].shape != value.shape:
            groups[kind].append(f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}")
        else:
            groups["matched"].append(name)
    report = "; ".join(f"{len(names)} {kind}" + f": {listed(names)}" * bool(names) for kind, names in groups.items())
    needed = sum(name.startswith(parts) for name in own)
    share, misfit = 1 - len(groups["missing"]) / needed, any(" instead of " in name for name in groups["missing"])
    if share < least or misfit and least > 0:
        raise ValueError(
            f"{share:.0%} of the {needed} tensors needed fit; {least:.0%} must, none may have another shape: take the "
            f"size, cube and decoder depth of the weights, or accept the rest as new. {report}"
        )
    model.load_state_dict({name: state[name] for name in groups["matched"]}, strict=False)
    return report


def listed(names: list[str]) -> str:
    """Names in a line: all if they are few, else the blocks of a stack counted."""
    short = [re.sub(r"blocks\.\d+\..*", "blocks.*", name) for name in names]
    counted = (f"{short.count(name)} {name}" if name.endswith("*") else name for name in dict.fromkeys(short))
    return ", ".join(names if len(names) <= 8 else counted)


# -------------------------------------------------------------------------------------- attention on CPUs in bf16

# PyTorch's fused kernel takes about twice as long there as plain matrix products whose weights stay in the cache. An
# operator of its own, forward and backward, is one node for torch.compile, whatever the number of heads. The logits are
# rounded to bf16, unlike the fused kernel's: errors are twice as large, and more where attention is very sharp.


def in_cache(*tensors: Tensor, size: int):
    """The same heads of several (B, heads, N, d), as many at a time as have some MB of weights, `size` numbers each."""
    few = max(2**22 // size, 1)  # one alone goes without a dimension for heads, where products are faster
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    return zip(*(x.unbind() if few == 1 else x.split(few) for x in flat), strict=True)


def weigh(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights of one or more heads, (..., N, d) and (..., K, d) -> (..., N, K)."""
    return (q @ k.transpose(-1, -2)).softmax(dim=-1)


@torch.library.custom_op("videomae::attend_cpu", mutates_args=())
def attend_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As attend."""
    q, out = q * q.shape[-1] ** -0.5, torch.empty(q.shape, dtype=q.dtype)
    for q_part, k_part, v_part, part in in_cache(q, k, v, out, size=q.shape[2] * k.shape[2]):
        torch.matmul(weigh(q_part, k_part), v_part, out=part)
    return out


@torch.library.custom_op("videomae::attend_cpu_backward", mutates_args=())
def attend_cpu_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of attend_cpu; the weights are computed again."""
    scale, grads = q.shape[-1] ** -0.5, [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    parts = in_cache(q * scale, k, v, grad, *grads, size=q.shape[2] * k.shape[2])
    for q_part, k_part, v_part, g, dq, dk, dv in parts:
        weights, dweights = weigh(q_part, k_part), g @ v_part.transpose(-1, -2)
        torch.matmul(weights.transpose(-1, -2), g, out=dv)
        dlogits = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        torch.matmul(dlogits, k_part, out=dq).mul_(scale)
        torch.matmul(dlogits.transpose(-1, -2), q_part, out=dk)
    return tuple(grads)


attend_cpu.register_fake(lambda q, k, v: q.new_empty(q.shape))
attend_cpu_backward.register_fake(lambda q, k, v, grad: tuple(x.new_empty(x.shape) for x in (q, k, v)))
attend_cpu.register_autograd(
    lambda ctx, grad: attend_cpu_backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
