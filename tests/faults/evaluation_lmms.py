"""Faults in what tasks of lmms-eval ask for, and in the probabilities of given answers."""

from tests.faults import Fault

REQUESTS, LIKELIHOOD = ("cumo_model/evaluation/" + name for name in ("lmms/requests.py", "likelihood.py"))
REQUEST, LIKELY = "evaluation/lmms_requests::", "evaluation/likelihood::"
ONE_BY_ONE = LIKELY + "test_a_batch_has_the_probabilities_of_one_token_after_the_other"
SAMPLING = REQUEST + "test_sampling_of_a_task"
FAULTS: tuple[Fault, ...] = (
    Fault("a temperature samples in spite of do_sample", REQUESTS, 'not given.get("do_sample", True) or ', "",
          SAMPLING),
    Fault("do_sample alone is greedy", REQUESTS, '1.0 if given.get("do_sample") else 0.0', "0.0", SAMPLING),
    Fault("top_p is dropped", REQUESTS, 'given.get("top_p", 1.0)', "1.0", SAMPLING),
    Fault("the last of several ends", REQUESTS, "answer[: min(ends)]", "answer[: max(ends)]",
          REQUEST + "test_an_answer_ends_before_the_first_of_several_texts"),
    Fault("unknown options are not told", REQUESTS, "if name not in READ]", "if name in ()]",
          REQUEST + "test_an_answer_ends_before_the_first_of_several_texts"),
    Fault("two system texts", REQUESTS, "return found if is_told else ", "return ",
          REQUEST + "test_messages_keep_turns_and_their_system_text"),
    Fault("markers in messages are kept", REQUESTS, "if any(IMAGE_MARKER in text for text in texts):", "if False:",
          REQUEST + "test_texts_and_messages_become_the_same_conversation"),
    Fault("a batch mixes groups", REQUESTS, "setdefault(groups[number], [])", "setdefault(None, [])",
          REQUEST + "test_batches_hold_one_group_and_the_longest_first"),
    Fault("half of a batch is lost", REQUESTS, "items[half:], stop)", "items[half + 1 :], stop)",
          REQUEST + "test_a_batch_is_halved_until_the_reason_is_found"),
    Fault("the token after is scored", LIKELIHOOD, "logits_to_keep=longest + 1).logits[:, :-1]",
          "logits_to_keep=longest).logits", ONE_BY_ONE),
    Fault("the end mark is scored too", LIKELIHOOD, "continue_final_message=True", "continue_final_message=False",
          ONE_BY_ONE),
    Fault("the image token has a probability", LIKELIHOOD, "logits[..., image] = -torch.inf", "pass", ONE_BY_ONE),
    Fault("shorter answers are padded with the prompt", LIKELIHOOD, "chosen[i, -length:].double()",
          "chosen[i].double()", ONE_BY_ONE),
    Fault("one right token is enough", LIKELIHOOD, "torch.equal(best[i, -length:], ids[i, -length:])",
          "bool((best[i, -length:] == ids[i, -length:]).any())", LIKELY + "test_the_greedy_answer_is_told"),
)  # fmt: skip
