"""The flops of the matrix products in a traced program."""

from typing import Any

import jax.extend
import numpy as np


def product_flops(jaxpr: Any) -> float:
    """Return the flops of all products; those in a scan count once for each iteration."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * np.prod([shape[dim] for dim in contracted])
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(product_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total
