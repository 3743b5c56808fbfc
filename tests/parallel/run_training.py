"""Training under every layout of four ranks, for comparison with one rank.

torchrun --nproc-per-node 4 run_training.py FOLDER

Writes FOLDER/<layout>/ and the checkpoints FOLDER/saved.<layout>/, which test_training.py and
test_checkpoint.py read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from safetensors.torch import load_file, save_file

from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.models.gpt import GPT, build_model, global_names
from fastrlhf.models.heads import Head
from fastrlhf.models.hf.weights import hf_tensors
from fastrlhf.ops import linear_cross_entropy
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import LossHead
from fastrlhf.training import optimizer as optimizers
from fastrlhf.training.optimizer import Learner

# (parallel section, optimizer.distributed); the data-parallel size is 4 / (tensor * pipeline).
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "data": ({}, False),
    "data-sharded-optimizer": ({}, True),
    "tensor": ({"tensor": 2}, True),
    "sequence": ({"tensor": 2, "sequence": True}, True),
    "pipeline": ({"pipeline": 2}, True),
    "both": ({"tensor": 2, "pipeline": 2}, False),
    "both-sequence": ({"tensor": 2, "pipeline": 2, "sequence": True}, True),
}
SAVING = ("tensor", "pipeline", "data")
VOCAB = 101
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
    "init_std": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"family": "gpt", **SHAPE},
    "untied": {"family": "llama", "num_kv_heads": 2, "ffn_size": 48, "qk_norm": True, **SHAPE},
}
# eps is far above the rounding of gradients that are 0 in theory (a key's bias): Adam would scale
# the rounding up to a full step.
OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}
SCHEDULE = ScheduleConfig(decay="cosine", warmup_steps=2)


def global_batch(step: int) -> list[PackedBatch]:
    """Return four micro-batches of several sequences, different per step, equal on every rank."""
    generator = torch.Generator().manual_seed(step)
    return [
        pack(
            [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths],
            [2] * len(lengths),
        )
        for lengths in ((5, 9, 3), (12, 4), (3, 7, 3), (20,))
    ]


def lm_head(stage: GPT, denominator: float) -> LossHead[PackedBatch]:
    def head(
        hidden: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = linear_cross_entropy(
            hidden,
            labels=batch.labels,
            mask=batch.loss_mask,
            denominator=denominator,
            **stage.lm_head(),
        )
        return loss, {"loss": loss.detach()}

    return head


def scalar_head(stage: GPT, denominator: float) -> LossHead[PackedBatch]:
    def head(
        hidden: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (stage.score(hidden) - batch.tokens / VOCAB).square()[
            batch.loss_mask
        ].sum() / denominator
        return loss, {"loss": loss.detach()}

    return head


class Training:
    """A model and its learner, with the methods that training and saving need."""

    def __init__(
        self,
        mesh: Mesh,
        model: ModelConfig,
        seed: int = 5,
        head: Head = "lm",
        **optimizer: Any,
    ) -> None:
        self.mesh = mesh
        self.stage = build_model(model, mesh, VOCAB, head=head, seed=seed)
        config = OptimizerConfig(**{**OPTIMIZER, **optimizer})
        self.learner = Learner(mesh, self.stage, config, SCHEDULE, total_steps=10)

    def gradients(self, step: int, *, with_norms: bool = False) -> float:
        """Accumulate the gradients of a global batch and return its loss.

        `with_norms` measures the norms of the first micro-batch and of the others.
        """
        batches = global_batch(step)
        denominator = float(sum(batch.loss_mask.sum() for batch in batches))
        mine = batches[self.mesh.data_rank :: self.mesh.data_size]
        head = (lm_head if self.stage.head_kind == "lm" else scalar_head)(self.stage, denominator)
        if with_norms and len(mine) > 1:
            metrics, _ = self.learner.accumulate_with_norms([mine[:1], mine[1:]], head)
        else:
            metrics = self.learner.accumulate(mine, head)
        return self.mesh.sum_metrics(metrics, ["loss"])["loss"]

    def steps(self, numbers: Sequence[int], *, with_norms: bool = False) -> list[dict[str, float]]:
        """Train on these global batches; return loss, lr and gradient norm of each."""
        return [
            {"loss": self.gradients(number, with_norms=with_norms)} | self.learner.step()
            for number in numbers
        ]

    def main_gradients(self) -> dict[str, torch.Tensor]:
        """Return complete gradients on rank 0, by Hugging Face name."""
        own: dict[str, Any] = {
            name: vars(parameter)["main_grad"] for name, parameter in global_names(self.stage)
        }
        return dict(hf_tensors(self.stage, own))

    def weights(self) -> dict[str, torch.Tensor]:
        """Return complete weights on rank 0, by Hugging Face name."""
        own = {name: parameter.detach().clone() for name, parameter in global_names(self.stage)}
        return dict(hf_tensors(self.stage, own))

    def models(self) -> dict[str, Any]:
        return {"policy": self.stage}

    def learners(self) -> dict[str, Any]:
        return {"policy": self.learner}

    def statistics(self) -> dict[str, float]:
        return {}


def checkpointer(mesh: Mesh, folder: Path) -> Checkpointer:
    return Checkpointer(
        mesh, folder, CheckpointConfig(asynchronous=False), config_text="", tokenizer=""
    )


def two_steps(mesh: Mesh, kind: str, distributed: bool) -> dict[str, Any]:
    """Return the first global batch's gradients, the metrics of two steps and the weights then."""
    model = ModelConfig(**MODELS[kind], dtype="fp32")
    # A sharded optimizer sums only each rank's own shard, so gradients are read without one.
    replicated = Training(mesh, model, distributed=False)
    replicated.gradients(0)
    training = Training(mesh, model, distributed=distributed)
    steps = training.steps([0]) + training.steps([1], with_norms=mesh.world_size > 1)
    return {"gradients": replicated.main_gradients(), "steps": steps, "weights": training.weights()}


