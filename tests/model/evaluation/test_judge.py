"""A judge: each request once, answers kept as they come, and errors in one line."""

import json
import threading

import pytest

from cumo_model.evaluation.judge import EMPTY, KEY, Judge
from tests.model.evaluation.judge_server import judging, text_of


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY, "secret")


def test_nothing_is_asked_twice_and_options_count(tmp_path):
    with judging(lambda request: f" told {text_of(request)} ") as server:
        with Judge("m", tmp_path / "deep" / "judge.jsonl", server.url) as judge:
            assert judge.all(["a", "b", "a"]) == ["told a", "told b", "told a"]
            assert judge("a") == "told a" and judge.asked == 2
            assert judge("a", temperature=0.2) == "told a" and judge.asked == 3
            assert judge("a", system="be brief") == "told a" and judge.asked == 4
            assert judge("a", max_tokens=7) == "told a" and judge.asked == 5
        with Judge("m", tmp_path / "deep" / "judge.jsonl", server.url) as judge:
            assert judge.all(["b", "a"]) == ["told b", "told a"] and judge.asked == 0
        with Judge("n", tmp_path / "deep" / "judge.jsonl", server.url) as judge:
            assert judge("a") == "told a" and judge.asked == 1
        assert server.keys == {"Bearer secret"}
        assert len(server.asked) == 6
        last = server.asked[-1]
        assert (last["model"], last["temperature"], last["max_tokens"]) == ("n", 0, 1024)
        briefly = [request for request in server.asked if len(request["messages"]) == 2]
        assert [request["messages"][0] for request in briefly] == [{"role": "system", "content": "be brief"}]


def test_several_are_asked_at_the_same_time(tmp_path):
    meeting = threading.Barrier(4, timeout=30)  # a reply comes when four are waiting

    def reply(request):
        meeting.wait()
        return text_of(request)

    with judging(reply) as server, Judge("m", tmp_path / "judge.jsonl", server.url, at_once=4) as judge:
        prompts = [str(number) for number in range(8)]
        assert judge.all(prompts) == prompts


def test_a_killed_run_loses_at_most_a_torn_line(tmp_path):
    path = tmp_path / "judge.jsonl"
    with judging(text_of) as server:
        with Judge("m", path, server.url) as judge:
            judge.all(["a", "b"])
        path.write_bytes(path.read_bytes()[:-5])
        with Judge("m", path, server.url) as judge:
            assert judge.all(["a", "b"]) == ["a", "b"] and judge.asked == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["answer"] for line in lines) == ["a", "b"]


def test_what_was_answered_before_an_error_is_kept(tmp_path):
    reply = lambda request: (400, "no such thing") if text_of(request) == "bad" else text_of(request)
    with judging(reply) as server:
        with Judge("m", tmp_path / "judge.jsonl", server.url, at_once=1) as judge:
            with pytest.raises(
                ValueError, match=r"^judge http.* refuses a request \(400\): .*no such thing$"
            ):
                judge.all(["a", "bad", "b"])
        with Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
            assert judge.all(["a", "b"]) == ["a", "b"] and judge.asked == 1


def test_a_server_that_is_busy_is_asked_again(tmp_path):
    waiting = iter([(429, "slow down"), (500, "oh"), "at last"])
    with judging(lambda request: next(waiting)) as server:
        with Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
            assert judge("a") == "at last"
        with Judge("m", tmp_path / "other.jsonl", server.url, again=0) as judge:
            server.reply = lambda request: (429, "slow down")
            with pytest.raises(ValueError, match="slow down"):
                judge("b")
        assert len(server.asked) == 4


def test_the_newer_name_of_the_longest_answer(tmp_path):
    def reply(request):
        if "max_tokens" in request:
            return 400, "Unsupported parameter: use max_completion_tokens"
        return str(request["max_completion_tokens"])

    with judging(reply) as server, Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
        assert judge("a", max_tokens=5) == "5"


def test_empty_answers_are_asked_again_but_not_for_ever(tmp_path):
    replies = iter(["", " ", "found"])
    with judging(lambda request: next(replies)) as server:
        with Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
            assert judge("a") == "found"
            server.reply = lambda request: None
            with pytest.raises(ValueError, match="empty answer"):
                judge("b")
        assert len(server.asked) == 3 + EMPTY


def test_texts_of_any_kind_are_sent(tmp_path):
    texts = ["\ud800", "x" * 10_000, "\0", '"\n', "٣"]
    with judging(text_of) as server, Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
        assert judge.all(texts[:2]) == ["?", "x" * 10_000]
        judge.all(["\n".join(texts)])


def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "judge.jsonl"
    with pytest.raises(ValueError, match=r"^judge must be an address such as http.*got 'nowhere'$"):
        Judge("m", path, "nowhere")
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        Judge("m", path, at_once=0)
    with pytest.raises(ValueError, match="cannot be written"):
        Judge("m", tmp_path, "http://127.0.0.1:9/v1")
    with Judge("m", path, "http://127.0.0.1:9/v1", again=0) as judge:
        with pytest.raises(
            ValueError, match=r"^judge http://127.0.0.1:9/v1 cannot be asked: Connection error"
        ):
            judge("a")
        with pytest.raises(ValueError, match="in use by another run"):
            Judge("m", path)
    path.write_text('{"key": 1, "answer": "a"}\n')
    with pytest.raises(ValueError, match=r"judge.jsonl, line 1: must be an answer of a judge$"):
        Judge("m", path)
    with judging(lambda request: (401, "wrong key")) as server:
        with Judge("m", tmp_path / "other.jsonl", server.url) as judge:
            with pytest.raises(ValueError, match=rf"refuses the key in {KEY}: .*wrong key$"):
                judge("a")
    monkeypatch.delenv(KEY)
    with pytest.raises(ValueError, match=rf"^a judge needs a key in the environment variable {KEY} "):
        Judge("m", path)


def test_an_answer_is_on_disk_as_soon_as_it_is_there(tmp_path):
    path, counts = tmp_path / "judge.jsonl", []

    def reply(request):
        counts.append(len(path.read_text().splitlines()))
        return text_of(request)

    with judging(reply) as server, Judge("m", path, server.url, at_once=1) as judge:
        judge.all(["a", "b", "c"])
    assert counts == [0, 1, 2]


def test_a_reply_that_is_no_grade_is_asked_for_again_and_not_kept(tmp_path):
    replies = iter(["well", "7", "well", "well", "so", "9"])
    with judging(lambda request: next(replies)) as server:
        with Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
            assert judge.all(["a"], is_usable=str.isdigit) == ["7"]
            assert judge.all(["b"], is_usable=str.isdigit) == ["so"] and judge.asked == 1
        with Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
            assert judge.all(["a", "b"], is_usable=str.isdigit) == ["7", "9"] and judge.asked == 1


def test_another_server_is_another_judge(tmp_path):
    for reply in ("one", "two"):
        with judging(lambda request: reply) as server:  # noqa: B023
            with Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
                assert judge("a") == reply
