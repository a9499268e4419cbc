"""Faults in the page in the browser."""

from tests.faults import Fault

W = "cumo_model/serving/web/"

FAULTS = (
    Fault("an upload keeps its name", W + "uploads.py",
          'name = f"{secrets.token_hex(16)}.png".encode()',
          'name = (re.search(rb\'filename="([^"]*)\', head) or [b"", b"a"])[1]',
          "serving/web_server::test_names_of_uploads_never_reach_the_file_system"),
    Fault("uploads of any size", W + "uploads.py", "if len(body) > UPLOAD:", "if False:",
          "serving/web_server::test_uploads_that_are_none_or_too_large_are_refused"),
    Fault("pages may load from other servers", W + "uploads.py",
          '"headers": [*message.get("headers", ()), *HEADERS]}', '"headers": [*message.get("headers", ())]}',
          "serving/web_server::test_no_other_file_is_served_and_no_other_server_is_allowed"),
    Fault("addresses of pictures are fetched", W + "page.py",
          "if str(file).lower().startswith(", "if str(file).startswith(",
          "serving/web_server::test_an_address_is_not_fetched"),
    Fault("ports above the last are another port", W + "server.py", "if not 0 <= port < 2**16:", "if port < 0:",
          "serving/web_server::test_what_cannot_be_served_is_named"),
    Fault("Stop is not heard", "cumo_model/serving/replies.py", "if self._is_stopped:", "if False:",
          "serving/web::test_stop_keeps_what_was_said"),
    Fault("a cleared answer comes back", W + "talk.py",
          "self.turns, self.current, self._stream = [], None, None", "self.turns = []",
          "serving/web::test_a_second_question_waits_and_clear_ends_an_answer"),
    Fault("all sessions have one conversation", W + "talk.py",
          "self._talks.setdefault(session, ", 'self._talks.setdefault("", ',
          "serving/web::test_sessions_do_not_mix_and_wait_for_each_other"),
    Fault("an answer to a closed page goes on", W + "page.py",
          "            page.unload(self._leave)\n", "",
          "serving/web::test_closing_the_page_ends_its_answer_and_deletes_its_pictures"),
    Fault("a refused question stays in the conversation", W + "talk.py",
          "[turn if is_done else replaced]", "[turn]",
          "serving/web::test_bad_input_is_one_line_and_leaves_the_conversation"),
    Fault("Regenerate keeps the old answer too", W + "talk.py",
          "self.turns.remove(replaced)", "pass",
          "serving/web::test_regenerate_asks_the_last_question_again_and_clear_forgets_all"),
    Fault("top-p of the page ignored", W + "page.py",
          "float(temperature), float(top_p), self.sampling.seed", "float(temperature), 1.0, self.sampling.seed",
          "serving/web::test_the_sliders_are_the_sampling"),
)  # fmt: skip
