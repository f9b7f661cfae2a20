"""The model: numbers it gave before, shapes, parameter counts, what may influence what, peers."""

import json
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.variants import MODELS
from masking import random_mask, tube_mask
from model import (
    LOSSES,
    Classifier,
    Encoder,
    VideoMAE,
    gather,
    normalize_cubes,
    patchify,
    position_table,
    split_tokens,
    to_float,
)
from visualize import unpatchify

SMALL = dict(size="toy", video_size=(8, 32, 48), cube=(2, 8, 8))
GRID = (4, 4, 6)


def clip(batch=2, frames=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, 3, 32, 48), dtype=torch.uint8, generator=generator)


def tube(batch=2, ratio=0.75):
    return tube_mask(torch.empty(batch, 1), GRID, ratio, torch.Generator().manual_seed(0))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# the same numbers as the code before this one (tests/reference/numbers.json was written by it)

NUMBERS = json.loads((Path(__file__).parent / "reference/numbers.json").read_text())
TOY = dict(size="toy", video_size=(8, 48, 48), cube=(2, 8, 8))
CASES = {
    "toy": dict(TOY, positions="3d", normalize=False),
    "toy-1d-normalized-l1": dict(TOY, loss="l1"),
    "small": dict(size="small", video_size=(4, 64, 64)),
    "classifier-toy": dict(TOY, classes=12, positions="3d"),
    "classifier-small": dict(size="small", classes=101, video_size=(4, 64, 64)),
}


def fixed(model):
    """Weights drawn from the parameters' names."""
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        one = float("norm" in name and name.endswith("weight"))
        p.data = torch.randn(p.shape, generator=generator) * 0.05 + one
    return model


