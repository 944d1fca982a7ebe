"""Traces a method's first calls with a stand-in driver, compiles some of their kernels in threads, and prints what came of it.

python ahead_run.py METHOD [NAME=VALUE ...]
"""

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
import yaml
from triton.runtime import driver
from triton_aot import StandInDriver

from svg.attend import attend_uncompiled
from svg.config import config_from_dict
from svg.engine import first_calls
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.kernels import block_sparse, block_sparse_quantised
from svg.kernels.common import ahead, target
from svg.methods.video_order import video_order

LAYOUT = TokenLayout(5, 16, 20, text_tokens=32, text_position="last")
QUICK = ("_chain_kernel", "_density_kernel")  # to compile


def main():
    driver.set_active(StandInDriver(90))
    target.use_triton = lambda x: True
    target.arch = lambda device: 90
    for op in (block_sparse.op, block_sparse_quantised.op):  # what tensors hold is checked on a CPU alone
        op.check = lambda *arguments: None
    settings = dict(pair.split("=", 1) for pair in sys.argv[2:])
    config = config_from_dict(
        {"method": sys.argv[1], **{name: yaml.safe_load(text) for name, text in settings.items()}}
    )
    state = RunState(config, 3)
    state.begin_forward(0, 10, "cond", LAYOUT)
    q = torch.zeros(1, LAYOUT.total_tokens, 2, 64, dtype=torch.bfloat16)
    mask = torch.ones(1, LAYOUT.text_tokens, dtype=torch.bool)
    launches = ahead.launches_of(lambda: first_calls._trace(state, q, q, q, mask, attend_uncompiled))
    quick = [launch for launch in launches if launch.kernel.fn.__name__ in QUICK]
    compiled = []
    triton.knobs.compilation.listener = lambda **found: compiled.append(threading.current_thread().name)
    first_calls.finish(ahead.compile_together(quick, torch.device("cpu")))
    threads, compiled[:] = sorted({name.rpartition("_")[0] for name in compiled}), []
    for launch in quick:  # as the call that launches them does
        launch.compile(torch.device("cpu"))
    found = {
        "kernels": sorted(launch.kernel.fn.__name__ for launch in launches),
        "quick": len(quick),
        "threads": threads,
        "compiled again": len(compiled),
        "records": len(state.records),
        "order is real": type(video_order(LAYOUT, "hilbert")) is torch.Tensor,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
