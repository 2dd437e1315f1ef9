"""The graphs: one file a component, written with onnxscript.nn modules named as in the checkpoint."""
