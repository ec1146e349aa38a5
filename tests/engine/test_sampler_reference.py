"""Greedy samples are transformers' `generate`, for every family, with an adapter and without."""

import numpy as np
import pytest
from adapters import parameters_with
from engine_sampling import load_tiny, make_sampler, random_adapter, request, run_all, sequences
from tiny_models import VARIANTS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

NEW_TOKENS = 40
SCALE = 2.0


def generate(model, prompt, adapter=None):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    if adapter is not None:
        merge(hf, adapter, model.config)
    with torch.no_grad():
        out = hf.generate(
            torch.tensor(prompt[None]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            # transformers leaves the least time step out when a cache is used
            use_cache=model.config.family != "nemotron_h",
        )
    return out[0, len(prompt) :].tolist()


def merge(hf, adapter, config):
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.clone())  # no longer the embedding
    with torch.no_grad():
        for name, value in parameters_with(hf, adapter, config, SCALE).items():
            hf.get_parameter(name).copy_(value)


WINDOW = {"use_sliding_window": True, "sliding_window": 21}
WINDOWS = [
    ("qwen2", WINDOW | {"max_window_layers": 0}),
    ("qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
]


@pytest.mark.parametrize(("variant", "overrides"), [*((each, {}) for each in VARIANTS), *WINDOWS])
def test_greedy_tokens_are_those_of_generate(tmp_path, variant, overrides):
    """The long prompt takes two prefills, and windows end inside the first."""
    model = load_tiny(tmp_path, variant, **overrides)
    sampler = make_sampler(model)
    adapter = random_adapter(model.config, 1)
    sampler.register("a", adapter, scale=SCALE)
    prompts = [np.random.default_rng(i).integers(3, 320, n) for i, n in enumerate([1, 90])]
    for i, prompt in enumerate(prompts):
        for key in (None, "a"):
            asked = request(f"{i} {key}", prompt, temperature=0.0, max_tokens=NEW_TOKENS, stop_tokens=[])
            sampler.add(asked, key)
    answers = run_all(sampler)
    for i, prompt in enumerate(prompts):
        for key in (None, "a"):
            (ours,) = sequences(answers[f"{i} {key}"])
            assert ours.tokens == generate(model, prompt, adapter if key else None), (i, key)
