"""Gradients of attention beside those of the reference."""

import torch

from vitfast import testing
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import DTYPES, guarded, make

FP32, FP16, BF16 = DTYPES


def inputs(batch, queries, keys, heads, head_dim, dtype=FP32, scale=1.0):
    """q [B, N, H, D], k and v [B, S, H, D] in memory surrounded by poison."""
    lengths = (queries, keys, keys)
    return [
        guarded(make(batch, n, heads, head_dim, dtype=dtype, seed=seed, scale=scale)) for seed, n in enumerate(lengths)
    ]


def random_mask(*shape, keep=0.7, seed=9):
    """A bool mask that lets a share of `keep` be seen."""
    generator = torch.Generator().manual_seed(seed)
    return guarded((torch.rand(*shape, generator=generator) < keep).to(testing.device()))


def autograd(dout, q, k, v, *, bias=None, upcast=False, **kwargs):
    """Torch's gradients of the reference for q, k, v and bias, in float64 (upcast) or in the inputs' dtype."""
    leaves = [t.detach().double() if upcast else t.detach() for t in (q, k, v, bias) if t is not None]
    leaves = [t.clone().requires_grad_() for t in leaves]
    with torch.enable_grad():
        out = reference.attention(*leaves[:3], bias=leaves[3] if bias is not None else None, upcast=upcast, **kwargs)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))


def recomputed(dout, q, k, v, *, bias=None, mask=None, right=None, scale=None):
    """The same in plain torch, where the backward recomputes the weights from the rows' maxima and sums.

    Torch's own gradient keeps the weights, and its error in fp32 is smaller: no product q kᵀ is summed in one order in
    the forward and in another in the backward (here by halves of the head).
    """
    dout, q, k, v = (t.transpose(1, 2) for t in (dout, q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen = (seen if right is None else seen.tril(right)) & (True if mask is None else mask)

    def finish(products):  # scaled, biased and masked scores
        scores = products * scale + (0.0 if bias is None else bias)
        return scores.masked_fill(~seen, float("-inf"))

    scores = finish(q @ k.mT)
    largest = scores.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    total = (scores - largest).exp().sum(-1, keepdim=True)
    total = total.masked_fill(total == 0.0, 1.0)
    delta = (dout * ((scores - largest).exp() / total @ v)).sum(-1, keepdim=True)
    half = q.shape[-1] // 2
    products = q[..., :half] @ k[..., :half].mT + q[..., half:] @ k[..., half:].mT
    weights = (finish(products) - largest).exp() / total
    dscores = weights * (dout @ v.mT - delta)
    grads = [t.transpose(1, 2) for t in (dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ dout)]
    return grads if bias is None else [*grads, dscores.sum_to_size(bias.shape)]


def compare(actual, dout, *inputs, **kwargs):
    """assert_close with float64 autograd; the baseline is torch's gradient, in fp32 the worse of that and `recomputed`.

    Args:
        actual: gradients of q, k, v and, if there is one, bias. dout: of the output. inputs, kwargs: as `autograd` has.
    """
    oracle, baseline = (list(autograd(dout, *inputs, **kwargs, upcast=upcast)) for upcast in (True, False))
    actual = list(actual)
    if dout.dtype == FP32:
        for i, other in enumerate(recomputed(dout, *inputs, **kwargs)):
            if (other - oracle[i]).abs().max() > (baseline[i] - oracle[i]).abs().max():
                baseline[i] = other
    # A gradient of 0 where terms cancel (a bias that is the same for all keys changes nothing): the
    # error is measured against the size of such terms, for which dv stands.
    for i, want in enumerate(oracle):
        if want.numel() and not want.abs().max() > 1e-12 * oracle[2].abs().max():
            actual[i], oracle[i], baseline[i] = (
                torch.cat([t[i].flatten(), t[2].to(t[i].dtype).flatten()]) for t in (actual, oracle, baseline)
            )
    assert_close(actual, oracle, baseline, what="gradient")
