"""Inner products of gradients, shard by shard."""

import torch

# Elements converted to float64 at a time: bounds the extra memory to a few megabytes a row.
_CHUNK = 1 << 18


def inner_products(tasks_VP: torch.Tensor, gradient_P: torch.Tensor) -> torch.Tensor:
    """⟨task_i, gradient⟩ for every task i, over the parameters this rank holds.

    Partial: an inner product is a sum over parameters, so the sum of this over the ranks
    that share the parameters out is the whole one.

    Args:
        tasks_VP: preconditioned validation gradients, any float dtype, (V, P).
        gradient_P: a domain sub-batch's gradient, (P,).

    Returns:
        float64 (V,), on the CPU. Summed in float64: an influence is a small difference of
        many large terms.
    """
    products_V = torch.zeros(tasks_VP.shape[0], dtype=torch.float64, device=tasks_VP.device)
    for chunk_VP, chunk_P in zip(
        tasks_VP.split(_CHUNK, dim=1), gradient_P.split(_CHUNK), strict=True
    ):
        products_V += chunk_VP.double() @ chunk_P.double()
    return products_V.cpu()
