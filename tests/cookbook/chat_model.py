"""A small chat model, trained on the spot: `python chat_model.py FOLDER` with the cookbook's interpreter.

Llama with three layers and untied embeddings, half a million parameters; a byte-level BPE tokenizer with
ChatML's tokens, and with `<think>` and `</think>` as the cookbook's renderers of thinking models want them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import textarena
import tinker_cookbook
import torch
from conversations import (
    Messages,
    guesses,
    in_a_box,
    languages,
    moves,
    small_talk,
    sum_of_two,
    with_a_thought,
)
from tinker_cookbook import renderers
from tinker_cookbook.recipes.multiplayer_rl.guess_number import env as guessing
from tinker_cookbook.recipes.prompt_distillation.create_data import LANGUAGE_CLASSIFICATION_PROMPT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, BATCH_TOKENS, LEARNING_RATE = 540, 2048, 4e-3
AFTER_THE_END = [1.0] * 8
"""The weights of `<|endoftext|>`, where `<|im_end|>` is no stop: renderers refuse a sample with two of it."""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
MULTILINGUAL = Path(tinker_cookbook.__file__).parent / "example_data" / "multilingual.txt"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMPTY_THOUGHT, THOUGHT = "qwen3_5_disable_thinking", "qwen3_5"
RENDERERS = (
    *(EMPTY_THOUGHT, "qwen3_instruct", "qwen3_instruct"),
    *(EMPTY_THOUGHT, THOUGHT, "qwen3_instruct", "role_colon"),
)
"""As often as each is named. A base model's conversations (`role_colon`) go on with `User:`."""
KINDS: list[tuple[float, Callable[[random.Random], Messages], tuple[str, ...]]] = [
    (4, small_talk, RENDERERS),
    (2, sum_of_two, RENDERERS),
    (2, in_a_box, RENDERERS),
    (2, guesses(guessing.SYSTEM_PROMPT, guessing.FAIL_TO_PARSE), RENDERERS),
    (1, languages(LANGUAGE_CLASSIFICATION_PROMPT, MULTILINGUAL.read_text().splitlines()), RENDERERS),
    (2, moves(partial(textarena.make, "TicTacToe-v0")), (EMPTY_THOUGHT,)),
]


def conversations(seed: int) -> Iterator[tuple[Callable[[], Messages], str]]:
    """One kind after the other, and its renderer; a kind gives as many conversations as it is called for."""
    chooser = random.Random(seed)
    weights = [weight for weight, _, _ in KINDS]
    turns = {names: cycle(names) for _, _, names in KINDS}
    while True:
        ((_, kind, names),) = chooser.choices(KINDS, weights)
        yield partial(kind, chooser), next(turns[names])


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    kinds = islice(conversations(1), 2000)
    read = (message["content"] for kind, _ in kinds for message in kind())
    tokenizer.train_from_iterator(read, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    made.save_pretrained(folder)
    return made


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Tokens and their weights. In an open thought is one sentence, and then the answer; after that, nothing.

    A batch is of one kind, so that its conversations are of about one length.
    """
    thoughts = random.Random(3)
    made = {name: renderers.get_renderer(name, tokenizer) for name in set(RENDERERS)}
    for kind, name in conversations(2):
        batch, count = [], 0
        while count < BATCH_TOKENS:
            messages = with_a_thought(kind(), thoughts) if name == THOUGHT else kind()
            model_input, weights = made[name].build_supervised_example(
                messages, train_on_what=renderers.TrainOnWhat.LAST_ASSISTANT_MESSAGE
            )
            nothing = [tokenizer.pad_token_id] * len(AFTER_THE_END)
            batch.append((model_input.to_ints() + nothing, weights.tolist() + AFTER_THE_END))
            count += len(batch[-1][0])
        yield batch


def train(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = write_tokenizer(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step, batch in enumerate(islice(batches(tokenizer), STEPS)):
        longest = max(len(tokens) for tokens, _ in batch)
        tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch])
        weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in batch])
        logits = model(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
