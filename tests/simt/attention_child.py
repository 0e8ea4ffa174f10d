"""Runs saved masked_attention calls on a sanitized library; started by
test_masked_attention_simt.py, imports no torch.

python tests/simt/attention_child.py LIBRARY CASES.npz      (arrays named <case>/<argument>, results
<case>/expected_<name>, and <case>/tolerance: rtol, atol)
"""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import cycle

import numpy as np

from tests.simt.attention_abi import open_attention, run, values
from tests.simt.build import ORDERS, configure


def main(path: str, cases: str) -> None:
    """Each case in the next thread order; the results must be those of the plain library, up to
    rounding: its compiler fuses other operations."""
    library = open_attention(path)
    inputs: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(cases) as saved:
        for name in saved.files:
            case, argument = name.split("/")
            inputs[case][argument] = saved[name]
    for (case, arguments), order in zip(inputs.items(), cycle(ORDERS)):
        expected = {
            n: arguments.pop(f"expected_{n}")
            for n in ("out", "lse", "grad_query", "grad_key", "grad_value")
        }
        dtype = str(arguments["dtype"])
        tolerance = dict(zip(("rtol", "atol"), arguments.pop("tolerance")))
        configure(library, order, seed=3)
        for name, result in run(library, arguments, misaligned=order == "reverse").items():
            actual, wanted = values(result, dtype), values(expected[name], dtype)
            np.testing.assert_allclose(
                actual, wanted, **tolerance, err_msg=f"{case} {name} {order}"
            )
    print("all right")


if __name__ == "__main__":
    main(*sys.argv[1:])
