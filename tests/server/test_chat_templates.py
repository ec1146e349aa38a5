"""Conversations have the tokens that transformers' `apply_chat_template` gives them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tinsmith.server import text as text_module
from tinsmith.server.errors import BadRequest
from tinsmith.server.text import of_folder
from tokenizer_folders import CHATML, change_json, write_json, write_tokenizer_folder
from transformers import AutoTokenizer

TURNS = [
    {"role": "system", "content": "Answer <b>shortly</b> & well."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "naïve €?"},
]
EACH = "{% for m in messages %}"
TEMPLATES = {
    "plain": CHATML,
    "generation blocks": EACH
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "trimmed generation blocks": EACH
    + "{%- if m.role == 'assistant' -%}{%- generation -%}  {{ m.content }}  {%- endgeneration -%}"
    "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}",
    "the date": "{% set day = strftime_now('%d %b %Y') %}{{ day }}" + CHATML,
    "the date if it is there": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML,
    "tools are none": "{% if tools is not none %}{{ tools | length }} tools{% endif %}" + CHATML,
    "documents are none": "{% if documents is none %}no documents{% else %}{{ documents }}{% endif %}",
    "tools are defined": "{{ tools is defined }} {{ documents is defined }} {{ nothing is defined }}",
    "tokens by name": "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ image_token }}",
    "as JSON": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'}|tojson }}",
    "JSON's options": "{{ {'b': 1, 'a': [1]} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "loop controls": EACH + "{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "namespaces": "{% set ns = namespace(seen=0) %}" + EACH + "{% set ns.seen = ns.seen + 1 %}{% endfor %}"
    "{{ ns.seen }}",
    "blocks on lines of their own": "  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\nend\n",
    "macros": "{% macro turn(m) %}[{{ m.role }}]{{ m.content | trim }}{% endmacro %}"
    + EACH
    + "{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "methods of strings": EACH + "{{ m.content.split('<b>')[-1].strip() }}{{ m.content[:3] }}{% endfor %}",
    "made dictionaries": "{{ dict(a=1) | tojson }}{{ messages|selectattr('role', 'equalto', 'user')|list }}",
    "an undefined name": "{{ nothing }}|" + CHATML,
    "no generation prompt asked for": "{{ add_generation_prompt }}{{ messages | length }}",
}


def reference_tokens(folder, turns, **variables):
    variables = {"add_generation_prompt": True} | variables
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=False, **variables)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_has_the_tokens_that_transformers_gives_it(tmp_path, template):
    folder = write_tokenizer_folder(
        tmp_path / "model",
        chat_template=TEMPLATES[template],
        bos_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    assert of_folder(folder).conversation(TURNS) == reference_tokens(folder, TURNS)


PARTS = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
EITHER = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}" + (
    "{% for part in m['content'] %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)


def test_a_template_that_takes_parts_alone_is_given_parts(tmp_path):
    in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    for template, turns in ((PARTS, in_parts), (EITHER, TURNS), (CHATML, TURNS)):
        folder = write_tokenizer_folder(tmp_path / str(len(template)), chat_template=template)
        assert of_folder(folder).conversation(TURNS) == reference_tokens(folder, turns)


@pytest.mark.parametrize(
    "variables",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"documents": [{"title": "t", "text": "x"}]},
        {"enable_thinking": False, "date_string": "1 Jan 2020"},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_variables_reach_the_template(tmp_path, variables):
    template = "{{ tools }} {{ documents }} {{ enable_thinking }} {{ date_string }}" + CHATML
    folder = write_tokenizer_folder(tmp_path / "model", chat_template=template)
    ours = of_folder(folder).conversation(TURNS, **variables)
    assert ours == reference_tokens(folder, TURNS, **variables)


def test_a_template_cannot_be_brought_along(tmp_path):
    folder = write_tokenizer_folder(tmp_path / "model")
    with pytest.raises(BadRequest, match=r"^chat_template_kwargs\.chat_template: not a variable"):
        of_folder(folder).conversation(TURNS, chat_template="{{ 1 }}")


def by_list(folder):
    named = [{"name": "default", "template": "D" + CHATML}, {"name": "tool_use", "template": "T" + CHATML}]
    change_json(folder / "tokenizer_config.json", chat_template=named)


def by_file(folder):
    (folder / "chat_template.jinja").write_text("F" + CHATML)


def by_folder(folder):
    by_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T" + CHATML)


@pytest.mark.parametrize("write", [by_list, by_file, by_folder])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_templates_are_found_where_transformers_finds_them(tmp_path, write, tools):
    folder = write_tokenizer_folder(tmp_path / "model")
    write(folder)
    assert of_folder(folder).conversation(TURNS, tools=tools) == reference_tokens(folder, TURNS, tools=tools)


WRONG = {
    "{{ raise_exception('roles must alternate') }}": "refuses them: roles must alternate$",
    "{{ raise_exception('\\ud800 is half') }}": r"refuses them: \? is half$",
    "{{ '\\ud800' }}": "cannot encode this text",
    "{{ 'x' * 10000000000000 }}": "MemoryError",
    "{{ messages[0]['content'] + 1 }}": "TypeError",
    "{{ messages.nothing.more }}": "UndefinedError",
    "{{ messages[99].content }}": "UndefinedError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% for m in messages %}": "TemplateSyntaxError",
    "{% nonsense %}": "TemplateSyntaxError",
    "{{ messages | nonsense }}": "TemplateAssertionError",
    "{{ messages | tojson(nonsense=1) }}": "TypeError",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "RecursionError",
    "{% include 'other' %}": "TypeError|no loader",
    "{{ range(1000000000) | list }}": "OverflowError",
    "{{ strftime_now(1) }}": "TypeError",
    "{{ '%d' % 'x' }}": "TypeError",
    "{{ messages | map(attribute='content') | sum }}": "TypeError",
}


@pytest.mark.parametrize("template", WRONG)
def test_whatever_a_template_does_wrong_is_a_bad_request_that_says_so(tmp_path, template):
    folder = write_tokenizer_folder(tmp_path / "model", chat_template=template)
    with pytest.raises(BadRequest, match=WRONG[template]):
        of_folder(folder).conversation(TURNS)


def test_a_template_that_is_not_text_is_a_bad_request(tmp_path):
    folder = write_tokenizer_folder(tmp_path / "model", chat_template=7)
    with pytest.raises(BadRequest):
        of_folder(folder).conversation(TURNS)


@pytest.mark.parametrize("named", [None, [{"name": "tool_use", "template": CHATML}]])
def test_a_model_without_a_template_says_so(tmp_path, named):
    folder = write_tokenizer_folder(tmp_path / "model")
    written = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": named} if named else {})
    write_json(folder / "tokenizer_config.json", written)
    with pytest.raises(BadRequest, match="no chat template" if named is None else "no default"):
        of_folder(folder).conversation(TURNS)


def test_a_template_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "SECONDS", 0.5)
    long = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    text = of_folder(write_tokenizer_folder(tmp_path / "model", chat_template=long))
    plain = of_folder(write_tokenizer_folder(tmp_path / "plain"))
    with ThreadPoolExecutor(1) as pool:  # one thread, which is whole afterwards
        began = time.monotonic()
        with pytest.raises(BadRequest, match="ran for over"):
            pool.submit(text.conversation, TURNS).result()
        assert time.monotonic() - began < 5
        for _ in range(20):
            assert pool.submit(plain.conversation, TURNS).result()


def test_a_template_that_makes_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHARACTERS", 1000)
    folder = write_tokenizer_folder(tmp_path / "model", chat_template="{{ 'x' * 1001 }}")
    with pytest.raises(BadRequest, match="over 1000 characters"):
        of_folder(folder).conversation(TURNS)
