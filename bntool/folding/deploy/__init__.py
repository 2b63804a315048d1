"""Deploy forms: networks whose parallel convolutions are one convolution, under the names that their code gives it."""
