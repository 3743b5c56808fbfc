"""YAML and overrides are read; each mistake is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastrlhf.config import Config, load_config
from fastrlhf.config import dump_config as dump
from fastrlhf.config.yaml_file import known_keys
from fastrlhf.errors import UserError


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, list(overrides))
    text = str(raised.value)
    assert "\n" not in text
    return text


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return path


def test_exponent_without_a_dot_is_a_float(minimal):
    assert yaml.safe_load("9e-6") == "9e-6", (
        "YAML 1.1 reads it as a string: the reason for this test"
    )
    lr = load_config(minimal).optimizer.lr
    assert isinstance(lr, float) and lr == 9e-6
    assert load_config(minimal, ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5


def test_one_path_is_a_list_of_one(minimal):
    assert load_config(minimal).data.train == ["a.jsonl"]
    assert load_config(minimal, ["data.train=[a, b]"]).data.train == ["a", "b"]


def test_overrides_win_in_order_and_reach_the_top_level(minimal):
    overrides = [
        "train.seed=1",
        "train.seed=2",
        "output_dir=out",
        "parallel.sequence=true",
        "data.valid=null",
    ]
    config = load_config(minimal, overrides)
    assert (config.train.seed, config.output_dir, config.parallel.sequence, config.data.valid) == (
        2,
        "out",
        True,
        None,
    )


def test_override_may_hold_an_equals_sign(minimal):
    assert load_config(minimal, ["generation.stop=a=b"]).generation.stop == ["a=b"]


def test_empty_section_takes_defaults(minimal):
    minimal.write_text(minimal.read_text() + "train:\n")
    assert load_config(minimal).train.seed == 1234


def test_dump_loads_back_equal(minimal, tmp_path):
    config = load_config(
        minimal, ["ppo.no_stop_penalty=null", "generation.stop=['\\n', 'Ü']", "train.epochs=0.5"]
    )
    again = load_config(write(tmp_path, dump(config)))
    assert again == config
    assert dump(again) == dump(config)
    assert config != load_config(minimal), "the comparison can tell two configurations apart"


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    lr=st.floats(1e-12, 10),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), max_size=3
    ),
)
@example(lr=1.0, seed=0, stop=["a\x85b", "\u2028", " \u2029 ", "\ufeff"])
@example(lr=1.0, seed=0, stop=["1e5", "yes", "010", "1:30", "2026-11-30", "0o17", "=", "<<"])
def test_any_value_survives_a_dump(lr, seed, stop, tmp_path_factory):
    base = {
        "model": {
            "family": "gpt",
            "num_layers": 1,
            "hidden_size": 4,
            "num_heads": 1,
            "max_positions": 8,
        },
        "data": {"tokenizer": "t"},
        "optimizer": {"lr": lr},
        "train": {"seed": seed},
        "generation": {"stop": stop},
        "output_dir": "o",
    }
    config = Config.model_validate(base)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_config(path) == config


def test_unknown_key_names_file_line_and_nearest(tmp_path, minimal):
    path = write(tmp_path, minimal.read_text().replace("  lr:", "  lrr:"))
    # The missing lr is a consequence: the misspelt key is shown first.
    expected = (
        f"{path}:11: unknown key optimizer.lrr; did you mean optimizer.lr? (and 1 more mistake)"
    )
    assert message(path) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.seed=1", "unknown key trian.seed; did you mean train.seed?"),
        ("train.sed=1", "unknown key train.sed; did you mean train.seed?"),
        (
            "optimizer.warmup_steps=3",
            "unknown key optimizer.warmup_steps; did you mean schedule.warmup_steps?",
        ),
        ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
        (
            "parallel.zzz=1",
            (
                "unknown key parallel.zzz; the keys of parallel are tensor, pipeline, context,"
                " sequence"
            ),
        ),
        ("zzz=1", "unknown key zzz; the keys are model, parallel, data,"),
        ("train.seed.x=1", "unknown key train.seed.x; the keys are model, parallel"),
    ],
)
def test_unknown_override_names_the_nearest(minimal, override, expected):
    assert message(minimal, override).startswith(f"override '{override}': {expected}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed=x", "train.seed is 'x', expected an integer"),
        ("train.seed=-1", "train.seed is -1, expected a number greater than or equal to 0"),
        ("train.steps=true", "train.steps is True, expected a number"),
        ("optimizer.lr=true", "optimizer.lr is True, expected a number"),
        ("model.rope_theta=no", "model.rope_theta is 'no', expected a number"),
        (
            "train.steps=1.5",
            "train.steps is 1.5, expected an integer, got a number with a fractional part",
        ),
        ("optimizer.lr=0", "optimizer.lr is 0, expected a number greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr is nan, expected a finite number"),
        ("model.family=gtp", "model.family is 'gtp', expected 'gpt' or 'llama'"),
        ("data.train=[a, 3]", "data.train is 3, expected a string"),
        ("train=3", "train is 3, expected a section with keys of its own, such as 'train: {...}'"),
        ("train={seed: x}", "train.seed is 'x', expected an integer"),
        ("optimizer={}", "missing required key optimizer.lr; add it, or pass optimizer.lr=VALUE"),
        ("output_dir=null", "output_dir is null, expected a string"),
        ("train.seed", "expected section.key=value, such as train.seed=1"),
        ("=1", "expected section.key=value, such as train.seed=1"),
        ("train..seed=1", "expected section.key=value, such as train.seed=1"),
        ("data.train=[a", "the value is not valid YAML: "),
    ],
)
def test_wrong_override_is_quoted(minimal, override, expected):
    assert message(minimal, override).startswith(f"override '{override}': {expected}")


def test_wrong_value_in_the_file_has_its_line(tmp_path, minimal):
    path = write(tmp_path, minimal.read_text().replace("num_layers: 4", "num_layers: four"))
    assert message(path) == f"{path}:3: model.num_layers is 'four', expected an integer"


def test_missing_key_points_at_its_section(tmp_path, minimal):
    path = write(tmp_path, minimal.read_text().replace("  tokenizer: tok\n", ""))
    assert (
        message(path)
        == f"{path}:7: missing required key data.tokenizer; add it, or pass data.tokenizer=VALUE"
    )


def test_missing_section_names_the_file(tmp_path):
    path = write(tmp_path, "output_dir: x\n")
    assert message(path).startswith(f"{path}: missing section model; add it")


def test_key_given_twice(tmp_path, minimal):
    path = write(tmp_path, minimal.read_text() + "train:\n  seed: 1\n  seed: 2\n")
    assert message(path) == f"{path}:15: train.seed is already set on line 14; remove one of them"


def test_conflict_points_at_its_line(tmp_path, minimal):
    path = write(tmp_path, minimal.read_text() + "parallel:\n  tensor: 3\n")
    assert message(path).startswith(
        f"{path}:14: parallel.tensor 3 does not divide model.num_heads 4; "
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  a: [1\nb: 2\n", ":3: not valid YAML: "),
        ("model:\n\t- a\n", ":2: not valid YAML: "),
        ("- a\n- b\n", ":1: expected sections such as 'model:' at the top level, not a list"),
        ("just text\n", ":1: expected sections"),
        ("model: &a\n  x: *b\n", ":2: not valid YAML: "),
        ("model: !!python/object:os.system {}\n", ":1: not valid YAML: "),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: "),
    ],
)
def test_malformed_yaml_has_its_line(tmp_path, text, expected):
    path = write(tmp_path, text)
    assert message(path).startswith(f"{path}{expected}")


def test_empty_file_lacks_its_sections(tmp_path):
    path = write(tmp_path, "")
    assert "missing section model; add it (and 3 more mistakes)" in message(path)


def test_missing_file_and_folder(tmp_path):
    assert message(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such configuration file"
    assert message(tmp_path).startswith(f"{tmp_path}: a folder, expected a YAML file")


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    assert message(path).startswith(f"{path}: ")


def test_merge_keys_work(tmp_path, minimal):
    text = minimal.read_text().replace("optimizer:\n", "optimizer: &o\n")
    path = write(tmp_path, text + "schedule:\n  <<: {warmup_steps: 3}\n")
    assert load_config(path).schedule.warmup_steps == 3


def test_every_key_can_be_overridden_with_its_own_value(make):
    config = make("ppo.reward_model=r", "train.steps=1", "model.vocab_size=11")
    values = config.model_dump(mode="json")
    leaves = [key for key in known_keys(Config) if "." in key]
    assert len(leaves) > 90
    overrides = []
    for key in leaves:
        section, name = key.split(".")
        overrides.append(
            f"{key}={yaml.safe_dump(values[section][name], default_flow_style=True, width=10**6)}"
        )
    overrides = [override.removesuffix("\n...\n") for override in overrides]
    assert make(*overrides) == config
