"""`python -m jobs recipes`: the recipes by purpose, with numbers computed from their settings."""

from dataclasses import asdict, dataclass

from jobs.config.recipes import PURPOSES, RECIPES
from jobs.telemetry import output, tables
from jobs.telemetry.units import format_bytes
from model.training.flops import count_parameters, training_bytes


@dataclass(frozen=True)
class RecipeFacts:
    """The results and needs of a recipe."""

    recipe: str
    purpose: str
    image_size: int
    """Pixels on a side of the stored images."""
    encoder: str
    vector_length: int
    train_image_size: int
    """Pixels of a side of the images in training."""
    first_stage: str
    """The kind of latents that the network trains on, or none."""
    parameters: int
    """Parameters of the network."""
    training_bytes: int
    """Memory of a training process, without activations."""
    gpus: float
    """GPUs that its cluster settings reserve in all."""
    command: str

    def document(self) -> dict[str, str | int | float]:
        """The facts as JSON."""
        return asdict(self)


def list_recipes() -> list[RecipeFacts]:
    """The facts of all recipes, the demo's first."""
    return [_facts(name) for name in RECIPES]


def _facts(name: str) -> RecipeFacts:
    settings, purpose = RECIPES[name](), PURPOSES[name]
    unet, cluster = settings.train.unet, settings.cluster
    pixels = purpose.downsampling == 1
    return RecipeFacts(
        name, purpose.name, settings.shard.image_size, f"{settings.embed.model} {settings.embed.pretrained}",
        unet.context_dim, settings.train.image_size or settings.shard.image_size,
        "none: pixels" if pixels else f"{purpose.downsampling} x smaller, {unet.in_channels} channels",
        count_parameters(unet), training_bytes(settings.train), cluster.workers * cluster.each_gpus,
        "python -m jobs style NAME --source FOLDER" if name == "style" else
        f"python -m jobs pipeline NAME --source SOURCE --recipe {name}" + (" --train RUN" if pixels else ""))


def recipes_table(recipes: list[RecipeFacts]) -> str:
    """The facts as a table, and the command of each recipe below it."""
    rows = [[facts.recipe, facts.purpose, str(facts.image_size), f"{facts.encoder} ({facts.vector_length})",
             f"{facts.parameters / 1e6:,.0f} M", format_bytes(facts.training_bytes),
             f"{facts.gpus:g}" if facts.gpus else "none"] for facts in recipes]
    table = tables.render(rows, head=("recipe", "purpose", "pixels", "encoder (vector)", "network", "memory", "GPUs"),
                          right=(2, 4, 5, 6), whole={0})
    latents = [f"{facts.recipe} trains on latents: {facts.first_stage}" for facts in recipes
               if not facts.first_stage.startswith("none")]
    smaller = [f"{facts.recipe} stores images of {facts.image_size} pixels and trains on {facts.train_image_size}"
               for facts in recipes if facts.train_image_size != facts.image_size]
    return "\n".join([table, "", "network: parameters; memory: of each training process, without activations", *smaller,
                      *latents, "", *(output.fit_commands(facts.command) for facts in recipes)])
