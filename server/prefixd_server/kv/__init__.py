"""KV memory: the allocator counts pages, the pool holds the tensors."""
