"""The Gorgon trainer: data, self-distillation, training, evaluation and publishing of draft heads."""
