"""The private mechanism: plan, sampling, clipping, noise, and the step that joins them.

Nothing is imported here: accounting needs ``plan`` and the secret bits alone, and no torch.
"""
