"""Chat templates: which ids a conversation becomes, which of them are learned, and what cannot become a control token."""

import builtins
import io
import json
import sys

import pytest
import sentencepiece

from jaxllm.data.chat import TEMPLATES, TemplateChat, load_chat
from jaxllm.data.chat_jinja import MARKS, JinjaChat, load_jinja
from jaxllm.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from jaxllm.errors import UserError


class Toy(ByteTokenizer):
    """One token a byte, and some control tokens more."""

    def __init__(self, *names):
        names = [name for name in names if name not in ByteTokenizer.special]
        self.special = ByteTokenizer.special | {name: ByteTokenizer.vocab_size + i for i, name in enumerate(names)}
        self.bytes_V = ByteTokenizer.bytes_V + [b""] * len(names)
        self.vocab_size, self.name = len(self.bytes_V), "toy"


def toy_chat(name: str) -> TemplateChat:
    template = TEMPLATES[name]
    return TemplateChat(template, Toy(*template.controls))


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = [SYSTEM, user("Hi"), assistant("Yes?"), user("1+1"), assistant("2")]

# Each line: the weight of its tokens, then the pieces: a control token is one token, text is one token a byte.
GOLDEN = {
    "own": [
        (0, "<bos>", "<|system|>", "Be kind.", "<|end|>", "<|user|>", "Hi", "<|end|>", "<|assistant|>"),
        (1, "Yes?", "<|end|>"),
        (0, "<|user|>", "1+1", "<|end|>", "<|assistant|>"),
        (1, "2", "<|end|>"),
    ],
    "plain": [
        (0, "<bos>", "Be kind.", "\n\n", "Hi", "\n"),
        (1, "Yes?", "<eos>"),
        (0, "1+1", "\n"),
        (1, "2", "<eos>"),
    ],
    "chatml": [
        (0, "<|im_start|>", "system\nBe kind.", "<|im_end|>", "\n"),
        (0, "<|im_start|>", "user\nHi", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        (1, "Yes?", "<|im_end|>"),
        (0, "\n", "<|im_start|>", "user\n1+1", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        (1, "2", "<|im_end|>"),
        (0, "\n"),
    ],
    "qwen": [
        (0, "<|im_start|>", "system\nBe kind.", "<|im_end|>", "\n"),
        (0, "<|im_start|>", "user\nHi", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        (1, "Yes?", "<|im_end|>"),
        (0, "\n", "<|im_start|>", "user\n1+1", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        (1, "2", "<|im_end|>"),
        (0, "\n"),
    ],
    "llama3": [
        (0, "<bos>", "<|start_header_id|>", "system", "<|end_header_id|>", "\n\nBe kind.", "<|eot_id|>"),
        (0, "<|start_header_id|>", "user", "<|end_header_id|>", "\n\nHi", "<|eot_id|>"),
        (0, "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
        (1, "Yes?", "<|eot_id|>"),
        (0, "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n1+1", "<|eot_id|>"),
        (0, "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
        (1, "2", "<|eot_id|>"),
    ],
    "gemma": [
        (0, "<bos>", "<start_of_turn>", "user\nBe kind.\n\nHi", "<end_of_turn>", "\n", "<start_of_turn>", "model\n"),
        (1, "Yes?", "<end_of_turn>"),
        (0, "\n", "<start_of_turn>", "user\n1+1", "<end_of_turn>", "\n", "<start_of_turn>", "model\n"),
        (1, "2", "<end_of_turn>"),
        (0, "\n"),
    ],
}


def tokens_of(table, tokenizer) -> tuple[list[int], list[int]]:
    """Returns (ids, weights) of a table of the form above."""
    ids, weights = [], []
    for weight, *pieces in table:
        for piece in pieces:
            found = [tokenizer.special[piece]] if piece in tokenizer.special else tokenizer.encode(piece)
            ids += found
            weights += [weight] * len(found)
    return ids, weights


@pytest.mark.parametrize("name", GOLDEN)
def test_the_tokens_of_a_conversation_and_which_are_learned(name):
    chat = toy_chat(name)
    assert chat.encode(CHAT) == tokens_of(GOLDEN[name], chat.text.tokenizer)


def test_every_template_has_a_golden_table():
    assert GOLDEN.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_is_how_its_example_begins(name):
    chat = toy_chat(name)
    for n in (2, 4):
        ids, weights = chat.encode(CHAT[: n + 1])
        prompt = chat.prompt_ids(CHAT[:n])
        assert ids[: len(prompt)] == prompt and weights[len(prompt)] == 1 and not any(weights[len(prompt) - 1 : len(prompt)])
        answer = ids[len(prompt) : len(prompt) + sum(weights[len(prompt) :])]
        assert answer[-1] == chat.end_id and chat.text.tokenizer.decode(answer) == CHAT[n]["content"]


TOOLS = [user("2 C?"), assistant("look(2)"), {"role": "tool", "content": "9"}, {"role": "tool", "content": "8"}, assistant("9")]
TOOL_TABLES = {
    "own": [(0, "<bos>", "<|user|>", "2 C?", "<|end|>", "<|assistant|>"), (1, "look(2)", "<|end|>"),
            (0, "<|reserved_0|>", "9", "<|end|>", "<|reserved_0|>", "8", "<|end|>", "<|assistant|>"), (1, "9", "<|end|>")],
    "qwen": [(0, "<|im_start|>", "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "<|im_end|>", "\n"),
             (0, "<|im_start|>", "user\n2 C?", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"), (1, "look(2)", "<|im_end|>"),
             (0, "\n", "<|im_start|>", "user\n<tool_response>\n9\n</tool_response>\n<tool_response>\n8\n</tool_response>",
              "<|im_end|>", "\n", "<|im_start|>", "assistant\n"), (1, "9", "<|im_end|>"), (0, "\n")],
    "llama3": [(0, "<bos>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n2 C?", "<|eot_id|>"),
               (0, "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"), (1, "look(2)", "<|eot_id|>"),
               (0, "<|start_header_id|>", "ipython", "<|end_header_id|>", "\n\n9", "<|eot_id|>"),
               (0, "<|start_header_id|>", "ipython", "<|end_header_id|>", "\n\n8", "<|eot_id|>"),
               (0, "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"), (1, "9", "<|eot_id|>")],
}


@pytest.mark.parametrize("name", TOOL_TABLES)
def test_what_tools_say_is_read_and_not_learned(name):
    chat = toy_chat(name)
    assert chat.encode(TOOLS) == tokens_of(TOOL_TABLES[name], chat.text.tokenizer)


def test_an_answer_of_weight_0_is_read_and_not_learned():
    chat = toy_chat("own")
    ids, weights = chat.encode([user("a"), assistant("b", weight=0), user("c"), assistant("d")])
    same, all_weights = chat.encode([user("a"), assistant("b"), user("c"), assistant("d")])
    assert ids == same and sum(weights) == 2 and sum(all_weights) == 4


def test_white_space_around_contents_is_kept_or_not_as_the_template_says():
    for name, kept in (("chatml", True), ("llama3", False), ("gemma", False)):
        chat = toy_chat(name)
        text = chat.text.tokenizer.decode(chat.encode([user(" a "), assistant(" b ")])[0])
        assert (" a " in text, " b " in text) == (kept, kept)


def test_content_in_parts_is_one_text():
    chat = toy_chat("own")
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]
    assert chat.encode([user(parts), assistant("2")]) == chat.encode([user("1+1"), assistant("2")])


# ---------------------------------------------------------------- typed text is no control token


@pytest.mark.parametrize("name", GOLDEN)
def test_typed_control_tokens_are_text(name):
    chat = toy_chat(name)
    tokenizer, typed = chat.text.tokenizer, "".join([*chat.text.controls, "<eos>"])
    ids, weights = chat.encode([user(typed), assistant(f"a{typed}")])
    clean, _ = chat.encode([user("u"), assistant("b")])
    control = set(tokenizer.special.values())
    assert [i for i in ids if i in control] == [i for i in clean if i in control]
    assert typed in tokenizer.decode(ids)


def trained(*pieces: str) -> SentencePieceTokenizer:
    """Returns a small SentencePiece tokenizer in which these are user-defined pieces: typed text becomes them, as in Gemma's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat user model"] * 50), model_writer=model, vocab_size=300, byte_fallback=True,
        user_defined_symbols=list(pieces), add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2, pad_id=3)
    return SentencePieceTokenizer(model.getvalue(), "small")


def test_pieces_that_typed_text_would_become_are_cut():
    tokenizer = trained("<start_of_turn>", "<end_of_turn>")
    start = tokenizer.encode("<start_of_turn>")
    assert len(start) == 1  # else the test shows nothing
    chat = load_chat("gemma", tokenizer)
    ids, _ = chat.encode([user("the <start_of_turn> cat"), assistant("sat")])
    assert ids.count(start[0]) == 2 and "the <start_of_turn> cat" in tokenizer.decode(ids)
    assert ids[1] == start[0] and ids[-2] == chat.end_id == tokenizer.encode("<end_of_turn>")[0]


# ---------------------------------------------------------------- Jinja

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}
{% else %}
{{ message['content'] }}<|im_end|>
{%- endif %}
{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
INST = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""


def jinja(source: str, *controls: str) -> JinjaChat:
    return JinjaChat(source, Toy("<|im_start|>", "<|im_end|>", *controls), "t.jinja")


@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["by prefix", "by generation"])
def test_a_jinja_template_is_the_built_in_one(source):
    pytest.importorskip("jinja2")
    chat, own = jinja(source), toy_chat("chatml")
    typed = [*CHAT[:-1], assistant("<|im_end|> is <|im_start|> text <eos>")]
    for messages in (CHAT, CHAT[:3], typed):
        assert chat.encode(messages) == own.encode(messages)
    for messages in (CHAT[:2], CHAT[:4]):
        assert chat.prompt_ids(messages) == own.prompt_ids(messages)
    assert chat.end_id == own.end_id


def test_a_template_whose_turns_need_no_opening():
    pytest.importorskip("jinja2")
    chat = jinja(INST)
    ids, weights = chat.encode(CHAT[1:])
    assert (ids, weights) == tokens_of([(0, "<bos>", "[INST] Hi [/INST]"), (1, " Yes?", "<eos>"), (0, "[INST] 1+1 [/INST]"),
                                        (1, " 2", "<eos>")], chat.text.tokenizer)
    assert chat.prompt_ids(CHAT[1:2]) == ids[: weights.index(1)] and chat.end_id == 2


def test_the_marks_that_a_jinja_template_is_read_with_may_be_typed():
    pytest.importorskip("jinja2")
    for source in (CHATML, MARKED):
        messages = [user(f"{MARKS} <|im_end|>"), assistant(MARKS), user("b"), assistant("c")]
        assert jinja(source).encode(messages) == toy_chat("chatml").encode(messages)


def test_roles_made_into_control_tokens_by_the_template():
    pytest.importorskip("jinja2")
    source = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}" \
             "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    assert jinja(source).encode(CHAT) == toy_chat("own").encode(CHAT)


def test_a_template_out_of_a_tokenizer_config(tmp_path):
    pytest.importorskip("jinja2")
    added = {"300": {"content": "<|im_end|>", "special": True}, "301": {"content": "<think>", "special": False}}
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": added}
    for template in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        chat = load_chat(str(tmp_path / "tokenizer_config.json"), Toy("<|im_start|>", "<|im_end|>"))
        assert chat.encode(CHAT) == toy_chat("chatml").encode(CHAT) and chat.hash == jinja(CHATML).hash
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_jinja(str(tmp_path / "chat_template.jinja"), Toy("<|im_start|>", "<|im_end|>")).encode(CHAT) == chat.encode(CHAT)


# ---------------------------------------------------------------- mistakes

NO_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
CHANGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else '...' }}<|im_end|>{% endfor %}" \
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

BAD = [
    ("own", "encode", [], "f:3: messages should be a list with at least one message, was []"),
    ("own", "encode", "hi", "f:3: messages should be a list with at least one message, was 'hi'"),
    ("own", "encode", [user("a"), "b"], "f:3: message 2: should be {\"role\", \"content\"}, was 'b'"),
    ("own", "encode", [user("a"), {"role": "asistant", "content": "b"}],
     "f:3: message 2: role 'asistant': should be system, user, assistant, tool; did you mean 'assistant'?"),
    ("own", "encode", [user("a"), {"content": "b"}], "f:3: message 2: role None: should be system, user, assistant, tool; no text"),
    ("own", "encode", [user("a"), user("b")], "f:3: no assistant's answer in 2 messages: there is nothing to learn"),
    ("own", "encode", [user("a"), assistant("b", weight=0)], "f:3: every answer in 2 messages has weight 0: there is nothing to learn"),
    ("own", "encode", [user("a"), assistant("b", weight=2)],
     "f:3: message 2: weight=2: should be 1, or 0 for an answer that is read but not learned"),
    ("own", "encode", [SYSTEM, SYSTEM, user("a"), assistant("b")],
     "f:3: message 2: a second system message; there should be one at most, the first"),
    ("own", "encode", [user("a"), SYSTEM, assistant("b")],
     "f:3: message 2: a system message behind others; there should be one at most, the first"),
    ("own", "encode", [user(" \n"), assistant("b")], "f:3: message 1: content of user is empty"),
    ("own", "encode", [user("a"), assistant("")], "f:3: message 2: content of assistant is empty"),
    ("own", "encode", [user("a"), assistant(None)], "f:3: message 2: content of assistant should be text, was None"),
    ("own", "encode", [user("a"), assistant(None, tool_calls=[{}])],
     "f:3: message 2: tool_calls are not read; should be written into the content, as the model is to write them"),
    ("own", "prompt_ids", [user("a"), assistant("b")],
     "f:3: message 2 is the assistant's; a prompt should end in a user's or a tool's"),
    ("gemma", "encode", [user("a"), {"role": "tool", "content": "b"}, assistant("c")],
     "f:3: message 2: template gemma has no tool role"),
    ("gemma", "encode", [SYSTEM, assistant("c")],
     "f:3: message 1: template gemma has no system role and writes the system's into the user's message after it, which is missing"),
    (NO_PROMPT, "encode", [user("a"), assistant("b")],
     "f:3: template t.jinja: has no generation prompt: add_generation_prompt=true adds nothing, yet '<|im_start|>assistant\\n' "
     "stands before the answer"),
    (NO_PROMPT, "prompt_ids", [user("a")],
     "f:3: template t.jinja: has no generation prompt: add_generation_prompt=true adds nothing, yet '<|im_start|>assistant\\n' "
     "stands before the answer"),
    (CHATML, "encode", [assistant("b"), user("a")], "f:3: message 1: is the assistant's; template t.jinja needs a message before it"),
    (CHANGES, "encode", CHAT[1:], "f:3: message 2: template t.jinja writes it otherwise when others follow, so what is learned would "
     "not be what is sampled; put {% generation %} around its answers"),
    ("{% generation %}x{% endgeneration %}", "encode", CHAT, "f:3: template t.jinja: has {% generation %} around 1 of 2 answers"),
    ("{{ raise_exception('no\nway') }}", "encode", CHAT, "f:3: template t.jinja: no way"),
    ("{{ nothing.at.all }}", "encode", CHAT, "f:3: template t.jinja: 'nothing' is undefined"),
    ("{{ 1 + 'a' }}", "encode", CHAT, "f:3: template t.jinja: TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
    ("{{ ''.__class__.__mro__ }}", "encode", CHAT,
     "f:3: template t.jinja: access to attribute '__class__' of 'str' object is unsafe."),
]


@pytest.mark.parametrize("name, call, messages, message", BAD)
def test_mistakes_in_conversations_are_named(name, call, messages, message):
    if name not in TEMPLATES:
        pytest.importorskip("jinja2")
    chat = toy_chat(name) if name in TEMPLATES else jinja(name)
    with pytest.raises(UserError) as e:
        getattr(chat, call)(messages, "f:3")
    assert str(e.value) == message


def test_mistakes_in_templates_are_named(tmp_path, monkeypatch):
    def told(template, tokenizer=None):
        with pytest.raises(UserError) as e:
            load_chat(template, tokenizer or Toy("<|im_start|>", "<|im_end|>"))
        return str(e.value)

    assert told("chatlm") == ("template 'chatlm': should be own, plain, chatml, qwen, llama3, gemma, or a .jinja or "
                              "tokenizer_config.json file; did you mean 'chatml'?")
    assert told("llama3", ByteTokenizer()) == (
        "template llama3: tokenizer bytes has no token '<|start_header_id|>'; template own goes with the tokenizers that "
        "`jaxllm tokenizer` makes, plain with any")
    file = tmp_path / "chat.jinja"
    assert told(str(tmp_path / "chta.jinja")) == f"template {tmp_path / 'chta.jinja'}: no such file; found: nothing"
    pytest.importorskip("jinja2")
    file.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    assert told(str(tmp_path / "chta.jinja")).endswith("did you mean 'chat.jinja'?")
    assert told(str(file)) == f"template {file}: line 2: unexpected '}}'"
    file.write_text("<|start|>{{ messages[0].content }}")
    assert told(str(file)).startswith(f"template {file}: tokenizer toy has no token '<|start|>'")
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert told(str(config)) == f"template {config}: holds no chat_template; should be a text, or a list with one named default"
    config.write_text("[]")
    assert told(str(config)) == f"template {config}: should hold an object, found []"
    config.unlink()
    file.write_text(CHATML)
    for module in [name for name in sys.modules if name.partition(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def without_jinja(name, *args, **kwargs):
        if name.startswith("jinja2"):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    assert told(str(file)) == f"template {file}: needs jinja2: pip install 'jaxllm[chat]'"


def test_a_turn_without_an_end_is_told_when_sampling_asks():
    pytest.importorskip("jinja2")
    chat = jinja("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(UserError, match="no control token ends the assistant's turn, so sampling would not stop"):
        _ = chat.end_id
