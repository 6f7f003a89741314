"""What test_spread.py runs in each process: accelerate spreads a model though there is no GPU.

It does so for processes of GPUs only, and asks for no more than their name. FSDP and DeepSpeed
themselves work on a CPU.
"""

import os

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from speed_utils import contrastive, dpo, sft, training
from speed_utils.launch import call


def call_spread(function: str, arguments: dict, stop_at: int | None = None) -> None:
    """Call "module:function", with a checkpoint every two steps; fail at a step if asked to.

    Checks that the model was spread.
    """
    kind = "DEEPSPEED" if "ACCELERATE_USE_DEEPSPEED" in os.environ else "FSDP"
    (_as_deepspeed if kind == "DEEPSPEED" else _as_gpus)()
    on_step_end = training.ProgressBar.on_step_end

    def stop(self, args, state, control, **named):
        on_step_end(self, args, state, control, **named)
        if state.global_step == stop_at:
            raise RuntimeError(f"stopped at step {stop_at}")

    training.ProgressBar.on_step_end = stop
    training.CHECKPOINT_EVERY_STEPS = contrastive.CHECKPOINT_EVERY_STEPS = 2
    call(function, arguments)
    assert AcceleratorState().distributed_type == kind, "the model was not spread"


def _as_gpus() -> None:
    """Processes of a CPU are taken for those of GPUs."""
    begin = PartialState.__init__

    def begin_as_gpus(self, *positional, **named):
        begin(self, *positional, **named)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus


def _as_deepspeed() -> None:
    """Nobody says that the CPU is wanted; the processes take it nevertheless."""
    os.environ.pop("ACCELERATE_USE_CPU")
    begin, common_arguments = PartialState.__init__, training.common_arguments

    def begin_on_cpu(self, *_positional, **_named):
        begin(self, True)

    def not_on_cpu(*positional):
        return common_arguments(*positional) | {"use_cpu": False}

    PartialState.__init__ = begin_on_cpu
    sft.common_arguments = dpo.common_arguments = not_on_cpu