def save_and_continue(mesh: Mesh, folder: Path, distributed: bool) -> list[dict[str, float]]:
    """Run two steps, save a checkpoint and its weights, and return the next two steps.

    The weights are in folder/weights.safetensors.
    """
    training = Training(
        mesh, ModelConfig(**MODELS["untied"], dtype="fp32"), distributed=distributed
    )
    training.steps([0, 1])
    checkpointer(mesh, folder).save(2, training, {"step": 2, "cursor": 17})
    weights = training.weights()
    if mesh.rank == 0:
        save_file(weights, folder / "weights.safetensors")
    return training.steps([2, 3])


def load_and_continue(
    mesh: Mesh, folder: Path, distributed: bool, resaved: Path | None = None
) -> dict[str, Any]:
    """Load a checkpoint into a model with other weights; return the next two steps.

    Also returns whether the loaded weights are those saved. They are saved again to `resaved`
    before the steps.
    """
    training = Training(
        mesh, ModelConfig(**MODELS["untied"], dtype="fp32"), seed=99, distributed=distributed
    )
    reader = checkpointer(mesh, folder)
    newest = reader.newest()
    assert newest is not None
    state = reader.load(newest, training)
    assert (state["step"], state["cursor"]) == (2, 17)
    weights, saved = training.weights(), load_file(folder / "weights.safetensors")
    same = mesh.rank > 0 or (
        weights.keys() == saved.keys() and all(torch.equal(weights[n], saved[n]) for n in saved)
    )
    if resaved is not None:
        checkpointer(mesh, resaved).save(2, training, {"step": 2, "cursor": 17})
    return {"same weights": same, "steps": training.steps([2, 3])}


def there_and_back(mesh: Mesh, folder: Path, saved: str, distributed: bool) -> dict[str, bool]:
    """Return per layout whether files that it loaded and saved again are equal to `saved`."""
    wanted = tensor_files(folder / f"saved.{saved}")
    for via in LAYOUTS:
        training = Training(
            mesh, ModelConfig(**MODELS["untied"], dtype="fp32"), seed=99, distributed=distributed
        )
        checkpointer(mesh, folder).load(folder / f"{saved}.via.{via}" / "step_00000002", training)
        checkpointer(mesh, folder / f"{saved}.back.{via}").save(2, training, {"step": 2})
    return {via: tensor_files(folder / f"{saved}.back.{via}") == wanted for via in LAYOUTS}


def tensor_files(folder: Path) -> dict[str, str]:
    """Return the hash of each tensor file of the checkpoint, except the generators'."""
    entries = json.loads((folder / "step_00000002" / "files.json").read_text())["files"]
    return {
        n: e["blake2b"]
        for n, e in entries.items()
        if n.endswith(".safetensors") and not n.startswith("random")
    }


