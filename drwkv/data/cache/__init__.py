"""Shard sets on S3, read through a folder on the node's local disk that all of its processes and later runs share.

    cache = NodeCache("/local/cache", budget_gib=500)
    shards = ShardSet.open("s3://bucket/latents", cache=cache)

node.py is the reading side: a shard's file is opened when it is there, or waited for. Each process has a thread that
says what it will need (session.py), and one of them fetches it (fetcher.py), as far as there is room (space.py).
What lies in the folder is folder.py's, with life.py and locks.py; a set's index is fetched by index.py.
"""

from drwkv.data.cache.node import (
    DEFAULT_GIB,
    DEFAULT_TIMEOUT_SEC,
    CachedSet,
    NodeCache,
    default_folder,
    give_up_when,
    open_cache,
)

__all__ = [
    "DEFAULT_GIB",
    "DEFAULT_TIMEOUT_SEC",
    "CachedSet",
    "NodeCache",
    "default_folder",
    "give_up_when",
    "open_cache",
]
