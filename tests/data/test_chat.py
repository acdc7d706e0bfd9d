"""Chat templates: what they render, and what a hostile one can't do."""

import json

import pytest

from sparsezoo_jax.data import chat_process, chat_prompt
from sparsezoo_jax.data.chat import read_template, render
from sparsezoo_jax.data.tokenizer import load_tokenizer
from sparsezoo_jax.errors import DataError

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QUESTION = [{"role": "user", "content": " Why? "}]
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_is_rendered():
    assert render(CHATML, QUESTION, {}) == ASKED
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert render(CHATML, system, {}) == f"<|im_start|>system\nBe brief.<|im_end|>\n{ASKED}"


def render_here(template, **variables):
    return chat_process.environment().from_string(template).render(**variables)


def test_what_templates_expect_is_there():
    assert render_here("{{ bos_token }}{{ x | tojson }}", bos_token="<s>", x={"ä": 1}) == '<s>{"ä": 1}'
    assert render_here("{% for i in x %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", x=[1, 2, 3]) == "1"
    assert render_here("a{% generation %}{{ x }}{% endgeneration %}c", x="b") == "abc"
    assert len(render_here("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render_here("{% if true %}\n  x\n{% endif %}\n") == "  x\n"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if x %}", "Unexpected end of template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**12 }}", "too much memory"),
        ("{{ messages[0].nothing.more }}", "has no attribute|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_faults_of_a_template(template, says):
    with pytest.raises(DataError, match=says):
        render(template, QUESTION, {})


def test_a_template_without_an_end(monkeypatch):
    monkeypatch.setattr("sparsezoo_jax.data.chat.TIMEOUT", 1.5)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"takes more than|ended its process"):
        render(loop, QUESTION, {})


@pytest.fixture
def directory(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzWĊ?<|_>/Ġ")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name) for name in ("<s>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(specials))
    return tmp_path


def test_special_tokens_of_a_template_are_tokens(directory):
    tokenizer = load_tokenizer(directory)
    ids = chat_prompt(directory, tokenizer, QUESTION)
    start, end = (tokenizer.encode_prompt(name, special_tokens=True)[1] for name in ("<|im_start|>", "<|im_end|>"))
    assert ids.count(start) == 2
    assert ids.count(end) == 1
    assert ids[0] == start, "the template puts no bos there"
    (directory / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    assert chat_prompt(directory, tokenizer, QUESTION) == [tokenizer.bos_id, *ids]


def test_where_templates_are(directory):
    assert read_template(directory) == CHATML
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_template(directory) == "yes"
    for damaged in ('{"chat_template": 3}', "[]", '{"chat_template": [1]}', "{"):
        (directory / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(DataError, match=r"has no chat template|can't be read"):
            read_template(directory)
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="can't be read"):
        read_template(directory)
