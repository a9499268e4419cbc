"""Faults in the options of routers, balancing without a loss, and replay."""

from tests.faults import Fault

MODEL, TRAINING = "cumo_model/model/", "cumo_model/training/"

FAULTS_OF_KERNELS = (
    Fault("the bias moves with the load", "cumo_kernels/ops/balancing.py",
          "load.sum() - num_experts * load", "num_experts * load - load.sum()", "balancing"),
    Fault("padding counts in the importance", "cumo_kernels/ops/noisy.py",
          "kept(routing.topk_weights).flatten()", "routing.topk_weights.flatten()", "router_noise",
          harmless="tests/model/test_routers.py notices it, which tests of the kernels do not run"),
)  # fmt: skip

FAULTS = (
    Fault("jitter in evaluation", MODEL + "moe.py",
          "if not self.training or not (self.router.jitter", "if not (self.router.jitter",
          "routers::test_a_layer_routes_as_the_kernels_with_its_options"),
    Fault("a limited capacity in evaluation", MODEL + "moe.py",
          "options.capacity_factor is not None and self.training", "options.capacity_factor is not None",
          "routers::test_a_layer_routes_as_the_kernels_with_its_options"),
    Fault("the record has the choice after the drop", MODEL + "moe.py",
          "            chosen = routing.topk_indices\n            routing = with_capacity("
          "routing, options.capacity(*sizes, num_experts), options.drop)",
          "            routing = with_capacity("
          "routing, options.capacity(*sizes, num_experts), options.drop)\n"
          "            chosen = routing.topk_indices",
          "routers::test_a_layer_routes_as_the_kernels_with_its_options; "
          "replay::test_a_replayed_step_has_the_same_bits_and_the_same_records"),
    Fault("the bias becomes bf16", MODEL + "moe.py",
          "if bias is not None and self.selection_bias.dtype != torch.float32:", "if False:",
          "routers::test_the_bias_stays_fp32"),
    Fault("the bias is loaded in bf16", MODEL + "host.py",
          '_keep_in_fp32_modules_strict = {"selection_bias"}', "_keep_in_fp32_modules_strict = None",
          "routers::test_a_saved_model_opens_with_bias_and_noise"),
    Fault("one gate more slot per expert", MODEL + "routers.py",
          "math.ceil(self.capacity_factor", "1 + math.floor(self.capacity_factor",
          "routers::test_a_layer_routes_as_the_kernels_with_its_options"),
    Fault("noisy top-k with the balance loss", MODEL + "losses.py",
          "torch.stack(own).mean() if own else balance", "balance",
          "routers::test_a_model_trains_with_options_in_all_places"),
    Fault("a tower alone forgets its routers", MODEL + "config.py",
          "            self.router = self.vision_config.router\n", "            pass\n",
          "routers::test_options_come_to_the_tower_and_back"),
    Fault("new biases are not zero", "cumo_model/checkpoints/upcycle.py",
          "            module.reset_balance()\n", "",
          "routers::test_upcycling_makes_routers_with_options"),
    # balancing
    Fault("the load of the last micro-batch only", TRAINING + "balancing.py",
          "self._loads.get(key, 0) + record.chosen_per_expert", "record.chosen_per_expert",
          "training/balancing::test_any_trainer_moves_the_biases_by_the_load_of_each_whole_step"),
    Fault("processes balance by themselves", TRAINING + "balancing.py",
          "            dist.all_reduce(whole)\n", "            pass\n",
          "training/balancing::test_processes_add_their_loads_up_in_one_collective"),
    Fault("the load after the drop", TRAINING + "balancing.py",
          "record.chosen_per_expert", "record.tokens_per_expert",
          "training/balancing::test_any_trainer_moves_the_biases_by_the_load_of_each_whole_step"),
    Fault("biases of frozen gates move", TRAINING + "balancing.py",
          "any(parameter.requires_grad for parameter", "any(True for parameter",
          "training/balancing::test_only_the_step_counts_and_only_the_layers_of_the_model_with_a_trained_gate"),
    Fault("the load of the step before counts again", TRAINING + "balancing.py",
          "        self._loads: dict[tuple[str, int], Tensor] = {}\n", "",
          "training/balancing::test_a_step_that_failed_leaves_nothing_to_the_next"),
    # replay
    Fault("every call takes the first record", MODEL + "replay.py",
          "return entries[number]", "return entries[0]",
          "replay::test_calls_of_one_layer_take_their_records_in_turn"),
    Fault("recomputations take their records in the order of backward", MODEL + "replay.py",
          "_memos.setdefault(frame[0], _Memo())", "_memos.setdefault(torch.utils.checkpoint, _Memo())",
          "replay::test_recomputations_of_several_calls_take_each_their_own "
          "test_recomputation_takes_the_record_of_its_call_also_after_the_block"),
    Fault("the second backward pass goes on counting", MODEL + "replay.py",
          "key = id(layer), recomputation", "key = id(layer), None",
          "replay::test_two_calls_in_one_frame_and_two_backward_passes"),
    Fault("recomputation outside of frames chooses by itself", MODEL + "replay.py",
          "if current != -1 and layer in _replayed:", "if False:",
          "replay::test_recomputation_whose_record_is_unknown_is_refused"),
    Fault("records may be left", MODEL + "replay.py",
          "    replay.check_used()\n", "",
          "replay::test_a_record_that_is_left_is_named"),
    Fault("new noise in a replay", MODEL + "moe.py",
          "seed = given.seed.to(rows.device) if is_replayed else self._seed(rows)", "seed = self._seed(rows)",
          "replay::test_a_replayed_step_has_the_same_bits_and_the_same_records"),
)  # fmt: skip
