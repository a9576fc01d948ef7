"""MixtureSurrogate: what a mixture would do to each task, learnt from measured candidates.

Its smooth part is two regressions of an outcome on the mixture's weights. Both take weights of any
size, zeros included, and a standardised outcome (mean 0, standard deviation 1), and have
``fit(weights_ND, outcome_N)`` and ``predict(weights_ND) -> (N,)``.
"""

from dataclasses import dataclass

import lightgbm
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.stats import spearmanr

from megatron_tikmix.errors import InputError

Array = NDArray[np.float64]


class MixingLaw:
    """A scaling law in what a task makes of each domain's tokens:

        s(w) = e + Σ_j k_j (D w_j)^q         k_j > 0: what domain j is worth to the task
        y(w) = c + b (s^−p − 1) / p          a power of s; a logarithm as p goes to 0

    It saturates in each weight (q < 1) and in their sum (p > 0), is finite at zero weights (e > 0),
    and falls or rises (the sign of b). That is the shape of real runs, so a law with D + 5
    parameters needs few candidates; the mixing laws of Ye et al. (arXiv 2403.16952) are its kin.

    Penalised least squares in the logarithms of k, e, p and q, by L-BFGS: the penalty pulls all
    domains to the same worth.
    """

    _NOISE = 0.1  # of the outcome, in its standard deviations; the spread of ln k is taken as 1
    _SHAPE = (0.1, 0.3, 0.6)  # e, p, q where the data say nothing
    _SHAPE_LEAST, _SHAPE_MOST = (1e-4, 0.02, 0.1), (30.0, 4.0, 2.0)
    _SLOPE = 0.5  # |b| where the data say nothing
    _SPREAD = 3.0  # of b, and of the logarithms of e, p, q
    _LARGEST_LOG_RATIO = 8.0  # of a k to the k where the data say nothing

    def fit(self, weights_ND: Array, outcome_N: Array) -> "MixingLaw":
        """Both signs of b are tried, and the better fit is kept."""
        n_domains = weights_ND.shape[1]
        shares_ND = n_domains * weights_ND
        slope_D = _ridge_slope(np.sqrt(shares_ND), outcome_N)
        logs_ND = _logarithms(shares_ND)
        fits = [self._descend(sign, slope_D, logs_ND, outcome_N) for sign in (1.0, -1.0)]
        self._theta: Array = min(fits, key=lambda fit: fit[0])[1]
        self._constant = 0.0
        self._constant = float(outcome_N.mean() - self.predict(weights_ND).mean())
        return self

    def _descend(
        self, sign: float, slope_D: Array, logs_ND: Array, outcome_N: Array
    ) -> tuple[float, Array]:
        """The penalised loss and its parameters: ln k (D,), ln e, ln p, ln q, b.

        `sign` is that of b to start from; `slope_D`, of a linear fit, says which k to start from.
        """
        n_domains = len(slope_D)
        equal = -np.log(n_domains)
        centre = np.array([equal] * n_domains + [*np.log(self._SHAPE), sign * self._SLOPE])
        precision = np.full(len(centre), self._NOISE**2)
        precision[n_domains:] /= self._SPREAD**2
        worth_D = (-sign * slope_D).clip(min=0)
        start = centre.copy()
        start[:n_domains] += np.log(worth_D / (worth_D.mean() or 1.0) + 0.05)
        room = self._LARGEST_LOG_RATIO
        least, most = np.log(self._SHAPE_LEAST), np.log(self._SHAPE_MOST)
        bounds = [(equal - room, equal + room)] * n_domains
        bounds += [*zip(least.tolist(), most.tolist(), strict=True), (-np.inf, np.inf)]

        def loss(theta: Array) -> tuple[float, Array]:
            value, gradient = self._squares(theta, logs_ND, outcome_N)
            away = theta - centre
            return value + 0.5 * float(away @ (precision * away)), gradient + precision * away

        answer = minimize(
            loss,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 150, "maxcor": 20, "ftol": 1e-7, "gtol": 1e-4},
        )
        return float(answer.fun), answer.x

    def predict(self, weights_ND: Array) -> Array:
        """y(w), float64 (N,)."""
        logs_ND = _logarithms(weights_ND.shape[1] * weights_ND)
        _, _, power_N, _ = self._parts(self._theta, logs_ND)
        return self._constant + self._theta[-1] * power_N

    @staticmethod
    def _parts(theta: Array, logs_ND: Array) -> tuple[Array, Array, Array, Array]:
        """(D w)^q, s, (s^−p − 1)/p and s^−p."""
        e, p, q = np.exp(theta[-4:-1])
        powers_ND = np.exp(q * logs_ND)  # 0 where the logarithm is −inf
        sum_N = e + powers_ND @ np.exp(theta[:-4])
        decay_N = sum_N**-p
        return powers_ND, sum_N, (decay_N - 1) / p, decay_N

    def _squares(self, theta: Array, logs_ND: Array, outcome_N: Array) -> tuple[float, Array]:
        """Half the sum of squared residuals, the constant taken out, and its gradient."""
        e, _, q = np.exp(theta[-4:-1])
        powers_ND, sum_N, power_N, decay_N = self._parts(theta, logs_ND)
        residual_N = theta[-1] * power_N - outcome_N
        residual_N = residual_N - residual_N.mean()
        by_sum_N = -theta[-1] * decay_N / sum_N * residual_N  # d loss / d s
        worth_D = np.exp(theta[:-4])
        finite_logs_ND = np.where(powers_ND > 0, logs_ND, 0.0)
        gradient = np.concatenate(
            [
                (by_sum_N @ powers_ND) * worth_D,
                [
                    by_sum_N.sum() * e,
                    theta[-1] * (residual_N @ (-np.log(sum_N) * decay_N - power_N)),
                    by_sum_N @ ((powers_ND * finite_logs_ND) @ worth_D) * q,
                    residual_N @ power_N,
                ],
            ]
        )
        return 0.5 * float(residual_N @ residual_N), gradient


