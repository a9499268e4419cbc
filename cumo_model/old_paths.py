"""Module paths of cumo 0.1 that have changed; they are removed in 0.2."""

# old module paths of cumo 0.1, but for cumo_model.upcycle, which would hide the function of that name
MOVED = {
    "model": "clip_moe compat config cumo llm_moe losses merge=image_tokens mlp_moe moe quantize "
    "vision=pyramid",
    "processing": "conversation sentencepieces templates",
    "checkpoints": "checkpoint=convert files=folders layout original_config parts patch shards "
    "tool=upcycle_checkpoint",
    "training": "adapters=lora flops monitor parallel recipe recover spread=expert_checkpoints start trainer "
    "zero=deepspeed",
    "analysis": "experts plots",
    "serving": "chat",
}
OLD = {f"cumo_model.{entry.partition('=')[0]}" for names in MOVED.values() for entry in names.split()}
