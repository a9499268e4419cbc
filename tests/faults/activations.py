"""Faults in activations with parameters, interleaved halves, and the experts of transformers that need them."""

from tests.faults import Fault

TABLE, TRITON = "cumo_kernels/activations.py", "cumo_kernels/backends/triton/"
CUDA = "csrc/"
H = "cumo_kernels/integrations/transformers.py"

FAULTS = (
    Fault("the clamped gate keeps its slope beyond the limit", TABLE,
          "torch.ops.aten.silu_backward(torch.where(z <= limit, grad, 0), _below(z, limit))",
          "torch.ops.aten.silu_backward(grad, _below(z, limit))", "activation", "gradcheck or slope"),
    Fault("no slope at the limit", TABLE,
          "torch.where((up >= -self.limit) & (up <= self.limit), dup, 0)",
          "torch.where((up > -self.limit) & (up < self.limit), dup, 0)", "activation", "slope"),
    Fault("gpt-oss' up half without 1", TABLE, "return up + self.shift if self.shift else up", "return up",
          "activation", "formula"),
    Fault("step's gate clamped before silu", TABLE, "return _below(torch.nn.functional.silu(z), limit)",
          "return torch.nn.functional.silu(_below(z, limit))", "activation", "formula or parameters"),
    Fault("interleaved gradients side by side", TABLE,
          "return torch.stack([gate, up], dim=-1).flatten(-2)", "return torch.cat([gate, up], dim=-1)",
          "activation", "gradcheck"),
    Fault("infinite limits taken", TABLE, "if not 0 < values[key] < math.inf:", "if not 0 < values[key]:",
          "activation", "wrong_parameters"),
    Fault("up half not clamped from below", TRITON + "common.py",
          "tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))", "tl.where(u > LIMIT, LIMIT, u)",
          "activation", "test_activate"),
    Fault("alpha not in the slope", TRITON + "common.py", "slope = s + below * ALPHA * ds", "slope = s + below * ds",
          "activation", "test_activate"),
    Fault("interleaved up half read at the gate", TRITON + "common.py",
          "return 1 if is_interleaved(NAME) else N", "return 0 if is_interleaved(NAME) else N",
          "activation experts", "interleaved"),
    Fault("gpt-oss' halves taken for side by side", H, 'words += ["interleaved"] if is_interleaved else []', "pass",
          "transformers", "own_loop"),
    Fault("a gate that is not of transformers is taken for one of its own", H,
          'is_theirs = getattr(method, "__module__", "").startswith("transformers.models.")', "is_theirs = True",
          "transformers", "of_another_module"),
    Fault("slope 0 at the limit as torch.clamp has it from 2.15", TABLE, "torch.where(z > limit, limit, z)",
          "torch.where(z >= limit, limit, z)", "activation", "slope"),
    Fault("limits of layers traced as variables", H, "return guard_scalar(value) if isinstance(value, int | float) else value",
          "return value", "transformers", "different_limits"),
    Fault("an expert's last row searched in the next expert", CUDA + "experts.cu",
          "if (expert_offsets[middle + 1] <= position)", "if (expert_offsets[middle + 1] < position)", "experts", "bias"),
    Fault("limits of strings taken", H, "return isinstance(value, int | float) and value > 0", "return bool(value)",
          "transformers", "cannot_be_read"),
)  # fmt: skip
