"""From scored responses to the token batch of one policy update.

Responses to one prompt form a group; A = (r - mean) / std over the group, groups of equal rewards drop out. The
update takes its sequences from the groups in turn, and within a group those of largest |A| first, alternating in
sign, so that both branches of the bound are at work. As LLaDA is trained, each response is filled up with eos tokens,
which are scored too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from _memory_vs_mc.options import Options
from bgpo_kernels.models.llada import llada_config
from bgpo_kernels.tasks import TASKS, Record, read_records, scored_candidates, write_records


@dataclass(frozen=True)
class Tokens:
    """The batch as arrays: input_ids, attention_mask [B, T] int64, response_mask [B, T] bool, advantages [B] fp32."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    response_mask: np.ndarray
    advantages: np.ndarray
    mask_token_id: int
    records: list[Record]

    def save(self, path: Path) -> None:
        """Write the arrays for the measuring processes."""
        np.savez(
            path,
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            response_mask=self.response_mask,
            advantages=self.advantages,
        )


def load_tokens(options: Options, workdir: Path) -> Tokens:
    """Read (or first generate) the records, choose the sequences, tokenize them. Raises ValueError with the reason."""
    path = options.data or generate(workdir / "problems.jsonl", options)
    tokenizer, mask_token_id = _tokenizer(options)
    chosen = choose(read_records(path), options.sequences)
    return _tokenize(chosen, tokenizer, mask_token_id, options.response_tokens)


def generate(path: Path, options: Options) -> Path:
    """Write enough Countdown and Sudoku problems for the update, with four candidate answers each; returns `path`."""
    per_task = -(-options.sequences // (2 * len(TASKS)))
    records = [r for task in TASKS.values() for r in scored_candidates(task, per_task, 4, options.seed)]
    write_records(path, records)
    return path


def choose(records: Sequence[Record], count: int) -> list[tuple[Record, float]]:
    """The `count` records of the update with their group-normalised advantages, none of them zero."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.prompt), []).append(record)
    queues = [_by_sign(group) for group in groups.values() if len({record.reward for record in group}) > 1]
    offered = [pair for turn in zip_longest(*map(_alternating, queues, range(len(queues)))) for pair in turn if pair]
    if len(offered) < count:
        raise ValueError(
            f"the update needs {count} sequences, but the data offers {len(offered)} with a non-zero advantage "
            "(responses to one prompt must differ in reward)"
        )
    return offered[:count]


def _by_sign(group: Sequence[Record]) -> tuple[list[tuple[Record, float]], list[tuple[Record, float]]]:
    """(positive, negative) advantages of one group, the largest first; zeros are left out."""
    rewards = [record.reward for record in group]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    scored = [(record, (record.reward - mean) / spread) for record in group]
    scored.sort(key=lambda pair: -abs(pair[1]))
    return [pair for pair in scored if pair[1] > 1e-6], [pair for pair in scored if pair[1] < -1e-6]


def _alternating(
    signs: tuple[list[tuple[Record, float]], list[tuple[Record, float]]], turn: int
) -> Iterator[tuple[Record, float]]:
    """Positive and negative in turn; every second group begins with a negative one."""
    first, second = signs if turn % 2 == 0 else signs[::-1]
    return (pair for both in zip_longest(first, second) for pair in both if pair)


def _tokenizer(options: Options) -> tuple[Any, int]:
    """The tokenizer and the mask token id: LLaDA's ids with byte tokens, or those of --model."""
    if options.model is None:
        from bgpo_kernels.tasks.tokenizer import byte_tokenizer

        config = llada_config(options.shape)
        return byte_tokenizer(config.mask_token_id, config.eos_token_id), config.mask_token_id
    from transformers import AutoConfig, AutoTokenizer

    where: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, **where)
        config = AutoConfig.from_pretrained(options.model, **where)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: cannot load {options.model}: {error}") from error
    for mask_token_id in (options.mask_token_id, getattr(config, "mask_token_id", None), tokenizer.mask_token_id):
        if mask_token_id is not None:
            return tokenizer, mask_token_id
    raise ValueError(
        f"--model: neither config nor tokenizer of {options.model} names a mask token; use --mask-token-id"
    )


def _tokenize(
    chosen: Sequence[tuple[Record, float]], tokenizer: Any, mask_token_id: int, response_tokens: int
) -> Tokens:
    special = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    fill = next((token for token in special if token is not None), None)
    if fill is None:
        raise ValueError("the tokenizer has no eos, sep or pad token to fill responses with")
    rows = []
    for record, _ in chosen:
        prompt, response = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (record.prompt, record.response)
        )
        if len(response) > response_tokens:
            raise ValueError(
                f"a response of {len(response)} tokens exceeds --response-tokens {response_tokens}: {record.response!r}"
            )
        if mask_token_id in prompt + response:
            raise ValueError(f"the mask token occurs in the text: {record.prompt + record.response!r}")
        rows.append((prompt, response + [fill] * (response_tokens - len(response))))
    width = response_tokens + max(len(prompt) for prompt, _ in rows)
    ids = np.array([[fill] * (width - len(p) - response_tokens) + p + r for p, r in rows], dtype=np.int64)
    real = np.array([[0] * (width - len(p) - response_tokens) + [1] * (len(p) + response_tokens) for p, _ in rows])
    scored = np.broadcast_to(np.arange(width) >= width - response_tokens, ids.shape).copy()
    advantages = np.array([advantage for _, advantage in chosen], dtype=np.float32)
    return Tokens(ids, real.astype(np.int64), scored, advantages, mask_token_id, [record for record, _ in chosen])
