"""Corpus -> shards -> embeddings -> index -> neighbours -> batches; knows neither Ray nor the model."""
