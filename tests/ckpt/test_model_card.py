"""Model cards of exports, as the Hugging Face hub's own library reads them."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from tinsmith.ckpt import model_card

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("base_model", [HUB, f"{HUB}@v1"])
def test_the_hub_finds_the_base_model_of_an_adapter(base_model: str) -> None:
    card = ModelCard(model_card.of_adapter(base_model, 8, 32.0))
    assert card.data.base_model == HUB
    assert card.data.library_name == "peft"
    assert card.data.tags == ["tinsmith", "lora", "transformers"]
    assert "rank 8 (alpha 32)" in card.text
    assert ("revision `v1`" in card.text) == base_model.endswith("@v1")


def test_a_merged_model_is_one_of_transformers() -> None:
    card = ModelCard(model_card.of_model(HUB))
    assert card.data.library_name == "transformers"
    assert card.data.to_dict()["base_model_relation"] == "finetune"


@pytest.mark.parametrize("base_model", ["/models/@home/my-base", "smollm2-135m"])
def test_a_base_model_that_is_not_on_the_hub_is_in_the_text_alone(base_model: str) -> None:
    card = ModelCard(model_card.of_adapter(base_model, 4, 16.0))
    assert card.data.base_model is None
    assert f"`{base_model}`" in card.text
