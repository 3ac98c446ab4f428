"""What a recipe would take at the least, looked at before anything is loaded or made.

The sums are lower bounds: a recipe that they refuse has no room on any way, one that they let pass may still be too
large for a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triewise.arrays import check_memory

if TYPE_CHECKING:
    from triewise.recipe import Recipe

NUMBER = 4  # bytes of a weight or activation
TRAINED = 4 * NUMBER  # of a weight that is trained: itself, its gradient, two moments of the optimiser


def check_sizes(recipe: Recipe, n_items: int) -> None:
    """Refuse a recipe that takes more memory than there is.

    Args:
        recipe: The recipe.
        n_items: Items of the catalogue.

    Raises:
        UserError: The line names the keys and says how much they would take.
    """
    training, tiny, sequential = recipe.training, recipe.backbone.tiny, recipe.sequential
    steps, batch = training.steps, training.batch_size
    check_memory(
        8.0 * steps * batch, f"the order of training.steps = {steps} times training.batch_size = {batch}"
    )
    rows = batch / training.accumulation
    if sequential is not None:
        width, each = sequential.width, sequential.blocks * sequential.width**2
        table = (n_items + recipe.data.max_history) * width
        check_memory(
            TRAINED * (table + each),
            f"training an encoder of sequential.width = {width}, blocks = {sequential.blocks} and data.max_history = "
            f"{recipe.data.max_history}",
        )
        drawn = (
            sequential.negatives if sequential.loss in ("bce", "mse", "bpr") or sequential.dros_alpha else 0
        )
        check_memory(
            NUMBER * rows * width * (sequential.blocks + drawn),
            f"a batch of {batch} rows with sequential.negatives = {sequential.negatives}",
        )
        return
    width = 8
    if recipe.backbone.name == "tiny":
        width = tiny.width
        layer = 4 * width**2 + 3 * width * tiny.feed_forward
        check_memory(
            TRAINED * (tiny.vocabulary * width + tiny.layers * layer),
            f"training backbone.tiny with width = {width}, layers = {tiny.layers}, feed_forward = {tiny.feed_forward}",
        )
    check_memory(NUMBER * rows * width, f"a micro-batch of {rows:.0f} rows")
