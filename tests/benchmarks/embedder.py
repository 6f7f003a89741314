"""Embedder training steps at growing batches, against sentence-transformers' plain loss.

python tests/benchmarks/embedder.py [--batches 64,512,1536] [--tokens-max 128] [--model DIR]

Both train the same model with the same LoRA on the same triplets of data/teacher in the same order,
each batch size in a process of its own: ours with ContrastiveLoss and --mini-batch-tokens, the
peer with MultipleNegativesRankingLoss and its defaults. Without --model it is a small random one
(four layers, hidden size 128, the study's tokenizer), which a CPU can train at a batch of 1,536.

Prints one JSON object: ratio_tokens_per_second (ours over the peer's at the largest batch that the
peer could hold in --peer-gib; tokens of texts, without padding), memory_growth (our peak at the
largest batch over that at the smallest), padding_share (ours, at the largest), and the figures of
each batch. One step is not timed; --steps are.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TAU = 0.02


def main() -> None:
    """Run each batch size of each in a process, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="64,512,1536")
    parser.add_argument("--tokens-max", type=int, default=128)
    parser.add_argument("--mini-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", help="folder of a model; default: small and random")
    parser.add_argument("--peer-gib", type=float, default=12.0, help="memory the peer may take")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, batch = options.part.split("|")
        print(json.dumps(_measure(name, int(batch), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _random_model(Path(folder))
        batches = sorted(map(int, options.batches.split(",")))
        ours = {batch: _part("ours", batch, model, options) for batch in batches}
        peer = {batch: _part("peer", batch, model, options) for batch in batches}
    held = [batch for batch in batches if peer[batch]]
    result = {
        "ratio_tokens_per_second": round(
            ours[held[-1]]["tokens_per_second"] / peer[held[-1]]["tokens_per_second"], 2
        ),
        "largest_batch_of_peer": held[-1],
        "memory_growth": round(ours[batches[-1]]["peak_gib"] / ours[batches[0]]["peak_gib"], 2),
        "padding_share": round(ours[batches[-1]]["padding_share"], 3),
        "ours": ours,
        "peer": peer,
    }
    print(json.dumps(result))


def _part(name: str, batch: int, model: str, options: argparse.Namespace) -> dict | None:
    """The figures of one batch size; None where the memory did not suffice."""
    command = [sys.executable, __file__, "--part", f"{name}|{batch}", "--model", str(model)]
    for option in ("tokens_max", "mini_batch_tokens", "steps", "peer_gib"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if name == "peer" and ("MemoryError" in done.stderr or "memory" in done.stderr.lower()):
            return None
        raise SystemExit(f"{name} at {batch}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _random_model(folder: Path) -> str:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    from speed_utils.models import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BASE))
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _measure(name: str, batch: int, options: argparse.Namespace) -> dict:
    import resource

    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from speed_utils.contrastive import EmbedderPlan, _add_lora
    from speed_utils.contrastive_loss import ContrastiveLoss, text_labels
    from speed_utils.embedder import build_embedder

    if name == "peer" and not torch.cuda.is_available():
        limit = int((options.peer_gib + 4) * 2**30)  # address space; libraries take some
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model = build_embedder(options.model, options.tokens_max)
    _add_lora(model, EmbedderPlan(1e-4, 1, batch))
    if name == "ours":
        loss = ContrastiveLoss(model, temperature=TAU, mini_batch_tokens=options.mini_batch_tokens)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=1 / TAU)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    rows = _triplets()
    n_tokens, seconds = 0, 0.0
    for step in range(options.steps + 1):
        chosen = random.Random(step).choices(rows, k=batch)
        started = time.perf_counter()
        columns = [model.preprocess([row[i] for row in chosen]) for i in range(3)]
        columns = [
            {key: value.to(model.device) for key, value in column.items() if hasattr(value, "to")}
            for column in columns
        ]
        real = sum(int(column["attention_mask"].sum()) for column in columns)
        labels = torch.tensor([text_labels(row[1], row[2]) for row in chosen], device=model.device)
        value = loss(columns, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(value.detach())  # waits for the GPU
        if step:
            n_tokens += real
            seconds += time.perf_counter() - started
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "tokens_per_second": round(n_tokens / seconds),
        "peak_gib": round(peak, 2),
        "padding_share": loss.n_padding / loss.n_tokens if name == "ours" else None,
    }


def _triplets() -> list[tuple[str, str, str]]:
    from speed_utils.data_check import read_rows
    from speed_utils.embedder import query_text
    from speed_utils.records import KIND_KEYS
    from speed_utils.teacher import TEACHER_DIR

    rows = read_rows(TEACHER_DIR / "seed.jsonl")
    triplets = []
    for row in rows:
        texts = [row["answer"].get(key) for key in KIND_KEYS[row["kind"]]]
        if len(texts) == 3:
            triplets.append((query_text(row["task"], texts[0]), texts[1], texts[2]))
    return triplets


if __name__ == "__main__":
    main()
