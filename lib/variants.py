"""Variants of VideoMAE as subclasses: the paper's other targets and two later ideas.

They are worked examples. To try an idea of your own, subclass VideoMAE here, override `target`,
`target_values`, `decode` or `forward`, and enter the class in MODELS: then it is a value of
`pretrain.py --model`, and checkpoints and fine-tuning know it. With `needs_tubes = True` it takes
tube masks alone. A target that is pixels gets figures if PIXELS in visualize.py holds it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model import (
    Attention,
    Block,
    VideoMAE,
    gather,
    init_linears,
    normalize_cubes,
    patchify,
    split_tokens,
    to_float,
)


class CenterFrame(VideoMAE):
    """Predict the frame in the middle of the clip alone, frame T/2 (Table 1c, "center").

    Needs tube masks: the masked places are the same at all time steps.
    """

    needs_tubes = True

    def target_values(self) -> int:
        """One frame of a cube."""
        return super().target_values() // self.encoder.cube[0]

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predictions (B, M/t, P) for the time step that holds the middle frame."""
        pred = super().decode(latent, visible, masked)
        middle = self.encoder.video_size[0] // 2 // self.encoder.cube[0]
        return pred.chunk(self.encoder.grid[0], dim=1)[middle]

    def target(self, video: Tensor, masked: Tensor) -> Tensor:
        """The patches of the middle frame, (B, M/t, P)."""
        middle = video.shape[1] // 2
        patches = patchify(video[:, middle : middle + 1], (1, *self.encoder.cube[1:]))
        # In the first time step, the index of a token is its place in the frame.
        places = masked.chunk(self.encoder.grid[0], dim=1)[0]
        patches = to_float(gather(patches, places))
        return normalize_cubes(patches)[0] if self.normalize else patches


class TwiceTheFrames(VideoMAE):
    """Predict twice as many frames as the encoder sees (Table 1c, "T x tau -> 2T x tau/2").

    Clips come with 2T frames at half the stride. The encoder sees every second frame.
    """

    frame_factor = 2  # frames loaded per frame that the encoder sees

    def target_values(self) -> int:
        """A cube that is twice as long."""
        return 2 * super().target_values()

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As VideoMAE, for a video (B, 2T, C, H, W)."""
        visible, masked = split_tokens(mask)
        latent = self.encoder(video[:, ::2], visible)
        pred = self.decode(latent, visible, masked)
        return self.loss(pred.float(), self.target(video, masked)), pred

    def target(self, video: Tensor, masked: Tensor) -> Tensor:
        """Cubes of 2*p0 frames, (B, M, 2P)."""
        p0, p1, p2 = self.encoder.cube
        cubes = to_float(gather(patchify(video, (2 * p0, p1, p2)), masked))
        return normalize_cubes(cubes)[0] if self.normalize else cubes


class CrossAttention(Attention):
    """Attention of some tokens to others: queries from x, keys and values from the context."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, M, D), (B, V, D) -> (B, M, D)."""
        q_weight, k_weight, v_weight = self.qkv.weight.chunk(3)
        q = F.linear(x, q_weight, self.q_bias)
        k, v = F.linear(context, k_weight), F.linear(context, v_weight, self.v_bias)
        heads = partial(rearrange, pattern="b n (heads e) -> b heads n e", heads=self.heads)
        x = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        return self.proj(rearrange(x, "b heads n e -> b n (heads e)"))


class CrossBlock(Block):
    """A block whose tokens attend to the context alone, not to each other."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.attn = CrossAttention(dim, heads)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, M, D), (B, V, D) -> (B, M, D)."""
        x = x + self.attn(self.norm1(x), self.norm1(context))
        return x + self.mlp(self.norm2(x))


class CrossMAE(VideoMAE):
    """Mask tokens attend to visible tokens alone: a cheaper decoder (CrossMAE, Fu et al. 2024)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dim, heads = self.mask_token.shape[2], self.decoder.blocks[0].attn.heads
        self.decoder.blocks = nn.ModuleList(CrossBlock(dim, heads) for _ in self.decoder.blocks)
        init_linears(self.decoder, nn.init.xavier_uniform_)

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """As VideoMAE.decode."""
        seen = self.encoder_to_decoder(latent) + self.decoder_pos_embed[visible]
        x = self.mask_token + self.decoder_pos_embed[masked]
        for block in self.decoder.blocks:
            x = block(x, seen)
        return self.decoder.head(self.decoder.norm(x))


class RunningCell(VideoMAE):
    """In training, decode half of the masked tokens (VideoMAE V2, Wang et al. 2023, section 3.2).

    Of each 2 x 2 cell of places, two are decoded. From one time step to the next the choice moves
    on by one place, so over four time steps all places are decoded equally often. Each clip begins
    elsewhere. VideoMAE V2 also decodes some of the visible places; this does not.

    Needs tube masks and a grid that such cells fill: t divides by 4, h and w by 2.
    """

    needs_tubes = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        t, h, w = self.encoder.grid
        if t % 4 or h % 2 or w % 2:
            raise ValueError(f"--model cell: {t}x{h}x{w} tokens do not divide into cells of 4x2x2")

    def forward(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As VideoMAE; while training, predictions and loss of half of the masked tokens."""
        visible, masked = split_tokens(mask)
        if self.training:
            _, masked = split_tokens(mask & self.cells(len(mask), mask.device))
        pred = self.decode(self.encoder(video, visible), visible, masked)
        return self.loss(pred.float(), self.target(video, masked)), pred

    def cells(self, batch: int, device: torch.device) -> Tensor:
        """Which tokens are decoded, (B, N) bool. Draws from torch's global generator."""
        t, h, w = self.encoder.grid
        begin = torch.randint(4, (batch, 1, 1), device=device)
        step, place = torch.arange(t, device=device)[:, None], torch.arange(4, device=device)
        decoded = (place + begin + 1 + step) % 4 >= 2  # (B, t, 4); the 1 as in the official code
        cell = rearrange(decoded, "b t (y x) -> b t y x", y=2)
        return cell.repeat(1, 1, h // 2, w // 2).flatten(1)


def choose_model(name: str, mask: str, stride: int) -> type[VideoMAE]:
    """The class of --model. ValueError where --mask or --stride do not suit it."""
    if getattr(MODELS[name], "needs_tubes", False) and mask != "tube":
        raise ValueError(f"--model {name} needs --mask tube")
    factor = MODELS[name].frame_factor
    if factor > 1 and (stride == 0 or stride % factor):
        raise ValueError(f"--model {name} needs an even --stride of 2 or more")
    return MODELS[name]


MODELS = {
    "videomae": VideoMAE,
    "center": CenterFrame,
    "double": TwiceTheFrames,
    "cross": CrossMAE,
    "cell": RunningCell,
}
