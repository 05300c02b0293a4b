"""Settings of the evaluation."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the measurement of style: does it follow the database?"""

    prompts: Annotated[int, Ge(1)] = 100
    """Number of prompts. Each is a subject that the databases have and training has not seen."""
    seeds: Annotated[int, Ge(1)] = 2
    """Number of seeds, and so of images of each prompt."""
    template: str = "{prompt} in the style of {style}"
    """A prompt that names the style."""
    words: tuple[str, ...] = ()
    """Words for the style of a database in prompts, as DATABASE=WORDS. Default: its name, with spaces for hyphens."""
    ways: tuple[str, ...] = ()
    """Ways to name the style: database, prompt, both, text (a prompt without neighbors), neither. Default: all."""
    sweep_k: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 4, 8, 16)
    """Numbers of neighbors to measure, with the style from the database alone."""
    sweep_guidance: tuple[Annotated[float, Interval(gt=-inf, lt=inf)], ...] = (1.0, 2.0, 4.0)
    """Guidance scales to measure, with the style from the database alone."""
    sweep_prompts: Annotated[int, Ge(1)] = 100
    """Prompts of each of these measurements."""
    seen: bool = False
    """Let databases give images of the held-out subjects too."""
    judge_steps: Annotated[int, Ge(1)] = 1500
    """Updates of the style classifier, of 64 images each."""

    def __post_init__(self) -> None:
        check_bounds("evaluate", self)
        if "{prompt}" not in self.template or "{style}" not in self.template:
            raise ValueError(f"evaluate.template = {self.template!r}: must have {{prompt}} and {{style}}")
        if wrong := [entry for entry in self.words if "=" not in entry]:
            raise ValueError(f"evaluate.words = {wrong[0]!r}: must be DATABASE=WORDS")
