"""What `train_tiny.py` is made of: drawing, dialogues, vocabulary, learning, evaluation."""
