"""Settings of the evaluation."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """What is asked to find out whether the style follows the database."""

    prompts: int = 100
    """Subjects that the databases have and training has not seen, each one prompt."""
    seeds: int = 2
    """Pictures of each prompt, from so many seeds."""
    template: str = "{prompt} in the style of {style}"
    """A prompt that names the style."""
    words: tuple[str, ...] = ()
    """What a database's style is called in a prompt, as DATABASE=WORDS; by default its name, hyphens as spaces."""
    ways: tuple[str, ...] = ()
    """What names the style: database, prompt, both, text (the prompt, no neighbours), neither; by default all of it."""
    sweep_k: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of neighbours that are tried with swapped databases."""
    sweep_guidance: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Guidance scales that are tried with swapped databases."""
    sweep_prompts: int = 100
    """Prompts for each of these."""
    seen: bool = False
    """Let databases give pictures of the held-out subjects too."""
    judge_steps: int = 1500
    """Updates of the network that judges styles, of 64 pictures each."""

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "sweep_prompts", "judge_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate.{name} = {getattr(self, name)}: must be at least 1")
        if "{prompt}" not in self.template or "{style}" not in self.template:
            raise ValueError(f"evaluate.template = {self.template!r}: must have {{prompt}} and {{style}}")
        if wrong := [one for one in self.words if "=" not in one]:
            raise ValueError(f"evaluate.words: {wrong[0]!r} is not DATABASE=WORDS")
        if any(k < 1 for k in self.sweep_k) or not all(map(math.isfinite, self.sweep_guidance)):
            raise ValueError("evaluate.sweep_k must be at least 1 each, evaluate.sweep_guidance numbers")
