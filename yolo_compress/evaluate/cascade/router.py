"""Fit the router: a ridge regression of the gain on the features, with numpy, cross-validated. It is made for few images.

Shape suffixes: I images, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FOLDS = 5
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # per image, on standardised features: 1 halves the weight of a lone feature
OUTLIERS = 0.025  # share of the gains at each end that are clipped: single images would decide a fit to a hundred


@dataclass(frozen=True)
class Fit:
    """A fitted router. The predicted gain is `features_IF @ weights_F + bias`.

    Attributes:
        penalty: the chosen one of `PENALTIES`. None: no penalty predicts the gain better than its mean does, so the weights are 0.
        explained: share of the gain's variance that the cross-validated predictions explain; 0 without a penalty.
        held_out_I: predictions of each image by the router that was fitted without the image.
    """

    weights_F: np.ndarray
    bias: float
    penalty: float | None
    explained: float
    held_out_I: np.ndarray

    def predict(self, features_IF: np.ndarray) -> np.ndarray:
        """Return the predicted gain of each image."""
        return features_IF @ self.weights_F + self.bias


def fit(features_IF: np.ndarray, gain_I: np.ndarray, seed: int = 0) -> Fit:
    """Fit the router.

    The penalty is the one with the smallest squared error on the images of the fold that was left out. If the mean gain of the other
    folds has a smaller error, the features say nothing about the gain, and the weights are 0.

    Args:
        features_IF: features of each image, see `runtime.detect.cascade.features`.
        gain_I: gain of each image, see `gain.gains`.
        seed: seed of the folds.

    Raises:
        ValueError: there are fewer images than folds.
    """
    images = len(gain_I)
    if images < FOLDS:
        raise ValueError(f"{images} images, at least {FOLDS} are needed")
    low, high = np.quantile(gain_I, [OUTLIERS, 1 - OUTLIERS])
    target_I = np.clip(gain_I, low, high)
    fold_I = np.random.default_rng(seed).permutation(images) % FOLDS
    constant_I = np.empty(images)
    for fold in range(FOLDS):
        constant_I[fold_I == fold] = target_I[fold_I != fold].mean()
    error = float(((target_I - constant_I) ** 2).sum())
    found = Fit(np.zeros(features_IF.shape[1]), float(target_I.mean()), None, 0.0, constant_I)
    least = error
    for penalty in PENALTIES:
        held_out_I = np.empty(images)
        for fold in range(FOLDS):
            weights_F, bias = _ridge(features_IF[fold_I != fold], target_I[fold_I != fold], penalty)
            held_out_I[fold_I == fold] = features_IF[fold_I == fold] @ weights_F + bias
        own = float(((target_I - held_out_I) ** 2).sum())
        if own < least:
            least = own
            found = Fit(*_ridge(features_IF, target_I, penalty), penalty, 1 - own / error, held_out_I)
    return found


def _ridge(features_IF: np.ndarray, target_I: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Return weights and bias for the features as they are. A feature that is the same in all images gets the weight 0."""
    mean_F, deviation_F = features_IF.mean(axis=0), features_IF.std(axis=0)
    varies_F = deviation_F > 1e-9
    scale_F = np.where(varies_F, deviation_F, 1.0)
    standard_IF = (features_IF - mean_F) / scale_F * varies_F
    left_FF = standard_IF.T @ standard_IF + penalty * len(target_I) * np.eye(len(mean_F))
    weights_F = np.linalg.solve(left_FF, standard_IF.T @ (target_I - target_I.mean())) / scale_F
    return weights_F, float(target_I.mean() - mean_F @ weights_F)
