"""What makes it faster or smaller and is not the paper. model.py knows nothing of it.

place        moves a model to its device; on a CPU, chooses threads and an attention kernel
save_memory  recomputes activations instead of keeping them, from outside of the model
"""

import os
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def save_memory(model: nn.Module, how: str) -> None:
    """Choose which activations the blocks of a model keep for the backward pass.

    fast   all of them
    less   all but those inside the MLPs: first layer and GELU are computed again
    least  the input of each block alone; everything else is computed again

    A compiled model needs neither: the compiler chooses by itself.
    """
    if how == "fast":
        return
    # DropPath must drop the same clips again. An MLP draws no random numbers.
    save = partial(checkpoint, use_reentrant=False, preserve_rng_state=how == "least")
    for stack in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
        for block in stack:
            part = block.mlp if how == "less" else block
            # As an attribute of the object, it hides the method of its class.
            part.forward = partial(save, part.forward)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device. On a CPU, choose the number of threads and the attention kernel.

    Narrow models get one thread. Their matrix products are so short that threads mostly wait for
    each other. They wait by spinning: a toy step took 45 times longer as soon as another process
    used one of two cores. OMP_NUM_THREADS in the environment beats this choice.
    """
    if device.type == "cpu":
        use_faster_attention()
        dim = model.get_parameter("encoder.patch_embed.weight").shape[0]
        if dim < 192 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    return model.to(device)


# ---------------------------------------------------------------------- attention on CPUs, in bf16

# PyTorch's fused kernel takes about twice as long as plain matrix products whose attention weights
# stay in the cache of the processor. The logits are rounded to bf16 here, unlike there: errors are
# about twice as large. Float32, masks, dropout and GPUs keep PyTorch's kernel.

KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
LIBRARY = torch.library.Library("aten", "IMPL")
CACHED = 2**22  # attention weights at a time


def use_faster_attention() -> None:
    """Replace the kernel behind F.scaled_dot_product_attention for bf16 on CPUs, once."""
    if not hasattr(torch.library, "get_kernel") or getattr(LIBRARY, "installed", False):
        return  # older than torch 2.9: keep PyTorch's
    LIBRARY.installed = True
    theirs = torch.library.get_kernel(f"aten::{KERNEL}", "CPU")
    theirs_backward = torch.library.get_kernel(f"aten::{KERNEL}_backward", "CPU")

    def plain(q, dropout=0.0, causal=False, attn_mask=None, scale=None) -> bool:
        special = dropout or causal or attn_mask is not None or scale is not None
        return q.dtype == torch.bfloat16 and not special

    def attend(keys, q, k, v, *rest, **options):
        if plain(q, *rest, **options):
            # The second result, a statistic that only their backward needs, stays empty.
            batch, heads, queries, _ = q.shape
            statistic = q.new_empty(batch, queries, heads, dtype=torch.float32).transpose(1, 2)
            return attention(q, k, v), statistic
        return theirs.call_boxed(keys, q, k, v, *rest, **options)

    def attend_backward(keys, grad, q, k, v, out, statistic, *rest, **options):
        if plain(q, *rest, **options):
            return attention_backward(grad, q, k, v)
        return theirs_backward.call_boxed(keys, grad, q, k, v, out, statistic, *rest, **options)

    how = dict(dispatch_key="CPU", with_keyset=True, allow_override=True)
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # by torch 2.11
    LIBRARY.impl(KERNEL, attend, **how)
    LIBRARY.impl(f"{KERNEL}_backward", attend_backward, **how)


def in_cache(*tensors: Tensor, weights: int):
    """Some heads of several (B, heads, N, d) at a time: as many as the cache holds weights of."""
    few = max(CACHED // weights, 1)
    heads = [tensor.flatten(0, 1) for tensor in tensors]
    # A single head goes without a dimension for heads: its products are faster.
    parts = (x.unbind() if few == 1 else x.split(few) for x in heads)
    return zip(*parts, strict=True)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, N, d) each."""
    out = torch.empty(q.shape, dtype=q.dtype)
    q = q * q.shape[-1] ** -0.5
    for qi, ki, vi, part in in_cache(q, k, v, out, weights=q.shape[2] * k.shape[2]):
        torch.matmul((qi @ ki.mT).softmax(dim=-1), vi, out=part)
    return torch.empty_like(q).copy_(out)  # in memory like q: compiled code relies on it


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, given that of attention. The weights are computed again."""
    scale = q.shape[-1] ** -0.5
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    heads = in_cache(q * scale, k, v, grad, *grads, weights=q.shape[2] * k.shape[2])
    for qi, ki, vi, g, dq, dk, dv in heads:
        weights = (qi @ ki.mT).softmax(dim=-1)
        torch.matmul(weights.mT, g, out=dv)
        dlogits = torch.ops.aten._softmax_backward_data(g @ vi.mT, weights, -1, weights.dtype)
        torch.matmul(dlogits, ki, out=dq).mul_(scale)
        torch.matmul(dlogits.mT, qi, out=dk)
    # In memory (B, N, heads, d), like those of PyTorch's kernel: compiled code relies on it.
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads)
