from qie.compiler.weights.stream import write_weights


class WeightsFile:
    def __init__(self, weights, path):
        self.weights, self.path, self.written = weights, path, None
        self.sources = [(w.subfolder, w.source) for w in weights]


def stream(consumers, readers, subfolder, *, progress):
    for c in consumers:
        if isinstance(c, WeightsFile):
            c.written = write_weights(c.weights, readers, c.path, progress=progress)
        else:
            for s, n in c.sources:
                c.take(s, n, readers[s].read(n))
            c.finish()
        yield c
