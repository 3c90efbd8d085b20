"""Program of a rank of the fault tests: causes the named fault on rank 1 during training.

python faults.py FAULT DATA_DIR OUTPUT_DIR
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_run import rank_values

from training.__main__ import main as run_rank
from training.distributed import rank
from training.objectives.base import LossTerms
from training.objectives.sft import SupervisedFineTuning
from training.objectives.shifcon import ShifCon
from training.run_file import validate

FAULTY_RANK, FAULTY_CALL = 1, 5


def skip_a_module(init):
    def build(self, model, *arguments):
        init(self, model, *arguments)
        if rank() == FAULTY_RANK:
            model.model.layers[1].mlp.act_fn = None  # no longer a module
            model.model.layers[1].mlp.__dict__["act_fn"] = torch.nn.functional.silu

    return build


def corrupt(loss_terms, where: str):
    calls = 0

    def corrupted(self, engine, batch) -> LossTerms:
        nonlocal calls
        terms = loss_terms(self, engine, batch)
        calls += torch.is_grad_enabled()
        if rank() == FAULTY_RANK and calls == FAULTY_CALL:
            if where == "loss":
                sft = terms.terms["sft"]
                return replace(terms, terms={**terms.terms, "sft": replace(sft, sum=sft.sum + float("inf"))})
            if where == "gradient":
                terms.terms["sft"].sum.register_hook(lambda gradient: gradient * float("inf"))
        return terms

    return corrupted


def main() -> int:
    fault, data_dir, output_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    import training.__main__ as entry

    changes = {"max_steps": 8, "checkpoint.every": 100}
    entry.load_config = lambda *_: validate(rank_values(data_dir, output_dir, **changes), "test")
    if fault == "module":
        SupervisedFineTuning.__init__ = skip_a_module(SupervisedFineTuning.__init__)
    else:
        ShifCon.loss_terms = corrupt(ShifCon.loss_terms, fault)
    return run_rank(["unused.yaml"])


if __name__ == "__main__":
    import os

    status = main()
    sys.stderr.flush()
    os._exit(status)
