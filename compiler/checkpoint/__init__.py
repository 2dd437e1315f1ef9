"""A folder or hub id becomes a checkpoint: its model, its tensors by name, its tokenizer, and LoRAs."""
