"""Every number has an upper bound, every path can be a path, and no setting takes NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastrlhf.config import Config
from fastrlhf.data.prepare.rules import Rules
from fastrlhf.errors import UserError


def numbers(schema: dict[str, Any], key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, schema) of every number in a JSON schema with inlined definitions."""
    if schema.get("type") in ("integer", "number"):
        yield key, schema
    for part in ("properties", "$defs"):
        for name, inner in schema.get(part, {}).items():
            yield from numbers(inner, f"{key}.{name}" if key else name)
    for part in ("anyOf", "oneOf", "prefixItems"):
        for inner in schema.get(part, []):
            yield from numbers(inner, key)
    for part in ("items", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            yield from numbers(schema[part], key)


@pytest.mark.parametrize("model", [Config, Rules])
def test_every_number_has_both_bounds(model):
    found = list(numbers(model.model_json_schema()))
    assert len(found) >= (60 if model is Config else 6)
    for key, schema in found:
        assert schema.keys() & {"maximum", "exclusiveMaximum", "le", "lt"}, key
        # model.ffn_size checks its lower bound with a cure.
        low = schema.keys() & {"minimum", "exclusiveMinimum", "ge", "gt"}
        assert low or key == "ModelConfig.ffn_size", key


def number_keys() -> list[str]:
    owners = {
        field.annotation.__name__: name
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and field.annotation.__name__.endswith("Config")
    }
    keys = []
    for key, _ in numbers(Config.model_json_schema()):
        owner, _, name = key.partition(".")
        if owner in owners:
            keys.append(f"{owners[owner]}.{name}")
    return sorted(set(keys))


@pytest.mark.parametrize("key", number_keys())
def test_values_out_of_range_are_one_line(make, key):
    for value in (".nan", ".inf", "-.inf", "1" + "0" * 39, "1" + "0" * 400, "1.0e+39", "9" * 5000):
        for text in (value, f"'{value}'", f"[{value}]", f"{{a: {value}}}"):
            if key == "sample.k" and text.startswith("["):
                text = f"[1, {value}]"
            if key in ("data.pretrain", "data.train"):  # other values are paths
                text = f"{{a: {value}}}"
            with pytest.raises(UserError) as raised:
                make(f"{key}={text}")
            line = str(raised.value)
            assert line.isprintable() and f"{key}" in line and len(line) < 500


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"train.seed={2**63}", "expected a number less than or equal to 9223372036854775807"),
        (f"train.seed={2**64}", "expected a number less than or equal to 9223372036854775807"),
        ("parallel.timeout_s=1.0e+20", "is 1e+20, expected an integer of fewer digits"),
        ("parallel.timeout_s=1.0e+10", "expected a number less than or equal to 2147483647"),
        ("parallel.timeout_s=1e20", "expected an integer"),
        ("model.hidden_size=1000000000", "expected a number less than or equal to 4194304"),
        ("model.num_layers=1000000", "expected a number less than or equal to 16384"),
        ("generation.stop=['']", "generation.stop is '', expected"),
        ("generation.stop=''", "generation.stop is '', expected"),
        ("output_dir=''", 'expected a path; "." is the current folder'),
        (f"output_dir={'a' * 256}", "names of at most 255 bytes, one has 256"),
        (f"output_dir=runs/{'ü' * 128}/x", "names of at most 255 bytes, one has 256"),
        (f"output_dir={'abc/' * 1000}", "a path of at most 3800 bytes, it has 4000"),
        ('output_dir="a\\0b"', "a path without NUL characters"),
        (
            'output_dir="\\ud800"',
            "the value is not valid YAML: an escape is half of a surrogate pair",
        ),
        ('data.train=[ok, "a\\0b"]', "a path without NUL characters"),
        ('data.pretrain={"a\\0b": 1}', "a path without NUL characters"),
        (f"model.load={'a' * 256}", "names of at most 255 bytes"),
        (f"ppo.reward_model=[a, {'a' * 256}]", "names of at most 255 bytes"),
        ("sample.k=4..99999999999999999999", "a number, or least..most"),
        ("sample.k=1..20000", "expected a number less than or equal to 10000"),
        ("ppo.reward_weights=[true]", "expected a number"),
        ("generation.temperature=1.0e-40", "is too small to divide by; use 0"),
    ],
)
def test_limits_name_the_bound(make, override, expected):
    with pytest.raises(UserError) as raised:
        make(override)
    assert expected in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_model_that_nobody_can_hold(make):
    with pytest.raises(UserError, match=r"hidden_size 262144 .* is a model of 1\.\de\+16 weights"):
        make("model.hidden_size=262144", "model.num_heads=4", "model.num_layers=16384")
    largest = make(
        "model.num_layers=128", "model.hidden_size=16384", "model.num_heads=128",
        "model.vocab_size=256000", "model.max_positions=131072",
    )  # fmt: skip
    assert 4e11 < largest.model.num_weights < 5e11


def test_largest_values_are_accepted(make):
    make(f"train.seed={2**63 - 1}", "parallel.timeout_s=2147483647", "optimizer.lr=3.0e+38")
    make("output_dir=" + "/".join(["a" * 255] * 14))
