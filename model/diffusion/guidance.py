"""Classifier-free guidance."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guidance:
    """Scales that move the prediction away from the unconditional one.

    eps_u + text (eps_t - eps_u) + neighbors (eps_c - eps_t). Here eps_t sees only the first context vector, which is
    the prompt. Two conditions are combined as in Brooks et al. 2022, arXiv:2211.09800, equation 3. Equal scales give
    eps_u + s (eps_c - eps_u) (Ho and Salimans 2022, arXiv:2207.12598). 1 is no guidance.
    """

    text: float
    neighbors: float
