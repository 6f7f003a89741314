"""Generation with vllm against bare vllm, the transformers engine, and distilabel; one machine.

python tests/benchmarks/generation.py [--prompts 96] [--adapter DIR] [--distilabel-python PATH]

All write examples for the same recorded prompts with the same model (the base, with the LoRA
adapter of --adapter merged in) and sampling; loading and a small first batch are not timed. vllm
must be installed (make setup-vllm); distilabel runs in an environment of its own:
pip install "distilabel[hf-transformers]==1.5.3" "transformers<5" torch==2.13.0.

Prints one JSON object: ratio_to_bare_vllm (tokens per second of store, engine and parsing over
those of LLM.generate), ratio_vllm_to_transformers and ratio_to_distilabel (valid examples per
minute), constrained_validity (of answers that were not cut), constraint_overhead (share of the
tokens per second lost to the schema), and what they are made of.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

from speed_utils.generation import generate  # noqa: E402
from speed_utils.models import render_chat, resolve_model  # noqa: E402
from speed_utils.parsing import has_valid_json  # noqa: E402
from speed_utils.prompts import sample_slots  # noqa: E402
from speed_utils.records import Prompted  # noqa: E402
from speed_utils.synthesis import example_requests  # noqa: E402

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPERATURE = 0.6
DOCUMENT_WORDS_MAX = 50
SEQUENCES = 64
WARM = 4  # requests before the clock starts
ORDER = ("bare", "engine", "engine", "bare")  # a drift of the machine falls on both alike
PARTS = ("vllm", "vllm_free", "transformers")


def main() -> None:
    """Run each part in a process of its own and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--adapter", type=Path, help="LoRA adapter, as 04 or 06 leave it")
    parser.add_argument("--distilabel-python", help="python of an environment with distilabel")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(globals()[f"_{options.part}"](options.model, options.prompts)))
        return
    with tempfile.TemporaryDirectory() as name:
        model = _merged(options.adapter, Path(name))
        parts = {part: _part(part, model, options.prompts) for part in PARTS}
        parts["bare"] = parts["vllm"].pop("bare")
        if options.distilabel_python:
            parts["distilabel"] = _distilabel(options.distilabel_python, model, options.prompts)
    speed = {name: part["tokens"] / part["seconds"] for name, part in parts.items()}
    valid = {name: 60 * part["valid"] / part["seconds"] for name, part in parts.items()}
    peer = valid.get("distilabel")
    result = {
        "prompts": options.prompts,
        "ratio_to_bare_vllm": round(speed["vllm"] / speed["bare"], 3),
        "ratio_vllm_to_transformers": round(valid["vllm"] / valid["transformers"], 2),
        "ratio_to_distilabel": round(valid["vllm"] / peer, 1) if peer else None,
        "constrained_validity": parts["vllm"]["valid"] / max(1, parts["vllm"]["whole"]),
        "constraint_overhead": round(1 - speed["vllm"] / speed["vllm_free"], 3),
        "tokens_per_second": {name: round(value) for name, value in speed.items()},
        "valid_per_minute": {name: round(value, 1) for name, value in valid.items()},
        "parts": parts,
    }
    print(json.dumps(result))


def _merged(adapter: Path | None, folder: Path) -> str:
    """A folder with the model that all parts load."""
    base = resolve_model(BASE)
    if adapter is None:
        return str(base)
    from speed_utils.engine_vllm import merge_adapter

    merge_adapter(base, adapter, str(folder))
    return str(folder)


def _part(part: str, model: str, n_prompts: int) -> dict:
    command = [sys.executable, __file__, "--part", part, "--model", model]
    result = _last_line([*command, "--prompts", str(n_prompts)])
    print(part, result, file=sys.stderr, flush=True)
    return result


def _distilabel(python: str, model: str, n_prompts: int) -> dict:
    prompts = _prompts(n_prompts)
    tasks = [{"kind": prompt.kind, "task": prompt.task} for prompt in prompts]
    limits = [request.max_tokens for request in _requests(prompts, is_constrained=True)]
    script = str(Path(__file__).with_name("distilabel_peer.py"))
    with tempfile.TemporaryDirectory() as name:
        older = shutil.copytree(model, Path(name) / "model")
        path = older / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config))  # transformers 4 does not know the class of 5
        body = json.dumps({"model": str(older), "tasks": tasks, "max_tokens": max(limits)})
        return _last_line([python, script], body)


