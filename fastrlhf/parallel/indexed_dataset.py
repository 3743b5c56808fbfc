"""megatron-core's indexed data set (.bin of token ids, .idx of document ends), for `data/` to read and write.

`data/` imports this module only inside the functions that need it, so that it works without megatron-core.
"""

from __future__ import annotations

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
