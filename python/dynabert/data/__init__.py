"""Tasks, tokenised batches and metrics: what the training and the evaluation of a model read."""
