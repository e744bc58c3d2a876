"""The standalone network and how it writes text, for every objective; imports torch alone."""
