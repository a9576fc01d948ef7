"""The smooth part of the surrogate: two regressions of an outcome on the mixture's weights.

Both take weights of any size, zeros included, and a standardised outcome (mean 0, standard
deviation 1), and have ``fit(weights_ND, outcome_N)`` and ``predict(weights_ND) -> (N,)``.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

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
