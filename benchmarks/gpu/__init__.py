"""Everything that wants a CUDA GPU, by a plan with a deadline (command.py); without one, a prediction (roofline.py)."""
