"""The DeepSpeed configuration of a recipe."""

import json
from pathlib import Path

import pytest

from data.common.files import UserError
from pretrain.deepspeed_config import deepspeed_config
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
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    recipe = load_recipe("tiny", [f"deepspeed.config={path}", "deepspeed.stage=1"])
    with pytest.raises(UserError, match=message) as caught:
        deepspeed_config(recipe, 1)
    assert str(path) in str(caught.value)
