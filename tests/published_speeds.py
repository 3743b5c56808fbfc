"""Published training speeds of GPT models on A100 GPUs, rows of 2,048 tokens, 51,200 tokens.

- NARAYANAN: Narayanan et al. 2021 (arXiv 2104.04473), table 1, with all activations recomputed.
  Micro-batches and model chunks are those of the authors' scripts for that table (Megatron-LM,
  examples/sc21/run_table_1.sh).
- KORTHIKANTI: Korthikanti et al. 2022 (arXiv 2205.05198), table 5: seconds of an iteration.
"""

from __future__ import annotations

from typing import NamedTuple

LENGTH, VOCABULARY = 2048, 51200


class Row(NamedTuple):
    """A row of a table."""

    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    micro_batch: int
    chunks: int


NARAYANAN = [
    # Row, teraFLOP/s a GPU
    (Row(24, 2304, 24, 1, 1, 32, 512, 16, 1), 137),
    (Row(32, 3072, 30, 2, 1, 64, 512, 16, 1), 138),
    (Row(32, 4096, 36, 4, 1, 128, 512, 16, 1), 142),
    (Row(48, 6144, 40, 8, 1, 256, 1024, 8, 1), 135),
    (Row(64, 8192, 48, 8, 2, 512, 1536, 4, 1), 138),
    (Row(80, 10240, 60, 8, 4, 1024, 1792, 2, 3), 140),
    (Row(96, 12288, 80, 8, 8, 1536, 2304, 2, 2), 148),
    (Row(128, 16384, 96, 8, 16, 1920, 2160, 1, 2), 155),
    (Row(128, 20480, 105, 8, 35, 2520, 2520, 1, 3), 163),
    (Row(160, 25600, 128, 8, 64, 3072, 3072, 1, 1), 163),
]
KORTHIKANTI = [
    # Row, seconds with full recomputation, seconds with selective recomputation and SP
    (Row(64, 6144, 48, 8, 1, 8, 4, 4, 1), 1.42, 1.10),
    (Row(96, 12288, 96, 8, 8, 64, 64, 1, 3), 18.13, 13.75),
    (Row(128, 20480, 105, 8, 35, 280, 280, 1, 3), 49.05, 37.83),
    (Row(160, 25600, 128, 8, 64, 512, 512, 1, 1), 94.42, 71.49),
]
