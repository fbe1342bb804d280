"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds input after input and lets the later ones make up for the error.

Two things go beyond the paper and cost nothing when the model runs. Scales are searched for the smallest loss instead
of taken from the largest weight. Without act-order, whole groups are rounded in the order of their importance, and the
inputs within a group too. That order is not seen in the file, whose groups stay plain.
"""

from __future__ import annotations

import torch

from quant.base import FormatError
from quant.rounding import RoundedMatrix, plain_groups, round_symmetric

BLOCK = 128
"""Inputs whose errors are brought to all later inputs together (the paper's lazy batch update)."""
DAMPING_TRIES = 5
"""Tries to damp a Gram matrix that stays singular, each with ten times as much as the one before."""


def solve(
    weight: torch.Tensor, gram: torch.Tensor, *, bits: int, group_size: int, percdamp: float, is_act_order: bool
) -> RoundedMatrix:
    """Round weight [n, k] float32 to symmetric groups with little loss of outputs, by the Gram matrix of its inputs.

    `gram` is [k, k]; the part `percdamp` of its mean diagonal is added to the diagonal. Raises FormatError for inputs
    that are no numbers.
    """
    num_inputs = weight.shape[1]
    size = num_inputs if group_size == -1 else group_size
    diagonal = gram.diagonal()
    if not diagonal.isfinite().all():
        raise FormatError(
            "has inputs that are not finite on this dataset: the model itself computes NaN, fetch it again"
        )
    order = _order(diagonal, size, is_act_order)
    is_dead = diagonal[order] == 0  # inputs that are always 0: their weights don't matter
    factor = _error_factor(gram[order[:, None], order], is_dead, percdamp)
    columns = weight[:, order].T.contiguous()  # [k, n]: an input's weights lie side by side
    columns[is_dead] = 0
    q, scales = _round_in_order(columns, factor, bits, size)
    # Back to the order of the inputs. A group's number is its turn under act-order, else its place.
    inverse = torch.argsort(order)
    if is_act_order:
        group_of_input = plain_groups(num_inputs, group_size).to(weight.device)[inverse]
    else:
        group_of_input = plain_groups(num_inputs, group_size).to(weight.device)
        scales = scales[torch.argsort(order[::size] // size)]
    zero_points = torch.full(scales.T.shape, 2 ** (bits - 1), dtype=torch.int32, device=weight.device)
    return RoundedMatrix(bits, q[inverse].T.contiguous(), scales.T.contiguous(), zero_points, group_of_input)


def _order(diagonal: torch.Tensor, size: int, is_act_order: bool) -> torch.Tensor:
    """The order [k] in which inputs are rounded: the largest first, while the later ones can still make up for them."""
    if is_act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.reshape(-1, size)
    turn = torch.argsort(groups.mean(dim=1), descending=True, stable=True)
    within = torch.argsort(groups, dim=1, descending=True, stable=True)
    starts = torch.arange(0, len(diagonal), size, device=diagonal.device)
    return (starts[:, None] + within)[turn].flatten()


def _error_factor(gram: torch.Tensor, is_dead: torch.Tensor, percdamp: float) -> torch.Tensor:
    """The upper triangular U with U^T U = (gram + damping)^-1, [k, k].

    One factorization of the reversed matrix gives gram = R R^T with R upper triangular, and so U = R^-1.
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[is_dead] = 1
    damping = percdamp * float(diagonal.mean())
    for attempt in range(DAMPING_TRIES):
        diagonal += damping * (1 if attempt == 0 else 9 * 10 ** (attempt - 1))
        lower, info = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if int(info) == 0:
            upper = lower.flip(0, 1)
            del lower
            factor: torch.Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(gram)).to(gram), upper=True)
            return factor
    raise FormatError(f"can't be solved with --percdamp {percdamp:g}: give a larger one, or more samples")


def _round_in_order(
    columns: torch.Tensor, factor: torch.Tensor, bits: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round columns [k, n], which change on the way, to q [k, n] uint8 and scales [groups, n] float16.

    Rounding input i with error e changes each later input j by -e * U[i, j] / U[i, i]. The loss of that is
    (e / U[i, i])^2, so a group's scale is searched by it.
    """
    num_inputs, num_outputs = columns.shape
    half = 2 ** (bits - 1)
    q = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    scales = torch.empty(num_inputs // size, num_outputs, dtype=torch.float16, device=columns.device)
    pivots = factor.diagonal().clone()
    importance = pivots.square().reciprocal()
    # A group that begins within a block must end within it: its scale is searched on weights that are up to date.
    block = size * max(1, BLOCK // size) if size < num_inputs else BLOCK
    scale = torch.empty(0)
    for first in range(0, num_inputs, block):
        last = min(first + block, num_inputs)
        errors = torch.empty(last - first, num_outputs, device=columns.device)
        for index in range(first, last):
            if index % size == 0:
                group = slice(index, index + size)
                scale = round_symmetric(columns[group].T, importance[group], bits)
                scales[index // size] = scale.to(torch.float16)
            value = columns[index]
            rounded = (value / scale).round_().clamp_(-half, half - 1)
            q[index] = rounded + half
            error = (value - rounded * scale) / pivots[index]
            columns[index + 1 : last].addr_(factor[index, index + 1 : last], error, alpha=-1)
            errors[index - first] = error
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return q, scales
