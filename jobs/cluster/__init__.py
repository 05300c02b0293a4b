"""Ray: connect to a cluster, and run the items of a stage on actors.

Input: a stage and `ClusterConfig`. Output: the outcome of each item.
A worker that fails because of its node or GPU is retired.
Start with actor_pool.py.
"""
