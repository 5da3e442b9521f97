"""Cells with replies made by hand."""

import numpy as np
from starkv_lab.quality.cells import Cell
from starkv_lab.quality.design import COLUMNS
from starkv_lab.quality.variants import VARIANTS


def cell(design, variant="paper", budget=0.2, right=True, same=True):
    """A cell whose `right` is one value, or an array that broadcasts to all questions."""
    shape = (design.prompts, len(COLUMNS))
    return Cell(
        variant=variant,
        budget=budget,
        options=VARIANTS[variant].config(budget).describe(),
        right=np.broadcast_to(right, shape).astype(bool),
        same=np.broadcast_to(same, shape).astype(bool),
        kl={"reply": 0.1, "again": 0.2, "other": 0.3},
        recall=0.5,
        nbytes=round(1000 * budget),
        full_nbytes=1000,
        seconds=1.5,
    )
