"""What test_spread.py runs in each process: accelerate spreads a model though there is no GPU.

It does so for processes of GPUs only, and asks for no more than their name. torch's own FSDP works
on a CPU.
"""

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from speed_utils import contrastive, training
from speed_utils.launch import call


def call_spread(function: str, arguments: dict, stop_at: int | None = None) -> None:
    """Call "module:function", with a checkpoint every two steps; fail at a step if asked to.

    Checks that the model was spread.
    """
    begin, on_step_end = PartialState.__init__, training.ProgressBar.on_step_end

    def begin_as_gpus(self, *positional, **named):
        begin(self, *positional, **named)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def stop(self, args, state, control, **named):
        on_step_end(self, args, state, control, **named)
        if state.global_step == stop_at:
            raise RuntimeError(f"stopped at step {stop_at}")

    PartialState.__init__ = begin_as_gpus
    training.ProgressBar.on_step_end = stop
    training.CHECKPOINT_EVERY_STEPS = contrastive.CHECKPOINT_EVERY_STEPS = 2
    call(function, arguments)
    assert AcceleratorState().distributed_type == DistributedType.FSDP, "the model was not spread"
