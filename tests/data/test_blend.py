"""Sources drawn in proportion to weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastrlhf.config import load_config, require
from fastrlhf.data.blend import Blended, apportion
from fastrlhf.data.loader import Loader
from fastrlhf.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"


def test_apportion_rounds_to_the_total() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(50, [0.97, 0.03]) == [49, 1]
    assert apportion(7, [2.0]) == [7]


def test_every_stretch_of_an_epoch_has_the_proportions() -> None:
    blend = Blended([[f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)]], [1, 3])
    assert (len(blend), blend[0], blend[29], blend[30], blend[39]) == (40, "a0", "a29", "b0", "b9")
    with pytest.raises(IndexError):
        blend[40]
    for epoch in range(3):
        samples = [blend[int(i)] for i in blend.order(seed=1, epoch=epoch)]
        assert len(samples) == 40
        for start in range(0, 40, 8):
            letters = Counter(sample[0] for sample in samples[start : start + 8])
            assert letters == {"a": 2, "b": 6}


def test_a_source_repeats_nothing_before_all_was_used() -> None:
    blend = Blended([list(range(20)), list(range(100, 104))], [0.5, 0.5])
    drawn = [blend[int(i)] for epoch in range(5) for i in blend.order(3, epoch)]
    small = [value for value in drawn if value >= 100]
    assert all(set(small[i : i + 4]) == {100, 101, 102, 103} for i in range(0, len(small), 4))
    large = [value for value in drawn if value < 100]
    assert len(set(large[:20])) == 20


def test_a_loader_resumes_in_the_middle_of_a_blend() -> None:
    def loader() -> Loader[int, list[int]]:
        blend = Blended([list(range(12)), list(range(50, 56))], [2, 1])
        return Loader(
            blend,
            global_batch_size=4,
            micro_batch_size=2,
            data_rank=0,
            data_size=1,
            seed=5,
            collate=list,
            order=blend.order,
        )

    first = loader()
    batches = iter(first)
    before = [next(batches) for _ in range(6)]
    state = first.state_dict()
    after = [next(batches) for _ in range(6)]
    again = loader()
    again.load_state_dict(state)
    resumed = iter(again)
    assert [next(resumed) for _ in range(6)] == after != before


@pytest.mark.parametrize("command", ["sft", "rm", "pretrain"])
def test_data_train_takes_weights(command: str) -> None:
    config = load_config(CONFIGS / f"{command}.yaml", ["data.train={a.jsonl: 1, b.jsonl: 3}"])
    require(config, command)
    assert config.data.train == {"a.jsonl": 1.0, "b.jsonl": 3.0}


def test_weights_do_not_mix_with_pretraining_rows() -> None:
    overrides = ["data.train={a.jsonl: 1}", "data.pretrain=t.jsonl", "data.pretrain_fraction=0.1"]
    with pytest.raises(UserError, match=r"data\.train with weights cannot be mixed"):
        require(load_config(CONFIGS / "sft.yaml", overrides), "sft")


def test_a_weight_is_above_zero() -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        load_config(CONFIGS / "sft.yaml", ["data.train={a.jsonl: 0}"])


def test_orders_are_the_same_on_every_machine() -> None:
    blend = Blended([list(range(5)), list(range(3))], [1, 1])
    assert np.array_equal(blend.order(7, 0), blend.order(7, 0))
    assert not np.array_equal(blend.order(7, 0), blend.order(8, 0))
