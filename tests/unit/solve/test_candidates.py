import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.candidates import propose_candidates, slice_sample
from megatron_tikmix.solve.constraints import DomainGroup
from tests.solving import limited


def mixture(weights_D):
    return Mixture({f"domain{d:04}": w for d, w in enumerate(np.asarray(weights_D).tolist())})


@settings(deadline=None, max_examples=40)
@given(
    domains=st.one_of(st.integers(1, 40), st.sampled_from([150, 1000])),
    concentration=st.sampled_from([0.2, 1.0, 20.0]),
    zeros=st.booleans(),
    scales=st.sampled_from([(0.5, 2.0), (0.9, 1.1), (0.0, 1.2), (0.5, 30.0)]),
    seed=st.integers(0, 99),
)
def test_candidates_are_mixtures_in_the_box(domains, concentration, zeros, scales, seed):
    rng = np.random.default_rng(seed)
    centre_D = rng.dirichlet(np.full(domains, concentration)).clip(1e-9)
    if zeros:
        centre_D[rng.random(domains) < 0.3] = 0
        centre_D[0] += 0.1
    centre = mixture(centre_D)
    centre_D = centre.array()
    count = 16 if domains > 100 else 50
    found_ND = propose_candidates(centre, count, scales=scales, seed=seed)
    assert found_ND.shape == (count, domains)
    np.testing.assert_allclose(found_ND.sum(axis=1), 1, atol=1e-12)
    assert (found_ND >= scales[0] * centre_D - 1e-15).all()
    assert (found_ND <= scales[1] * centre_D + 1e-15).all()
    assert (found_ND[:, centre_D == 0] == 0).all()
    if (centre_D > 0).sum() > 1:
        assert len(np.unique(found_ND, axis=0)) == count
    np.testing.assert_array_equal(
        found_ND, propose_candidates(centre, count, scales=scales, seed=seed)
    )


def test_another_seed_gives_other_candidates():
    centre = mixture([0.2, 0.3, 0.5])
    one, other = (propose_candidates(centre, 9, seed=seed) for seed in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("domains", [3, 4, 5])
def test_slice_sampler_is_even(domains):
    # Against rejection: Dirichlet(1, …, 1) is even on the simplex, so what falls in the box is
    # even on the slice.
    centre_D = np.random.default_rng(domains).dirichlet(np.full(domains, 3.0))
    lower_D, upper_D = 0.5 * centre_D, 2 * centre_D
    rng = np.random.default_rng(1)
    even_ND = rng.dirichlet(np.ones(domains), 400_000)
    even_ND = even_ND[((even_ND >= lower_D) & (even_ND <= upper_D)).all(axis=1)]
    ours_ND = slice_sample(lower_D, upper_D, centre_D, 20_000, rng)
    error = 4 * even_ND.std(axis=0) * np.sqrt(1 / len(even_ND) + 1 / len(ours_ND))
    assert (abs(ours_ND.mean(axis=0) - even_ND.mean(axis=0)) < error).all()
    np.testing.assert_allclose(np.cov(ours_ND.T), np.cov(even_ND.T), atol=0.06 * ours_ND.var())


def test_slice_sampler_fills_the_box_with_many_domains():
    centre_D = np.full(400, 1 / 400)
    ours_ND = slice_sample(centre_D / 2, 2 * centre_D, centre_D, 50, np.random.default_rng(0))
    # With so many domains the weights are as good as independent: exp(−rate·w) on the box, the
    # rate being the one that leaves their mean at 1/400.
    share = ours_ND.ravel() * 400
    grid = np.linspace(0.5, 2, 4001)
    rates = np.linspace(0, 3, 3001)
    density = np.exp(-rates[:, None] * grid)
    means = (density * grid).sum(axis=1) / density.sum(axis=1)
    tilted = density[abs(means - 1).argmin()]
    for q in (0.1, 0.5, 0.9):
        expected = grid[np.searchsorted(np.cumsum(tilted) / tilted.sum(), q)]
        assert np.quantile(share, q) == pytest.approx(expected, abs=0.03)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), tight=st.booleans())
def test_constraints_are_kept(seed, tight):
    rng = np.random.default_rng(seed)
    domains = int(rng.integers(6, 40))
    two_2D = rng.dirichlet(np.full(domains, 5.0), 2)
    two_2D[:, 3] = 0.1 * (two_2D.sum(axis=1) - two_2D[:, 3]) / 0.9  # the same share in both
    prior, centre = map(mixture, two_2D)
    names = centre.domains
    moved = centre.total_variation(prior)
    group, fixed = names[:3], names[3]
    least, most = sorted(sum(m[name] for name in group) for m in (centre, prior))
    constraints = limited(
        upper={names[4]: max(centre[names[4]], prior[names[4]])},
        fixed=[fixed],
        # Tight: the centre is at the limit of the change and on the group's bound.
        max_total_variation=moved if tight else min(1.5 * moved, 1.0),
        groups={"some": DomainGroup(domains=group, lower=least, upper=most)},
    )
    found_ND = propose_candidates(centre, 30, constraints=constraints, prior=prior, seed=seed)
    np.testing.assert_allclose(found_ND.sum(axis=1), 1, atol=1e-12)
    assert (found_ND >= 0).all()
    summed_N = found_ND[:, :3].sum(axis=1)
    assert (summed_N >= least - 1e-9).all()
    assert (summed_N <= most + 1e-9).all()
    np.testing.assert_allclose(found_ND[:, 3], 0.1, atol=1e-9)
    assert (found_ND[:, 4] <= constraints.upper[names[4]] + 1e-9).all()
    change_N = 0.5 * abs(found_ND - prior.array()).sum(axis=1)
    assert (change_N <= constraints.max_total_variation + 1e-9).all()
    assert len(np.unique(found_ND.round(12), axis=0)) == 30


def test_a_group_of_fixed_weight_leaves_the_others_free():
    centre = mixture(np.full(8, 1 / 8))
    half = DomainGroup(domains=centre.domains[:4], lower=0.5, upper=0.5)
    constraints = limited(groups={"half": half}, max_total_variation=None)
    found_ND = propose_candidates(centre, 20, constraints=constraints)
    np.testing.assert_allclose(found_ND[:, :4].sum(axis=1), 0.5, atol=1e-9)
    assert found_ND.std(axis=0).min() > 0.01
    assert len(np.unique(found_ND.round(12), axis=0)) == 20


def test_one_mixture_is_all_that_is_left():
    assert (propose_candidates(mixture([1.0]), 5) == 1).all()
    only = propose_candidates(mixture([0.25, 0.75]), 5, scales=(1.0, 1.0))
    np.testing.assert_array_equal(only, np.tile([0.25, 0.75], (5, 1)))


def test_bad_arguments_are_told_in_a_sentence():
    centre = mixture([0.5, 0.5])
    with pytest.raises(InputError, match="count is 0"):
        propose_candidates(centre, 0)
    with pytest.raises(InputError, match=r"0 ≤ least ≤ 1 ≤ most"):
        propose_candidates(centre, 3, scales=(1.2, 2.0))
    constraints = limited(upper={"domain0000": 0.4})
    with pytest.raises(InputError, match="the centre breaks the constraint upper:domain0000"):
        propose_candidates(centre, 3, constraints=constraints)
