"""The switch for checks that read values: on by default, off for a body or a thread, and one read for a whole call."""

from __future__ import annotations

import threading

import pytest
import torch
from host_reads import forbid_host_reads

import bgpo_kernels as bk

LOGPROB, ADVANTAGES = torch.randn(2, 3), torch.tensor([1.0, torch.nan])


def refused() -> bool:
    try:
        bk.bgpo_loss(LOGPROB, ADVANTAGES)
    except ValueError as error:
        assert "advantages holds non-finite values, first at [[1]]: [nan]" in str(error)
        return True
    return False


def test_for_a_body() -> None:
    assert refused()
    with bk.check_values(False):
        assert not refused()
        with bk.check_values(True):
            assert refused()
        assert not refused()
    assert refused()


def test_as_a_statement_and_for_this_thread_alone() -> None:
    elsewhere: list[bool] = []
    try:
        bk.check_values(False)
        assert not refused()
        thread = threading.Thread(target=lambda: elsewhere.append(refused()))
        thread.start()
        thread.join()
    finally:
        bk.check_values(True)
    assert elsewhere == [True] and refused()


def test_an_error_leaves_the_setting_as_it_was() -> None:
    with pytest.raises(KeyError), bk.check_values(False):
        raise KeyError
    assert refused()


def test_shapes_and_types_are_checked_all_the_same() -> None:
    with bk.check_values(False), forbid_host_reads():
        with pytest.raises(ValueError, match="advantages"):
            bk.bgpo_loss(LOGPROB, torch.ones(3))
        with pytest.raises(TypeError, match="advantages"):
            bk.bgpo_loss(LOGPROB, torch.ones(2, dtype=torch.int64))


def test_one_read_for_all_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages, old log-probabilities and lengths; rows and targets."""
    reads: list[int] = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.numel()), real(self))[1])
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a second read"))
    bk.bgpo_loss(LOGPROB, torch.ones(2), old_logprob=LOGPROB, length=torch.ones(2))
    assert reads == [4]
    reads.clear()
    bk.masked_logprob(torch.randn(5, 4), torch.randn(7, 4), torch.tensor([1, 6]), rows=torch.tensor([0, 4]))
    assert reads == [2]