class LogRidge:
    """Ridge regression on the logarithms of the weights, its penalty by leave-one-out error.

    The fit to fall back on where outcomes are few and noisy. Weights get a floor of one
    hundredth of the uniform weight before the logarithm: finite at zero.
    """

    _FLOOR = 0.01
    _PENALTIES = 10.0 ** np.arange(-3, 2.1, 0.5)  # per candidate, on standardised features

    def fit(self, weights_ND: Array, outcome_N: Array) -> "LogRidge":
        logs_ND = self._features(weights_ND)
        spread_D = logs_ND.std(axis=0)
        self._mean_D, self._spread_D = logs_ND.mean(axis=0), np.where(spread_D > 1e-9, spread_D, 1)
        features_ND = (logs_ND - self._mean_D) / self._spread_D
        self._constant = float(outcome_N.mean())
        centred_N = outcome_N - self._constant
        count = len(outcome_N)
        left, singular, right = np.linalg.svd(features_ND, full_matrices=False)
        along = left.T @ centred_N

        def left_out_error(penalty: float) -> float:
            kept = singular**2 / (singular**2 + penalty * count)
            leverage_N = left**2 @ kept + 1 / count
            errors_N = (centred_N - left @ (kept * along)) / (1 - leverage_N).clip(min=0.02)
            return float(errors_N @ errors_N)

        penalty = min(self._PENALTIES.tolist(), key=left_out_error)
        self._slope_D = right.T @ (singular / (singular**2 + penalty * count) * along)
        return self

    def predict(self, weights_ND: Array) -> Array:
        features_ND = (self._features(weights_ND) - self._mean_D) / self._spread_D
        return self._constant + features_ND @ self._slope_D

    def _features(self, weights_ND: Array) -> Array:
        return np.log(weights_ND.shape[1] * weights_ND + self._FLOOR)


def _logarithms(values_ND: Array) -> Array:
    """Natural logarithms, −inf for zeros, without a warning."""
    return np.log(values_ND, out=np.full_like(values_ND, -np.inf), where=values_ND > 0)


def _ridge_slope(features_ND: Array, outcome_N: Array) -> Array:
    """Slopes of a lightly penalised linear fit, (D,), through the smaller Gram matrix."""
    count, n_features = features_ND.shape
    centred_ND = features_ND - features_ND.mean(axis=0)
    penalty = 0.05 * count
    if n_features <= count:
        gram = centred_ND.T @ centred_ND + penalty * np.eye(n_features)
        return np.linalg.solve(gram, centred_ND.T @ outcome_N)
    gram = centred_ND @ centred_ND.T + penalty * np.eye(count)
    return centred_ND.T @ np.linalg.solve(gram, outcome_N)


FEWEST_CANDIDATES = 10
"""Fewer cannot be fitted and held out in turn."""

