"""Training data: prompts from public files, filtered, split and written as records that the backbone will answer."""
