"""megatron-core's indexed dataset (.bin of token ids, .idx of document ends), for use in `data/`.

`data/` imports this module only in the functions that need it, so that it works without
megatron-core.
"""

from __future__ import annotations

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
