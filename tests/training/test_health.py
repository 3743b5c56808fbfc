"""Guards of every trainer: losses, gradients and weights that are not finite, and warnings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrlhf.algorithms import rm, sft
from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.checkpoint.soundness import DivergedError, check_policy_finite, nonfinite_models
from fastrlhf.commands import sample
from fastrlhf.config import Config
from fastrlhf.errors import UserError
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import train
from fastrlhf.training.health import WINDOW, HealthMonitor

MODEL = {
    "family": "gpt",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
    "dtype": "fp32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from configs.debug import make_data  # the root of the repository is on pytest's path

    made = tmp_path_factory.mktemp("guards")
    make_data.main(made / "data")
    yield made
    meshes.finalize()


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """Return `configure(section={...})`, a small SFT run that saves every step into tmp_path."""

    def make(**sections: dict[str, Any]) -> Config:
        data = folder / "data"
        base: dict[str, dict[str, Any]] = {
            "model": MODEL,
            "data": {
                "tokenizer": str(data / "tokenizer"),
                "train": str(data / "demonstrations.jsonl"),
                "cache": str(folder / "cache"),
                "max_prompt_tokens": 32,
                "max_response_tokens": 16,
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"decay": "constant", "warmup_steps": 0},
            "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 4},
            "checkpoint": {"interval": 1, "keep_last": 9, "asynchronous": False},
            "log": {"progress": False, "tensorboard": False},
        }
        for name, section in sections.items():
            base[name] = base.get(name, {}) | section
        return Config.model_validate({**base, "output_dir": str(tmp_path / "out")})

    return make


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoints/step_*"))


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("command", ["sft", "rm", "pretrain"])
def test_a_loss_that_is_not_finite_changes_no_weight(
    command: str,
    value: float,
    folder: Path,
    configure: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradients are finite: the loss alone shows it."""
    data = folder / "data"
    train_on = {"sft": "demonstrations.jsonl", "rm": "rankings.jsonl", "pretrain": "text.jsonl"}
    module: Any = rm if command == "rm" else sft
    name = "ranking_loss" if command == "rm" else "language_loss"
    original, calls, seen = getattr(module, name), [], []

    def broken(model: Any, *arguments: Any) -> Any:
        calls.append(1)
        found = original(model, *arguments)
        if len(calls) < 3:
            return found
        seen[:] = [model, [p.detach().clone() for p in model.parameters()]]
        if command == "rm":
            return found._replace(loss=found.loss + value)
        return found + value

    monkeypatch.setattr(module, name, broken)
    config = configure(data={"train": str(data / train_on[command]), "sequence_length": 24})
    with pytest.raises(UserError, match=r"^step 3: loss is -?(nan|inf); stopped before this") as no:
        train.train(command, config)
    model, weights = seen
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert names(tmp_path / "out") == ["step_00000001", "step_00000002"]
    # Step 3 is the first to read the weights of step 2, so only step 1 is known to be sound.
    assert "step_00000001 precedes the damage and is the latest checkpoint now" in str(no.value)
    assert (tmp_path / "out/checkpoints/latest").read_text() == "step_00000001"
    monkeypatch.setattr(module, name, original)
    train.train(command, config)
    assert names(tmp_path / "out")[-1] == "step_00000004"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_no_counted_token_names_the_step(
    split: str, configure: Callable[..., Config], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sft.PackedBatch.to

    def emptied(batch: Any, device: Any) -> Any:
        moved = original(batch, device)
        moved.loss_mask = torch.zeros_like(moved.loss_mask)
        moved.num_counted = 0
        return moved

    config = configure(
        data={"valid": str(folder / "data" / "demonstrations.jsonl")}, checkpoint={"save": False}
    )
    place = "step 1" if split == "train" else "evaluation"
    if split == "valid":
        evaluate = sft.evaluate_loss

        def patched(*arguments: Any) -> float:
            monkeypatch.setattr(sft.PackedBatch, "to", emptied)
            return evaluate(*arguments)

        from fastrlhf.run import jobs

        monkeypatch.setattr(jobs, "evaluate_loss", patched)
    else:
        monkeypatch.setattr(sft.PackedBatch, "to", emptied)
    with pytest.raises(UserError, match=f"^{place}: no token of .* counts in the loss"):
        train.train("sft", config)


# ---- weights ------------------------------------------------------------------------------------


def test_the_last_update_that_overflows_is_refused_and_not_saved(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    config = configure(optimizer={"lr": 3e38, "weight_decay": 0.9}, train={"steps": 1})
    with pytest.raises(UserError, match=r"^step 1: the weights of policy are not finite, so they"):
        train.train("sft", config)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("save", [True, False])
def test_a_weight_that_is_nan_is_never_saved(
    save: bool, configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damage is done by the update of step 3, after two sound checkpoints."""
    update, calls = sft.SupervisedFinetuning.step, []

    def damaging(self: Any, batches: Any) -> dict[str, float]:
        metrics = update(self, batches)
        calls.append(1)
        if len(calls) == 3:
            next(self.policy.model.parameters()).data.view(-1)[5] = math.nan
        return metrics

    monkeypatch.setattr(sft.SupervisedFinetuning, "step", damaging)
    config = configure(checkpoint={"save": save}, train={"steps": 3})
    with pytest.raises(UserError, match=r"^step 3: the weights of policy are not finite") as no:
        train.train("sft", config)
    if save:
        assert names(tmp_path / "out") == ["step_00000001", "step_00000002"]
        assert "step_00000002 precedes the damage: give the same command" in str(no.value)
    else:
        assert "there is no checkpoint yet" in str(no.value)


def test_no_checkpoint_is_named_if_the_first_update_destroyed_the_model(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    """The checkpoint of step 1 is finite, and resuming from it would fail the same way."""
    with pytest.raises(
        UserError, match=r"^step 2: loss is (nan|inf); .* no checkpoint in .*"
    ) as no:
        train.train("sft", configure(optimizer={"lr": 1e6}))
    assert names(tmp_path / "out") == ["step_00000001"]
    assert str(no.value).endswith(
        "start again with checkpoint.resume=never and a lower optimizer.lr"
    )
    train.train("sft", configure(checkpoint={"resume": "never", "interval": 0}))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert len(losses) == 4 and all(loss is not None and loss < 10 for loss in losses)


def test_the_advice_after_a_destroying_update_works(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    """A run that was sound until step 2 is resumed with a learning rate that destroys it."""
    config = configure(optimizer={"lr": 1e-3})
    train.train(
        "sft", config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
    )
    wild = configure(optimizer={"lr": 1e30, "clip_grad": 0.0})
    with pytest.raises(UserError) as no:
        train.train("sft", wild)
    named = re.findall(r"step_\d{8}", str(no.value))
    assert named and named[0] <= "step_00000002", str(no.value)
    train.train("sft", config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert len(losses) == 4 and all(loss is not None and loss < 10 for loss in losses)


def test_weights_are_checked_in_every_dtype(training: Callable[..., Any]) -> None:
    for dtype in ("fp32", "bf16", "fp16"):
        stage = training(dtype).stage
        device = next(stage.parameters()).device
        assert nonfinite_models({"a": stage, "b": stage}, device) == []
        for value in (math.nan, math.inf, -math.inf):
            list(stage.parameters())[-1].data.view(-1)[-1] = value
            assert nonfinite_models({"a": stage}, device) == ["a"]
            with pytest.raises(UserError, match=r"^runs/x: its weights are not finite"):
                check_policy_finite("runs/x", stage)


def test_checkpointer_refuses(checkpointer: Callable[..., Checkpointer], training: Any) -> None:
    writer, live = checkpointer(), training()
    writer.save(1, live, {"step": 1})
    next(live.stage.parameters()).data.view(-1)[0] = math.inf
    with pytest.raises(DivergedError, match="step 2: the weights of policy are not finite"):
        writer.save(2, live, {"step": 2})
    assert writer.newest() == writer.path(1)


def test_sampling_from_nan_weights_is_an_error(
    configure: Callable[..., Config], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(train={"steps": 1})
    train.train("sft", config)
    (shard,) = (tmp_path / "out/checkpoints/step_00000001/policy").glob("*.safetensors")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: torch.full_like(t, math.nan) for name, t in load_file(shard).items()}
    save_file(tensors, shard, metadata=metadata)
    monkeypatch.setattr("fastrlhf.checkpoint.model_folder.verify", lambda folder: [])
    sampling = configure(
        model={**MODEL, "load": str(tmp_path / "out")},
        data={"prompts": str(folder / "data" / "prompts.jsonl")},
    ).model_copy(update={"output_dir": str(tmp_path / "sampled")})
    with pytest.raises(UserError, match=r"policy: its weights are not finite: the training that"):
        sample.run(sampling)
    assert not (tmp_path / "sampled/samples.jsonl").exists()


# ---- fp16 and warnings --------------------------------------------------------------------------


def test_a_run_of_which_no_update_was_applied_fails(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    config = configure(
        model={**MODEL, "dtype": "fp16", "init_std": 100.0},
        train={"steps": 3},
        checkpoint={"interval": 0},
    )
    with pytest.raises(UserError, match="no update of policy was applied: fp16 gradients overfl"):
        train.train("sft", config)
    assert names(tmp_path / "out") == []


def monitor(updates: int = 1) -> HealthMonitor:
    learner = SimpleNamespace(state_dict=lambda: {"updates": updates})
    algorithm: Any = SimpleNamespace(models=dict, learners=lambda: {"policy": learner})
    saver: Any = SimpleNamespace(
        mesh=SimpleNamespace(rank=0, device="cpu"), checkpoints=list, folder=Path("checkpoints")
    )
    return HealthMonitor(algorithm, saver, 0)


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ({"loss": math.nan, "skipped": 1.0, "grad_norm": math.inf}, "skipped-updates"),
        ({"loss": 0.6931, "grad_norm": 0.3}, "dead-loss"),
        ({"loss": 0.0, "grad_norm": 0.0}, "dead-loss"),
        ({"grad_norm": 0.0}, "dead-loss"),
    ],
)
def test_warnings_have_a_name_and_are_repeated_after_a_window(
    metrics: dict[str, float], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    health = monitor()
    for step in range(1, 2 * WINDOW + 2):
        health.check(step, dict(metrics))
    lines = [line.split(":")[1].strip() for line in caplog.messages]
    assert lines == [name, name]


def test_a_healthy_run_has_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    health = monitor()
    for step in range(1, 4 * WINDOW):
        skipped = float(step % WINDOW != 0)  # a scale that is found again and again
        health.check(step, {"loss": 1.0 / step, "grad_norm": 1.0, "skipped": skipped})
    health.check_applied()
    assert caplog.messages == []


def test_a_loss_is_checked_again_after_the_step() -> None:
    """A trainer of another project gets the check too."""
    health = monitor()
    with pytest.raises(DivergedError, match="step 2: aux_loss is nan; stopped after this update"):
        health.check(2, {"loss": 1.0, "aux_loss": math.nan})
    health.check(2, {"loss": math.nan, "skipped": 0.5})
    health.check(2, {"loss": 1.0, "value_loss": math.nan, "skipped": 0.0, "value_skipped": 1.0})
    health.check(2, {"loss": 1.0, "explained_variance": math.nan})
    with pytest.raises(DivergedError, match="loss is nan"):
        health.check(2, {"loss": math.nan, "skipped": 0.0})


def test_a_validation_that_is_not_finite_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    monitor().check_validation(3, {"valid_loss": math.inf, "valid_accuracy": 0.5})
    (line,) = caplog.messages
    assert line.startswith("warning: validation-not-finite: step 3: valid_loss is inf")
