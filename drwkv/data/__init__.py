"""A shard set, the order of its samples, and the loader. Writing shards is data_prep's."""