def resume_with_dropout(mesh: Mesh, folder: Path) -> list[list[dict[str, float]]]:
    """Return two steps after a checkpoint, without and with a restart.

    They depend on dropout's generators and the fp32 masters in the checkpoint.
    """
    model = ModelConfig(**MODELS["tied"], dtype="bf16", residual_dropout=0.2, attention_dropout=0.2)
    training = Training(mesh, model)
    training.steps([0])
    checkpointer(mesh, folder).save(1, training, {"step": 1})
    unbroken = training.steps([1, 2])
    meshes.seed_generators(mesh, 1234)
    again = Training(mesh, model, seed=99)
    checkpointer(mesh, folder).load(folder / "step_00000001", again)
    return [unbroken, again.steps([1, 2])]


def half_precision(mesh: Mesh, dtype: str, initial_loss_scale: float, steps: int) -> dict[str, Any]:
    """Train on one repeated global batch.

    Returns the steps, whether the first moved the weights, and whether all ranks skipped the same.
    """
    training = Training(
        mesh, ModelConfig(**MODELS["tied"], dtype=dtype), initial_loss_scale=initial_loss_scale
    )
    before = [parameter.detach().clone() for parameter in training.stage.parameters()]
    first = training.steps([0])
    moved = any(
        not torch.equal(a, b) for a, b in zip(before, training.stage.parameters(), strict=True)
    )
    metrics = first + training.steps([0] * (steps - 1))
    skipped = torch.tensor([row.get("skipped", 0.0) for row in metrics])
    gathered = [torch.empty_like(skipped) for _ in range(mesh.world_size)]
    dist.all_gather(gathered, skipped)
    return {
        "steps": metrics,
        "moved": moved,
        "agree": all(torch.equal(other, skipped) for other in gathered),
    }


def run(folder: Path, name: str) -> None:
    parallel, distributed = LAYOUTS[name]
    mesh = meshes.initialize(ParallelConfig(**parallel, timeout_s=1200), seed=3)
    out = folder / name
    out.mkdir(exist_ok=True)
    results: dict[str, Any] = {"place": [mesh.tensor_size, mesh.pipeline_size, mesh.data_size]}
    for kind in MODELS:
        trained = two_steps(mesh, kind, distributed)
        results[kind] = trained["steps"]
        if mesh.rank == 0:
            save_file(trained["gradients"], out / f"{kind}.gradients.safetensors")
            save_file(trained["weights"], out / f"{kind}.weights.safetensors")
    if name in SAVING:
        results["continued"] = save_and_continue(mesh, folder / f"saved.{name}", distributed)
    if name == "both-sequence":
        results["resumed"] = resume_with_dropout(mesh, folder / "dropout")
        results["fp16.overflow"] = half_precision(mesh, "fp16", 2.0**60, 3)
        results["fp16"] = half_precision(mesh, "fp16", 2.0**8, 5)
        results["bf16"] = half_precision(mesh, "bf16", 1.0, 5)
    if mesh.rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    meshes.finalize()


def load(folder: Path, name: str) -> None:
    parallel, distributed = LAYOUTS[name]
    mesh = meshes.initialize(ParallelConfig(**parallel, timeout_s=1200), seed=3)
    loaded = {
        saved: load_and_continue(
            mesh, folder / f"saved.{saved}", distributed, folder / f"{saved}.via.{name}"
        )
        for saved in SAVING
    }
    if mesh.rank == 0:
        (folder / name / "loaded.json").write_text(json.dumps(loaded))
    meshes.finalize()


def back(folder: Path, name: str) -> None:
    parallel, distributed = LAYOUTS[name]
    mesh = meshes.initialize(ParallelConfig(**parallel, timeout_s=1200), seed=3)
    same = there_and_back(mesh, folder, name, distributed)
    if mesh.rank == 0:
        (folder / name / "back.json").write_text(json.dumps(same))
    meshes.finalize()


if __name__ == "__main__":
    # Several gradient buckets, as in real models: with the default size these models have one.
    optimizers.DistributedDataParallelConfig = partial(
        DistributedDataParallelConfig, bucket_size=3000
    )  # type: ignore[misc]
    # Checkpoints are saved before they are loaded.
    for layout in LAYOUTS:
        run(Path(sys.argv[1]), layout)
    for layout in LAYOUTS:
        load(Path(sys.argv[1]), layout)
    for layout in SAVING:
        back(Path(sys.argv[1]), layout)
