"""VideoMAE (Tong et al., NeurIPS 2022): a masked autoencoder for video.

    video -> cubes -> visible cubes -> encoder -> latents, mask tokens -> decoder -> masked cubes

Read from top to bottom: transformer, cubes, position embeddings, Encoder, Decoder, VideoMAE
(pre-training), Classifier (fine-tuning). Letters in shapes, here and in every other file:

    B  clips in the batch      T  frames     C  channels, 3     H, W  height and width in pixels
    N  tokens of a clip, one per cube, N = t*h*w for a grid of t time steps, h rows, w columns
    V  visible tokens          M  masked tokens                 V + M = N
    D  width of a token, in the decoder d     P  values of a cube, frames * rows * columns * 3

A video is (B, T, C, H, W): uint8 in 0-255 or float in 0-1. Parameters have their official names.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Width, blocks and attention heads of encoder and decoder: paper, Table 8 and section 4.2. Toy and
# tiny are ours. Decoders of large and huge: 12 blocks in the official scripts, 4 in the paper.
SIZES = {
    "toy": dict(dim=128, depth=4, heads=4, decoder_dim=96, decoder_depth=2, decoder_heads=3),
    "tiny": dict(dim=192, depth=12, heads=3, decoder_dim=96, decoder_depth=4, decoder_heads=3),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base": dict(dim=768, depth=12, heads=12, decoder_dim=384, decoder_depth=4, decoder_heads=6),
    "large": dict(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=12, decoder_heads=8),
    "huge": dict(dim=1280, depth=32, heads=16, decoder_dim=640, decoder_depth=12, decoder_heads=8),
}
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}  # Table 1f
# Of red, green and blue, in 0-1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    """Joint space-time self-attention (section 3.3): every token attends to every token."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        # The keys have no bias. It would add the same number to all logits of a query, and softmax
        # would cancel it.
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3D)
        q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """Two linear layers with GELU between them, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `drop_path` is the rate at which a clip skips each branch."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        # DropPath, in training: a clip skips the branch, or its output is divided by 1 - rate.
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))  # tokens exchange information
        x = x + self.drop_path(self.mlp(self.norm2(x)))  # each token by itself
        return x


def init_linear(module: nn.Module, init_weight) -> None:
    """For nn.Module.apply: fill the weight of a Linear by `init_weight`, its bias with 0."""
    if isinstance(module, nn.Linear):
        init_weight(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def patchify(video: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """(B, T, C, H, W) -> (B, N, P): cut into cubes of p0 frames, p1 rows and p2 columns."""
    p0, p1, p2 = cube
    pattern = "b (t p0) c (h p1) (w p2) -> b (t h w) (p0 p1 p2 c)"
    return rearrange(video, pattern, p0=p0, p1=p1, p2=p2)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in 0-255 -> float in 0-1. Floats stay as they are."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()


def normalize_cubes(cubes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero mean and unit variance per cube and channel (section 3.3 and the official code).

    Cubes (B, N, P) float -> normalised cubes (B, N, P), mean and std (B, N, 1, C).
    """
    pixels = rearrange(cubes, "b n (p c) -> b n p c", c=3)  # statistics are those of each colour
    mean = pixels.mean(dim=2, keepdim=True)
    # The 1e-6 keeps a cube of one colour from dividing by 0. It is outside of the square root.
    std = pixels.std(dim=2, keepdim=True) + 1e-6
    return rearrange((pixels - mean) / std, "b n p c -> b n (p c)"), mean, std


