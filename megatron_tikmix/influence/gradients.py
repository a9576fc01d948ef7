"""Inner products of gradients, shard by shard."""

from collections.abc import Iterable, Iterator

import torch

# Elements of the (V, chunk) block that is converted to float64 at a time, by device: large for few
# launches on an accelerator, and small for the cache of a CPU.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ELSEWHERE = 1 << 24
# And of a small model no more than a part of the gradient, so that it takes no memory to speak of.
_PARTS, _LEAST = 16, 4096


def inner_products(tasks_VP: torch.Tensor, gradient: Iterable[torch.Tensor]) -> torch.Tensor:
    """⟨task_i, gradient⟩ for every task i, over the parameters this rank holds.

    Partial: an inner product is a sum over parameters, so the sum of this over the ranks
    that share the parameters out is the whole one.

    Args:
        tasks_VP: preconditioned validation gradients, any float dtype, (V, P).
        gradient: a domain sub-batch's gradient in pieces, flat, P elements in all. They may be
            views of megatron-core's gradient buffer: nothing of the size of P is made.

    Returns:
        float64 (V,), on the CPU. Summed in float64: an influence is a small difference of
        many large terms.
    """
    V, P = tasks_VP.shape
    products_V = torch.zeros(V, dtype=torch.float64, device=tasks_VP.device)
    first = 0
    block = _BLOCK.get(tasks_VP.device.type, _BLOCK_ELSEWHERE)
    for chunk in _chunks(gradient, max(_LEAST, min(block // V, P // _PARTS))):
        last = first + chunk.numel()
        products_V += tasks_VP[:, first:last].double() @ chunk.double()
        first = last
    if first != P:
        raise ValueError(f"a gradient of {first} elements against {P}")
    return products_V.cpu()


def _chunks(pieces: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The pieces cut and put together to chunks of `size` elements, the last one shorter."""
    held: list[torch.Tensor] = []
    room = size
    for piece in pieces:
        while piece.numel() >= room:
            yield torch.cat([*held, piece[:room]]) if held else piece[:room]
            piece, held, room = piece[room:], [], size
        if piece.numel():
            held.append(piece)
            room -= piece.numel()
    if held:
        yield torch.cat(held)
