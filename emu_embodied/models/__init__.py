"""Networks: the transformer backbone, the IBQ vision tokenizer, attention masks and caches."""
