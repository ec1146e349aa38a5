"""LoRA gradients and weights after five Adam steps, beside PEFT on torch."""

import jax
import numpy as np
import pytest
from adapters import by_layer, parameters_with
from engine_training import datum, lora, make_trainer, relative, run, with_random_b
from tinsmith.engine.messages import AdamParams
from tinsmith.model.families import module_name

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
LENGTHS = [31, 7, 18, 3, 29]
ADAM = AdamParams(learning_rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.01, grad_clip_norm=5.0)


def sequences():
    rng = np.random.default_rng(3)
    return [(rng.integers(0, 320, n + 1), rng.normal(size=n).astype(np.float32)) for n in LENGTHS]


def peft_model(folder, state, model_config):
    """The same base and the same adapter in PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    targets = [*{site.name for _, site, _, _ in by_layer(state.weights, model_config)}, "lm_head"]
    config = LoraConfig(r=state.lora.rank, lora_alpha=state.lora.alpha, target_modules=targets)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for ours, theirs in pairs(state.weights, model, state.lora.rank, model_config):
            theirs.copy_(torch.tensor(ours))
    return model


def pairs(tree, model, rank, model_config):
    """(ours transposed to torch's layout and cut to the true rank, PEFT's parameter) of every matrix."""
    parameters = dict(model.named_parameters())

    def both(at, a, b):
        yield np.asarray(a)[:, :rank].T.copy(), parameters[f"base_model.model.{at}.lora_A.default.weight"]
        yield np.asarray(b)[:rank].T.copy(), parameters[f"base_model.model.{at}.lora_B.default.weight"]

    for layer, site, a, b in by_layer(tree, model_config):
        yield from both(module_name(model_config, f"layers.{site.name}.weight", layer), a, b)
    yield from both("lm_head", tree["unembed"]["a"], tree["unembed"]["b"])


def torch_backward(model, data):
    for tokens, weights in data:
        logits = model(torch.tensor(tokens[None, :-1])).logits[0]
        logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens[1:, None]))[:, 0]
        (-(torch.tensor(weights) * logprobs).sum()).backward()
    return logprobs.detach().numpy()


@pytest.mark.parametrize("variant", ["llama", "llama3", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text"])
def test_lora_training_equals_peft(tmp_path, variant):
    trainer = make_trainer(tmp_path / "model", variant)
    rank = 5  # padded to 8
    packed, unpacked = (with_random_b(trainer.create(lora(rank))) for _ in range(2))
    model = peft_model(tmp_path / "model", packed, trainer.config)
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=ADAM.learning_rate,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        weight_decay=ADAM.weight_decay,
    )
    data = sequences()
    ours = [datum(tokens[:-1], target_tokens=tokens[1:], weights=weights) for tokens, weights in data]
    for step in range(5):
        output = run(trainer, packed, ours)
        for one in ours:
            run(trainer, unpacked, [one])
        want = torch_backward(model, data)
        if step == 0:
            np.testing.assert_allclose(output.logprobs[-1], want, atol=1e-4)
            for state in (packed, unpacked):
                for got, parameter in pairs(state.gradients, model, rank, trainer.config):
                    assert relative(got, parameter.grad.numpy()) < 1e-3
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.grad_clip_norm)
        adam.step()
        adam.zero_grad()
        for state in (packed, unpacked):
            metrics = trainer.optim_step(state, ADAM)
            assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    for state in (packed, unpacked):
        for got, parameter in pairs(state.weights, model, rank, trainer.config):
            assert relative(got, parameter.detach().numpy()) < 1e-3
    assert len(trainer.compiled) == 3  # forward_backward of one shape, accumulate, optim_step


@pytest.mark.parametrize(
    "variant", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5", "qwen3_5_moe", "nemotron_h"]
)
def test_lora_training_of_what_peft_has_no_adapters_for_equals_torch(tmp_path, variant):
    """torch's Adam on the same factors: experts', and those of rows of delta nets' and Mamba-2's matrices."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path / "model", variant)
    packed, unpacked = (with_random_b(trainer.create(lora(5))) for _ in range(2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    leaves = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf), requires_grad=True), packed.weights)
    adam = torch.optim.AdamW(
        jax.tree.leaves(leaves),
        lr=ADAM.learning_rate,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        weight_decay=ADAM.weight_decay,
    )
    data = sequences()
    ours = [datum(tokens[:-1], target_tokens=tokens[1:], weights=weights) for tokens, weights in data]
    for step in range(5):
        output = run(trainer, packed, ours)
        for one in ours:
            run(trainer, unpacked, [one])

        def changed(tokens):
            parameters = parameters_with(model, leaves, trainer.config, packed.scale)
            return torch.func.functional_call(model, parameters, (tokens,))

        want = torch_backward(changed, data)
        if step == 0:
            np.testing.assert_allclose(output.logprobs[-1], want, atol=1e-4)
            for state in (packed, unpacked):
                for got, leaf in zip(jax.tree.leaves(state.gradients), jax.tree.leaves(leaves), strict=True):
                    assert relative(got, leaf.grad.numpy()) < 1e-3
        torch.nn.utils.clip_grad_norm_(jax.tree.leaves(leaves), ADAM.grad_clip_norm)
        adam.step()
        adam.zero_grad()
        for state in (packed, unpacked):
            trainer.optim_step(state, ADAM)
    for state in (packed, unpacked):
        for got, leaf in zip(jax.tree.leaves(state.weights), jax.tree.leaves(leaves), strict=True):
            assert relative(got, leaf.detach().numpy()) < 1e-3


def test_full_weight_training_equals_torch(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path / "model", "llama")
    state = trainer.create(None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    data = sequences()
    ours = [datum(tokens[:-1], target_tokens=tokens[1:], weights=weights) for tokens, weights in data]
    for _ in range(3):
        run(trainer, state, ours)
        torch_backward(model, data)
        adam.step()
        adam.zero_grad()
        trainer.optim_step(state, AdamParams(1e-3, 0.9, 0.95, 1e-8, 0.01))
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert relative(state.weights["embed_tokens"]["weight"], theirs["model.embed_tokens.weight"]) < 1e-3
    assert relative(state.weights["norm"]["weight"], theirs["model.norm.weight"]) < 1e-3
    for name, module in LINEARS.items():
        want = np.stack([theirs[f"model.layers.{layer}.{module}.{name}.weight"].T for layer in range(3)])
        assert relative(state.weights["layers"][name]["weight"], want) < 1e-3
