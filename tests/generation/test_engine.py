"""The engine in one process: equality with a loop without a cache, order, endings, model state."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastrlhf.data.batches import pack
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
from fastrlhf.errors import UserError
from fastrlhf.generation import Generated, SamplingParams, generate, generate_all
from fastrlhf.generation import slots as slots_module
from fastrlhf.generation.stopping import StopStrings
from fastrlhf.models.gpt import GPT
from fastrlhf.models.layout import KVCache
from fastrlhf.parallel.mesh import Mesh

EOS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {},
    "exact gelu, no biases, untied": {"activation": "gelu", "bias": False, "tie_embeddings": False},
    "biases only in qkv, normalised heads": {
        "bias": False,
        "qkv_bias": True,
        "qk_norm": True,
        "head_dim": 16,
    },
    "rope and layernorm": {"position": "rope"},
    "windowed": {},
}
FAMILY_OF = {
    "llama": "llama",
    "biases only in qkv, normalised heads": "llama",
    "windowed": "windowed",
}
"""Variant -> family of `cases.build`; others are "gpt"."""


@pytest.fixture(scope="module")
def model(cases: ModuleType, mesh: Mesh) -> GPT:
    return cases.build("gpt", mesh)


def variant(cases: ModuleType, mesh: Mesh, name: str) -> GPT:
    return cases.build(
        FAMILY_OF.get(name, "gpt"),
        mesh,
        **VARIANTS[name],
    )


@torch.no_grad()
def greedy_loop(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Decode greedily without a cache: a full forward pass per token."""
    model.eval()
    sequence = list(prompt)
    head = model.lm_head()
    while len(sequence) < len(prompt) + count:
        hidden = model(pack([sequence], [0]))
        sequence.append(int((hidden[-1] @ head["weight"][: head["vocab_size"]].T).argmax()))
        if sequence[-1] == EOS:
            break
    return sequence[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_a_loop_without_cache(cases: ModuleType, mesh: Mesh, name: str) -> None:
    model = variant(cases, mesh, name)
    prompts = cases.prompts(model.vocab_size)
    params = SamplingParams(max_new_tokens=9, temperature=0.0)
    out = generate_all(model, prompts, params, mesh=mesh, eos=EOS, slots=4)
    assert [response.tokens for response in out] == [
        greedy_loop(model, prompt, 9) for prompt in prompts
    ]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(cases: ModuleType, mesh: Mesh, dtype: str) -> None:
    """Log-probabilities equal a training forward's up to rounding (2^-6 for logits of size 4)."""
    model = cases.build("llama", mesh, dtype=dtype)
    prompts = cases.prompts(model.vocab_size)
    out = generate_all(
        model, prompts, SamplingParams(max_new_tokens=9, seed=1), mesh=mesh, eos=EOS, slots=4
    )
    again = cases.recomputed(model, mesh, prompts, out, 1.0)
    for response, logprobs in zip(out, again, strict=True):
        assert response.logprobs == pytest.approx(logprobs, abs=0.04)


def test_order_slots_and_neighbours_change_nothing(
    cases: ModuleType, mesh: Mesh, model: GPT
) -> None:
    prompts = cases.prompts(model.vocab_size)
    params = SamplingParams(max_new_tokens=20, seed=4)
    expected = generate_all(model, prompts, params, mesh=mesh, eos=EOS, slots=64)
    for slots in (1, 3, 8):
        out = generate_all(model, prompts, params, mesh=mesh, eos=EOS, slots=slots)
        assert [response.tokens for response in out] == [response.tokens for response in expected]
    ids = [7, 2, 9]
    some = generate_all(model, [prompts[i] for i in ids], params, mesh=mesh, eos=EOS, ids=ids)
    assert [response.tokens for response in some] == [expected[i].tokens for i in ids]
    again = generate_all(model, [prompts[0]] * 2, params, mesh=mesh, eos=EOS)
    assert again[0].tokens != again[1].tokens  # ids differ


def test_two_hundred_prompts_through_sixteen_slots(
    mesh: Mesh, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt is lost or repeated, and no step is computed for a sequence that has ended."""
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) + 1 for n in torch.randperm(200, generator=generator)]
    prompts = [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]
    rows = []
    decode = slots_module.SlotGroup.decode

    def counting(group: slots_module.SlotGroup) -> slots_module.DecodeBatch:
        batch = decode(group)
        rows.append(batch.count)
        return batch

    monkeypatch.setattr(slots_module.SlotGroup, "decode", counting)
    params = SamplingParams(max_new_tokens=16, seed=3)
    out = list(generate(model, prompts, params, mesh=mesh, eos=EOS, slots=16))
    assert sorted(response.index for response in out) == list(range(200))
    assert [response.index for response in out] != list(range(200))  # streamed as they finish
    assert sum(rows) == sum(len(response.tokens) - 1 for response in out)
    assert max(rows) == 16
    assert {response.stopped for response in out} == {True, False}
    for response in out:
        assert len(response.logprobs) == len(response.tokens)
        assert response.stopped == (response.tokens[-1] == EOS)
        assert EOS not in response.tokens[:-1]
        assert response.stopped or len(response.tokens) == 16


def test_prefill_in_many_micro_batches(
    cases: ModuleType, mesh: Mesh, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = cases.prompts(model.vocab_size)
    params = SamplingParams(max_new_tokens=5, seed=4)
    expected = generate_all(model, prompts, params, mesh=mesh, eos=EOS)
    monkeypatch.setattr(slots_module, "PREFILL_TOKENS", 40)
    chunks = slots_module._chunks([slots_module.Request(0, 0, prompt, 5) for prompt in prompts])
    assert len(chunks) > 3
    assert all(
        max(len(s.prompt) for s in chunk) * len(chunk) <= 40 or len(chunk) == 1 for chunk in chunks
    )
    out = generate_all(model, prompts, params, mesh=mesh, eos=EOS)
    assert [response.tokens for response in out] == [response.tokens for response in expected]


def test_lengths(cases: ModuleType, mesh: Mesh, model: GPT) -> None:
    prompts = cases.prompts(model.vocab_size)
    one = generate_all(
        model, prompts, SamplingParams(max_new_tokens=1), mesh=mesh, eos=EOS, slots=3
    )
    assert [len(response.tokens) for response in one] == [1] * len(prompts)
    params = SamplingParams(max_new_tokens=30, min_new_tokens=30)
    longest = max(len(prompt) for prompt in prompts)
    cut = generate_all(model, prompts, params, mesh=mesh, eos=EOS, max_length=longest + 2)
    assert [len(r.tokens) for r in cut] == [
        min(30, longest + 2 - len(prompt)) for prompt in prompts
    ]
    full = generate_all(model, [[5] * 255], params, mesh=mesh, eos=EOS)
    assert len(full[0].tokens) == 1  # the model's last position is used
    assert generate_all(model, [], params, mesh=mesh, eos=EOS) == []


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (
            [[1], [2] * 256],
            {},
            UserError,
            r"prompt 1 has 256 tokens, and model.max_positions 256 leaves no room",
        ),
        (
            [[2] * 9],
            {"max_length": 9},
            UserError,
            r"prompt 0 has 9 tokens, and max_length 9 leaves no room",
        ),
        ([[1], []], {}, UserError, "prompt 1 is empty"),
        ([[1]], {"slots": 0}, ValueError, "slots is 0"),
        ([[1]], {"eos": 300}, ValueError, "eos is 300"),
        ([[1]], {"ids": [1, 2]}, ValueError, "ids has 2 entries for 1 prompts"),
    ],
)
def test_invalid_arguments(
    mesh: Mesh, model: GPT, prompts: list, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        generate(
            model,
            prompts,
            SamplingParams(max_new_tokens=2),
            **{"mesh": mesh, "eos": EOS, **options},
        )
    assert "\n" not in str(caught.value)


def test_dropout_is_off_and_the_training_flag_is_restored(cases: ModuleType, mesh: Mesh) -> None:
    params = SamplingParams(max_new_tokens=8, seed=2)
    prompts = cases.prompts(300)
    quiet = cases.build("gpt", mesh, residual_dropout=0.0)
    dropping = cases.build(
        "gpt", mesh, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5
    )
    for training in (True, False):
        dropping.train(training)
        out = generate_all(dropping, prompts, params, mesh=mesh, eos=EOS)
        assert dropping.training is training
        assert out == generate_all(quiet, prompts, params, mesh=mesh, eos=EOS)
    stream = generate(dropping.train(), prompts, params, mesh=mesh, eos=EOS)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()  # type: ignore[attr-defined]
    assert dropping.training
    assert all(module.training for module in dropping.modules())


def test_cache_is_freed(mesh: Mesh, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    class Watched(KVCache):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(slots_module, "KVCache", Watched)
    generate_all(model, [[1], [2]], SamplingParams(max_new_tokens=3), mesh=mesh, eos=EOS)
    assert [cache() for cache in caches] == [None]


def test_cache_stays_within_its_budget(
    mesh: Mesh,
    cases: ModuleType,
    model: GPT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A small budget means fewer slots, one log line, and the same responses."""
    made = []

    class Watched(KVCache):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(slots_module, "KVCache", Watched)
    prompts = cases.prompts(model.vocab_size)
    free = generate_all(model, prompts, SamplingParams(max_new_tokens=9, seed=4), eos=EOS)
    assert made[0].rows == len(prompts)
    # 2 layers, keys and values, (longest prompt + 9) tokens of 32 numbers of 4 bytes.
    row = 2 * 2 * (max(map(len, prompts)) + 9) * 32 * 4
    params = SamplingParams(max_new_tokens=9, seed=4, cache_mb=4.9 * row / 1e6)
    bounded = generate_all(model, prompts, params, eos=EOS)
    assert made[1].rows == 3
    used = sum(buffer.nbytes for layer in made[1]._layers.values() for buffer in layer)
    assert used == 4 * row  # three rows and the scratch row
    assert [response.tokens for response in bounded] == [response.tokens for response in free]
    (line,) = [record.message for record in caplog.records if "decode at once" in record.message]
    assert "3 sequences" in line and "generation.cache_mb" in line
    with pytest.raises(
        UserError,
        match=r"generation.cache_mb .* holds no sequence: one sequence of 40 tokens takes",
    ):
        generate_all(
            model, prompts, SamplingParams(max_new_tokens=9, cache_mb=1.9 * row / 1e6), eos=EOS
        )


def test_stop_token_and_mesh_by_default(
    tokenizer: Any, cases: ModuleType, mesh: Mesh, model: GPT
) -> None:
    """`eos` defaults to the tokenizer's; without a tokenizer every response reaches its limit."""
    prompts, params = cases.prompts(300), SamplingParams(max_new_tokens=40, seed=4, top_k=3)
    explicit = generate_all(model, prompts, params, mesh=mesh, eos=tokenizer.eos_token_id)
    assert generate_all(model, prompts, params, tokenizer=tokenizer) == explicit
    endless = generate_all(model, prompts, SamplingParams(max_new_tokens=40, seed=4))
    assert {len(response.tokens) for response in endless} == {40}
    assert not any(response.stopped for response in endless)


# ---- stop strings --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(
        ["the cat sat on the mat. Überraschung! naïve café 🙂 end\n\nHuman: "] * 4, 300, folder
    )
    return load_tokenizer(folder)


def first_completed(tokenizer: Any, stop: tuple[str, ...], tokens: list[int]) -> int | None:
    """Return the length of the shortest prefix whose text contains a stop string."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n], clean_up_tokenization_spaces=False)
        if any(s in text for s in stop):
            return n
    return None


@pytest.mark.parametrize(
    "stop", [("\n\nHuman:",), ("🙂",), ("é",), (" mat. Üb", "sat on"), ("<|endoftext|>",)]
)
def test_stop_strings_cut_by_any_tokens(tokenizer: Any, stop: tuple[str, ...]) -> None:
    text = "the cat sat at. naïve café 🙂🙂 end the mat. Überraschung!\n\nHuman: hi"
    encoded = tokenizer.encode(text)
    pieces = [token for word in text for token in tokenizer.encode(word)]  # one character at a time
    for tokens in (encoded, pieces, [*encoded, tokenizer.eos_token_id]):
        matcher = StopStrings(stop, tokenizer)
        found = next(
            (n for n in range(1, len(tokens) + 1) if matcher.completed_by(tokens[:n])), None
        )
        assert found == first_completed(tokenizer, stop, tokens)
    assert any(s in text + "<|endoftext|>" for s in stop)


def test_stop_strings_end_responses(
    tokenizer: Any, cases: ModuleType, mesh: Mesh, model: GPT
) -> None:
    prompts = cases.prompts(300)
    params = {"max_new_tokens": 24, "seed": 11, "top_k": 20}

    def run(stop: tuple[str, ...]) -> list[Generated]:
        sampling = SamplingParams(**params, stop=stop)  # type: ignore[arg-type]
        return generate_all(
            model, prompts, sampling, mesh=mesh, eos=EOS, slots=4, tokenizer=tokenizer
        )

    free = run(())
    text = tokenizer.decode(free[2].tokens, clean_up_tokenization_spaces=False)
    stop = (text[4:7], text[9:11])
    ended = run(stop)
    for uncut, cut in zip(free, ended, strict=True):
        n = first_completed(tokenizer, stop, uncut.tokens)
        assert cut.tokens == uncut.tokens[:n]
        assert cut.logprobs == pytest.approx(uncut.logprobs[:n], abs=1e-5)
        assert cut.stopped == (uncut.stopped or n is not None)
    assert len(ended[2].tokens) < len(free[2].tokens)
    with pytest.raises(ValueError, match="tokenizer"):
        generate(model, prompts, SamplingParams(stop=("x",)), mesh=mesh, eos=EOS)


def test_any_of_several_stop_tokens_ends_a_response(
    model: GPT, mesh: Mesh, cases: ModuleType
) -> None:
    prompts = [[5, 6, 7], [1], [9, 9]]
    params = SamplingParams(max_new_tokens=12, seed=5)
    expected = generate_all(model, prompts, params, mesh=mesh, eos=EOS)
    longest = max(expected, key=lambda response: len(response.tokens))
    other = longest.tokens[2]
    stopped = generate_all(model, prompts, params, mesh=mesh, eos=(EOS, other))
    for short, full in zip(stopped, expected, strict=True):
        ends = [i for i, token in enumerate(full.tokens) if token in (EOS, other)]
        length = ends[0] + 1 if ends else len(full.tokens)
        assert short.tokens == full.tokens[:length] and short.stopped == bool(ends)
        assert short.logprobs == pytest.approx(full.logprobs[:length], abs=1e-5)
    late = SamplingParams(max_new_tokens=12, min_new_tokens=6, seed=5)
    for response in generate_all(model, prompts, late, mesh=mesh, eos=(EOS, other)):
        assert not {EOS, other} & set(response.tokens[:5])