_FOLDS = 5
_ROUNDING = 1e-12  # an outcome that varies by less, relative to its size, is a constant


@dataclass(frozen=True, eq=False)
class SurrogateSkill:
    """How well outcomes are predicted for candidates that were not fitted."""

    spearman_V: Array
    """Rank correlation of prediction and outcome per task; 0 where either is constant."""

    r2_V: Array
    """1 − (squared error) / (squared deviation from the mean) per task; 0 for a constant one."""

    predictions_NV: Array
    """The predictions themselves, each made without its own candidate (in `repeats` rounds:
    their mean)."""


class MixtureSurrogate:
    """Regression of outcomes on mixtures: one model per task, LightGBM trees on a smooth fit.

        prediction = ρ · MixingLaw + (1 − ρ) · LogRidge + trees(weights)

    The law needs few candidates, the ridge holds where outcomes are noisy, and the trees
    (LightGBM, on what the two leave over) learn what has no such shape. How much of each is
    decided per task by 5-fold cross-validation within the candidates given: ρ by least squares on
    held-out predictions, the number of trees (none, often, for few candidates) by held-out
    error. Why these parts and not others: docs/mixing.md, with figures on 512 real runs.

    An outcome is any number that depends on the mixture (a loss, a gain, of any unit).
    Scaling or shifting it scales or shifts its predictions. Same seed and input, same bits.

    Args:
        seed: of the folds and of LightGBM, 0 to 2³¹ − 1.
        max_trees: most trees per task.
        num_leaves, min_data_in_leaf, learning_rate: LightGBM's, of the trees. Its own defaults
            (31 leaves of at least 20) give nearly a constant for some tens of candidates.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        max_trees: int = 400,
        num_leaves: int = 4,
        min_data_in_leaf: int = 8,
        learning_rate: float = 0.02,
    ) -> None:
        if not 0 <= seed < 2**31:
            raise InputError(f"seed is {seed}; it must be from 0 to 2**31 - 1")
        if max_trees < 0 or num_leaves < 2 or min_data_in_leaf < 1 or not 0 < learning_rate <= 1:
            raise InputError(
                f"max_trees, num_leaves, min_data_in_leaf and learning_rate are {max_trees}, "
                f"{num_leaves}, {min_data_in_leaf} and {learning_rate}; give at least 0, 2, 1 and "
                "a rate above 0 and at most 1"
            )
        self._seed = seed
        self._max_trees = max_trees
        self._parameters = {
            "objective": "regression",
            "metric": "l2",
            "num_leaves": num_leaves,
            "min_data_in_leaf": min_data_in_leaf,
            "learning_rate": learning_rate,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "feature_pre_filter": False,
            "verbosity": -1,
        }
        self._models: list[_TaskModel] | None = None
        self._n_domains = 0

    def fit(self, weights_ND: ArrayLike, outcomes_NV: ArrayLike) -> "MixtureSurrogate":
        """Learn from N candidates.

        Args:
            weights_ND: (N, D), a mixture per row: zero or more, sum 1 (to within 1%, for weights
                that were rounded; rows are normalised).
            outcomes_NV: (N, V), what was measured for each, per task.

        Raises:
            InputError: shapes that do not fit, fewer than 10 candidates, rows that are no
                mixtures, or an outcome that is not finite.
        """
        weights_ND, outcomes_NV = _checked(weights_ND), np.array(outcomes_NV, dtype=np.float64)
        _check_outcomes(weights_ND, outcomes_NV)
        self._n_domains = weights_ND.shape[1]
        self._models = [self._fit_task(weights_ND, outcome_N) for outcome_N in outcomes_NV.T]
        return self

    def predict(self, weights_ND: ArrayLike) -> Array:
        """Outcomes of N mixtures, float64 (N, V), in the units of the outcomes fitted.

        Raises:
            InputError: called before :meth:`fit`, another number of domains, or rows that are
                no mixtures.
        """
        if self._models is None:
            raise InputError("surrogate: nothing was fitted; call fit before predict")
        weights_ND = _checked(weights_ND)
        if weights_ND.shape[1] != self._n_domains:
            raise InputError(
                f"weights_ND has {weights_ND.shape[1]} domains; the surrogate was fitted on "
                f"{self._n_domains}"
            )
        return np.column_stack([model.predict(weights_ND) for model in self._models])

    def cross_validate(
        self, weights_ND: ArrayLike, outcomes_NV: ArrayLike, *, folds: int = 5, repeats: int = 1
    ) -> SurrogateSkill:
        """Skill on candidates held out in turn; each fit chooses ρ and trees within its own share.

        What :meth:`fit` learnt stays as it is. `repeats` cuts the folds anew so many times.

        Raises:
            InputError: as :meth:`fit`, or so many folds that less than 10 candidates are left.
        """
        weights_ND, outcomes_NV = _checked(weights_ND), np.array(outcomes_NV, dtype=np.float64)
        _check_outcomes(weights_ND, outcomes_NV)
        count = len(weights_ND)
        if not 2 <= folds <= count or count - -(-count // folds) < FEWEST_CANDIDATES:
            raise InputError(
                f"folds is {folds} for {count} candidates; each fit needs at least "
                f"{FEWEST_CANDIDATES} of them, so give from 2 to {count} folds and more candidates"
            )
        predictions_NV = np.zeros_like(outcomes_NV)
        for repeat in range(repeats):
            for held_out in _folds(count, folds, self._seed, repeat + 1):
                fitted = np.setdiff1d(np.arange(count), held_out)
                for v, outcome_N in enumerate(outcomes_NV.T):
                    model = self._fit_task(weights_ND[fitted], outcome_N[fitted])
                    predictions_NV[held_out, v] += model.predict(weights_ND[held_out]) / repeats
        return SurrogateSkill(
            spearman_V=_spearman(predictions_NV, outcomes_NV),
            r2_V=_r2(predictions_NV, outcomes_NV),
            predictions_NV=predictions_NV,
        )

    def _fit_task(self, weights_ND: Array, outcome_N: Array) -> "_TaskModel":
        mean, spread = float(outcome_N.mean()), float(outcome_N.std())
        if spread <= _ROUNDING * np.abs(outcome_N).max():
            return _TaskModel(mean)
        standard_N = (outcome_N - mean) / spread
        everything = np.arange(len(standard_N))
        cuts = [
            (np.setdiff1d(everything, fold), fold)
            for fold in _folds(len(standard_N), _FOLDS, self._seed, 0)
        ]
        bases = [_SmoothFit(weights_ND[rest], standard_N[rest]) for rest, _ in cuts]

        law_N, ridge_N = np.empty_like(standard_N), np.empty_like(standard_N)
        for base, (_, fold) in zip(bases, cuts, strict=True):
            law_N[fold] = base.law.predict(weights_ND[fold])
            ridge_N[fold] = base.ridge.predict(weights_ND[fold])
        apart_N = law_N - ridge_N
        law_share = float(apart_N @ (standard_N - ridge_N) / (apart_N @ apart_N or 1.0))
        law_share = min(max(law_share, 0.0), 1.0)

        error_T = np.zeros(self._max_trees + 1)  # squared, by the number of trees
        for base, (rest, fold) in zip(bases, cuts, strict=True):
            base.law_share = law_share
            left_N = standard_N[fold] - base.predict(weights_ND[fold])
            error_T[0] += left_N @ left_N
            left_over = standard_N[rest] - base.predict(weights_ND[rest])
            held_out = weights_ND[fold], left_N
            error_T[1:] += self._grow(weights_ND[rest], left_over, self._max_trees, held_out)[1]

        base = _SmoothFit(weights_ND, standard_N, law_share)
        left_over = standard_N - base.predict(weights_ND)
        trees = self._grow(weights_ND, left_over, int(error_T.argmin()))[0]
        return _TaskModel(mean, spread, base, trees)

    def _grow(
        self,
        weights_ND: Array,
        left_over_N: Array,
        n_trees: int,
        held_out: tuple[Array, Array] | None = None,
    ) -> tuple[lightgbm.Booster | None, Array]:
        """`n_trees` trees, and their summed squared error on `held_out` after each of them."""
        if n_trees == 0:
            return None, np.empty(0)
        train = lightgbm.Dataset(weights_ND, left_over_N, params=self._parameters)
        history: dict[str, dict[str, list[float]]] = {}
        sets, callbacks = [], []
        if held_out is not None:
            sets = [train.create_valid(*held_out)]
            callbacks = [lightgbm.record_evaluation(history)]
        trees = lightgbm.train(
            self._parameters,
            train,
            n_trees,
            valid_sets=sets,
            valid_names=["held_out"] * len(sets),
            callbacks=callbacks,
        )
        if held_out is None:
            return trees, np.empty(0)
        # LightGBM stops when nothing can be split any more: further trees change nothing.
        mean_T = np.array(history["held_out"]["l2"])
        return trees, len(held_out[1]) * np.pad(mean_T, (0, n_trees - len(mean_T)), mode="edge")


class _SmoothFit:
    """Law and ridge of one task, weighed against each other."""

    def __init__(self, weights_ND: Array, standard_N: Array, law_share: float = 1.0) -> None:
        self.law = MixingLaw().fit(weights_ND, standard_N)
        self.ridge = LogRidge().fit(weights_ND, standard_N)
        self.law_share = law_share

    def predict(self, weights_ND: Array) -> Array:
        law_N, ridge_N = self.law.predict(weights_ND), self.ridge.predict(weights_ND)
        return self.law_share * law_N + (1 - self.law_share) * ridge_N


@dataclass(frozen=True)
class _TaskModel:
    mean: float
    spread: float = 0.0
    smooth: _SmoothFit | None = None
    trees: lightgbm.Booster | None = None

    def predict(self, weights_ND: Array) -> Array:
        predicted_N = np.full(len(weights_ND), self.mean)
        if self.smooth is not None:
            predicted_N += self.spread * self.smooth.predict(weights_ND)
        if self.trees is not None:
            predicted_N += self.spread * np.asarray(self.trees.predict(weights_ND, num_threads=1))
        return predicted_N


def _checked(weights_ND: ArrayLike) -> Array:
    """The mixtures, rows normalised."""
    array_ND = np.array(weights_ND, dtype=np.float64)
    if array_ND.ndim != 2 or not array_ND.size:
        raise InputError(
            f"weights_ND has shape {array_ND.shape}; give a mixture per row, (candidates, domains)"
        )
    sum_N1 = array_ND.sum(axis=1, keepdims=True)
    good_N = (array_ND >= 0).all(axis=1) & (np.abs(sum_N1[:, 0] - 1) <= 0.01)
    for n in np.flatnonzero(~good_N)[:1]:
        raise InputError(
            f"weights_ND: row {n} is no mixture; its weights must be zero or more and sum to 1, "
            f"and they sum to {sum_N1[n, 0]:.6g}, the least being {array_ND[n].min():.6g}"
        )
    return array_ND / sum_N1


def _check_outcomes(weights_ND: Array, outcomes_NV: Array) -> None:
    count = len(weights_ND)
    if outcomes_NV.ndim != 2 or len(outcomes_NV) != count or not outcomes_NV.size:
        raise InputError(
            f"outcomes_NV has shape {outcomes_NV.shape}; give a row per candidate, of which there "
            f"are {count}, and a column per task"
        )
    if count < FEWEST_CANDIDATES:
        raise InputError(
            f"{count} candidates are too few for a surrogate; measure at least {FEWEST_CANDIDATES}"
        )
    for n, v in np.argwhere(~np.isfinite(outcomes_NV))[:1]:
        raise InputError(
            f"outcomes_NV: candidate {n} on task {v} is {outcomes_NV[n, v]}; outcomes must be "
            "finite numbers"
        )


def _folds(count: int, folds: int, seed: int, repeat: int) -> list[NDArray[np.intp]]:
    """A partition of 0 … count − 1, drawn by the seed."""
    order = np.random.Generator(np.random.Philox(key=[seed, repeat])).permutation(count)
    return np.array_split(order, folds)


def _spearman(predictions_NV: Array, outcomes_NV: Array) -> Array:
    skill_V = np.zeros(outcomes_NV.shape[1])
    for v, (predicted_N, outcome_N) in enumerate(zip(predictions_NV.T, outcomes_NV.T, strict=True)):
        if np.ptp(predicted_N) > 0 and np.ptp(outcome_N) > 0:
            skill_V[v] = spearmanr(predicted_N, outcome_N).statistic
    return skill_V


def _r2(predictions_NV: Array, outcomes_NV: Array) -> Array:
    squared_V = ((predictions_NV - outcomes_NV) ** 2).sum(axis=0)
    deviation_V = ((outcomes_NV - outcomes_NV.mean(axis=0)) ** 2).sum(axis=0)
    varies_V = np.ptp(outcomes_NV, axis=0) > 0
    return np.where(varies_V, 1 - squared_V / np.where(varies_V, deviation_V, 1.0), 0.0)
