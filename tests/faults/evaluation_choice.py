"""Faults in MMBench, MMMU, MathVista, MM-Vet, LLaVA-Bench, and in the judge."""

from tests.faults import Fault

ROOT = "cumo_model/evaluation/"
JUDGE, TABLES, CIRCULAR = ROOT + "judge.py", ROOT + "tables.py", ROOT + "scorers/circular.py"
MMMU, MATHVISTA, REVIEWS = (ROOT + f"scorers/{name}.py" for name in ("mmmu", "mathvista", "reviews"))
TASK = ROOT + "tasks/"
CIRCLES = "evaluation/mmbench::test_circular_scores_by_hand"
FAULTS: tuple[Fault, ...] = (
    Fault("the article is a letter", CIRCULAR, 'not (bare == ["A"] and len(answer.split()) > MANY_WORDS)', "True",
          "evaluation/mmbench::test_the_letter_of_an_answer"),
    Fault("one right order suffices", CIRCULAR, "return all(", "return any(", CIRCLES),
    Fault("each order is a question", TASK + "mmbench.py", "unit = str(index % CIRCLE)", "unit = str(index)", CIRCLES),
    Fault("a circle may lack answers", TASK + "mmbench.py", '"right": is_whole and', '"right":',
          "evaluation/mmbench::test_a_circle_with_a_missing_answer_is_not_right"),
    Fault("a missing choice in the middle", TASK + "mmbench.py", "                break\n", "                continue\n",
          "evaluation/mmbench::test_the_prompt_is_that_of_cumo"),
    Fault("a formula in the sheet", TABLES, '"s" if isinstance(value, str)', '"f" if isinstance(value, str)',
          "evaluation/mmbench::test_the_sheet_is_that_of_the_converter"),
    Fault("the first of several letters", MMMU, "return max(found, key=lambda letter: answer.rfind(form.format(letter)))",
          "return found[0]", "evaluation/mmmu::test_the_letter_of_an_answer"),
    Fault("short answers are searched for texts", MMMU, "len(answer.split()) > LONG", "True",
          "evaluation/mmmu::test_the_letter_of_an_answer"),
    Fault("a single character anywhere", MMMU, 'return [f" {text}", f"{text} "] if len(text) == 1 else [text]', "return [text]",
          "evaluation/mmmu::test_open_answers"),
    Fault("an equation in each line", MMMU, '(*KEYS, "=") if number == len(lines) - 1 else KEYS', '(*KEYS, "=")',
          "evaluation/mmmu::test_what_an_open_answer_may_mean"),
    Fault("guesses of any seed", TASK + "mmmu.py", "random.Random(SEED)", "random.Random(7)",
          "evaluation/mmmu::test_scores_by_hand"),
    Fault("options are executed", TASK + "mmmu.py", "ast.literal_eval(value)", "eval(value)",
          "evaluation/mmmu::test_a_bad_question_is_named"),
    Fault("decimals of a parquet file", MATHVISTA, "int(precision)", "precision",
          "evaluation/mathvista::test_normal_forms_of_numbers"),
    Fault("replies of the judge in another order", TASK + "mathvista.py", "zip(places, replies, strict=True)",
          "zip(places, reversed(replies), strict=True)", "evaluation/mathvista::test_scores_by_hand_with_a_judge"),
    Fault("a grade above one", REVIEWS, "return value if value <= 1 else None", "return value", "evaluation/mmvet::test_the_grade_of_a_review"),
    Fault("the mean of ratios", REVIEWS, "100 * sum(second for _, second in pairs) / total",
          "100 * sum(b / a for a, b in pairs) / len(pairs)",
          "evaluation/llava_bench::test_the_relative_score_is_one_of_sums"),
    Fault("both answers change places", TASK + "llava_bench.py", "first, second = pair or FAILED", "second, first = pair or FAILED",
          "evaluation/llava_bench::test_scores_by_hand"),
    Fault("options are no part of a request's digest", JUDGE, '"messages": messages, **options}', '"messages": messages}',
          "evaluation/judge::test_nothing_is_asked_twice_and_options_count"),
    Fault("answers of the file are asked again", JUDGE, "if key not in self._answers}", "if True}",
          "evaluation/judge::test_nothing_is_asked_twice_and_options_count"),
    Fault("a torn line stays", JUDGE, "self._file.truncate(end)", "pass",
          "evaluation/judge::test_a_killed_run_loses_at_most_a_torn_line"),
    Fault("answers are written at the end", JUDGE, "            self._file.flush()\n", "",
          "evaluation/judge::test_an_answer_is_on_disk_as_soon_as_it_is_there"),
    Fault("lone surrogates are sent", JUDGE, 'text.encode("utf-8", "replace").decode()', "text",
          "evaluation/judge::test_texts_of_any_kind_are_sent"),
)  # fmt: skip
