"""What the host computes for the engines: images, prompts, noise, schedules, modulation."""
