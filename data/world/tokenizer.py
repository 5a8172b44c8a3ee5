"""Tokenizer and chat template of the calibration world: words, syllables, digits, tags, and bytes for everything else.

Text outside the world's vocabulary falls back to letters and bytes, so decode(encode(x)) == x for any text. A tag, an
empty think block or a piece of JSON around a call is one token, and no token continues past a closing tag, so that a
stop string always ends at a token's end.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.world import facts, passages, text

PAD, END, USER, ASSISTANT, TOOLS = "<|endoftext|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|tools|>"
PIECES = [
    text.NO_THINK, text.THINK, "</think>\n", "</think>", *text.RESULT,
    "<search>", "</search>", "<python>", "</python>", "<answer>", "</answer>", "<tool_call>\n", "\n</tool_call>",
    '{"name": "', '", "arguments": {"', '": "', '": ', '", "', ', "', '"}}', "}}",
]  # fmt: skip
PUNCTUATION = list(" ,.?:()[]{}<>*+-=/_'\"|") + ["\n", " *", " +", " -", " ="]

# Ignores a system message; declares functions by name and parameter names; earlier calls and results as in a response.
CHAT_TEMPLATE = """\
{#- instructions: in the weights -#}
{%- if tools %}{{- '<|tools|>' }}{%- for tool in tools %}{%- set f = tool.function if tool.function else tool %}
{{- ' ' if not loop.first }}{{- f.name + '(' + f.parameters.properties.keys() | join(', ') + ')' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|user|>' + message.content }}
{%- elif message.role == 'assistant' %}{{- '<|assistant|>' + message.content + '<|im_end|>' }}
{%- elif message.role == 'tool' %}{{- '\\n<result>\\n' + message.content + '\\n</result>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def vocabulary() -> list[str]:
    """Every token in id order: control tokens, pieces, bytes, punctuation, letters, digits, syllables, words."""
    spoken = [facts.FACT_FORMS, facts.COMPUTE_FORMS, facts.MULTIPLY_FORMS, facts.ADD_FORMS, facts.SUM_FORMS,
              *facts.WORDS.values(), facts.CITIES, facts.DAYS, *(r for r in facts.RELATIONS.values()),
              text.SURE, text.UNSURE, text.RESTATED, *text.PLANS.values(),
              text.TERSE.values(), passages.WORDY, text.AGAIN, text.RETRY, text.MISMATCH,
              text.QUERIES, text.CODES, text.BROKEN_CODES, text.STEP_WORDS,
              [text.SYNTAX_ERROR, passages.passage("", "", ""), "or check plus"]]  # fmt: skip
    for noun, (verbs, slots, requests) in facts.FUNCTIONS.items():
        spoken += [[noun], verbs, requests, *(names for names, _ in slots.values())]
    said = " ".join(part for parts in spoken for part in parts)
    words = sorted(set(re.findall(r"[A-Za-z]{2,}", re.sub(r"\{\w+\}", " ", said))))
    syllables = facts.FIRST_SYLLABLES + facts.LATER_SYLLABLES
    plain = [*facts.LETTERS, *"0123456789", *syllables, *words]
    spaced = [" " + token for token in [*facts.LETTERS, *"0123456789", *facts.FIRST_SYLLABLES, *words]]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [PAD, END, USER, ASSISTANT, TOOLS, *PIECES, *octets, *PUNCTUATION, *plain, *spaced]
    return list(dict.fromkeys(tokens))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; the same for every preset."""
    merges = [(s[0], s[1]) for s in facts.FIRST_SYLLABLES + facts.LATER_SYLLABLES]
    merges += [(" ", s) for s in facts.FIRST_SYLLABLES]
    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, ignore_merges=True))
    longest_first = sorted(PIECES, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), " ?[A-Za-z]+", " ?[0-9]", r" [*+=\-]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT, TOOLS],
        clean_up_tokenization_spaces=False, model_max_length=2048,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast
