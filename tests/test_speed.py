"""What makes it faster changes nothing: attention on CPUs, memory policies, compiling, threads."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lib import speed
from lib.variants import MODELS
from masking import tube_mask
from model import Classifier, VideoMAE

aten = torch.ops.aten
SMALL = dict(size="toy", video_size=(8, 32, 48), cube=(2, 8, 8))


def clip(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 8, 3, 32, 48), dtype=torch.uint8, generator=generator)


def tube():
    return tube_mask(torch.empty(2, 1), (4, 4, 6), 0.75)


@pytest.mark.parametrize("queries, keys", [(70, 70), (2100, 2100), (50, 20)])  # 2100: single heads
def test_attention_for_cpus_is_attention(queries, keys):
    parts = [torch.randn(2, 3, n, 16).requires_grad_() for n in (queries, keys, keys)]
    grad = torch.randn(2, 3, queries, 16)
    reference = F.scaled_dot_product_attention(*parts)
    expected = torch.autograd.grad((reference * grad).sum(), parts)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        cast = [part.detach().to(dtype) for part in parts]
        mine = speed.attention(*cast)
        torch.testing.assert_close(mine.float(), reference, atol=error, rtol=error)
        grads = speed.attention_backward(grad.to(dtype), *cast)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a.float(), b, atol=error, rtol=error)


@pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch before 2.9")
def test_the_kernel_behind_sdpa_is_replaced_for_bf16_alone(monkeypatch):
    speed.use_faster_attention()
    calls, attention = [], speed.attention
    monkeypatch.setattr(speed, "attention", lambda *x: calls.append(1) or attention(*x))
    q, k, v = (torch.randn(2, 3, 50, 16, requires_grad=True) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        half = [x.bfloat16() for x in (q, k, v)]
        ours = F.scaled_dot_product_attention(*half)
    assert calls
    torch.testing.assert_close(ours.float(), exact, atol=2e-2, rtol=2e-2)
    grads = [torch.autograd.grad(out.float().sum(), (q, k, v)) for out in (ours, exact)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)
    causal = F.scaled_dot_product_attention(*half, is_causal=True)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch before 2.9")
def test_results_lie_in_memory_as_those_of_the_kernel_that_is_replaced():
    """Compiled code relies on it: `--compile` in bf16 on a CPU stopped at the first step."""
    speed.use_faster_attention()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # PyTorch's, ours
        # Queries, keys and values as model.py makes them, and contiguous ones.
        strided = torch.randn(2, 50, 3, 3, 16, dtype=dtype).permute(2, 0, 3, 1, 4)
        for inputs in (strided, strided.contiguous()):
            out, statistic = kernel(*inputs)
            back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            grads = back(out, *inputs, out, statistic, 0.0, False)
            found.append([(x.shape, x.stride()) for x in (out, statistic, *grads)])
    assert found[:2] == found[2:]


def test_sharp_attention_in_bf16_rounds_logits_no_more_than_once():
    """Logits of up to 60, with an error of one in 256."""
    q, k, v = (4 * torch.randn(1, 2, 400, 64) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    mine = speed.attention(*(x.bfloat16() for x in (q, k, v))).float()
    assert (mine - exact).norm() / exact.norm() < 0.03


def kept(model, *args):
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    found, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(*args)
    return sum(size for pointer, size in found.items() if pointer not in own)


@pytest.mark.parametrize("name", ["videomae", "cross"])
@pytest.mark.parametrize("how", ["less", "least"])
def test_memory_policies_change_no_gradient(name, how):
    torch.manual_seed(0)
    model, mask = MODELS[name](**SMALL), tube()
    model(clip(), mask)[0].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    speed.save_memory(model, how)
    model(clip(), mask)[0].backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_memory_policies_repeat_random_numbers_and_keep_less():
    classifier = Classifier(**SMALL, classes=5, drop_path=0.5)
    grads, bytes_kept = [], {}
    for how in ("fast", "less", "least"):
        speed.save_memory(classifier, how)
        torch.manual_seed(1)
        classifier.zero_grad()
        classifier(clip()).square().sum().backward()
        grads.append(classifier.encoder.blocks[0].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])
    for how in ("fast", "less", "least"):
        model = VideoMAE(**SMALL)
        speed.save_memory(model, how)
        bytes_kept[how] = kept(model, clip(), tube())
    assert bytes_kept["less"] < 0.6 * bytes_kept["fast"]
    assert bytes_kept["least"] < 0.3 * bytes_kept["fast"]


def test_less_computes_the_mlp_again_but_not_attention():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            products = (aten.mm.default, aten.addmm.default)
            seen.append((op, tuple(args[-1].shape) if op in products else None))
            return op(*args, **(kwargs or {}))

    model = VideoMAE(**SMALL)
    loss = {}
    for how in ("fast", "less"):
        speed.save_memory(model, how)
        loss[how] = model(clip(), tube())[0]
    again = {}
    for how in loss:
        seen.clear()
        with Watch():
            loss[how].backward(retain_graph=True)
        again[how] = collections.Counter(seen)
    more = again["less"] - again["fast"]
    dim, decoder_dim = 128, 96
    for width, depth in ((dim, 4), (decoder_dim, 2)):
        assert more[aten.addmm.default, (width, 4 * width)] == depth  # fc1
        assert (aten.addmm.default, (width, 3 * width)) not in more  # qkv
        assert (aten.addmm.default, (4 * width, width)) not in more  # fc2
    assert not any("attention" in str(op) for op, _ in more)


def one_block(model):
    """With the last block of the encoder alone: compiling takes time per block."""
    model.encoder.blocks = model.encoder.blocks[-1:]
    return model


def test_a_compiled_step_is_compiled_once_and_gives_the_same():
    """Other masks and videos need no other graph."""
    torch._dynamo.reset()
    model = one_block(VideoMAE(**SMALL, decoder_depth=1))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(clip(), tube())[0].backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            step = clip(seed), tube()
            torch.testing.assert_close(compiled(*step)[0], model(*step)[0], atol=1e-5, rtol=1e-5)


def test_a_compiled_classifier_is_one_graph():
    torch._dynamo.reset()
    classifier = one_block(Classifier(**SMALL, classes=5, drop_path=0.2, head_dropout=0.5))
    run = torch.compile(classifier, backend="eager", fullgraph=True)  # finding graphs is all
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert all(run(clip(seed)).shape == (2, 5) for seed in range(3))


def test_narrow_models_take_one_thread(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    speed.place(VideoMAE(**SMALL), torch.device("cpu"))
    assert seen == [1]
    speed.place(VideoMAE("tiny", (4, 32, 32)), torch.device("cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    speed.place(VideoMAE(**SMALL), torch.device("cpu"))
    assert seen == [1]
