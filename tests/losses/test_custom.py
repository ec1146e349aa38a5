"""Custom losses against torch itself: the SDK traces and encodes a function, we run it in JAX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from tinsmith.losses.custom.interpreter import NotPaddableError, evaluate, load
from tinsmith.losses.custom.operations import METHODS
from tinsmith.losses.custom.padding import evaluate_padded

torch = pytest.importorskip("torch")
pytest.importorskip("tinker")

import torch.nn.functional as F  # noqa: E402, N812
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss  # noqa: E402

N, K = 7, 3


def ppo(logprobs, sampled, advantages):
    ratio = torch.exp(logprobs - sampled)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    inside = (ratio < 1.2) & (ratio > 0.8)
    return loss, {"custom/inside:mean": inside.float().mean(), "custom/kl:sum": (sampled - logprobs).sum()}


def sequence_ratio(logprobs, sampled, advantages):
    mask = (advantages != 0).float()
    ratio = ((logprobs - sampled) * mask).sum() / mask.sum().clamp(min=1)
    token = torch.exp(ratio.detach() + logprobs - logprobs.detach())
    return -(torch.min(token * advantages, token.clip(0.99, 1.01) * advantages) * mask).mean(), {}


def dpo_like(logprobs, sampled, advantages):
    margin = (logprobs.sum(dim=-1) - sampled.sum(0)) * 0.1
    return -F.logsigmoid(margin) + F.softplus(-margin, beta=2.0), {"custom/m:mean": margin.detach()}


def moments(logprobs, sampled, advantages):
    z = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    spread = logprobs.std() + logprobs.var(unbiased=False) + torch.std(logprobs, dim=0, correction=0)
    return (z * logprobs).sum() / logprobs.shape[0] + spread + logprobs.norm() + torch.norm(logprobs, p=1), {}


def shaped(logprobs, sampled, advantages):
    lagged = logprobs[1:] * advantages[:-1] + logprobs[..., 1:].flip(0) - logprobs[-2]
    table = logprobs[:, None] * sampled.unsqueeze(0)
    picked = torch.stack([logprobs, sampled], dim=1)[:, 0].view(-1, 1).expand(-1, 2)
    zeros = torch.zeros(logprobs.shape[0], dtype=torch.float32, device=logprobs.device)
    return lagged.sum() + table.T.tril().mean() + picked.reshape(-1).sum() + torch.cat(
        [zeros, logprobs]
    ).mean(), {}


def scans(logprobs, sampled, advantages):
    reward_to_go = torch.cumsum(advantages.flip(0), dim=0).flip(0)
    top = (
        logprobs.topk(3).values.sum()
        + logprobs.sort(descending=True)[0][1]
        + logprobs.max()
        - logprobs.amin()
    )
    return (reward_to_go * logprobs).sum() + top + torch.logcumsumexp(logprobs, dim=0)[
        -1
    ] + logprobs.prod(), {}


def at_the_bounds(logprobs, sampled, advantages):
    """Ties and bounds, where gradients are a matter of choice."""
    x = logprobs.round()
    tied = logprobs - logprobs.detach() + x
    loss = tied.clamp(-2.0, -1.0).sum() + torch.maximum(tied, x).sum() + tied.relu().sum() + tied.abs().sum()
    loss = (
        loss
        + tied.max()
        + tied.min(dim=0).values
        + (tied - x).std()
        + (tied * 0).norm()
        + tied.clamp_min(-1).sum()
    )
    return loss + (tied - x).pow(2).sum() + (tied**0).sum() + F.huber_loss(tied, x) + F.smooth_l1_loss(
        tied, x - 1
    ), {}


def integers(logprobs, sampled, labels):
    correct = labels == labels.max()
    share = correct.sum() / labels.numel() + (labels // 2).sum() * 0.5 + labels % 2 @ labels
    halves = (labels / 2 - labels.float().mean()) ** 2
    chosen = torch.where(~correct, logprobs, 0.0) + logprobs.masked_fill(correct, -1)
    return (halves * chosen).sum() + share, {"custom/share:mean": share, "custom/n:sum": correct.long().sum()}


def precise(logprobs, sampled, advantages):
    x = logprobs.double()
    y = torch.logaddexp(x, sampled.to(torch.float64)) + torch.log1p(-torch.exp(x)) + torch.expm1(x)
    return (y * advantages).to(torch.float32).sum() + 1 / (1 + logprobs.exp()).sqrt().mean(), {}


def functional(logprobs, sampled, advantages):
    p = torch.softmax(logprobs, dim=0)
    kl = F.kl_div(logprobs, sampled, reduction="sum", log_target=True) + F.kl_div(logprobs, p.detach())
    bce = F.binary_cross_entropy_with_logits(logprobs, (advantages > 0).float())
    entropy = torch.special.xlogy(p, p).sum() + F.mse_loss(logprobs, sampled) + F.l1_loss(logprobs, sampled)
    return kl + bce + entropy + F.log_softmax(logprobs, dim=-1).mean() + torch.linalg.norm(logprobs), {}


def constants(logprobs, sampled, advantages):
    n = logprobs.size(0)
    decay = torch.pow(0.9, torch.arange(n)) * torch.full((n,), 2.0) + torch.ones_like(logprobs) * math.sqrt(2)
    allowed = torch.where(torch.arange(n) > 2, 0.0, float("-inf")).nan_to_num(neginf=-1e3)
    return (decay * logprobs).sum() + torch.logsumexp(logprobs + allowed, 0) + (
        logprobs**3
    ).mean() + 2 ** -logprobs[0], {}


def distil(logprobs, teacher, weights):
    """(N, K): the teacher's most likely tokens."""
    p = torch.softmax(teacher, dim=-1)
    loss = -(p * logprobs).sum(-1) * weights + torch.logsumexp(logprobs, dim=-1, keepdim=True).squeeze(-1)
    best, index = logprobs.max(dim=1, keepdim=True)[0], logprobs.argmax(1)
    chosen = torch.gather(logprobs, 1, index[:, None]).squeeze(1) + best.squeeze(-1)
    return loss.sum() + chosen.mean() + logprobs[:, 0].mean() + (logprobs.T @ teacher).sum() + logprobs[
        0, 1:
    ].sum(), {}


