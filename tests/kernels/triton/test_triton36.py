"""The gates that Triton 3.6 has to pass as well as this version, which is the oldest that the library supports."""

import pytest
import test_gate
import test_hopper_gate
import test_launch_gate
from compile_only import on_triton36

pytestmark = pytest.mark.gate


def ids(module, *tests):
    return [f"{module.__file__}::{test}" for test in tests]


def hopper(half):
    return [f"test_heuristic_configurations_of_resnet50[{c}-{half}]" for c in test_hopper_gate.HOPPER]


OTHERS = (
    "test_what_batch_32_chooses_otherwise_for_a_residual",
    "test_stem_in_the_callers_order_and_type[nchw-]",
    "test_stem_in_the_callers_order_and_type[nchw-uint8]",
)
LAUNCHES = [
    *(
        f"what_the_candidate_bound[{name}]"
        for name in (*test_launch_gate.PROBLEMS, *test_launch_gate.NETWORK)
    ),
    *(f"what_a_portable_candidate_bound[{name}]" for name in (*test_launch_gate.PORTABLE, "stem_pool")),
    "the_training_primitives_arguments",
]
# In few processes: starting one takes as long as compiling several kernels.
PIECES = {
    "hopper": ids(test_hopper_gate, *hopper(0)),
    "hopper, stem, batch 32": ids(test_hopper_gate, *hopper(1), *OTHERS),
    "launches and conv_stats": ids(
        test_launch_gate,
        *(f"test_the_driver_gets_{what}" for what in LAUNCHES),
        "test_a_map_that_the_driver_refuses_is_an_error",
    )
    + ids(test_gate, *(f"test_conv_stats[{capability}]" for capability in (80, 90, 100))),
}


@pytest.mark.parametrize("piece", PIECES)
def test_the_same_on_triton_3_6(piece):
    on_triton36(PIECES[piece])
