"""Generating: the answer's shape, streams, defaults, what reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from prefixd_server.errors import DeadlineExceeded, Unavailable
from prefixd_server.types import BeamParams, SamplingParams
from tests.http.harness import Stack, wait_until

PROMPT = "the quick brown fox"


def generate(
    client: httpx.Client, task: str, stream: bool = False, **parameters: Any
) -> httpx.Response:
    body = {"inputs": PROMPT, "parameters": parameters, "stream": stream}
    return client.post(f"/v1/tasks/{task}/generate", json=body)


def events(response: httpx.Response) -> list[Any]:
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_plain_answer(client: httpx.Client, task: str) -> None:
    answer = generate(client, task, max_new_tokens=4)
    assert answer.status_code == 200, answer.text
    assert PROMPT.startswith(answer.json().pop("generated_text"))
    prompt_tokens = answer.json()["usage"]["prompt_tokens"]
    rest = {key: value for key, value in answer.json().items() if key != "generated_text"}
    assert rest == {
        "score": None,
        "details": None,
        "sequences": None,
        "task": task,
        "version": 1,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 4,
            "total_tokens": prompt_tokens + 4,
            "prefix_tokens": 5,
        },
    }


def test_details(client: httpx.Client, task: str) -> None:
    answer = generate(
        client, task, max_new_tokens=3, details=True, decoder_input_details=True, top_n_tokens=2
    ).json()
    details = answer["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 3
    assert details["seed"] is None
    assert [t["logprob"] for t in details["tokens"]] == [-0.5] * 3
    assert "".join(t["text"] for t in details["tokens"]) == answer["generated_text"]
    assert [len(top) for top in details["top_tokens"]] == [2, 2, 2]
    assert len(details["prefill"]) == answer["usage"]["prompt_tokens"]
    assert details["prefill"][0].keys() == {"id", "text", "logprob"}


def test_a_drawn_seed_is_told(client: httpx.Client, task: str, server: Stack) -> None:
    answer = generate(client, task, do_sample=True, details=True, max_new_tokens=1)
    seed = answer.json()["details"]["seed"]
    assert server.engine.requests[-1].sampling.seed == seed
    again = generate(client, task, temperature=0.5, seed=7, details=True, max_new_tokens=1)
    assert again.json()["details"]["seed"] == 7
    assert server.engine.requests[-1].sampling.temperature == 0.5


def test_several_sequences(client: httpx.Client, task: str, server: Stack) -> None:
    answer = generate(client, task, n=2, best_of=3, do_sample=True, seed=5, max_new_tokens=2)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["sequences"]) == 2
    assert answer.json()["sequences"][0]["generated_text"] == answer.json()["generated_text"]
    assert answer.json()["usage"]["completion_tokens"] == 6
    assert sorted(r.sampling.seed for r in server.engine.requests[-3:]) == [5, 6, 7]


def test_beam_search(client: httpx.Client, task: str, server: Stack) -> None:
    options = {"num_beams": 4, "n": 2, "length_penalty": 0.8, "early_stopping": "never"}
    answer = generate(client, task, max_new_tokens=3, details=True, **options)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["sequences"]
    assert {key: answer.json()[key] for key in first} == first
    assert (first["score"], second["score"]) == (-0.5, -1.5)
    assert PROMPT.startswith(first["generated_text"])
    assert second["generated_text"] in PROMPT
    assert second["generated_text"] != first["generated_text"]
    assert first["details"]["finish_reason"] == "length"
    assert len(first["details"]["tokens"]) == 3
    assert first["details"]["seed"] is None
    assert answer.json()["usage"]["completion_tokens"] == 6
    assert server.engine.requests[-1].sampling.beams == BeamParams(4, 2, 0.8, "never")


def test_one_hypothesis_is_the_answer(client: httpx.Client, task: str, server: Stack) -> None:
    answer = generate(client, task, num_beams=2, max_new_tokens=3).json()
    assert (answer["score"], answer["sequences"]) == (-0.5, None)
    assert server.engine.requests[-1].sampling.beams == BeamParams(2)
    assert generate(client, task, num_beams=1, max_new_tokens=3).json()["score"] is None
    assert server.engine.requests[-1].sampling.beams is None


def test_searching_turns_stored_drawing_off_and_the_other_way_round(
    client: httpx.Client, task: str, server: Stack
) -> None:
    url = f"/v1/tasks/{task}"
    drawing = {"parameters": {"temperature": 0.3, "top_p": 0.5, "max_new_tokens": 2}}
    assert client.patch(url, json={"defaults": drawing}).status_code == 200
    assert generate(client, task, num_beams=2).status_code == 200
    assert server.engine.requests[-1].sampling == SamplingParams(2, beams=BeamParams(2))
    searching = {"parameters": {"num_beams": 3, "length_penalty": 2.0, "max_new_tokens": 2}}
    assert client.patch(url, json={"defaults": searching}).status_code == 200
    for own in ({"num_beams": 1}, {"do_sample": True}, {"temperature": 0.5}):
        assert generate(client, task, **own).status_code == 200
        assert server.engine.requests[-1].sampling.beams is None
    assert generate(client, task).json()["score"] == -0.5
    assert server.engine.requests[-1].sampling.beams == BeamParams(3, 1, 2.0)


def test_return_full_text(client: httpx.Client, task: str) -> None:
    plain = generate(client, task, max_new_tokens=3).json()["generated_text"]
    full = generate(client, task, max_new_tokens=3, return_full_text=True)
    assert full.json()["generated_text"] == PROMPT + plain


def test_stop_string(client: httpx.Client, task: str) -> None:
    answer = generate(client, task, stop=["quick"], details=True).json()
    assert answer["generated_text"] == "the "
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_every_parameter_reaches_the_engine(client: httpx.Client, task: str, server: Stack) -> None:
    answer = generate(
        client,
        task,
        max_new_tokens=2,
        min_new_tokens=1,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"3": 2.5},
        seed=9,
        stop_token_ids=[4],
        ignore_eos=True,
        truncate=2,
        priority=-3,
    )
    assert answer.status_code == 200, answer.text
    request = server.engine.requests[-1]
    sampling = request.sampling
    assert (request.priority, len(request.prompt_token_ids)) == (-3, 2)
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (2, 1)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.9)
    assert (sampling.min_p, sampling.typical_p) == (0.1, 0.8)
    assert sampling.repetition_penalty == 1.1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias, sampling.seed) == (((3, 2.5),), 9)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == (frozenset({4}), True)


def test_nulls_are_left_out(client: httpx.Client, task: str) -> None:
    answer = generate(client, task, max_new_tokens=1, grammar=None, num_beams=None, top_p=None)
    assert answer.status_code == 200, answer.text
    body = {"inputs": PROMPT, "parameters": None}
    assert client.post(f"/v1/tasks/{task}/generate", json=body).status_code == 200


def test_a_named_version(client: httpx.Client, task: str) -> None:
    assert generate(client, f"{task}@1", max_new_tokens=1).json()["version"] == 1
    unknown = generate(client, f"{task}@2")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "version"


def test_the_base_model_by_its_own_name(client: httpx.Client) -> None:
    answer = generate(client, "base", max_new_tokens=1).json()
    assert (answer["task"], answer["version"], answer["usage"]["prefix_tokens"]) == (
        "base",
        None,
        0,
    )
    assert generate(client, "base@1").status_code == 404


def test_a_task_with_nothing_active(client: httpx.Client, task: str) -> None:
    client.delete(f"/v1/tasks/{task}/versions/1")
    answer = generate(client, task)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_active_version")


def test_defaults_lie_under_the_request(client: httpx.Client, task: str, server: Stack) -> None:
    defaults = {"parameters": {"temperature": 0.3, "max_new_tokens": 2}, "stop": ["quick"]}
    assert client.patch(f"/v1/tasks/{task}", json={"defaults": defaults}).status_code == 200
    assert generate(client, task).json()["generated_text"] == "the "
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.3, 2)
    own = generate(client, task, do_sample=False, max_new_tokens=4, stop=[])
    assert own.json()["usage"]["completion_tokens"] == 4
    assert server.engine.requests[-1].sampling.greedy


def test_stream(client: httpx.Client, task: str) -> None:
    answer = generate(client, task, stream=True, max_new_tokens=4, details=True, top_n_tokens=1)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    got = events(answer)
    assert [event["index"] for event in got] == [1, 2, 3, 4]
    *others, last = got
    assert all(event.keys() == others[0].keys() for event in others)
    assert others[0].keys() == {"index", "token", "top_tokens", "generated_text", "details"}
    assert "".join(event["token"]["text"] for event in got) == last["generated_text"]
    assert last["details"].keys() == {"finish_reason", "generated_tokens", "input_length", "seed"}
    assert (last["task"], last["version"]) == (task, 1)
    assert last["usage"]["completion_tokens"] == 4


def test_a_stream_is_the_same_bytes_however_its_tokens_arrive(
    client: httpx.Client, task: str, server: Stack
) -> None:
    body = {"inputs": "naïve 日本語 🦊 fox", "parameters": {"max_new_tokens": 150}, "stream": True}
    answers, writes = [], []
    for server.engine.burst in (1, 7, 200):
        with client.stream("POST", f"/v1/tasks/{task}/generate", json=body) as answer:
            pieces = list(answer.iter_raw())
        answers.append(b"".join(pieces))
        writes.append(len(pieces))
    one, *others = answers
    assert all(other == one for other in others)
    assert one.count(b"data: ") == 150
    assert "日本語 🦊".encode() in one
    # 150 events, at most 64 a write; what the client reads at once may be more than one write.
    assert writes[-1] <= 4


def test_an_error_behind_ready_tokens_is_the_last_event(
    client: httpx.Client, task: str, server: Stack
) -> None:
    server.engine.burst = 5
    server.engine.fail_with, server.engine.fail_after = DeadlineExceeded("too late"), 3
    got = events(generate(client, task, stream=True))
    assert [event.get("index") for event in got] == [1, 2, 3, None]
    assert got[-1]["error"]["type"] == "timeout_error"


def test_an_error_before_the_first_token_has_its_status(
    client: httpx.Client, task: str, server: Stack
) -> None:
    server.engine.fail_with, server.engine.fail_after = Unavailable("prefix lost"), 0
    answer = generate(client, task, stream=True)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["message"] == "prefix lost"


def test_an_error_later_is_the_last_event(client: httpx.Client, task: str, server: Stack) -> None:
    server.engine.fail_with, server.engine.fail_after = DeadlineExceeded("too late"), 2
    answer = generate(client, task, stream=True)
    assert answer.status_code == 200
    got = events(answer)
    assert len(got) == 3
    assert got[-1]["error"]["type"] == "timeout_error"


def test_a_late_request_is_504(client: httpx.Client, task: str, server: Stack) -> None:
    server.engine.fail_with = DeadlineExceeded("the deadline passed")
    answer = generate(client, task)
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts(
    client: httpx.Client, task: str, server: Stack, stream: bool
) -> None:
    server.engine.hold(2 if stream else 0)
    before = len(server.engine.aborted)
    body = {"inputs": PROMPT, "stream": stream}
    path = f"/v1/tasks/{task}/generate"
    with httpx.Client(base_url=client.base_url, timeout=1) as leaving:
        if stream:
            with leaving.stream("POST", path, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(path, json=body)
    wait_until(lambda: len(server.engine.aborted) == before + 1)
    wait_until(lambda: server.services.frontend.num_inflight == 0)
    wait_until(lambda: not server.services.running)


def test_a_full_queue_is_429(client: httpx.Client, task: str, server: Stack) -> None:
    server.mailbox.max_queue = 0
    try:
        answer = generate(client, task)
    finally:
        server.mailbox.max_queue = 1024
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "overloaded_error"


def test_running_requests_are_counted(client: httpx.Client, task: str, server: Stack) -> None:
    server.engine.hold(1)
    path = f"/v1/tasks/{task}/generate"
    with client.stream("POST", path, json={"inputs": PROMPT, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        with httpx.Client(base_url=client.base_url) as other:
            assert other.get(f"/v1/tasks/{task}").json()["requests_running"] == 1
        server.engine.release()
        assert len([line for line in lines if line]) == 99
    wait_until(lambda: client.get(f"/v1/tasks/{task}").json()["requests_running"] == 0)


def test_hugging_face_s_own_client(client: httpx.Client, task: str) -> None:
    from huggingface_hub import InferenceClient

    hub = InferenceClient(
        model=f"{client.base_url}/v1/tasks/{task}/generate".replace("//v1", "/v1")
    )
    text = hub.text_generation(PROMPT, max_new_tokens=3)
    assert PROMPT.startswith(text)
    detailed = hub.text_generation(PROMPT, max_new_tokens=3, details=True, do_sample=True, seed=1)
    assert detailed.details.seed == 1
    streamed = list(hub.text_generation(PROMPT, max_new_tokens=3, stream=True))
    assert "".join(streamed) == text
