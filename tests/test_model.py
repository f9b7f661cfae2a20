"""The model: shapes and order of cubes, exact parameter counts, what the loss and the encoder may see, peers."""

import pytest
import torch
import torch.nn.functional as F
from benchmark import hugging_face_names
from torch import nn

from masking import random_mask, running_cell_mask, tube_mask
from model import (
    LOSSES,
    Classifier,
    Encoder,
    VideoMAE,
    attend,
    attend_cpu,
    grid_of,
    normalize_cubes,
    patchify,
    position_table,
    take,
    token_indices,
    unit_range,
    unpatchify,
)  # fmt: skip

SMALL = dict(size="toy", video_size=(8, 32, 48), cube=(2, 8, 8))  # grid 4 x 4 x 6
GRID = (4, 4, 6)


def clip(batch=2, frames=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, 3, 32, 48), dtype=torch.uint8, generator=generator)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# cubes, positions, tokens


@pytest.mark.parametrize("cube", [(2, 8, 8), (4, 16, 12), (1, 2, 3)])
def test_unpatchify_inverts_patchify(cube):
    video = clip()
    cubes = patchify(video, cube)
    grid = grid_of((8, 32, 48), cube)
    assert cubes.shape == (2, grid[0] * grid[1] * grid[2], cube[0] * cube[1] * cube[2] * 3)
    assert torch.equal(unpatchify(cubes, grid, cube), video)


def test_token_and_value_order():
    cubes = patchify(clip(), (2, 8, 8))
    t, y, x = 3, 2, 5
    token = cubes[1, (t * 4 + y) * 6 + x].view(2, 8, 8, 3)  # p0 p1 p2 c
    assert torch.equal(token.permute(0, 3, 1, 2), clip()[1, 2 * t : 2 * t + 2, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8])


def test_embedding_is_the_papers_convolution():
    encoder = Encoder(16, 0, 1, (8, 32, 48), (2, 8, 8), final_norm=False)
    conv = nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))
    conv.weight.data = encoder.patch_embed.weight.data.view(16, 2, 8, 8, 3).permute(0, 4, 1, 2, 3)
    conv.bias.data = encoder.patch_embed.bias.data
    video = (unit_range(clip()) - encoder.mean.view(3, 1, 1)) / encoder.std.view(3, 1, 1)
    expected = conv(video.transpose(1, 2)).flatten(2).transpose(1, 2) + position_table((4, 4, 6), 16, "1d")
    torch.testing.assert_close(encoder(clip()), expected, atol=1e-5, rtol=0)


def test_positions_are_the_official_table():
    table = position_table((8, 14, 14), 384, "1d")
    torch.testing.assert_close(table[1, :4], torch.tensor([0.841471, 0.540302, 0.815251, 0.579108]), atol=1e-6, rtol=0)
    assert abs(table[1567, 0] - 0.608948) < 1e-6


def test_separate_axes_tell_neighbours_apart():
    table = position_table((4, 5, 6), 128, "3d").view(4, 5, 6, 128)
    assert torch.equal(table[1:, ..., 42:], table[:-1, ..., 42:])  # time moves the first third alone
    assert torch.equal(table[:, :, 1:, :84], table[:, :, :-1, :84])  # the column the last
    products = table.flatten(0, 2) @ table[1, 2, 3]
    nearest = products.argsort(descending=True)[:7].tolist()
    index = lambda t, y, x: (t * 5 + y) * 6 + x
    neighbours = [index(0, 2, 3), index(2, 2, 3), index(1, 1, 3), index(1, 3, 3), index(1, 2, 2), index(1, 2, 4)]
    assert nearest[0] == index(1, 2, 3) and sorted(nearest[1:]) == sorted(neighbours)


def test_positions_are_not_in_the_state_dict():
    assert not [k for k in VideoMAE(**SMALL).state_dict() if "positions" in k or k.endswith(("mean", "std"))]


@pytest.mark.parametrize("video_size, word", [((7, 32, 48), "frames"), ((8, 33, 48), "height"), ((8, 32, 4), "width")])
def test_sizes_must_divide(video_size, word):
    with pytest.raises(ValueError, match=word):
        VideoMAE("toy", video_size, (2, 8, 8))


def test_clip_of_another_size_is_refused():
    with pytest.raises(ValueError, match="built for"):
        VideoMAE(**SMALL).encoder(clip(frames=4))


def test_token_indices_split_in_order():
    mask = random_mask(3, GRID, 0.75)
    visible, masked = token_indices(mask)
    assert visible.shape == (3, 24) and masked.shape == (3, 72)
    assert (visible.diff() > 0).all() and (masked.diff() > 0).all()
    assert mask.gather(1, masked).all() and not mask.gather(1, visible).any()
    mask[0, masked[0, 0]] = False
    with pytest.raises(ValueError, match="same number"):
        token_indices(mask)


