"""Whether the engines of a bundle are right: golden file, checks, bisect, reports; the torch pipeline is the judge."""
