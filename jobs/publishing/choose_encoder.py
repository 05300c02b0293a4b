"""Choose the encoder of a style database: the encoder of the model that will sample from it."""

from jobs.runs.newest_run import find_newest_run
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.published import Published
from pipeline.embeddings.clip_weights import ClipConfig, encoder_of
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import dataset_encoder


def choose_encoder(root: str, name: str, settings: EmbedConfig) -> ClipConfig:
    """The encoder of the settings if they name one, or else that of the published version or of the newest run.

    Then this run can sample. ValueError if the weights of the encoder are in a file that no flag names.
    """
    default = settings.clip()
    if (default.model, default.pretrained) != (ClipConfig.model, ClipConfig.pretrained):
        return default
    published = Published.load(root, Dataset.parse(root, name).name)
    if published.version:
        return encoder_of(published.name, dataset_encoder(published.open()), default)
    run = find_newest_run(root)
    return encoder_of(f"the run {run.name}", run.encoder(), default) if run else default