def scaled(logprobs, weights, beta):
    return -(logprobs * weights).sum() * beta + beta.square(), {"custom/beta:mean": beta}


def normals(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


LOGPROBS = -np.abs(normals(N)) - 0.1
VECTORS = {"logprobs": LOGPROBS, "sampled": LOGPROBS + 0.2 * normals(N + 1)[1:], "advantages": normals(N)}
LABELS = {"logprobs": LOGPROBS, "sampled": normals(N), "labels": np.array([3, 0, 5, 5, -2, 1, 4])}
MATRICES = {"logprobs": -np.abs(normals(N, K)), "teacher": normals(N, K) * 2, "weights": normals(N)}
SCALARS = {"logprobs": LOGPROBS, "weights": normals(N), "beta": np.float32(0.3)}
LOSSES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    *((f, VECTORS) for f in (ppo, sequence_ratio, dpo_like, moments, shaped, scans, at_the_bounds, precise)),
    *((f, VECTORS) for f in (functional, constants)),
    (integers, LABELS),
    (distil, MATRICES),
    (scaled, SCALARS),
]


PADDED = {ppo, sequence_ratio, dpo_like, precise, scaled}


def graph_of(function: Callable[..., Any], values: dict[str, Any]) -> tuple[Any, Any]:
    """Return a function's graph, as torch has it and as we have it after the wire."""
    ranks = {name: np.ndim(value) for name, value in values.items()}
    handle = trace_loss(function, ranks, "session")
    data = encode_graph(handle).model_dump_json().encode()
    return handle.graph, load(data, list(ranks.items()))


@pytest.mark.parametrize(("function", "values"), LOSSES, ids=[function.__name__ for function, _ in LOSSES])
def test_values_and_gradients_are_torch_s(function: Callable[..., Any], values: dict[str, Any]) -> None:
    traced, graph = graph_of(function, values)
    tensors = [torch.tensor(value) for value in values.values()]
    tensors[0].requires_grad_()
    expected, expected_metrics = traced(*tensors)
    expected.backward()

    with jax.enable_x64(True):
        arrays = {name: jax.numpy.asarray(value) for name, value in values.items()}
        program = jax.jit(
            jax.value_and_grad(lambda lp: evaluate(graph, arrays | {"logprobs": lp}), has_aux=True)
        )
        (loss, metrics), gradient = program(arrays["logprobs"])
    assert str(loss.dtype) == str(expected.dtype).removeprefix("torch.")
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, tensors[0].grad, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[key].item(), rtol=1e-6)