def test_normalised_cubes():
    cubes = unit_range(patchify(clip(), (2, 8, 8)))
    y, mean, std = normalize_cubes(cubes)
    u = y.unflatten(2, (-1, 3))
    torch.testing.assert_close(u.mean(dim=2), torch.zeros_like(u[:, :, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(u.std(dim=2), torch.ones_like(u[:, :, 0]), atol=1e-4, rtol=0)  # unbiased, per channel
    torch.testing.assert_close((u * std + mean).flatten(2), cubes, atol=1e-5, rtol=0)


# parameter counts of the method's tables


@pytest.mark.parametrize(
    "size, encoder, depth4, depth12",
    [
        ("small", 21_879_936, 24_029_376, 27_586_752),
        ("base", 86_227_200, 94_210_944, 108_403_584),
        ("large", 303_860_736, 317_782_016, 342_996_992),
        ("huge", 631_607_040, 653_104_256, 692_487_296),
    ],
)
def test_pretraining_parameter_counts(size, encoder, depth4, depth12):
    with torch.device("meta"):
        assert parameters(VideoMAE(size).encoder) == encoder
        assert parameters(VideoMAE(size, decoder_depth=4)) == depth4
        assert parameters(VideoMAE(size, decoder_depth=12)) == depth12


@pytest.mark.parametrize(
    "size, counts",
    [
        ("small", (22_033_936, 21_946_926, 21_918_821, 21_899_571)),
        ("base", (86_534_800, 86_361_006, 86_304_869, 86_266_419)),
        ("large", (304_270_736, 304_039_086, 303_964_261, 303_913_011)),
        ("huge", (632_119_440, 631_829_934, 631_736_421, 631_672_371)),
    ],
)
def test_classifier_parameter_counts(size, counts):
    with torch.device("meta"):
        assert tuple(parameters(Classifier(size, classes)) for classes in (400, 174, 101, 51)) == counts


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 12])
def test_decoder_depths(depth):
    assert len(VideoMAE(**SMALL, decoder_depth=depth).decoder.blocks) == depth


def test_initialisation():
    torch.manual_seed(0)
    model = VideoMAE("tiny", (8, 32, 48), (2, 8, 8))
    block = model.encoder.blocks[0]
    bound = (6 / (192 + 576)) ** 0.5  # xavier, qkv as one matrix
    assert 0.99 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert 0.99 * 192**-0.5 < model.encoder_to_decoder.weight.abs().max() <= 192**-0.5  # PyTorch's default
    assert 0.99 * 384**-0.5 < model.encoder.patch_embed.weight.abs().max() <= 384**-0.5
    assert model.mask_token.abs().max() <= 0.02 and model.mask_token.std() > 0.005
    zero = ("q_bias", "v_bias", "proj.bias", "fc1.bias", "fc2.bias", "norm1.bias", "norm.bias", "head.bias")
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith(zero))


# what may influence what


@pytest.mark.parametrize("strategy", [tube_mask, random_mask])
def test_masked_pixels_cannot_reach_the_encoder(strategy):
    model, video = VideoMAE(**SMALL), clip()
    mask = strategy(2, GRID, 0.75)
    cubes = patchify(video, (2, 8, 8))
    noise = torch.where(mask[:, :, None], 255 - cubes, cubes)
    visible, _ = token_indices(mask)
    other = unpatchify(noise, GRID, (2, 8, 8))
    assert not torch.equal(video, other)
    assert torch.equal(model.encoder(video, visible), model.encoder(other, visible))
    assert torch.equal(model(video, mask)[1], model(other, mask)[1])


def test_encoding_visible_tokens_is_encoding_a_subset():
    encoder = Encoder(32, 0, 2, (8, 32, 48), (2, 8, 8))
    visible, _ = token_indices(tube_mask(2, GRID, 0.75))
    torch.testing.assert_close(encoder(clip(), visible), take(encoder(clip()), visible))


