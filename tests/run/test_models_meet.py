"""Every model of a run is checked before data and weights are read: one line, status 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastrlhf.checkpoint.model_folder import describe_model, save_model
from fastrlhf.config import ModelConfig, ParallelConfig, load_config, reference
from fastrlhf.data.token_ids import largest_id, missing_ids
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import generate_all
from fastrlhf.generation.sampling import Sampler, SamplingParams
from fastrlhf.models.checks import check_saved, check_vocabulary
from fastrlhf.models.gpt import build_model
from fastrlhf.models.hf import save_hf
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.run.builder import RunBuilder
from tests.algorithms_support import tiny_ppo

PADDED = 640


@pytest.fixture(scope="module")
def mesh():
    yield meshes.initialize(ParallelConfig(), 0)
    meshes.finalize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    """Return the data, a reward model "rm", and language models "lm" and "padded" (640 rows)."""
    folder = tmp_path_factory.mktemp("meet")
    tiny_ppo.make_data(folder)
    tiny_ppo.save_reward_model(folder, mesh)
    tokenizer = str(folder / "data" / "tokenizer")
    rows = len(load_tokenizer(tokenizer))
    for name, size, seed in (("lm", rows, 1), ("padded", PADDED, 2)):
        model = build_model(ModelConfig(**tiny_ppo.MODEL), mesh, size, seed=seed)
        save_model(folder / name, model, tokenizer=tokenizer)
        if name == "lm":
            save_hf(model, folder / "hf", load_tokenizer(tokenizer))
    return folder


def edited(folder: Path, name: str, **changes: int) -> Path:
    """Return a copy of rm whose description alone is changed: only descriptions may be read."""
    copy = folder / name
    shutil.copytree(folder / "rm", copy, dirs_exist_ok=True)
    path = copy / "model.json"
    content = json.loads(path.read_text())
    content["model"] |= {key: value for key, value in changes.items() if key != "vocab_size"}
    content["vocab_size"] = changes.get("vocab_size", content["vocab_size"])
    path.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("changes", "layout", "problem"),
    [
        ({"num_layers": 3}, {"pipeline": 2}, "parallel.pipeline 2 does not divide its num_layers 3"),
        ({"num_layers": 32}, {"pipeline": 12}, "parallel.pipeline 12 does not divide its num_layers 32"),
        ({"num_heads": 3, "num_kv_heads": 3, "head_dim": 8}, {"tensor": 2},
         "parallel.tensor 2 does not divide its num_heads 3"),
        ({"num_kv_heads": 1}, {"tensor": 2}, "parallel.tensor 2 does not divide its num_kv_heads 1"),
        ({"ffn_size": 129}, {"tensor": 2}, "parallel.tensor 2 does not divide its ffn_size 129"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["ppo.reward_model", "ppo.value_model", "eval.reward_model"])
def test_a_layout_that_a_loaded_model_does_not_fit(
    folder: Path, role: str, changes: dict[str, int], layout: dict[str, int], problem: str
):
    path = edited(folder, "edited", **changes)
    tokenizer = str(folder / "data" / "tokenizer")
    with pytest.raises(UserError) as error:
        check_saved(
            describe_model(path),
            role,
            ParallelConfig(**layout),
            load_tokenizer(tokenizer),
            tokenizer,
        )
    assert str(error.value).startswith(f"{role} {path}: {problem}; use a divisor of")


def checked(folder: Path, mesh: Mesh, **ppo: object) -> None:
    RunBuilder(tiny_ppo.config(folder, ppo=ppo), mesh).check_models(ppo=True)


def test_the_models_of_ppo_are_all_checked(folder: Path, mesh: Mesh):
    checked(folder, mesh, reference_model=str(folder / "lm"))
    few = str(edited(folder, "few", vocab_size=300))
    short = str(edited(folder, "short", max_positions=41))
    largest = largest_id(load_tokenizer(folder / "data" / "tokenizer"))
    for key in ("reward_model", "value_model"):
        with pytest.raises(
            UserError, match=rf"has the token id {largest}, but ppo.{key} .*300 tok"
        ):
            checked(folder, mesh, **{key: few})
        with pytest.raises(UserError, match=rf"ppo.{key} .* reads 41 tokens, .* are 42"):
            checked(folder, mesh, **{key: short})
    with pytest.raises(UserError, match=r"ppo.reference_model .* give a language model"):
        checked(folder, mesh, reference_model=str(folder / "rm"))
    with pytest.raises(UserError, match=r"ppo.reward_model .* is a language model"):
        checked(folder, mesh, reward_model=str(folder / "lm"))


def test_a_vocabulary_is_compared_with_the_largest_id(folder: Path):
    """A tokenizer of few tokens may have a large id."""
    ids = {"a": 0, "b": 5000}
    tokenizer = type("Sparse", (), {"get_vocab": lambda self: ids, "__len__": lambda self: 2})
    saved = describe_model(folder / "lm")
    with pytest.raises(UserError, match=f"the token id 5000, but .*{saved.vocab_size} tokens"):
        check_vocabulary(saved, tokenizer(), saved.tokenizer)
    assert missing_ids(tokenizer()) == list(range(1, 5000))


def run_yaml(folder: Path, model: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"model: {model}\ndata: {{tokenizer: {folder}/data/tokenizer}}\n"
        f"optimizer: {{lr: 1e-3}}\noutput_dir: {folder}/out\n"
    )
    return path


@pytest.mark.parametrize(("key", "name"), [("load", "lm"), ("hf", "hf"), ("load", "padded")])
def test_a_checkpoint_alone_gives_the_shape(folder: Path, mesh: Mesh, key: str, name: str):
    path = run_yaml(folder, f"{{{key}: {folder / name}, dtype: fp32}}")
    model = load_config(path).model
    for field in ("num_layers", "hidden_size", "num_heads", "max_positions"):
        assert getattr(model, field) == tiny_ppo.MODEL[field]
    rows = len(load_tokenizer(folder / "data" / "tokenizer"))
    # The export has a row for its pad token.
    assert model.vocab_size == {"padded": PADDED, "hf": rows + 1}.get(name, rows)
    RunBuilder(load_config(path), mesh).check_models()
    [line] = [line for line in reference.show(path).splitlines() if " num_layers:" in line]
    assert line.split("#") == [line.split("#")[0], f" {folder / name}"]
    wrong = load_config(path, ["model.num_layers=4"])
    with pytest.raises(UserError, match=rf"model.num_layers is 4, .*{name} has 2"):
        RunBuilder(wrong, mesh).check_models()


def test_a_checkpoint_alone_that_is_not_there(folder: Path):
    with pytest.raises(UserError, match="nothing: no model here"):
        load_config(run_yaml(folder, "{load: nothing}"))


def test_rows_that_are_no_token_are_never_sampled(folder: Path, mesh: Mesh):
    """Half of a padded vocabulary's probability is in its padding; ratios stay 1."""
    config = tiny_ppo.config(
        folder, model={**tiny_ppo.MODEL, "load": str(folder / "padded"), "vocab_size": PADDED}
    )
    ppo, prompts = tiny_ppo.build(mesh, config)
    last = largest_id(ppo.tokenizer)
    flat = [prompt.tokens for batch in prompts for prompt in batch]
    free = generate_all(ppo.policy.model, flat, ppo.sampling, eos=0)
    assert max(token for row in free for token in row.tokens) <= last, "the head excludes padding"
    loose = build_model(ModelConfig(**tiny_ppo.MODEL), mesh, PADDED, seed=2)
    rows = generate_all(loose, flat, ppo.sampling, eos=0)
    assert max(token for row in rows for token in row.tokens) > last, "the padding has mass"
    rows = generate_all(loose, flat, ppo.sampling, tokenizer=ppo.tokenizer)
    assert max(token for row in rows for token in row.tokens) <= last
    metrics = ppo.step(prompts)
    assert metrics["ratio_deviation"] < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}], ids=str
)
def test_holes_are_never_sampled(options: dict[str, float]):
    """The log-probabilities stay those of all rows, as training computes them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(256, 8)
    weight[:250] = torch.randn(250, 8, generator=generator)
    hidden = torch.randn(400, 8, generator=generator)
    holes = list(range(0, 250, 2))
    params = SamplingParams(**options)
    sampler = Sampler(params, weight, 250, None, 1, missing=holes)
    tokens, logprobs = sampler(hidden, torch.arange(400), torch.full((400,), 3))
    assert (tokens % 2 == 1).all() and tokens.max() < 250
    everything = (hidden @ weight[:250].T / (params.temperature or 1.0)).log_softmax(-1)
    # Both are fp32 log-softmaxes of 250 terms; 1e-5 is above their rounding of values near 30.
    torch.testing.assert_close(
        logprobs, everything.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )


def test_the_reference_is_the_given_model(folder: Path, mesh: Mesh):
    """Reference log-probs are those of ppo.reference_model; by default the policy's start's."""
    other = build_model(ModelConfig(**tiny_ppo.MODEL), mesh, PADDED, seed=2)
    own, prompts = tiny_ppo.build(mesh, tiny_ppo.config(folder))
    for (_, start), (_, kept) in zip(
        own.policy.model.named_parameters(), own.reference.named_parameters(), strict=True
    ):
        assert torch.equal(start, kept)
    given, _ = tiny_ppo.build(
        mesh, tiny_ppo.config(folder, ppo={"reference_model": str(folder / "padded")})
    )
    for (name, mine), (_, theirs) in zip(
        given.reference.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    for policy, same in zip(
        own.policy.model.parameters(), given.policy.model.parameters(), strict=True
    ):
        assert torch.equal(policy, same)
    assert given.step(prompts)["kl"] != own.step(prompts)["kl"]
    state = given.state_dict()
    assert state["reference_model"] == str(folder / "padded")
    given.load_state_dict(state)
    with pytest.raises(UserError, match=r"ppo.reference_model is null, but the run to resume"):
        own.load_state_dict(state)
