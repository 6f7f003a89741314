"""An OpenAI-compatible server on loopback that fails as told, and counts what it answered."""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "429",
    "429 with Retry-After",
    "500",
    "timeout",
    "dropped",
    "cut body",
    "cut answer",
    "not json",
    "wrong keys",
    "trickle",
)


def answer_for(body):
    """A valid answer to a request with a schema, else an echo."""
    form = body.get("response_format", {})
    question = body["messages"][-1]["content"]
    if form.get("type") == "json_schema":
        keys = form["json_schema"]["schema"]["properties"]
        return json.dumps({key: f"{key} of {question[:40]}" for key in keys})
    return f"re: {question}"


@dataclass
class FakeOpenAI:
    """Serve until closed; ``url`` is the base_url.

    Attributes:
        faults: fault name to its share of requests.
        capacity: seconds since the start -> requests in flight above which it says 429.
        script: question -> faults (names, or "STATUS message"), one a try, then good answers.
        answer: body -> text of a good answer.
    """

    faults: dict = field(default_factory=dict)
    capacity: object = None
    script: dict = field(default_factory=dict)
    answer: object = answer_for
    latency: float = 0.0
    slow_seconds: float = 3.0
    seed: int = 0
    batch_plan: object = None  # (batch number, custom_id) -> "ok", "error" or "missing"
    batch_status: object = None  # batch number -> status it ends with

    def __post_init__(self):
        self.lock = threading.Lock()
        self.tries = Counter()  # first question of the talk -> requests
        self.good = Counter()  # the same -> good answers that were sent in full
        self.asked_after_good = 0
        self.keys, self.calls, self.tokens, self.in_flight = set(), 0, Counter(), 0
        self.peak, self.files, self.sent_batches = 0, {}, {}
        self.started = time.monotonic()
        handler = type("Handler", (_Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def fault(self, body):
        """Which fault this request meets, or None."""
        question = next(m["content"] for m in body["messages"] if m["role"] == "user")
        with self.lock:
            self.tries[question] += 1
            n_try = self.tries[question]
            if self.good[question] and len(body["messages"]) < 3:
                self.asked_after_good += 1
            listed = self.script.get(question, ())
            if n_try <= len(listed):
                return listed[n_try - 1]
        rng = random.Random(f"{self.seed}|{question}|{n_try}")
        draw = rng.random()
        for name, share in self.faults.items():
            if draw < share:
                return name
            draw -= share
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeOpenAI

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.fake.keys.add(self.headers["Authorization"])
        if self.path.endswith("/files"):
            return self._receive_file(data)
        if self.path.endswith("/batches"):
            return self._create_batch(json.loads(data))
        with self.fake.lock:
            self.fake.in_flight += 1
            self.fake.peak = max(self.fake.peak, self.fake.in_flight)
        try:
            self._chat(json.loads(data))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has given up
        finally:
            with self.fake.lock:
                self.fake.in_flight -= 1

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")[1:]
        if parts[0] == "files":
            data = self.fake.files[parts[1]]
            return self._send(200, data, "application/octet-stream")
        if len(parts) == 2:
            return self._json(200, self.fake.sent_batches[parts[1]])
        batches = list(self.fake.sent_batches.values())
        return self._json(200, {"object": "list", "data": batches, "has_more": False})

    def _chat(self, body):
        fake = self.fake
        fault = fake.fault(body)
        if fake.latency:
            time.sleep(fake.latency)
        if fake.capacity and fake.in_flight > fake.capacity(time.monotonic() - fake.started):
            return self._json(429, {"error": {"message": "too many"}})
        if fault == "429":
            return self._json(429, {"error": {"message": "too many"}})
        if fault == "429 with Retry-After":
            return self._json(429, {"error": {"message": "too many"}}, {"Retry-After": "0.2"})
        if fault == "timeout":
            time.sleep(fake.slow_seconds)
            self.close_connection = True
            return None
        if fault == "dropped":
            self.close_connection = True
            return None
        if fault and fault[0].isdigit():
            status, _, message = fault.partition(" ")
            return self._json(int(status), {"error": {"message": message or "a fault"}})
        text, finish = fake.answer(body), "stop"
        if fault == "cut answer":
            text, finish = text[: len(text) // 2], "length"
        elif fault == "not json":
            text = text[:-1] + ", oops"
        elif fault == "wrong keys":
            text = json.dumps({"something": "else"})
        answer = completion_body(body, text, finish)
        data = json.dumps(answer).encode()
        if fault == "cut body":
            self._headers(200, len(data), "application/json")
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        self._headers(200, len(data), "application/json")
        pieces = [data[i : i + 40] for i in range(0, len(data), 40)]
        for piece in pieces if fault == "trickle" else [data]:
            self.wfile.write(piece)
            self.wfile.flush()
            if fault == "trickle":
                time.sleep(0.01)
        with fake.lock:
            fake.calls += 1
            fake.tokens.update(
                prompt=answer["usage"]["prompt_tokens"],
                completion=answer["usage"]["completion_tokens"],
            )
            if fault in (None, "trickle", "cut answer"):
                question = next(m["content"] for m in body["messages"] if m["role"] == "user")
                fake.good[question] += 1
        return None

    def _receive_file(self, data):
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        for part in BytesParser().parsebytes(head + data).get_payload():
            if part.get_filename():
                name = f"file-{len(self.fake.files)}"
                self.fake.files[name] = part.get_payload(decode=True)
        self._json(
            200,
            {
                "id": name,
                "object": "file",
                "bytes": 1,
                "created_at": 1,
                "filename": "x",
                "purpose": "batch",
                "status": "processed",
            },
        )

    def _create_batch(self, body):
        fake = self.fake
        number = len(fake.sent_batches)
        rows = [json.loads(x) for x in fake.files[body["input_file_id"]].splitlines()]
        good, bad = [], []
        for row in rows:
            fate = fake.batch_plan(number, row) if fake.batch_plan else "ok"
            if fate == "ok":
                answer = completion_body(row["body"], fake.answer(row["body"]), "stop")
                good.append(
                    {
                        "custom_id": row["custom_id"],
                        "error": None,
                        "response": {"status_code": 200, "body": answer},
                    }
                )
                fake.calls += 1
                fake.good[row["custom_id"]] += 1
            elif fate == "error":
                bad.append(
                    {
                        "custom_id": row["custom_id"],
                        "error": {"message": "it broke"},
                        "response": None,
                    }
                )
        names = []
        for lines in (good, bad):
            names.append(f"file-{len(fake.files)}" if lines else None)
            if lines:
                fake.files[names[-1]] = "\n".join(
                    json.dumps(x, ensure_ascii=False) for x in lines
                ).encode()
        status = fake.batch_status(number) if fake.batch_status else "completed"
        batch = {
            "id": f"batch-{number}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "created_at": 1,
            "status": status,
            "output_file_id": names[0],
            "error_file_id": names[1],
            "metadata": body.get("metadata"),
            "request_counts": {"total": len(rows), "completed": len(good), "failed": len(bad)},
        }
        fake.sent_batches[batch["id"]] = batch
        self._json(200, batch)

    def _json(self, status, value, headers=None):
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status, data, kind, headers=None):
        self._headers(status, len(data), kind, headers)
        self.wfile.write(data)

    def _headers(self, status, length, kind, headers=None):
        self.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(length), **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


def completion_body(body, text, finish):
    n_prompt = sum(len(message["content"]) for message in body["messages"]) // 4
    n_answer = max(1, len(text) // 4)
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
        },
    }
