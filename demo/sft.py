"""Teaches a real language model a manner of speaking, through the unmodified Tinker SDK.

Starts `tinsmith serve` with SmolLM2-135M, trains on the answers in `data/tinsmith.jsonl`, shows answers to
the same three questions before and after, and stops the server. Exits with 0 only if the model learned.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import tinker
from local_server import running_server
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types
from transformers import PreTrainedTokenizerBase

MODEL = "smollm2-135m"
DATA = Path(__file__).parent / "data"
BATCH = 12
RANK = 32
LEARNING_RATE = 1e-3
LEARNED = 0.6  # the model has learned if the last step's loss is below this share of the first one's

Conversation = dict[str, list[dict[str, str]]]


def read(name: str) -> list[Conversation]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Render the question with the model's chat template, up to where the answer begins."""
    return tokenizer.apply_chat_template(
        conversation["messages"][:1], add_generation_prompt=True, return_dict=False
    )


def datum(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> types.Datum:
    """Make a datum.

    Position i of the input predicts target i; only the answer's tokens and its end have weight."""
    prompt = prompt_tokens(tokenizer, conversation)
    answer = [*tokenizer.encode(conversation["messages"][1]["content"]), tokenizer.eos_token_id]
    tokens = prompt + answer
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [0.0] * (len(prompt) - 1) + [1.0] * len(answer),
        },
    )


def answer_tokens(data: list[types.Datum]) -> float:
    return sum(sum(d.loss_fn_inputs["weights"].data) for d in data)


def mean_nll(output: types.ForwardBackwardOutput, data: list[types.Datum]) -> float:
    """Return the mean negative log-likelihood of an answer token, in nats.

    The server returns sums, so the client divides."""
    return output.metrics["loss:sum"] / answer_tokens(data)


def sample(
    client: tinker.SamplingClient, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]
) -> list[str]:
    """Sample one greedy answer of at most 64 tokens to each question, all at once."""
    params = types.SamplingParams(max_tokens=64, temperature=0.0)
    futures = [
        client.sample(types.ModelInput.from_ints(prompt_tokens(tokenizer, c)), 1, params)
        for c in conversations
    ]
    answers = []
    for future in futures:
        (sequence,) = future.result().sequences
        text = tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()
        answers.append(text if sequence.stop_reason == "stop" else text + " …")
    return answers


def reference_nll(folder: Path, data: list[types.Datum]) -> float:
    """Compute the same mean NLL with transformers on torch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for d in data:
        tokens, targets = d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"].data
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        nll = -logprobs[torch.arange(len(tokens)), torch.tensor(targets)]
        total += float(nll @ torch.tensor(d.loss_fn_inputs["weights"].data))
    return total / answer_tokens(data)


def train(
    client: tinker.TrainingClient, data: list[types.Datum], steps: int, console: Console
) -> list[float]:
    """Run `steps` steps of Adam over batches in order. Returns the mean NLL of each batch before its step."""
    losses: list[float] = []
    bar = Progress(
        TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        for step in bar.track(range(steps)):
            began = time.monotonic()
            batch = [data[i % len(data)] for i in range(step * BATCH, (step + 1) * BATCH)]
            adam = types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / steps))
            # both are submitted before the first is awaited, so that the server is never idle
            forward_backward = client.forward_backward(batch, "cross_entropy")
            optim_step = client.optim_step(adam)
            losses.append(mean_nll(forward_backward.result(), batch))
            optim_step.result()
            seconds = time.monotonic() - began
            blocks = "█" * round(10 * losses[-1])
            bar.console.print(f"  step {step + 1:>2}  NLL {losses[-1]:5.3f}  {seconds:4.1f} s  {blocks}")
    return losses


def show(console: Console, questions: list[str], before: list[str], after: list[str]) -> None:
    table = Table(title="The same questions, before and after", show_lines=True, expand=True)
    table.add_column("question (not in the training data)", ratio=2)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    for row in zip(questions, before, after, strict=True):
        table.add_row(*row)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="training steps (default: 16)")
    parser.add_argument(
        "--check-reference", action="store_true", help="also compare the first loss with transformers (torch)"
    )
    options = parser.parse_args()
    # SIGTERM raises an exception, so that the server is stopped too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(highlight=False)
    began = time.monotonic()

    with running_server(MODEL, console.print) as url:
        console.print(f"Ready after {time.monotonic() - began:.0f} s: {url}")
        service = tinker.ServiceClient(base_url=url, api_key="tml-demo")
        client = service.create_lora_training_client(base_model=MODEL, rank=RANK, seed=0).result()
        tokenizer = client.get_tokenizer()
        data = [datum(tokenizer, c) for c in read("tinsmith.jsonl")]
        held_out = read("held_out.jsonl")
        held_out_data = [datum(tokenizer, c) for c in held_out[:BATCH]]
        questions = held_out[:3]

        console.print("Sampling from the untrained model …")
        # a new adapter changes nothing, so these are the base model's answers
        before = sample(client.save_weights_and_get_sampling_client().result(), tokenizer, questions)
        held_out_before = mean_nll(client.forward(held_out_data, "cross_entropy").result(), held_out_data)

        console.print(f"Training a rank {RANK} adapter on {len(data)} conversations, {BATCH} a step")
        training_began = time.monotonic()
        losses = train(client, data, options.steps, console)
        training_seconds = time.monotonic() - training_began

        held_out_after = mean_nll(client.forward(held_out_data, "cross_entropy").result(), held_out_data)
        after = sample(client.save_weights_and_get_sampling_client().result(), tokenizer, questions)
        service.close("success").result()

    show(console, [c["messages"][0]["content"] for c in questions], before, after)
    ratio = losses[-1] / losses[0]
    console.print(
        f"NLL per answer token: {losses[0]:.2f} → {losses[-1]:.2f} ({ratio:.0%} of the first step's); "
        f"held out: {held_out_before:.2f} → {held_out_after:.2f}"
    )
    seconds = time.monotonic() - began
    console.print(f"{training_seconds:.0f} s of training, {seconds:.0f} s in all. The server has stopped.")
    failures = []
    if ratio > LEARNED:
        failures.append(f"the last loss is {ratio:.0%} of the first one, not at most {LEARNED:.0%}")
    if options.check_reference:
        reference = reference_nll(Path(tokenizer.name_or_path), data[:BATCH])
        difference = abs(losses[0] - reference) / reference
        console.print(f"First loss {losses[0]:.4f}, by transformers {reference:.4f}: {difference:.2%} apart")
        if difference > 0.02:
            failures.append("the first loss is more than 2 % from transformers'")
    for failure in failures:
        console.print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
