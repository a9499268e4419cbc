"""Faults in answers to files of questions, and in folders that open with trust_remote_code."""

from tests.faults import Fault

ROOT = "cumo_model/serving/"
FILE, ANSWER, QUESTIONS, REMOTE = (ROOT + "answer_file.py", ROOT + "answer.py", ROOT + "questions.py",
                                   "cumo_model/model/remote.py")  # fmt: skip
ORDER = "serving/answer::test_answers_are_those_of_each_question_alone_and_in_order"
KILLED = "serving/answer::test_a_killed_run_goes_on_where_it_was"
FAILED = "serving/answer::test_a_question_that_cannot_be_answered_is_named_and_tried_again"
FAULTS: tuple[Fault, ...] = (
    Fault("answers in the order in which they came", FILE,
          "question.key: found[question.key] for question in self.questions if question.key in found",
          "number: answer for number, answer in found.items()", ORDER),
    Fault("parts are left behind", FILE, "path.unlink()\n", "pass\n", ORDER),
    Fault("settings of a part are not looked at", FILE, "if head != self._head:", "if False:", KILLED),
    Fault("a torn line is left in the part", FILE,
          "self._part.truncate(content.rfind(b\"\\n\") + 1)", "pass", KILLED),
    Fault("answers of the part are asked again", ANSWER,
          "if question.key not in file.answers]", "if True]", KILLED),
    Fault("another run's file is taken over", FILE,
          'answer["metadata"]["run"] == self.run', "True",
          "serving/answer::test_two_runs_are_the_same_file_and_a_finished_one_is_left_alone"),
    Fault("all batches draw the same samples", ANSWER, "if sampling.seed is None:", "if True:",
          "serving/answer::test_each_batch_has_samples_of_its_own"),
    Fault("each process answers everything", ANSWER, "[rank::ranks]", "",
          "serving/answer::test_two_processes_share_the_questions_and_one_goes_on_for_both"),
    Fault("the system text is dropped", ANSWER, "first = [] if system is None else", "first = [] if True else",
          "serving/answer::test_the_system_text_is_in_each_conversation"),
    Fault("the first of several pictures in the place of all", QUESTIONS,
          '"image": pictures[number]', '"image": pictures[0]', ORDER),
    Fault("a refused question ends the run", ANSWER,
          "if not any(refused):  # it concerns all questions", "if True:", FAILED),
    Fault("a batch without memory is halved unevenly", ANSWER,
          "half = (len(talks) + 1) // 2", "half = len(talks) - 1",
          "serving/answer::test_a_batch_without_memory_is_halved"),
    Fault("double ids", QUESTIONS, "if question.key in seen:", "if False:", "serving/answer::test_a_bad_line_is_named"),
    Fault("source files are copied", REMOTE,
          'if not cls.__module__.startswith("cumo_model."):', "if True:",
          "remote::test_a_loaded_folder_is_saved_as_it_was"),
    Fault("asking for one folder asks for all later ones", REMOTE,
          '        vars(part).pop("auto_map", None)\n        if is_set:', "        if is_set:",
          "remote::test_nothing_is_written_unless_asked"),
    Fault("entries of others are dropped", REMOTE,
          "if not _is_ours(value)}", "if False}", "remote::test_entries_of_others_and_of_a_repository"),
    Fault("the names of a repository are not ours", REMOTE,
          'value.rpartition("--")[2].startswith', "value.startswith",
          "remote::test_entries_of_others_and_of_a_repository"),
    Fault("the processor forgets it", "cumo_model/processing/processor.py",
          'if auto_map := processor_dict.get("auto_map"):', "if auto_map := None:",
          "remote::test_a_loaded_folder_is_saved_as_it_was"),
)  # fmt: skip
