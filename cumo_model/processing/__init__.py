"""Pictures and prompts to tensors: image processor, tokenizer, conversation templates."""
