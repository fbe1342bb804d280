"""The stand-in for graphs does again what was done, with the numbers of the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from engine.graph_capture import CaptureError, Tape, Work


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Steps run so."""
    with torch.inference_mode():
        yield


def test_a_replay_reads_what_lies_there_now_and_writes_where_it_wrote() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def work() -> torch.Tensor:
        out = torch.empty_like(x)
        out[:2] = x[2:] * 2
        out[2:].copy_(x[:2]).add_(1)
        return out

    replay = Tape().capture(work)
    first = replay()
    assert first.tolist() == [6.0, 8.0, 2.0, 3.0]
    x.copy_(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    assert replay().data_ptr() == first.data_ptr()
    assert first.tolist() == [14.0, 16.0, 6.0, 7.0]


def test_numbers_stay_those_of_the_capture() -> None:
    numbers, x = [2], torch.ones(3)
    replay = Tape().capture(lambda: x * numbers[0] + torch.arange(numbers[0] + 1))
    numbers[0] = 5
    assert replay().tolist() == [2.0, 3.0, 4.0]


def test_what_nobody_writes_is_no_number() -> None:
    replay = Tape().capture(lambda: torch.empty(3).view(3, 1))
    assert replay().isnan().all()


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_can_not_be_captured(read: str) -> None:
    x = torch.ones(3)

    def work() -> torch.Tensor:
        READS[read](x)
        return x

    with pytest.raises(CaptureError, match="reads what the device has computed"):
        Tape().capture(work)


def test_a_list_of_numbers_is_frozen() -> None:
    """No operation tells of `tolist`: what comes of it shows as stale numbers, which tests of ids find."""
    x = torch.tensor([1, 2])
    work: Work = lambda: torch.full((2,), sum(x.tolist()))  # noqa: E731
    replay = Tape().capture(work)
    x.fill_(9)
    assert replay().tolist() == [3, 3]
