"""The bounds of all settings: each edge passes, the next value is refused by name, and every number has a bound."""

import math
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import pytest

from jobs.cli.verbs import VERBS, load_verb
from jobs.config.settings import Settings
from jobs.planning.benchmark import Trial
from jobs.planning.config import PlanConfig
from jobs.publishing.config import GcConfig
from jobs.sampling.config import QueryConfig
from jobs.training.config import ConvertConfig
from pipeline.embeddings.clip_weights import ClipConfig

REPOSITORY = Path(__file__).parents[2]
SETTINGS = Settings()
SECTIONS: list[tuple[str, Any]] = [
    *((name, getattr(SETTINGS, name)) for name in Settings.__dataclass_fields__),
    ("train.unet", SETTINGS.train.unet), ("train.diffusion", SETTINGS.train.diffusion),
    ("shard.download", SETTINGS.shard.download), ("rebuild.gates", SETTINGS.rebuild.gates),
    ("gc", GcConfig()), ("convert", ConvertConfig()), ("sample", QueryConfig()), ("embed", ClipConfig()),
    ("plan", PlanConfig()),
    ("measure", Trial(".", cast(Any, None), (), 1.0, 1, False)),  # the build has its own sections
]
UNBOUNDED = {("sample", "seed"): "any whole number: it is hashed as text",
             ("shard", "seed"): "any whole number: it is hashed as text"}
# Another rule asks for these values too when the field is at this edge.
WITH = {("train.diffusion", "beta_start", "lt"): {"beta_end": math.nextafter(1, 0)},
        ("train.diffusion", "beta_end", "gt"): {"beta_start": math.nextafter(0, 1)}}


def numbers(kind: Any) -> set[type]:
    """The numeric types in an annotation; bool is none."""
    return {kind} & {int, float} | {number_type for part in get_args(kind) for number_type in numbers(part)}


def bounds(kind: Any) -> dict[str, Any]:
    """The bounds of a field or of its elements, by the name of the comparison."""
    limits = {key: limit for bound in getattr(kind, "__metadata__", ()) for key, limit in asdict(bound).items()
              if limit is not None}
    for part in get_args(kind):
        limits |= bounds(part)
    return limits


def outside(kind: Any, comparison: str, limit: float) -> tuple[list[Any], Any]:
    """Values at the edge of a bound, none where that is an infinity, and the first value beyond it."""
    whole, up = numbers(kind) == {int}, comparison in {"lt", "le"}
    step = (lambda value, to: value + (1 if to > 0 else -1)) if whole else math.nextafter
    outwards = math.inf if up else -math.inf
    if comparison in {"ge", "le"}:
        return [limit], step(limit, outwards)
    return [] if math.isinf(limit) else [step(limit, -outwards)], limit


def filled(config: Any, name: str, value: Any) -> Any:
    """A value in the form that a field has: alone, or as one of several elements."""
    kind = get_type_hints(type(config))[name]
    if get_origin(kind) is not tuple:
        return value
    return (value,) if get_args(kind)[1:] == (...,) else (value, *getattr(config, name)[1:])


FIELDS = [(section, config, name, kind) for section, config in SECTIONS
          for name, kind in get_type_hints(type(config), include_extras=True).items() if numbers(kind)]
CASES = [(section, config, name, kind, comparison, limit) for section, config, name, kind in FIELDS
         for comparison, limit in bounds(kind).items()]


@pytest.mark.parametrize(("section", "config", "name", "kind", "comparison", "limit"), CASES,
                         ids=[f"{case[0]}.{case[2]}-{case[4]}" for case in CASES])
def test_the_edge_of_a_bound_passes_and_the_value_beyond_is_named(
        section: str, config: Any, name: str, kind: Any, comparison: str, limit: float) -> None:
    edges, beyond = outside(kind, comparison, limit)
    for edge in edges:
        value = filled(config, name, edge)
        changed = replace(config, **{name: value} | WITH.get((section, name, comparison), {}))
        assert getattr(changed, name) is value
    for wrong in (beyond, *([math.nan] if float in numbers(kind) else [])):
        value = filled(config, name, wrong)
        with pytest.raises(ValueError) as caught:
            replace(config, **{name: value})
        assert str(caught.value).startswith(f"{section}.{name} = {value!r}: must be ")
        assert f" {limit}" in str(caught.value)


def test_every_number_has_a_bound_or_a_reason_why_not() -> None:
    without = {(section, name) for section, _, name, kind in FIELDS if not bounds(kind)}
    assert without == set(UNBOUNDED)


@pytest.mark.parametrize(("section", "config"), SECTIONS,
                         ids=[f"{section}-{type(config).__name__}" for section, config in SECTIONS])
def test_choices_are_checked_without_the_command_line(section: str, config: Any) -> None:
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            with pytest.raises(ValueError, match=f"{section}.{name} = 'other': must be one of {get_args(kind)[0]}, "):
                replace(config, **{name: "other"})


def test_every_section_of_the_command_line_is_tested() -> None:
    def sections(kind: type) -> set[type]:
        kinds = {each for each in get_type_hints(kind).values() if is_dataclass(each)}
        return kinds.union(*(sections(each) for each in kinds))

    classes = set().union(*(sections(load_verb(verb)[0]) for verb in VERBS)) | sections(Settings)
    assert {each for each in classes if each.__name__.endswith("Config")} <= {type(config) for _, config in SECTIONS}


def test_model_and_pipeline_have_the_same_checker() -> None:
    assert (REPOSITORY / "model/bounds.py").read_bytes() == (REPOSITORY / "pipeline/bounds.py").read_bytes()
