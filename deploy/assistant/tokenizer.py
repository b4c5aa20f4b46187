"""The demo model's tokenizer: byte-level BPE, digits one by one, one token per intent label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 2048
PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{%- if role not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception('unknown role ' ~ role ~ '; use system, developer, user, assistant or tool') }}
{%- endif %}
{%- if message['content'] is string %}
{{- '<|' ~ role ~ '|>' ~ message['content'] ~ '<|end|>' }}
{%- elif message['content'] %}
{{- '<|' ~ role ~ '|>' }}
{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}
{{- '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], intents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train on ``texts``; every label of ``intents`` becomes a single token.

    Digits are split so that numbers can be copied one digit at a time, whatever their value.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(intents),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    labels = [AddedToken(intent, single_word=True, normalized=False) for intent in sorted(intents)]
    # A label that BPE already made one token keeps that token; fill the gap so that the
    # embedding keeps its width.
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(labels)
    spare = sum(label.content in known for label in labels)
    tokenizer.add_special_tokens([AddedToken(f"<|spare_{i}|>", special=True) for i in range(spare)])
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(f"vocabulary has {tokenizer.get_vocab_size()} tokens, wanted {VOCABULARY_SIZE}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD, model_max_length=1024
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
