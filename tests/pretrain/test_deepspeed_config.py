"""The DeepSpeed configuration of a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.common.files import UserError
from pretrain import ROOT
from pretrain.deepspeed_config import deepspeed_config
from pretrain.deepspeed_keys import KNOWN, KNOWN_ZERO
from pretrain.recipe import load_recipe


def test_auto_is_filled_in_from_the_recipe() -> None:
    config = deepspeed_config(load_recipe("biogpt", ["deepspeed.stage=2", "optimizer.gradient_clipping=0.5"]), ranks=8)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 512 == config["train_micro_batch_size_per_gpu"] * 8 * 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5 and config["bf16"]["enabled"] is True
    assert config["zero_optimization"]["stage"] == 2
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2, but the recipe says 1"),
        ({"gradient_clipping": 3.0}, "gradient_clipping = 3.0, but the recipe says 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "remove `optimizer`: the recipe decides it"),
        ({"activation_checkpointing": {}}, r"use the recipe's model\.gradient_checkpointing"),
        ({"gradient_cliping": 1.0}, r"unknown key gradient_cliping; did you mean gradient_clipping\?"),
        (
            {"zero_optimization": {"stag": 1}},
            r"unknown key zero_optimization\.stag; did you mean zero_optimization\.stage\?",
        ),
        ({"zero_optimization": True}, r"zero_optimization = true: must be a section, {\.\.\.}$"),
        ({"bf16": True}, r"bf16 = true: must be a section"),
        ([{"stage": 1}], "not a JSON object"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    recipe = load_recipe("tiny", [f"deepspeed.config={path}", "deepspeed.stage=1"])
    with pytest.raises(UserError, match=message) as caught:
        deepspeed_config(recipe, 1)
    assert str(path) in str(caught.value)


def test_null_is_deepspeeds_own_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    zero = {"stage": 1, "offload_optimizer": None, "offload_param": None}
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": None}))
    config = deepspeed_config(load_recipe("tiny", [f"deepspeed.config={path}", "deepspeed.stage=1"]), 1)
    assert config["zero_optimization"] == {"stage": 1} and config["gradient_clipping"] == 1.0


def test_all_mistakes_of_a_deepspeed_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"scheduler": {}, "gradient_clipping": 3.0, "steps_per_prin": 5}))
    with pytest.raises(UserError) as caught:
        deepspeed_config(load_recipe("tiny", [f"deepspeed.config={path}"]), 1)
    assert all(key in str(caught.value) for key in ("`scheduler`", "gradient_clipping = 3.0", "steps_per_print"))


def test_the_known_keys_are_deepspeeds_own() -> None:
    """Every field of DeepSpeed's ZeRO section, by each of its names, and all constants that are top-level keys."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields: dict[str, Any] = DeepSpeedZeroConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    assert names <= set(KNOWN_ZERO)
    for name in ("zero0", "zero1", "zero2", "zero3"):
        content = json.loads((ROOT / "launch" / "deepspeed" / f"{name}.json").read_text())
        assert content.keys() <= set(KNOWN) and content["zero_optimization"].keys() <= set(KNOWN_ZERO)
