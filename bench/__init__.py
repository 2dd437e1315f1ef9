"""Benchmarks: ``python -m bench.NAME``, from the root of the repository. Not part of the wheel.

Each prints a table, and writes its figures with machine and versions as JSON with ``--json FILE``.

- ``cpu_edit``: an edit on the CPU against diffusers, torch.compile and OpenVINO.
- ``fullsize``: a build of the published model with random weights, stage by stage.
- ``quantization``: accuracy and speed of every scheme on the pocket model.
- ``calibration``: time and memory that the calibration of the published model needs.
- ``calibration_area``: whether the area of the samples changes what a calibration is worth.
- ``stream``: time and memory of the weight stream, against the time of the disk alone.
- ``pocket_quality``: edits of the pocket model against the exact results.
- ``pocket_sheet``: edits of the pocket model as one image.
"""
