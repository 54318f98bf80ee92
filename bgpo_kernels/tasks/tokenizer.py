"""A byte-level tokenizer that needs no download: one token per UTF-8 byte, ids 0..255, and LLaDA's special ids.

Any text round-trips. The special tokens carry the ids that LLaDA uses, so a model with LLaDA's vocabulary of 126464
and its mask id serves this tokenizer and LLaDA's own alike. The vocabulary is sparse: `len(tokenizer)` is 258, its
largest id 126336.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MASK_TOKEN, MASK_TOKEN_ID = "<|mdm_mask|>", 126336
EOS_TOKEN, EOS_TOKEN_ID = "<|endoftext|>", 126081


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level BPE vocabularies (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, take the characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer(mask_token_id: int = MASK_TOKEN_ID, eos_token_id: int = EOS_TOKEN_ID) -> PreTrainedTokenizerFast:
    """The tokenizer, with `mask_token` and `eos_token` (also padding) at the given ids; they default to LLaDA's.

    Raises ValueError when the two special ids coincide or fall among the 256 byte ids.
    """
    if mask_token_id == eos_token_id or min(mask_token_id, eos_token_id) < 256:
        raise ValueError(f"special ids must differ and lie above 255, got mask {mask_token_id}, eos {eos_token_id}")
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary |= {MASK_TOKEN: mask_token_id, EOS_TOKEN: eos_token_id}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (MASK_TOKEN, EOS_TOKEN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=MASK_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
