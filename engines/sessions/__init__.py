"""Sessions: loaded engines behind one protocol, one file a backend; which engine fits, and how it is loaded."""
