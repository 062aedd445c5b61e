"""Making a trained model smaller: low-rank factors in the metric that counts, compensation, quantizers, key-value caches."""
