"""Junior, senior and revisor of several runs, on recorded signals that none was trained on.

python tests/benchmarks/heldout.py RUN_DIR [RUN_DIR ...] [--items 40]

A run's own held-out data are few, and other ones where the recorded teacher has changed. Here all
runs are measured on up to --items of each: seed examples, judged lists, revisions that change their
root and revisions that do not, whose ids stand in no run's training data; in float32, whatever the
runs were trained in.

Prints one JSON object: n_items, and the base's and each run's figures. Junior and revisor: the loss
(nats a token, mean over items), the revisor's apart for changed and unchanged roots. Senior: the
share of lists whose best it prefers to the worst more than its junior does, the 95 % interval of
that share (Clopper-Pearson), and the mean margin in nats.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT_DIR = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT_DIR))

from speed_utils.data_check import read_rows  # noqa: E402
from speed_utils.dpo import preference_rows  # noqa: E402
from speed_utils.models import resolve_model  # noqa: E402
from speed_utils.parsing import (  # noqa: E402
    parse_example,
    parse_preference,
    parse_revision,
    prompt_fields,
)
from speed_utils.prompts import prompt_of  # noqa: E402
from speed_utils.records import Candidates, Preference, example_text  # noqa: E402
from speed_utils.sft import sft_rows  # noqa: E402
from speed_utils.synthesis import revision_pair  # noqa: E402
from speed_utils.teacher import TEACHER_DIR, recorded_prompt  # noqa: E402

TRAINED_ON = {  # in a run's artifacts
    "seed": "03_write_seed_data/seed.jsonl",
    "preferences": "05_build_preferences/preferences.jsonl",
    "revisions": "07_write_revisions/revisions.jsonl",
}


def main() -> None:
    """Load the base once, each run's adapters in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--items", type=int, default=40)
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    base_dir = _one_base(options.runs)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype="float32").eval()
    seed, lists, revisions = (_unseen(name, options.runs) for name in TRAINED_ON)
    changed = [revision for revision in revisions if revision.root != revision.revision]
    unchanged = [revision for revision in revisions if revision.root == revision.revision]
    items = {"seed": seed, "lists": lists, "changed": changed, "unchanged": unchanged}
    items = {name: own[: options.items] for name, own in items.items()}
    seed_rows = sft_rows(tokenizer, [(prompt_of(e), example_text(e)) for e in items["seed"]])
    list_rows = preference_rows(tokenizer, items["lists"])
    revisor_rows = {
        name: sft_rows(tokenizer, [revision_pair(revision) for revision in items[name]])
        for name in ("changed", "unchanged")
    }
    score = _Scorer(base, tokenizer)
    result = {
        "n_items": {name: len(own) for name, own in items.items()},
        "base": {
            "junior": score.loss(None, seed_rows),
            "revisor": {name: score.loss(None, rows) for name, rows in revisor_rows.items()},
        },
    }
    for run_dir in options.runs:
        junior, senior, revisor = (
            run_dir / "artifacts" / stage / "training/adapter"
            for stage in ("04_train_junior", "06_train_senior", "08_train_revisor")
        )
        result[str(run_dir)] = {
            "junior": score.loss(junior, seed_rows),
            "senior": _accuracy(score.margins(senior, junior, list_rows)),
            "revisor": {name: score.loss(revisor, rows) for name, rows in revisor_rows.items()},
        }
        print(run_dir, result[str(run_dir)], file=sys.stderr)
    print(json.dumps(result))


def _one_base(run_dirs: Sequence[Path]) -> Path:
    """The base model that all runs share."""
    names = set()
    for run_dir in run_dirs:
        record = run_dir / "stages/04_train_junior.json"
        if not record.is_file():
            raise SystemExit(f"{record} is not there; name folders of finished runs")
        names.add(json.loads(record.read_text(encoding="utf8"))["parameters"]["generator_model"])
    if len(names) > 1:
        raise SystemExit(f"the runs have other base models: {', '.join(sorted(names))}")
    return resolve_model(names.pop())


def _unseen(name: str, run_dirs: Sequence[Path]) -> list:
    """Recorded signals, parsed, whose ids no run was trained on; undecided lists are left out."""
    paths = [run_dir / "artifacts" / TRAINED_ON[name] for run_dir in run_dirs]
    seen = {row["id"] for path in paths for row in read_rows(path)}
    rows = [row for row in read_rows(TEACHER_DIR / f"{name}.jsonl") if row["id"] not in seen]
    random.Random("held out of all runs").shuffle(rows)
    parsed = []
    for row in rows:
        prompt, answer = recorded_prompt(row), json.dumps(row["answer"], ensure_ascii=False)
        if name == "seed":
            parsed.append(parse_example(answer, prompt, "teacher", stage="held out"))
        elif name == "revisions":
            parsed.append(parse_revision(answer, prompt, row["root"], stage="held out"))
        else:
            candidates = Candidates(**prompt_fields(prompt), texts=row["texts"])
            judged = parse_preference(answer, candidates, stage="held out")
            parsed += [judged] if isinstance(judged, Preference) else []
    return parsed


class _Scorer:
    """Log-likelihoods of answers under the base and under adapters on it."""

    def __init__(self, base: object, tokenizer: object):
        self._base, self._tokenizer, self._model, self._names = base, tokenizer, None, {}

    def loss(self, adapter_dir: Path | None, rows: Sequence[dict]) -> float | None:
        """Nats a token of the rows' completions, mean over rows; None without rows."""
        logps = [self._logps(adapter_dir, row["prompt"], row["completion"]) for row in rows]
        return -statistics.mean(sum(logp) / len(logp) for logp in logps) if rows else None

    def margins(self, senior: Path, junior: Path, rows: Sequence[dict]) -> list[float]:
        """How much more the senior prefers chosen to rejected than the junior does, in nats."""

        def gain(row: dict, field: str) -> float:
            more, less = (self._logps(d, row["prompt"], row[field]) for d in (senior, junior))
            return sum(more) - sum(less)

        return [gain(row, "chosen") - gain(row, "rejected") for row in rows]

    def _logps(self, adapter_dir: Path | None, prompt: str, answer: str) -> list[float]:
        import torch

        given = self._tokenizer(prompt)["input_ids"]
        wanted = self._tokenizer(answer)["input_ids"] + [self._tokenizer.eos_token_id]
        with torch.inference_mode(), self._adapted(adapter_dir) as model:
            ids = torch.tensor([given + wanted])
            logits = model(ids, logits_to_keep=len(wanted) + 1).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(wanted)[:, None])[:, 0].tolist()

    @contextmanager
    def _adapted(self, adapter_dir: Path | None) -> Iterator[object]:
        """The base with an adapter, or without one."""
        from peft import PeftModel

        if adapter_dir is None and self._model is None:
            yield self._base
        elif adapter_dir is None:
            with self._model.disable_adapter():
                yield self._base
        else:
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, adapter_dir, "adapter0").eval()
                self._names[adapter_dir] = "adapter0"
            elif adapter_dir not in self._names:
                self._names[adapter_dir] = f"adapter{len(self._names)}"
                self._model.load_adapter(adapter_dir, self._names[adapter_dir])
            self._model.set_adapter(self._names[adapter_dir])
            yield self._model


def _accuracy(margins: Sequence[float]) -> dict:
    from scipy.stats import binomtest

    n_right = sum(margin > 0 for margin in margins)
    interval = binomtest(n_right, len(margins)).proportion_ci()
    return {
        "accuracy": n_right / len(margins),
        "interval": [interval.low, interval.high],
        "margin": statistics.mean(margins),
    }


if __name__ == "__main__":
    main()
