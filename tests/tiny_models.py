"""Small models, tokenizers and chat templates that the tests build on the spot, and a model that follows a script."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEMPLATE = (  # the shape of Qwen's: a header and an end mark per message, tool results in a user turn
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CHATML = (  # a function list as Qwen2.5 and Hermes 2 Pro write it, then messages by `TEMPLATE`
    "{% if tools %}<|im_start|>system\nfunctions:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\nFor each call:\n"
    '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n{% endif %}'
)
CALLS = (  # a turn's declared calls as Qwen2.5 writes them
    '{% for m in messages if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}'
)
R1_MESSAGES = (  # both templates of R1: no header lines, thoughts of earlier turns are cut off
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}"
    "<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"
)
LLAMA_MESSAGES = (
    "{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{{ m.content | tojson if m.role == 'tool' else m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FAMILIES = {  # name -> (template or templates, eos, other special tokens, bos); rebuilt small, after the real ones
    "qwen2.5": (CHATML + CALLS + TEMPLATE, "<|im_end|>", ["<|im_start|>"], None),
    "qwen2.5-base": (CHATML + CALLS + TEMPLATE, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], None),
    "qwen3-thinking": (
        CHATML + CALLS + TEMPLATE.replace("assistant\n", "assistant\n<think>\n"), "<|im_end|>", ["<|im_start|>"], None,
    ),
    "hermes-2-pro": (
        {
            "default": TEMPLATE.replace("<tool_response>\n", "").replace("\n</tool_response>", ""),
            "tool_use": CHATML + "{% for m in messages if m.role == 'tool' and (not m.name or not m.tool_call_id) %}"
            "{{ raise_exception('Tool response dicts require a name') }}{% endfor %}"
            + TEMPLATE.replace("'user' if m.role == 'tool' else m.role", "m.role"),
        },
        "<|im_end|>", ["<|im_start|>"], None,
    ),
    "r1": (R1_MESSAGES + "{% endif %}", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"], "<｜begin▁of▁sentence｜>"),
    "r1-distill": (
        R1_MESSAGES + "<think>\n{% endif %}", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"],
        "<｜begin▁of▁sentence｜>",
    ),
    "llama-3.1": (
        "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}" + LLAMA_MESSAGES,
        "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>",
    ),
    "llama-3.2": (
        "{{ bos_token }}Today Date: {% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}\n"
        + LLAMA_MESSAGES,
        "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>",
    ),
    "gemma-2": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<bos>",
    ),
    "mistral-0.3": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}"
        "{% if (m.tool_call_id or '') | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        '[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
        "{% elif m.tool_calls %}[TOOL_CALLS] [{{ m.tool_calls[0].function | tojson }}]{{ eos_token }}"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "<s>",
    ),
    "phi-3": (  # an early one: a system message is left out without a word
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|end|>"], None,
    ),
}  # fmt: skip


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with the chat template and control tokens of a model family; its bos comes by itself."""
    template, eos, special, bos = FAMILIES[name]
    fast = byte_tokenizer(eos=eos, special=special)
    fast.chat_template, fast.name_or_path = template, name
    if bos:
        fast.add_special_tokens({"bos_token": bos})
        pair = [(bos, fast.bos_token_id)]
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    return fast


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is ▁, one stands in front of every text and the decoder drops it; bytes fall back."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789<>/()|_?+=.:", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁s"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "s")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    return fast


def byte_tokenizer(
    extra: list[str] = (), eos: str = "<|im_end|>", special: list[str] = ("<|im_start|>",)
) -> PreTrainedTokenizerFast:
    """One token per byte, plus `extra` multi-character tokens (merged nowhere else), two special marks and a pad."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.add_tokens(list(extra))
    fast.chat_template = TEMPLATE
    return fast


def save_tiny_model(folder: Path, seed: int = 0, bias: bool = True, extra: list[str] = ()) -> Path:
    """A random two-layer Qwen2 with the byte tokenizer, and a generation_config that a rollout has to ignore."""
    tokenizer = byte_tokenizer(extra)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.apply(lambda m: isinstance(m, torch.nn.Linear) and torch.nn.init.normal_(m.weight, std=0.15))
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=3,
        top_p=0.3,
        temperature=0.1,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_with_byte_tokenizer(model, folder: Path, head: float = 1.0) -> str:
    """Write a model of at least 259 rows with the byte tokenizer, its output head scaled; returns the folder."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(head)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_multimodal(cap: float | None, tied: bool = True):
    """A Gemma 4 that AutoModelForCausalLM loads as its multimodal class, without towers; `cap` of the logits."""
    text = Gemma4TextConfig(
        vocab_size=264, vocab_size_per_layer_input=264, hidden_size=64, hidden_size_per_layer_input=0,
        intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        global_head_dim=16, final_logit_softcapping=cap, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    ids = {"image_token_id": 261, "boi_token_id": 262, "eoi_token_id": 263, "audio_token_id": 260}
    torch.manual_seed(0)
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=None, audio_config=None, tie_word_embeddings=tied, **ids)
    )


class ScriptedModel(torch.nn.Module):
    """Stands in for a model in rollouts: `generate` writes, row by row, the next piece of a script.

    script(response text so far, prompt text) -> text to write next, tokenised by `encode`; a script of one argument
    gets the response. Stops as generate does.
    """

    def __init__(self, tokenizer, script, encode=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.script = script if script.__code__.co_argcount == 2 else lambda response, prompt: script(response)
        self.encode = encode or (lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []  # number of rows of every call

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria, **_):
        self.batches.append(len(input_ids))
        pad, eos = generation_config.pad_token_id, set(generation_config.eos_token_id)
        todo = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist()):
            seen = [i for i, m in zip(ids, mask) if m]
            prompt, header, response = self.tokenizer.decode(seen).partition("<|im_start|>assistant\n")
            todo.append(self.encode(self.script(response, prompt)))
        out, done = input_ids, torch.zeros(len(input_ids), dtype=torch.bool)
        for step in range(generation_config.max_new_tokens):
            column = [pad if d or step >= len(t) else t[step] for t, d in zip(todo, done.tolist())]
            out = torch.cat([out, torch.tensor(column)[:, None]], dim=1)
            done |= stopping_criteria(out, None) | torch.tensor([c in eos for c in column])
            if done.all():
                break
        return out