def _last_line(command: list[str], body: str | None = None) -> dict:
    done = subprocess.run(command, input=body, stdout=subprocess.PIPE, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _prompts(n_prompts: int) -> list[Prompted]:
    """Recorded tasks with slots of their own; no STS, since distilabel's takes no topic."""
    rows = map(json.loads, (ROOT_DIR / "data" / "teacher" / "seed.jsonl").open())
    return [
        Prompted(
            id=row["id"],
            kind=row["kind"],
            topic=row["topic"],
            task=row["task"],
            slots=sample_slots(row["kind"], row["id"], DOCUMENT_WORDS_MAX),
        )
        for row in sorted(rows, key=lambda row: row["id"])
        if row["kind"] != "sts"
    ][:n_prompts]


def _requests(prompts: list[Prompted], *, is_constrained: bool) -> list:
    return example_requests(
        prompts, seed=42, temperature=TEMPERATURE, is_constrained=is_constrained
    )


def _vllm(model: str, n_prompts: int) -> dict:
    """Engine and bare generate over one loaded model, in turn; the cache is emptied each time."""
    from speed_utils import engine_vllm

    engine = engine_vllm.VllmEngine(model, batch_size=SEQUENCES)
    turns = {"bare": [], "engine": []}
    _bare(engine.llm, n_prompts)  # the first pass over new shapes is slow for either
    for name in ORDER:
        engine.llm.reset_prefix_cache()
        if name == "bare":
            turns[name].append(_bare(engine.llm, n_prompts))
        else:
            turns[name].append(_engine(engine, n_prompts, is_constrained=True))
    total = {
        name: {key: round(sum(turn[key] for turn in own), 2) for key in own[0]}
        for name, own in turns.items()
    }
    return {**total["engine"], "bare": total["bare"]}


def _bare(llm, n_prompts: int) -> dict:
    """What ``vllm.LLM.generate`` does with the same prompts and sampling."""
    from speed_utils.engine_vllm import sampling_of

    prompts = _prompts(n_prompts)
    requests = _requests(prompts, is_constrained=True)
    texts = [render_chat(llm.get_tokenizer(), request.messages) for request in requests]
    sampling = [sampling_of(request) for request in requests]
    llm.generate(texts[:WARM], sampling[:WARM], use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(texts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    answers = [output.outputs[0] for output in outputs]
    return _counted(
        seconds, prompts, [(a.text, a.finish_reason, len(a.token_ids)) for a in answers]
    )


def _vllm_free(model: str, n_prompts: int) -> dict:
    from speed_utils.engine_vllm import VllmEngine

    return _engine(VllmEngine(model, batch_size=SEQUENCES), n_prompts, is_constrained=False)


def _transformers(model: str, n_prompts: int) -> dict:
    from speed_utils.engine_transformers import TransformersEngine

    return _engine(TransformersEngine(model, batch_size=SEQUENCES), n_prompts, is_constrained=True)


def _engine(engine, n_prompts: int, *, is_constrained: bool) -> dict:
    prompts = _prompts(n_prompts)
    requests = _requests(prompts, is_constrained=is_constrained)
    with tempfile.TemporaryDirectory() as name:
        generate(requests[:WARM], engine, Path(name) / "warm.jsonl")
        started = time.perf_counter()
        answers = generate(requests, engine, Path(name) / "store.jsonl")
        seconds = time.perf_counter() - started
    return _counted(
        seconds, prompts, [(a.text, a.finish_reason, a.completion_tokens) for a in answers]
    )


def _counted(seconds: float, prompts: list[Prompted], answers: list[tuple[str, str, int]]) -> dict:
    whole = [(text, p) for (text, why, _), p in zip(answers, prompts, strict=True) if why == "stop"]
    return {
        "seconds": round(seconds, 2),
        "tokens": sum(n for *_, n in answers),
        "answers": len(answers),
        "whole": len(whole),
        "valid": sum(has_valid_json(text, prompt.kind) for text, prompt in whole),
    }


if __name__ == "__main__":
    main()
