"""The geometry of sentence encoders: isotropy, contextualization and learning dynamics."""
