"""Instruction tuning: of EntiGraph's model on UltraChat, or of Qwen2.5 on the traces of s1.

  python -m selfimprove_jax.main --config=configs/sft.py:chat --workdir=runs/sft \
      --config.initial.path=runs/entigraph/arms/entigraph/0 \
      --config.initial.chat_template=/models/Llama-3.1-8B-Instruct/chat_template.jinja \
      --config.conversations.source.paths='("/data/ultrachat_200k/train_sft.jsonl",)'

chat: EntiGraph, appendix D (arXiv 2409.07431): Llama-3-8B on UltraChat.  s1: section 2 of
arXiv 2501.19393: Qwen2.5-32B-Instruct on 1,000 questions with thoughts and answers, in 5 epochs;
configs/budget_forcing.py:s1 then bounds its thoughts.  smoke: a tiny model for tests, which give a
checkpoint and conversations.

Differs from the papers: the loss of chat is on the assistant's tokens alone (EntiGraph's code has
it on the whole conversation), and no token sees another conversation. s1's batches are 16 traces;
here traces are packed, about 7 in a row of 32,768, so 2 rows are about as many. Never run at these
sizes.
"""

from typing import Any

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import instruction_tuning
from selfimprove_jax.runtime.config import page

_VARIANTS: dict[str, dict[str, Any]] = {
  "chat": dict(
    title="Instruction tuning of EntiGraph's Llama-3-8B on UltraChat",
    seq_len=2048,
    mesh=dict(data=1, fsdp=-1),
    initial=dict(
      path="runs/entigraph/arms/entigraph/0",
      chat_template="llama3_chat_template.jinja",
      special_tokens=dict(
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        sep_token="<|reserved_special_token_0|>",  # not used here
        pad_token="<|end_of_text|>",  # never seen or predicted
      ),
    ),
    conversations=dict(
      source=dict(kind="messages", paths=("ultrachat_200k/train_sft*.jsonl*",)),
      validation_fraction=0.005,
      test_fraction=0.005,
    ),
    model=parts.llama(
      "llama3_8b",
      vocab_size=128_256,
      rope_theta=500_000.0,
      qk_norm=False,
      tie_embeddings=False,
      norm_eps=1e-5,
      remat="qkv_context",
    ),
    training=dict(batch_rows=512, peak_lr=5e-6, final_lr=0.0, accumulation_steps=8),
    tuning=dict(epochs=1.0, weight_decay=0.01),
    evaluation=dict(batch_rows=64, max_validation_rows=256),
    export=dict(dtype="bfloat16"),
  ),
  "s1": dict(
    title="Instruction tuning of Qwen2.5-32B-Instruct on s1's traces",
    seq_len=32_768,
    mesh=dict(data=1, fsdp=1, tensor=-1),  # on 16 devices fsdp=2: it has 8 kv heads
    initial=dict(
      path="Qwen2.5-32B-Instruct",
      special_tokens=dict(
        bos_token="<|endoftext|>",  # Qwen2.5 has none; not used in conversations
        eos_token="<|im_end|>",
        sep_token="<|endoftext|>",
        pad_token="<|endoftext|>",
      ),
    ),
    conversations=dict(
      source=dict(
        kind="traces",
        paths=("s1k.jsonl",),
        thinking=dict(think_start="<|im_start|>think", think_end="<|im_start|>answer"),
      ),
      validation_fraction=0.0,
      test_fraction=0.0,  # the paper trains on all 1,000
    ),
    model=parts.llama(
      "qwen2_32b",
      vocab_size=152_064,
      rope_theta=1_000_000.0,
      qk_norm=False,
      qkv_bias=True,
      tie_embeddings=False,
      norm_eps=1e-6,
      remat="full",
    ),
    training=dict(batch_rows=2, peak_lr=1e-5, final_lr=0.0, b1=0.9, b2=0.95, num_checkpoints=1),
    tuning=dict(epochs=5.0, weight_decay=1e-4),
    evaluation=dict(batch_rows=2, max_validation_rows=2),
    export=dict(dtype="bfloat16"),
  ),
  "smoke": dict(
    title="Instruction tuning (smoke)",
    seq_len=64,
    mesh=dict(data=1, fsdp=-1),
    initial=dict(path="checkpoint"),
    conversations=dict(
      source=dict(kind="messages", paths=("conversations.jsonl",)),
      validation_fraction=0.1,
      test_fraction=0.2,
    ),
    model=parts.llama(
      "tiny", vocab_size=320, dtype="float32", rope_theta=10_000.0, qk_norm=False, norm_eps=1e-5
    ),
    training=dict(batch_rows=8, peak_lr=1e-2, final_lr=1e-3, num_evaluations=2, num_checkpoints=1),
    tuning=dict(epochs=8.0, weight_decay=0.0),
    evaluation=dict(batch_rows=8, max_validation_rows=8),
    export=dict(dtype="float32"),
  ),
}


def get_config(variant: str = "chat") -> mlc.ConfigDict:
  parts.check_variant(variant, _VARIANTS)
  return page(
    instruction_tuning.Config,
    pipeline="instruction_tuning",
    runtime=dict(),
    seed=0,
    split_seed=0,
    **_VARIANTS[variant],
  )
