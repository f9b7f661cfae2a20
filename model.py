"""VideoMAE (Tong et al., NeurIPS 2022): a masked autoencoder for video.

    video -> cubes -> visible cubes -> encoder -> latents, mask tokens -> decoder -> masked cubes

After pre-training the decoder is thrown away and the encoder is fine-tuned, see Classifier. Letters
in shapes, with the numbers of a base model and tubes at 90 %:

    B  clips in the batch     T  frames, 16     C  colours, 3     H, W  height and width, 224 pixels
    N  tokens, one per cube: 8 * 14 * 14 = 1568    V  visible, 8 * 20 = 160    M  masked, 8 * 176
    D  width of a token, 768; in the decoder d, 384    P  values of a cube, 2 * 16 * 16 * 3 = 1536

A video is (B, T, C, H, W): uint8 in 0-255 or float in 0-1. Parameters are named as in the official
code (github.com/MCG-NJU/VideoMAE), but for the cube embedding.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Base: paper, Table 8. The decoder is half as wide (section 4.2). Heads and other sizes: official
# code. Large and huge decode with 12 blocks, as there; the paper says 4. Toy and tiny are ours.
SIZES = {
    "toy": dict(dim=128, depth=4, heads=4, decoder_dim=96, decoder_depth=2, decoder_heads=3),
    "tiny": dict(dim=192, depth=12, heads=3, decoder_dim=96, decoder_depth=4, decoder_heads=3),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base": dict(dim=768, depth=12, heads=12, decoder_dim=384, decoder_depth=4, decoder_heads=6),
    "large": dict(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=12, decoder_heads=8),
    "huge": dict(dim=1280, depth=32, heads=16, decoder_dim=640, decoder_depth=12, decoder_heads=8),
}
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}  # Table 1f
# Mean and std of red, green and blue, for pixels in 0-1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    """Joint space-time self-attention (section 3.3): every token attends to every token."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        # The keys need no bias: it adds the same to all logits of a query, which softmax ignores.
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), for any number of tokens and any width."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3D)
        per_head = "b n (heads e) -> b heads n e"
        q, k, v = (rearrange(part, per_head, heads=self.heads) for part in qkv.chunk(3, dim=2))
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(e)) v, e = D / heads
        return self.proj(rearrange(x, "b heads n e -> b n (heads e)"))


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
    """Pre-norm transformer block. In pre-training, `drop_path` is 0."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        # DropPath: in training, a clip skips the attention or the MLP with this probability.
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))  # tokens exchange information
        x = x + self.drop_path(self.mlp(self.norm2(x)))  # each token by itself
        return x


def init_linears(module: nn.Module, init_weight) -> None:
    """Fill the weights of all Linear layers in a module by `init_weight`, their biases with 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init_weight(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def patchify(video: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """(B, T, C, H, W) -> (B, N, P): cut into cubes of p0 frames, p1 rows and p2 columns."""
    p0, p1, p2 = cube
    pattern = "b (t p0) c (h p1) (w p2) -> b (t h w) (p0 p1 p2 c)"
    return rearrange(video, pattern, p0=p0, p1=p1, p2=p2)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in 0-255 -> float in 0-1. Floats stay as they are."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()


def normalize_cubes(cubes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero mean and unit variance of each colour in each cube (section 3.1; colour: official code).

    Cubes (B, N, P) float -> normalised cubes (B, N, P), mean and std (B, N, 1, C).
    """
    # Brightness and contrast of a cube are easy to guess from its neighbours. They would make up
    # most of the loss. Without them, what counts is the structure within the cube.
    pixels = rearrange(cubes, "b n (pixels c) -> b n pixels c", c=3)  # see patchify
    mean = pixels.mean(dim=2, keepdim=True)
    # The 1e-6 is there so that a cube of one colour does not divide by 0.
    std = pixels.std(dim=2, keepdim=True) + 1e-6
    return rearrange((pixels - mean) / std, "b n pixels c -> b n (pixels c)"), mean, std


def sincos(position: Tensor, dim: int, temperature: float) -> Tensor:
    """(N,) -> (N, dim): columns 2j, 2j+1 are sine, cosine of position / temperature^(2j/dim)."""
    # In float64, as in the official code: in float32, angles near 1500 are off by 1e-4.
    frequency = temperature ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position.double()[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def position_table(grid: tuple[int, int, int], dim: int, kind: str) -> Tensor:
    """Fixed position embeddings of all tokens, (N, D) float32. Two kinds:

    "1d", the official code: sine and cosine of the token index n.
    "3d", ours: a third of the D values each for time, row, column. Narrow models learn sooner.
    """
    t, h, w = grid
    n = torch.arange(t * h * w)  # the tokens in their order
    if kind == "1d":
        return sincos(n, dim, 10000).float()
    # A token and the one below it are neighbours in the image. Their n differ by w, so "1d" gives
    # them codes that are far apart. With an axis each for time, row, column, neighbours are alike.
    time, row, column = n // (h * w), (n // w) % h, n % w
    third = dim // 6 * 2  # an even number of values; those left over stay 0
    # The temperature sets the longest wavelength. An axis has tens of steps, so 100 is enough.
    table = [sincos(axis, third, 100) for axis in (time, row, column)]
    return F.pad(torch.cat(table, dim=1), (0, dim - 3 * third)).float()


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, D) and indices (B, V) -> the tokens there, (B, V, D)."""
    clip = torch.arange(len(index), device=index.device)[:, None]
    return tokens[clip, index]


def split_tokens(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mask (B, N) -> indices of the visible tokens (B, V) and of the masked ones (B, M), ascending.

    ValueError unless all clips mask the same number of tokens, at least one and not all.
    """
    # V and M are sizes of tensors, so the CPU must know them. In the forward pass, it waits for the
    # GPU here only.
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) > 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(f"all clips must mask the same number of tokens, not {counts}")
    order = mask.byte().argsort(dim=1, stable=True)  # False before True: visible tokens come first
    return order.split([mask.shape[1] - counts[0], counts[0]], dim=1)


class Encoder(nn.Module):
    """A ViT that sees visible cubes only (section 3.1). For sizes see SIZES and VideoMAE."""

    def __init__(
        self, dim, depth, heads, video_size, cube, positions="1d", drop_path=0.0, final_norm=True
    ):
        super().__init__()
        sides = list(zip(video_size, cube, strict=False))  # (clip, cube) for T, H, W
        if len(cube) != 3 or any(edge < 1 or side % edge for side, edge in sides):
            problem = f"clips of {tuple(video_size)} do not divide into cubes of {tuple(cube)}"
            raise ValueError(f"{problem}: change --frames, --resolution or --cube")
        self.video_size, self.cube = tuple(video_size), tuple(cube)
        self.grid = tuple(side // edge for side, edge in sides)
        cube_pixels = cube[0] * cube[1] * cube[2]
        # The paper embeds with a Conv3d whose kernel and stride are a cube. A Linear on the values
        # of a cube computes the same, and can skip masked cubes. Its initialisation is PyTorch's.
        self.patch_embed = nn.Linear(cube_pixels * 3, dim)
        self.register_buffer("pos_embed", position_table(self.grid, dim, positions))
        # The rate of drop path grows linearly with depth, from 0.
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        # Xavier's initialisation, as in the official code.
        init_linears(self.blocks, nn.init.xavier_uniform_)
        # The encoder reads pixels normalised by ImageNet's mean and std. The target is made from
        # pixels in 0-1. As buffers, these constants move to the GPU with the model.
        for name, colours in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(colours).repeat(cube_pixels), persistent=False)

    def forward(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Video (B, T, C, H, W) and indices of visible tokens (B, V) -> latents (B, V, D).

        Without `visible`, all tokens are seen: (B, N, D). ValueError for clips of another size.
        """
        if (video.shape[1], *video.shape[3:]) != self.video_size:
            raise ValueError(f"clips of (T, H, W) {self.video_size} expected: {tuple(video.shape)}")
        cubes, pos_embed = patchify(video, self.cube), self.pos_embed  # (B, N, P), (N, D)
        if visible is not None:
            # Masked cubes are dropped here: the encoder spends no time on them.
            cubes, pos_embed = gather(cubes, visible), pos_embed[visible]  # (B, V, P), (B, V, D)
        # Clips are uint8 until here: a quarter of the memory and of the copy to the GPU.
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
        init_linears(self, nn.init.xavier_uniform_)

    def forward(self, x: Tensor, num_last: int) -> Tensor:
        """(B, N, d) -> (B, num_last, values): predictions for the last tokens."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -num_last:]))


class VideoMAE(nn.Module):
    """The masked autoencoder (sections 3.1, 3.3): `loss, pred = model(video, mask)`.

    size           a name of SIZES
    video_size     (T, H, W) of a clip in frames and pixels
    cube           (p0, p1, p2): frames, rows and columns of a cube
    positions      kind of position_table
    decoder_depth  blocks of the decoder (Table 1a); None: as in SIZES
    normalize      predict cubes at zero mean and unit variance (the paper); False: pixels in 0-1
    loss           a name of LOSSES; other targets and decoders are subclasses, see lib/variants.py
    """

    frame_factor = 1  # a variant may load more frames than the encoder sees, see lib/variants.py

    def __init__(
        self, size="base", video_size=(16, 224, 224), cube=(2, 16, 16), positions="1d",
        decoder_depth=None, normalize=True, loss="mse",
    ):  # fmt: skip
        super().__init__()
        self.config = dict(  # goes into the checkpoint
            size=size, video_size=list(video_size), cube=list(cube), positions=positions,
            decoder_depth=decoder_depth, normalize=normalize, loss=loss,
        )  # fmt: skip
        s = SIZES[size]
        d, depth = s["decoder_dim"], decoder_depth or s["decoder_depth"]  # decoder's width, blocks
        self.normalize, self.loss = normalize, LOSSES[loss]
        self.encoder = Encoder(s["dim"], s["depth"], s["heads"], video_size, cube, positions)
        self.encoder_to_decoder = nn.Linear(s["dim"], d, bias=False)
        # All masked cubes get the same learned vector. Only position embeddings tell them apart.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        # Values beyond one standard deviation are drawn again (official code).
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.register_buffer("decoder_pos_embed", position_table(self.encoder.grid, d, positions))
        self.decoder = Decoder(d, depth, s["decoder_heads"], self.target_values())

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, T, C, H, W), mask (B, N), True = masked -> loss and predictions (B, M, P).

        The loss is the mean over masked tokens alone: visible ones need no prediction.
        """
        visible, masked = split_tokens(mask)  # (B, V), (B, M)
        latent = self.encoder(video, visible)  # (B, V, D)
        pred = self.decode(latent, visible, masked)  # (B, M, P)
        return self.loss(pred.float(), self.target(video, masked)), pred  # bf16 is too coarse

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Latents (B, V, D) of the visible tokens -> predictions (B, M, P) for the masked ones."""
        seen = self.encoder_to_decoder(latent) + self.decoder_pos_embed[visible]  # (B, V, d)
        unseen = self.mask_token + self.decoder_pos_embed[masked]  # (B, M, d)
        # Attention ignores the order of tokens, and each token carries its position. So the masked
        # tokens simply come last. Only they are predicted.
        return self.decoder(torch.cat([seen, unseen], dim=1), num_last=masked.shape[1])

    def target(self, video: Tensor, masked: Tensor) -> Tensor:
        """What to predict at the masked tokens (B, M): (B, M, P) float32."""
        cubes = to_float(gather(patchify(video, self.encoder.cube), masked))  # in 0-1
        return normalize_cubes(cubes)[0] if self.normalize else cubes

    def target_values(self) -> int:
        """How many numbers are predicted per token, P."""
        p0, p1, p2 = self.encoder.cube
        return p0 * p1 * p2 * 3


class Classifier(nn.Module):
    """The encoder with a new head: mean over tokens, LayerNorm, dropout, Linear (official code)."""

    last_norm = "fc_norm"  # the norm before the head; it gets the head's learning rate

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
        # Official code: fc_norm, after the mean over tokens, replaces the encoder's last LayerNorm.
        self.encoder = Encoder(*widths, video_size, cube, positions, drop_path, final_norm=False)
        self.fc_norm = nn.LayerNorm(s["dim"], eps=1e-6)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(s["dim"], classes)
        # For fine-tuning, the official code draws from a truncated normal instead of Xavier's.
        for part in (self.encoder.blocks, self.head):
            init_linears(part, partial(nn.init.trunc_normal_, std=0.02))
        self.head.weight.data.mul_(init_scale)  # so that training starts with small logits

    def forward(self, video: Tensor) -> Tensor:
        """(B, T, C, H, W) -> logits (B, classes)."""
        x = self.encoder(video).mean(dim=1)  # (B, D)
        return self.head(self.dropout(self.fc_norm(x)))
