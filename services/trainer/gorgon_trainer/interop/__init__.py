"""Draft heads in the layouts of other projects, read and written.

Head i (0-based) of a foreign checkpoint predicts the token i + 2 positions after the one whose hidden state it reads;
here offsets say so, and a head of offset 1, which repeats the backbone, has no place there.
"""
