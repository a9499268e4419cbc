"""Conversion of pictures and prompts to tensors: image processor, tokenizer, conversation templates."""
