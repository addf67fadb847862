"""Episodes on disk, how they are collected, and the batches made from them."""
