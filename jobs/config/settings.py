"""The tree of all settings."""

from dataclasses import dataclass, field

from jobs.cluster.config import ClusterConfig
from jobs.evaluation.config import EvaluateConfig
from jobs.publishing.config import RebuildConfig
from jobs.sampling.config import SampleConfig
from jobs.training.config import LatentsConfig
from model import recipes as networks
from model.config import TrainConfig
from pipeline.corpora.config import DemoCorpusConfig
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.neighbors.config import NeighborsConfig
from pipeline.scores.config import ScoreConfig
from pipeline.sources.config import ShardConfig


@dataclass(frozen=True)
class Settings:
    """One section for each stage."""

    pictures: DemoCorpusConfig = field(default_factory=DemoCorpusConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    neighbors: NeighborsConfig = field(default_factory=NeighborsConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    train: TrainConfig = field(default_factory=networks.tiny)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rebuild: RebuildConfig = field(default_factory=RebuildConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