def agrees(tensor, summary):
    values = tensor.detach().double().flatten()
    assert float(values.norm()) == pytest.approx(summary["norm"], rel=1e-5)
    some = values[:: max(len(values) // 8, 1)][:8].tolist()
    assert some == pytest.approx(summary["some"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_before(name):
    before = NUMBERS[name]
    model = fixed((Classifier if "classifier" in name else VideoMAE)(**CASES[name])).eval()
    (t, h, w), (p0, p1, p2) = model.encoder.grid, model.encoder.cube
    generator = torch.Generator().manual_seed(7)
    size = (2, t * p0, 3, h * p1, w * p2)
    video = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    if "classifier" in name:
        logits = model(video)
        logits.logsumexp(dim=1).sum().backward()
        agrees(logits, before["logits"])
    else:
        order = torch.rand(2, h * w, generator=generator).argsort(dim=1)
        loss, pred = model(video, (order < int(0.75 * h * w)).repeat(1, t))
        loss.backward()
        assert loss.item() == pytest.approx(before["loss"], rel=1e-5)
        agrees(pred, before["pred"])
        for key, norm in before["grads"].items():
            grad = model.get_parameter(key).grad
            assert float(grad.double().norm()) == pytest.approx(norm, rel=1e-4, abs=1e-9)
    norms = [float(p.grad.double().norm()) for p in model.parameters()]
    assert sum(n**2 for n in norms) ** 0.5 == pytest.approx(before["grad_norm"], rel=1e-5)


# cubes, position embeddings, tokens


def test_token_and_value_order():
    video = clip()
    cubes = patchify(video, (2, 8, 8))
    t, y, x = 3, 2, 5
    token = cubes[1, (t * 4 + y) * 6 + x].view(2, 8, 8, 3)  # p0 p1 p2 c
    block = video[1, 2 * t : 2 * t + 2, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
    assert torch.equal(token.permute(0, 3, 1, 2), block)
    for cube in ((2, 8, 8), (4, 16, 12), (1, 2, 3)):
        grid = [side // edge for side, edge in zip((8, 32, 48), cube, strict=True)]
        assert torch.equal(unpatchify(patchify(video, cube), grid, cube), video)


def test_the_embedding_is_the_papers_convolution():
    encoder = Encoder(16, 0, 1, (8, 32, 48), (2, 8, 8), final_norm=False)
    conv = nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))
    conv.weight.data = encoder.patch_embed.weight.data.view(16, 2, 8, 8, 3).permute(0, 4, 1, 2, 3)
    conv.bias.data = encoder.patch_embed.bias.data
    mean, std = (x[:3].view(3, 1, 1) for x in (encoder.mean, encoder.std))
    video = (to_float(clip()) - mean) / std
    expected = conv(video.transpose(1, 2)).flatten(2).transpose(1, 2)
    expected = expected + position_table(GRID, 16, "1d")
    torch.testing.assert_close(encoder(clip()), expected, atol=1e-5, rtol=0)


def test_positions_are_the_official_table():
    table = position_table((8, 14, 14), 384, "1d")
    assert table[1, :4].tolist() == pytest.approx(
        [0.841471, 0.540302, 0.815251, 0.579108], abs=1e-6
    )
    assert abs(table[1567, 0] - 0.608948) < 1e-6


def test_separate_axes_tell_neighbours_apart():
    table = position_table((4, 5, 6), 128, "3d").view(4, 5, 6, 128)
    assert torch.equal(
        table[1:, ..., 42:], table[:-1, ..., 42:]
    )  # time moves the first third alone
    assert torch.equal(table[:, :, 1:, :84], table[:, :, :-1, :84])  # the column the last third
    nearest = (table.flatten(0, 2) @ table[1, 2, 3]).argsort(descending=True)[:7].tolist()
    index = lambda t, y, x: (t * 5 + y) * 6 + x
    around = [(0, 2, 3), (2, 2, 3), (1, 1, 3), (1, 3, 3), (1, 2, 2), (1, 2, 4)]
    assert nearest[0] == index(1, 2, 3)
    assert sorted(nearest[1:]) == sorted(index(*place) for place in around)


def test_sizes_must_divide_and_fit():
    for size in ((7, 32, 48), (8, 33, 48), (8, 32, 4)):
        with pytest.raises(ValueError, match="--frames, --resolution or --cube"):
            VideoMAE("toy", size, (2, 8, 8))
    with pytest.raises(ValueError, match="expected"):
        VideoMAE(**SMALL).encoder(clip(frames=4))


def test_tokens_are_split_in_order():
    mask = random_mask(torch.empty(3, 1), GRID, 0.75)
    visible, masked = split_tokens(mask)
    assert visible.shape == (3, 24) and masked.shape == (3, 72)
    assert (visible.diff() > 0).all() and (masked.diff() > 0).all()
    assert mask.gather(1, masked).all() and not mask.gather(1, visible).any()
    mask[0, masked[0, 0]] = False
    for wrong in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
        with pytest.raises(ValueError, match="same number"):
            split_tokens(wrong)


def test_normalised_cubes():
    cubes = to_float(patchify(clip(), (2, 8, 8)))
    y, mean, std = normalize_cubes(cubes)
    u = y.unflatten(2, (-1, 3))
    torch.testing.assert_close(u.mean(dim=2), torch.zeros_like(u[:, :, 0]), atol=1e-5, rtol=0)
    ones = torch.ones_like(u[:, :, 0])  # unbiased, per colour
    torch.testing.assert_close(u.std(dim=2), ones, atol=1e-4, rtol=0)
    torch.testing.assert_close((u * std + mean).flatten(2), cubes, atol=1e-5, rtol=0)


# parameter counts of method and paper

COUNTS = {  # encoder, with decoders of 4 and 12 blocks, classifiers of 400, 174, 101 and 51 classes
    "small": (21879936, 24029376, 27586752, 22033936, 21946926, 21918821, 21899571),
    "base": (86227200, 94210944, 108403584, 86534800, 86361006, 86304869, 86266419),
    "large": (303860736, 317782016, 342996992, 304270736, 304039086, 303964261, 303913011),
    "huge": (631607040, 653104256, 692487296, 632119440, 631829934, 631736421, 631672371),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    with torch.device("meta"):
        models = [VideoMAE(size).encoder, *(VideoMAE(size, decoder_depth=d) for d in (4, 12))]
        models += [Classifier(size, classes) for classes in (400, 174, 101, 51)]
    assert tuple(map(parameters, models)) == COUNTS[size]


def test_initialisation():
    torch.manual_seed(0)
    model = VideoMAE("tiny", (8, 32, 48), (2, 8, 8))
    block = model.encoder.blocks[0]
    bound = (6 / (192 + 576)) ** 0.5  # xavier, qkv as one matrix
    assert 0.99 * bound < block.attn.qkv.weight.abs().max() <= bound
    default = lambda layer: layer.weight.abs().max() * layer.in_features**0.5  # PyTorch's
    assert (
        0.99 < default(model.encoder_to_decoder) <= 1
        and 0.99 < default(model.encoder.patch_embed) <= 1
    )
    assert model.mask_token.abs().max() <= 0.02 and model.mask_token.std() > 0.005
    zero = ("q_bias", "v_bias", "proj.bias", "fc1.bias", "fc2.bias", "norm1.bias", "head.bias")
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith(zero))
    classifier = Classifier("tiny", 5, (8, 32, 48), (2, 8, 8), drop_path=0.2)
    rates = [block.drop_path.p for block in classifier.encoder.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and rates == sorted(rates)
    assert classifier(clip()).abs().max() < 0.05 and classifier(clip()).shape == (2, 5)


# what may influence what


@pytest.mark.parametrize("strategy", [tube_mask, random_mask])
def test_masked_pixels_cannot_reach_the_encoder(strategy):
    model, video = VideoMAE(**SMALL), clip()
    mask = strategy(video, GRID, 0.75)
    cubes = patchify(video, (2, 8, 8))
    other = unpatchify(torch.where(mask[:, :, None], 255 - cubes, cubes), GRID, (2, 8, 8))
    visible, _ = split_tokens(mask)
    assert torch.equal(model.encoder(video, visible), model.encoder(other, visible))
    assert torch.equal(model(video, mask)[1], model(other, mask)[1])


def test_encoding_visible_tokens_is_encoding_a_subset():
    encoder = Encoder(32, 0, 2, (8, 32, 48), (2, 8, 8))
    visible, _ = split_tokens(tube())
    torch.testing.assert_close(encoder(clip(), visible), gather(encoder(clip()), visible))


def test_predictions_do_not_depend_on_the_batch():
    model, video, mask = VideoMAE(**SMALL).eval(), clip(3), tube(3)
    alone = model(video[1:2], mask[1:2])[1]
    torch.testing.assert_close(model(video, mask)[1][1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["videomae", "center", "double"])
def test_a_perfect_prediction_has_loss_zero_and_visible_pixels_do_not_count(name, normalize, loss):
    model = MODELS[name](**SMALL, normalize=normalize, loss=loss)
    video, mask = clip(frames=8 * model.frame_factor), tube()
    frames, cube = dict(videomae=(video, (2, 8, 8)), center=(video[:, 4:5], (1, 8, 8)),
                        double=(video, (4, 8, 8)))[name]  # fmt: skip
    cubes = to_float(patchify(frames, cube))
    cubes = normalize_cubes(cubes)[0] if normalize else cubes
    perfect = cubes[mask[:, : cubes.shape[1]]].view(2, -1, cubes.shape[2])
    model.decode = lambda *_: perfect
    assert model(video, mask)[0] == 0
    model.decode = lambda *_: perfect + 0.1
    expected = dict(mse=0.01, l1=0.1, smooth_l1=0.005)[loss]
    assert model(video, mask)[0] == pytest.approx(expected, rel=1e-3)


def test_every_parameter_learns_and_one_batch_is_overfitted():
    torch.manual_seed(0)
    model, mask = VideoMAE(**SMALL), tube()
    video = clip().float().mean(dim=(3, 4), keepdim=True) + torch.linspace(-60, 60, 48)
    video = video.clamp(0, 255).byte().expand(2, 8, 3, 32, 48)  # a ramp: learnable
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss, _ = model(video, mask)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


# variants


def test_shapes_of_the_variants_predictions():
    shapes = dict(
        videomae=(72, 384), center=(18, 192), double=(72, 768), cross=(72, 384), cell=(36, 384)
    )
    for name, (tokens, values) in shapes.items():
        model = MODELS[name](**SMALL)
        loss, pred = model(clip(frames=8 * model.frame_factor), tube())
        assert pred.shape == (2, tokens, values) and loss.isfinite()
        again = MODELS[name](**model.config)
        again.load_state_dict(model.state_dict())
        assert again.config == model.config


def test_the_center_frame_is_predicted_where_the_plain_model_has_its_time_step():
    model = MODELS["center"](**SMALL)
    visible, masked = split_tokens(tube())
    latent = model.encoder(clip(), visible)
    everywhere = VideoMAE.decode(model, latent, visible, masked).view(2, 4, 18, -1)
    torch.testing.assert_close(model(clip(), tube())[1], everywhere[:, 2])


def test_cross_attention_sees_visible_tokens_alone():
    model, mask = MODELS["cross"](**SMALL), tube()
    visible, masked = split_tokens(mask)
    latent = model.encoder(clip(), visible)
    few = model.decode(latent, visible, masked[:, :5])
    torch.testing.assert_close(
        model.decode(latent, visible, masked)[:, :5], few, atol=1e-5, rtol=1e-5
    )
    VideoMAE(**SMALL).load_state_dict(model.state_dict())  # the same parameters
    loss, _ = model(clip(), mask)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_running_cells_move_on_as_published():
    """VideoMAE V2's table at half, time steps 0 to 3 of a clip that begins at 0; 1: left out."""
    table = [[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]]
    model = MODELS["cell"]("toy", (16, 112, 112), (2, 8, 8))
    left_out = ~model.cells(64, torch.device("cpu")).view(64, 8, 7, 2, 7, 2)
    cells = left_out[:, :, 0, :, 0]
    assert (left_out == cells[:, :, None, :, None]).all()  # the same in every place
    assert len({tuple(cell[0].flatten().tolist()) for cell in cells}) == 4  # each begins somewhere
    first = next(cell for cell in cells if cell[0].tolist() == table[0])
    assert first.int().tolist() == table * 2
    tubes = tube_mask(torch.empty(9, 1), (8, 14, 14), 0.9)
    decoded = tubes & model.cells(9, torch.device("cpu"))
    assert (decoded.sum(dim=1) == 704).all()  # as published
    assert model.eval()(torch.zeros(1, 16, 3, 112, 112), tubes[:1])[1].shape[1] == 1408
    with pytest.raises(ValueError, match="cells of 4x2x2"):
        MODELS["cell"]("toy", (4, 32, 32), (2, 8, 8))


# an independent implementation


@pytest.mark.parametrize("strategy, normalize", [(tube_mask, True), (random_mask, False)])
def test_loss_is_that_of_a_plain_re_implementation(strategy, normalize):
    """All cubes are embedded, masked ones dropped; attention is by hand, the target by a loop."""
    torch.manual_seed(0)
    model, video = fixed(VideoMAE(**SMALL, normalize=normalize)), clip()
    mask = strategy(video, GRID, 0.75)

    def block(b, x):
        y = F.layer_norm(x, x.shape[-1:], b.norm1.weight, b.norm1.bias, 1e-6)
        bias = torch.cat([b.attn.q_bias, 0 * b.attn.q_bias, b.attn.v_bias])
        q, k, v = (y @ b.attn.qkv.weight.T + bias).chunk(3, dim=-1)
        heads = lambda z: z.unflatten(2, (b.attn.heads, -1)).transpose(1, 2)
        q, k, v = heads(q), heads(k), heads(v)
        y = ((q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + b.attn.proj(y.transpose(1, 2).flatten(2))
        y = F.layer_norm(x, x.shape[-1:], b.norm2.weight, b.norm2.bias, 1e-6)
        return x + b.mlp.fc2(F.gelu(b.mlp.fc1(y)))

    mean, std = (x[:3].view(3, 1, 1) for x in (model.encoder.mean, model.encoder.std))
    x = patchify((video / 255 - mean) / std, (2, 8, 8)) @ model.encoder.patch_embed.weight.T
    x = x + model.encoder.patch_embed.bias + position_table(GRID, 128, "1d")
    x = x[~mask].view(2, -1, 128)
    for b in model.encoder.blocks:
        x = block(b, x)
    positions = position_table(GRID, 96, "1d").expand(2, -1, -1)
    x = model.encoder_to_decoder(model.encoder.norm(x)) + positions[~mask].view(2, -1, 96)
    hidden = model.mask_token + positions[mask].view(2, -1, 96)
    x = torch.cat([x, hidden], dim=1)
    for b in model.decoder.blocks:
        x = block(b, x)
    pred = model.decoder.head(model.decoder.norm(x[:, -hidden.shape[1] :]))
    target = []
    for cubes, rows in zip(patchify(video / 255, (2, 8, 8)), mask, strict=True):
        for cube in cubes[rows]:
            colours = cube.view(-1, 3)
            if normalize:
                colours = (colours - colours.mean(0)) / (colours.var(0).sqrt() + 1e-6)
            target.append(colours.flatten())
    target = torch.stack(target).view_as(pred)
    loss, ours = model(video, mask)
    torch.testing.assert_close(ours, pred, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, (pred - target).square().mean(), atol=1e-6, rtol=1e-5)
