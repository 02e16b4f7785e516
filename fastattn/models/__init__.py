"""Reference models made of fastattn's ops."""

from fastattn.models.gpt import GPT, GPTConfig, KVCache

__all__ = ["GPT", "GPTConfig", "KVCache"]
