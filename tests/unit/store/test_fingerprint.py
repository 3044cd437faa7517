"""Fingerprints are equal for equal configurations and for these only, and each difference is explained."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_compress.store.fingerprint import canonical, explain, fingerprint

TEXT = st.text("ab.é", max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.dictionaries(TEXT, JSON, max_size=3)


@settings(max_examples=40, deadline=None)
@given(KEYS)
def test_order_of_keys_does_not_matter(value: dict) -> None:
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


def test_the_hash_is_the_one_of_the_documented_form() -> None:
    assert canonical({"b": (1, 2.5), "a": None, "é": True}) == '{"a":null,"b":[1,2.5],"\\u00e9":true}'
    # printf '{"a":1}' | sha256sum
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_json_form_are_refused_by_name(number: float) -> None:
    with pytest.raises(ValueError, match=r"qat\.lr\[1\] is -?(nan|inf)"):
        canonical({"qat": {"lr": [0.1, number]}})


def test_keys_that_would_collide_are_refused() -> None:
    with pytest.raises(TypeError, match="key 1 of gammas is int"):
        canonical({"gammas": {1: 0.5, "1": 0.25}})


def test_explains_field_by_field() -> None:
    old = {
        "stage": "qat",
        "version": 1,
        "config": {"epochs": 5, "bits": {"weights": 8}, "taps": [1, 2], "calibrator": "max", "ema": True, "lr": 1},
        "inputs": {"prune": "ab12cd" + "0" * 58},
        "data": "1" * 64,
    }
    new = {
        "stage": "qat",
        "version": 2,
        "config": {"epochs": 10, "bits": {"weights": 4}, "taps": [1, 3], "ema": 1, "lr": 1, "seed": None},
        "inputs": {"prune": "99ffee" + "0" * 58, "teacher": "c" * 64},
        "data": "1" * 64,
    }
    assert explain(new, old) == [
        "inputs.prune: ab12cd -> 99ffee",
        "inputs.teacher: not set -> cccccc",
        "qat.bits.weights: 8 -> 4",
        "qat.calibrator: max -> not set",
        "qat.ema: true -> 1",
        "qat.epochs: 5 -> 10",
        "qat.seed: not set -> null",
        "qat.taps: [1,2] -> [1,3]",
        "version: 1 -> 2",
    ]
    assert explain(old, old) == []


def test_a_config_by_section_is_named_by_section() -> None:
    old = {"stage": "qat", "config": {"qat": {"epochs": 5}, "device": "cpu"}}
    new = {"stage": "qat", "config": {"qat": {"epochs": 6}, "device": "cpu"}}
    assert explain(new, old) == ["qat.epochs: 5 -> 6"]


@settings(max_examples=40, deadline=None)
@given(KEYS, KEYS)
def test_different_fingerprints_are_never_left_unexplained(new: dict, old: dict) -> None:
    assert bool(explain({"config": new}, {"config": old})) == (fingerprint(new) != fingerprint(old))
