"""The file of answers while it is written: parts beside it, from which an interrupted run goes on.

Each process appends to a part of its own, OUT.part-RANK. Its first line says to which questions and settings
it belongs; each other line is the list of the answers of one batch, so that a process that is killed loses
its last batch at most. At the end the first process writes OUT, in the order of the questions, and deletes
the parts. An answer is an object with LLaVA's keys; its metadata name the run, by a digest of questions and
settings.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cumo_model.checkpoints.folders import write_whole
from cumo_model.serving.questions import Question
from cumo_model.serving.replies import Reply

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
DYING = 2.0  # seconds for a process that was killed to let go of its part
SHOWN = 12  # digits of the digest that names a run


class OtherAnswersError(ValueError):
    """The files hold answers to other questions or with other settings; every process finds it."""


class AnswerFile:
    """The answers to questions; use it in a `with` block.

    Args:
        out: path of the file of answers.
        questions: the questions.
        settings: everything else that the answers depend on, as JSON.
        rank: number of this process among those that write the same file.

    Attributes:
        answers: the answers so far, by the `key` of their question; see `read`.

    Raises:
        ValueError: `out` cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        questions: Sequence[Question],
        settings: dict[str, Any],
        rank: int = 0,
    ):
        # a link stays one, and its target is written
        self.out, self.questions, self.rank = Path(os.path.realpath(out)), questions, rank
        asked = [[q.id, q.text, list(q.images)] for q in questions]
        self._head = json.loads(json.dumps({"settings": settings, "questions": _digest(asked)}))
        self.run = _digest(self._head)[:SHOWN]
        self.answers: dict[Any, dict] = {}
        if self.out.is_dir():
            raise ValueError(f"out must be a file, got {str(out)!r}, which is a folder")
        if self.out.exists() and not self.out.is_file():
            raise ValueError(f"out must be a file, got {str(out)!r}, which is a device or a pipe")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._part = self._opened()
        except OSError as error:
            raise ValueError(f"out {str(out)!r} cannot be written: {error.strerror or error}") from None
        try:
            self._drop_torn_line()
        except BaseException:
            self._part.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *error) -> None:
        if os.fstat(self._part.fileno()).st_size == 0:
            self._path(self.rank).unlink(missing_ok=True)
        self._part.close()

    def _path(self, rank: int) -> Path:
        return self.out.with_name(f"{self.out.name}.part-{rank}")

    def _parts(self) -> list[Path]:
        head = f"{self.out.name}.part-"
        found = [path for path in self.out.parent.iterdir() if path.name.startswith(head)]
        return sorted(path for path in found if path.name.removeprefix(head).isdecimal())

    def _opened(self) -> BinaryIO:
        """This process's part, opened and locked."""
        path, end = self._path(self.rank), time.monotonic() + DYING
        while True:
            part = open(path, "a+b")
            is_ours = claimed(part)
            # another run may have finished, and deleted it, between the two
            if is_ours and path.exists() and os.path.samestat(os.fstat(part.fileno()), path.stat()):
                return part
            part.close()
            if time.monotonic() > end:
                raise ValueError(
                    f"out {str(self.out)!r} is being written by another run: wait for it, or choose another"
                )
            time.sleep(0.1)

    def _drop_torn_line(self) -> None:
        self._part.seek(0)
        content = self._part.read()
        if not content.endswith(b"\n"):
            self._part.truncate(content.rfind(b"\n") + 1)

    @property
    def is_finished(self) -> bool:
        """Whether every question has an answer."""
        return len(self.answers) == len(self.questions)

    def read(self) -> None:
        """Read the answers of earlier runs.

        Raises:
            ValueError: they are those of other questions or settings, or damaged.
        """
        found = {}
        for path in self._parts():
            found |= self._of_part(path)
        if self.out.is_file():
            found |= self._of_file()
        self.answers = {
            question.key: found[question.key] for question in self.questions if question.key in found
        }

    def _of_part(self, path: Path) -> dict[Any, dict]:
        *lines, _ = path.read_bytes().split(b"\n")  # without the end of a torn one
        if not lines:
            return {}
        try:
            head, *batches = map(json.loads, lines)
            found = {_key(answer): answer for batch in batches for answer in batch}
        except (ValueError, TypeError, KeyError) as error:
            raise OtherAnswersError(
                f"{path} is damaged: {error}; delete it to ask its questions again"
            ) from None
        if head != self._head:
            raise OtherAnswersError(
                f"{path} belongs to {self._difference(head)}: choose another --out, or delete {path} to "
                "start anew"
            )
        return found

    def _difference(self, head: Any) -> str:
        try:
            before, now = head["settings"], self._head["settings"]
            changed = sorted(key for key in before | now if before.get(key) != now.get(key))
        except (KeyError, TypeError, AttributeError):
            return "something else"
        if not changed:
            return "other questions"
        return "a run with " + ", ".join(
            f"{key} {before.get(key)!r}, not {now.get(key)!r}" for key in changed
        )

    def _of_file(self) -> dict[Any, dict]:
        """The answers of a finished file, which lacks those that no earlier run could give."""
        try:
            found = [json.loads(line) for line in self.out.read_bytes().splitlines()]
            is_own = all(answer["metadata"]["run"] == self.run for answer in found)
            found = {_key(answer): answer for answer in found}
        except (ValueError, TypeError, KeyError):
            is_own = False
        if not is_own:
            raise OtherAnswersError(
                f"{self.out} exists already, with answers to other questions or with other settings: choose "
                "another --out or delete it"
            )
        return found

    def begin(self) -> None:
        """Write the first line of this process's part, unless an earlier run has written it."""
        if os.fstat(self._part.fileno()).st_size == 0:
            self._append(self._head)

    def add(self, answers: Sequence[dict]) -> None:
        """Append the answers of a batch to this process's part."""
        if answers:
            self._append(list(answers))
            self.answers |= {_key(answer): answer for answer in answers}

    def _append(self, value: Any) -> None:
        self._part.write(f"{json.dumps(value)}\n".encode())
        self._part.flush()

    def finish(self) -> None:
        """Write the file from all parts, and delete them."""
        self.read()
        if self.answers:
            text = "".join(f"{json.dumps(answer)}\n" for answer in self.answers.values())
            if not self.out.is_file() or self.out.read_bytes() != text.encode():
                write_whole(self.out, text)
        for path in self._parts():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def answer(self, question: Question, reply: Reply, model: str) -> dict[str, Any]:
        """The object of an answer.

        Its metadata say why it ended ("length" and "context": it was cut), and name run and category.
        """
        more = {} if question.category is None else {"category": question.category}
        return {
            "question_id": question.id,
            "prompt": question.text,
            "text": reply.text,
            "answer_id": _digest([question.id, question.text])[:24],
            "model_id": model,
            "metadata": {"finish": reply.finish, "run": self.run, **more},
        }


def claimed(file: BinaryIO) -> bool:
    """Lock an open file for this process; False if another one has it. A file system may have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in WITHOUT_LOCKS
    return True


def _key(answer: dict[str, Any]) -> tuple[int | str, str]:
    """The `key` of the question of an answer."""
    return answer["question_id"], answer["prompt"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
