"""Settings of `embed`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.formats.sizes import parse_size


@dataclass(frozen=True)
class EmbedConfig(ClipConfig):
    """Which encoder, and how many images at a time."""

    batch_size: Annotated[int, Ge(1)] = 128
    """Images in one forward pass. On a CPU at most 32."""
    compile: bool = False
    """Compile the encoder with torch.compile. This takes a minute at the start."""
    max_memory: str = "2Gi"
    """Memory limit of a worker, without the weights and the libraries of a GPU. Threads and read-ahead follow from
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.max_memory, "embed.max_memory")

    def clip(self) -> ClipConfig:
        """The encoder alone."""
        return ClipConfig(self.model, self.pretrained, self.precision)
