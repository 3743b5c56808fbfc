"""Data pipeline from record files to packed batches.

Every module imports without megatron, triton, transformers and a GPU.
"""
