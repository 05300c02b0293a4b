"""Classifier-free guidance."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guidance:
    """How far the answer is moved away from that for nobody.

    eps_u + text (eps_t - eps_u) + neighbors (eps_c - eps_t), where eps_t sees the first context vector alone (the
    prompt), as Brooks et al. 2022, arXiv:2211.09800, equation 3, do with two conditions. With equal scales it is
    eps_u + s (eps_c - eps_u) (Ho and Salimans 2022, arXiv:2207.12598); 1 is no guidance.
    """

    text: float
    neighbors: float
