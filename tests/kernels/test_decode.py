"""Attention of new tokens to their caches, against the equation in float64."""

import pytest
import torch
import torch.nn.functional as F

from graftlm.kernels.decode import NewToken, attend_new, serves

SEEN = [(1, 0, 0, 1), (3, 0, 0, 37), (4, 5, 20, 50), (6, 2, 2, 100)]
"""(token of the pass, always, first, length)"""


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("H", "G", "D", "D_v"), [(9, 3, 64, 64), (4, 4, 16, 32), (8, 1, 32, 16)])
def test_new_tokens_attend_to_their_own_caches(
    dtype: torch.dtype, tolerance: float, H: int, G: int, D: int, D_v: int
) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 7, heads, D).to(dtype).transpose(1, 2) for heads in (H, G))
    v, out = torch.randn(1, G, 7, D_v).to(dtype), torch.zeros(7, H, D_v, dtype=dtype)
    if not serves(q, k, v):
        pytest.skip("there is no C++ compiler here")
    tokens, wanted = [], []
    for token, always, first, length in SEEN:
        keys, values = torch.randn(G, 120, D).to(dtype), torch.randn(G, 120, D_v).to(dtype)
        tokens.append(NewToken(token, keys.clone(), values.clone(), always, first, length))
        keys[:, length - 1], values[:, length - 1] = k[0, :, token], v[0, :, token]
        seen = [*range(always), *range(first, length)]
        queries = q[0, :, token].double().view(G, H // G, D)
        expected = F.scaled_dot_product_attention(queries, keys[:, seen].double(), values[:, seen].double(), scale=0.2)
        wanted.append((token, expected.reshape(H, D_v), keys, values))
    attend_new(q, k, v, out, tokens, 0.2)
    for new, (token, expected, keys, values) in zip(tokens, wanted, strict=True):
        assert (out[token].double() - expected).abs().max() < tolerance
        assert torch.equal(new.keys, keys), "the new key is written, and no other"
        assert torch.equal(new.values, values)
    assert not out[[0, 2, 5]].any(), "the other tokens of the pass are left alone"