def sincos(position: Tensor, dim: int, temperature: float) -> Tensor:
    """Sine (even columns) and cosine (odd) of position / temperature^(2j/dim): (N,) -> (N, dim)."""
    # In float64: angles go up to N, too many for the digits of float32.
    frequency = temperature ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position.double()[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def position_table(grid: tuple[int, int, int], dim: int, kind: str) -> Tensor:
    """Fixed position embeddings of all tokens, (N, D) float32. Two kinds:

    "1d", the official code: sine and cosine of the token index n.
    "3d", ours: a third of the columns each for time, row and column. Narrow models learn sooner.
    """
    t, h, w = grid
    n = torch.arange(t * h * w)  # the tokens in their order
    if kind == "1d":
        return sincos(n, dim, 10000).float()
    # The index n hides which tokens are neighbours: the one below is w further. Three axes show it.
    time, row, column = n // (h * w), n // w % h, n % w
    third = dim // 6 * 2  # an even number of columns; those left over stay 0
    table = [sincos(axis, third, 100) for axis in (time, row, column)]
    return F.pad(torch.cat(table, dim=1), (0, dim - 3 * third)).float()


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Take the tokens at `index` (B, K) from all tokens (B, N, D): (B, K, D)."""
    clip = torch.arange(len(index), device=index.device)[:, None]
    return tokens[clip, index]


def split_tokens(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mask (B, N) -> indices of the visible tokens (B, V) and of the masked ones (B, M), ascending.

    ValueError unless all clips mask the same number of tokens, at least one and not all.
    """
    # The CPU must know V and M, so on a GPU it waits here. It waits nowhere else in a step.
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(f"all clips must mask the same number of tokens, not {counts}")
    order = mask.byte().argsort(dim=1, stable=True)  # False before True: visible tokens come first
    return order[:, : -counts[0]], order[:, -counts[0] :]


class Encoder(nn.Module):
    """A ViT that sees visible cubes only (section 3.1). For the arguments see VideoMAE."""

    def __init__(
        self, dim, depth, heads, video_size, cube, positions="1d", drop_path=0.0, final_norm=True
    ):
        super().__init__()
        if len(cube) != 3 or any(side % edge for side, edge in zip(video_size, cube, strict=True)):
            sides = f"clips of {tuple(video_size)} do not divide into cubes of {tuple(cube)}"
            raise ValueError(f"{sides}: change --frames, --resolution or --cube")
        self.video_size, self.cube = tuple(video_size), tuple(cube)
        self.grid = tuple(side // edge for side, edge in zip(video_size, cube, strict=True))
        pixels = cube[0] * cube[1] * cube[2]  # of a cube, each with three colours
        # The paper embeds cubes by a Conv3d whose kernel and stride are one cube. A Linear on the
        # values of a cube computes the same, and it can embed the visible cubes alone.
        self.patch_embed = nn.Linear(pixels * 3, dim)
        self.register_buffer("pos_embed", position_table(self.grid, dim, positions))
        # The rate of drop path grows linearly with depth, from 0.
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        self.blocks.apply(partial(init_linear, init_weight=nn.init.xavier_uniform_))
        # The encoder takes pixels as usual for images. The target (below) does not.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).repeat(pixels), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).repeat(pixels), persistent=False)

    def forward(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Video (B, T, C, H, W) and indices of visible tokens (B, V) -> latents (B, V, D).

        Without `visible`, all tokens are seen: (B, N, D). ValueError for clips of another size.
        """
        if (video.shape[1], *video.shape[3:]) != self.video_size:
            raise ValueError(f"clips must be {self.video_size} (T, H, W), not {tuple(video.shape)}")
        cubes, pos_embed = patchify(video, self.cube), self.pos_embed  # (B, N, P), (N, D)
        if visible is not None:
            # Masked cubes end here. The encoder never spends anything on them.
            cubes, pos_embed = gather(cubes, visible), pos_embed[visible]  # (B, V, P), (B, V, D)
        # Pixels become floats only here: a clip of bytes is four times smaller on its way.
        x = self.patch_embed((to_float(cubes) - self.mean) / self.std) + pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """A narrower and shallower ViT that predicts `values` numbers per token (section 3.1)."""

    def __init__(self, dim: int, depth: int, heads: int, values: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, values)
        self.apply(partial(init_linear, init_weight=nn.init.xavier_uniform_))

    def forward(self, x: Tensor, last: int) -> Tensor:
        """(B, N, D) -> (B, last, values): predictions for the last tokens."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -last:]))


class VideoMAE(nn.Module):
    """The masked autoencoder (sections 3.1 and 3.3): `loss, pred = model(video, mask)`.

    size           a name of SIZES
    video_size     (T, H, W) of a clip in frames and pixels
    cube           (p0, p1, p2): frames, rows and columns of a cube
    positions      kind of position_table
    decoder_depth  blocks of the decoder (Table 1a); None: as in SIZES
    normalize      predict cubes at zero mean and unit variance (the paper); False: pixels in 0-1
    loss           a name of LOSSES

    Other targets and other decoders are subclasses, see lib/variants.py.
    """

    frames_per_clip = 1  # frames loaded per frame that the encoder sees

    def __init__(
        self, size="base", video_size=(16, 224, 224), cube=(2, 16, 16), positions="1d",
        decoder_depth=None, normalize=True, loss="mse",
    ):  # fmt: skip
        super().__init__()
        self.config = dict(
            size=size, video_size=list(video_size), cube=list(cube), positions=positions,
            decoder_depth=decoder_depth, normalize=normalize, loss=loss,
        )  # fmt: skip
        s = SIZES[size]
        dim, depth = s["decoder_dim"], decoder_depth or s["decoder_depth"]  # d, narrower than D
        self.normalize, self.loss = normalize, LOSSES[loss]
        self.encoder = Encoder(s["dim"], s["depth"], s["heads"], video_size, cube, positions)
        self.encoder_to_decoder = nn.Linear(s["dim"], dim, bias=False)
        # One learned vector stands for every masked cube. Only its position embedding differs.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.register_buffer("decoder_pos_embed", position_table(self.encoder.grid, dim, positions))
        self.decoder = Decoder(dim, depth, s["decoder_heads"], self.target_values())

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, T, C, H, W), mask (B, N), True = masked -> loss and predictions (B, M, P).

        The loss is the mean over masked tokens alone. Predictions are in ascending token order.
        """
        visible, masked = split_tokens(mask)  # (B, V), (B, M)
        latent = self.encoder(video, visible)  # (B, V, D)
        pred = self.decode(latent, visible, masked)  # (B, M, P)
        return self.loss(pred.float(), self.target(video, masked)), pred

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Latents (B, V, D) of the visible tokens -> predictions (B, M, P) for the masked ones."""
        seen = self.encoder_to_decoder(latent) + self.decoder_pos_embed[visible]  # (B, V, d)
        unseen = self.mask_token + self.decoder_pos_embed[masked]  # (B, M, d)
        # Order does not matter to attention, because each token carries its position. So the masked
        # tokens simply come last. Only they are predicted.
        return self.decoder(torch.cat([seen, unseen], dim=1), last=masked.shape[1])

    def target(self, video: Tensor, masked: Tensor) -> Tensor:
        """What to predict at the masked tokens (B, M): (B, M, P) float32."""
        cubes = to_float(gather(patchify(video, self.encoder.cube), masked))  # in 0-1
        return normalize_cubes(cubes)[0] if self.normalize else cubes

    def target_values(self) -> int:
        """How many numbers are predicted per token, P."""
        p0, p1, p2 = self.encoder.cube
        return p0 * p1 * p2 * 3


class Classifier(nn.Module):
    """The encoder with a new head: mean over tokens, LayerNorm, dropout, Linear (Table 10).

    `init_scale` is a factor on the head's first weight: training starts with small logits.
    """

    def __init__(
        self, size, classes, video_size=(16, 224, 224), cube=(2, 16, 16), positions="1d",
        drop_path=0.0, head_dropout=0.0, init_scale=1e-3,
    ):  # fmt: skip
        super().__init__()
        self.config = dict(
            size=size, classes=classes, video_size=list(video_size), cube=list(cube),
            positions=positions, drop_path=drop_path, init_scale=init_scale,
            head_dropout=head_dropout,
        )  # fmt: skip
        s = SIZES[size]
        widths = (s["dim"], s["depth"], s["heads"])
        # As in the official code, fc_norm takes the place of the encoder's last LayerNorm.
        self.encoder = Encoder(*widths, video_size, cube, positions, drop_path, final_norm=False)
        self.fc_norm = nn.LayerNorm(s["dim"], eps=1e-6)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(s["dim"], classes)
        for part in (self.encoder.blocks, self.head):
            part.apply(partial(init_linear, init_weight=partial(nn.init.trunc_normal_, std=0.02)))
        self.head.weight.data.mul_(init_scale)

    def forward(self, video: Tensor) -> Tensor:
        """(B, T, C, H, W) -> logits (B, classes)."""
        x = self.encoder(video).mean(dim=1)  # (B, D)
        return self.head(self.dropout(self.fc_norm(x)))
