"""Inner products and curvature, against numpy in float64."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.measure.curvature import CURVATURES, DampedDiagonal, Identity
from megatron_tikmix.measure.gradients import inner_products


def test_inner_products_over_several_chunks() -> None:
    P = 300_017
    generator = torch.Generator().manual_seed(0)
    tasks_VP = torch.randn(3, P, generator=generator)
    gradient_P = torch.randn(P, generator=generator)
    expected = tasks_VP.double().numpy() @ gradient_P.double().numpy()
    np.testing.assert_allclose(
        inner_products(tasks_VP, gradient_P.split([5, 7, P - 13, 1])).numpy(), expected, rtol=1e-12
    )


def test_shards_add_up_to_the_whole() -> None:
    tasks_VP, gradient_P = torch.randn(2, 100), torch.randn(100)
    parts = inner_products(tasks_VP[:, :37], [gradient_P[:37]])
    parts += inner_products(tasks_VP[:, 37:], [gradient_P[37:]])
    torch.testing.assert_close(parts, inner_products(tasks_VP, [gradient_P]))


def test_a_gradient_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="3 elements against 4"):
        inner_products(torch.zeros(2, 4), [torch.zeros(3)])


def test_adam_is_damped_relative_to_the_mean_root() -> None:
    second_moment_P = torch.tensor([0.0, 4.0, 16.0])
    curvature = DampedDiagonal("adam", second_moment_P, mean_root=2.0, damping=0.1)
    torch.testing.assert_close(
        curvature.precondition(torch.ones(3)), torch.tensor([1 / 0.2, 1 / 2.2, 1 / 4.2])
    )


def test_adam_influence_does_not_depend_on_the_scale_of_the_loss() -> None:
    """v grows with the square of the gradient's scale, so S grows linearly: rankings stay."""
    gradient_P, second_moment_P = torch.randn(50), torch.rand(50)
    mean_root = second_moment_P.sqrt().mean().item()
    large = DampedDiagonal("adam", 1e6 * second_moment_P, mean_root=1e3 * mean_root, damping=0.1)
    small = DampedDiagonal("adam", second_moment_P, mean_root=mean_root, damping=0.1)
    torch.testing.assert_close(
        large.precondition(1e3 * gradient_P), small.precondition(gradient_P.clone())
    )


def test_where_there_never_was_a_gradient_the_scale_is_finite() -> None:
    curvature = DampedDiagonal("adam", torch.zeros(3), mean_root=0.0, damping=0.1)
    assert torch.equal(curvature.precondition(torch.zeros(3)), torch.zeros(3))


def test_identity_leaves_the_gradient_as_it_is() -> None:
    gradient_P = torch.randn(5)
    assert torch.equal(Identity().precondition(gradient_P), gradient_P)


def test_every_curvature_of_the_configuration_can_be_fitted() -> None:
    names = get_args(get_type_hints(ProbeConfig)["curvature"])
    assert set(CURVATURES) == set(names)
