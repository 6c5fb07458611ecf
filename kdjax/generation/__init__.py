"""What a model's own answers are good for: a data set, a mark, a reward."""
