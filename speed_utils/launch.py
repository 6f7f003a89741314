"""Training in several processes: accelerate starts them, this module is what they run.

A notebook calls launch() and waits; each process calls the same function with the same arguments.

    SPEED_ACCELERATE=data/accelerate/two_processes.yaml      (or: run --accelerate FILE)
    launch("speed_utils.contrastive:train_here", arguments, out_dir)

The file is one that `accelerate config` writes (torch.compile is one of its settings, too);
data/accelerate has some to start from. Where the variable is not set, all stays in one process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from speed_utils.records import write_text

CONFIG_VARIABLE = "SPEED_ACCELERATE"
SPREADING = ("FSDP", "DEEPSPEED")  # accelerate's types that spread the weights of a model
CAUSE = "training process failed: "  # begins the line by which a process tells why


class LaunchError(RuntimeError):
    """The processes could not be started, or one of them failed."""


def n_processes() -> int:
    """How many processes train together; 1 outside of accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch(function: str, arguments: dict, out_dir: Path) -> None:
    """Call a function here, or in all processes of the accelerate config, and wait for them.

    Without a GPU the processes compute on the CPU and talk over gloo.

    Args:
        function: "module:function".
        arguments: of the call; what JSON can hold.
        out_dir: where the arguments are left for the processes.

    Raises:
        LaunchError: there is no such file, it is for GPUs and there are none, or a process failed,
            and why.
    """
    config_path = os.environ.get(CONFIG_VARIABLE)
    if not config_path:
        call(function, arguments)
        return
    import torch

    if not Path(config_path).is_file():
        raise LaunchError(f"the accelerate config {config_path} is not there; see data/accelerate")
    if not torch.cuda.is_available():
        _assert_for_cpu(config_path)
    job_path = out_dir / "job.json"
    write_text(job_path, json.dumps({"function": function, "arguments": arguments}))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(Path(config_path).resolve()), "--main_process_port", "0"),
        *("-m", "speed_utils.launch", str(job_path)),
    ]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // 2)))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    cause = "its last lines are above"
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(CAUSE):
                cause = line.removeprefix(CAUSE).strip()
        process.wait()
    finally:
        process.terminate()  # when interrupted; the launcher ends its processes
    if process.returncode:
        raise LaunchError(f"a process of the training ended with {process.returncode}: {cause}")


def _assert_for_cpu(config_path: str) -> None:
    """Accelerate would fall back to whole copies of the model, and say nothing."""
    import yaml

    kind = yaml.safe_load(Path(config_path).read_text()).get("distributed_type")
    if kind in SPREADING:
        raise LaunchError(
            f"{config_path} ({kind}) needs GPUs: accelerate spreads a model over them only; "
            "without one, take data/accelerate/two_processes.yaml"
        )


def call(function: str, arguments: dict) -> None:
    """Call "module:function"."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(**arguments)


def main(job_path: str) -> None:
    """Call the function of a job, in one process of several."""
    job = json.loads(Path(job_path).read_text(encoding="utf8"))
    try:
        call(job["function"], job["arguments"])
    except Exception as error:
        print(f"\n{CAUSE}{type(error).__name__}: {error}", flush=True)
        raise


if __name__ == "__main__":
    main(sys.argv[1])
