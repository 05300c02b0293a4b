"""Settings of the latents and convert stages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentsConfig:
    """Which first stage, and what is kept of a picture."""

    first_stage: str = ""
    """Folder of an autoencoder as diffusers keeps it (convert writes such), or its name in the hub."""
    flips: bool = False
    """Keep the latents of the mirrored picture too, for training to choose from."""
    scale: float = 0.0
    """Factor of the latents; 0: that of the autoencoder's configuration or, where it names none, the inverse of the
    standard deviation of the first batch."""
    batch_size: int = 8
    """Pictures encoded at a time."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"latents.batch_size = {self.batch_size}: must be at least 1")
        if not self.scale >= 0:
            raise ValueError(f"latents.scale = {self.scale}: must be above 0, or 0 to have it chosen")


@dataclass(frozen=True)
class ConvertConfig:
    """What a released checkpoint does not say of itself."""

    head_dim: int = 32
    """Numbers of an attention head; 32 in all three released models."""
    scale: float = 0.0
    """Factor of the latents; 0: that in the checkpoint, or 1."""
    context_norm: float = 1.0
    """Length of the vectors that the network was trained with; those of the 256 pixel models were as CLIP makes them,
    about 10 for pictures of ViT-B/32."""
    k: int = 4
    """Neighbours that it was trained with."""
