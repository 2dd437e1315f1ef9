"""Sessions: loaded engines behind one protocol, one file or folder per backend; choosing and loading engines."""
