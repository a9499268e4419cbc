"""MMBench and MMBench-CN: choices in all orders, from a table with pictures as base64 text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import InlinePictures, found, read_table
from cumo_model.evaluation.scorers.circular import is_right_in_all, letter_of
from cumo_model.evaluation.tables import write_sheet
from cumo_model.evaluation.task import LONG, Data, Item, Judge, Row, Task, by_group, percent
from cumo_model.serving.questions import Question

LETTERS = "ABCD"
CIRCLE = 1_000_000  # index of a row with the choices in another order: that of the question plus a multiple
REFERENCE = 64  # characters: a shorter picture is the index of the row that has it
# cells that pandas, with which CuMo's script reads the table, takes for missing ones
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
MISSING |= {"n/a", "NULL", "null"}
WORDS = ("nan", "-nan", "none")  # in any case
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")  # by LLaVA's converter
AT = 6  # the column of answers in its sheet


class MmBench(Task):
    """MMBench's dev set; of a test set, which has no answers, only the sheet for the server is written.

    A question is right if the answers to all rows of its circle are; an answer whose letter the rules do not
    find is wrong, where the server asks ChatGPT. Of a table without circles the plain accuracy is given.
    """

    name, title = "mmbench", "MMBench"
    metric = "circular accuracy, %"
    folders = ("mmbench", "MMBench")
    max_new_tokens = LONG
    server = "https://mmbench.opencompass.org.cn/mmbench-submission"
    files: tuple[str, ...] = (
        "mmbench_dev_20230712.tsv",
        "MMBench_DEV_EN.tsv",
        "mmbench_dev_en_20231003.tsv",
        "mmbench_test_20230712.tsv",
        "mmbench_test_en_20231003.tsv",
    )
    instruction = "Answer with the option's letter from the given choices directly."

    def read(self, folder: Path) -> Data:
        path = found(folder, *self.files)
        table = read_table(path, ("index", "question", "A", "B", "image"))
        pictures: dict[str, str] = {}
        items, sizes, seen = [], {}, {}
        for number, row in enumerate(table, 2):
            place = f"{path}, row {number}"
            index = _index(row["index"], place)
            if index in seen:
                raise ValueError(
                    f"{place}: index must be that of no other row, got {index}, as in row {seen[index]}"
                )
            seen[index] = number
            unit = str(index % CIRCLE)
            sizes[unit] = sizes.get(unit, 0) + 1
            picture = row.pop("image")
            is_reference = len(picture) < REFERENCE and picture.isdecimal()
            name = picture if is_reference else str(index)
            if not is_reference:
                pictures[name] = picture
            items.append(self._item(row, index, name, unit, place))
        if not items:
            raise ValueError(f"{path} must hold at least one row, got none")
        # the category of a question is that of its first row
        more = {"source": path.name, "table": table, "sizes": sizes}
        return Data(items, InlinePictures(pictures), more)

    def _item(self, row: dict[str, str], index: int, picture: str, unit: str, place: str) -> Item:
        choices = {}
        for letter in LETTERS:
            if is_missing(row.get(letter, "")):
                break
            choices[letter] = row[letter]
        if len(choices) < 2:
            raise ValueError(f"{place}: must have the choices A and B, got {len(choices)}")
        hint = row.get("hint", "")
        lines = [] if is_missing(hint) else [hint]
        lines += [row["question"], *(f"{letter}. {text}" for letter, text in choices.items())]
        question = Question(index, "\n".join([*lines, self.instruction]), (picture,), place=place)
        answer = row.get("answer", "")
        right = None if is_missing(answer) else answer
        if right is not None and right not in choices:
            raise ValueError(f"{place}: answer must be one of {', '.join(choices)}, got {right!r}")
        reference = {"answer": right, "choices": choices, "ability": row.get("l2-category", "")}
        return Item(question, reference, row.get("category", ""), unit)

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        if any(item.reference["answer"] is None for item in data.items):
            return None
        units: dict[str, list[tuple[Item, str]]] = {}
        for item, answer in zip(data.items, answers, strict=True):
            letter = letter_of(answer, item.reference["choices"])
            units.setdefault(item.unit, []).append((item, letter))
        rows, is_circular = [], max(data.more["sizes"].values()) > 1
        for unit, said in units.items():
            letters = [letter for _, letter in said]
            right = [item.reference["answer"] for item, _ in said]
            # a circle with a row that has no answer is not right
            is_whole = len(said) == data.more["sizes"][unit]
            first, letter = min(said, key=lambda pair: pair[0].question.id)
            values = {
                "right": is_whole and is_right_in_all(letters, right),
                "plain": letter == first.reference["answer"],
                "orders": len(said),
                "is_circular": is_circular,
                "unclear": letters.count(""),
                "ability": first.reference["ability"],
            }
            rows.append(Row(unit, first.group, values))
        return rows

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        plain = percent([row.values["plain"] for row in rows])
        orders = sum(row.values["orders"] for row in rows)
        unclear = 100 * sum(row.values["unclear"] for row in rows) / orders if orders else float("nan")
        if any(row.values["is_circular"] for row in rows):
            figures = {self.metric: percent([row.values["right"] for row in rows])}
            figures["accuracy in the first order, %"] = plain
        else:
            figures = {"accuracy without circles, %": plain}
        figures["answers without a letter, %"] = unclear
        abilities = [Row(row.unit, row.values["ability"], row.values) for row in rows]
        figures |= {f"ability: {name}": value for name, value in by_group(abilities, "right").items()}
        return figures | {f"category: {name}": value for name, value in by_group(rows, "right").items()}

    def submission(self, data: Data, answers: Sequence[str], path: Path) -> Path | None:
        """Write the sheet as LLaVA's converter does; a row that was not asked has no prediction."""
        table: list[dict[str, str]] = data.more["table"]
        said = {item.question.id: answer for item, answer in zip(data.items, answers, strict=True)}
        columns = [name for name in table[0] if name not in DROPPED]
        columns.insert(AT, "prediction")
        rows: list[list[Any]] = []
        for row in table:
            index = int(row["index"])
            cells = {**row, "index": index, "prediction": said.get(index, "")}
            rows.append([cells[name] for name in columns])
        target = path.with_name(f"{path.name}.xlsx")
        write_sheet(target, columns, rows)
        return target


class MmBenchCn(MmBench):
    """MMBench-CN: the same questions in Chinese."""

    name, title = "mmbench_cn", "MMBench-CN"
    folders = ("mmbench_cn", "mmbench", "MMBench")
    files = (
        "mmbench_dev_cn_20231003.tsv",
        "MMBench_DEV_CN.tsv",
        "mmbench_test_cn_20231003.tsv",
    )
    instruction = "请直接回答选项字母。"


def is_missing(cell: str) -> bool:
    """Whether CuMo's script takes a cell for a missing one: also the words nan, none, NA and null."""
    return cell in MISSING or cell.lower() in WORDS


def _index(cell: str, place: str) -> int:
    if not (cell.isascii() and cell.isdecimal()):
        raise ValueError(f"{place}: index must be an integer, got {cell!r:.80}")
    return int(cell)
