"""What the ``quantization_config`` of a checkpoint must say, and what the errors name if it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import moe_fused
from moe_fused.quantized import check_quantization, compressed_content, mxfp4_content, quantization_of

Edit = Callable[[dict[str, Any]], object]


def _weights(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["config_groups"]["group_0"]["weights"]
    return found


def _whole(name: str) -> Edit:
    return lambda content: content.update(format=name)


def _second_group(content: dict[str, Any]) -> None:
    content["config_groups"]["group_1"] = copy.deepcopy(compressed_content("nvfp4")["config_groups"]["group_0"])


CHANGES: dict[str, tuple[Edit, str]] = {
    "list": (lambda c: c.update(config_groups=[1]), "must have config_groups, an object .*, got a list"),
    "no groups": (lambda c: c.update(config_groups={}), "must have config_groups, an object .*, got none"),
    "group": (lambda c: c["config_groups"].update(group_0=[]), "objects in config_groups, got a list as group_0"),
    "weights": (
        lambda c: c["config_groups"]["group_0"].update(weights=None),
        "must have weights in config_groups.group_0, .*, got None",
    ),
    "group size": (
        lambda c: _weights(c).update(group_size=16),
        "is of format mxfp4-pack-quantized: group_size must be 32 in config_groups.group_0.weights, got 16",
    ),
    "bits": (lambda c: _weights(c).update(num_bits=8), "num_bits must be 4 in .*, got 8"),
    "two formats": (_second_group, "groups of one format, got mxfp4-pack-quantized and nvfp4-pack-quantized"),
    "another format for the whole": (
        _whole("nvfp4-pack-quantized"),
        "must have one format, got nvfp4-pack-quantized for the whole and mxfp4-pack-quantized in config_groups.group_0",
    ),
    "an unknown format for the whole": (
        _whole("float-quantized"),
        "must have one format, got float-quantized for the whole and mxfp4-pack-quantized in config_groups.group_0",
    ),
    "an unknown format of a group": (
        lambda c: c["config_groups"]["group_0"].update(format="pack-quantized"),
        "must have one format, got mxfp4-pack-quantized for the whole and pack-quantized in config_groups.group_0",
    ),
    "ignored is a string": (
        lambda c: c.update(ignore="lm_head"),
        "must have the names of modules in ignore, a list, got 'lm_head'",
    ),
    "ignored is no name": (lambda c: c.update(ignore=[4]), r"names of modules in ignore, a list, got \[4\]"),
    "no method": (lambda c: c.pop("quant_method"), "has no quant_method, which says .*, such as bitsandbytes, mxfp4, "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_faults_of_a_config_are_named(name: str) -> None:
    change, says = CHANGES[name]
    content = compressed_content("mxfp4")
    check_quantization("MODEL", "there", {"quantization_config": content})
    change(content)
    with pytest.raises(ValueError, match=f"MODEL there: the quantization_config in its config.json .*{says}"):
        check_quantization("MODEL", "there", {"quantization_config": content})


@pytest.mark.parametrize("value", ["mxfp4", ["mxfp4"], 4])
def test_a_config_that_is_no_object(value: object) -> None:
    with pytest.raises(ValueError, match=f"must be an object, got a {type(value).__name__}"):
        check_quantization("MODEL", "there", {"quantization_config": value})


def test_configs_that_are_read() -> None:
    for content, quant_type in (
        (compressed_content("nvfp4"), "nvfp4"),
        (mxfp4_content(), "mxfp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ):
        config = {"quantization_config": content}
        check_quantization("MODEL", "there", config)
        found = quantization_of(config)
        assert found is not None
        assert found.quant_type == quant_type


@pytest.mark.parametrize("whole", [None, "mixed-precision"])
def test_the_format_of_the_whole_may_say_nothing(whole: str | None) -> None:
    """compressed-tensors reads the format of the group."""
    content = compressed_content("nvfp4") | {"format": whole}
    check_quantization("MODEL", "there", {"quantization_config": content})
    found = quantization_of({"quantization_config": content})
    assert found is not None
    assert found.quant_type == "nvfp4"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (mxfp4_content(), "modules_to_not_convert"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "llm_int8_skip_modules"),
    ],
)
def test_names_of_dense_modules_are_a_list(content: dict[str, Any], field: str) -> None:
    for names in (None, [], ["lm_head"]):
        check_quantization("MODEL", "there", {"quantization_config": content | {field: names}})
    with pytest.raises(ValueError, match=f"must have the names of modules in {field}, a list, got 'lm_head'"):
        check_quantization("MODEL", "there", {"quantization_config": content | {field: "lm_head"}})


@pytest.mark.parametrize("kind", ["int4", "NF4", ["nf4"]])
def test_formats_that_bitsandbytes_does_not_have(kind: object) -> None:
    """They do not count as fp4, which is the format of a config that names none."""
    for content in ({"load_in_4bit": True}, {"load_in_4bit": True, "quant_method": "bitsandbytes"}):
        check_quantization("MODEL", "there", {"quantization_config": content})
        with pytest.raises(ValueError, match="must have nf4 or fp4 as bnb_4bit_quant_type, got"):
            check_quantization("MODEL", "there", {"quantization_config": content | {"bnb_4bit_quant_type": kind}})


def test_transforms_of_activations_are_refused() -> None:
    """Those of weights alone are in the weights. llm-compressor writes an empty config if there are none."""

    def content(*locations: str) -> dict[str, Any]:
        groups = {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": each} for each in locations]}}
        return compressed_content("nvfp4") | {"transform_config": {"config_groups": groups}}

    for sound in (compressed_content("nvfp4") | {"transform_config": {}}, content(), content("weight_input")):
        check_quantization("MODEL", "there", {"quantization_config": sound})
    with pytest.raises(NotImplementedError, match=r"MODEL there has .* \(u in transform_config, at input\)"):
        check_quantization("MODEL", "there", {"quantization_config": content("weight_input", "input")})


def test_formats_that_are_not_read_are_named() -> None:
    content = compressed_content("nvfp4") | {"format": "mixed-precision"}
    content["config_groups"]["group_1"] = {"format": "float-quantized", "weights": {"num_bits": 8}, "targets": []}
    with pytest.raises(
        NotImplementedError, match=r"compressed-tensors \(float-quantized and nvfp4-pack-quantized\), which"
    ):
        check_quantization("MODEL", "there", {"quantization_config": content})


def test_groups_of_older_configs_name_no_format() -> None:
    content = compressed_content("nvfp4")
    content["config_groups"]["group_0"]["format"] = None
    check_quantization("MODEL", "there", {"quantization_config": content})
    found = quantization_of({"quantization_config": content})
    assert found is not None
    assert found.quant_type == "nvfp4"


def test_quantization_config_needs_enable() -> None:
    moe_fused.disable()
    with pytest.raises(RuntimeError, match=r"call moe_fused.enable\(\) first"):
        moe_fused.quantization_config("mxfp4")
    moe_fused.enable()
    try:
        assert moe_fused.quantization_config("mxfp4").quant_type == "mxfp4"
    finally:
        moe_fused.disable()
