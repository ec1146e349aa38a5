"""Run by test_sampler_mesh in a process with 8 devices: `sample_on_meshes.py VARIANT fsdp=8 data=2,fsdp=4`.

On each mesh, with the CPU's programs and with those for accelerators."""

import sys
import tempfile

import jax.numpy as jnp
import numpy as np
from engine_sampling import load_tiny, make_sampler, random_adapter, request, run_all, sequences
from tinsmith.model import load, sharding

variant, *meshes = sys.argv[1:]
folder = tempfile.mkdtemp()
model = load_tiny(folder, variant, num_attention_heads=8, num_key_value_heads=4, head_dim=16, hidden_size=64)
adapter = random_adapter(model.config, 1)


def sampled(axes, backend=None):
    mesh = sharding.make_mesh(axes)
    base = load.load_base(folder, model.config, jnp.float32, mesh)
    sampler = make_sampler(model._replace(base=base), mesh=mesh, prefill_tokens=128, backend=backend)
    sampler.register("a", adapter, scale=2.0)
    for i, key in enumerate([None, "a", "a"]):
        prompt = prompt_of(i)
        penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.5} if i == 2 else {}
        asked = request(i, prompt, logprobs=True, max_tokens=20, seed=i, stop_tokens=[], **penalties)
        sampler.add(asked, key)
    answers = run_all(sampler)
    for i in (3, 4):  # both go on from a cached beginning, in one program
        prompt = [*prompt_of(2), *prompt_of(i)]
        sampler.add(request(i, prompt, max_tokens=20, seed=i, stop_tokens=[]), "a")
    started = []
    prefill = sampler._programs.prefill
    sampler._programs.prefill = lambda pieces: started.append(len(pieces)) or prefill(pieces)
    answers |= run_all(sampler)
    assert started == [2]
    return [
        (sequences(answer)[0], np.frombuffer(answer.prompt_logprobs or b"", np.float32)[1:])
        for _, answer in sorted(answers.items())
    ]


def prompt_of(i):
    return np.random.default_rng(i).integers(3, 320, (5, 20, 100, 9, 12)[i])


expected = sampled(None)
for text in meshes:
    axes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    for backend in ("cpu", "reference"):
        found = sampled(axes, backend)
        for (ours, prompt_ours), (theirs, prompt_theirs) in zip(found, expected, strict=True):
            assert ours.tokens == theirs.tokens, text
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
            np.testing.assert_allclose(prompt_ours, prompt_theirs, atol=1e-5)
        print(text, backend, "equal")
