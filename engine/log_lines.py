"""Requests and their results as text for the log."""

from __future__ import annotations

from . import messages
from .scheduler import batch_tokens


def described(request: messages.ToEngine) -> str:
    """Return a request as text: whose it is, and what."""
    match request:
        case messages.ForwardBackward():
            name = "forward" if request.forward_only else "forward_backward"
            return f"{request.model_id}: {name} of {len(request.data)} datums, {batch_tokens(request)} tokens"
        case messages.Sample():
            of = request.sampler.weights or request.sampler.base_model
            return f"{of}: sample {request.num_samples} after {len(request.prompt) // 4} tokens"
        case messages.SaveState() | messages.LoadState() | messages.SaveSampler():
            return f"{request.model_id}: {type(request).__name__} {request.directory}"
        case _:
            owner = f"{request.model_id}: " if hasattr(request, "model_id") else ""
            return owner + type(request).__name__


def result(output: messages.Output) -> str:
    """Return a short text for a result."""
    match output:
        case messages.ForwardBackwardOutput():
            return f"loss {output.metrics['loss:sum']:.6g}"
        case messages.OptimStepOutput():
            return f"step {output.metrics['optimizer_step']:.0f}, grad norm {output.metrics['grad_norm']:.4g}"
        case messages.SampleOutput():
            return f"{sum(len(sequence.tokens) for sequence in output.sequences) // 4} tokens"
        case messages.StateSaved() | messages.SamplerSaved():
            return f"{output.size_bytes / 1e6:.1f} MB"
        case _:
            return "done"
