"""Command line, settings and Ray: what runs where. The only package that imports Ray.

A folder imports only from folders below it in this list (`make lint` checks it).

    cli/          parse arguments, run a verb, exit code
    api.py        the same in Python: list, search, sample, read batches
    report/       the HTML report
    inspection/   status, watch, Prometheus exporter
    planning/     estimates of time, money and storage
    config/       the tree of settings, recipes, TOML
    publishing/   rebuild, releases, rollback, garbage collection, credits, takedowns
    evaluation/   does the style follow the database
    sampling/     images from a run and a database
    training/     Ray Train and torchrun, latents, conversion
    cluster/      connect to Ray, actors, retired workers
    telemetry/    logs, progress, tables, trackers, Ray metrics
    runs/         the folder of a training run

Start with cli/main.py, then cluster/actor_pool.py.
"""

__version__ = "0.1.0"
