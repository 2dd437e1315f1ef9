"""Sessions: loaded engines behind one protocol, one file per backend; which engine fits, and how it is loaded."""
