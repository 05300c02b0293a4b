"""From a corpus to batches: shards, embeddings, index, neighbors. Knows neither Ray nor the model.

A folder imports only from folders below it in this list (`make lint` checks it).

    versions/     compare a source with the last version, update it, gates, verify
    batches/      what training and sampling read
    neighbors/    the nearest database rows of each sample
    indices/      choose, train, fill, merge, tune, extend, search
    scores/       numbers from small models: aesthetics, safety, watermarks
    embeddings/   CLIP encoders and the embedding stages
    shards/       the stage that writes tars, deduplication, adoption
    datasets/     names, manifests, rows, takedowns, the published version
    corpora/      the images of the demo
    sources/      folders, lists, tars
    rows/         one row of a source: columns, license, the filter of --where
    layouts/      the columns and folders of well-known corpora
    tables/       CSV, TSV, JSON and parquet as rows of plain cells
    downloads/    images over HTTP
    stages/       plan, process, commit, seal
    media/        images and tars
    hardware/     GPUs, CPUs, memory
    storage/      local disks and S3
    bounds.py     check the bounds of settings

Start with stages/stage.py: every step of the pipeline has its shape.
"""