@pytest.mark.parametrize(("function", "values"), LOSSES, ids=[function.__name__ for function, _ in LOSSES])
def test_padding_changes_nothing(function: Callable[..., Any], values: dict[str, Any]) -> None:
    """Either the loss refuses to be padded, or padding is left out."""
    _, graph = graph_of(function, values)
    along = frozenset(name for name, value in values.items() if np.ndim(value))

    def exact(logprobs, values):
        return evaluate(graph, values | {"logprobs": logprobs})

    def padded(logprobs, values, length):
        return evaluate_padded(graph, values | {"logprobs": logprobs}, along, length)

    with jax.enable_x64(True):
        arrays = {name: jax.numpy.asarray(value) for name, value in values.items()}
        longer = {
            name: jax.numpy.concatenate([value] + [value[-1:]] * 9) if name in along else value
            for name, value in arrays.items()
        }
        try:
            program = jax.jit(jax.value_and_grad(padded, has_aux=True))
            (loss, metrics), gradient = program(longer["logprobs"], longer, N)
        except NotPaddableError:
            assert function not in PADDED
            return
        assert function in PADDED
        program = jax.jit(jax.value_and_grad(exact, has_aux=True))
        (expected, expected_metrics), expected_gradient = program(arrays["logprobs"], arrays)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:N], expected_gradient, rtol=1e-6, atol=1e-7)
    assert not np.any(gradient[N:])
    for key, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[key], rtol=1e-6)


@pytest.mark.parametrize("placeholder", [0.0, -100.0, -1e4, -np.inf, np.nan])
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_masked_by_where_have_no_gradient(placeholder, padded):
    """torch itself gives NaN here: the reference has the masked tokens left out."""

    def masked(logprobs, sampled, advantages):
        ratio = torch.exp(logprobs - sampled)
        loss = -torch.where(advantages != 0, ratio * advantages, 0.0).sum()
        return loss, {"custom/kl:sum": torch.where(advantages != 0, sampled - logprobs, 0.0).sum()}

    inputs = {"logprobs": 1, "sampled": 1, "advantages": 1}
    data = encode_graph(trace_loss(masked, inputs, "session")).model_dump_json().encode()
    graph = load(data, list(inputs.items()))
    advantages = np.array([0, 2, 0, -1, 1, 0, 3], np.float32)
    logprobs = np.linspace(-3, -0.1, N).astype(np.float32)
    sampled = np.where(advantages == 0, placeholder, logprobs - 0.3).astype(np.float32)
    values = {"logprobs": logprobs, "sampled": sampled, "advantages": advantages}

    def of_logprobs(logprobs):
        given = {name: jax.numpy.asarray(value) for name, value in values.items()} | {"logprobs": logprobs}
        return (
            evaluate_padded(graph, given, frozenset(values), jax.numpy.int64(N))
            if padded
            else evaluate(graph, given)
        )

    with jax.enable_x64(True):
        (loss, metrics), gradient = jax.value_and_grad(of_logprobs, has_aux=True)(jax.numpy.asarray(logprobs))
    want = -np.exp(0.3) * advantages
    np.testing.assert_allclose(loss, want.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["custom/kl:sum"], -0.3 * (advantages != 0).sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["cumsum", "cumprod", "logcumsumexp"])
@pytest.mark.parametrize("zeros", [(), (0,), (3,), (2, 4), (6,)])
@pytest.mark.parametrize("dim", [0, -1])
def test_gradients_of_scans(name, zeros, dim):
    random = np.random.default_rng(len(zeros))
    x, gradient = random.standard_normal((2, N, N))
    x[list(zeros)] = 0
    gradient[1] = 0
    tensor = torch.tensor(x, requires_grad=True)
    expected = getattr(torch, name)(tensor, dim)
    expected.backward(torch.tensor(gradient))
    with jax.enable_x64(True):
        values, pull = jax.vjp(lambda x: METHODS[name](x, dim), jax.numpy.asarray(x))
        (of_x,) = pull(jax.numpy.asarray(gradient))
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(of_x, tensor.grad, rtol=1e-9, atol=1e-12)