def test_predictions_do_not_depend_on_the_batch():
    model, video, mask = VideoMAE(**SMALL).eval(), clip(3), tube_mask(3, GRID, 0.75)
    torch.testing.assert_close(model(video, mask)[1][1:2], model(video[1:2], mask[1:2])[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("target", ["clip", "center", "double"])
def test_perfect_prediction_has_loss_zero_and_visible_pixels_do_not_count(target, normalize, loss):
    model = VideoMAE(**SMALL, target=target, normalize=normalize, loss=loss)
    video = clip(frames=16 if target == "double" else 8)
    mask = tube_mask(2, GRID, 0.75)
    frames = {"clip": video, "center": video[:, 4:5], "double": video}[target]
    cubes = unit_range(patchify(frames, model.target_cube))
    cubes = normalize_cubes(cubes)[0] if normalize else cubes
    hidden = mask[:, : cubes.shape[1]]  # central frame: one slot
    perfect = cubes[hidden].view(2, -1, cubes.shape[2])
    model.decode = lambda *_: perfect
    assert model(video, mask)[0] == 0
    model.decode = lambda *_: perfect + 0.1
    assert model(video, mask)[0] == pytest.approx({"mse": 0.01, "l1": 0.1, "smooth_l1": 0.005}[loss], rel=1e-3)


def test_prediction_shapes_of_the_targets():
    mask = tube_mask(2, GRID, 0.75)
    assert VideoMAE(**SMALL)(clip(), mask)[1].shape == (2, 72, 2 * 64 * 3)
    assert VideoMAE(**SMALL, target="center")(clip(), mask)[1].shape == (2, 18, 64 * 3)
    assert VideoMAE(**SMALL, target="double")(clip(frames=16), mask)[1].shape == (2, 72, 4 * 64 * 3)
    with pytest.raises(ValueError, match="tube"):
        VideoMAE(**SMALL, target="center")(clip(), random_mask(2, GRID, 0.75))


def test_the_central_slot_is_what_the_center_target_predicts():
    """Its predictions equal those of the plain model with the same weights at the central slot, head apart."""
    model = VideoMAE(**SMALL, target="center")
    mask = tube_mask(2, GRID, 0.75)
    visible, masked = token_indices(mask)
    latent = model.encoder(clip(), visible)
    everywhere = model.decode(latent, visible, masked, 72).view(2, 4, 18, -1)
    torch.testing.assert_close(model(clip(), mask)[1], everywhere[:, 2], atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model, mask, grads = VideoMAE(**SMALL), tube_mask(2, GRID, 0.75), []
    for model.encoder.checkpointing in (False, True):
        model.zero_grad()
        model(clip(), mask)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries, keys", [(70, 70), (2100, 2100), (50, 20)])  # 2100: one head at a time
def test_attention_for_cpus_is_attention(queries, keys):
    parts = [torch.randn(2, n, 3 * 16).unflatten(2, (3, 16)).transpose(1, 2) for n in (queries, keys, keys)]
    parts, grad = [part.requires_grad_() for part in parts], torch.randn(2, 3, queries, 16)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        cast = [part.to(dtype) for part in parts]
        mine, reference = attend_cpu(*cast), F.scaled_dot_product_attention(*parts)
        torch.testing.assert_close(mine.float(), reference, atol=error, rtol=error)
        grads = [torch.autograd.grad((out * grad).sum(), parts) for out in (mine, reference)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=error, rtol=error)
    assert torch.equal(attend(*cast), mine)  # bf16 on a CPU takes it


def test_bf16_attention_on_cpus_rounds_logits_no_more_than_once():
    """Sharp attention is where rounding shows: logits of up to 60, with an error of one in 256."""
    q, k, v = (4 * torch.randn(1, 2, 400, 64) for _ in range(3))
    exact, mine = F.scaled_dot_product_attention(q, k, v), attend(*(x.bfloat16() for x in (q, k, v))).float()
    assert (mine - exact).norm() / exact.norm() < 0.03


def kept(model, *args):
    """Bytes that a forward keeps for the backward, parameters aside."""
    found, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    note = lambda x: found.update({x.untyped_storage().data_ptr(): x.untyped_storage()}) or x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(*args)
    return sum(storage.nbytes() for pointer, storage in found.items() if pointer not in own)


def test_little_is_kept_for_the_backward(monkeypatch):
    """Neither outputs of norms and GELU, nor of the last block what nobody reads."""
    model, mask = VideoMAE(**SMALL), tube_mask(2, GRID, 0.5)
    lean = kept(model, clip(), mask)
    monkeypatch.setattr("model.recompute", lambda function, *args: function(*args))
    assert lean < 0.75 * kept(model, clip(), mask)
    monkeypatch.undo()
    whole = kept(model.decoder, *(torch.randn(2, 48, 96) for _ in range(2)), 48, False)
    assert kept(model.decoder, *(torch.randn(2, 48, 96) for _ in range(2)), 12, False) < 0.85 * whole


@pytest.mark.parametrize("cross", [False, True])
def test_decoder_mask_leaves_tokens_out_of_the_loss(cross):
    torch.manual_seed(0)
    model, video, mask = VideoMAE(**SMALL, cross=cross), clip(), tube_mask(2, GRID, 0.75)
    skipped = running_cell_mask(2, GRID, 0.5)
    decoded = mask & ~skipped
    loss, pred = model(video, mask, skipped)
    index = token_indices(decoded)[1]
    torch.testing.assert_close(loss, F.mse_loss(pred, model.target_cubes(video, index)))
    everything = model(video, mask, torch.zeros_like(mask))
    torch.testing.assert_close(everything, model(video, mask))
    among_all = everything[1][decoded[mask].view(2, -1)].view_as(pred)
    # Mask tokens that see each other miss those left out; cross attention never saw them.
    assert torch.allclose(pred, among_all, atol=1e-5) == cross


def test_cross_attention_keeps_the_parameters_and_the_config():
    model = VideoMAE(**SMALL, cross=True)
    VideoMAE(**SMALL).load_state_dict(model.state_dict())
    assert VideoMAE(**model.config).decoder.cross
    loss, _ = model(clip(), tube_mask(2, GRID, 0.75))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


LOW = dict(dim=48, depth=1, heads=3, decoder_dim=48, decoder_depth=1, decoder_heads=3)


@pytest.mark.parametrize("options", [{}, dict(cross=True, normalize=False)])
def test_compiled_steps_are_one_graph_that_is_compiled_once(options):
    """There are no graph breaks; other masks and videos need no other graph, and results stay the same."""
    torch._dynamo.reset()
    model, compiled = (VideoMAE(**{**SMALL, "size": LOW}, **options) for _ in range(2))
    compiled.load_state_dict(model.state_dict())
    compiled.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16):
        for seed in range(3):
            step = clip(seed=seed), tube_mask(2, GRID, 0.75)
            loss = compiled(*step)[0]
            loss.backward()
            torch.testing.assert_close(loss, model(*step)[0], atol=1e-3, rtol=1e-3)


def test_a_compiled_classifier_is_one_graph():
    classifier = Classifier(LOW, 5, (8, 32, 48), (2, 8, 8), drop_path=0.2, head_dropout=0.5)
    torch._dynamo.reset()
    run = torch.compile(classifier, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            chances = torch.rand(2, classifier.draws)
            torch.testing.assert_close(run(clip(seed=seed), chances), classifier(clip(seed=seed), chances))


def test_every_parameter_learns_and_one_batch_is_overfitted():
    torch.manual_seed(0)
    model, video, mask = VideoMAE(**SMALL), clip(), tube_mask(2, GRID, 0.75)
    video = (video.float().mean(dim=(3, 4), keepdim=True) + torch.linspace(-60, 60, 48)).clamp(0, 255).byte()
    video = video.expand(2, 8, 3, 32, 48).contiguous()  # a ramp: learnable
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


@pytest.mark.parametrize("kwargs", [dict(size="nano"), dict(target="next"), dict(loss="l3"), dict(positions="2d")])
def test_unknown_names_are_refused_with_the_known_ones(kwargs):
    with pytest.raises(ValueError, match="use one of"):
        VideoMAE(**kwargs)


def test_config_rebuilds_the_model():
    model = VideoMAE(**SMALL, decoder_depth=1, target="center", normalize=False, loss="l1")
    again = VideoMAE(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config


def test_drop_path_grows_with_depth_and_head_starts_small():
    classifier = Classifier("tiny", 5, (8, 32, 48), (2, 8, 8), drop_path=0.2)
    rates = [block.drop_path for block in classifier.encoder.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and rates == sorted(rates)
    assert classifier(clip()).abs().max() < 0.05 and classifier(clip()).shape == (2, 5)


# an independent implementation


@pytest.mark.parametrize("strategy", [tube_mask, random_mask])
@pytest.mark.parametrize("normalize", [True, False])
def test_parity_with_hugging_face(strategy, normalize):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = VideoMAE("tiny", (8, 32, 32), (2, 8, 8), normalize=normalize).eval()
    for name, parameter in ours.named_parameters():  # biases and norms are trivial at the start: make them matter
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, tubelet_size=2, hidden_size=192, num_hidden_layers=12,
        num_attention_heads=3, intermediate_size=768, decoder_hidden_size=96, decoder_num_hidden_layers=4,
        decoder_num_attention_heads=3, decoder_intermediate_size=384, layer_norm_eps=1e-6, use_mean_pooling=False,
        norm_pix_loss=normalize,
    )  # fmt: skip
    theirs = transformers.VideoMAEForPreTraining(config).eval()
    theirs.decoder.norm.eps = 1e-6  # fixed at 1e-5 there
    theirs.load_state_dict(hugging_face_names(ours), strict=True)
    video = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    mask = strategy(2, (4, 4, 4), 0.75)
    mean, std = (b.view(3, 1, 1) for b in (ours.encoder.mean, ours.encoder.std))
    with torch.no_grad():
        loss, pred = ours(video, mask)
        output = theirs((video / 255 - mean) / std, bool_masked_pos=mask)
    torch.testing.assert_close(pred, output.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, output.loss, atol=1e-5, rtol=0)
