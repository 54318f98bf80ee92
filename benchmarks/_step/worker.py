"""What one process measures: one model, trained in one way.

start           the model built, a first update, and how many tokens the package then takes at once
gemm            the rate of the bare matrix products at that many tokens
against plain   ours, the plain update, and the plain one without the old policy's pass, interleaved
memory          peak of an update, one Monte Carlo sample at a time, at every n_mc
throughput      seconds of an update at every n_mc, with the package's own micro-batches
optimizer step  a whole step with an 8-bit optimizer, in the mode that asks whether it fits
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measure import PeakMemory, gpu_state, interleave, limit_memory, median_ratio, synchronize
from _script import OK, Record
from torch import nn

from .batch import make_batch, masked_rows, our_update
from .fits import CAP, optimizer_step
from .flops import Dimensions, update_flops
from .gemm import gemm_rate
from .models import NotInstalled, Subject, build
from .plain import plain_update

FITS = "full+AdamW8bit"
# By worth: what a run cut short should have.
SUBJECTS = (
    ("llada-8b", "lora"),
    ("llada-8b", "full+checkpointing"),
    ("llada-8b", FITS),
    ("dream-7b", "lora"),
    ("dream-7b", "full+checkpointing"),
    ("llada-8b", "full"),
    ("dream-7b", "full"),
)
NOT_INSTALLED = "not installed"
LONG_ENOUGH = 6.0  # seconds of updates at one n_mc, after which no round begins
MOST_AT_ONCE = 16  # samples of a sequence: the update that shows how many the package takes at once has as many


def cases(options: argparse.Namespace, shape: str, mode: str) -> list[dict[str, Any]]:
    """The rows wanted of one process, besides "start", by worth."""
    subject = {"shape": shape, "mode": mode}
    if mode == FITS:
        return [subject | {"measure": "optimizer step", "n_mc": max(options.n_mc)}]
    rows: list[dict[str, Any]] = [{"measure": "gemm"}, {"measure": "against plain", "n_mc": options.plain_n_mc}]
    rows += [{"measure": measure, "n_mc": n_mc} for measure in ("memory", "throughput") for n_mc in options.n_mc]
    return [subject | row for row in rows]


class Worker:
    """One model and its measures."""

    def __init__(self, options: argparse.Namespace, shape: str, mode: str) -> None:
        self.options, self.device = options, options.device
        self.shape, self.mode = shape, mode
        self.micro_batch_tokens: int | None = options.micro_batch_tokens
        self.tokens_at_once = 0
        self.gemm: float | None = None

    def run(self, record: Record) -> None:
        """Measure what the record lacks."""
        started = record.measure({"shape": self.shape, "mode": self.mode, "measure": "start"}, self.start)
        if started["status"] != OK:
            return
        for case in cases(self.options, self.shape, self.mode):
            row = record.measure(case, partial(self.measure, case))
            print(f"  {case['measure']} {case.get('n_mc', '')}: {row['status']}", flush=True)
            if case["measure"] == "gemm":
                self.gemm = row.get("flops_per_second")

    def start(self) -> dict[str, Any]:
        """Build the model and bring it, the workspace and the libraries to their working state."""
        if self.mode == FITS:
            limit_memory(self.device, CAP)
        begin = time.perf_counter()
        tiny, mode = self.options.dry_run, "full+checkpointing" if self.mode == FITS else self.mode
        try:
            self.subject: Subject = build(self.shape, mode, self.device, tiny)
        except NotInstalled as error:
            return {"status": NOT_INSTALLED, "message": str(error)}
        synchronize(self.device)
        built = time.perf_counter()
        prompt, response = (8, 8) if tiny else (self.options.prompt_tokens, self.options.response_tokens)
        mask_token_id = self.subject.config.mask_token_id
        self.batch = make_batch(self.options.sequences, prompt, response, mask_token_id, self.device)
        if self.mode != FITS:
            self._fill_workspace()
            self.tokens_at_once = self._learn_micro_batch()
        synchronize(self.device)
        return {
            "parameters": sum(parameter.numel() for parameter in self.subject.model.parameters()),
            "trained": sum(parameter.numel() for parameter in self.subject.trained),
            "weight_bytes": self.subject.weight_bytes,
            "gradient_bytes": self.subject.gradient_bytes,
            "prompt_tokens": prompt,
            "response_tokens": response,
            "sequences": self.options.sequences,
            "micro_batch_tokens": self.tokens_at_once,
            "build_seconds": built - begin,
            "first_update_seconds": time.perf_counter() - built,
            **self._gpu(),
        }

    def _fill_workspace(self) -> None:
        """Every response token masked, so that the workspace has the size that any draw can need.

        It grows to what a call needs and stays. Grown on the way, it would make the peak follow the draw's longest
        sample, which among many samples is longer than in one, and not the number of samples.
        """
        our_update(self.subject.model, self.batch, 1, seed=0, micro_batch_tokens=self.batch.tokens, scheme="full")
        self._forget()

    def _learn_micro_batch(self) -> int:
        """Tokens that the package runs at once, seen in the shapes of the model's inputs."""
        seen: list[int] = []

        def look(_: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():  # not the package's own probe of the model
                seen.append(kwargs["input_ids"].numel())

        hook = self.subject.model.register_forward_pre_hook(look, with_kwargs=True)
        self._ours(MOST_AT_ONCE)()
        hook.remove()
        largest, left = 0, MOST_AT_ONCE * self.batch.input_ids.numel()
        while left > 0:  # from the end: before that may stand attempts that ran out of memory
            largest, left = max(largest, seen[-1]), left - seen.pop()
        return largest

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """The figures of one case."""
        self._forget()
        n_mc = case.get("n_mc", 0)
        if case["measure"] == "gemm":
            return gemm_rate(self._dimensions, self.tokens_at_once, self.device, 0.0 if self.options.dry_run else 0.05)
        if case["measure"] == "optimizer step":
            return self._fits(n_mc)
        measures = {"against plain": self._against_plain, "memory": self._memory, "throughput": self._throughput}
        return measures[case["measure"]](n_mc)

    def _fits(self, n_mc: int) -> dict[str, Any]:
        try:
            return optimizer_step(self.subject, self.batch, n_mc, self.device)
        except NotInstalled as error:
            return {"status": NOT_INSTALLED, "message": str(error)}

    def _against_plain(self, n_mc: int) -> dict[str, Any]:
        variants = {
            "ours": self._ours(n_mc),
            "plain": self._plain(n_mc, old_pass=True),
            "plain, no old pass": self._plain(n_mc, old_pass=False),
        }
        seconds = interleave(variants, self.options.rounds, str(self.device))
        rates = {name: self._rate(n_mc, samples) for name, samples in seconds.items()}
        return {
            "seconds": seconds,
            "mc_samples_per_second": rates,
            "times_plain": median_ratio(seconds, "plain", "ours"),
            "times_plain_without_old_pass": median_ratio(seconds, "plain, no old pass", "ours"),
            **self._utilisation(n_mc, seconds["ours"]),
            **self._gpu(),
        }

    def _memory(self, n_mc: int) -> dict[str, Any]:
        memory = PeakMemory(self.device)
        memory.start()
        begin = time.perf_counter()
        our_update(self.subject.model, self.batch, n_mc, seed=n_mc, micro_batch_tokens=self.batch.tokens)
        peak = memory.baseline + memory.above()  # waits for the device
        held = self.subject.weight_bytes + self.subject.gradient_bytes
        return {
            "peak_bytes": peak,
            "above_weights_and_gradients_bytes": peak - held,
            "seconds": [time.perf_counter() - begin],
            "instrument": memory.how,
        }

    def _throughput(self, n_mc: int) -> dict[str, Any]:
        update, seconds = self._ours(n_mc), []
        while not seconds or (len(seconds) < self.options.rounds and sum(seconds) < LONG_ENOUGH):
            synchronize(self.device)
            begin = time.perf_counter()
            update()
            synchronize(self.device)
            seconds.append(time.perf_counter() - begin)
        rate = {"mc_samples_per_second": self._rate(n_mc, seconds)}
        return {"seconds": seconds, **rate, **self._utilisation(n_mc, seconds), **self._gpu()}

    def _ours(self, n_mc: int) -> Callable[[], None]:
        def run() -> None:
            self._forget()
            our_update(self.subject.model, self.batch, n_mc, seed=n_mc, micro_batch_tokens=self.micro_batch_tokens)

        return run

    def _plain(self, n_mc: int, old_pass: bool) -> Callable[[], None]:
        def run() -> None:
            self._forget()
            plain_update(self.subject.model, self.batch, n_mc, seed=n_mc, old_pass=old_pass)

        return run

    def _forget(self) -> None:
        if self.mode != FITS:
            self.subject.model.zero_grad(set_to_none=True)

    def _rate(self, n_mc: int, seconds: list[float]) -> float:
        return len(self.batch.input_ids) * n_mc / statistics.median(seconds)

    @property
    def _dimensions(self) -> Dimensions:
        return Dimensions.of(self.subject.config)

    def _utilisation(self, n_mc: int, seconds: list[float]) -> dict[str, Any]:
        """Model FLOPs of an update, and the share of the GEMM rate that they were done at."""
        samples, masked = len(self.batch.input_ids) * n_mc, masked_rows(self.batch, n_mc, seed=n_mc)
        flops = update_flops(self._dimensions, samples, self.batch.tokens, masked, self.subject.lora_rank)
        rate = flops / statistics.median(seconds)
        share = rate / self.gemm if self.gemm else None
        return {"masked_rows": masked, "model_flops": flops, "flops_per_second": rate, "utilisation": share}

    def _gpu(self) -> dict[str, Any]:
        return {"gpu": gpu_state(self.device)} if self.device.type == "cuda" else {}
