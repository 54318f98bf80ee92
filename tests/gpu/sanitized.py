"""Every kernel once, at small ragged sizes, for compute-sanitizer; results are compared with the references.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitized.py
    compute-sanitizer --tool racecheck ...                  (initcheck, synccheck)

Exits with 1 when a result is wrong; what the sanitizer finds, it reports itself. torch's caching allocator is switched
off, so that every tensor is an allocation of its own, with an end that the sanitizer knows. ``--device cpu`` rehearses
the script: the compiled CPU engine, and Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Check = tuple[str, Callable[[], None]]  # a name, and a call that raises AssertionError


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[%(default)s]")
    parser.add_argument("--backend", choices=("cuda", "triton"), action="append", help="one of them only [both]")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu rehearses this script without one")
    return given


def checks(backend: str, device: str) -> Iterator[Check]:
    """All of one backend; imported here, since Triton reads TRITON_INTERPRET when it is imported."""
    yield from mask_checks(backend, device)
    yield from row_checks(backend, device)
    yield from bound_checks(backend, device)


# ------------------------------------------------------------------------------------------------ masks


def mask_checks(backend: str, device: str) -> Iterator[Check]:
    """All schemes and schedules; lengths around a warp and a block; strided inputs; prompts."""
    from mask_model import LAWS, assert_same_draw, draw, make_batch

    lengths = [1, 2, 31, 33, 129] if device == "cpu" else [1, 2, 31, 33, 257, 1025]
    tokens = max(lengths) + 6
    sample_ids = torch.arange(len(lengths)) * (2**33 + 1) - 2

    def check(law: str, strided: bool) -> None:
        ids, response = make_batch(lengths, tokens)
        more = {"n_mc": 4, "prompt_mask_prob": 0.3, "seed": 2**63 + 5}
        want = draw(law, ids, response, prompt_mask=~response, sample_ids=sample_ids, backend="reference", **more)
        ids, response, on_device = (x.to(device) for x in (ids, response, sample_ids))
        if strided:
            ids, response = ids.T.contiguous().T, response.T.contiguous().T
        got = draw(law, ids, response, prompt_mask=~response, sample_ids=on_device, backend=backend, **more)
        assert_same_draw(got, want, f"under {law}")

    for law in LAWS:
        yield f"masks {law}", lambda law=law: check(law, strided=law == "exact-uniform")


# ------------------------------------------------------------------------------------------------ rows of logits


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """A few roundings of numbers near 20; a narrow gradient is rounded once more."""
    if dtype == torch.float64:
        return {"rtol": 1e-12, "atol": 1e-12}
    return {"rtol": max(4e-6, torch.finfo(dtype).eps), "atol": 4e-6}


def make_chunk(rows: int, vocab: int, dtype: torch.dtype, device: str, gap: int, offset: int) -> tuple[Tensor, Tensor]:
    """Logits with ``gap`` elements of NaN between rows, beginning at an odd place of a buffer that ends with the last
    row; and the buffer."""
    buffer = torch.full((offset + rows * (vocab + gap) - gap,), torch.nan, dtype=dtype, device=device)
    logits = buffer.as_strided((rows, vocab), (vocab + gap, 1), offset)
    logits.copy_(torch.randn(rows, vocab, dtype=torch.float64).to(device) * 4)
    return logits, buffer


def assert_gaps_untouched(logits: Tensor, buffer: Tensor) -> None:
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
    outside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
    assert bool(buffer[outside].isnan().all()), "wrote between the rows"


def row_checks(backend: str, device: str) -> Iterator[Check]:
    """Statistics with and without entropy, dlogits in all dtypes, aligned rows and others."""
    from bgpo_kernels.backends import engine
    from bgpo_kernels.head import reference
    from bgpo_kernels.head.options import LogitTransform

    kernels = engine("head", backend)
    transforms = (LogitTransform(), LogitTransform(scale=0.7, softcap=5.0, temperature=1.3))

    def check(dtype: torch.dtype, out: torch.dtype, vocab: int, gap: int, offset: int, full: bool) -> None:
        """``full``: bias, softcap, scale, temperature and entropy, or none of them."""
        logits, buffer = make_chunk(5, vocab, dtype, device, gap, offset)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        targets = torch.tensor([0, vocab - 1, vocab // 2, 0, vocab - 1], device=device)
        bias = torch.randn(vocab, dtype=acc).to(device) if full else None
        g, h = torch.randn(2, 5, dtype=acc).to(device)
        g[3] = h[3] = 0.0
        rest = (targets, bias, transforms[full])
        exact = torch.empty(4, 5, dtype=torch.float64, device=device)
        wide = None if bias is None else bias.double()
        reference.row_statistics(logits.double(), targets, wide, transforms[full], exact, True)
        stats = torch.empty(4, 5, dtype=acc, device=device)
        kernels.row_statistics(logits, *rest, stats, full)
        written = 4 if full else 3
        torch.testing.assert_close(stats[:written].double(), exact[:written], **tolerance(acc))
        entropy = (h, h.double()) if full else (None, None)
        want = reference.dlogits_(logits.double(), targets, wide, transforms[full], exact, g.double(), entropy[1],
                                  torch.float64)  # fmt: skip
        got = kernels.dlogits_(logits, *rest, stats, g, entropy[0], out)
        torch.testing.assert_close(got.double(), want, **tolerance(out))
        assert bool((got[3] == 0).all())
        if out == dtype:
            assert_gaps_untouched(logits, buffer)

    for dtype in DTYPES:
        if backend == "cpu" and dtype == torch.float16:
            continue  # a CPU's engine computes fp16 in fp32
        for vocab, gap, offset, full in ((1037, 3, 1, True), (1037, 3, 1, False), (1040, 0, 0, False), (7, 1, 0, True)):
            name = f"rows {dtype}, V={vocab}, {gap=}, {offset=}, {full=}"
            yield name, lambda d=dtype, *, a=(vocab, gap, offset, full): check(d, d, *a)
    if backend != "cpu":
        for narrow in (torch.bfloat16, torch.float16):
            name = f"rows fp32 with a gradient in {narrow}"
            yield name, lambda narrow=narrow: check(torch.float32, narrow, 1037, 3, 0, True)


# ------------------------------------------------------------------------------------------------ segments


def bound_checks(backend: str, device: str) -> Iterator[Check]:
    """Segment sums with empty and long segments, the bound with and without its options, and both within dlogits."""
    from fused_bound import CLIPPED, OPEN, assert_right, make_case

    from bgpo_kernels.backends import engine
    from bgpo_kernels.bound import reference
    from bgpo_kernels.head.options import LogitTransform

    kernels = engine("bound", backend)

    def check_sums(dtype: torch.dtype) -> None:
        sizes = torch.tensor([0, 1, 31, 33, 0, 1000, 5])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        values, weight = torch.randn(int(offsets[-1]), dtype=dtype), torch.rand(len(sizes))
        want = reference.segment_sum(values, offsets, weight)
        got = kernels.segment_sum(*(x.to(device) for x in (values, offsets, weight)))
        torch.testing.assert_close(got.cpu(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-13)

    def check_bound(dtype: torch.dtype, old: bool) -> None:
        logprob = torch.randn(301, 3, dtype=dtype) * 2
        before = logprob + torch.randn(301, 3, dtype=dtype) if old else None
        advantages, length = torch.randn(301), torch.randint(1, 5, (301,)).float()
        advantages[0] = 0.0
        arguments = (logprob, advantages, before, length if old else None)
        want = reference.bound(*arguments, *CLIPPED)
        got = kernels.bound(*(None if x is None else x.to(device) for x in arguments), *CLIPPED)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)

    def check_fused(old: bool, dtype: torch.dtype, out: torch.dtype) -> None:
        vocab = 41 if device == "cpu" else 1037  # the interpreter takes its time
        case = make_case(vocab, old, CLIPPED if old else OPEN, LogitTransform(softcap=5.0, temperature=0.9))
        got = case.run(engine("head", backend), backend, dtype, out, device)
        if dtype.itemsize == 2:  # the reference's logits must be the rounded ones, too
            case = case._replace(logits=case.logits.to(dtype).double())
        assert_right(got, case)

    for dtype in (torch.float32, torch.float64):
        yield f"segment sums {dtype}", lambda dtype=dtype: check_sums(dtype)
        for old in (False, True):
            yield f"bound {dtype}, {old=}", lambda dtype=dtype, old=old: check_bound(dtype, old)
    pairs = [(d, d) for d in DTYPES if d != torch.float16]
    pairs += [] if backend == "cpu" else [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    for dtype, out in pairs:
        for old in (False, True):
            name = f"bound within dlogits, {dtype} to {out}, {old=}"
            yield name, lambda a=(old, dtype, out): check_fused(*a)


def main() -> int:
    """Runs all checks and counts what is wrong."""
    given = options()
    if given.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from bgpo_kernels.backends import why_not

    wrong, done, begin = [], 0, time.monotonic()
    for wanted in given.backend or ("cuda", "triton"):
        backend = "cpu" if (wanted, given.device) == ("cuda", "cpu") else wanted
        if (reason := why_not(backend, torch.device(given.device))) is not None:
            wrong.append(f"{backend}: {reason}")
            continue
        for name, check in checks(backend, given.device):
            torch.manual_seed(done)
            try:
                check()
            except AssertionError as error:
                wrong.append(f"{backend} {name}: {error}")
            done += 1
            print(f"{time.monotonic() - begin:6.1f} s  {backend:7}{name}", flush=True)
    print(*wrong, f"{done} checks, {len(wrong)} wrong", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
