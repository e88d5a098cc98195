"""Student's t distribution with fractional degrees of freedom, on NumPy alone.

SciPy has it too, and is not a dependency of what computes. With T = sqrt(degrees) / tan(angle), the probability of a
value above T is the integral of sin(x)**(degrees - 1) from 0 to the angle, over twice its integral from 0 to a right angle.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Gauss-Legendre quadrature on the interval from 0 to 1.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(100)
_POINTS, _WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2
_HALVINGS = 60  # of a right angle, which leaves less than the precision of a float


def upper_tail(t: ArrayLike, degrees: ArrayLike) -> NDArray[np.float64]:
    """Give the probability that the distribution exceeds `t`, elementwise.

    Parameters
    ----------
    t
        Values of 0 or more.
    degrees
        Degrees of freedom, 2 or more; with fewer the quadrature loses digits.

    Returns
    -------
    Probabilities between 0 and 0.5, with a relative error below 1e-9.
    """
    degrees = np.asarray(degrees, float)
    return _tail_below(np.arctan2(np.sqrt(degrees), t), degrees)


def critical_value(probability: float, degrees: ArrayLike) -> NDArray[np.float64]:
    """Give the value that the distribution exceeds with a probability between 0 and 0.5: the inverse of ``upper_tail``."""
    degrees = np.asarray(degrees, float)
    low, high = np.zeros_like(degrees), np.full_like(degrees, np.pi / 2)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = _tail_below(middle, degrees) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(np.sqrt(degrees) / np.tan((low + high) / 2))


def _tail_below(angle: NDArray[np.float64], degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(_integral(angle, degrees) / _integral(np.full_like(degrees, np.pi / 2), degrees) / 2)


def _integral(angle: NDArray[np.float64], degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integrate sin(x)**(degrees - 1) from 0 to the angle."""
    heights = np.sin(angle[..., np.newaxis] * _POINTS) ** (degrees[..., np.newaxis] - 1)
    return np.asarray(angle * (heights @ _WEIGHTS))
