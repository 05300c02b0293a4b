"""Settings of the evaluation."""

from dataclasses import dataclass
from math import inf
from typing import Annotated

from annotated_types import Ge, Interval

from pipeline.bounds import check_bounds


@dataclass(frozen=True)
class EvaluateConfig:
    """What is asked to find out whether the style follows the database."""

    prompts: Annotated[int, Ge(1)] = 100
    """Subjects that the databases have and training has not seen, each one prompt."""
    seeds: Annotated[int, Ge(1)] = 2
    """Images of each prompt, from so many seeds."""
    template: str = "{prompt} in the style of {style}"
    """A prompt that names the style."""
    words: tuple[str, ...] = ()
    """What a database's style is called in a prompt, as DATABASE=WORDS; by default its name, hyphens as spaces."""
    ways: tuple[str, ...] = ()
    """What names the style: database, prompt, both, text (the prompt, no neighbors), neither; by default all of it."""
    sweep_k: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 4, 8, 16)
    """Numbers of neighbors that are tried with swapped databases."""
    sweep_guidance: tuple[Annotated[float, Interval(gt=-inf, lt=inf)], ...] = (1.0, 2.0, 4.0)
    """Guidance scales that are tried with swapped databases."""
    sweep_prompts: Annotated[int, Ge(1)] = 100
    """Prompts for each of these."""
    seen: bool = False
    """Let databases give images of the held-out subjects too."""
    judge_steps: Annotated[int, Ge(1)] = 1500
    """Updates of the network that judges styles, of 64 images each."""

    def __post_init__(self) -> None:
        check_bounds("evaluate", self)
        if "{prompt}" not in self.template or "{style}" not in self.template:
            raise ValueError(f"evaluate.template = {self.template!r}: must have {{prompt}} and {{style}}")
        if wrong := [entry for entry in self.words if "=" not in entry]:
            raise ValueError(f"evaluate.words = {wrong[0]!r}: must be DATABASE=WORDS")
