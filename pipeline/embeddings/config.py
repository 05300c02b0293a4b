"""Settings of `embed`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.storage.sizes import parse_size


@dataclass(frozen=True)
class EmbedConfig(ClipConfig):
    """Which encoder, and how many images at a time."""

    batch_size: Annotated[int, Ge(1)] = 128
    """Images in one forward pass; on a CPU 32 at most."""
    compile: bool = False
    """Let torch.compile make the encoder faster, which takes a minute."""
    max_memory: str = "2Gi"
    """A worker may take so many bytes beside the weights and the libraries of a GPU; threads and look-ahead are planned
    from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.max_memory, "embed.max_memory")

    def clip(self) -> ClipConfig:
        """The encoder alone."""
        return ClipConfig(self.model, self.pretrained, self.precision)
