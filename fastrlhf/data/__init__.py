"""From files to packed batches: records, tokens, loaders. Imports without megatron, triton, transformers and a GPU."""
