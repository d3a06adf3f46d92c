"""From images to shards: sources, encoding, writing, indexing, checking. Reading them is drwkv.data's."""
