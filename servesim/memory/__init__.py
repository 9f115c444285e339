"""Where bytes live: sizes of weights and KV cache, the block pool, the KV cache of an instance."""
