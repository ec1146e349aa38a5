"""The experts that a sampler reports, against transformers' routers and in the trainer."""

import msgspec
import numpy as np
import pytest
from engine_sampling import load_tiny, make_sampler, request, run_all
from engine_training import datum, lora, operation
from tinsmith.engine.errors import UserError
from tinsmith.engine.training.trainer import Trainer

PROMPT = np.random.default_rng(1).integers(3, 320, 40)


def recorded(sampler, *requests):
    """Return the tokens and the experts, [tokens, layers, k], of all samples."""
    for each in requests:
        sampler.add(each)
    found = []
    for answer in run_all(sampler).values():
        prompt = PROMPT.tolist()
        for sequence in answer.sequences:
            tokens = np.array(prompt + np.frombuffer(sequence.tokens, np.int32).tolist())
            experts = sequence.experts
            found.append((tokens, np.frombuffer(experts.data, experts.dtype).reshape(experts.shape)))
    return found


def asked(name, samples, seed):
    plain = request(name, PROMPT, samples, max_tokens=30, seed=seed, stop_tokens=[])
    return msgspec.structs.replace(plain, record_routing=True)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"backend": "reference"}),
        ("gpt_oss", {}),
        ("qwen3_5_moe", {}),
    ],
)
def test_the_experts_of_samples_are_those_that_transformers_chooses(tmp_path, variant, options):
    """The samples include prompts found in the cache, copies of pages, and sequences that lose their
    pages."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = load_tiny(tmp_path, variant)
    layers, chosen, _ = model.config.routing
    sampler = make_sampler(model, kv_cache_tokens=160, **options)
    found = recorded(sampler, asked("first", 3, 1)) + recorded(sampler, asked("again", 1, 2))
    assert len(found) == 4
    reference = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    for tokens, experts in found:
        assert experts.shape == (len(tokens) - 1, layers, chosen)
        with torch.no_grad():
            logits = reference(torch.tensor(tokens[None, :-1]), output_router_logits=True).router_logits
        expected = np.stack([torch.topk(each, chosen).indices.numpy() for each in logits], axis=1)
        np.testing.assert_array_equal(np.sort(experts), np.sort(expected))

    # They are what a datum takes.
    trainer = Trainer(model.graph, model.base, model.config, max_sequence_length=128, chunk_tokens=64)
    state = trainer.create(lora())
    tokens, experts = found[0]
    plain = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
    given = plain | {"routed_experts": experts.reshape(len(experts), -1).astype(np.int64)}
    data = [datum(tokens[:-1], **each) for each in (plain, given)]
    (output,) = trainer.forward_backward([trainer.job(state, operation(data, forward_only=True))])
    np.testing.assert_allclose(*output.logprobs, atol=1e-5)


def test_routing_that_cannot_be_recorded_is_refused(tmp_path):
    dense = make_sampler(load_tiny(tmp_path / "dense"))
    with pytest.raises(UserError, match="record_routing: this model has no experts"):
        dense.add(asked("x", 1, 1))
    mixture = make_sampler(load_tiny(tmp_path / "mixture", "qwen3_moe"))
    with pytest.raises(UserError, match=r"record_routing: 1000000 samples may have .* tokens"):
        mixture.add(asked("x", 1_000_000, 1))
