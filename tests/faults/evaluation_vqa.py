"""Faults in the benchmarks with short answers: their scorers, their files, and objects of own pictures."""

from tests.faults import Fault

SCORERS, TASKS = "cumo_model/evaluation/scorers/", "cumo_model/evaluation/tasks/"
VQA, YES_NO, MME, LETTERS, CHAIR = (
    SCORERS + f"{name}.py" for name in ("vqa", "yes_no", "mme", "letters", "chair")
)
SCORER, TASK, OBJECTS = "evaluation/text_scorers::", "evaluation/short_tasks::", "evaluation/objects::"
LISTS = TASK + "test_official_files_give_the_prompts_of_the_list"
FAULTS: tuple[Fault, ...] = (
    Fault("no reference is left out", VQA, "min(3, matches - 1)", "min(3, matches)",
          SCORER + "test_vqa_accuracy_leaves_each_reference_out_once"),
    Fault("marks become a space everywhere", VQA, "apart = in_number or", "apart = False and",
          SCORER + "test_normalised"),
    Fault("commas in numbers are not looked for", VQA, "_COMMA_IN_NUMBER.search(text) is not None", "False",
          SCORER + "test_vqa_accuracy_of_server"),
    Fault("equal references are normalised too", VQA, "if len(set(kept)) > 1:", "if True:",
          SCORER + "test_vqa_accuracy_of_server"),
    Fault("all periods are taken away", VQA, 'sub("", result, count=_PERIODS)', 'sub("", result)',
          SCORER + "test_normalised"),
    Fault("an answer in lower case is kept with its periods", SCORERS + "exact.py", 'answer.rstrip(".")', "answer",
          SCORER + "test_exact_match"),
    Fault("later sentences count", YES_NO, 'answer.split(".")[0]', "answer", SCORER + "test_pope_says_yes"),
    Fault("precision and recall are changed for each other", YES_NO, '"precision": both / yes if yes',
          '"precision": both / present if yes', SCORER + "test_five_figures"),
    Fault("one right answer is enough for accuracy+", MME, "sum(map(all, pictures))", "sum(map(any, pictures))",
          SCORER + "test_mme_points_and_sums"),
    Fault("the whole answer is searched", MME, ".lower()[:4]", ".lower()", SCORER + "test_mme_verdict"),
    Fault("the first of two letters", LETTERS, "if len(found) == 1 else \"\"", "if found else \"\"",
          SCORER + "test_letter_by_pattern"),
    Fault("two answers are one", LETTERS, "if len(found) == 1 else None", "if found else None",
          SCORER + "test_scienceqa_letter"),
    Fault("parts of words are objects", CHAIR, 'rf"(?![^\\W{UNSPACED}])"', '""', SCORER + "test_mentions"),
    Fault("the shorter of two names", CHAIR, "(-len(key), key)", "(len(key), key)", SCORER + "test_mentions"),
    Fault("questions without a picture are asked", TASKS + "scienceqa.py",
          'if line.get("image") is None:', "if False:", TASK + "test_scienceqa_by_hand"),
    Fault("videos are asked", TASKS + "seed.py", '== "image"', '!= ""', TASK + "test_seed_by_hand"),
    Fault("the instruction of the official questions is kept", TASKS + "mme.py", '.replace(YES_OR_NO, "")', "", LISTS),
    Fault("labels in the order of LLaVA's file", TASKS + "pope.py", "at >= len(official[kind]) or", "False and",
          TASK + "test_a_wrong_file_is_named"),
    Fault("only asked questions are submitted", TASKS + "vqav2.py", 'for number in data.more["all"]]',
          'for number in texts]', TASK + "test_vqav2_writes_what_its_server_takes"),
    Fault("equal questions are one", TASKS + "common.py", "if (times := keys[key]) > 1:", "if (times := 1) > 1:",
          TASK + "test_textvqa_asks_equal_questions_apart"),
    Fault("adversarial objects are the frequent ones", TASKS + "objects.py", "(-near[name], name)",
          "(-frequency[name], name)", OBJECTS + "test_popular_are_the_most_frequent_and_adversarial_the_nearest"),
    Fault("all pictures draw the same", TASKS + "objects.py", 'f"{seed}/{picture}"', "seed",
          OBJECTS + "test_each_picture_has_draws_of_its_own"),
    Fault("draws depend on the order of labels", TASKS + "objects.py", "picture: sorted(set(objects))",
          "picture: list(dict.fromkeys(objects))", OBJECTS + "test_draws_depend_on_seed_and_picture_alone"),
)  # fmt: skip
