"""TensorRT-LLM 1.2.1 without TensorRT-LLM: a reader that executes its checkpoints, its runtime, and ``trtllm-build``.

Written from TensorRT-LLM's own sources (each file names them), never from qie's writer, so that a misunderstanding of
the format shows as a wrong result and not as two equal mistakes.
"""
