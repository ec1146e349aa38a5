"""The demo's data and its first loss, beside what transformers makes of the same conversations."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tinsmith.ckpt import smollm2

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tinker")
    monkeypatch.syspath_prepend(DEMO)
    for name in ("sft", "local_server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import sft

    return sft


def test_conversations_keep_their_manner_and_never_repeat(sft: ModuleType) -> None:
    training, held_out = sft.read("tinsmith.jsonl"), sft.read("held_out.jsonl")
    questions = [conversation["messages"][0]["content"] for conversation in training + held_out]
    assert len(training) >= 300
    assert len(set(questions)) == len(questions)
    for conversation in training + held_out:
        question, answer = conversation["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"].startswith("Aye, ")
        assert answer["content"].endswith(". Slow hands, sound work.")


def test_a_datum_is_the_chat_template_with_weight_on_the_answer(sft: ModuleType) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.obtain(smollm2.default_cache()))
    conversation = sft.read("tinsmith.jsonl")[0]
    datum = sft.datum(tokenizer, conversation)
    tokens = datum.model_input.to_ints()
    targets, weights = (datum.loss_fn_inputs[name].data for name in ("target_tokens", "weights"))
    rendered = tokenizer.apply_chat_template(conversation["messages"], tokenize=False)
    assert tokenizer.decode([tokens[0], *targets]) + "\n" == rendered
    assert tokens[1:] == list(targets[:-1])
    learned = tokenizer.decode([token for token, weight in zip(targets, weights, strict=True) if weight])
    assert learned == conversation["messages"][1]["content"] + "<|im_end|>"


@pytest.mark.reference
def test_the_first_loss_is_that_of_transformers(sft: ModuleType) -> None:
    pytest.importorskip("torch")
    import tinker
    from local_server import running_server

    with running_server(sft.MODEL) as url:
        service = tinker.ServiceClient(base_url=url, api_key="tml-test")
        client = service.create_lora_training_client(base_model=sft.MODEL, rank=sft.RANK).result()
        tokenizer = client.get_tokenizer()
        batch = [
            sft.datum(tokenizer, conversation) for conversation in sft.read("tinsmith.jsonl")[: sft.BATCH]
        ]
        loss = sft.mean_nll(client.forward(batch, "cross_entropy").result(), batch)
        service.close("success").result()
    folder = smollm2.obtain(smollm2.default_cache())
    assert loss == pytest.approx(sft.reference_nll(folder, batch), rel=1e-3)
